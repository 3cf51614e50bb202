"""``LSTM(.., peephole=True)`` against the paper's equations, written here once more: every option, every transform."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import functional
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
    weighted,
)

T, B, I, H = 6, 3, 4, 5  # noqa: E741
LENGTHS = torch.tensor([6, 2, 4])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
    "projected": {"proj_size": 3, "num_layers": 2},
    "learned state": {"learn_initial_state": True, "state_batch_first": True},
}


def make(**options: Any) -> fastrnn.LSTM:
    torch.manual_seed(1)
    module = fastrnn.LSTM(I, H, peephole=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) * 0.5)
    return module


def by_equations(module: fastrnn.LSTM, x: Tensor, hx: Any = None, lengths: Any = None, resets: Any = None) -> Any:
    """Gers and Schmidhuber 2000, one number of one row at a time for all that is said of steps: x [T, B, I]."""
    w, finals = dict(module.named_parameters()), ([], [])
    for layer in range(module.num_layers):
        outputs = []
        for d, suffix in enumerate(["", "_reverse"][: 1 + module.bidirectional]):
            at, name = layer * (1 + module.bidirectional) + d, f"_l{layer}{suffix}"
            zeros = x.new_zeros(H)
            rows = []
            for b in range(x.shape[1]):
                if hx is not None:
                    h, c = hx[0][at, b], hx[1][at, b]
                elif module.learn_initial_state:
                    h, c = w[f"h_0{name}"], w[f"c_0{name}"]
                else:
                    h, c = x.new_zeros(module.proj_size or H), zeros
                steps = range(len(x) if lengths is None else int(lengths[b]))
                row = [x.new_zeros(module.proj_size or H) for _ in range(len(x))]
                for t in reversed(steps) if suffix else steps:
                    boundary = t + 1 if suffix else t
                    if resets is not None and boundary in steps and resets[boundary, b]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    gates = w[f"weight_ih{name}"] @ x[t, b] + w[f"weight_hh{name}"] @ h
                    if module.bias:
                        gates = gates + w[f"bias_ih{name}"] + w[f"bias_hh{name}"]
                    i, f, g, o = gates.chunk(4)
                    p_i, p_f, p_o = w[f"weight_ch{name}"]
                    i, f = torch.sigmoid(i + p_i * c), torch.sigmoid(f + p_f * c)
                    c = f * c + i * torch.tanh(g)
                    h = torch.sigmoid(o + p_o * c) * torch.tanh(c)
                    h = w[f"weight_hr{name}"] @ h if module.proj_size else h
                    row[t] = h
                rows.append(torch.stack(row))
                for final, last in zip(finals, (h, c), strict=True):
                    final.append(last)
            outputs.append(torch.stack(rows, 1))
        x = torch.cat(outputs, 2)
    states = tuple(torch.stack(final).unflatten(0, (-1, x.shape[1])) for final in finals)
    return x, states


def expected(module: fastrnn.LSTM, x: Tensor, hx: Any = None, **options: Any) -> dict[str, Tensor]:
    module.zero_grad()
    x = leaf(x)
    hx = None if hx is None else tuple(map(leaf, hx))
    output, states = by_equations(module, x, hx, **options)
    if module.state_batch_first:
        states = tuple(s.transpose(0, 1) for s in states)
    named = {"input": x, **dict(zip(("h_0", "c_0"), hx or (), strict=False))}
    return collect(output, states, {**named, **dict(module.named_parameters())})


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
        count = module.num_layers * (1 + module.bidirectional)
        hx = (randn(count, B, module.proj_size or H, seed=3), randn(count, B, H, seed=4))
    assert_equal(evaluate(module, x, hx, **masks), expected(module, x, hx, **masks), 1e-10)


@pytest.mark.parametrize("name", ["plain", "two layers, two directions", "projected"])
def test_packed(name: str) -> None:
    module, x = make(**OPTIONS[name]), randn(T, B, I)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    output, finals = module(packed)
    want, states = by_equations(module, x, lengths=LENGTHS)
    padded, _ = pad_packed_sequence(output)
    for a, b in zip((padded, *finals), (want, *states), strict=True):
        torch.testing.assert_close(a, b)
    got, wanted = (torch.autograd.grad(weighted([y]), list(module.parameters())) for y in (padded, want))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    module, x = make(num_layers=2, bidirectional=True), randn(T, B, I)
    want = expected(module, x)
    got = evaluate(copy.deepcopy(module).to(dtype), x.to(dtype))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    for name, y in want.items():
        assert got[name].dtype == dtype
        assert ((got[name].double() - y).abs() <= tolerance * (1 + y.abs().max())).all(), name


def test_autocast_and_accumulation() -> None:
    """Peepholes' gradients are added up over steps and rows in float32: 4,000 equal terms are not lost."""
    module = fastrnn.LSTM(1, 2, peephole=True)
    x = torch.full((500, 8, 1), 0.1)
    want = torch.autograd.grad(module(x)[0].sum(), module.weight_ch_l0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(x)
    got = torch.autograd.grad(output.float().sum(), module.weight_ch_l0)[0]
    assert got.dtype == torch.float32 and (got - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("name", ["plain", "projected"])
def test_second_order(name: str) -> None:
    module, x = make(**OPTIONS[name]), randn(3, 2, I).requires_grad_()
    names = [n for n, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Any:
        output, states = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))
        return output, *states

    check_derivatives(run, x, *module.parameters())


def test_every_c() -> None:
    module = make(return_all_states=True)
    x = randn(T, B, I).requires_grad_()
    output, (_, c_n), cells = module(x)
    torch.testing.assert_close(cells[-1], c_n[0])
    got = torch.autograd.grad(weighted([output, cells]), [x, *module.parameters()])
    states, rows = None, []
    for t in range(T):  # a call for each step, whose c_n is the state after it
        y, states, _ = module(x[t : t + 1], states)
        rows.append((y, states[1]))
    outputs, every = (torch.cat(each) for each in zip(*rows, strict=True))
    want = torch.autograd.grad(weighted([outputs, every]), [x, *module.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batched", ["members", "samples"])
def test_vmap(batched: str) -> None:
    """An ensemble, whose weights are batched, and gradients of each sample, whose are not."""
    modules = [make() for _ in range(3)]
    for k, module in enumerate(modules):
        with torch.no_grad():
            module.weight_ch_l0.add_(k)
    check_vmap(modules, batched, randn(T, 3, I))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    module, x = make(num_layers=2, bidirectional=True), randn(T, B, I)
    check_compile(module, backend, x, lengths=LENGTHS)


def test_export_step_tokens_and_copies() -> None:
    module, x = make(), randn(T, B, I)
    want = module(x)[0]
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x)[0], want)
    check_steps_add_up(module, x)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again.peephole and torch.equal(again(x)[0], want)
    plain = fastrnn.LSTM(I, H, dtype=torch.float64)
    assert set(module.state_dict()) - set(plain.state_dict()) == {"weight_ch_l0"}
    assert "peephole" not in vars(plain) and "peephole=True" in repr(module)
    tokens = make(token_input=True)
    ids = torch.randint(I, (T, B))
    one_hot = torch.nn.functional.one_hot(ids, I).double()
    for a, b in zip(tokens(ids)[1], by_equations(tokens, one_hot)[1], strict=True):
        torch.testing.assert_close(a, b)


def test_initial_values() -> None:
    """Uniform as torch.nn's weights, the same again after reset_parameters() from the same seed; on meta too."""
    module = fastrnn.LSTM(I, 64, peephole=True, num_layers=2, bidirectional=True)
    found = [x for name, x in module.named_parameters() if "weight_ch" in name]
    assert [tuple(x.shape) for x in found] == [(3, 64)] * 4
    values = torch.cat([x.detach().flatten() for x in found])
    assert values.abs().max() <= 64**-0.5 and values.std() > 0.4 * 64**-0.5
    assert [n for n, _ in module.named_parameters()][-4:] == [
        "weight_ch_l0", "weight_ch_l0_reverse", "weight_ch_l1", "weight_ch_l1_reverse",
    ]  # fmt: skip
    before = module.weight_ch_l1.detach().clone()
    module.reset_parameters()
    assert not torch.equal(before, module.weight_ch_l1) and module.weight_ch_l1.abs().max() <= 64**-0.5
    meta = fastrnn.LSTM(I, H, peephole=True, device="meta")
    assert meta(torch.zeros(T, B, I, device="meta"))[0].shape == (T, B, H)


def test_as_a_function() -> None:
    module, x = make(), randn(T, B, I)
    weights = LayerWeights(*(dict(module.named_parameters()).get(f"{n}_l0") for n in LayerWeights._fields[:4]))
    weights = weights._replace(params=module.weight_ch_l0)
    torch.testing.assert_close(functional.lstm(x, None, [[weights]])[0], by_equations(module, x)[0])
    h, c = functional.lstm_cell(x[0], (torch.zeros(B, H).double(), torch.zeros(B, H).double()), weights)
    want = by_equations(module, x[:1])[1]
    torch.testing.assert_close(h, want[0][0])
    torch.testing.assert_close(c, want[1][0])
    with pytest.raises(RuntimeError, match=r"weights\[0\]\[0\].params: expected \[3, 5\], got \[2, 5\]"):
        functional.lstm(x, None, [[weights._replace(params=torch.zeros(2, H).double())]])
    gru = LayerWeights(*(torch.zeros(3 * H, n).double() for n in (I, H)), params=torch.zeros(3, H).double())
    with pytest.raises(RuntimeError, match=r"weights\[0\]\[0\].params: expected \[12, 5\], got \[3, 5\]"):
        functional.gru(x, None, [[gru]])
    rnn = LayerWeights(*(torch.zeros(H, n).double() for n in (I, H)), params=torch.zeros(3, H).double())
    with pytest.raises(RuntimeError, match=r"weights\[0\]\[0\].params: expected None for cell 'rnn_tanh', got"):
        functional.rnn(x, None, [[rnn]])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_quantized(dtype: torch.dtype) -> None:
    module, x = make(num_layers=2, bidirectional=True, proj_size=3).float(), randn(T, B, I).float()
    narrow = fastrnn.quantize(module, dtype)
    assert narrow.state_dict()["weight_ch_l1"].dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(narrow(x)[0], module(x)[0], rtol=0, atol=0.02)
        module.weight_ch_l0.add_(1)
        assert (narrow(x)[0] - module(x)[0]).abs().max() > 0.02


def test_trace() -> None:
    """No op of torch's has peepholes: a loop is recorded, and a warning says so."""
    module, x = make(), randn(T, B, I)
    with pytest.warns(UserWarning, match="peephole"):
        traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x)[0], module(x)[0])


def test_what_does_not_fit() -> None:
    for cls in (fastrnn.GRU, fastrnn.RNN):
        assert cls(I, H, peephole=False)(torch.zeros(T, B, I))[0].shape == (T, B, H)
        with pytest.raises(ValueError, match="peephole argument is only supported for LSTM"):
            cls(I, H, peephole=True)
    with pytest.raises(TypeError, match="peephole should be of type bool, got: int"):
        fastrnn.LSTM(I, H, peephole=1)
    module = make()
    with pytest.raises(TypeError, match="has peephole=True"):
        fastrnn.to_torch(module)
    module.weight_ch_l0 = torch.nn.Parameter(torch.zeros(3, H + 1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"weight_ch_l0: expected \[3, 5\], got \[3, 6\]"):
        module(randn(T, B, I))
    module.weight_ch_l0 = torch.nn.Parameter(torch.zeros(3, H))
    with pytest.raises(
        RuntimeError, match=r"weight_ch_l0: expected torch.float64 \(that of input\), got torch.float32"
    ):
        module(randn(T, B, I))
