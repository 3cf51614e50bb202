"""Layers side by side on CUDA: layer l runs its k-th chunk of steps while layer l - 1 runs the chunk after that.

A persistent kernel of one layer fills a part of a GPU, and layers one after the other leave the rest of it idle. Here
every layer has a stream of its own. What one hands to the next is ordered by events, forward and backward, and every
tensor that a stream uses is recorded there, so that the allocator gives its memory to nobody else before. All work
starts after what the caller's stream has been given, and that waits for its end: calls can be captured in a graph.

Off unless FASTRNN_CUDA_WAVEFRONT names the steps of a chunk: no GPU has measured it yet. The products of a chunk are
smaller ones, and each chunk is a call: a graph hides that, an eager call of few steps does not.

Results are those of the chunks one after the other, bit for bit, whatever runs beside what. Against layers as a whole,
the gradients of weights are sums of the chunks' (in float32 for half types), and half types are rounded where a chunk
ends: cells that lose by that (CellInfo.is_wide) do not come here. Dropout's masks are drawn in the order of the layers,
as they would be without this.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .autograd import Grads, keep, kept
from .layer import fused
from .ops import CELLS, layer_backward
from .records import GRADIENTS, LayerCall, LayerResults, LayerStates, LayerWeights
from .segments import add_gradient, pull
from .transforms import is_transformed, is_unbatched

_STATES, _WEIGHTS = len(LayerStates._fields), len(LayerWeights._fields)
_masked = torch.ops.aten.native_dropout_backward.default


class Streams(Protocol):
    """A queue of work for each layer, the first of which is the caller's."""

    def on(self, i: int) -> AbstractContextManager[Any]:
        """What is called inside goes to queue i."""

    def record(self, i: int) -> Any:
        """An event: the end of all that queue i has been given so far."""

    def wait(self, i: int, event: Any) -> None:
        """What queue i is given from now on begins after the event."""

    def use(self, x: Tensor, i: int) -> None:
        """Queue i uses x: its memory is free no sooner than queue i has done what it has been given till then."""


class CudaStreams:
    """The current stream, and for the other layers streams that this thread has to itself."""

    _of_thread = threading.local()

    def __init__(self, device: torch.device, count: int) -> None:
        of_devices: dict[torch.device, list[torch.cuda.Stream]] = self._of_thread.__dict__.setdefault("streams", {})
        side = of_devices.setdefault(device, [])
        side += [torch.cuda.Stream(device) for _ in range(count - 1 - len(side))]
        self._streams = [torch.cuda.current_stream(device), *side[: count - 1]]

    def on(self, i: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[i])

    def record(self, i: int) -> torch.cuda.Event:
        return self._streams[i].record_event()

    def wait(self, i: int, event: torch.cuda.Event) -> None:
        self._streams[i].wait_event(event)

    def use(self, x: Tensor, i: int) -> None:
        x.record_stream(self._streams[i])  # type: ignore[arg-type]


make_streams: Callable[[torch.device, int], Streams] = CudaStreams


def chunk_steps(input: Tensor, layers: int, directions: int) -> int:
    """The steps of a chunk; 0 where the layers of such an eager call run one after the other.

    Raises:
        ValueError: FASTRNN_CUDA_WAVEFRONT is no number of steps.
    """
    text = os.environ.get("FASTRNN_CUDA_WAVEFRONT", "")
    if not text or not input.is_cuda or layers == 1 or directions > 1 or torch.compiler.is_compiling():
        return 0
    if not text.isdigit():
        raise ValueError(f"FASTRNN_CUDA_WAVEFRONT: expected a number of steps, got {text!r}")
    return int(text) if int(text) < input.shape[0] and input.shape[1] > 0 else 0


class Span(NamedTuple):
    """A chunk of steps, and what the sequences' lengths and resets are there."""

    rows: slice
    lengths: Tensor | None
    resets: Tensor | None


class Made(NamedTuple):
    """What a layer was given for a chunk and what it made of it."""

    call: LayerCall
    results: LayerResults


def network(calls: Sequence[LayerCall], dropout: float, every: int) -> list[LayerResults]:
    """The layers of one direction, chunks of `every` steps. calls: the first's input counts, the others' is ignored.

    Of all but the last only the final states are returned.
    """
    first, masks = calls[0], []
    states = first.states
    if states.lengths is not None:
        lengths = states.lengths.to(first.input.device, torch.int64, non_blocking=states.lengths.is_cpu)
        calls = [call._replace(states=call.states._replace(lengths=lengths)) for call in calls]
    if dropout > 0:
        for call in calls[:-1]:
            w = call.weights[0]
            shape = (*first.input.shape[:2], w.widths[0])
            if dropout < 1:
                masks.append(torch.native_dropout(w.weight_hh.new_ones(shape), dropout, True)[1])
            else:  # draws nothing
                masks.append(torch.zeros(shape, dtype=torch.bool, device=w.weight_hh.device))
    scale = 0.0 if dropout >= 1 else 1 / (1 - dropout)
    flat = [x for call in calls for x in (*call.states, *call.weights[0])]
    plain = [call._replace(input=None, weights=[], states=None) for call in calls]  # type: ignore[arg-type]
    options = plain, len(masks), scale, every
    if torch.is_grad_enabled() and torch._C._any_requires_grad(first.input, *flat):
        found = list(_Wavefront.apply(options, first.input, *masks, *flat))
    else:
        streams = make_streams(first.input.device, len(calls))
        made = _forward(calls, masks, scale, every, streams, save=False)
        found = _joined(calls, made)
    output, cells, *finals = found
    empty = output.new_empty(0)
    pairs = zip(finals[::2], finals[1::2], strict=True)
    results = [LayerResults(empty, h_n, c_n, empty, empty) for h_n, c_n in pairs]
    return [*results[:-1], results[-1]._replace(output=output, cells=cells)]


def _calls(options: Any, tensors: Sequence[Any]) -> tuple[list[LayerCall], list[Tensor]]:
    """The layers' calls and dropout's masks, from the tensors of the node."""
    plain, count = options[:2]
    input, masks, flat = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
    calls = []
    for i, call in enumerate(plain):
        own = flat[i * (_STATES + _WEIGHTS) : (i + 1) * (_STATES + _WEIGHTS)]
        weights = [LayerWeights(*own[_STATES:])]
        calls.append(call._replace(input=input, weights=weights, states=LayerStates(*own[:_STATES])))
    return calls, list(masks)


def _spans(call: LayerCall, every: int) -> list[Span]:
    T, lengths, resets = len(call.input), call.states.lengths, call.states.resets
    found = []
    for begin in range(0, T, every):
        end = min(begin + every, T)
        of_span = None if lengths is None else (lengths - begin).clamp(0, end - begin)
        found.append(Span(slice(begin, end), of_span, None if resets is None else resets[begin:end]))
    return found


def _diagonals(layers: int, chunks: int) -> Iterator[tuple[int, int]]:
    """(layer, chunk) in the order of launches: each after its own layer's chunk before, and after the layer below."""
    for d in range(layers + chunks - 1):
        for i in range(max(0, d - chunks + 1), min(layers, d + 1)):
            yield i, d - i


def _use(streams: Streams, i: int, *tensors: Tensor | None) -> None:
    for x in tensors:
        if x is not None:
            streams.use(x, i)


class _Beside:
    """Between the two ends the layers' streams run beside the caller's."""

    def __init__(self, streams: Streams, count: int) -> None:
        self.streams, self.count = streams, count

    def __enter__(self) -> None:
        begun = self.streams.record(0)
        for i in range(1, self.count):
            self.streams.wait(i, begun)

    def __exit__(self, *error: object) -> None:  # after an error too: the caller's memory is read there
        for i in range(1, self.count):
            self.streams.wait(0, self.streams.record(i))


def _forward(
    calls: Sequence[LayerCall], masks: Sequence[Tensor], scale: float, every: int, streams: Streams, save: bool
) -> list[list[Any]]:
    """Of each layer what it Made of each chunk; where nothing is saved, of all but the last layer the last alone."""
    L, spans = len(calls), _spans(calls[0], every)
    made: list[list[Any]] = [[] for _ in calls]
    done: dict[tuple[int, int], Any] = {}
    with _Beside(streams, L):
        for i, k in _diagonals(L, len(spans)):
            rows, lengths, resets = spans[k]
            given = calls[i].states._replace(lengths=lengths, resets=resets)
            with streams.on(i):
                if k > 0:
                    before = made[i][k - 1].results
                    given = given._replace(h_0=before.h_n, c_0=before.c_n if before.c_n.numel() else None)
                x = calls[0].input[rows]
                if i > 0:
                    streams.wait(i, done.pop((i - 1, k)))
                    x = made[i - 1][k].results.output
                    _use(streams, i, x)
                    if masks:
                        _use(streams, i, masks[i - 1])
                        x = _masked(x, masks[i - 1][rows], scale)
                    if not save and k + 1 < len(spans):
                        made[i - 1][k] = None
                call = calls[i]._replace(input=x, states=given)
                _use(streams, i, *call.weights[0], *given)
                made[i].append(Made(call, fused(call, save)))
                if i + 1 < L:
                    done[i, k] = streams.record(i)
        for i, of_layer in enumerate(made):
            for each in of_layer if i == L - 1 else of_layer[-1:]:
                _use(streams, 0, *each.results)
    return made


def _joined(calls: Sequence[LayerCall], made: Sequence[Sequence[Made]]) -> list[Tensor]:
    """The last layer's output and cells, then each layer's h_n and c_n: tensors of their own."""
    last = [each.results for each in made[-1]]
    output = torch.cat([results.output for results in last])
    cells = torch.cat([results.cells for results in last]) if calls[-1].all_states else output.new_empty(0)
    return [output, cells, *(x for of_layer in made for x in of_layer[-1].results[1:3])]


class _Wavefront(torch.autograd.Function):
    """Arguments: (the calls without tensors, how many masks, their scale, steps of a chunk), the input, the masks, then
    of each layer the fields of LayerStates and of LayerWeights."""

    @staticmethod
    def forward(ctx: Any, options: Any, *tensors: Any) -> tuple[Tensor, ...]:
        calls, masks = _calls(options, tensors)
        streams = make_streams(calls[0].input.device, len(calls))
        made = _forward(calls, masks, options[2], options[3], streams, save=True)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.arguments = options, len(tensors)
        # Of each chunk the layer's input, where it is no part of the network's, and results but cells.
        own = [
            x
            for i, of_layer in enumerate(made)
            for call, results in of_layer
            for x in (call.input if i else None, results.output, results.h_n, results.c_n, results.saved)
        ]
        keep(ctx, [*tensors, *own])
        return tuple(x.clone() if i > 1 else x for i, x in enumerate(_joined(calls, made)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        needs = ctx.needs_input_grad[1:]
        if all(g is None for g in grads):
            return (None,) * (1 + len(needs))
        tensors = kept(ctx)
        arguments, own = tensors[: ctx.arguments], tensors[ctx.arguments :]
        if torch.is_grad_enabled() or is_transformed(*grads, *arguments) or not all(map(is_unbatched, grads)):
            return (None, *_differentiable(ctx.options, arguments, needs, grads))
        return (None, *_backward(ctx.options, arguments, own, needs, grads))


def _remade(calls: Sequence[LayerCall], spans: Sequence[Span], own: Sequence[Any]) -> list[list[Made]]:
    """What _forward made, from the tensors that the node has kept."""
    made: list[list[Made]] = []
    at = iter(own)
    for call in calls:
        of_layer: list[Made] = []
        for rows, lengths, resets in spans:
            x, output, h_n, c_n, saved = (next(at) for _ in range(5))
            given = call.states._replace(lengths=lengths, resets=resets)
            if of_layer:
                before = of_layer[-1].results
                given = given._replace(h_0=before.h_n, c_0=before.c_n if before.c_n.numel() else None)
            part = call._replace(input=call.input[rows] if x is None else x, states=given)
            of_layer.append(Made(part, LayerResults(output, h_n, c_n, output, saved)))
        made.append(of_layer)
    return made


def _backward(
    options: Any, arguments: Sequence[Any], own: Sequence[Any], needs: Sequence[bool], grads: Grads
) -> tuple[Tensor | None, ...]:
    calls, masks = _calls(options, arguments)
    scale, every = options[2:]
    L, spans = len(calls), _spans(calls[0], every)
    made, streams = _remade(calls, spans, own), make_streams(calls[0].input.device, L)
    grad_output, grad_cells, *of_finals = grads
    of_layers = [needs[1 + len(masks) + i * (_STATES + _WEIGHTS) :][: _STATES + _WEIGHTS] for i in range(L)]
    grad_input = torch.empty_like(calls[0].input) if needs[0] else None
    later: list[list[Tensor | None]] = [list(of_finals[2 * i : 2 * i + 2]) for i in range(L)]
    totals: list[dict[str, Tensor | None]] = [{} for _ in calls]
    found_inputs: dict[tuple[int, int], tuple[Tensor, Any]] = {}

    def chunk(i: int, k: int) -> None:
        (call, results), rows = made[i][k], spans[k].rows
        needed = dict(zip((*LayerStates._fields, *LayerWeights._fields), of_layers[i], strict=True))
        has_c = CELLS[call.cell].states > 1
        needed |= {"input": i > 0 or needs[0], "h_0": k > 0 or needed["h_0"], "c_0": has_c and (k > 0 or needed["c_0"])}
        above, of_cells = None if grad_output is None else grad_output[rows], None
        if i == L - 1:
            of_cells = None if grad_cells is None or grad_cells.dim() < 3 else grad_cells[rows]
        else:
            above, event = found_inputs.pop((i + 1, k))
            streams.wait(i, event)
            _use(streams, i, above)
            if masks:
                _use(streams, i, masks[i])
                above = _masked(above, masks[i][rows], scale)
        _use(streams, i, above, of_cells, *later[i], call.input, *call.weights[0], *call.states, *results)
        flags = [bool(needed[name]) for name in GRADIENTS]
        found = layer_backward(
            call.cell, above, later[i][0], later[i][1] if has_c else None, of_cells, call.input, *call.by_field(),
            *call.states, None, call.directions, results.output, results.saved, flags, call.grad_clip,
        )  # fmt: skip
        of = dict(zip(GRADIENTS, found, strict=True))
        for name in (*LayerWeights._fields, "reset_h", "reset_c"):
            if needed[name] and of[name].numel():
                totals[i][name] = add_gradient(totals[i].get(name), of[name])
        later[i] = [of[name] if needed[name] else None for name in ("h_0", "c_0")]
        if i > 0:
            found_inputs[i, k] = of["input"], streams.record(i)
        elif grad_input is not None:
            grad_input[rows].copy_(of["input"])

    with _Beside(streams, L):
        for i, k in reversed(list(_diagonals(L, len(spans)))):
            with streams.on(i):
                chunk(i, k)
    grad_of: list[Tensor | None] = [grad_input, *(None for _ in masks)]
    dtype = made[0][0].results.output.dtype
    for i in range(L):
        for name in (*LayerStates._fields, *LayerWeights._fields):
            x = totals[i].get(name) if name not in ("h_0", "c_0") else later[i][name == "c_0"]
            _use(streams, 0, x)
            if x is not None:
                x = (x[0] if name in LayerWeights._fields else x).to(dtype)
            grad_of.append(x)
    return tuple(x if need else None for x, need in zip(grad_of, needs, strict=True))


def _differentiable(options: Any, arguments: Sequence[Any], needs: Sequence[bool], grads: Grads) -> Grads:
    """The same where it is to be differentiated itself, or sees batched gradients: by the layers' own nodes, whole."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that nothing goes on from them: one argument may be made of another.
        given = [x.view_as(x) if need else x for x, need in zip(arguments, needs, strict=True)]
        calls, masks = _calls(options, given)
        results: list[LayerResults] = []
        for i, call in enumerate(calls):
            x = call.input if i == 0 else results[-1].output
            results.append(fused(call._replace(input=_masked(x, masks[i - 1], options[2]) if i and masks else x)))
    made = [results[-1].output, results[-1].cells, *(x for each in results for x in (each.h_n, each.c_n))]
    return pull(made, grads, given, needs, create_graph)
