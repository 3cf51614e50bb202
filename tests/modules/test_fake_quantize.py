"""``fake_quantize``: the rounding is quantize's to the bit, gradients go straight through; the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn
from fastrnn import heads
from fastrnn.rounding import DTYPES, rounded
from tests.helpers import LIKE_GRU, build, check_compile, evaluate, leaf, randn, tensors

T, B, I, H = 6, 3, 5, 17  # noqa: E741
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "projected": ("LSTM", {"proj_size": 4}),
    "peephole": ("LSTM", {"peephole": True}),
    "heads": ("LSTM", {"num_heads": 17}),
    "GRU": ("GRU", {"num_layers": 2}),
    "layer norm": ("GRU", {"layer_norm": True}),
    "RNN": ("RNN_TANH", {"bias": False, "learn_initial_state": True}),
    **{kind: (kind, {}) for kind in LIKE_GRU},
}
MODULE = pytest.mark.parametrize("which", MODULES)


def make(which: str, **more: Any) -> Any:
    torch.manual_seed(3)
    kind, options = MODULES[which]
    return build(fastrnn, kind, I, H, **options, **more)


def matrices(module: Any, dtype: torch.dtype) -> list[str]:
    fields = ("weight_ih", "weight_hh", *(["weight_hr"] if dtype == torch.bfloat16 else []))
    return [name for names in module._all_weights for name in names if name.startswith(fields)]


def stored(narrow: Any, field: str) -> Tensor:
    """A quantized module's matrix in float32, one below the other of all groups: blocks put together again."""
    weight = narrow._buffers[field]
    if weight.dtype == torch.bfloat16:
        return weight.float().flatten(0, 1)
    P, blocks, quads, G, units, depth = weight.shape
    scale = narrow._buffers[f"{field}_scale"].transpose(1, 2).reshape(P, G, -1)  # of [P, blocks, G, units]
    whole = weight.permute(0, 3, 1, 4, 2, 5).reshape(P, G, blocks * units, quads * depth)
    return (whole * scale[..., None])[:, :, : narrow.hidden_size // narrow.num_heads].flatten(0, 2)


@DTYPE
@MODULE
def test_rounds_as_quantize_does(which: str, dtype: torch.dtype) -> None:
    """The weights of a forward pass are those of the quantized copy, bit for bit, made before or after."""
    module = make(which)
    before, exact = fastrnn.quantize(module, dtype), copy.deepcopy(module.state_dict())
    assert fastrnn.fake_quantize(module, dtype) is module
    for after in (fastrnn.quantize(module, dtype), fastrnn.quantize(nn.Sequential(module), dtype)[0]):
        assert list(after.state_dict()) == list(before.state_dict())
        assert all(map(torch.equal, after.state_dict().values(), before.state_dict().values()))
    for layer, directions in enumerate(module._weights()):
        groups = [g for w in directions for g in (heads.by_head(w) if module.num_heads > 1 else [w])]
        for field in ("weight_ih", "weight_hh"):
            got = torch.cat([getattr(g, field) for g in groups])
            assert torch.equal(got, stored(before, f"{field}_l{layer}")[:, : got.shape[1]])
    for name, weight in exact.items():
        now = getattr(module, name)
        assert torch.equal(now, rounded(weight, dtype) if name in matrices(module, dtype) else weight)


@DTYPE
@MODULE
def test_results_and_gradients(which: str, dtype: torch.dtype) -> None:
    """Those of a module whose weights are the rounded ones: straight through, for input, biases and all."""
    module = make(which)
    plain = copy.deepcopy(module)
    with torch.no_grad():
        for name in matrices(plain, dtype):
            getattr(plain, name).copy_(rounded(getattr(plain, name), dtype))
    fastrnn.fake_quantize(module, dtype)
    x = randn(T, B, I, dtype=torch.float32)
    found, wanted = evaluate(module, x), evaluate(plain, x)
    names = {f"grad of parametrizations.{n}.original": f"grad of {n}" for n in matrices(plain, dtype)}
    assert {names.get(name, name) for name in found} == set(wanted)
    for name, got in found.items():
        torch.testing.assert_close(got, wanted[names.get(name, name)])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_bfloat16_is_what_the_copy_computes(kind: str) -> None:
    """Up to float32's rounding; int8 rounds rows of x and h besides, each by at most 1/254 of its largest number."""
    module, x = build(fastrnn, kind, I, 64), randn(40, B, I, dtype=torch.float32)
    wide = fastrnn.fake_quantize(copy.deepcopy(module), torch.bfloat16)(x)[0]
    torch.testing.assert_close(wide, fastrnn.quantize(module, torch.bfloat16)(x)[0], rtol=0, atol=1e-5)
    wide = fastrnn.fake_quantize(copy.deepcopy(module), torch.int8)(x)[0]
    narrow = fastrnn.quantize(module, torch.int8)(x)[0]
    assert 0 < (wide - narrow).abs().max() < 0.03


@DTYPE
def test_training(dtype: torch.dtype) -> None:
    """The optimizer's parameters are the same objects and move by less than a step of the grid; the loss of the
    quantized copy falls with that of the training."""
    torch.manual_seed(0)
    module = fastrnn.GRU(3, 24)
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    fastrnn.fake_quantize(module, dtype)
    assert {id(p) for p in module.parameters()} == {id(p) for p in parameters.values()}
    x = randn(12, 8, 3, dtype=torch.float32)
    target = x.cumsum(0).sin().repeat(1, 1, 8) / 2

    def loss(m: nn.Module) -> Tensor:
        return (m(x)[0] - target).square().mean()

    begin, start = loss(module).item(), parameters["weight_hh_l0"].detach().clone()
    for _ in range(60):
        optimizer.zero_grad()
        loss(module).backward()
        optimizer.step()
    assert not torch.equal(parameters["weight_hh_l0"], start)
    assert torch.equal(module.weight_hh_l0, rounded(parameters["weight_hh_l0"], dtype))
    end = loss(module).item()
    assert end < 0.5 * begin
    assert loss(fastrnn.quantize(module, dtype)).item() == pytest.approx(end, rel=0.05)


def test_takes_the_fused_road(monkeypatch: pytest.MonkeyPatch) -> None:
    module, taken = fastrnn.fake_quantize(fastrnn.LSTM(I, H)), []
    fused = fastrnn.layer.fused
    monkeypatch.setattr(fastrnn.layer, "fused", lambda call, *rest: taken.append(1) or fused(call, *rest))
    module(randn(T, B, I, dtype=torch.float32))[0].sum().backward()
    assert taken == [1]


@DTYPE
def test_transforms(dtype: torch.dtype) -> None:
    """Compiled whole, under vmap(grad), forward mode and double backward: the derivatives of the plain module at the
    rounded weights."""
    module = fastrnn.fake_quantize(fastrnn.GRU(I, H), dtype)
    x = randn(T, B, I, dtype=torch.float32)
    check_compile(module, "aot_eager", x)
    plain = fastrnn.GRU(I, H)
    names = {
        n: f"parametrizations.{n}.original" if n in matrices(plain, dtype) else n for n, _ in plain.named_parameters()
    }
    exact = {n: dict(module.named_parameters())[own].detach() for n, own in names.items()}
    at = {n: rounded(w, dtype) if n in matrices(plain, dtype) else w for n, w in exact.items()}

    def ours(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, {names[n]: w for n, w in weights.items()}, (x,))[0].square().sum()

    def theirs(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(plain, weights, (x,))[0].square().sum()

    rows = x.unsqueeze(2)
    found, wanted = (vmap(grad(f), (None, 1))(w, rows) for f, w in ((ours, exact), (theirs, at)))
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want)
    along = {n: randn(*w.shape, seed=3, dtype=torch.float32) for n, w in exact.items()}
    torch.testing.assert_close(
        jvp(lambda w: ours(w, x), (exact,), (along,)), jvp(lambda w: theirs(w, x), (at,), (along,))
    )
    twice = []
    for f, weights in ((ours, exact), (theirs, at)):
        w = {n: leaf(each) for n, each in weights.items()}
        (first,) = torch.autograd.grad(f(w, x), w["weight_hh_l0"], create_graph=True)
        twice.append(torch.autograd.grad(first.square().sum(), list(w.values())))
    torch.testing.assert_close(*twice)


@DTYPE
@MODULE
def test_state_dict_copies_and_the_way_back(which: str, dtype: torch.dtype) -> None:
    module = make(which)
    exact = {k: v.clone() for k, v in module.state_dict().items()}
    fastrnn.fake_quantize(module, dtype)
    x = randn(T, B, I, dtype=torch.float32)
    want = module(x)[0]
    other = build(fastrnn, MODULES[which][0], I, H, **MODULES[which][1])
    fastrnn.fake_quantize(other, dtype).load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], want) and torch.equal(copy.deepcopy(module)(x)[0], want)
    for name in matrices(module, dtype):
        assert torch.equal(module.state_dict()[f"parametrizations.{name}.original"], exact[name])
        setattr(other, name, exact[name] * 2)  # the exact weight
        assert torch.equal(getattr(other, name), rounded(exact[name] * 2, dtype))
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    assert set(module.state_dict()) == set(exact) and type(module) is type(make(which))
    assert all(torch.equal(module.state_dict()[name], each) for name, each in exact.items())


@DTYPE
def test_beside_other_parametrizations(dtype: torch.dtype) -> None:
    """It is behind them, rounds what they give, and quantize rounds the same."""
    module = parametrizations.weight_norm(fastrnn.GRU(I, H), "weight_hh_l0")
    parametrizations.orthogonal(module, "weight_ih_l0")
    before, whole = fastrnn.quantize(module, dtype), module.weight_hh_l0.detach()
    fastrnn.fake_quantize(module, dtype)
    assert torch.equal(module.weight_hh_l0, rounded(whole, dtype))
    after = fastrnn.quantize(module, dtype)
    assert all(map(torch.equal, after.state_dict().values(), before.state_dict().values()))
    module(randn(T, B, I, dtype=torch.float32))[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_weight_dropout_of_rounded_weights() -> None:
    module = fastrnn.LSTM(I, H, weight_dropout=0.5)
    plain = copy.deepcopy(module)
    with torch.no_grad():
        for name in matrices(plain, torch.int8):
            getattr(plain, name).copy_(rounded(getattr(plain, name), torch.int8))
    x, results = randn(T, B, I, dtype=torch.float32), []
    for m in (fastrnn.fake_quantize(module), plain):
        torch.manual_seed(5)
        results.append(m(x)[0])
    torch.testing.assert_close(*results)


def test_zeros_and_models() -> None:
    """A row of zeros stays one; cells and other modules of a model are left alone; steps and states are as ever."""
    model = nn.ModuleDict({"rnn": fastrnn.LSTM(I, H), "cell": fastrnn.GRUCell(I, H), "head": nn.Linear(H, 2)})
    with torch.no_grad():
        model["rnn"].weight_hh_l0[3] = 0
    fastrnn.fake_quantize(model)
    assert (model["rnn"].weight_hh_l0[3] == 0).all()
    assert [n for n, m in model.named_modules() if parametrize.is_parametrized(m)] == ["rnn"]
    x = randn(T, B, I, dtype=torch.float32)
    output, state = model["rnn"](x)
    stepped, after = model["rnn"].step(x[0])
    torch.testing.assert_close(stepped, output[0])
    assert len(tensors(after)) == len(tensors(state)) == 2


def test_refuses() -> None:
    pruned = fastrnn.LSTM(4, 5)
    prune.random_unstructured(pruned, "weight_hh_l0", 0.5)
    model = nn.ModuleList([fastrnn.GRU(4, 5), pruned])
    with pytest.raises(TypeError, match="weight_hh_l0: expected a parameter, got a tensor: remove its weight norm"):
        fastrnn.fake_quantize(model)
    assert not any(map(parametrize.is_parametrized, model)), "nothing is half done"
    for module, dtype, kind, message in [
        (
            fastrnn.LSTM(4, 5),
            torch.float16,
            ValueError,
            "dtype: expected torch.int8 or torch.bfloat16, got torch.float16",
        ),
        ("a", torch.int8, TypeError, "module: expected a torch.nn.Module, got str"),
        (nn.LSTM(4, 5), torch.int8, TypeError, "got torch.nn.LSTM: convert it first"),
        (fastrnn.SLSTM(4, 5), torch.int8, TypeError, "which cannot"),
        (fastrnn.GRU(4, 5).double(), torch.int8, TypeError, "weight_ih_l0: expected torch.float32, got torch.float64"),
        (fastrnn.GRU(4, 5, token_input=True), torch.int8, ValueError, "module: expected token_input=False"),
        (fastrnn.quantize(fastrnn.GRU(4, 5)), torch.int8, TypeError, "quantized already"),
        (fastrnn.fake_quantize(fastrnn.GRU(4, 5)), torch.bfloat16, TypeError, "weight_ih_l0: expected an exact weight"),
    ]:
        with pytest.raises(kind) as caught:
            fastrnn.fake_quantize(module, dtype)
        assert message in str(caught.value)
