"""``residual=`` and ``return_all_layers=``: networks put together of single layers, written out by hand."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from tests.helpers import (
    KINDS,
    assert_equal,
    build,
    check_derivatives,
    collect,
    leaf,
    make_state,
    map_state,
    randn,
    tensors,
)

T, B, I, H = 6, 3, 4, 5  # noqa: E741
KIND = pytest.mark.parametrize("kind", KINDS)
LENGTHS = torch.tensor([6, 4, 0])
RESETS = torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.3
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"lengths": LENGTHS},
    "resets and lengths": {"resets": RESETS, "lengths": LENGTHS},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "three layers": {"num_layers": 3},
    "two directions": {"num_layers": 2, "bidirectional": True},
    "both dropouts": {"num_layers": 3, "dropout": 0.3, "locked_dropout": 0.4},
    "recompute": {"num_layers": 2, "recompute": 2},
    "proj_size": {"num_layers": 2, "proj_size": 3},
}


def make(kind: str, residual: bool = True, every: bool = True, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"dtype": torch.float64} | options
    return build(fastrnn, kind, I, H, residual=residual, return_all_layers=every, **options)


def by_hand(module: nn.Module, x: Tensor, hx: Any = None, **call: Any) -> tuple[list[Tensor], Any]:
    """The outputs of all layers and the final states: x [T, B, I], one layer at a time."""
    D, own = 1 + module.bidirectional, dict(module.named_parameters())
    options = {"bidirectional": module.bidirectional, "dtype": x.dtype}
    options |= {"proj_size": module.proj_size} if module.proj_size else {}
    outputs, finals = [], []
    for i in range(module.num_layers):
        below = x
        if i > 0 and module.training:
            x = F.dropout(x, module.dropout) if module.dropout else x
            p = module.locked_dropout
            x = x * F.dropout(x.new_ones(x.shape[1:]), p) if p else x
        with torch.random.fork_rng():  # parameters draw, too
            single = build(fastrnn, module.mode, x.shape[2], H, **options)
        weights = {name: own[name.replace("_l0", f"_l{i}")] for name, _ in single.named_parameters()}
        at = slice(i * D, (i + 1) * D)
        x, after = functional_call(single, weights, (x, map_state(lambda s, at=at: s[at], hx)), call)
        x = x + below if i > 0 and module.residual else x
        outputs.append(x)
        finals.append(tensors(after))
    joined = tuple(torch.cat(each) for each in zip(*finals, strict=True))
    return outputs, joined if len(joined) > 1 else joined[0]


def together(outputs: Any) -> Tensor:
    return torch.cat(tuple(outputs), -1)


@pytest.mark.parametrize("every", [False, True], ids=["last", "every"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("option", OPTIONS)
@KIND
def test_every_gradient(kind: str, option: str, call: str, residual: bool, every: bool) -> None:
    if option == "proj_size" and kind != "LSTM":
        pytest.skip("only an LSTM has a projection")
    module = make(kind, residual, every, **OPTIONS[option])
    count = module.num_layers * (1 + module.bidirectional)
    found = []
    for way in (module, lambda *args, **call: by_hand(module, *args, **call)):
        module.zero_grad()
        x, hx = leaf(randn(T, B, I)), map_state(leaf, make_state(kind, count, B, hidden=H, proj=module.proj_size))
        torch.manual_seed(5)
        outputs, finals = way(x, hx, **CALLS[call])
        if way is not module and not every:
            outputs = outputs[-1]
        if every:
            assert len(outputs) == module.num_layers
            if "lengths" in CALLS[call]:
                assert all((y[4:, 1] == 0).all() and (y[:, 2] == 0).all() for y in outputs)
        outputs = together(outputs) if every else outputs
        states = dict(zip(("h_0", "c_0"), tensors(hx), strict=False))
        found.append(collect(outputs, finals, {"input": x, **states, **dict(module.named_parameters())}))
    assert_equal(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@KIND
def test_packed(kind: str, dtype: torch.dtype) -> None:
    """A tuple of PackedSequences, in the order that came; bfloat16 is padded for the kernels."""
    module, x = make(kind, num_layers=3, bidirectional=True, dtype=dtype), randn(T, B, I, dtype=dtype)
    lengths = torch.tensor([3, 6, 1])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    outputs, finals = module(packed)
    want, states = module(x, lengths=lengths)
    assert isinstance(outputs, tuple) and len(outputs) == 3
    for got, expected in zip(outputs, want, strict=True):
        assert torch.equal(got.unsorted_indices, packed.unsorted_indices)
        torch.testing.assert_close(pad_packed_sequence(got)[0], expected)
    torch.testing.assert_close(finals, states)
    module.return_all_layers = False
    torch.testing.assert_close(module(packed)[0].data, outputs[-1].data)


@KIND
def test_layouts_and_steps(kind: str) -> None:
    module, x = make(kind, num_layers=2), randn(T, B, I)
    want, states = module(x)
    first = copy.deepcopy(module)
    first.batch_first = True
    for got, expected in zip(first(x.transpose(0, 1))[0], want, strict=True):
        torch.testing.assert_close(got, expected.transpose(0, 1))
    for got, expected in zip(module(x[:, 1])[0], want, strict=True):
        torch.testing.assert_close(got, expected[:, 1])
    state, rows = None, []
    for t in range(T):
        outputs, state = module.step(x[t], state)
        assert isinstance(outputs, tuple) and all(y.shape == (B, H) for y in outputs)
        rows.append(together(outputs))
    torch.testing.assert_close(torch.stack(rows), together(want))
    torch.testing.assert_close(state, states)
    with torch.no_grad(), fastrnn.streaming():
        whole, state, chunks = together(module(x)[0]), None, []
        for chunk in x.split([1, 2, 3]):
            outputs, state = module(chunk, state)
            chunks.append(together(outputs))
        assert torch.equal(torch.cat(chunks), whole)


def test_beside_other_options() -> None:
    """Every c is the last layer's; tokens; learned states; peepholes."""
    options = {"return_all_states": True, "token_input": True, "learn_initial_state": True, "peephole": True}
    module, tokens = make("LSTM", num_layers=2, **options), torch.randint(I, (T, B))
    outputs, (h_n, c_n), cells = module(tokens)
    torch.testing.assert_close(cells[-1], c_n[-1])
    torch.testing.assert_close(outputs[1][-1], h_n[1] + h_n[0])
    torch.testing.assert_close(outputs[0][-1], h_n[0])
    dense = module(F.one_hot(tokens, I).double())
    torch.testing.assert_close(dense, (outputs, (h_n, c_n), cells))


def test_transforms() -> None:
    module, x = make("LSTM", num_layers=2), randn(3, 2, I).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Any:
        return functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]

    check_derivatives(run, x, *module.parameters())
    weights = {name: w.detach() for name, w in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return together(functional_call(module, weights, (x.unsqueeze(1),))[0]).square().sum()

    x = randn(T, B, I)
    found = vmap(grad(loss), (None, 1))(weights, x)
    for b in range(B):
        wanted = torch.autograd.grad(together(module(x[:, b])[0]).square().sum(), list(module.parameters()))
        for name, want in zip(names, wanted, strict=True):
            torch.testing.assert_close(found[name][b], want)
    module.batch_first = True
    together(call_for_per_sample_grads(module)(x.transpose(0, 1))[0]).square().sum().backward()
    for name, w in module.named_parameters():
        torch.testing.assert_close(w.grad_sample, found[name])


@KIND
def test_compile_and_export(kind: str) -> None:
    module, x = make(kind, num_layers=2, bidirectional=True), randn(T, B, I)
    want = module(x, lengths=LENGTHS)
    gradients = torch.autograd.grad(together(want[0]).square().sum(), list(module.parameters()))
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(x, lengths=LENGTHS)
    torch.testing.assert_close(got, want)
    found = torch.autograd.grad(together(got[0]).square().sum(), list(module.parameters()))
    torch.testing.assert_close(found, gradients)
    dims = {"input": {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}}
    program = torch.export.export(module, (x,), dynamic_shapes=dims).module()
    other = randn(T + 2, B + 1, I)
    torch.testing.assert_close(program(other), module(other))


@KIND
def test_without_kernels(kind: str) -> None:
    """What jit.trace records is torch's op for each layer."""
    module, x = make(kind, num_layers=2), randn(T, B, I)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, x)
    name = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}[kind]
    assert sum(node.kind() == f"aten::{name}" for node in traced.inlined_graph.nodes()) == 2
    other = randn(T + 1, B, I)
    torch.testing.assert_close(traced(other), module(other))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@KIND
def test_quantized(kind: str, dtype: torch.dtype) -> None:
    module, x = make(kind, num_layers=2, bidirectional=True).float(), randn(T, B, I, dtype=torch.float32)
    narrow = fastrnn.quantize(module, dtype)
    torch.testing.assert_close(together(narrow(x)[0]), together(module(x)[0]), rtol=0, atol=0.05)
    module.return_all_layers = narrow.return_all_layers = False
    torch.testing.assert_close(narrow(x)[0], module(x)[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_copies_conversion_and_errors(kind: str) -> None:
    module, x = make(kind, num_layers=2), randn(T, B, I)
    want, plain = module(x)[0], build(fastrnn, kind, I, H, num_layers=2)
    assert list(module.state_dict()) == list(plain.state_dict())
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(again(x)[0], want, rtol=0, atol=0)
    assert "residual=True, return_all_layers=True" in repr(module) and "residual" not in vars(plain)
    assert fastrnn.convert(nn.Sequential(module))[0] is module
    with pytest.raises(TypeError, match="has residual=True, return_all_layers=True"):
        fastrnn.to_torch(module)
    with pytest.raises(ValueError, match="it has residual=True, return_all_layers=True"):
        fastrnn.to_keras(module)
    for option in ("residual", "return_all_layers"):
        with pytest.raises(TypeError, match=f"{option} should be of type bool, got: int"):
            build(fastrnn, kind, I, H, **{option: 1})
