"""Errors against float64 are at most twice torch.nn's own in the same dtype, plus one rounding of the result.

What is compared is the root mean square over all values of a tensor and over some seeds. A largest error is the luck of
one value and would make the bound a matter of chance; that no single value is wrong is modules/test_parity.py's in
float64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from tests.helpers import CELL_KINDS, KINDS, build, leaf, make_state, map_state, randn, tensors

# torch.nn warns once that it has no faster kernel for projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

SEEDS = 3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])


def evaluate(module: nn.Module, input: Tensor, hx: Any, gradients: list[Tensor]) -> dict[str, Tensor]:
    """All results and gradients in float64, the gradients of the results given."""
    dtype = next(module.parameters()).dtype
    input, hx = leaf(input.to(dtype)), map_state(lambda x: leaf(x.to(dtype)), hx)
    results = [x for each in tensors(module(input, hx)) for x in tensors(each)]
    torch.autograd.backward(results, [g.to(dtype) for g in gradients])
    named = {f"result {i}": x for i, x in enumerate(results)}
    named["grad of input"] = input.grad
    named.update({f"grad of state {i}": x.grad for i, x in enumerate(tensors(hx))})
    named.update({f"grad of {name}": x.grad for name, x in module.named_parameters()})
    return {name: x.detach().double() for name, x in named.items()}


def away_from_the_kink(module: nn.Module) -> None:
    """Half of the units stay above 0 and half below: else rounding may switch one, and its gradient jumps."""
    with torch.no_grad():
        for name, x in module.named_parameters():
            if name.startswith("bias_ih"):
                x.copy_(torch.where(torch.arange(len(x)) % 2 == 0, 3.0, -3.0))
            elif name.startswith("weight"):
                x.mul_(0.2)


def assert_accurate(kind: str, dtype: torch.dtype, shape: tuple[int, ...], hidden: int, **options: Any) -> None:
    """shape: of the input."""
    relu, proj = kind.endswith("RELU"), options.get("proj_size", 0)
    layers = (options.get("num_layers", 1) * (1 + options.get("bidirectional", False)),) if len(shape) == 3 else ()
    sums: dict[str, Tensor] = {}  # squares of: our error, torch's error, the value
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        theirs = build(nn, kind, shape[-1], hidden, dtype=dtype, **options)
        if relu:
            away_from_the_kink(theirs)
        ours = build(fastrnn, kind, shape[-1], hidden, dtype=dtype, **options)
        exact = build(nn, kind, shape[-1], hidden, dtype=torch.float64, **options)
        for module in (ours, exact):  # the same rounded parameters
            module.load_state_dict(theirs.state_dict())
        input = randn(*shape, seed=seed, dtype=dtype)
        hx = make_state(kind, *layers, shape[-2], hidden=hidden, proj=proj, seed=seed + 10, dtype=dtype)
        with torch.no_grad():
            results = exact(input.double(), map_state(lambda x: x.double(), hx))
        flat = [x for each in tensors(results) for x in tensors(each)]
        if relu:
            assert ((flat[0] == 0) | (flat[0] > 0.1)).all()
        gradients = [randn(*x.shape, seed=20 + i, dtype=dtype) for i, x in enumerate(flat)]
        actual, torchs, expected = (evaluate(m, input, hx, gradients) for m in (ours, theirs, exact))
        for name, value in expected.items():
            squares = [x.square().sum() for x in (actual[name] - value, torchs[name] - value, value)]
            sums[name] = sums.get(name, 0) + torch.stack(squares)
    failures = []
    for name, squares in sums.items():
        size = math.sqrt(squares[2])
        error, other = (math.sqrt(x) / size / torch.finfo(dtype).eps for x in squares[:2])
        if not error <= 2 * other + 1:
            failures.append(f"{name}: error of {error:.2f} eps, torch.nn's {other:.2f} eps")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("shape", "hidden"), [((20, 3, 17), 17), ((8, 17, 5), 129), ((30, 1, 129), 33)], ids=["small", "wide", "long"]
)
@pytest.mark.parametrize(("kind", "proj"), [*((kind, 0) for kind in KINDS), ("LSTM", 5)])
@DTYPES
def test_modules(kind: str, proj: int, dtype: torch.dtype, shape: tuple[int, ...], hidden: int) -> None:
    options = {"proj_size": proj} if proj else {}
    assert_accurate(kind, dtype, shape, hidden, num_layers=2, bidirectional=True, **options)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_TANH"])
@DTYPES
def test_many_steps(kind: str, dtype: torch.dtype) -> None:
    """Rounding that is carried on."""
    assert_accurate(kind, dtype, (200, 2, 8), 16)


@pytest.mark.parametrize(("shape", "hidden"), [((3, 17), 17), ((17, 5), 129), ((129, 1), 1)])
@pytest.mark.parametrize("kind", CELL_KINDS)
@DTYPES
def test_cells(kind: str, dtype: torch.dtype, shape: tuple[int, ...], hidden: int) -> None:
    assert_accurate(kind, dtype, shape, hidden)
