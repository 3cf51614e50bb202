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
from .autograd import Grads
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
    """The segments of one direction, in the order in which it runs. After each one ``leave`` takes its final states."""

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
    ) -> None:
        self.reverse, self.steps, self.every = reverse, steps, every
        self.lengths, self.resets, self.batch_sizes = lengths, resets, batch_sizes

        def own(x: Tensor) -> Tensor:
            return x.chunk(directions, 1)[int(reverse)]

        self.states: States = tuple(map(own, states))
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
        self.states = tuple(map(_replaced, self.states, after))


def _replaced(x: Tensor, first: Tensor) -> Tensor:
    """x with other first rows."""
    return first if len(first) == len(x) else torch.cat([first, x[len(first) :]])


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
    return fused.layer(cell, input, weights, states, lengths, resets, reset_states, batch_sizes, grad_clip)


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

    def walk(self, direction: int, states: Sequence[Tensor]) -> Walk:
        return Walk(
            direction == 1, self.steps, states, self.lengths, self.resets, self.fresh, self.directions, self.every,
            self.batch_sizes,
        )  # fmt: skip

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
        entries: list[Tensor] = []
        finals = []
        for direction in range(call.directions):
            walk, weights = call.walk(direction, call.states), fused.stacked(call.weights(direction))
            for s in walk:
                part, *after, _ = call.run(walk, weights, s, False)
                if direction == 0 and s.begin == 0:
                    output = part.new_empty(*input.shape[:-1], call.directions * part.shape[-1])
                output[s.rows].chunk(call.directions, -1)[direction].copy_(part)
                entries += s.entry
                walk.leave(after[: len(call.states)])
            finals.append(walk.states)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.arguments = options, 1 + len(rest)
        ctx.save_for_backward(input, *rest, *entries)
        h_n, *c_n = (torch.cat(each, 1) for each in zip(*finals, strict=True))
        return output, h_n, c_n[0] if c_n else h_n.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        needs = ctx.needs_input_grad[1:]
        if all(g is None for g in grads):
            return (None,) * (1 + len(needs))
        tensors = ctx.saved_tensors
        arguments, entries = tensors[: ctx.arguments], tensors[ctx.arguments :]
        if torch.is_grad_enabled() or not is_plain_call() or not all(map(is_plain, grads)):
            return (None, *_differentiable(ctx.options, arguments, needs, grads))
        return (None, *_by_segments(_Call(ctx.options, arguments[0], arguments[1:]), iter(entries), needs, grads))


def _by_segments(call: _Call, entries: Iterator[Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    D, count = call.directions, len(call.states)
    needed = Needed(needs[0], True, *(any(needs[7 + i :: FIELDS]) for i in range(FIELDS)))
    grad_input = torch.empty_like(call.input) if needs[0] else None
    of_weights: list[Tensor | None] = []
    of_states: list[list[Tensor | None]] = []  # of each direction: h_0, c_0, reset_h, reset_c
    for direction in range(D):
        walk, weights = call.walk(direction, call.states), fused.stacked(call.weights(direction))
        segments = [s._replace(entry=tuple(next(entries) for _ in range(count))) for s in walk]
        grad_output, *of_finals = (None if g is None else g.chunk(D, -1)[direction] for g in grads[: 1 + count])
        later = [torch.zeros_like(x) if g is None else g for g, x in zip(of_finals, walk.states, strict=True)]
        totals: list[Tensor | None] = [None] * FIELDS
        fresh: list[Tensor | None] = [None] * count
        for s in reversed(segments):
            output, _, _, saved = call.run(walk, weights, s, True)
            of_results = [None if grad_output is None else grad_output[s.rows], *(g[: s.batch] for g in later)]
            of_results += [None] * (4 - len(of_results))
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
            totals = [_sum(a, b if need else None) for a, b, need in zip(totals, fields, needed[2:], strict=True)]
            before = [x for x in states[:count] if x is not None]  # all: needed says so
            if walk.fresh is not None:
                fresh = [_sum(a, b) for a, b in zip(fresh, states[2 : 2 + count], strict=True)]
            if s.crossed is not None:
                if walk.fresh is not None:
                    fresh = [_sum(a, torch.where(s.crossed, b, 0)) for a, b in zip(fresh, before, strict=True)]
                before = [torch.where(s.crossed, 0, x) for x in before]
            later = [_replaced(g, x) for g, x in zip(later, before, strict=True)]
        of_weights += [None if x is None else x[0] for x in totals]
        absent = [None] * (2 - count)
        of_states.append([*later, *absent, *fresh, *absent])
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
        results = fused._Layer.apply(cell, batch_sizes, grad_clip, input, *rest)[:3]
    pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
    leaves = [x for x, need in zip((input, *rest), needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], leaves, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    )
    return tuple(next(found) if need else None for need in needs)
