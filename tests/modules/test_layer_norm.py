"""``LSTM`` and ``GRU(.., layer_norm=True)`` against a loop over F.layer_norm in float64, written here once more: every
option, every transform."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
KINDS = ("LSTM", "GRU")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
    "learned state": {"learn_initial_state": True, "state_batch_first": True},
    "projected": {"proj_size": 3, "num_layers": 2},
}
CASES = [case for case in itertools.product(KINDS, OPTIONS) if case != ("GRU", "projected")]


def make(kind: str, **options: Any) -> Any:
    torch.manual_seed(1)
    module = getattr(fastrnn, kind)(I, H, layer_norm=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) * 0.5)
    return module


def step(module: Any, w: dict[str, Tensor], name: str, x: Tensor, states: list[Tensor]) -> list[Tensor]:
    """One step of one row: x [I], states [n]."""
    params, gates = w[f"weight_ln{name}"], 4 if isinstance(module, fastrnn.LSTM) else 3
    both = []
    for side, a in enumerate((w[f"weight_ih{name}"] @ x, w[f"weight_hh{name}"] @ states[0])):
        rows = range(side * gates, (side + 1) * gates)
        both.append([F.layer_norm(a_k, (H,), params[k], params[2 * gates + k])
                     for a_k, k in zip(a.chunk(gates), rows, strict=True)])  # fmt: skip
    if gates == 3:
        r, z = (torch.sigmoid(a + b) for a, b in zip(both[0][:2], both[1][:2], strict=True))
        n = torch.tanh(both[0][2] + r * both[1][2])
        return [(1 - z) * n + z * states[0]]
    i, f, g, o = (a + b for a, b in zip(*both, strict=True))
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, (H,), params[16], params[17]))
    return [w[f"weight_hr{name}"] @ h if module.proj_size else h, c]


def by_equations(module: Any, x: Tensor, hx: Any = None, lengths: Any = None, resets: Any = None) -> Any:
    """A row at a time: x [T, B, I]; output and a tuple of final states [L*D, B, n]."""
    w = dict(module.named_parameters())
    letters = "hc"[: 1 + isinstance(module, fastrnn.LSTM)]
    finals: list[list[Tensor]] = [[] for _ in letters]
    for layer in range(module.num_layers):
        outputs = []
        for d, suffix in enumerate(["", "_reverse"][: 1 + module.bidirectional]):
            at, name = layer * (1 + module.bidirectional) + d, f"_l{layer}{suffix}"
            widths = (module.proj_size or H, H)
            rows = []
            for b in range(x.shape[1]):
                if hx is not None:
                    states = [s[at, b] for s in hx]
                elif module.learn_initial_state:
                    states = [w[f"{letter}_0{name}"] for letter in letters]
                else:
                    states = [x.new_zeros(n) for _, n in zip(letters, widths, strict=False)]
                steps = range(len(x) if lengths is None else int(lengths[b]))
                row = [x.new_zeros(widths[0]) for _ in range(len(x))]
                for t in reversed(steps) if suffix else steps:
                    boundary = t + 1 if suffix else t
                    if resets is not None and boundary in steps and resets[boundary, b]:
                        states = [torch.zeros_like(s) for s in states]
                    states = step(module, w, name, x[t, b], states)
                    row[t] = states[0]
                rows.append(torch.stack(row))
                for final, last in zip(finals, states, strict=True):
                    final.append(last)
            outputs.append(torch.stack(rows, 1))
        x = torch.cat(outputs, 2)
    return x, tuple(torch.stack(final).unflatten(0, (-1, x.shape[1])) for final in finals)


def as_given(module: Any, states: Any) -> Any:
    return states if isinstance(module, fastrnn.LSTM) or states is None else states[0]


def expected(module: Any, x: Tensor, hx: Any = None, **options: Any) -> dict[str, Tensor]:
    module.zero_grad()
    x = leaf(x)
    hx = None if hx is None else tuple(map(leaf, hx))
    output, states = by_equations(module, x, hx, **options)
    if module.state_batch_first:
        states = tuple(s.transpose(0, 1) for s in states)
    named = {"input": x, **dict(zip(("h_0", "c_0"), hx or (), strict=False))}
    return collect(output, states, {**named, **dict(module.named_parameters())})


@pytest.mark.parametrize("given", ["", "state", "lengths", "resets", "recompute"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_gradient(kind: str, name: str, given: str) -> None:
    module, x = make(kind, **OPTIONS[name]), randn(T, B, I)
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
        hx = (randn(count, B, module.proj_size or H, seed=3), randn(count, B, H, seed=4))[: 1 + (kind == "LSTM")]
    assert_equal(evaluate(module, x, as_given(module, hx), **masks), expected(module, x, hx, **masks), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_mean_costs_no_accuracy(kind: str) -> None:
    """The variance is of what is left once the mean is off: of 1,000 +- 1, a mean of squares would keep little."""
    module = make(kind)
    with torch.no_grad():
        module.weight_ih_l0[:, 0] = 1000
    x = randn(T, B, I)
    x[..., 0] = 1
    want = by_equations(module, x)[0]
    torch.testing.assert_close(copy.deepcopy(module).float()(x.float())[0].double(), want, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if case[1] != "learned state"])
def test_packed(kind: str, name: str) -> None:
    module, x = make(kind, **OPTIONS[name]), randn(T, B, I)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    output, finals = module(packed)
    want, states = by_equations(module, x, lengths=LENGTHS)
    padded, _ = pad_packed_sequence(output)
    torch.testing.assert_close(padded, want)
    torch.testing.assert_close(finals, as_given(module, states))
    got, wanted = (torch.autograd.grad(weighted([y]), list(module.parameters())) for y in (padded, want))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    module, x = make(kind, num_layers=2, bidirectional=True), randn(T, B, I)
    want = expected(module, x)
    got = evaluate(copy.deepcopy(module).to(dtype), x.to(dtype))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 2e-2}[dtype]
    for name, y in want.items():
        assert got[name].dtype == dtype
        assert ((got[name].double() - y).abs() <= tolerance * (1 + y.abs().max())).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_accumulation(kind: str) -> None:
    """Gradients of gains and biases are added up over steps and rows in float32: 4,000 equal terms are not lost."""
    torch.manual_seed(3)
    module = getattr(fastrnn, kind)(2, 4, layer_norm=True)
    x = torch.full((500, 8, 2), 0.1)
    want = torch.autograd.grad(module(x)[0].sum(), module.weight_ln_l0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(x)
    got = torch.autograd.grad(output.float().sum(), module.weight_ln_l0)[0]
    assert got.dtype == torch.float32 and (got - want).norm() <= 0.03 * want.norm()


@pytest.mark.parametrize(("kind", "name"), [("LSTM", "plain"), ("LSTM", "projected"), ("GRU", "plain")])
def test_second_order(kind: str, name: str) -> None:
    module, x = make(kind, **OPTIONS[name] | {"num_layers": 1}), randn(3, 2, I).requires_grad_()
    names = [n for n, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Any:
        output, states = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))
        return output, *(states if kind == "LSTM" else (states,))

    check_derivatives(run, x, *module.parameters())


def test_every_c() -> None:
    module = make("LSTM", return_all_states=True)
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
@pytest.mark.parametrize("kind", KINDS)
def test_vmap(kind: str, batched: str) -> None:
    """An ensemble, whose weights are batched, and gradients of each sample, whose are not."""
    modules = [make(kind) for _ in range(3)]
    for k, module in enumerate(modules):
        with torch.no_grad():
            module.weight_ln_l0.add_(k)
    check_vmap(modules, batched, randn(T, 3, I))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str, backend: str) -> None:
    module, x = make(kind, num_layers=2, bidirectional=True), randn(T, B, I)
    check_compile(module, backend, x, lengths=LENGTHS)


@pytest.mark.parametrize("kind", KINDS)
def test_export_step_tokens_and_copies(kind: str) -> None:
    module, x = make(kind), randn(T, B, I)
    want = module(x)[0]
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x)[0], want)
    check_steps_add_up(module, x)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again.layer_norm and torch.equal(again(x)[0], want)
    plain = getattr(fastrnn, kind)(I, H, dtype=torch.float64)
    assert list(module.state_dict()) == ["weight_ih_l0", "weight_hh_l0", "weight_ln_l0"]
    assert "layer_norm" not in vars(plain) and "layer_norm=True" in repr(module) and "bias" not in repr(module)
    tokens = make(kind, token_input=True)
    ids = torch.randint(I, (T, B))
    one_hot = torch.nn.functional.one_hot(ids, I).double()
    torch.testing.assert_close(tokens(ids)[1], as_given(tokens, by_equations(tokens, one_hot)[1]))


@pytest.mark.parametrize(("kind", "rows", "gains"), [("LSTM", 18, [*range(8), 16]), ("GRU", 12, range(6))])
def test_initial_values(kind: str, rows: int, gains: Any) -> None:
    """Gains of 1 and biases of 0, from the constructor and from reset_parameters(); on meta too."""
    cls = getattr(fastrnn, kind)
    module = cls(I, H, layer_norm=True, num_layers=2, bidirectional=True)
    names = [n for n, _ in module.named_parameters() if "weight_ln" in n]
    assert names == ["weight_ln_l0", "weight_ln_l0_reverse", "weight_ln_l1", "weight_ln_l1_reverse"]
    want = torch.zeros(rows, H)
    want[list(gains)] = 1
    assert all(torch.equal(getattr(module, name), want) for name in names)
    with torch.no_grad():
        for x in module.parameters():
            x.fill_(3)
    module.reset_parameters()
    assert all(torch.equal(getattr(module, name), want) for name in names)
    assert module.weight_hh_l1.abs().max() <= H**-0.5
    meta = cls(I, H, layer_norm=True, device="meta")
    assert meta(torch.zeros(T, B, I, device="meta"))[0].shape == (T, B, H)


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_function(kind: str) -> None:
    module, x = make(kind), randn(T, B, I)
    weights = LayerWeights(module.weight_ih_l0, module.weight_hh_l0, params=module.weight_ln_l0)
    layer, cell = (getattr(functional, name) for name in (kind.lower(), f"{kind.lower()}_cell"))
    torch.testing.assert_close(layer(x, None, [[weights]])[0], by_equations(module, x)[0])
    zeros = torch.zeros(B, H).double()
    after = cell(x[0], (zeros, zeros) if kind == "LSTM" else zeros, weights)
    for a, b in zip(after if kind == "LSTM" else [after], by_equations(module, x[:1])[1], strict=True):
        torch.testing.assert_close(a, b[0])
    # Biases that are given besides belong to what is normalised.
    biases = [randn(len(w), seed=s) for s, w in enumerate(weights[:2])]
    with_ones = copy.deepcopy(module)
    with_ones.weight_ih_l0 = torch.nn.Parameter(torch.cat([module.weight_ih_l0, biases[0][:, None]], 1))
    extended = torch.cat([x, torch.ones(T, B, 1).double()], 2)
    torch.testing.assert_close(
        layer(x, None, [[weights._replace(bias_ih=biases[0])]])[0], by_equations(with_ones, extended)[0]
    )
    with pytest.raises(RuntimeError, match=r"weights\[0\]\[0\].params: expected \[\d+, 5\], got \[2, 5\]"):
        layer(x, None, [[weights._replace(params=torch.zeros(2, H).double())]])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_quantized(kind: str, dtype: torch.dtype) -> None:
    module, x = make(kind, num_layers=2, bidirectional=True).float(), randn(T, B, I).float()
    narrow = fastrnn.quantize(module, dtype)
    assert narrow.state_dict()["weight_ln_l1"].dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(narrow(x)[0], module(x)[0], rtol=0, atol=0.05)
        module.weight_ln_l0.add_(1)
        assert (narrow(x)[0] - module(x)[0]).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_trace(kind: str) -> None:
    """No op of torch's has it: a loop is recorded, and a warning says so."""
    module, x = make(kind), randn(T, B, I)
    with pytest.warns(UserWarning, match="layer_norm"):
        traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x)[0], module(x)[0])


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="layer_norm argument is only supported for LSTM and GRU"):
        fastrnn.RNN(I, H, layer_norm=True)
    assert fastrnn.RNN(I, H, layer_norm=False)(torch.zeros(T, B, I))[0].shape == (T, B, H)
    for kind in KINDS:
        cls = getattr(fastrnn, kind)
        with pytest.raises(TypeError, match="layer_norm should be of type bool, got: int"):
            cls(I, H, layer_norm=1)
        with pytest.raises(ValueError, match=r"bias: expected True with layer_norm, .* got False"):
            cls(I, H, bias=False, layer_norm=True)
        module = make(kind)
        with pytest.raises(TypeError, match="has layer_norm=True"):
            fastrnn.to_torch(module)
        for write in (fastrnn.weights.to_keras, fastrnn.weights.load_keras):
            with pytest.raises(ValueError, match=r"expected nothing that torch.nn lacks, but it has layer_norm=True"):
                write(module, *([[]] if write is fastrnn.weights.load_keras else []))
        module.weight_ln_l0 = torch.nn.Parameter(torch.zeros(3, H, dtype=torch.float64))
        with pytest.raises(RuntimeError, match=r"weight_ln_l0: expected \[\d+, 5\], got \[3, 5\]"):
            module(randn(T, B, I))
        with pytest.raises(ValueError, match="num_heads should be 1 with layer_norm, got 5"):
            cls(I, H, layer_norm=True, num_heads=5)
        with pytest.raises(ValueError, match="init sets bias_ih, which there is none of with layer_norm"):
            cls(I, H, layer_norm=True, init=("chrono", 10))
    with pytest.raises(ValueError, match="forget_bias sets bias_ih, which there is none of with layer_norm, got 1"):
        fastrnn.LSTM(I, H, layer_norm=True, forget_bias=1.0)
    with pytest.raises(ValueError, match="peephole: expected False with layer_norm, got True"):
        fastrnn.LSTM(I, H, layer_norm=True, peephole=True)
