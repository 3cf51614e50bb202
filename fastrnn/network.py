"""A network of layers, with dropout between them, and a cell: between the checked arguments and ``layer.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C, composed, fallback, heads, onnx_nodes, per_sample, regularizers, segments, wavefront
from .checks import check_steps, check_values_of
from .layer import layer, road
from .masks import NO_NOISE, Noise
from .ops import CELLS
from .products import linear
from .records import LayerCall, LayerStates, LayerWeights, Masks, States, layer_states, rows_of
from .transforms import in_autocast_dtype, is_plain, without_autocast


def own(x: Any) -> Any:
    """A result as a tensor that is no view, on the same memory; None as None. A view could not be detached in place."""
    return x if torch.compiler.is_compiling() else _C.without_view(x)


def of_layers(function: Callable[[Any], Any], output: Any) -> Any:
    """Of an output, a tensor or a PackedSequence, or of a tuple of such one by one; None of None."""
    if output is None:
        return None
    return tuple(map(function, output)) if type(output) is tuple else function(output)


def in_autocast_dtypes(tensors: Sequence[Tensor | None] | None) -> Any:
    return None if tensors is None else tuple(map(in_autocast_dtype, tensors))


def is_for_others(weight: Tensor, *others: Tensor | None) -> bool:
    """Has a call to be made of torch's ops?"""
    return road(fallback.has_kernels(weight, *others)) == "reference"


def network(
    cell: str,
    input: Tensor,
    weights: Sequence[Sequence[LayerWeights]],
    states: States | None = None,
    reset_states: States | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    offsets: Tensor | None = None,
    dropout: float = 0.0,
    locked_dropout: float = 0.0,
    training: bool = False,
    residual: bool = False,
    all_states: bool = False,
    all_layers: bool = False,
    grad_clip: float = 0.0,
    recompute: int = 0,
    num_heads: int = 0,
    noise: Noise = NO_NOISE,
) -> tuple[Any, States, Tensor | None]:
    """output, the final states and, with ``all_states``, every c of the last layer [T, B, D*H].

    input [T, B, I] or tokens [T, B], or with batch_sizes or offsets [N, I] (records.LayerCall); states and reset_states
    [L*D, B, n] each, one or two (records.joined).
    dropout, locked_dropout: between layers, in training (regularizers.py).
    residual: from the second layer on, the output of the layer below is added to a layer's own.
    all_layers: output is a tuple of every layer's.
    recompute: train by segments of so many steps (segments.py); 0: as a whole. num_heads: of weight_hh; 0: it is dense.
    noise: recurrent dropout and zoneout (masks.py).
    """
    ragged = batch_sizes is not None or offsets is not None
    if not ragged:
        check_steps(input)
    D, L, N = len(weights[0]), len(weights), num_heads
    marked = per_sample.asked_for(w for of_directions in weights for w in of_directions)
    if torch._C._is_any_autocast_enabled():
        input, states, reset_states = in_autocast_dtype(input), *map(in_autocast_dtypes, (states, reset_states))
        if not marked:  # marks would be lost
            weights = [[LayerWeights(*in_autocast_dtypes(w)) for w in of_directions] for of_directions in weights]
    if marked and N:
        raise RuntimeError(
            "num_heads: expected 1 where the gradient of every sample is asked for (Opacus, ExpandedWeights), "
            f"got {N}; torch.func.vmap of torch.func.grad gives it"
        )
    all_weights = [x for of_layer in weights for w in of_layer for x in w]
    by_others: Callable[..., tuple[Tensor, ...]] | None = None  # runs a layer
    if not marked and is_for_others(weights[0][0].weight_ih, input, *all_weights, *(states or ())):
        if N:  # torch's ops know none
            weights, N = [list(map(heads.dense, of_directions)) for of_directions in weights], 0
        if fallback.is_exported_to_onnx():
            if resets is None and not all_states and not noise.is_on() and onnx_nodes.has_nodes(cell, weights):
                by_others = functools.partial(onnx_nodes.layer, cell, lengths=lengths)
        elif (
            lengths is None
            and resets is None
            and not noise.is_on()
            and fallback.has_op(cell, input, all_states, grad_clip)
        ):
            if not (residual or all_layers or (locked_dropout and training)):
                return *fallback.network(cell, input, states, weights, dropout, training), None
            by_others = functools.partial(fallback.layer, cell)

    def is_fused() -> bool:
        read = input, *(states or ()), *(reset_states or ()), *all_weights
        return road(fallback.has_kernels(weights[0][0].weight_ih, input, *all_weights), *read) == "fused"

    by_segments = recompute > 0 and not marked and segments.can_recompute()
    by_segments = by_segments and is_fused()
    if by_segments and lengths is not None and is_plain(lengths):
        check_values_of(lengths, input.shape[0])  # a segment's kernel sees what lies in it alone

    def of_layer(states: States | None, i: int) -> States | None:
        return states if states is None or L == 1 else tuple(s[i * D : (i + 1) * D] for s in states)

    count = CELLS[cell].tensors
    others = (
        marked,
        by_segments,
        ragged,
        N,
        residual,
        all_layers,
        locked_dropout and training,
        noise.is_on(),
    )
    every = 0 if any(others) else wavefront.chunk_steps(input, L, D)
    if every and is_fused() and not CELLS[cell].is_wide(weights[0][0].weight_hh.dtype):
        given = [layer_states(of_layer(states, i), lengths, resets, of_layer(reset_states, i)) for i in range(L)]
        calls = [LayerCall(cell, input, *of, grad_clip=grad_clip) for of in zip(weights, given, strict=True)]
        calls[-1] = calls[-1]._replace(all_states=all_states)
        made = wavefront.network(calls, dropout if training else 0.0, every)
        joined = tuple(torch.cat(each) for each in zip(*(results[1 : 1 + count] for results in made), strict=True))
        return made[-1].output, joined, made[-1].cells if all_states else None

    finals: list[States] = []
    outputs: list[Tensor] = []
    output = input
    for i, of_directions in enumerate(weights):
        below = output
        if i > 0 and training:
            output = regularizers.between_layers(output, dropout, locked_dropout, batch_sizes, offsets)
        if by_others is not None:
            output, *after = by_others(output, of_directions, of_layer(states, i))
        else:
            masks = Masks()
            if noise.is_on():
                masks = _masks(noise, cell, of_directions, output, ragged, rows_of(output, batch_sizes, offsets))
            starts = layer_states(of_layer(states, i), lengths, resets, of_layer(reset_states, i), masks)
            every_c = all_states and i == L - 1
            call = LayerCall(
                cell, output, of_directions, starts, batch_sizes, offsets, grad_clip=grad_clip, all_states=every_c
            )
            if N:
                call = heads.grouped(call)
            found = segments.layer(call, recompute) if by_segments and not every_c else layer(call)
            output, *after, cells, _ = heads.joined(found, N) if N else found
        finals.append(tuple(after[:count]))
        if i > 0 and residual:
            output = output + below
        if all_layers:
            outputs.append(output)
    joined = finals[0] if L == 1 else tuple(torch.cat(each) for each in zip(*finals, strict=True))
    return tuple(outputs) if all_layers else output, joined, cells if all_states else None


def _masks(noise: Noise, cell: str, weights: Sequence[LayerWeights], input: Tensor, ragged: bool, batch: int) -> Masks:
    """Of a layer's call, whose input is [N, ..] where it is ragged."""
    *of_heads, Gh, R = weights[0].weight_hh.shape
    N = of_heads[0] if of_heads else 1
    steps = input.shape[: 1 if ragged else 2]
    widths = CELLS[cell].widths(N * R, N * (Gh // CELLS[cell].gates))
    return noise.masks(weights[0].weight_hh, len(weights), steps, batch, widths)


def step(cell: str, input: Tensor, states: States, weights: LayerWeights) -> States:
    """A cell's one step: input [B, I], states [B, H] -> the states after the step."""
    call = LayerCall(cell, input[None], [weights], layer_states(tuple(x[None] for x in states)))
    if not per_sample.asked_for([weights]):
        if is_for_others(*weights[:2], *weights[2:], input, *states) and hasattr(torch._VF, f"{cell}_cell"):
            return fallback.step(cell, input, states, weights)
        if torch._C._is_any_autocast_enabled():
            return _step_under_autocast(call, states)
    _, *after, _, _ = layer(call)
    return tuple(own(x[0]) for x in after[: len(states)])


def _step_under_autocast(call: LayerCall, states: States) -> States:
    """torch.nn's LSTM and GRU cells on a CPU add the state to what autocast's products give, and so keep a wider one's
    dtype."""
    (w,), input = call.weights, call.input[0]
    gates_ih = (F.linear if input.is_cuda else linear)(input, w.weight_ih, w.bias_ih)[None]
    if call.cell in ("lstm", "gru") and torch.is_autocast_enabled("cpu") and input.is_cpu:
        dtype = torch.promote_types(gates_ih.dtype, states[-1].dtype)
        with without_autocast(input):
            cast = LayerWeights(*(None if x is None else x.to(dtype) for x in w))  # type: ignore[arg-type]
            started = LayerStates(*(None if x is None else x.to(dtype) for x in call.states))
            found = composed.recurrence(call._replace(weights=[cast], states=started), gates_ih.to(dtype))
    else:
        found = composed.recurrence(call, gates_ih)
    return tuple(own(x[0]) for x in (found.h_n, found.c_n)[: len(states)])
