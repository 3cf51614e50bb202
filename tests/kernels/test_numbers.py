"""Numbers that are no ordinary ones: results are infinite, NaN or finite where torch.nn's are, and gradients finite
where torch.nn's are. And counts of rows.

Where an infinite number meets a gate's gradient, torch's may be NaN, 0 times inf, and ours inf: a saturated gate is 0
or 1 to the last bit there, and here it may be one rounding off.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastrnn
from tests.helpers import KINDS, Results, assert_equal, build, evaluate, make_state, pair, randn, threads
from tests.kernels.test_accuracy import assert_accurate

T, B, I, H = 6, 3, 5, 18  # noqa: E741
KIND = pytest.mark.parametrize("kind", KINDS)
SPECIAL = (math.inf, -math.inf, math.nan, 1e30, -1e30)


def classes(x: Tensor) -> Tensor:
    """0 of what is finite, else a number for its kind."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0))


def assert_alike(actual: Results, expected: Results) -> None:
    """Equal where both are finite, which they are in the same places."""
    assert list(actual) == list(expected)
    for name, want in expected.items():
        got, finite = actual[name], want.isfinite()
        kinds = torch.isfinite if name.startswith("grad") else classes
        assert torch.equal(kinds(got), kinds(want)), f"{name}:\n{got}\nexpected\n{want}"
        largest = want[finite].abs().max().clamp(min=1) if finite.any() else 1
        assert ((got[finite] - want[finite]).abs() <= 1e-4 * largest).all(), name


@pytest.mark.parametrize("where", ["input", "state", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
@KIND
def test_special_values(kind: str, where: str) -> None:
    """One such number, of every kind: all results and gradients of both directions."""
    # A GRU multiplies its state by gates: by 0 in torch.nn, and here by what one rounding leaves (README, limits).
    values = (math.nan,) if (kind, where) == ("GRU", "state") else SPECIAL
    for value in values:
        torch.manual_seed(0)
        ours, theirs = pair(kind, I, H, bidirectional=True)
        x, hx = randn(T, B, I, dtype=torch.float32), make_state(kind, 2, B, hidden=H, dtype=torch.float32)
        if where == "input":
            x[2, 1, 3] = value
        elif where == "state":
            (hx[0] if kind == "LSTM" else hx)[1, 1, 3] = value
        else:
            with torch.no_grad():
                for module in (ours, theirs):
                    getattr(module, where).view(-1)[7] = value
        assert_alike(evaluate(ours, x, hx), evaluate(theirs, x, hx))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 100.0, 1e4, 1e15])
@KIND
def test_tiny_and_huge(kind: str, scale: float) -> None:
    """Denormal inputs, and gates that are saturated: weights and inputs of this size, in float32."""
    ours, theirs = pair(kind, I, H, 2)
    with torch.no_grad():
        for module in (ours, theirs):
            for name, p in module.named_parameters():
                if scale > 1 and name.startswith("weight_ih"):
                    p.mul_(scale)
    x = randn(T, B, I, dtype=torch.float32) * min(scale, 1.0)
    assert_alike(evaluate(ours, x), evaluate(theirs, x))


@pytest.mark.parametrize("kind", ["RNN_TANH", "RNN_RELU"])
def test_denormals_are_kept(kind: str) -> None:
    """A result below the smallest normal number is not 0, unless torch was told so."""
    module = build(fastrnn, kind, 1, 33, bias=False)
    x = torch.full((3, 2, 1), 1e-40)
    with torch.no_grad():
        module.weight_ih_l0.fill_(0.5)
        module.weight_hh_l0.fill_(0)
        for given in (module(x)[0], module.double()(x.double())[0].float()):
            assert torch.equal(given, torch.full((3, 2, 33), 0.5) * 1e-40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_error_over_many_steps(kind: str, dtype: torch.dtype) -> None:
    """In low precision it grows with the steps no faster than torch.nn's."""
    assert_accurate(kind, dtype, (1200, 1, 3), 5)


@KIND
def test_more_rows_than_16_bits_count(kind: str) -> None:
    """65,537 rows and more, in one step and in several; on threads, too."""
    ours, theirs = pair(kind, 2, 3, dtype=torch.float64)
    for steps, batch in ((1, 65_537), (2, 70_001)):
        x = randn(steps, batch, 2)
        for count in (1, 2):
            with threads(count):
                assert_equal(evaluate(ours, x), evaluate(theirs, x), 1e-9)
