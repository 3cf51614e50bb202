"""``weight_dropout=``: the module with the masked weights written out by hand, on every road; seeds, copies, errors."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.masks import draw
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

T, B, I, H, P = 6, 3, 4, 5, 0.4  # noqa: E741
KIND = pytest.mark.parametrize("kind", KINDS)
LENGTHS = torch.tensor([6, 2, 4])
RESETS = torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.3
CALLS: dict[str, dict[str, Any]] = {"plain": {}, "lengths": {"lengths": LENGTHS}, "resets": {"resets": RESETS}}
OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
    "learned state": {"learn_initial_state": True},
    "recompute": {"recompute": 2},
    "grad_clip": {"grad_clip": 0.05},
}


def masks_of(module: nn.Module) -> dict[str, Tensor]:
    """Drawn as a call draws them: by layer, then by direction."""
    names = [name for names in module._all_weights for name in names if name.startswith("weight_hh")]
    weights = [(name, getattr(module, name)) for name in names]
    return {name: draw(w.shape, 1 - P, w.dtype, w.device) / (1 - P) for name, w in weights}


def pair(kind: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A module with weight_dropout and the same without."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64} | options
    module, plain = build(fastrnn, kind, I, H, weight_dropout=P, **options), build(fastrnn, kind, I, H, **options)
    plain.load_state_dict(module.state_dict())
    return module, plain


def by_hand(plain: nn.Module, x: Any, hx: Any, **call: Any) -> dict[str, Tensor]:
    """Results and gradients of the module without the option, called with products for weights."""
    masks, x, hx = masks_of(plain), leaf(x), map_state(leaf, hx)
    weights = {name: leaf(w) for name, w in plain.named_parameters()}
    products = {name: w * masks[name] if name in masks else w for name, w in weights.items()}
    output, finals = functional_call(plain, products, (x, hx), call)
    return collect(output, finals, {"input": x, **dict(zip(("h_0", "c_0"), tensors(hx), strict=False)), **weights})


def of(module: nn.Module, x: Any, hx: Any, **call: Any) -> dict[str, Tensor]:
    module.zero_grad()
    x, hx = leaf(x), map_state(leaf, hx)
    output, finals = module(x, hx, **call)
    states = dict(zip(("h_0", "c_0"), tensors(hx), strict=False))
    return collect(output, finals, {"input": x, **states, **dict(module.named_parameters())})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("option", OPTIONS)
@KIND
def test_every_gradient(kind: str, option: str, call: str) -> None:
    module, plain = pair(kind, **OPTIONS[option])
    count = module.num_layers * (1 + module.bidirectional)
    hx = None if module.learn_initial_state else make_state(kind, count, B, hidden=H)
    torch.manual_seed(5)
    got = of(module, randn(T, B, I), hx, **CALLS[call])
    torch.manual_seed(5)
    assert_equal(got, by_hand(plain, randn(T, B, I), hx, **CALLS[call]))
    zeroed = got["grad of weight_hh_l0"] == 0
    assert 0 < zeroed.sum() < zeroed.numel()


@KIND
def test_packed_and_tokens(kind: str) -> None:
    module, plain = pair(kind, num_layers=2, token_input=True)
    packed = pack_padded_sequence(randn(T, B, I), LENGTHS, enforce_sorted=False)
    for x in (packed, torch.randint(I, (T, B))):
        torch.manual_seed(5)
        output, finals = module(x)
        torch.manual_seed(5)
        want, states = functional_call(plain, dict(plain.named_parameters()) | masked(plain), (x,))
        torch.testing.assert_close(getattr(output, "data", output), getattr(want, "data", want))
        torch.testing.assert_close(finals, states)


def masked(plain: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(plain, name) * mask for name, mask in masks_of(plain).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    for cast in (False, True):
        module, plain = pair("LSTM", dtype=torch.float32 if cast else dtype)
        x = randn(T, B, I, dtype=torch.float32 if cast else dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            torch.manual_seed(5)
            output, _ = module(x)
            torch.manual_seed(5)
            want, _ = functional_call(plain, masked(plain), (x,))
        torch.testing.assert_close(output, want)


def test_masks() -> None:
    """Drawn anew by every call, from torch's generator; kept elements are scaled; none in eval."""
    module = fastrnn.RNN(2, 300, weight_dropout=0.25, bias=False)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.fill_(1)

    def after() -> Tensor:  # of h_0 = e_j the first step gives tanh of the mask's column j
        return torch.atanh(module(torch.zeros(1, 300, 2), torch.eye(300)[None])[0][0]).T

    torch.manual_seed(1)
    first, second = after(), after()
    torch.manual_seed(1)
    assert torch.equal(after(), first) and not torch.equal(first, second)
    kept = first != 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 4 / 3), rtol=1e-4, atol=0)
    assert abs(kept.float().mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / first.numel())
    assert (module.eval().weight_hh_l0 == 1).all() and (after() - 1).abs().max() < 1e-4
    assert (build(fastrnn, "GRU", 3, 5, weight_dropout=1.0)(torch.ones(2, 2, 3))[0]).isfinite().all()


def test_a_step_is_a_call() -> None:
    module, plain = pair("LSTM")
    x, state = randn(B, I), make_state("LSTM", 1, B, hidden=H)
    torch.manual_seed(5)
    steps = [module.step(x, state)[0] for _ in range(2)]
    torch.manual_seed(5)
    for got in steps:
        want, _ = functional_call(plain, masked(plain), (x[None], state))
        torch.testing.assert_close(got, want[0])
    module.eval()
    torch.testing.assert_close(module.step(x, state)[0], plain.step(x, state)[0])


@KIND
def test_takes_the_fast_road_in_eval(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, module_forward = [], fastrnn._C.module_forward
    monkeypatch.setattr(fastrnn._C, "module_forward", lambda *args: taken.append(module_forward(*args)) or taken[-1])
    module, plain = pair(kind, dtype=torch.float32)
    x = randn(T, B, I, dtype=torch.float32)
    module(x)
    assert not taken
    assert torch.equal(module.eval()(x)[0], plain(x)[0]) and len(taken) == 2 and None not in taken


@KIND
def test_parametrizations(kind: str) -> None:
    """weight_norm on weight_hh_l0: the mask is on what it computes, gradients reach its parts; no warning."""
    module, plain = pair(kind)
    for m in (module, plain):
        parametrizations.weight_norm(m, "weight_hh_l0")
    x = randn(T, B, I)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(5)
        output, _ = module(x)
    torch.manual_seed(5)
    own = dict(plain.named_parameters())
    product = plain.weight_hh_l0 * masks_of(plain)["weight_hh_l0"]
    bare = build(fastrnn, kind, I, H, dtype=torch.float64)
    want, _ = functional_call(bare, {n: own.get(n, product) for n, _ in bare.named_parameters()}, (x,))
    torch.testing.assert_close(output, want)
    got, expected = (
        torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in ((output, module), (want, plain))
    )
    assert any("original0" in name for name, _ in module.named_parameters())
    torch.testing.assert_close(got, expected)


def test_second_order_and_forward_mode() -> None:
    module, _ = pair("LSTM")
    x = randn(3, 2, I).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Any:
        torch.manual_seed(5)
        return functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]

    check_derivatives(run, x, *module.parameters())


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(randomness: str) -> None:
    """Gradients of samples. vmap's own argument says whether they share a mask."""
    module, _ = pair("GRU")
    weights = {name: w.detach() for name, w in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, weights, (x,))[0].square().sum()

    x = randn(T, 1, I).expand(-1, 4, -1)
    found = vmap(grad(loss), (None, 1), randomness=randomness)(weights, x.unsqueeze(2))["weight_hh_l0"]
    assert found.shape == (4, 3 * H, H) and (found == 0).any()
    same = [torch.equal(found[0] == 0, each == 0) for each in found[1:]]
    assert all(same) if randomness == "same" else not any(same)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(grad(loss), (None, 1))(weights, x.unsqueeze(2))


def test_the_gradient_of_every_sample() -> None:
    """torch's ExpandedWeights: all samples share the mask."""
    module, _ = pair("LSTM", num_layers=2, batch_first=True)
    x = randn(B, T, I)
    torch.manual_seed(5)
    call_for_per_sample_grads(module)(x)[0].square().sum().backward()
    found = {name: w.grad_sample for name, w in module.named_parameters()}
    for b in range(B):
        torch.manual_seed(5)
        wanted = torch.autograd.grad(module(x[b : b + 1])[0].square().sum(), list(module.parameters()))
        for (name, _), want in zip(module.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(found[name][b], want)


def test_compile_and_export() -> None:
    module, _ = pair("LSTM", num_layers=2)
    x = randn(T, B, I)
    torch.manual_seed(5)
    want = module(x)[0]
    gradients = torch.autograd.grad(want.square().sum(), list(module.parameters()))
    torch.manual_seed(5)
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(x)[0]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), list(module.parameters())), gradients)
    program = torch.export.export(module, (x,))
    torch.manual_seed(5)
    torch.testing.assert_close(program.module()(x)[0], want)
    torch.manual_seed(5)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        again = torch.utils.checkpoint.checkpoint(lambda: module(x)[0], use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), list(module.parameters())), gradients)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_copies_repr_conversion_and_errors(kind: str) -> None:
    module, plain = pair(kind)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert f"weight_dropout={P}" in repr(module) and "weight_dropout" not in vars(plain)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    x = randn(T, B, I)
    torch.manual_seed(5)
    want = module(x)[0]
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        torch.manual_seed(5)
        assert torch.equal(again(x)[0], want)
    holder = nn.Sequential(module, nn.LSTM(2, 3))
    assert fastrnn.convert(holder)[0] is module and module.weight_dropout == P
    with pytest.raises(TypeError, match=f"0 has weight_dropout={P}"):
        fastrnn.to_torch(holder)
    narrow = fastrnn.quantize(copy.deepcopy(module).float())
    torch.testing.assert_close(narrow(x.float())[0], plain(x)[0].float(), rtol=0, atol=0.05)
    for wrong in (-0.1, 1.5, True, "0.5", float("nan")):
        with pytest.raises(ValueError, match=r"weight_dropout should be a number in range \[0, 1\].*got "):
            build(fastrnn, kind, I, H, weight_dropout=wrong)
