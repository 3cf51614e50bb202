"""A layer composed of ops that have rules for everything torch does to a call: ``linear`` around ``recurrent_forward``
and ``recurrent_backward``. What torch.func and forward-mode AD run, and double backward
where csrc/torch/second_derivative.cpp has no kernel for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C, fallback, reference
from .gradients import Grads, pull_forward
from .ops import BACKWARD_WEIGHTS, CELLS, FORWARD_WEIGHTS, recurrent_forward
from .packing import layout_of, without_padding
from .products import linear, product, transposed_product
from .records import GRADIENTS, LayerCall, LayerResults, LayerStates, LayerWeights
from .transforms import wide_dtype


def layer(call: LayerCall, by_reference: bool = False) -> LayerResults:
    """A layer of ordinary ops. by_reference: with the recurrence of reference.py, where no kernel is to be had."""
    if CELLS[call.cell].is_wide(call.dtype) and call.has_one_dtype:
        return layer(call.widened(wide_dtype(call.input)), by_reference).to(call.dtype)
    weights, input, lengths = call.weights, call.input, call.states.lengths
    if lengths is not None:
        input = without_padding(input, lengths)
    if input.dim() == 2 and not CELLS[call.cell].separate_gates_hh:
        weights = [_one_bias(w) for w in weights]
    return recurrence(call._replace(input=input, weights=weights), project(input, weights), by_reference)


def recurrence(call: LayerCall, gates_ih: Tensor, by_reference: bool = False) -> LayerResults:
    """The rest of a layer's call, from W_ih x + b_ih [T, B, D*G*H]."""
    weight_hh = _stacked([w.weight_hh for w in call.weights])
    assert weight_hh is not None
    states = folded(call.states, call.cell, weight_hh, gates_ih.shape[1])
    assert states.h_0 is not None
    of_weights = [_stacked([getattr(w, name) for w in call.weights]) for name in FORWARD_WEIGHTS]
    given: list[Any] = [*of_weights, *states]
    if by_reference:
        if fallback.is_traced() or fallback.is_exported_to_onnx():
            gates_ih = fallback.of_fixed_steps(gates_ih)
        clip = call.grad_clip
        found = reference.forward(call.cell, gates_ih, *given, call.directions, clip)  # type: ignore[call-arg]
    else:
        clips = (call.grad_clip,) if call.grad_clip else ()
        found = recurrent_forward(call.cell, gates_ih, *given, call.directions, call.all_states, *clips)
    output, h_n, c_n, saved = found
    D = len(call.weights)
    cells = every_c(call.cell, saved, D, states.keep_c) if call.all_states else output.new_empty(0)
    return LayerResults(output, unfold(h_n, D), unfold(c_n, D) if CELLS[call.cell].states > 1 else c_n, cells, saved)


def project(input: Tensor, weights: Sequence[LayerWeights]) -> Tensor:
    """W_ih x + b_ih for all steps and directions at once: [T, B, D*G*H], from [T, B, I] or tokens [T, B]."""
    if input.dim() == 2:
        parts = [
            _look_up(input, w.weight_ih) if w.bias_ih is None else _look_up(input, w.weight_ih) + w.bias_ih
            for w in weights
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    # A single step may be a cell's: torch.nn's cells obey F.linear's switch for TF32, and not that of its layers.
    of_rows = F.linear if input.is_cuda and input.shape[0] == 1 else linear
    if len(weights) == 1:
        return of_rows(input, weights[0].weight_ih, weights[0].bias_ih)
    biases = [w.bias_ih for w in weights if w.bias_ih is not None]
    return of_rows(input, torch.cat([w.weight_ih for w in weights]), torch.cat(biases) if biases else None)


def _look_up(tokens: Tensor, weight_ih: Tensor) -> Tensor:
    """W_ih x for the one-hot rows x that the tokens stand for: [T, B, G*H] from [T, B]."""
    if tokens.dtype not in (torch.int64, torch.int32):
        tokens = tokens.long()
    if torch.compiler.is_compiling():
        return F.embedding(tokens, weight_ih.t())
    try:
        return F.embedding(tokens, weight_ih.t())
    except IndexError as error:
        hidden = torch._C._are_functorch_transforms_active()
        got = "others" if hidden else f"{int(tokens.min())} to {int(tokens.max())}"
        raise IndexError(f"input: expected tokens in [0, {weight_ih.shape[1]}) (input_size), got {got}") from error


def _one_bias(weights: LayerWeights) -> LayerWeights:
    """The same where both biases are added to the same gates: no pass over all looked-up rows for b_ih."""
    if weights.bias_ih is None or weights.bias_hh is None:
        return weights
    return weights._replace(bias_ih=None, bias_hh=weights.bias_ih + weights.bias_hh)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Of all directions: [D, ...]."""
    if not parts or parts[0] is None:
        return None
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)  # type: ignore[arg-type]


def fold(state: Tensor) -> Tensor:
    """[D, B, n] -> [B, D*n]"""
    D, B, n = state.shape  # reshape and not flatten, for which legacy vmap (is_grads_batched=True) has no rule
    return state[0] if D == 1 else state.transpose(0, 1).reshape(B, D * n)


def unfold(state: Tensor, directions: int) -> Tensor:
    """[B, D*n] -> [D, B, n]"""
    if directions == 1:
        return state.unsqueeze(0)
    return state.unflatten(1, (directions, -1)).transpose(0, 1).contiguous()


def folded(states: LayerStates, cell: str, weight_hh: Tensor, batch: int) -> LayerStates:
    """As the recurrence's ops take them: [B, D*n], and zeros made where there are none."""
    D, Gh, R = weight_hh.shape
    found: dict[str, Tensor | None] = {}
    for name in ("h_0", "c_0", "reset_h", "reset_c", "mask_h"):
        x = getattr(states, name)
        found[name] = None if x is None else fold(x)
    for name, width in zip(("h_0", "c_0"), CELLS[cell].widths(R, Gh // CELLS[cell].gates), strict=False):
        if found[name] is None:
            found[name] = weight_hh.new_zeros(batch, D * width)
    return states._replace(**found)


def every_c(cell: str, saved: Tensor, directions: int, keep_c: Tensor | None) -> Tensor:
    """[.., D*C*H] of saved [.., D*S*H]: the last C of each direction's S values."""
    S, C = CELLS[cell].saved_values(None, keep_c), CELLS[cell].in_c
    values = saved.chunk(directions * S, -1)
    return torch.cat([x for k, x in enumerate(values) if k % S >= S - C], -1)


def in_saved(cell: str, grad: Tensor, directions: int, keep_c: Tensor | None, others: Tensor | None = None) -> Tensor:
    """The gradient of every c as one of saved, added to the others of that."""
    S, C, (*steps, width) = CELLS[cell].saved_values(None, keep_c), CELLS[cell].in_c, grad.shape
    H = width // (directions * C)
    # reshape, for legacy vmap (is_grads_batched=True) has no rule for flatten and unflatten
    placed = F.pad(grad.reshape(*steps, directions, C * H), ((S - C) * H, 0)).reshape(*steps, directions * S * H)
    return placed if others is None else placed + others


def layer_backward(
    cell: str,
    grads: Grads,
    input: Tensor | None,
    weights: Mapping[str, Sequence[Tensor]],
    states: Mapping[str, Tensor | None],
    batch_sizes: Tensor | None,
    offsets: Tensor | None,
    reverse: list[bool],
    output: Tensor,
    saved: Tensor,
    needed: Sequence[bool],
    grad_clip: float,
) -> Grads:
    """A layer's backward of ops that have derivatives, as ``csrc/torch/autograd.cpp`` asks for it.

    grads: of output, h_n, c_n, cells and saved. weights: of each field one a direction. needed, and what is returned:
    of GRADIENTS; those of weights are [D, ...].
    """
    needs = dict(zip(GRADIENTS, needed, strict=True))
    of_weights = {name: _stacked(weights[name]) for name in BACKWARD_WEIGHTS}
    weight_ih, weight_hh = _stacked(weights["weight_ih"]), of_weights["weight_hh"]
    assert weight_hh is not None
    D, steps = len(reverse), LayerStates(**states)
    grad_output, grad_h_n, grad_c_n, grad_cells, grad_saved = grads
    if grad_cells is not None:
        grad_saved = in_saved(cell, grad_cells, D, steps.keep_c, grad_saved)
    layout = layout_of(batch_sizes, offsets)
    if layout is not None:
        output, saved, input, grad_output, grad_saved = map(layout.pad, (output, saved, input, grad_output, grad_saved))
        keep_h, keep_c = map(layout.pad, (steps.keep_h, steps.keep_c))
        steps = steps._replace(lengths=layout.lengths, keep_h=keep_h, keep_c=keep_c)
    elif steps.lengths is not None and input is not None:
        input = without_padding(input, steps.lengths)
    flat = folded(steps, cell, weight_hh, output.shape[1])
    given = dict(cell=cell, **of_weights, **flat._asdict(), reverse=reverse, grad_clip=grad_clip)
    of_gates = needs["input"] or needs["weight_ih"] or needs["bias_ih"]
    wanted = {name for name in FORWARD_WEIGHTS if needs[name]}
    wanted |= {"gates_ih"} if of_gates else set()
    wanted |= {"h_0", "c_0"} if needs["h_0"] or needs["c_0"] else set()
    wanted |= {name for name in ("reset_h", "reset_c") if states[name] is not None}
    of_results = (grad_output, *(None if g is None else fold(g) for g in (grad_h_n, grad_c_n)), grad_saved)
    pulled = pull_forward(given, (output, saved), wanted, of_results)
    found: dict[str, Tensor | None] = {name: pulled.get(name) for name in GRADIENTS if name in wanted}
    for name in ("h_0", "c_0", "reset_h", "reset_c"):
        x = found.get(name)
        if x is not None and x.dim() > 1:
            found[name] = x.reshape(x.shape[0], D, x.shape[1] // D).transpose(0, 1)
    grad_gates = pulled.get("gates_ih")
    if grad_gates is not None:
        T, B, Gh = grad_gates.shape
        rows = grad_gates.reshape(T * B, Gh)
        if needs["input"]:
            assert weight_ih is not None
            grad_input = product(rows, weight_ih.flatten(0, 1)).view(T, B, weight_ih.shape[2])
            found["input"] = grad_input if layout is None else layout.pack(grad_input)
        if needs["weight_ih"]:
            assert input is not None
            if input.dim() == 2:
                assert weight_ih is not None
                I = weight_ih.shape[2]  # noqa: E741
                of_tokens = torch.ops.aten.embedding_dense_backward(grad_gates, input.long(), I, -1, False)
                found["weight_ih"] = of_tokens.reshape(I, D, Gh // D).permute(1, 2, 0)
            else:
                I = input.shape[2]  # noqa: E741
                found["weight_ih"] = transposed_product(rows, input.reshape(T * B, I)).view(D, Gh // D, I)
        if needs["bias_ih"]:
            of_bias_hh = found.get("bias_hh")
            if of_bias_hh is None or CELLS[cell].separate_gates_hh:
                found["bias_ih"] = rows.sum(0).view(D, Gh // D)
            else:
                found["bias_ih"] = of_bias_hh.clone()  # equal; a copy, for both become somebody's .grad
    return tuple(found.get(name) for name in GRADIENTS)


def second_derivative(
    cell: str,
    grads: Grads,
    input: Tensor,
    weights: Mapping[str, Sequence[Tensor]],
    states: Mapping[str, Tensor | None],
    batch_sizes: Tensor | None,
    offsets: Tensor | None,
    reverse: list[bool],
    directions: Grads,
) -> tuple[Tensor, ...]:
    """The derivative of a layer's backward, of ops that have derivatives and rules for vmap.

    grads: of output, h_n, c_n and cells. directions: the cotangents of GRADIENTS, weights' [D, ...]. Returns the
    gradients of the input, of each direction's weights, of the states and of grads, of each of them that is there.
    """
    of_states = [name for name in ("h_0", "c_0", "reset_h", "reset_c") if states[name] is not None]
    slots = [("input", 0), *((k, d) for k in LayerWeights._fields for d in range(len(weights[k])))]
    slots += [(name, 0) for name in of_states]
    leaves = [input, *(x for k in LayerWeights._fields for x in weights[k]), *(states[name] for name in of_states)]
    given = [i for i, grad in enumerate(grads) if grad is not None]
    along = dict(zip(GRADIENTS, directions, strict=True))
    asked = [i for i, (name, _) in enumerate(slots) if along[name] is not None]
    layout = layout_of(batch_sizes, offsets)

    def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
        placed = dict(zip(slots, leaves, strict=True))
        of_weights = [LayerWeights(*(placed.get((k, d)) for k in LayerWeights._fields)) for d in range(len(reverse))]  # type: ignore[arg-type]
        start = LayerStates(**(dict(states) | {name: placed[name, 0] for name in of_states}))
        x = placed["input", 0]
        if layout is not None:
            keep_h, keep_c = map(layout.pad, (start.keep_h, start.keep_c))
            x, start = layout.pad(x), start._replace(lengths=layout.lengths, keep_h=keep_h, keep_c=keep_c)
        call = LayerCall(cell, x, of_weights, start, reverse=tuple(reverse), all_states=grads[3] is not None)
        results = layer(call)
        if layout is not None:
            of_steps = {k: y for k, y in results._asdict().items() if k in ("output", "cells") and y.numel()}
            results = results._replace(**{k: layout.pack(y) for k, y in of_steps.items()})
        return tuple(results[i] for i in given)

    def backward(*args: Tensor) -> tuple[Tensor, ...]:
        pulled = torch.func.vjp(forward, *args[: len(leaves)])[1](args[len(leaves) :])
        return tuple(pulled[i] for i in asked)

    cotangents = []
    for name, d in (slots[i] for i in asked):
        x = along[name]
        assert x is not None
        cotangents.append(x[d] if name in LayerWeights._fields else x)
    pull = torch.func.vjp(backward, *leaves, *(grads[i] for i in given))[1]  # type: ignore[misc]
    return tuple(pull(tuple(cotangents)))


_C.set_composed(layer_backward, second_derivative)
