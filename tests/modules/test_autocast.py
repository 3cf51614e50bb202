"""Autocast, gradient scaling, and dtypes and devices that do not fit or are set by default.

transforms/test_modules.py has autocast to bfloat16 of whole modules, cuda/test_gpu.py autocast on a GPU.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import functional
from fastrnn.functional import LayerWeights
from tests.helpers import CELL_KINDS, KINDS, build, leaf, make_state, map_state, pair, randn, tensors, weighted

KIND = pytest.mark.parametrize("kind", KINDS)
ANY_KIND = pytest.mark.parametrize("kind", [*KINDS, "LSTM-proj", *CELL_KINDS])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
DEVICE = pytest.mark.parametrize("device", DEVICES)
# Of the largest value or gradient: roundings of 2**-9 and 2**-12 in each of a few dozen operations.
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.004}


def make(kind: str, **options: Any) -> nn.Module:
    name, _, projected = kind.partition("-")
    if projected:
        options["proj_size"] = 3
    if "Cell" not in kind:
        options.update(num_layers=2, bidirectional=True)
    return build(fastrnn, name, 4, 6, **options)


def arguments(kind: str, device: str = "cpu") -> tuple[Tensor, Any]:
    """Input and states, leaves of float32."""
    name, _, projected = kind.partition("-")
    if "Cell" in kind:
        x, hx = randn(3, 4), make_state(name, 3, hidden=6)
    else:
        x, hx = randn(5, 3, 4), make_state(name, 4, 3, hidden=6, proj=3 if projected else 0)
    return leaf(x.float().to(device)), map_state(lambda s: leaf(s.float().to(device)), hx)


def outcome(module: nn.Module, x: Tensor, hx: Any, **options: Any) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Results, and gradients of input, states and parameters."""
    found = module(x, hx, **options)
    results = [y for each in tensors(found) for y in tensors(each)]
    inputs = (x, *tensors(hx), *module.parameters())
    return results, torch.autograd.grad(weighted([y.float() for y in results]), inputs)


@DEVICE
@ANY_KIND
@HALF
def test_autocast(kind: str, dtype: torch.dtype, device: str) -> None:
    """Results of the autocast dtype, those of two cells on a CPU of the state's, as torch.nn's are; gradients of each
    leaf's own, close to those without; weights are not changed.
    """
    module = make(kind).to(device)
    x, hx = arguments(kind, device)
    before = [p.detach().clone() for p in module.parameters()]
    expected, expected_grads = outcome(module, x, hx)
    with torch.autocast(device, dtype):
        results = module(x, hx)
    with torch.autocast(device, dtype):
        found, grads = outcome(module, x, hx)
    for a, b in zip(found, [y for each in tensors(results) for y in tensors(each)], strict=True):
        assert torch.equal(a, b)
    wanted = torch.float32 if device == "cpu" and kind in ("LSTMCell", "GRUCell") else dtype
    for actual, want in zip(found, expected, strict=True):
        assert actual.dtype == wanted
        assert (actual.float() - want).abs().max() < TOLERANCE[dtype] * want.abs().max()
    for grad, want in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - want).norm() < TOLERANCE[dtype] * want.norm()
    for a, b in zip(module.parameters(), before, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@KIND
@HALF
def test_autocast_of_sequences(kind: str, dtype: torch.dtype) -> None:
    """lengths, resets and reset_state; PackedSequence; a state of the autocast dtype that the loop carries on."""
    module = make(kind)
    x, hx = arguments(kind)
    options = {"lengths": torch.tensor([5, 2, 4]), "resets": randn(5, 3) > 0.3, "reset_state": hx}
    expected, expected_grads = outcome(module, x, hx, **options)
    with torch.autocast("cpu", dtype):
        found, grads = outcome(module, x, hx, **options)
        packed, state = module(pack_padded_sequence(x, torch.tensor([5, 4, 2])), hx)
        carried, _ = module(x, state)
    assert packed.data.dtype == carried.dtype == dtype
    for actual, want in zip((*found, *grads), (*expected, *expected_grads), strict=True):
        assert (actual.float() - want).norm() < TOLERANCE[dtype] * want.norm()


@ANY_KIND
def test_autocast_switched_off_inside(kind: str) -> None:
    module = make(kind)
    x, hx = arguments(kind)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        found, _ = outcome(module, x, hx)
    expected, _ = outcome(module, x, hx)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@ANY_KIND
def test_autocast_of_half_modules_and_of_inputs(kind: str) -> None:
    """A module of bfloat16 with an input of float32, as another layer may hand on, and vice versa."""
    for module_dtype, input_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        module = make(kind).to(module_dtype)
        x, _ = arguments(kind)
        with torch.autocast("cpu", torch.bfloat16):
            found = module(x.detach().to(input_dtype))
        if "Cell" in kind:
            with torch.autocast("cpu", torch.bfloat16):
                like_torch = build(nn, kind, 4, 6).to(module_dtype)(x.detach().to(input_dtype))
            assert [y.dtype for y in tensors(found)] == [y.dtype for y in tensors(like_torch)]
        else:
            assert {y.dtype for each in tensors(found) for y in tensors(each)} == {torch.bfloat16}
        weighted([y.float() for each in tensors(found) for y in tensors(each)]).backward()
        assert {p.grad.dtype for p in module.parameters()} == {module_dtype}


@pytest.mark.parametrize("kind", CELL_KINDS)
@HALF
def test_cells_return_the_dtypes_of_torchs(kind: str, dtype: torch.dtype) -> None:
    """Of every dtype of input and state; a loop keeps the state that it began with, and what it adds up in it."""
    halves = (torch.float32, torch.bfloat16, torch.float16)
    ours, theirs = pair(kind, 4, 6)
    for of_input, of_state in product(halves, (None, *halves)):
        x = randn(3, 4, dtype=of_input)
        hx = None if of_state is None else make_state(kind, 3, hidden=6, dtype=of_state)
        with torch.autocast("cpu", dtype):
            found, want = tensors(ours(x, hx)), tensors(theirs(x, hx))
        for a, b in zip(found, want, strict=True):
            assert a.dtype == b.dtype
            assert (a.float() - b.float()).abs().max() < TOLERANCE[dtype]
    if kind == "LSTMCell":
        x, state = randn(3, 4).float(), (torch.zeros(3, 6), torch.full((3, 6), 300.0))
        with torch.no_grad(), torch.autocast("cpu", dtype):
            ours.bias_ih[6:12] = 20.0  # forgets nothing, so that c grows by less than a half type's spacing
            c = ours(x, state)[1]
        assert (c != 300.0).all()


@ANY_KIND
def test_autocast_with_the_other_half_type(kind: str) -> None:
    """Input, states, weights and packed data of float16 under autocast to bfloat16, and the other way round."""
    for dtype, other in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        module = make(kind)
        x, hx = arguments(kind)
        plain = module(x, hx)
        half = map_state(lambda s, other=other: s.detach().to(other), hx)
        calls = [(module, x.to(other), hx), (module, x, half), (make(kind).to(other), x.to(other), half)]
        calls[2][0].load_state_dict(module.state_dict())
        if "Cell" not in kind:
            lengths = torch.tensor([5, 5, 5])
            calls += [(m, pack_padded_sequence(i, lengths), h) for m, i, h in calls]
            learned = make(kind, learn_initial_state=True).to(other)
            learned.load_state_dict(module.state_dict(), strict=False)
        for m, input, state in calls:
            with torch.autocast("cpu", dtype):
                found = m(input, state)
            if isinstance(found[0], PackedSequence):
                found = found[0].data, found[1]
            results = [y for each in tensors(found) for y in tensors(each)]
            want = [y for each in tensors(plain) for y in tensors(each)]
            for a, b in zip(results, want, strict=True):
                assert (a.float().reshape(b.shape) - b).abs().max() < 2 * TOLERANCE[torch.bfloat16]
            torch.autograd.grad(weighted([y.float() for y in results]), list(m.parameters()))
        if "Cell" not in kind:
            with torch.autocast("cpu", dtype):
                assert learned(x.to(other))[0].dtype == dtype
                pooled = fastrnn.pool(x.to(other), lengths, bidirectional=True)
            assert torch.equal(pooled[:, :2], x.to(other)[-1, :, :2]) and torch.equal(
                pooled[:, 2:], x.to(other)[0, :, 2:]
            )


@KIND
def test_training_under_autocast(kind: str) -> None:
    """Weights of float32, activations of bfloat16: the loss falls about as it does without. At twice the rate an
    RNN_RELU's training is chaotic, torch.nn's too."""
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        module, head = build(fastrnn, kind, 4, 16), nn.Linear(16, 1)
        optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], 0.01)
        losses = []
        for step in range(30):
            x = randn(12, 16, 4, seed=step, dtype=torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = (head(module(x)[0]) - x.cumsum(0).tanh().mean(-1, keepdim=True)).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(sum(losses[-5:]))
    first = 5 * losses[0]  # nothing was learned
    assert first - found[1] > 0.75 * (first - found[0]) > 0


@DEVICE
@ANY_KIND
def test_grad_scaler(kind: str, device: str) -> None:
    """float16 with scaled losses: unscaled gradients are right, and a step of infinite ones is left out."""
    module = make(kind).to(device)
    x, hx = arguments(kind, device)
    _, expected = outcome(module, x, hx)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)

    def backward(factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            found = module(x, hx)
        loss = weighted([y.float() for each in tensors(found) for y in tensors(each)])
        scaler.scale(loss * factor).backward()

    backward(1.0)
    scaler.unscale_(optimizer)
    for p, want in zip(module.parameters(), expected[1 + len(tensors(hx)) :], strict=True):
        assert (p.grad - want).norm() < TOLERANCE[torch.float16] * want.norm()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 256.0
    before = [p.detach().clone() for p in module.parameters()]
    backward(1e30)  # beyond float16's range
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0
    for p, want in zip(module.parameters(), before, strict=True):
        assert torch.equal(p, want)


# ---- mixed dtypes, without autocast ----


@KIND
def test_input_of_another_dtype(kind: str) -> None:
    module = build(fastrnn, kind, 4, 6)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(
            ValueError, match=rf"RNN input dtype \({dtype}\) does not match weight dtype \(torch.float32"
        ):
            module(randn(5, 3, 4).to(dtype))


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_cell_input_of_another_dtype(kind: str) -> None:
    cell = build(fastrnn, kind, 4, 6)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(RuntimeError, match=rf"^input: expected torch.float32 \(that of weight_ih\), got {dtype}$"):
            cell(randn(3, 4).to(dtype))


@ANY_KIND
@pytest.mark.parametrize("field", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_one_weight_of_another_dtype(kind: str, field: str) -> None:
    """As after half a conversion. The message names both dtypes, whichever layer finds out."""
    module = make(kind)
    name = field if "Cell" in kind else f"{field}_l1"
    setattr(module, name, nn.Parameter(getattr(module, name).detach().double()))
    x, hx = arguments(kind)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)float64|double"):
        module(x, hx)


def test_functional_with_mixed_dtypes() -> None:
    weights = LayerWeights(randn(24, 4), randn(24, 6).float())
    told = r"^weights\[0\]\[0\].weight_hh: expected torch.float64 \(that of input\), got torch.float32"
    with pytest.raises(RuntimeError, match=told):
        functional.lstm(randn(5, 3, 4), None, [[weights]])


# ---- defaults ----


@pytest.fixture
def defaults() -> Any:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@ANY_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype(kind: str, dtype: torch.dtype, defaults: None) -> None:
    """Parameters are of the default dtype when they are made; a module keeps its own when the default changes."""
    old = make(kind)
    torch.set_default_dtype(dtype)
    module = make(kind)
    assert {p.dtype for p in module.parameters()} == {dtype}
    x, _ = arguments(kind)
    for m, want in ((module, dtype), (old, torch.float32)):
        results = m(x.detach().to(want))
        flat = [y for each in tensors(results) for y in tensors(each)]
        assert {y.dtype for y in flat} == {want}
        weighted(flat).backward()
        assert {p.grad.dtype for p in m.parameters()} == {want}


@ANY_KIND
def test_default_device(kind: str, defaults: None) -> None:
    """Meta by default: modules are made there and run there; one with data, made before, is not confused by it."""
    old, (x, hx) = make(kind), arguments(kind)
    expected, expected_grads = outcome(old, x, hx)
    torch.set_default_device("meta")
    module = make(kind)
    assert all(p.is_meta for p in module.parameters())
    results = module(torch.empty(x.shape))
    assert all(y.is_meta for each in tensors(results) for y in tensors(each))
    found = old(x, hx)
    flat = [y for each in tensors(found) for y in tensors(each)]
    assert not any(y.is_meta for y in flat)
    zeros = old(x)  # initial states are made by the module
    assert not any(y.is_meta for each in tensors(zeros) for y in tensors(each))
    torch.set_default_device(None)
    grads = torch.autograd.grad(weighted(flat), (x, *tensors(hx), *old.parameters()))
    for a, b in zip((*flat, *grads), (*expected, *expected_grads), strict=True):
        assert torch.equal(a, b)


@KIND
def test_default_device_of_masks(kind: str, defaults: None) -> None:
    """lengths and resets with the default device elsewhere."""
    module, (x, hx) = make(kind), arguments(kind)
    options = {"lengths": torch.tensor([5, 2, 4]), "resets": randn(5, 3) > 0.3}
    expected = module(x, hx, **options)[0]
    torch.set_default_device("meta")
    assert torch.equal(module(x, hx, **options)[0], expected)
