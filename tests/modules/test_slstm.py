"""``SLSTM`` against the paper's equations without their stabiliser: every option, every transform."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import fallback, functional, wavefront
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

T, B, I, H = 6, 3, 4, 6  # noqa: E741
LENGTHS = torch.tensor([6, 2, 4])
NAMES = ("h_0", "c_0", "n_0", "m_0")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
    "heads": {"num_heads": 3, "bidirectional": True},
    "states batch first": {"num_layers": 2, "state_batch_first": True},
}


def make(**options: Any) -> fastrnn.SLSTM:
    torch.manual_seed(1)
    module = fastrnn.SLSTM(I, H, dtype=torch.float64, **options)
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) * 0.5)
    return module


def make_states(module: fastrnn.SLSTM, seed: int = 3) -> tuple[Tensor, ...]:
    """[L*D, B, H] each; an n is above 0."""
    count = module.num_layers * (1 + module.bidirectional)
    h, c, n, m = (randn(count, B, H, seed=seed + k) for k in range(4))
    states = h, c, n.abs() + 0.5, m
    return tuple(x.transpose(0, 1).contiguous() for x in states) if module.state_batch_first else states


def by_equations(
    module: fastrnn.SLSTM, x: Tensor, hx: Any = None, lengths: Any = None, resets: Any = None, reset_state: Any = None
) -> Any:
    """Beck et al. 2024, section 2.2, x [T, B, I]: C = f C + e^i z and N = f N + e^i as they are, with f = sigmoid(f~),
    and m beside them, which says what they are divided by in a state: c = C e^-m, n = N e^-m."""
    w, finals, every = dict(module.named_parameters()), ([], [], [], []), []
    zeros = (x.new_zeros(H),) * 4

    def start(states: Any, at: int, b: int) -> tuple[Tensor, ...]:
        if states is None:
            return zeros
        h, c, n, m = (s[b, at] if module.state_batch_first else s[at, b] for s in states)
        return h, c * m.exp(), n * m.exp(), m

    for layer in range(module.num_layers):
        outputs = []
        for d, suffix in enumerate(["", "_reverse"][: 1 + module.bidirectional]):
            at, name = layer * (1 + module.bidirectional) + d, f"_l{layer}{suffix}"
            weight_hh = w[f"weight_hh{name}"]
            if module.num_heads > 1:  # of every gate a block a head
                by_gate = [torch.block_diag(*blocks) for blocks in zip(*(x.chunk(4) for x in weight_hh), strict=True)]
                weight_hh = torch.cat(by_gate)
            rows = []
            for b in range(x.shape[1]):
                h, C, N, m = start(hx, at, b)
                steps = range(len(x) if lengths is None else int(lengths[b]))
                row = [zeros] * len(x)
                for t in reversed(steps) if suffix else steps:
                    boundary = t + 1 if suffix else t
                    if resets is not None and boundary in steps and resets[boundary, b]:
                        h, C, N, m = start(reset_state, at, b)
                    gates = w[f"weight_ih{name}"] @ x[t, b] + weight_hh @ h
                    if module.bias:
                        gates = gates + w[f"bias_ih{name}"] + w[f"bias_hh{name}"]
                    i, f, z, o = gates.chunk(4)
                    log_f = torch.sigmoid(f).log()
                    m = torch.where(N == 0, i, torch.maximum(log_f + m, i))
                    C = log_f.exp() * C + i.exp() * torch.tanh(z)
                    N = log_f.exp() * N + i.exp()
                    h = torch.sigmoid(o) * C / N
                    row[t] = h, C * (-m).exp(), N * (-m).exp(), m
                rows.append([torch.stack(each) for each in zip(*row, strict=True)])
                for final, last in zip(finals, (h, C * (-m).exp(), N * (-m).exp(), m), strict=True):
                    final.append(last)
            outputs.append([torch.stack(each, 1) for each in zip(*rows, strict=True)])
        x, *every = (torch.cat(each, 2) for each in zip(*outputs, strict=True))
    states = tuple(torch.stack(final).unflatten(0, (-1, x.shape[1])) for final in finals)
    return x, tuple(s.transpose(0, 1) for s in states) if module.state_batch_first else states, every


def expected(module: fastrnn.SLSTM, x: Tensor, hx: Any = None, **options: Any) -> dict[str, Tensor]:
    module.zero_grad()
    x = leaf(x)
    hx = None if hx is None else tuple(map(leaf, hx))
    output, states, _ = by_equations(module, x, hx, **options)
    named = {"input": x, **dict(zip(NAMES, hx or (), strict=False))}
    return collect(output, states, {**named, **dict(module.named_parameters())})


@pytest.mark.parametrize("given", ["", "state", "lengths", "resets", "recompute"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_gradient(name: str, given: str) -> None:
    """Of a loss that sees the final c, n and m, too."""
    module, x = make(**OPTIONS[name]), randn(T, B, I)
    hx = make_states(module) if given in ("state", "recompute", "resets") else None
    masks: dict[str, Any] = {}
    if given in ("lengths", "recompute"):
        masks["lengths"] = LENGTHS
    if given == "resets":
        masks["resets"] = torch.rand(T, B) < 0.4
    if given == "recompute":
        masks |= {"resets": torch.rand(T, B) < 0.4, "reset_state": make_states(module, 9)}
        module.recompute = 2
    assert_equal(evaluate(module, x, hx, **masks), expected(module, x, hx, **masks), 1e-10)


def test_no_gate_breaks_it() -> None:
    """Gates of any size, at the start and later: everything is finite, n is 1 at first and never smaller, and the first
    h is sigmoid(o) tanh(z)."""
    x = torch.tensor([-1e30, -1e4, -300.0, -90.0, 0.0, 90.0, 1e4, 1e30])
    gates = torch.cartesian_prod(x, x)  # i and f of each row
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module = fastrnn.SLSTM(3, 1, bias=False, dtype=dtype, return_all_states=True)
        with torch.no_grad():
            module.weight_hh_l0.fill_(0.1)
            module.weight_ih_l0.copy_(torch.eye(3)[[0, 1, 2, 2]])
        given = gates[torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(t)) for t in range(5)])]
        given = torch.cat([given, torch.full((5, 64, 1), 0.5)], 2).to(dtype).requires_grad_()
        output, finals, (_, n, _) = module(given)
        assert (n[0] == 1).all() and (n >= 1).all()
        half = given[0, :, 2:]
        torch.testing.assert_close(output[0], half.sigmoid() * half.tanh())
        found = torch.autograd.grad(weighted([output, *finals]), [given, *module.parameters()])
        assert all(y.isfinite().all() for y in (output, *finals, *found))


def test_where_both_are_equal_and_nothing_was_seen() -> None:
    """log f + m = i: the gradient of the maximum is shared. n = 0: m' = i, and a state of zeros has a gradient."""
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    module = fastrnn.SLSTM(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.tensor([[1.0], [0.0], [0.0], [0.0]]))
        module.weight_hh_l0.zero_()

    def shares(i: float) -> tuple[float, ...]:
        """m', and what of its gradient comes to i and to m before."""
        start = [x.clone().requires_grad_() for x in (zero, zero, zero + 1, zero)]
        x = torch.full((1, 1, 1), i, dtype=torch.float64, requires_grad=True)
        m_n = module(x, tuple(start))[1][3]
        return m_n.item(), *(g.item() for g in torch.autograd.grad(m_n.sum(), [x, start[3]]))

    log_f, *past = shares(-2.0)
    assert past == [0, 1] and shares(1.0) == (1, 1, 0) and shares(log_f) == (log_f, 0.5, 0.5)
    start = [zero.clone().requires_grad_() for _ in range(4)]
    x = torch.ones(1, 1, 1).double().requires_grad_()
    output, (_, _, n_n, m_n) = module(x, tuple(start))
    assert m_n.item() == 1 and n_n.item() == 1
    found = torch.autograd.grad(output.sum() + 2 * n_n.sum() + 3 * m_n.sum(), [x, *start])
    a = math.exp(log_f - 1)
    want = (3.0, 0.0, 0.5 * a, 2 * a, 0.0)
    torch.testing.assert_close(torch.stack([g.sum() for g in found]), torch.tensor(want).double())


@pytest.mark.parametrize("name", ["plain", "two layers, two directions", "heads"])
def test_packed_and_every_state(name: str) -> None:
    module, x = make(**OPTIONS[name], return_all_states=True), randn(T, B, I)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    output, finals, cells = module(packed)
    want, states, every = by_equations(module, x, lengths=LENGTHS)
    padded = [pad_packed_sequence(y)[0] for y in (output, *cells)]
    for a, b in zip((*padded, *finals), (want, *every, *states), strict=True):
        torch.testing.assert_close(a, b)
    got, wanted = (torch.autograd.grad(weighted(y), list(module.parameters())) for y in (padded, [want, *every]))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["plain", "two layers, two directions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, name: str) -> None:
    """In one direction a half type's gates and their gradients lie where values are saved."""
    module, x = make(**OPTIONS[name]), randn(T, B, I)
    want = expected(module, x)
    got = evaluate(copy.deepcopy(module).to(dtype), x.to(dtype))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    for key, y in want.items():
        assert got[key].dtype == dtype
        assert ((got[key].double() - y).abs() <= tolerance * (1 + y.abs().max())).all(), key


@pytest.mark.parametrize("form", ["segments", "vmap", "jvp", "linearize", "grad", "reference", "samples"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_gates_of_half_types(
    dtype: torch.dtype, autocast: bool, with_state: bool, form: str, monkeypatch: Any
) -> None:
    """m and the gates of half types are nowhere rounded on the way from one op to another: that would be a factor to
    what inputs count, e to the power of what is rounded away. Each form's error is the whole call's."""
    torch.manual_seed(2)
    module = make(bidirectional=True).to(dtype)
    x = (torch.randn(20, B, I) * 100).to(dtype)
    hx = tuple(s.to(dtype) for s in make_states(module)) if with_state else None
    want = expected(copy.deepcopy(module).double(), x.double(), hx and tuple(s.double() for s in hx))
    if autocast:
        module, x, hx = module.float(), x.float(), hx and tuple(s.float() for s in hx)
    if form == "segments":
        module.recompute = 1
    if form == "reference":
        monkeypatch.setattr(fallback, "has_kernels", lambda *tensors: False)
    weights = dict(module.named_parameters())

    def run(bias: Tensor) -> Any:
        output, finals = torch.func.functional_call(module, {**weights, "bias_ih_l0": bias}, (x, hx))
        return output, *finals

    bias = weights["bias_ih_l0"]
    with torch.autocast("cpu", dtype, enabled=autocast):
        if form == "vmap":
            found = tuple(y[1] for y in torch.func.vmap(run)(torch.stack([bias, bias])))
        elif form == "jvp":
            found = torch.func.jvp(run, (bias,), (bias,))[0]
        elif form == "linearize":  # the graph of it runs under autocast, too
            found, tangent = torch.func.linearize(run, bias)
            torch.testing.assert_close(tangent(bias), torch.func.jvp(run, (bias,), (bias,))[1])
        elif form == "samples":
            module.batch_first = True
            output, finals = call_for_per_sample_grads(module, batch_size=B)(x.transpose(0, 1), hx)
            found = output.transpose(0, 1), *finals
        else:
            found = run(bias)
        of_bias = torch.func.grad(lambda b: weighted(run(b)))(bias) if form == "grad" else None
    got = dict(zip(want, found, strict=False))
    if of_bias is not None:
        got["grad of bias_ih_l0"] = of_bias
    if form in ("segments", "samples"):
        weighted(found).backward()
        got |= {
            f"grad of {name}": p.grad if form == "segments" else p.grad_sample.sum(0) for name, p in weights.items()
        }
        assert all(got[f"grad of {name}"].dtype == p.dtype for name, p in weights.items())
    for key, y in got.items():
        assert (y.double() - want[key]).abs().max() <= torch.finfo(dtype).eps * 2 * want[key].abs().max(), key


@pytest.mark.parametrize("name", ["bias_ih_l0", "bias_hh_l0", "weight_hh_l0"])
@pytest.mark.parametrize("form", ["segments", "vmap"])
def test_two_dtypes_are_refused(form: str, name: str) -> None:
    module, x = make(recompute=2 if form == "segments" else 0).bfloat16(), randn(T, B, I).bfloat16()
    setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().float()))
    with pytest.raises(RuntimeError, match=rf"{name}: expected torch\.bfloat16.*got torch\.float32"):
        module(x) if form == "segments" else torch.func.vmap(module, 1, randomness="different")(x[:, :, None])


def test_a_wavefront_takes_no_half_types(monkeypatch: Any) -> None:
    """Its chunks hand states on."""

    def refuse(*args: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(wavefront, "chunk_steps", lambda *args: 2)
    monkeypatch.setattr(wavefront, "network", refuse)
    module, x = make(num_layers=2), randn(T, B, I)
    with pytest.raises(NotImplementedError):
        module(x, make_states(module))
    module = module.bfloat16()
    module(x.bfloat16(), tuple(s.bfloat16() for s in make_states(module)))


def test_derivatives() -> None:
    module, x = make(num_heads=2), randn(3, 2, I).requires_grad_()
    names = [n for n, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Any:
        output, states = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))
        return output, *states

    check_derivatives(run, x, *module.parameters())


@pytest.mark.parametrize("batched", ["members", "samples"])
def test_vmap(batched: str) -> None:
    modules = [make() for _ in range(3)]
    for k, module in enumerate(modules):
        with torch.no_grad():
            module.weight_hh_l0.add_(k / 4)
    check_vmap(modules, batched, randn(T, 3, I))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    module, x = make(num_layers=2, bidirectional=True), randn(T, B, I)
    check_compile(module, backend, x, lengths=LENGTHS)


def test_forms_of_a_call() -> None:
    module, x = make(dropout=0.5, num_layers=2).eval(), randn(T, B, I)
    want, states, _ = by_equations(module, x)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x)[0], want)
    check_steps_add_up(module, x)
    module.batch_first = True
    torch.testing.assert_close(module(x.transpose(0, 1))[0].transpose(0, 1), want)
    output, finals = module(x[:, 0])
    torch.testing.assert_close((output, *finals), (want[:, 0], *(s[:, 0] for s in states)))
    tokens = make(token_input=True)
    ids = torch.randint(I, (T, B), generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(ids, I).double()
    for a, b in zip(tokens(ids)[1], by_equations(tokens, one_hot)[1], strict=True):
        torch.testing.assert_close(a, b)
    nested = torch.nested.nested_tensor([x[:n, 0] for n in (6, 2)], layout=torch.jagged)
    module.batch_first = False
    output, (_, _, n_n, _) = module(nested)
    torch.testing.assert_close(output.unbind()[1], want[:2, 0])
    assert n_n.shape == (2, 2, H)
    with fastrnn.streaming():
        whole = module(x)
        first = module(x[:4])
        rest = module(x[4:], first[1])
    assert torch.equal(torch.cat([first[0], rest[0]]), whole[0])
    assert all(torch.equal(a, b) for a, b in zip(rest[1], whole[1], strict=True))


def test_parameters() -> None:
    """Names, shapes and draws of an LSTM's; copies; a forget gate's bias."""
    module, lstm = (cls(I, 64, num_layers=2, bidirectional=True) for cls in (fastrnn.SLSTM, torch.nn.LSTM))
    assert {k: x.shape for k, x in module.state_dict().items()} == {k: x.shape for k, x in lstm.state_dict().items()}
    assert all(x.std() > 0.4 * 64**-0.5 and x.abs().max() <= 64**-0.5 for x in module.parameters())
    x = randn(T, B, I, dtype=torch.float32)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(x)[0], module(x)[0])
    assert str(fastrnn.SLSTM(I, H, num_heads=2)) == f"SLSTM({I}, {H}, num_heads=2)"
    biased = fastrnn.SLSTM(I, H, forget_bias=1.5, init="orthogonal")
    assert (biased.bias_ih_l0.view(4, H)[1] == 1.5).all() and not biased.bias_hh_l0.any()
    torch.testing.assert_close(biased.weight_hh_l0[:H] @ biased.weight_hh_l0[:H].T, torch.eye(H))


@pytest.mark.parametrize("drawn", [False, True])
def test_learned_initial_state(drawn: bool) -> None:
    """h_0, c_0 and m_0 from n_0 = 1, as they are at first, too: no value of theirs is a place where h' jumps."""
    module = fastrnn.SLSTM(I, H, learn_initial_state=True, dtype=torch.float64)
    names = [f"{n}_l0" for n in ("h_0", "c_0", "m_0")]
    assert [n for n, _ in module.named_parameters()][-3:] == names
    leaves = [getattr(module, name) for name in names]
    assert not any(x.any() for x in leaves)
    with torch.no_grad():
        module.bias_ih_l0[:H] -= 2  # units that forget little and take in little, where m is the past's
        for leaf in leaves if drawn else ():
            leaf.normal_()
    x = randn(T, B, I)
    got = torch.autograd.grad(module(x)[0].sum(), leaves)
    h, c, m = (leaf.expand(1, B, H) for leaf in leaves)
    want = torch.autograd.grad(by_equations(module, x, (h, c, torch.ones_like(c), m))[0].sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 1e-3

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, leaves)


def test_as_a_function() -> None:
    module, x = make(num_heads=2), randn(T, B, I)
    weights = LayerWeights(*(dict(module.named_parameters()).get(f"{n}_l0") for n in LayerWeights._fields[:4]))
    output, finals = functional.slstm(x, make_states(module), [[weights]])
    want, states, _ = by_equations(module, x, make_states(module))
    torch.testing.assert_close((output, *finals), (want, *states))
    with pytest.raises(TypeError, match=r"state: expected a tuple of tensors \(h, c, n, m\), got tuple of \['Tensor'"):
        functional.slstm(x, make_states(module)[:2], [[weights]])
    with pytest.raises(RuntimeError, match=r"state\[3\]: expected \[1, 3, 6\] \(layers \* directions, batch, width\)"):
        functional.slstm(x, (*make_states(module)[:3], x), [[weights]])
    with pytest.raises(RuntimeError, match=r"weights\[0\]\[0\].params: expected None for cell 'slstm', got a tensor"):
        functional.slstm(x, None, [[weights._replace(params=torch.zeros(3, H).double())]])


def test_what_does_not_fit() -> None:
    module, x = make(), randn(T, B, I)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[2\] size \(1, 3, 6\), got \[1, 2, 6\]"):
        module(x, tuple(s[:, :2] if k == 2 else s for k, s in enumerate(make_states(module))))
    with pytest.raises(TypeError, match=r"hx: expected a tuple of tensors \(h, c, n, m\), got Tensor"):
        module(x, make_states(module)[0])
    for name, value in {"proj_size": 2, "peephole": True, "layer_norm": True, "zoneout": 0.1}.items():
        with pytest.raises(ValueError, match=f"{name} argument is not supported for SLSTM: "):
            fastrnn.SLSTM(I, H, **{name: value})
    with pytest.raises(ValueError, match="init should be 'torch' or 'orthogonal' for SLSTM"):
        fastrnn.SLSTM(I, H, init=("chrono", 10))
    with pytest.raises(TypeError, match=r"expected layers that can have narrow weights, got fastrnn.SLSTM"):
        fastrnn.quantize(module.float())
    with pytest.raises(TypeError, match=r"is a fastrnn\.slstm\.SLSTM"):
        fastrnn.to_torch(module)
    with pytest.raises(TypeError, match=r"expected an LSTM, GRU or RNN or a cell .*, got fastrnn\.slstm\.SLSTM"):
        fastrnn.to_keras(module)
    module, x = make(), randn(T, B, I)
    with pytest.warns(UserWarning, match="a loop over a fixed number of steps"):
        traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x)[0], module(x)[0])
