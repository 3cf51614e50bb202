"""The package on older processors, which an emulator stands in for: `make test-portable`.

The emulated process computes with our kernels and writes down what came. It is compared here, with the reference on the
real processor: torch's own functions need not be right in the emulator, where torch.nn.LSTM on a Haswell is off by 0.2.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn
from fastrnn import reference
from tests.helpers import assert_equal, evaluate, make_state, randn, tensors
from tests.kernels.test_quantized import away_from_ties, direction_by_hand

ROOT = Path(__file__).resolve().parents[2]
T, B, I, H = 6, 5, 7, 33  # noqa: E741
# Of the larger of 1 and the largest value.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

# Started by `python -c`, with the calls to make and the place for their results.
EMULATED = """
import sys, torch, fastrnn
from tests.helpers import evaluate
calls = torch.load(sys.argv[1], weights_only=False)
results = [evaluate(*call) if list(call[0].parameters()) else call[0](*call[1:]) for call in calls]
torch.save((fastrnn.instruction_set(), results), sys.argv[2])
"""


class Reference(nn.Module):
    """A module's weights, of one layer and direction, in float64 and under the reference's loop."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.cell = module._cell
        for name, p in module.named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().double()))

    def forward(self, x: Tensor, hx: Any) -> Any:
        gates = x @ self.weight_ih_l0.t() + self.bias_ih_l0
        h, *c = (s[0] for s in tensors(hx))
        weights = self.weight_hh_l0[None], self.bias_hh_l0[None], None, None
        nothing = [None] * 7
        output, h_n, c_n, _ = reference.forward(self.cell, gates, *weights, h, *(c or [None]), *nothing, [False])
        return output, (h_n[None], c_n[None]) if c else h_n[None]


# A mere import takes a quarter of a minute there, so `make test` leaves them out. Where they are asked for, a missing
# emulator is a failure.
@pytest.mark.skipif(not os.environ.get("FASTRNN_PORTABLE"), reason="takes long: make test-portable")
@pytest.mark.parametrize(("cpu", "isa"), [("Westmere", "baseline"), ("Haswell", "avx2")])
def test_emulated(cpu: str, isa: str, tmp_path: Path) -> None:
    """The package takes the kernels whose instructions the processor has, and they compute what they should."""
    calls: list[tuple[Any, Tensor, Any]] = []
    for kind in ("LSTM", "GRU", "RNN"):
        for dtype in TOLERANCE:
            module = getattr(fastrnn, kind)(I, H, dtype=dtype)
            calls.append((module, randn(T, B, I, dtype=dtype), make_state(kind, 1, B, hidden=H, dtype=dtype)))
    # One step alone: where a rounding of h to 8 bits falls the other way, it is off by a whole 1/127 from there on.
    lstm, x = fastrnn.LSTM(I, H), away_from_ties(1, B, I)
    h, c = away_from_ties(1, B, H), torch.randn(1, B, H)
    torch.save([*calls, (fastrnn.quantize(lstm), x, (h, c))], tmp_path / "calls")
    subprocess.run(
        ["qemu-x86_64", "-cpu", cpu, sys.executable, "-c", EMULATED, tmp_path / "calls", tmp_path / "results"],
        env={k: v for k, v in os.environ.items() if k != "FASTRNN_ISA"} | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=500,
    )
    chosen, (*results, narrow) = torch.load(tmp_path / "results")
    assert chosen == isa
    for (module, *given), got in zip(calls, results, strict=True):
        want = evaluate(Reference(module), *tree_map(Tensor.double, given))
        assert_equal(tree_map(Tensor.double, got), want, TOLERANCE[given[0].dtype])
    output, states = direction_by_hand("lstm", x, lstm._weights()[0][0], h[0], c[0], torch.int8)
    for got, want in zip(tree_leaves(narrow), (output, *states), strict=True):
        torch.testing.assert_close(got.double().view_as(want), want, rtol=0, atol=2e-5)
