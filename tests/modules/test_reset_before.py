"""``GRU(.., reset_after=False)`` against the paper's equations, written here once more: every option and transform."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import functional, reference
from fastrnn.records import LayerWeights
from tests.helpers import (
    assert_equal,
    check_compile,
    check_derivatives,
    check_steps_add_up,
    check_vmap,
    collect,
    evaluate,
    leaf,
    randn,
    threads,
    weighted,
)

T, B, I, H = 6, 3, 4, 5  # noqa: E741
LENGTHS = torch.tensor([6, 2, 4])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
    "learned state": {"learn_initial_state": True, "state_batch_first": True},
}


def make(**options: Any) -> fastrnn.GRU:
    torch.manual_seed(1)
    module = fastrnn.GRU(I, H, reset_after=False, dtype=torch.float64, **options)
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) * 0.5)
    return module


def by_equations(module: fastrnn.GRU, x: Tensor, hx: Any = None, lengths: Any = None, resets: Any = None) -> Any:
    """Cho 2014, a row at a time: x [T, B, I]; output and final states [L*D, B, H]."""
    w, finals = dict(module.named_parameters()), []
    for layer in range(module.num_layers):
        outputs = []
        for d, suffix in enumerate(["", "_reverse"][: 1 + module.bidirectional]):
            at, name = layer * (1 + module.bidirectional) + d, f"_l{layer}{suffix}"
            W, U = w[f"weight_ih{name}"].chunk(3), w[f"weight_hh{name}"].chunk(3)
            b = (
                [sum(p) for p in zip(*(w[f"bias_{s}{name}"].chunk(3) for s in ("ih", "hh")), strict=True)]
                if (module.bias)
                else [torch.zeros(H).double()] * 3
            )
            rows = []
            for row in range(x.shape[1]):
                h = torch.zeros(H).double()
                if hx is not None:
                    h = hx[at, row]
                elif module.learn_initial_state:
                    h = w[f"h_0{name}"]
                steps = range(len(x) if lengths is None else int(lengths[row]))
                states = [torch.zeros(H).double()] * len(x)
                for t in reversed(steps) if suffix else steps:
                    boundary = t + 1 if suffix else t
                    if resets is not None and boundary in steps and resets[boundary, row]:
                        h = torch.zeros_like(h)
                    r = torch.sigmoid(W[0] @ x[t, row] + U[0] @ h + b[0])
                    z = torch.sigmoid(W[1] @ x[t, row] + U[1] @ h + b[1])
                    n = torch.tanh(W[2] @ x[t, row] + U[2] @ (r * h) + b[2])
                    h = (1 - z) * n + z * h
                    states[t] = h
                rows.append(torch.stack(states))
                finals.append(h)
            outputs.append(torch.stack(rows, 1))
        x = torch.cat(outputs, 2)
    return x, torch.stack(finals).unflatten(0, (-1, x.shape[1]))


def expected(module: fastrnn.GRU, x: Tensor, hx: Any = None, **options: Any) -> dict[str, Tensor]:
    module.zero_grad()
    x = leaf(x)
    hx = None if hx is None else leaf(hx)
    output, states = by_equations(module, x, hx, **options)
    if module.state_batch_first:
        states = states.transpose(0, 1)
    named = {"input": x, **({} if hx is None else {"h_0": hx})}
    return collect(output, (states,), {**named, **dict(module.named_parameters())})


@pytest.mark.parametrize("given", ["", "state", "lengths", "resets", "recompute"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_gradient(name: str, given: str) -> None:
    module, x = make(**OPTIONS[name]), randn(T, B, I)
    masks: dict[str, Any] = {}
    if given == "lengths":
        masks["lengths"] = LENGTHS
    if given == "resets":
        if module.learn_initial_state:
            pytest.skip("resets start from the learned state then: test_initial_states.py")
        masks["resets"] = torch.rand(T, B) < 0.4
    if given == "recompute":
        module.recompute = 2
    hx = None
    if given == "state" and not module.learn_initial_state:
        hx = randn(module.num_layers * (1 + module.bidirectional), B, H, seed=3)
    assert_equal(evaluate(module, x, hx, **masks), expected(module, x, hx, **masks), 1e-10)


@pytest.mark.parametrize("name", ["plain", "two layers, two directions"])
def test_packed(name: str) -> None:
    module, x = make(**OPTIONS[name]), randn(T, B, I)
    output, finals = module(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    want, states = by_equations(module, x, lengths=LENGTHS)
    padded, _ = pad_packed_sequence(output)
    torch.testing.assert_close(padded, want)
    torch.testing.assert_close(finals, states)
    got, wanted = (torch.autograd.grad(weighted([y]), list(module.parameters())) for y in (padded, want))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("given", ["", "lengths", "resets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, given: str) -> None:
    """Half types make the gradient of weight_hh from what the ops return; float32 in the kernel."""
    module, x = make(num_layers=2, bidirectional=True), randn(T, B, I)
    masks: dict[str, Any] = {"lengths": LENGTHS} if given == "lengths" else {}
    if given == "resets":
        masks["resets"] = torch.rand(T, B) < 0.4
    want = expected(module, x, **masks)
    got = evaluate(copy.deepcopy(module).to(dtype), x.to(dtype), **masks)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    for name, y in want.items():
        assert got[name].dtype == dtype
        assert ((got[name].double() - y).abs() <= tolerance * (1 + y.abs().max())).all(), name


@pytest.mark.parametrize("sizes", [(5, 3, 7, 130), (40, 40, 20, 64), (3, 1, 5, 300)])
@pytest.mark.parametrize("count", [1, 2])
def test_sizes_and_threads(sizes: tuple[int, int, int, int], count: int) -> None:
    """Units are split, rows are; panels are packed or not: against the reference's loop, in float64."""
    steps, batch, features, hidden = sizes
    torch.manual_seed(2)
    module = fastrnn.GRU(features, hidden, reset_after=False, dtype=torch.float64)
    x = randn(steps, batch, features).requires_grad_()
    leaves = [x, *module.parameters()]
    with threads(count):
        got = torch.autograd.grad(weighted([module(x)[0]]), leaves)
    w = dict(module.named_parameters())
    gates = torch.nn.functional.linear(x, w["weight_ih_l0"], w["bias_ih_l0"])
    start = x.new_zeros(batch, hidden)
    weights = w["weight_hh_l0"][None], w["bias_hh_l0"][None]
    by_reference = reference.forward("gru_reset_before", gates, *weights, *[None] * 2, start, *[None] * 8, [False])
    for a, b in zip(got, torch.autograd.grad(weighted([by_reference[0]]), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * (1 + b.abs().max().item()))


def test_second_order() -> None:
    module, x = make(), randn(3, 2, I).requires_grad_()
    names = [n for n, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    check_derivatives(run, x, *module.parameters())


@pytest.mark.parametrize("batched", ["members", "samples"])
def test_vmap(batched: str) -> None:
    """An ensemble, whose weights are batched, and gradients of each sample, whose are not."""
    modules = [make() for _ in range(3)]
    for k, module in enumerate(modules):
        with torch.no_grad():
            module.weight_hh_l0.add_(k / 10)
    check_vmap(modules, batched, randn(T, 3, I))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    module, x = make(num_layers=2, bidirectional=True), randn(T, B, I)
    check_compile(module, backend, x, lengths=LENGTHS)


def test_export_step_tokens_streaming_and_copies() -> None:
    module, x = make(), randn(T, B, I)
    want = module(x)[0]
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x)[0], want)
    check_steps_add_up(module, x)
    with torch.no_grad(), fastrnn.streaming():
        whole, (first, state) = module(x)[0], module(x[:2])
        assert torch.equal(torch.cat([first, module(x[2:], state)[0]]), whole)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not again.reset_after and torch.equal(again(x)[0], want)
    plain = fastrnn.GRU(I, H, dtype=torch.float64)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert "reset_after" not in vars(plain) and "reset_after=False" in repr(module) and "reset" not in repr(plain)
    assert (plain(x)[0] - fastrnn.GRU(I, H, reset_after=True).double()(x)[0]).shape == want.shape
    tokens = make(token_input=True)
    ids = torch.randint(I, (T, B))
    one_hot = torch.nn.functional.one_hot(ids, I).double()
    torch.testing.assert_close(tokens(ids)[1], by_equations(tokens, one_hot)[1])
    got = torch.autograd.grad(weighted([tokens(ids)[0]]), list(tokens.parameters()))
    wanted = torch.autograd.grad(weighted([by_equations(tokens, one_hot)[0]]), list(tokens.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_as_a_function() -> None:
    module, x = make(), randn(T, B, I)
    weights = LayerWeights(*(dict(module.named_parameters())[f"{n}_l0"] for n in LayerWeights._fields[:4]))
    torch.testing.assert_close(functional.gru(x, None, [[weights]], reset_after=False)[0], by_equations(module, x)[0])
    h = functional.gru_cell(x[0], torch.zeros(B, H).double(), weights, reset_after=False)
    torch.testing.assert_close(h, by_equations(module, x[:1])[1][0])
    with pytest.raises(TypeError, match="reset_after: expected a bool, got int"):
        functional.gru(x, None, [[weights]], reset_after=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_quantized(dtype: torch.dtype) -> None:
    module, x = make(num_layers=2, bidirectional=True).float(), randn(T, B, I).float()
    narrow = fastrnn.quantize(module, dtype)
    with torch.no_grad():
        torch.testing.assert_close(narrow(x)[0], module(x)[0], rtol=0, atol=0.03)
        after = fastrnn.GRU(I, H, num_layers=2, bidirectional=True)
        after.load_state_dict(module.state_dict())
        assert (narrow(x)[0] - after(x)[0]).abs().max() > 0.03


def test_trace() -> None:
    """No op of torch's has it: a loop is recorded, and a warning says so."""
    module, x = make(), randn(T, B, I)
    with pytest.warns(UserWarning, match="reset_after"):
        traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x)[0], module(x)[0])


def test_what_does_not_fit() -> None:
    with pytest.raises(TypeError, match="reset_after should be of type bool, got: int"):
        fastrnn.GRU(I, H, reset_after=0)
    with pytest.raises(ValueError, match="reset_after: expected True with layer_norm, got False"):
        fastrnn.GRU(I, H, reset_after=False, layer_norm=True)
    with pytest.raises(TypeError, match="has reset_after=False"):
        fastrnn.to_torch(make())
