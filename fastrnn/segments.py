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
from torch import Tensor

from .autograd import Grads, keep, kept
from .layer import fused
from .ops import CELLS, layer_backward
from .records import GRADIENTS, LayerCall, LayerResults, LayerStates, LayerWeights, Masks, States, layer_states
from .transforms import is_transformed, is_unbatched, without_autocast

_FIELDS = len(LayerWeights._fields)


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

    def __init__(self, call: LayerCall, direction: int, every: int) -> None:
        self.call, self.direction, self.reverse, self.every = call, direction, call.reverse[direction], every
        given = call.states
        self.wide = CELLS[call.cell].is_wide(call.dtype)  # then states are float32, and so is all of a segment's call
        self.steps = len(call.input) if call.batch_sizes is None else len(call.batch_sizes)

        def own(states: Sequence[Tensor | None]) -> States:
            return tuple(x[direction] for x in states if x is not None)

        # Written over from segment to segment: the heap of a long sequence keeps few holes.
        self.states: States = tuple(self.state(x, copy=True) for x in own((given.h_0, given.c_0)))
        self.fresh: States | None = tuple(map(self.state, own((given.reset_h, given.reset_c)))) or None

    def state(self, x: Tensor, copy: bool = False) -> Tensor:
        """A state, or a gradient of one, as it goes from segment to segment."""
        return x.to(torch.float32 if self.wide else x.dtype, copy=copy)

    def __iter__(self) -> Iterator[Segment]:
        given, batch_sizes = self.call.states, self.call.batch_sizes
        begins = range(0, self.steps, self.every)
        first_rows = None if batch_sizes is None else [0, *batch_sizes.cumsum(0).tolist()]
        for begin in reversed(begins) if self.reverse else begins:
            end = min(begin + self.every, self.steps)
            rows, batch, of_segment = slice(begin, end), self.states[0].shape[0], None
            if first_rows is not None:
                assert batch_sizes is not None
                rows, of_segment = slice(first_rows[begin], first_rows[end]), batch_sizes[begin:end]
                batch = first_rows[begin + 1] - first_rows[begin]
            lengths = None if given.lengths is None else (given.lengths - begin).clamp(0, end - begin)
            resets = crossed = None
            if given.resets is not None:
                resets = given.resets[begin:end]
                # Forward, a reset at the first step is the segment's own. In reverse the boundary lies outside of it.
                if self.reverse and end < self.steps:
                    crossed = given.resets[end] if given.lengths is None else given.resets[end] & (given.lengths > end)
                    crossed = crossed[:, None]
                    fresh = self.fresh or map(torch.zeros_like, self.states)
                    self.states = tuple(torch.where(crossed, a, b) for a, b in zip(fresh, self.states, strict=True))
            entry = tuple(x[:batch] for x in self.states)
            yield Segment(begin, rows, batch, lengths, resets, of_segment, crossed, entry)

    def leave(self, after: Sequence[Tensor]) -> None:
        for x, first in zip(self.states, after, strict=True):
            x[: len(first)].copy_(first)

    def part(self, s: Segment) -> LayerCall:
        """The segment as a call of its own, of one direction."""
        entry = tuple(x[None] for x in s.entry)
        fresh = None if self.fresh is None else tuple(x[None] for x in self.fresh)
        given, D = self.call.states, len(self.call.weights)
        mask_h = None if given.mask_h is None else given.mask_h[self.direction, : s.batch][None]
        keeps = (None if x is None else x[s.rows].chunk(D, -1)[self.direction] for x in (given.keep_h, given.keep_c))
        masks = Masks(mask_h, *keeps)
        part = self.call._replace(
            input=self.call.input[s.rows], weights=[self.call.weights[self.direction]], reverse=(self.reverse,),
            states=layer_states(entry, s.lengths, s.resets, fresh, masks), batch_sizes=s.batch_sizes,
        )  # fmt: skip
        return part.widened(torch.float32) if self.wide else part


def can_recompute() -> bool:
    """Is a gradient asked for, in an eager call?"""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def layer(call: LayerCall, every: int) -> LayerResults:
    """``layer.layer`` by segments of `every` steps, where a gradient is asked for."""
    flat = [x for w in call.weights for x in w]
    if call.batch == 0 or not torch._C._any_requires_grad(call.input, *call.states, *flat):
        return fused(call)
    if CELLS[call.cell].is_wide(call.dtype) and not call.has_one_dtype:
        return fused(call)  # which says what does not fit
    started = call.states
    if started.h_0 is None:
        w, D = call.weights[0], len(call.weights)
        widths = CELLS[call.cell].widths(*w.widths)
        zeros = layer_states(tuple(w.weight_hh.new_zeros(D, call.batch, n) for n in widths))
        started = started._replace(h_0=zeros.h_0, c_0=zeros.c_0)
    options = call._replace(input=None, weights=[], states=None), every  # type: ignore[arg-type]
    output, h_n, c_n = _Segments.apply(options, call.input, *started, *flat)
    return LayerResults(output, h_n, c_n, output.new_empty(0), output.new_empty(0))


def _call(options: LayerCall, tensors: Sequence[Any]) -> LayerCall:
    """The call that the node was given, from its tensors."""
    count = len(LayerStates._fields)
    input, given, flat = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
    weights = [LayerWeights(*flat[i : i + _FIELDS]) for i in range(0, len(flat), _FIELDS)]
    return options._replace(input=input, weights=weights, states=LayerStates(*given))


class _Segments(torch.autograd.Function):
    """Arguments: (the call without tensors, steps), input, the fields of LayerStates, the fields of each direction's
    LayerWeights."""

    @staticmethod
    def forward(ctx: Any, options: Any, *tensors: Any) -> tuple[Tensor, ...]:
        call, every = _call(options[0], tensors), options[1]
        walks = [Walk(call, direction, every) for direction in range(len(call.weights))]
        # Of each direction and state [segments, B, n], first of all: no holes in the heap.
        entries = [[x.new_empty(-(-walk.steps // every), *x.shape) for x in walk.states] for walk in walks]
        D, R = len(walks), walks[0].states[0].shape[1]
        steps = call.input.shape[: 1 if call.batch_sizes is not None else 2]
        output = call.weights[0].weight_hh.new_empty(*steps, D * R)

        def run(walk: Walk, s: Segment) -> None:
            for to, x in zip(entries[walk.direction], s.entry, strict=True):
                to[s.begin // every, : s.batch].copy_(x)
            found = fused(walk.part(s))
            output[s.rows].chunk(D, -1)[walk.direction].copy_(found.output)
            walk.leave([x[0] for x in (found.h_n, found.c_n)[: len(walk.states)]])

        with without_autocast(call.input):
            for walk in walks:
                for s in walk:
                    run(walk, s)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.arguments = options, len(tensors)
        keep(ctx, [*tensors, *(x for of_direction in entries for x in of_direction)])
        h_n, *c_n = (torch.stack(each).to(output.dtype) for each in zip(*(walk.states for walk in walks), strict=True))
        return output, h_n, c_n[0] if c_n else h_n.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        needs = ctx.needs_input_grad[1:]
        if all(g is None for g in grads):
            return (None,) * (1 + len(needs))
        tensors = kept(ctx)
        arguments, entries = tensors[: ctx.arguments], tensors[ctx.arguments :]
        if torch.is_grad_enabled() or is_transformed(*grads, *arguments) or not all(map(is_unbatched, grads)):
            return (None, *_differentiable(ctx.options[0], arguments, needs, grads))
        call, every = _call(ctx.options[0], arguments), ctx.options[1]
        with without_autocast(call.input):
            return (None, *_by_segments(call, every, entries, needs, grads))


def _by_segments(call: LayerCall, every: int, entries: Sequence[Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    D, given = len(call.weights), call.states
    names = ("input", *LayerStates._fields)
    needed = dict(zip(names, needs, strict=False)) | {
        name: any(needs[len(names) + i :: _FIELDS]) for i, name in enumerate(LayerWeights._fields)
    }
    of_segments = dict(needed, h_0=True, c_0=given.c_0 is not None)  # each segment hands on what it was entered with
    flags = [bool(of_segments[name]) for name in GRADIENTS]
    grad_input = torch.empty_like(call.input) if needed["input"] else None
    of_weights: list[Tensor | None] = []
    of_states: list[States] = []  # of each direction, those of h_0 and c_0, then of reset_h and reset_c

    def through(walk: Walk) -> None:
        count, direction = len(walk.states), walk.direction
        grad_output = None if grads[0] is None else grads[0].chunk(D, -1)[direction]
        # Written over from segment to segment: of what a segment allocates nothing outlives it but the first sums.
        later = [
            torch.zeros_like(x) if g is None else walk.state(g[direction], copy=True)
            for g, x in zip(grads[1 : 1 + count], walk.states, strict=True)
        ]
        totals: dict[str, Tensor | None] = dict.fromkeys(LayerWeights._fields)
        fresh: list[Tensor | None] = [None] * count

        def back(s: Segment) -> None:
            part = walk.part(s)
            made = fused(part, save=True)
            of_finals = [g[: s.batch][None] for g in later] + [None] * (2 - count)
            found = layer_backward(
                part.cell, None if grad_output is None else walk.state(grad_output[s.rows]), *of_finals, None,
                part.input, *part.by_field(), *part.states, part.batch_sizes, part.directions, made.output, made.saved,
                flags, part.grad_clip,
            )  # fmt: skip
            of = dict(zip(GRADIENTS, found, strict=True))
            if grad_input is not None:
                to = grad_input[s.rows]
                to.copy_(of["input"]) if direction == 0 else to.add_(of["input"])
            for name in totals:
                if needed[name] and of[name].numel():
                    totals[name] = add_gradient(totals[name], of[name])
            for i, (name, reset) in enumerate((("h_0", "reset_h"), ("c_0", "reset_c"))[:count]):
                before = of[name][0]
                if walk.fresh is not None and needed[reset]:
                    fresh[i] = add_gradient(fresh[i], of[reset][0])
                if s.crossed is not None:
                    if walk.fresh is not None and needed[reset]:
                        fresh[i] = add_gradient(fresh[i], torch.where(s.crossed, before, 0))
                    before = torch.where(s.crossed, 0, before)
                later[i][: s.batch].copy_(before)

        count_entries = len(walk.states)
        own = entries[direction * count_entries : (direction + 1) * count_entries]
        for s in reversed(list(walk)):
            back(s._replace(entry=tuple(x[s.begin // every, : s.batch] for x in own)))
        dtype, absent = call.dtype, [None] * (2 - count)
        of_weights.extend(None if x is None else x[0].to(dtype) for x in totals.values())
        restarts = [None if x is None else x.to(dtype) for x in fresh]
        of_states.append((*(x.to(dtype) for x in later), *absent, *restarts, *absent))  # type: ignore[arg-type]

    for direction in range(D):
        through(Walk(call, direction, every))
    h_0, c_0, reset_h, reset_c = (
        torch.stack(each) if each[0] is not None else None for each in zip(*of_states, strict=True)
    )
    of_fields = dict(h_0=h_0, c_0=c_0, reset_h=reset_h, reset_c=reset_c)
    found = (grad_input, *map(of_fields.get, LayerStates._fields), *of_weights)
    return tuple(x if need else None for x, need in zip(found, needs, strict=True))


def add_gradient(total: Tensor | None, x: Tensor) -> Tensor:
    """total, None at first, and x. Of half types in float32: with many parts their own sum would stop growing."""
    if total is not None:
        return total.add_(x)
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _differentiable(options: LayerCall, arguments: Sequence[Any], needs: Sequence[bool], grads: Grads) -> Grads:
    """The same where it is to be differentiated itself, or sees batched gradients: by the whole layer's own node."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that nothing goes on from them: one argument may be made of another.
        given = [x.view_as(x) if need else x for x, need in zip(arguments, needs, strict=True)]
        results = fused(_call(options, given))[:3]
    return pull(results, grads, given, needs, create_graph)


def pull(
    results: Sequence[Tensor], grads: Grads, given: Sequence[Any], needs: Sequence[bool], create_graph: bool
) -> Grads:
    """The gradients of those of `given` that need one; grads: of the results, None or of another rank for one that does
    not count."""
    pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None and g.dim() == y.dim()]
    leaves = [x for x, need in zip(given, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], leaves, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    )
    return tuple(next(found) if need else None for need in needs)
