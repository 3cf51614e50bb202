"""torch's ExpandedWeights (torch.nn.utils._per_sample_grad): the gradients of every sample, against a loop over samples
on torch.nn in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from tests.helpers import CELL_KINDS, KINDS, build, gradient, make_state, map_state, pair, randn, tensors, weighted

T, B, I, H = 6, 4, 3, 5  # noqa: E741
LENGTHS = torch.tensor([4, 6, 1, 3])
KIND = pytest.mark.parametrize("kind", KINDS)
LAYER_OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]
Samples = dict[str, Tensor]


def results_of(output: Any, finals: Any) -> list[Tensor]:
    return [output, *tensors(finals)]


def loss_of_samples(results: list[Tensor], dims: list[int]) -> Tensor:
    """A sum over samples, of which each has the same weights for its own results."""
    samples = zip(*(x.unbind(dim) for x, dim in zip(results, dims, strict=True)), strict=True)
    return torch.stack([weighted(of_sample) for of_sample in samples]).sum()


def loop(module: nn.Module, batch: int, call: Callable[[int], Tensor]) -> Samples:
    """The gradients of call(b), the loss of sample b, for each in turn."""
    each = []
    for b in range(batch):
        module.zero_grad()
        call(b).backward()
        each.append({name: gradient(p).clone() for name, p in module.named_parameters()})
    return {name: torch.stack([g[name] for g in each]) for name in each[0]}


def assert_samples(module: nn.Module, expected: Samples, grads: bool = False) -> None:
    """What stands in grad_sample; grads: and in grad, their sum."""
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[name], rtol=1e-9, atol=1e-9, msg=name)
        if grads:
            torch.testing.assert_close(p.grad, expected[name].sum(0), rtol=1e-9, atol=1e-9, msg=name)
        else:
            assert p.grad is None
        p.grad = p.grad_sample = None


def layer_case(kind: str, given: bool, **options: Any) -> tuple[nn.Module, Tensor, Any, Samples]:
    """Ours, its input and state, and the gradients of every sample by a loop over samples on torch.nn."""
    ours, theirs = pair(kind, I, H, dtype=torch.float64, **options)
    batch = 0 if ours.batch_first else 1
    x = randn(*((B, T) if ours.batch_first else (T, B)), I)
    count = ours.num_layers * (1 + ours.bidirectional)
    hx = make_state(kind, count, B, hidden=H, proj=ours.proj_size) if given else None

    def one(b: int) -> Tensor:
        state = map_state(lambda s: s[:, b : b + 1], hx)
        output, finals = theirs(x.narrow(batch, b, 1), state)
        return weighted([output.squeeze(batch), *(s.squeeze(1) for s in tensors(finals))])

    return ours, x, hx, loop(theirs, B, one)


def layer_loss(module: Any, output: Tensor, finals: Any) -> Tensor:
    results = results_of(output, finals)
    return loss_of_samples(results, [0 if module.batch_first else 1, *(1 for _ in results[1:])])


@KIND
@pytest.mark.parametrize("options", LAYER_OPTIONS, ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_layers(kind: str, options: dict[str, Any], given: bool) -> None:
    for extra in ({}, {"proj_size": 2}) if kind == "LSTM" else ({},):
        ours, x, hx, expected = layer_case(kind, given, **options, **extra)
        for reduction, scale in (("sum", 1), ("mean", B)):
            called = call_for_per_sample_grads(ours, batch_size=B, loss_reduction=reduction)
            loss = layer_loss(ours, *called(x, hx)) / scale
            loss.backward()
            assert_samples(ours, expected)
        assert_same_results(ours, x, hx)


def assert_same_results(module: nn.Module, *args: Any) -> None:
    """The layer's own node changes nothing but where gradients go."""
    plain = module(*args)
    marked = call_for_per_sample_grads(module, batch_size=B)(*args)
    for a, b in zip(results_of(*marked), results_of(*plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [False, True])
def test_cells(kind: str, bias: bool, given: bool) -> None:
    """In a loop of steps, as cells are used."""
    ours, theirs = pair(kind, I, H, bias=bias, dtype=torch.float64)
    x, hx = randn(T, B, I), make_state(kind, B, hidden=H) if given else None

    def steps(cell: Callable[..., Any], x: Tensor, state: Any) -> list[Tensor]:
        for each in x:
            state = cell(each, state)
        return list(tensors(state))

    def one(b: int) -> Tensor:
        results = steps(theirs, x[:, b : b + 1], map_state(lambda s: s[b : b + 1], hx))
        return weighted([r.squeeze(0) for r in results])

    results = steps(call_for_per_sample_grads(ours, batch_size=B), x, hx)
    loss_of_samples(results, [0] * len(results)).backward()
    assert_samples(ours, loop(theirs, B, one))


@KIND
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("given", [False, True])
def test_packed_and_lengths(kind: str, enforce_sorted: bool, given: bool) -> None:
    """A sample's gradient stands where the sample does, whatever order it was packed in."""
    lengths = LENGTHS.sort(descending=True)[0] if enforce_sorted else LENGTHS
    ours, theirs = pair(kind, I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, hx = randn(T, B, I), make_state(kind, 4, B, hidden=H) if given else None
    x[torch.arange(T)[:, None] >= lengths] = torch.nan

    def one(b: int) -> Tensor:
        output, finals = theirs(x[: lengths[b], b : b + 1], map_state(lambda s: s[:, b : b + 1], hx))
        padded = nn.functional.pad(output.squeeze(1), (0, 0, 0, T - int(lengths[b])))
        return weighted([padded, *(s.squeeze(1) for s in tensors(finals))])

    expected = loop(theirs, B, one)
    called = call_for_per_sample_grads(ours, batch_size=B)
    layer_loss(ours, *called(x, hx, lengths=lengths)).backward()
    assert_samples(ours, expected)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    output, finals = called(packed, hx)
    plain, plain_finals = ours(packed, hx)
    assert isinstance(output, PackedSequence)
    torch.testing.assert_close([output.data, tensors(finals)], [plain.data, tensors(plain_finals)])
    assert output.sorted_indices is plain.sorted_indices and output.unsorted_indices is plain.unsorted_indices
    layer_loss(ours, pad_packed_sequence(output)[0], finals).backward()
    assert_samples(ours, expected)


@KIND
@pytest.mark.parametrize("option", ["resets", "tokens", "grad_clip", "learn_initial_state", "recompute", "all_states"])
def test_our_own_options(kind: str, option: str) -> None:
    """Against a loop over samples on our own module, which has no such node."""
    options: dict[str, Any] = {"grad_clip": 0.01} if option == "grad_clip" else {}
    if option == "tokens":
        options = {"token_input": True}
    if option == "recompute":
        options = {"recompute": 2}
    if option == "learn_initial_state":
        options = {"learn_initial_state": True}
    if option == "all_states":
        if kind != "LSTM":
            return
        options = {"return_all_states": True}
    module = build(fastrnn, kind, I, H, num_layers=2, bidirectional=True, dtype=torch.float64, **options)
    x = torch.randint(I, (T, B)) if option == "tokens" else randn(T, B, I)
    lengths = LENGTHS if option == "tokens" else None
    if lengths is not None:
        x[torch.arange(T)[:, None] >= lengths] = -1
    resets = torch.rand(T, B) < 0.4 if option in ("resets", "learn_initial_state") else None
    fresh = make_state(kind, 4, B, hidden=H) if option == "resets" else None

    def call(function: Any, rows: slice) -> tuple[list[Tensor], list[int]]:
        keywords = {} if resets is None else {"resets": resets[:, rows]}
        if lengths is not None:
            keywords["lengths"] = lengths[rows]
        if fresh is not None:
            keywords["reset_state"] = map_state(lambda s: s[:, rows], fresh)
        output, finals, *cells = function(x[:, rows], **keywords)
        results = [output, *tensors(finals), *cells]
        return results, [1] * len(results)

    expected = loop(module, B, lambda b: loss_of_samples(*call(module, slice(b, b + 1))))
    module.zero_grad()
    loss_of_samples(*call(call_for_per_sample_grads(module, batch_size=B), slice(None))).backward()
    assert_samples(module, expected)


def test_in_a_model() -> None:
    """Layers below and above, frozen weights, dropout between layers, an input that requires grad."""

    class Model(nn.Module):
        def __init__(self, namespace: Any) -> None:
            super().__init__()
            self.below, self.head = nn.Linear(I, I), nn.Linear(H, 2)
            self.rnn = namespace.GRU(I, H, 2, batch_first=True)
            self.rnn.bias_hh_l0.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.below(x))[1][-1])  # the final state alone

    ours, theirs = Model(fastrnn).double(), Model(nn).double()
    theirs.load_state_dict(ours.state_dict())
    x = randn(B, T, I)
    expected = loop(theirs, B, lambda b: weighted([theirs(x[b : b + 1])[0]]))
    frozen = ours.rnn.bias_hh_l0
    loss_of_samples([call_for_per_sample_grads(ours)(x)], [0]).backward()
    assert frozen.grad is None and getattr(frozen, "grad_sample", None) is None
    frozen.grad_sample = expected.pop("rnn.bias_hh_l0")
    assert_samples(ours, {**expected, "rnn.bias_hh_l0": frozen.grad_sample})
    ours.rnn.dropout = 0.5
    call_for_per_sample_grads(ours)(x).sum().backward()
    assert all(p.grad_sample.isfinite().all() for p in ours.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_types_and_autocast(dtype: torch.dtype, autocast: bool) -> None:
    """The samples' gradients add up to the ordinary one of the same call."""
    for kind in KINDS:
        module, x = build(fastrnn, kind, I, H, bidirectional=True), randn(T, B, I, dtype=torch.float32)
        if not autocast:
            module, x = module.to(dtype), x.to(dtype)
        for called in (module, call_for_per_sample_grads(module, batch_size=B)):
            with torch.autocast("cpu", dtype, enabled=autocast):
                output = called(x)[0]
            output.float().sum().backward()
        for p in module.parameters():
            assert p.grad_sample.dtype == p.dtype
            torch.testing.assert_close(p.grad_sample.float().sum(0), p.grad.float(), rtol=0.05, atol=0.05)


def test_a_wrong_batch_is_named() -> None:
    module = fastrnn.GRU(I, H)
    with pytest.raises(RuntimeError, match=f"input batch size of {B} with ExpandedWeight of batch size 7"):
        call_for_per_sample_grads(module, batch_size=7)(torch.randn(T, B, I))


@KIND
def test_samples_without_steps(kind: str) -> None:
    """Rows of length 0 have gradients of 0, and reach their states alone."""
    module, x = build(fastrnn, kind, I, H, bidirectional=True), torch.randn(T, B, I)
    hx = map_state(lambda s: s.requires_grad_(), make_state(kind, 2, B, hidden=H, dtype=torch.float32))
    output, finals = call_for_per_sample_grads(module, batch_size=B)(x, hx, lengths=torch.tensor([3, 0, 6, 0]))
    (output.sum() + sum(s.sum() for s in tensors(finals))).backward()
    for p in module.parameters():
        assert (p.grad_sample[[1, 3]] == 0).all() and p.grad_sample[[0, 2]].any()
    assert all((s.grad[:, [1, 3]] == 1).all() for s in tensors(hx))
