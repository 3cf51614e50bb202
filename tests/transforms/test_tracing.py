"""torch.jit.trace of our modules records torch's own ops, as of torch.nn's; torch.jit.script says what to do."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from tests.helpers import CELL_KINDS, KINDS, build, make_state, pair, randn, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
]
KIND = pytest.mark.parametrize("kind", KINDS)
EITHER = pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])
T, B, I, H = 4, 3, 3, 5  # noqa: E741


def leaves(x: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(x)


def nodes(traced: Any) -> Counter[str]:
    """By kind; constants are merged where a trace is saved."""
    kinds = (node.kind() for node in traced.inlined_graph.nodes())
    return Counter(kind for kind in kinds if kind != "prim::Constant")


def traced_in_a_file(module: nn.Module, *args: Any) -> Any:
    """As another process would load it."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, args), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"batch_first": True, "bias": False},
        {"num_layers": 2, "dropout": 0.5},
    ],
)
@pytest.mark.parametrize("stateful", [False, True])
@KIND
def test_layers(kind: str, stateful: bool, options: dict[str, Any]) -> None:
    """The same graph as of torch.nn's, for sequences of other sizes, too."""
    ours, theirs = (module.eval() for module in pair(kind, I, H, dtype=torch.float64, **options))

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        x = randn(*((B, T) if options.get("batch_first") else (T, B)), I)
        count = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        return (x, make_state(kind, count, B, hidden=H)) if stateful else (x,)

    traced = traced_in_a_file(ours, *inputs(T, B))
    assert nodes(traced) == nodes(torch.jit.trace(theirs, inputs(T, B)))
    assert nodes(traced)[f"aten::{kind.lower()}"] == 1
    for sizes in ((T, B), (7, 2), (1, 1)):
        for a, b in zip(leaves(traced(*inputs(*sizes))), leaves(ours(*inputs(*sizes))), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("kind", CELL_KINDS)
def test_cells(kind: str, stateful: bool) -> None:
    ours, theirs = pair(kind, I, H, dtype=torch.float64)

    def inputs(B: int) -> tuple[Any, ...]:
        return (randn(B, I), make_state(kind, B, hidden=H)) if stateful else (randn(B, I),)

    traced = traced_in_a_file(ours, *inputs(B))
    assert nodes(traced) == nodes(torch.jit.trace(theirs, inputs(B)))
    for size in (B, 1, 6):
        for a, b in zip(leaves(traced(*inputs(size))), leaves(ours(*inputs(size))), strict=True):
            torch.testing.assert_close(a, b)


@EITHER
def test_gradients(kind: str) -> None:
    module = build(fastrnn, kind, I, H, dtype=torch.float64)
    x = randn(*(() if "Cell" in kind else (T,)), B, I)
    traced = torch.jit.trace(module, x)
    found, expected = (
        torch.autograd.grad(sum(y.sin().sum() for y in leaves(m(x))), list(module.parameters()))
        for m in (traced, module)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


class Packs(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        output, state = self.module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(output)[0], state


@KIND
def test_packed(kind: str) -> None:
    module = Packs(build(fastrnn, kind, I, H, 2, bidirectional=True, dtype=torch.float64))
    traced = torch.jit.trace(module, (randn(T, B, I), torch.tensor([2, 4, 1])))
    for x, lengths in ((randn(T, B, I), torch.tensor([2, 4, 1])), (randn(6, 2, I), torch.tensor([3, 6]))):
        for a, b in zip(leaves(traced(x, lengths)), leaves(module(x, lengths)), strict=True):
            torch.testing.assert_close(a, b)


@KIND
def test_functions(kind: str) -> None:
    """The functional forms, too, and the options that torch's op can be given."""
    module = build(fastrnn, kind, I, H, 2, dtype=torch.float64, learn_initial_state=True, state_batch_first=True)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(randn(*p.shape))
    traced = torch.jit.trace(module, randn(T, B, I))
    assert nodes(traced)[f"aten::{kind.lower()}"] == 1
    for x in (randn(T, B, I), randn(7, 2, I)):
        for a, b in zip(leaves(traced(x)), leaves(module(x)), strict=True):
            torch.testing.assert_close(a, b)


class Called(nn.Module):
    """A module with options of the call."""

    def __init__(self, module: nn.Module, **names: int) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *args: Tensor) -> Any:
        return self.module(args[0], **{name: args[at] for name, at in self.names.items()})


@pytest.mark.parametrize("option", ["lengths", "resets", "tokens", "grad_clip", "return_all_states"])
@KIND
def test_loops(kind: str, option: str) -> None:
    """What torch's ops lack is traced step by step: right for this T and any other data, refused for another T."""
    if option == "return_all_states" and kind != "LSTM":
        pytest.skip("an LSTM's option")
    made = {
        "grad_clip": {"grad_clip": 0.1},
        "return_all_states": {"return_all_states": True},
        "tokens": {"token_input": True},
    }.get(option, {})
    module = Called(
        build(fastrnn, kind, I, H, 2, bidirectional=True, dtype=torch.float64, **made),
        **({option: 1} if option in ("lengths", "resets") else {}),
    )

    def inputs(T: int, seed: int) -> tuple[Tensor, ...]:
        x = randn(T, B, I, seed=seed)
        if option == "tokens":
            return ((x[..., 0] > 0).long(),)
        if option == "lengths":
            return x, (torch.arange(B) + seed) % (T + 1)
        return (x, x[..., 0] > 0.5) if option == "resets" else (x,)

    with pytest.warns(UserWarning, match="a loop over a fixed number of steps is recorded"):
        traced = torch.jit.trace(module, inputs(T, 0), check_trace=False)
    for seed in (0, 1, 2):
        for a, b in zip(leaves(traced(*inputs(T, seed))), leaves(module(*inputs(T, seed))), strict=True):
            torch.testing.assert_close(a, b)
    for other in (T - 1, T + 1):
        with pytest.raises(RuntimeError):
            traced(*inputs(other, 0))


def test_what_cannot_be_traced() -> None:
    packs = Packs(fastrnn.LSTM(I, H, grad_clip=0.1))
    with pytest.raises(RuntimeError, match="expected a padded tensor and lengths where the call is traced"):
        torch.jit.trace(packs, (randn(T, B, I, dtype=torch.float32), torch.tensor([2, 4, 1])))
    quantized = fastrnn.quantize(fastrnn.GRU(I, H))
    with pytest.raises(RuntimeError, match="quantized modules can be neither traced nor exported"):
        torch.jit.trace(quantized, randn(T, B, I, dtype=torch.float32))


def test_no_warnings_of_a_plain_trace() -> None:
    """torch says nothing of a trace of torch.nn's modules either."""
    code = """
        import torch, fastrnn
        for name in ("LSTM", "GRU", "RNN"):
            torch.jit.trace(getattr(fastrnn, name)(3, 5, 2, bidirectional=True), torch.randn(4, 2, 3))
        for name in ("LSTMCell", "GRUCell", "RNNCell"):
            torch.jit.trace(getattr(fastrnn, name)(3, 5), torch.randn(2, 3))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "TracerWarning" not in done.stderr, done.stderr


@EITHER
def test_script_says_what_to_do(kind: str) -> None:
    model = nn.Sequential(build(fastrnn, kind, I, H))
    name = kind.partition("_")[0]
    for given in (model, model[0]):
        with pytest.raises(RuntimeError, match=f"got a fastrnn.{name}. Script fastrnn.to_torch"):
            torch.jit.script(given)
    assert type(model[0]) is getattr(fastrnn, name)
    x = randn(*(() if "Cell" in kind else (T,)), B, I, dtype=torch.float32)
    scripted = torch.jit.script(fastrnn.to_torch(copy.deepcopy(model)))
    for a, b in zip(tensors(leaves(scripted(x))), tensors(leaves(model(x))), strict=True):
        torch.testing.assert_close(a, b)


def test_a_trace_changes_nothing() -> None:
    """The module stays what it was, and takes its kernels afterwards."""
    module = fastrnn.GRU(I, H)
    x = randn(T, B, I, dtype=torch.float32)
    expected = module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, x)
    assert all(torch.equal(a, b) for a, b in zip(module(x), expected, strict=True))
