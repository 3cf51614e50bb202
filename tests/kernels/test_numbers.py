"""Numbers that are no ordinary ones: results are infinite, NaN or finite where torch.nn's are, and gradients finite
where torch.nn's are. And counts of rows.

Where an infinite number meets a gate's gradient, torch's may be NaN, 0 times inf, and ours inf: a saturated gate is 0
or 1 to the last bit there, and here it may be one rounding off.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastrnn
from tests.helpers import (
    CELL_KINDS,
    KINDS,
    assert_equal,
    build,
    evaluate,
    evaluate_cell,
    make_state,
    pair,
    randn,
    tensors,
    threads,
)
from tests.kernels.test_accuracy import assert_accurate

T, B, I, H = 6, 3, 5, 18  # noqa: E741
KIND = pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])
# Of each type a denormal number, a huge one, and how near finite values have to be. Of half types other tests tell:
# where rounding switches a relu its gradient jumps.
NUMBERS = {
    torch.float64: (2.0**-1030, 1e30, 1e-9),
    torch.float32: (2.0**-132, 1e30, 1e-4),
    torch.bfloat16: (2.0**-130, 1e30, math.inf),
    torch.float16: (2.0**-20, 6e4, math.inf),
}
DTYPE = pytest.mark.parametrize("dtype", NUMBERS, ids=["f64", "f32", "bf16", "f16"])


def classes(x: Tensor) -> Tensor:
    """0 of what is finite, else a number for its kind."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0))


def assert_alike(module: nn.Module, other: nn.Module, *given: Any) -> None:
    """What the two compute is equal where both are finite, which they are in the same places: results and gradients,
    and results without autograd, which are another kernel's."""

    def results_of(m: nn.Module) -> dict[str, Tensor]:
        results = (evaluate_cell if isinstance(m, nn.RNNCellBase) else evaluate)(m, *given)
        with torch.no_grad():
            return results | {f"{i} without autograd": x for i, x in enumerate(tree_leaves(m(*given)))}

    actual = results_of(module)
    # Where a CPU multiplies by a matrix unit, oneDNN's products of bfloat16 take a NaN of one row into another.
    with torch.backends.mkldnn.flags(enabled=given[0].dtype != torch.bfloat16, allow_tf32=None):
        expected = results_of(other)
    assert list(actual) == list(expected)
    for name, want in expected.items():
        got, finite = actual[name], want.isfinite()
        kinds = torch.isfinite if name.startswith("grad") else classes
        assert torch.equal(kinds(got), kinds(want)), f"{name}:\n{got}\nexpected\n{want}"
        largest = want[finite].abs().max().clamp(min=1) if finite.any() else 1
        assert ((got[finite] - want[finite]).abs() <= NUMBERS[want.dtype][2] * largest).all(), name


def made(kind: str, dtype: torch.dtype, layers: int, **options: Any) -> tuple[nn.Module, nn.Module, Tensor, Any]:
    """A layer of ours and torch.nn's, or of a cell kind two cells, an input and a state."""
    torch.manual_seed(0)
    if kind in CELL_KINDS:
        sizes, leading, options = (B, I), (B,), {}
    else:
        sizes, leading = (T, B, I), (layers, B)
    state = make_state(kind, *leading, hidden=H, dtype=dtype)
    return *pair(kind, I, H, dtype=dtype, **options), randn(*sizes, dtype=dtype), state


@pytest.mark.parametrize("where", ["input", "state", "weight_ih", "weight_hh", "bias_ih"])
@DTYPE
@KIND
def test_special_values(kind: str, dtype: torch.dtype, where: str) -> None:
    """One such number, of every kind: all results and gradients of both directions."""
    huge = NUMBERS[dtype][1]
    values = [math.nan, math.inf, -math.inf, huge, -huge]
    if kind.startswith("GRU") and where == "state":
        # It multiplies its state by gates: by 0 in torch.nn, and here by what one rounding leaves (README, limits).
        del values[1:]
    if kind.endswith("RELU") and dtype == torch.float16:
        # Sums of such numbers are above what float16 holds. torch.nn rounds each to it and has inf - inf; here they
        # are float32.
        del values[3:]
    for value in values:
        ours, theirs, x, hx = made(kind, dtype, 2, bidirectional=True)
        if where in ("input", "state"):
            one = x if where == "input" else tensors(hx)[0]
            (one[1] if one.dim() == 3 else one)[1, 3] = value  # of one step or direction
        else:
            with torch.no_grad():
                for module in (ours, theirs):
                    next(p for name, p in module.named_parameters() if name.startswith(where)).view(-1)[7] = value
        assert_alike(ours, theirs, x, hx)


@pytest.mark.parametrize("size", ["denormal", "tiny", "saturated", "huge"])
@DTYPE
@KIND
def test_tiny_and_huge(kind: str, dtype: torch.dtype, size: str) -> None:
    """Denormal inputs, and gates that are saturated: inputs or weights of this size."""
    if (kind, dtype, size) == ("RNN_RELU", torch.float16, "huge"):
        pytest.skip("sums are above what float16 holds")
    denormal, huge, _ = NUMBERS[dtype]
    scales = {"denormal": denormal, "tiny": denormal**0.5, "saturated": 100, "huge": huge**0.5}
    ours, theirs, x, hx = made(kind, dtype, 2, num_layers=2)
    if scales[size] < 1:
        x *= scales[size]
    else:
        with torch.no_grad():
            for module in (ours, theirs):
                for name, p in module.named_parameters():
                    if name.startswith("weight_ih"):
                        p.mul_(scales[size])
    assert_alike(ours, theirs, x, hx)


@DTYPE
@pytest.mark.parametrize("kind", ["RNN_TANH", "RNN_RELU", "RNNCell_TANH", "RNNCell_RELU"])
def test_denormals_are_kept(kind: str, dtype: torch.dtype) -> None:
    """A result below the smallest normal number is not 0, unless torch was told so."""
    if dtype == torch.bfloat16 and fastrnn.instruction_set() in ("amx", "avx512bf16"):
        pytest.skip("the processor's own products of bfloat16 take them for 0")
    module: Any = build(fastrnn, kind, 1, 33, bias=False, dtype=dtype)
    x = torch.full((3, 2, 1)[kind in CELL_KINDS :], NUMBERS[dtype][0], dtype=dtype)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.fill_(0.5 if name.startswith("weight_ih") else 0)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            output = tree_leaves(module(x))[0]
        assert torch.equal(output, (x * 0.5).expand_as(output)) and (output != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_error_over_many_steps(kind: str, dtype: torch.dtype) -> None:
    """In low precision it grows with the steps no faster than torch.nn's."""
    assert_accurate(kind, dtype, (1200, 1, 3), 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_error_of_the_first_and_the_last_steps(kind: str, dtype: torch.dtype) -> None:
    """Of 10,000, in low precision, in the mean: not above torch.nn's where all roundings of the steps before may have
    added up, nor where there were none."""
    ours, theirs = pair(kind, 32, 32, dtype=dtype)
    exact = getattr(fastrnn, kind)(32, 32, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    x = randn(10_000, 2, 32, dtype=dtype)
    with torch.no_grad():
        want = exact(x.double())[0]
        errors = [(module(x)[0].double() - want).square() for module in (ours, theirs)]
    for steps in (slice(100), slice(-100, None)):
        error, other = (squares[steps].mean().sqrt() for squares in errors)
        assert error <= 1.5 * other, steps


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_16_bits_count(kind: str) -> None:
    """65,537 rows and more, in one step and in several; on threads, too."""
    ours, theirs = pair(kind, 2, 3, dtype=torch.float64)
    for steps, batch in ((1, 65_537), (2, 70_001)):
        x = randn(steps, batch, 2)
        for count in (1, 2):
            with threads(count):
                assert_equal(evaluate(ours, x), evaluate(theirs, x), 1e-9)
