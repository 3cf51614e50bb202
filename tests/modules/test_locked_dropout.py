"""``locked_dropout=``: networks put together of single layers with masks between them, written out by hand."""

from __future__ import annotations

import copy
import math
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
    evaluate,
    leaf,
    make_state,
    map_state,
    randn,
    tensors,
)

T, B, I, H, P = 6, 3, 4, 5, 0.4  # noqa: E741
KIND = pytest.mark.parametrize("kind", KINDS)
LENGTHS = torch.tensor([6, 4, 2])
RESETS = torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.3
CALLS: dict[str, dict[str, Any]] = {"plain": {}, "lengths": {"lengths": LENGTHS}, "resets": {"resets": RESETS}}
OPTIONS: dict[str, dict[str, Any]] = {
    "three layers": {"num_layers": 3},
    "two directions": {"num_layers": 2, "bidirectional": True},
    "dropout, too": {"num_layers": 2, "dropout": 0.3},
    "recompute": {"num_layers": 2, "recompute": 2},
}


def make(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(fastrnn, kind, I, H, locked_dropout=P, **{"dtype": torch.float64, "num_layers": 2} | options)


def by_hand(module: nn.Module, x: Tensor, hx: Any, **call: Any) -> tuple[Tensor, Any]:
    """Layer by layer: x [T, B, I], one mask [B, D*H] between each two."""
    D, options = 1 + module.bidirectional, {"bidirectional": module.bidirectional, "dtype": x.dtype}
    kind, finals, own = module.mode, [], dict(module.named_parameters())
    for i in range(module.num_layers):
        if i > 0:
            x = F.dropout(x, module.dropout) if module.dropout else x
            x = x * F.dropout(x.new_ones(x.shape[1:]), P)
        with torch.random.fork_rng():  # parameters draw, too
            single = build(fastrnn, kind, x.shape[2], H, **options)
        weights = {name: own[name.replace("_l0", f"_l{i}")] for name, _ in single.named_parameters()}
        at = slice(i * D, (i + 1) * D)
        x, after = functional_call(single, weights, (x, map_state(lambda s, at=at: s[at], hx)), call)
        finals.append(tensors(after))
    joined = tuple(torch.cat(each) for each in zip(*finals, strict=True))
    return x, joined if len(joined) > 1 else joined[0]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("option", OPTIONS)
@KIND
def test_every_gradient(kind: str, option: str, call: str) -> None:
    module = make(kind, **OPTIONS[option])
    hx = make_state(kind, module.num_layers * (1 + module.bidirectional), B, hidden=H)
    torch.manual_seed(5)
    got = evaluate(module, randn(T, B, I), hx, **CALLS[call])
    module.zero_grad()
    x, hx = leaf(randn(T, B, I)), map_state(leaf, hx)
    torch.manual_seed(5)
    named = {"input": x, **dict(zip(("h_0", "c_0"), tensors(hx), strict=False)), **dict(module.named_parameters())}
    assert_equal(got, collect(*by_hand(module, x, hx, **CALLS[call]), named))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@KIND
def test_packed(kind: str, dtype: torch.dtype) -> None:
    """Rows of one sequence share its mask: as with lengths. bfloat16 is padded for the kernels."""
    module, x = make(kind, num_layers=3, dtype=dtype), randn(T, B, I, dtype=dtype)
    torch.manual_seed(5)
    want, states = module(x, lengths=LENGTHS)
    torch.manual_seed(5)
    output, finals = module(pack_padded_sequence(x, LENGTHS))
    torch.testing.assert_close(pad_packed_sequence(output)[0], want)
    torch.testing.assert_close(finals, states)
    order = torch.tensor([2, 0, 1])  # unsorted: the masks are drawn for the rows as they are sorted
    torch.manual_seed(5)
    output, finals = module(pack_padded_sequence(x[:, order], LENGTHS[order], enforce_sorted=False))
    torch.testing.assert_close(pad_packed_sequence(output)[0], want[:, order])
    torch.testing.assert_close(finals, map_state(lambda s: s[:, order], states))


def test_masks() -> None:
    """One for all steps, another for each row and feature, anew in each call; scaled; none in eval."""
    module = fastrnn.RNN(1, 200, num_layers=2, locked_dropout=0.25, bias=False)
    with torch.no_grad():
        for name, w in module.named_parameters():
            w.copy_(torch.eye(200) if name == "weight_ih_l1" else torch.full_like(w, 0.1 if "ih" in name else 0))

    def kept() -> Tensor:  # layer 0 gives tanh(0.1 x), layer 1 tanh of what is left of it
        return torch.atanh(module(torch.ones(4, 50, 1))[0]) / math.tanh(0.1)

    torch.manual_seed(1)
    first, second = kept(), kept()
    torch.manual_seed(1)
    assert torch.equal(kept(), first) and not torch.equal(first, second)
    assert (first == first[0]).all()
    assert not (first[0] == first[0, 0]).all() and not (first[0] == first[0, :, :1]).all()
    values = first[0].flatten()
    torch.testing.assert_close(values[values != 0], torch.full_like(values[values != 0], 4 / 3), rtol=1e-4, atol=0)
    assert abs((values != 0).float().mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / len(values))
    module.eval()
    torch.testing.assert_close(kept(), torch.ones_like(first), rtol=1e-4, atol=0)


@KIND
def test_what_it_is_not(kind: str) -> None:
    """Nothing in eval, of one layer (a warning says so) or for the first input; states are not masked."""
    module = make(kind)
    plain = build(fastrnn, kind, I, H, 2, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    x = randn(T, B, I)
    torch.testing.assert_close(module.eval()(x), plain(x), rtol=0, atol=0)
    with pytest.warns(UserWarning, match="locked_dropout=0.4 and num_layers=1"):
        single = build(fastrnn, kind, I, H, locked_dropout=P)
    y = randn(T, B, I, dtype=torch.float32)
    assert torch.equal(single(y)[0], single(y)[0])
    module.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zeroed, finals = copy.deepcopy(module), map_state(lambda s: s, module(x)[1])
    zeroed.locked_dropout = 1.0
    torch.testing.assert_close(tensors(zeroed(x)[1])[0][0], tensors(finals)[0][0])


@KIND
def test_steps_copies_and_quantized(kind: str) -> None:
    module = make(kind)
    x = randn(T, B, I)
    torch.manual_seed(5)
    want = module(x[:1])[0][0]
    for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.manual_seed(5)
        torch.testing.assert_close(again.step(x[0])[0], want)
    assert f"locked_dropout={P}" in repr(module)
    with pytest.raises(TypeError, match=f"has locked_dropout={P}"):
        fastrnn.to_torch(module)
    module.float().eval()
    narrow = fastrnn.quantize(module)
    torch.testing.assert_close(narrow.train()(x.float())[0], module(x.float())[0], rtol=0, atol=0.05)
    with pytest.raises(ValueError, match=r"locked_dropout should be a number in range \[0, 1\].*got 2"):
        build(fastrnn, kind, I, H, 2, locked_dropout=2)


def test_transforms() -> None:
    module, x = make("LSTM"), randn(3, 2, I).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Any:
        torch.manual_seed(5)
        return functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]

    check_derivatives(run, x, *module.parameters())
    weights = {name: w.detach() for name, w in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, weights, (x,))[0].square().sum()

    same = randn(T, 1, I).expand(-1, 4, -1)[:, :, None]
    for randomness in ("same", "different"):
        found = vmap(grad(loss), (None, 1), randomness=randomness)(weights, same)["weight_ih_l1"]
        assert all(torch.equal(found[0] == 0, g == 0) for g in found) == (randomness == "same")


def test_the_gradient_of_every_sample() -> None:
    module, x = make("GRU", batch_first=True), randn(B, T, I)
    torch.manual_seed(5)
    call_for_per_sample_grads(module)(x)[0].square().sum().backward()
    found = module.weight_ih_l1.grad_sample
    torch.manual_seed(5)
    of_rows = module(x)[0].square().sum((1, 2))
    for b in range(B):
        torch.testing.assert_close(found[b], torch.autograd.grad(of_rows[b], module.weight_ih_l1, retain_graph=True)[0])


def test_compile_and_export() -> None:
    module, x = make("LSTM", bidirectional=True), randn(T, B, I)
    torch.manual_seed(5)
    want = module(x)[0]
    torch.manual_seed(5)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x)[0], want)
    program = torch.export.export(module, (x,))
    torch.manual_seed(5)
    torch.testing.assert_close(program.module()(x)[0], want)


@KIND
def test_without_kernels(kind: str) -> None:
    """What jit.trace records: torch's op for each layer, masks between; and autocast."""
    module, x = make(kind), randn(T, B, I)
    torch.manual_seed(5)
    want = module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, x, check_trace=False)
    name = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}[kind]
    assert sum(node.kind() == f"aten::{name}" for node in traced.inlined_graph.nodes()) == 2
    torch.manual_seed(5)
    torch.testing.assert_close(traced(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(5)
        got = module.float()(x.float())[0]
        assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want[0], rtol=0, atol=0.05)
