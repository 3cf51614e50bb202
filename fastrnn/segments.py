"""``recompute``: training that keeps the states at every k-th step alone.

The sequence is cut into segments of k steps, for each direction by itself. The forward pass saves the states that a
segment is entered with; backward goes through the segments from the last to the first, runs each one again from there
and then its backward, and adds up the gradients. Of the values that a recurrence saves for its backward those of one
segment exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import layer as fused
from .autograd import Grads, keep, kept
from .layer import FIELDS, Needed
from .products import is_plain, is_plain_call

_layer_forward = torch.ops.fastrnn.layer_forward.default
States = tuple[Tensor, ...]


class Segment(NamedTuple):
    """Steps begin .. end of the first `batch` rows, all of them but in packed sequences."""

    begin: int
    rows: slice  # of tensors [T, B, ..] or [N, ..]
    batch: int
    lengths: Tensor | None
    resets: Tensor | None
    batch_sizes: Tensor | None
    crossed: Tensor | None  # [B, 1]: rows that are reset between the segment before (in the walk's order) and this one
    entry: States  # [batch, n] each


class Walk:
    """The segments of one direction, in the order in which it runs. After each one ``leave`` takes its final states.

    in_place: are the states copied into one place? Only then can a sequence be packed, and no gradient asked for.
    """

    def __init__(
        self,
        reverse: bool,
        steps: int,
        states: Sequence[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
        reset_states: Sequence[Tensor] | None,
        directions: int,
        every: int,
        batch_sizes: Tensor | None = None,
        in_place: bool = False,
    ) -> None:
        self.reverse, self.steps, self.every = reverse, steps, every
        self.lengths, self.resets, self.batch_sizes = lengths, resets, batch_sizes

        def own(x: Tensor) -> Tensor:
            return x.chunk(directions, 1)[int(reverse)]

        self.in_place = in_place
        self.states: States = tuple(own(x).clone() if in_place else own(x) for x in states)
        self.fresh: States | None = None if reset_states is None else tuple(map(own, reset_states))

    def __iter__(self) -> Iterator[Segment]:
        begins = range(0, self.steps, self.every)
        first_rows = None if self.batch_sizes is None else [0, *self.batch_sizes.cumsum(0).tolist()]
        for begin in reversed(begins) if self.reverse else begins:
            end = min(begin + self.every, self.steps)
            rows, batch, batch_sizes = slice(begin, end), self.states[0].shape[0], None
            if first_rows is not None:
                assert self.batch_sizes is not None
                rows, batch_sizes = slice(first_rows[begin], first_rows[end]), self.batch_sizes[begin:end]
                batch = first_rows[begin + 1] - first_rows[begin]
            lengths = None if self.lengths is None else (self.lengths - begin).clamp(0, end - begin)
            resets = crossed = None
            if self.resets is not None:
                resets = self.resets[begin:end]
                # Forward, a reset at the first step is the segment's own. In reverse the boundary lies outside of it.
                if self.reverse and end < self.steps:
                    crossed = self.resets[end] if self.lengths is None else self.resets[end] & (self.lengths > end)
                    crossed = crossed[:, None]
                    fresh = self.fresh or map(torch.zeros_like, self.states)
                    self.states = tuple(torch.where(crossed, a, b) for a, b in zip(fresh, self.states, strict=True))
            entry = tuple(x[:batch] for x in self.states)
            yield Segment(begin, rows, batch, lengths, resets, batch_sizes, crossed, entry)

    def leave(self, after: Sequence[Tensor]) -> None:
        if self.in_place:  # less garbage between what stays: the heap of a long sequence keeps few holes
            for x, first in zip(self.states, after, strict=True):
                x[: len(first)].copy_(first)
        else:
            self.states = tuple(after)


def can_checkpoint() -> bool:
    """Is a gradient asked for, and can torch's checkpoints make it?"""
    return torch.is_grad_enabled() and not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def layer(
    cell: str,
    input: Tensor,
    weights: Sequence[Sequence[Tensor | None]],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_states: Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    grad_clip: float,
    every: int,
) -> tuple[Tensor, ...]:
    """``layer.layer`` of segments of `every` steps, where a gradient is asked for."""
    given = fused.given_of(states, lengths, resets, reset_states)
    flat = [x for direction in weights for x in direction]
    if states[0].shape[0] > 0 and torch.is_grad_enabled() and torch._C._any_requires_grad(input, *given, *flat):
        return _Segments.apply((cell, batch_sizes, grad_clip, every), input, *given, *flat)
    return fused.layer(cell, input, weights, states, lengths, resets, reset_states, batch_sizes, grad_clip)[:3]


class _Call:
    """One call of the node, unpacked."""

    def __init__(self, options: Any, input: Tensor, rest: Sequence[Any]) -> None:
        self.cell, self.batch_sizes, self.grad_clip, self.every = options
        self.input, self.given, self.flat = input, rest[:6], rest[6:]
        self.directions = len(self.flat) // FIELDS
        self.steps = len(input) if self.batch_sizes is None else len(self.batch_sizes)
        h_0, c_0, self.lengths, self.resets, reset_h, reset_c = self.given
        self.states = (h_0,) if c_0 is None else (h_0, c_0)
        self.fresh = None if reset_h is None else (reset_h,) if reset_c is None else (reset_h, reset_c)

    def weights(self, direction: int) -> Sequence[Tensor | None]:
        return self.flat[direction * FIELDS : (direction + 1) * FIELDS]

    def walk(self, direction: int) -> Walk:
        return Walk(
            direction == 1, self.steps, self.states, self.lengths, self.resets, self.fresh, self.directions, self.every,
            self.batch_sizes, in_place=True,
        )  # fmt: skip

    def entry(self, entries: Sequence[Tensor], direction: int, s: Segment) -> States:
        """Where the states that a segment is entered with are kept."""
        count = len(self.states)
        return tuple(x[s.begin // self.every, : s.batch] for x in entries[direction * count : (direction + 1) * count])

    def run(self, walk: Walk, weights: Sequence[Tensor | None], s: Segment, save: bool) -> tuple[Tensor, ...]:
        """The segment's forward: what layer_forward gives."""
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
        return _layer_forward(
            self.cell, self.input[s.rows], weight_ih, bias_ih, weight_hh, bias_hh, weight_hr,
            *fused.given_of(s.entry, s.lengths, s.resets, walk.fresh), [walk.reverse], save, s.batch_sizes,
        )  # fmt: skip


class _Segments(torch.autograd.Function):
    """Arguments: (cell, batch_sizes, grad_clip, every), input, h_0, c_0, lengths, resets, reset_h, reset_c, FIELDS
    weights a direction.
    """

    @staticmethod
    def forward(ctx: Any, options: Any, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        call = _Call(options, input, rest)
        finals: list[States] = []
        entries: list[Tensor] = []  # of each direction and state [segments, B, n], first of all: no holes in the heap
        for _ in range(call.directions):
            entries += [
                x.new_empty(-(-call.steps // call.every), len(x), x.shape[1] // call.directions) for x in call.states
            ]
        output = input.new_empty(*input.shape[:-1], call.states[0].shape[1])

        def run(walk: Walk, weights: Sequence[Tensor | None], s: Segment) -> None:
            entry = call.entry(entries, int(walk.reverse), s)
            for to, x in zip(entry, s.entry, strict=True):
                to.copy_(x)
            part, *after, _ = call.run(walk, weights, s._replace(entry=entry), False)
            output[s.rows].chunk(call.directions, -1)[int(walk.reverse)].copy_(part)
            walk.leave(after[: len(call.states)])

        for direction in range(call.directions):
            walk, weights = call.walk(direction), fused.stacked(call.weights(direction))
            for s in walk:
                run(walk, weights, s)
            finals.append(walk.states)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.arguments = options, 1 + len(rest)
        keep(ctx, [input, *rest, *entries])
        h_n, *c_n = (torch.cat(each, 1) for each in zip(*finals, strict=True))
        return output, h_n, c_n[0] if c_n else h_n.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        needs = ctx.needs_input_grad[1:]
        if all(g is None for g in grads):
            return (None,) * (1 + len(needs))
        tensors = kept(ctx)
        arguments, entries = tensors[: ctx.arguments], tensors[ctx.arguments :]
        if torch.is_grad_enabled() or not is_plain_call() or not all(map(_is_unbatched, grads)):
            return (None, *_differentiable(ctx.options, arguments, needs, grads))
        return (None, *_by_segments(_Call(ctx.options, arguments[0], arguments[1:]), entries, needs, grads))


def _is_unbatched(x: Tensor | None) -> bool:
    functorch = torch._C._functorch  # is_grads_batched=True looks like an ordinary backward otherwise
    return x is None or (
        is_plain(x) and not functorch.is_functorch_wrapped_tensor(x) and not functorch.is_legacy_batchedtensor(x)
    )


def _by_segments(call: _Call, entries: Sequence[Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    D, count = call.directions, len(call.states)
    needed = Needed(needs[0], True, *(any(needs[7 + i :: FIELDS]) for i in range(FIELDS)))
    grad_input = torch.empty_like(call.input) if needs[0] else None
    of_weights: list[Tensor | None] = []
    of_states: list[list[Tensor | None]] = []  # of each direction: h_0, c_0, reset_h, reset_c

    def through(direction: int) -> None:
        walk, weights = call.walk(direction), fused.stacked(call.weights(direction))
        grad_output, *of_finals = (None if g is None else g.chunk(D, -1)[direction] for g in grads[: 1 + count])
        # Written over from segment to segment: of what a segment allocates nothing outlives it but the first sums.
        later = [torch.zeros_like(x) if g is None else g.clone() for g, x in zip(of_finals, walk.states, strict=True)]
        totals: list[Tensor | None] = [None] * FIELDS
        fresh: list[Tensor | None] = [None] * count

        def back(s: Segment) -> None:
            output, _, _, saved = call.run(walk, weights, s, True)
            of_results = [None if grad_output is None else grad_output[s.rows], *(g[: s.batch] for g in later)]
            of_results += [None] * (5 - len(of_results))
            given = (
                call.input[s.rows] if needed.weight_ih else None,
                fused.given_of(s.entry, s.lengths, s.resets, walk.fresh),
                weights[0] if needed.input else None,
                weights[1],
                weights[4],
                output,
                saved,
            )
            part, fields, states = fused.gradients(
                call.cell, needed, tuple(of_results), given, [walk.reverse], s.batch_sizes, call.grad_clip
            )
            if grad_input is not None and part is not None:
                to = grad_input[s.rows]
                to.copy_(part) if direction == 0 else to.add_(part)
            for i, x in enumerate(fields):
                if needed[2 + i]:
                    totals[i] = _sum(totals[i], x)
            for i in range(count):
                before = states[i]
                assert before is not None  # needed says so
                if walk.fresh is not None:
                    fresh[i] = _sum(fresh[i], states[2 + i])
                if s.crossed is not None:
                    if walk.fresh is not None:
                        fresh[i] = _sum(fresh[i], torch.where(s.crossed, before, 0))
                    before = torch.where(s.crossed, 0, before)
                later[i][: s.batch].copy_(before)

        for s in reversed(list(walk)):
            back(s._replace(entry=call.entry(entries, direction, s)))
        of_weights.extend(None if x is None else x[0] for x in totals)
        absent = [None] * (2 - count)
        of_states.append([*later, *absent, *fresh, *absent])

    for direction in range(D):
        through(direction)
    h_0, c_0, reset_h, reset_c = (
        torch.cat(present, 1) if (present := [x for x in each if x is not None]) else None
        for each in zip(*of_states, strict=True)
    )
    found = (grad_input, h_0, c_0, None, None, reset_h, reset_c, *of_weights)
    return tuple(x if need else None for x, need in zip(found, needs, strict=True))


def _sum(total: Tensor | None, x: Tensor | None) -> Tensor | None:
    return x if total is None else total if x is None else total.add_(x)


def _differentiable(options: Any, arguments: Sequence[Any], needs: Sequence[bool], grads: Grads) -> Grads:
    """The same where it is to be differentiated itself, or sees batched gradients: by the whole layer's own node."""
    cell, batch_sizes, grad_clip, _ = options
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that nothing goes on from them: one argument may be made of another.
        input, *rest = (x.view_as(x) if need else x for x, need in zip(arguments, needs, strict=True))
        results = fused._Layer.apply(cell, batch_sizes, grad_clip, False, input, *rest)[:3]
    pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
    leaves = [x for x, need in zip((input, *rest), needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], leaves, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    )
    return tuple(next(found) if need else None for need in needs)
