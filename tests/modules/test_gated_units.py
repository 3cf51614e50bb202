"""Units between GRU and RNN, ``GRU(.., reset_after=False)``, ``LiGRU`` and ``MGU``, against their papers' equations,
written here once more: every option and transform."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import fallback, functional, reference
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


def gru(a: list[Tensor], h: Tensor, U: list[Tensor]) -> Tensor:
    """Cho et al. 2014, as published. a: W x + b of each gate."""
    r, z = (torch.sigmoid(a[k] + U[k] @ h) for k in range(2))
    return z * h + (1 - z) * torch.tanh(a[2] + U[2] @ (r * h))


def ligru(a: list[Tensor], h: Tensor, U: list[Tensor]) -> Tensor:
    """Ravanelli et al. 2018, without BN."""
    z = torch.sigmoid(a[0] + U[0] @ h)
    return z * h + (1 - z) * torch.relu(a[1] + U[1] @ h)


def mgu(a: list[Tensor], h: Tensor, U: list[Tensor]) -> Tensor:
    """Zhou et al. 2016."""
    f = torch.sigmoid(a[0] + U[0] @ h)
    return (1 - f) * h + f * torch.tanh(a[1] + U[1] @ (f * h))


# name: (class, options, the cell's name, its gates, its step)
UNITS: dict[str, tuple[Any, dict[str, Any], str, int, Callable[..., Tensor]]] = {
    "GRU": (fastrnn.GRU, {"reset_after": False}, "gru_reset_before", 3, gru),
    "LiGRU": (fastrnn.LiGRU, {}, "ligru", 2, ligru),
    "MGU": (fastrnn.MGU, {}, "mgu", 2, mgu),
}
unit = pytest.mark.parametrize("unit", UNITS)
light = pytest.mark.parametrize("unit", ["LiGRU", "MGU"])


def make(unit: str, *sizes: int, **options: Any) -> Any:
    torch.manual_seed(1)
    cls, own, *_ = UNITS[unit]
    module = cls(*(sizes or (I, H)), **{"dtype": torch.float64} | own | options)
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) * 0.5)
    return module


def by_equations(module: Any, x: Tensor, hx: Any = None, lengths: Any = None, resets: Any = None) -> Any:
    """A row at a time: x [T, B, I]; output and final states [L*D, B, H]."""
    *_, gates, step = UNITS[type(module).__name__]
    w, finals = dict(module.named_parameters()), []
    for layer in range(module.num_layers):
        outputs = []
        for d, suffix in enumerate(["", "_reverse"][: 1 + module.bidirectional]):
            at, name = layer * (1 + module.bidirectional) + d, f"_l{layer}{suffix}"
            W, U = w[f"weight_ih{name}"], w[f"weight_hh{name}"].chunk(gates)
            b = w[f"bias_ih{name}"] + w[f"bias_hh{name}"] if module.bias else torch.zeros(len(W)).double()
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
                    h = step((W @ x[t, row] + b).chunk(gates), h, U)
                    states[t] = h
                rows.append(torch.stack(states))
                finals.append(h)
            outputs.append(torch.stack(rows, 1))
        x = torch.cat(outputs, 2)
    return x, torch.stack(finals).unflatten(0, (-1, x.shape[1]))


def expected(module: Any, x: Tensor, hx: Any = None, **options: Any) -> dict[str, Tensor]:
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
@unit
def test_every_gradient(unit: str, name: str, given: str) -> None:
    module, x = make(unit, **OPTIONS[name]), randn(T, B, I)
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
@unit
def test_packed_and_nested(unit: str, name: str) -> None:
    module, x = make(unit, **OPTIONS[name]), randn(T, B, I)
    output, finals = module(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    want, states = by_equations(module, x, lengths=LENGTHS)
    padded, _ = pad_packed_sequence(output)
    torch.testing.assert_close(padded, want)
    torch.testing.assert_close(finals, states)
    got, wanted = (torch.autograd.grad(weighted([y]), list(module.parameters())) for y in (padded, want))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    rows = [x[:n, b] for b, n in enumerate(LENGTHS)]
    nested, finals = module(torch.nested.nested_tensor(rows, layout=torch.jagged))
    torch.testing.assert_close(nn.utils.rnn.pad_sequence(nested.unbind()), want)
    torch.testing.assert_close(finals, states)


@pytest.mark.parametrize("given", ["", "lengths", "resets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@unit
def test_dtypes(unit: str, dtype: torch.dtype, given: str) -> None:
    """Half types make the gradient of weight_hh from what the ops return; float32 in the kernel."""
    module, x = make(unit, num_layers=2, bidirectional=True), randn(T, B, I)
    masks: dict[str, Any] = {"lengths": LENGTHS} if given == "lengths" else {}
    if given == "resets":
        masks["resets"] = torch.rand(T, B) < 0.4
    if unit == "LiGRU":  # keeps relu's argument off its kink, which rounding would move it over
        with torch.no_grad():
            for name, w in module.named_parameters():
                w.copy_(w.sign() if name.startswith("bias_ih") else 0.1 * w)
    want = expected(module, x, **masks)
    got = evaluate(copy.deepcopy(module).to(dtype), x.to(dtype), **masks)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    for name, y in want.items():
        assert got[name].dtype == dtype
        assert ((got[name].double() - y).abs() <= tolerance * (1 + y.abs().max())).all(), name


@pytest.mark.parametrize("sizes", [(5, 3, 7, 130), (40, 40, 20, 64), (3, 1, 5, 300)])
@pytest.mark.parametrize("count", [1, 2])
@unit
def test_sizes_and_threads(unit: str, sizes: tuple[int, int, int, int], count: int) -> None:
    """Units are split, rows are; panels are packed or not: against the reference's loop, in float64."""
    steps, batch, features, hidden = sizes
    torch.manual_seed(2)
    cls, options, cell, *_ = UNITS[unit]
    module = cls(features, hidden, dtype=torch.float64, **options)
    x = randn(steps, batch, features).requires_grad_()
    leaves = [x, *module.parameters()]
    with threads(count):
        got = torch.autograd.grad(weighted([module(x)[0]]), leaves)
    w = dict(module.named_parameters())
    gates = torch.nn.functional.linear(x, w["weight_ih_l0"], w["bias_ih_l0"])
    start = x.new_zeros(batch, hidden)
    weights = w["weight_hh_l0"][None], w["bias_hh_l0"][None]
    by_reference = reference.forward(cell, gates, *weights, *[None] * 2, start, *[None] * 8, [False])
    for a, b in zip(got, torch.autograd.grad(weighted([by_reference[0]]), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * (1 + b.abs().max().item()))


@unit
def test_second_order(unit: str) -> None:
    module, x = make(unit), randn(3, 2, I).requires_grad_()
    names = [n for n, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    check_derivatives(run, x, *module.parameters())


@pytest.mark.parametrize("batched", ["members", "samples"])
@unit
def test_vmap(unit: str, batched: str) -> None:
    """An ensemble, whose weights are batched, and gradients of each sample, whose are not."""
    modules = [make(unit) for _ in range(3)]
    for k, module in enumerate(modules):
        with torch.no_grad():
            module.weight_hh_l0.add_(k / 10)
    check_vmap(modules, batched, randn(T, 3, I))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@unit
def test_compile(unit: str, backend: str) -> None:
    module, x = make(unit, num_layers=2, bidirectional=True), randn(T, B, I)
    check_compile(module, backend, x, lengths=LENGTHS)


@unit
def test_export_step_tokens_streaming_and_copies(unit: str) -> None:
    module, x = make(unit), randn(T, B, I)
    want = module(x)[0]
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x)[0], want)
    check_steps_add_up(module, x)
    with torch.no_grad(), fastrnn.streaming():
        whole, (first, state) = module(x)[0], module(x[:2])
        assert torch.equal(torch.cat([first, module(x[2:], state)[0]]), whole)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(again) == repr(module) and torch.equal(again(x)[0], want)
    tokens = make(unit, token_input=True)
    ids = torch.randint(I, (T, B))
    one_hot = torch.nn.functional.one_hot(ids, I).double()
    torch.testing.assert_close(tokens(ids)[1], by_equations(tokens, one_hot)[1])
    got = torch.autograd.grad(weighted([tokens(ids)[0]]), list(tokens.parameters()))
    wanted = torch.autograd.grad(weighted([by_equations(tokens, one_hot)[0]]), list(tokens.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@unit
def test_as_a_function(unit: str) -> None:
    module, x = make(unit), randn(T, B, I)
    _, options, _, gates, _ = UNITS[unit]
    weights = LayerWeights(*(dict(module.named_parameters())[f"{n}_l0"] for n in LayerWeights._fields[:4]))
    function = getattr(functional, unit.lower())
    output, h_n = function(x, None, [[weights]], lengths=LENGTHS, **options)
    want, states = by_equations(module, x, lengths=LENGTHS)
    torch.testing.assert_close(output, want)
    torch.testing.assert_close(h_n, states)
    with pytest.raises(RuntimeError, match=rf"bias_hh: expected \[{gates * H}\], got \[{gates * H - 1}\]"):
        function(x, None, [[weights._replace(bias_hh=weights.bias_hh[1:])]], **options)
    if unit != "GRU":
        with pytest.raises(RuntimeError, match="params: expected None"):
            function(x, None, [[weights._replace(params=torch.zeros(3, H).double())]])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@unit
def test_quantized(unit: str, dtype: torch.dtype) -> None:
    module, x = make(unit, num_layers=2, bidirectional=True).float(), randn(T, B, I).float()
    narrow = fastrnn.quantize(module, dtype)
    assert type(narrow).__name__ == f"Quantized{unit}"
    with torch.no_grad():
        want = module(x)[0]
        assert (narrow(x)[0] - want).abs().max() <= 0.03 * (1 + want.abs().max())


@unit
def test_trace(unit: str) -> None:
    """No op of torch's has it: a loop is recorded, and a warning says so."""
    module, x = make(unit), randn(T, B, I)
    with pytest.warns(UserWarning, match="reset_after" if unit == "GRU" else unit):
        traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x)[0], module(x)[0])


@light
def test_parameters_of_light_units(unit: str) -> None:
    """A GRU's names, of two gates; filled as torch.nn fills its own, by reset_parameters() too."""
    cls = UNITS[unit][0]
    module, gru = (of(I, 64, num_layers=2, bidirectional=True) for of in (cls, nn.GRU))
    assert list(module.state_dict()) == list(gru.state_dict())
    for w, of_gru in zip(module.parameters(), gru.parameters(), strict=True):
        assert (w.shape[0], w.shape[1:]) == (2 * 64, of_gru.shape[1:])
        assert w.abs().max() <= 64**-0.5 and w.std() > 0.4 * 64**-0.5
    assert repr(module) == f"{unit}(4, 64, num_layers=2, bidirectional=True)"
    for block in cls(I, H, init="orthogonal").weight_hh_l0.detach().chunk(2):
        torch.testing.assert_close(block.T @ block, torch.eye(H), rtol=0, atol=1e-5)
    meta = cls(I, H, device="meta")
    assert meta(torch.zeros(T, B, I, device="meta"))[0].shape == (T, B, H)
    meta.to_empty(device="cpu").reset_parameters()
    assert all(x.isfinite().all() and x.abs().max() <= H**-0.5 for x in meta.parameters())


@light
def test_other_options_of_light_units(unit: str) -> None:
    """Heads are units of their own; the options between layers, and one for unbatched input."""
    module, x = make(unit, I, 6, num_heads=2), randn(T, B, I)
    own, output = dict(module.named_parameters()), module(x)[0]
    for n in range(2):
        head = make(unit, I, 3)
        with torch.no_grad():
            for name, w in head.named_parameters():
                given = own[name]  # [gates, heads, units] of a head, or its own
                w.copy_(given[n] if given.dim() == 3 else given.unflatten(0, (2, 2, 3))[:, n].flatten(0, 1))
        torch.testing.assert_close(output[..., 3 * n : 3 * n + 3], head(x)[0])
    stack = make(unit, num_layers=3, residual=True, return_all_layers=True, batch_first=True, locked_dropout=0.5)
    first, second, third = stack.eval()(x.transpose(0, 1))[0]
    for layer, (below, got) in enumerate([(first, second), (second, third)], 1):
        alone = make(unit, H, H)
        alone.load_state_dict({n: getattr(stack, n.replace("_l0", f"_l{layer}")) for n in alone.state_dict()})
        torch.testing.assert_close(got, below + alone(below.transpose(0, 1))[0].transpose(0, 1))
    torch.testing.assert_close(stack(x[:, 0])[0][2], third[0])


def test_zoneout_and_recurrent_dropout_of_a_ligru() -> None:
    """The expectation by the equations, and what stays of a state that is kept for certain."""
    module, x = make("LiGRU", zoneout=0.3).eval(), randn(T, B, I)
    W, U = module.weight_ih_l0, module.weight_hh_l0.chunk(2)
    b, h = module.bias_ih_l0 + module.bias_hh_l0, torch.zeros(B, H).double()
    for t in range(T):
        made = torch.stack([ligru((W @ x[t, k] + b).chunk(2), h[k], U) for k in range(B)])
        h = 0.3 * h + 0.7 * made
    torch.testing.assert_close(module(x)[1][0], h)
    start = randn(1, B, H, seed=4)
    assert torch.equal(make("LiGRU", zoneout=1.0)(x, start)[1], start)
    dropped, without = make("LiGRU", recurrent_dropout=1.0), make("LiGRU")
    with torch.no_grad():
        without.weight_hh_l0.zero_()
    torch.testing.assert_close(dropped(x)[0], without(x)[0])


@light
def test_no_operator_of_onnx_is_taken_for_a_light_unit(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make(unit, bidirectional=True), randn(T, B, I)
    monkeypatch.setattr(fallback, "is_exported_to_onnx", lambda: True)
    monkeypatch.setattr(fastrnn._C, "module_forward", lambda *call: None)
    with pytest.warns(UserWarning, match=f"ONNX' have no .*{unit}.*a loop over a fixed number of steps is recorded"):
        torch.testing.assert_close(module(x)[0], by_equations(module, x)[0])


def test_what_does_not_fit() -> None:
    with pytest.raises(TypeError, match="reset_after should be of type bool, got: int"):
        fastrnn.GRU(I, H, reset_after=0)
    with pytest.raises(ValueError, match="reset_after: expected True with layer_norm, got False"):
        fastrnn.GRU(I, H, reset_after=False, layer_norm=True)
    with pytest.raises(TypeError, match="has reset_after=False"):
        fastrnn.to_torch(make("GRU"))
    plain = fastrnn.GRU(I, H)
    assert "reset_after" not in vars(plain) and "reset" not in repr(plain) and "reset_after=False" in repr(make("GRU"))
    x, weights = torch.zeros(1, 1, I), LayerWeights(*(x for _, x in plain.named_parameters()))
    torch.testing.assert_close(functional.gru(x, None, [[weights]])[0], plain(x)[0])
    state = torch.randn(1, H)
    torch.testing.assert_close(functional.gru_cell(x[0], state, weights), plain(x, state[None])[1][0])
    after = functional.gru_cell(x[0], state, weights, reset_after=False)
    assert not torch.allclose(after, plain(x, state[None])[1][0])
    with pytest.raises(TypeError, match="reset_after: expected a bool, got int"):
        functional.gru(x, None, [[weights]], reset_after=0)  # type: ignore[arg-type]


@light
def test_what_does_not_fit_a_light_unit(unit: str) -> None:
    cls, module = UNITS[unit][0], make(unit)
    for option in ("peephole", "return_all_states"):
        with pytest.raises(ValueError, match=f"{option} argument is only supported for LSTM"):
            cls(I, H, **{option: True})
    with pytest.raises(ValueError, match="layer_norm argument is only supported for LSTM and GRU"):
        cls(I, H, layer_norm=True)
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        cls(I, H, proj_size=2)
    with pytest.raises(ValueError, match=f"init='identity' is only supported for RNN .*, got {unit}"):
        cls(I, H, init="identity")
    with pytest.raises(TypeError, match=rf"^{unit}.__init__\(\) got an unexpected keyword argument 'reset_after'"):
        cls(I, H, reset_after=False)
    with pytest.raises(ValueError, match=rf"{unit}: Expected input to be 2D or 3D, got 1D instead"):
        module(torch.zeros(I))
    with pytest.raises(RuntimeError, match=rf"{I}, got {I + 1}"):
        module(randn(T, B, I + 1))
    module.weight_hh_l0 = nn.Parameter(torch.zeros(3 * H, H).double())
    with pytest.raises(RuntimeError, match=r"weight_hh_l0: expected \[10, 5\], got \[15, 5\]"):
        module(randn(T, B, I))


@light
def test_where_a_light_unit_cannot_go(unit: str) -> None:
    """Torch, Keras and ONNX have no such unit, and nothing of torch's is taken for one."""
    module = make(unit)
    model = nn.Sequential(module)
    assert fastrnn.convert(model)[0] is module and not fastrnn.unconverted(model)
    for refuse in (fastrnn.to_torch, fastrnn.to_keras):
        with pytest.raises(TypeError, match=rf"fastrnn\.modules\.{unit}"):
            refuse(module)
    with pytest.raises(TypeError, match=rf"{unit}"):
        fastrnn.load_keras(module, [])
    with pytest.raises(RuntimeError, match=rf"got a fastrnn\.{unit}"):
        torch.jit.script(module)
