"""What may be done with a result: whatever may be done with the one of torch.nn's same call."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import functional
from tests.helpers import CELL_KINDS, KINDS, build, make_state, pair, randn, tensors

KIND = pytest.mark.parametrize("kind", KINDS)
CELL_KIND = pytest.mark.parametrize("kind", CELL_KINDS)
MODE = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, PackedSequence):
        return [found.data]
    return [found] if isinstance(found, Tensor) else [y for x in found for y in flat(x)]


def is_no_view(x: Tensor) -> None:
    assert not x._is_view()


USES: dict[str, Callable[[Tensor], Any]] = {
    "no view": is_no_view,
    "detach": lambda x: x.detach_(),
    "write": lambda x: x.mul_(2),
    "ask for a gradient": lambda x: x.requires_grad_(),
    "resize": lambda x: x.resize_(1),
    "set": lambda x: x.detach_().set_(torch.zeros(3, dtype=x.dtype)),
    "transpose": lambda x: x.t_() if x.dim() < 3 else x.transpose_(0, 1),
}


def abilities(call: Callable[[], Any]) -> list[set[str]]:
    """Of each result: what may be done with it."""
    found: list[set[str]] = []
    for name, use in USES.items():
        results = flat(call())
        found = found or [set() for _ in results]
        for x, can in zip(results, found, strict=True):
            with contextlib.suppress(RuntimeError, AssertionError):
                use(x)
                can.add(name)
    return found


def assert_ours_can(ours: Callable[[], Any], theirs: Callable[[], Any], *what: Any) -> None:
    for i, (can, wanted) in enumerate(zip(abilities(ours), abilities(theirs), strict=True)):
        assert wanted <= can, f"result {i} of {what}: {wanted - can}"


def inputs(x: Tensor, batch_first: bool) -> Iterator[tuple[str, Any]]:
    T, B = x.shape[:2]
    x = x.transpose(0, 1).contiguous() if batch_first else x
    yield "batched", x
    yield "unbatched", x[0] if batch_first else x[:, 0]
    yield "packed", pack_padded_sequence(x, torch.tensor([T] * B), batch_first=batch_first)


@KIND
@MODE
def test_layers(kind: str, mode: Any) -> None:
    projected = (0, 2) if kind == "LSTM" else (0,)
    options = product((1, 2), (False, True), (False, True), projected)
    for layers, bidirectional, batch_first, proj in options:
        named = {"proj_size": proj} if proj else {}
        named |= {"bidirectional": bidirectional, "batch_first": batch_first}
        for T, B, dtype in ((1, 1, torch.float32), (4, 3, torch.float32), (4, 1, torch.bfloat16)):
            modules = pair(kind, 3, 5, layers, dtype=dtype, **named)
            hx = make_state(kind, layers * (1 + bidirectional), B, hidden=5, proj=proj, dtype=dtype)
            for form, input in inputs(randn(T, B, 3, dtype=dtype), batch_first):
                args = (input, hx) if form != "unbatched" and T > 1 else (input,)
                with mode():
                    calls = [lambda m=m, args=args: m(*args) for m in modules]
                    assert_ours_can(*calls, form, layers, bidirectional, batch_first, proj, dtype, T, B)


@CELL_KIND
@MODE
def test_cells(kind: str, mode: Any) -> None:
    for dtype, bias, given in product((torch.float32, torch.float64, torch.float16), (True, False), (True, False)):
        modules = pair(kind, 3, 5, bias, dtype=dtype)
        for B in (None, 1, 4):
            sizes = () if B is None else (B,)
            hx = make_state(kind, *sizes, hidden=5, dtype=dtype) if given else None
            x = randn(*sizes, 3, dtype=dtype)
            with mode():
                assert_ours_can(*(lambda m=m, x=x, hx=hx: m(x, hx) for m in modules), dtype, bias, given, B)


@KIND
@pytest.mark.parametrize("of", ["autocast", "frozen below", "state with a history", "dropout"])
def test_other_roads(kind: str, of: str) -> None:
    around = torch.autocast("cpu", torch.bfloat16) if of == "autocast" else contextlib.nullcontext()
    for layers, bidirectional in product((1, 2), (False, True)):
        dropout = 0.5 if of == "dropout" and layers > 1 else 0.0
        modules = pair(kind, 3, 5, layers, bidirectional=bidirectional, batch_first=True, dropout=dropout)
        hx = make_state(kind, layers * (1 + bidirectional), 2, hidden=5, dtype=torch.float32)
        for m in modules:
            for name, p in m.named_parameters():
                p.requires_grad_(of == "dropout" or (of == "frozen below" and "l1" in name))
        if of == "state with a history":
            hx = tuple(x.requires_grad_() for x in hx) if isinstance(hx, tuple) else hx.requires_grad_()
        with around:
            assert_ours_can(*(lambda m=m, hx=hx: m(randn(2, 4, 3).float(), hx) for m in modules), layers, bidirectional)


@KIND
@MODE
def test_options_of_ours(kind: str, mode: Any) -> None:
    """Results that have no twin allow everything that the final state of torch.nn's layer does."""
    x, lengths, resets = randn(4, 2, 3).float(), torch.tensor([4, 0]), randn(4, 2) > 0
    reference = nn.GRU(3, 5)
    for bidirectional in (False, True):
        plain = build(fastrnn, kind, 3, 5, bidirectional=bidirectional)
        state = plain(x)[1]
        narrow, weights, words = fastrnn.quantize(plain), plain._weights(), copy.deepcopy(plain)
        words.token_input = True
        own = {"nonlinearity": kind[4:].lower()} if kind.startswith("RNN") else {}
        named = {
            "lengths": lambda m=plain: m(x, lengths=lengths),
            "resets": lambda m=plain: m(x, resets=resets, reset_state=state),
            "step": lambda m=plain, state=state: m.step(x[0], state),
            "step of one": lambda m=plain: m.step(x[0, 0]),
            "tokens": lambda m=words: m(torch.tensor([[0, 1]])),
            "quantized": lambda m=narrow: m(x),
            "functional": lambda w=weights, own=own: getattr(functional, kind.split("_")[0].lower())(x, None, w, **own),
        }
        options = {
            "learn_initial_state": True,
            "state_batch_first": True,
            "recompute": 2,
            "grad_clip": 0.1,
            **({"return_all_states": True} if kind == "LSTM" else {}),
        }
        for (name, value), B, layers in product(options.items(), (1, 2), (1, 2)):
            module = build(fastrnn, kind, 3, 5, layers, bidirectional=bidirectional, batch_first=True, **{name: value})
            named[f"{name}, {B}, {layers}"] = lambda m=module, x=x[:B]: m(x)
        with mode():
            wanted = abilities(lambda: reference(x))[1]
            for name, call in named.items():
                for i, can in enumerate(abilities(call)):
                    assert wanted <= can, f"result {i} of {name}: {wanted - can}"


@CELL_KIND
@MODE
def test_functional_cells(kind: str, mode: Any) -> None:
    ours, theirs = pair(kind, 3, 5)
    hx = make_state(kind, 2, hidden=5, dtype=torch.float32)
    own = {"nonlinearity": kind[8:].lower()} if kind.startswith("RNN") else {}
    step = getattr(functional, {"LSTM": "lstm_cell", "GRUC": "gru_cell", "RNNC": "rnn_cell"}[kind[:4]])
    x = randn(2, 3).float()
    with mode():
        assert_ours_can(lambda: step(x, hx, ours._weights(), **own), lambda: theirs(x, hx))


@pytest.mark.parametrize("kind", [*KINDS, "LSTMCell", "GRUCell"])  # torch.nn.RNNCell raises
def test_gradients_past_a_write(kind: str) -> None:
    """Final states that are written to before backward: the gradients are torch.nn's."""
    for batch_first, B in product((False, True), (1, 3)):
        found = []
        is_cell = "Cell" in kind
        options = {} if is_cell else {"batch_first": batch_first}
        for m in pair(kind, 3, 5, **options, dtype=torch.float64):
            x = randn(*((B, 3) if is_cell else (B, 4, 3) if batch_first else (4, B, 3))).requires_grad_()
            results = flat(m(x))
            states = results if is_cell else results[1:]
            for i, s in enumerate(states):
                s.mul_(i + 2)
                s[..., 0] = 0.0
            loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
            found.append([*results, *torch.autograd.grad(loss, [x, *m.parameters()])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@KIND
def test_a_write_that_backward_would_not_survive_is_seen(kind: str) -> None:
    """The output is read again by backward: a batch-first one, too, whose memory is that of the saved one."""
    for batch_first, layers, dtype in product((False, True), (1, 2), (torch.float32, torch.bfloat16)):
        module = build(fastrnn, kind, 3, 5, layers, batch_first=batch_first, dtype=dtype)
        output, _ = module(randn(4, 2, 3, dtype=dtype))
        with torch.no_grad():
            output.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_backpropagation_in_place(kind: str) -> None:
    """Every textbook's loop."""
    found = []
    for module in pair(kind, 3, 5, dtype=torch.float64):
        state = None
        for chunk in randn(12, 2, 3).split(4):
            output, state = module(chunk, state)
            output.sum().backward()
            for s in tensors(state):
                s.detach_()
        found.append([p.grad for p in module.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
