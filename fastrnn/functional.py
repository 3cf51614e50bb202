"""Recurrent networks as functions of their weights.

Everything that is not sequential happens here, in ordinary ATen: the input projection of all steps and directions
is one product (but in plain eager calls on a CPU, where ``layer.py`` has it inside its op), directions are groups of
one call of the op, layers and dropout come around it. See ``modules.py`` for the same with parameters.

Letters: T steps, B batch, I input features, H hidden units, R output width of a direction (H, or the projected size),
D directions, L layers, G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import _C, fallback, onnx_nodes, per_sample, reference, segments
from . import layer as fused
from .ops import CELLS, recurrent_forward
from .products import is_overloaded, is_plain, linear


class LayerWeights(NamedTuple):
    """The parameters of one layer in one direction, with torch.nn's names, shapes and gate order."""

    weight_ih: Tensor  # [G*H, I]
    weight_hh: Tensor  # [G*H, R]
    bias_ih: Tensor | None = None  # [G*H]
    bias_hh: Tensor | None = None  # [G*H]
    weight_hr: Tensor | None = None  # [R, H], LSTM only


States = tuple[Tensor, ...]  # (h,) or (h, c)
_TOKENS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def lstm(
    input: Tensor,
    state: tuple[Tensor, Tensor] | None,
    weights: Sequence[Sequence[LayerWeights]],
    *,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    token_input: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Multi-layer, uni- or bidirectional LSTM (Hochreiter & Schmidhuber 1997; equations of ``torch.nn.LSTM``).

    Args:
        input: [T, B, I], float32, float64, bfloat16 or float16.
        state: ``(h_0, c_0)``, [L*D, B, R] and [L*D, B, H]; ``None`` for zeros.
        weights: ``weights[layer][direction]``; one direction, or two of which the second runs in reverse. Each is a
            LayerWeights, or a plain tuple or list of its tensors in that order.
        dropout: probability that an output of any layer but the last is zeroed, when ``training``.
        lengths: integer [B]: row b has the steps 0 .. lengths[b] - 1. The output is 0 behind them, and the final state
            is the one after the last of them (the initial one where there are none).
        resets: bool [T, B]: where True at t, nothing is carried between steps t-1 and t, in either direction; the state
            is ``reset_state`` instead.
        reset_state: like ``state``; ``None`` for zeros. Needs ``resets``.
        token_input: integer input [T, B] is tokens in [0, I): the rows of a one-hot input, which is never made.

    Returns:
        output [T, B, D*R] and ``(h_n, c_n)``, shaped like ``state``.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; T is 0.
        ValueError, TypeError: another kind of object; lengths out of range or not integers; resets not bool.
        IndexError: a token out of range, on the CPU.
    """
    output, states = _checked(
        "lstm", input, state, weights, dropout, training, lengths, resets, reset_state, token_input
    )
    return output, (states[0], states[1])


def gru(
    input: Tensor,
    state: Tensor | None,
    weights: Sequence[Sequence[LayerWeights]],
    *,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    token_input: bool = False,
) -> tuple[Tensor, Tensor]:
    """Multi-layer, uni- or bidirectional GRU (Cho et al. 2014; equations of ``torch.nn.GRU``).

    Arguments, result and errors as in :func:`lstm`, with the state a single tensor [L*D, B, H].
    """
    output, states = _checked(
        "gru", input, state, weights, dropout, training, lengths, resets, reset_state, token_input
    )
    return output, states[0]


def rnn(
    input: Tensor,
    state: Tensor | None,
    weights: Sequence[Sequence[LayerWeights]],
    *,
    nonlinearity: str = "tanh",
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    token_input: bool = False,
) -> tuple[Tensor, Tensor]:
    """Multi-layer, uni- or bidirectional Elman network (Elman 1990), ``nonlinearity`` 'tanh' or 'relu'.

    Arguments, result and errors as in :func:`lstm`, with the state a single tensor [L*D, B, H].
    """
    cell = _elman(nonlinearity)
    output, states = _checked(cell, input, state, weights, dropout, training, lengths, resets, reset_state, token_input)
    return output, states[0]


def lstm_cell(input: Tensor, state: tuple[Tensor, Tensor], weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: input [B, I], state ``(h, c)`` of [B, H] each; returns the state after the step."""
    h, c = _checked_cell("lstm", input, state, weights)
    return h, c


def gru_cell(input: Tensor, state: Tensor, weights: LayerWeights) -> Tensor:
    """One step of a GRU: input [B, I], state [B, H]; returns the state after the step."""
    return _checked_cell("gru", input, state, weights)[0]


def rnn_cell(input: Tensor, state: Tensor, weights: LayerWeights, nonlinearity: str = "tanh") -> Tensor:
    """One step of an Elman network: input [B, I], state [B, H]; returns the state after the step."""
    return _checked_cell(_elman(nonlinearity), input, state, weights)[0]


# ---- the door: what callers pass, checked before anything runs; modules.py uses it too ----


def is_tensor_like(x: Any) -> bool:
    return isinstance(x, Tensor) or hasattr(x, "__torch_function__")


def given_states(cell: str, name: str, state: Any) -> States:
    """A state as callers pass it, a tensor or for an LSTM a pair, as a tuple."""
    count = CELLS[cell].states
    states = (state,) if count == 1 else state
    if isinstance(states, (tuple, list)) and len(states) == count and all(map(is_tensor_like, states)):
        return tuple(states)
    wanted = "a tensor" if count == 1 else "a pair of tensors (h, c)"
    raise TypeError(f"{name}: expected {wanted}, got {_kind_of(state)}")


def _kind_of(x: Any) -> str:
    got = type(x).__name__
    return f"{got} of {[type(y).__name__ for y in x]}" if isinstance(x, (tuple, list)) else got


def parts_of(name: str, states: States) -> list[tuple[str, Tensor]]:
    """The tensors of a state as a caller would name them."""
    return [(f"{name}[{i}]" if len(states) > 1 else name, x) for i, x in enumerate(states)]


def given_weights(weights: Any) -> list[list[LayerWeights]]:
    """``weights[layer][direction]`` as callers pass it: a plain tuple or list stands for the LayerWeights of it."""

    def items(name: str, x: Any, wanted: str) -> Sequence[Any]:
        if not isinstance(x, (tuple, list)) or isinstance(x, LayerWeights) or not x:
            raise TypeError(f"{name}: expected {wanted}, got {_kind_of(x)}")
        return x

    layers = items("weights", weights, "weights[layer][direction], a list of layers")
    found: list[list[LayerWeights]] = []
    for i, layer in enumerate(layers):
        directions = items(f"weights[{i}]", layer, "a list of one or two directions' LayerWeights")
        count = (1, 2) if i == 0 else (len(found[0]),)
        if len(directions) not in count:
            raise ValueError(f"weights[{i}]: expected {' or '.join(map(str, count))} directions, got {len(directions)}")
        found.append([_layer_weights(f"weights[{i}][{d}]", w) for d, w in enumerate(directions)])
    return found


def _layer_weights(name: str, weights: Any) -> LayerWeights:
    if isinstance(weights, LayerWeights):
        return weights
    good = isinstance(weights, (tuple, list)) and 2 <= len(weights) <= len(LayerWeights._fields)
    if not good or not all(x is None or is_tensor_like(x) for x in weights):
        fields = ", ".join(LayerWeights._fields)
        raise TypeError(f"{name}: expected LayerWeights or a tuple of {fields}, got {_kind_of(weights)}")
    return LayerWeights(*weights)


def dtypes_fit(a: torch.dtype, b: torch.dtype) -> bool:
    """Are they one, or both of those that the autocast in force casts?"""
    if a == b:
        return True
    cast = a.is_floating_point and b.is_floating_point and torch.float64 not in (a, b)
    return cast and torch._C._is_any_autocast_enabled()


def check_fits(name: str, x: Tensor, other: Tensor, whose: str) -> None:
    """Dtype and device of an argument are those of another."""
    if not dtypes_fit(x.dtype, other.dtype):
        raise RuntimeError(f"{name}: expected {other.dtype} (that of {whose}), got {x.dtype}")
    if x.device != other.device:
        raise RuntimeError(f"{name}: expected device {other.device} (that of {whose}), got {x.device}")


def are_tokens(input: Tensor) -> bool:
    """Where tokens are taken, does it hold some, [T, B] or fewer dimensions? Else it is features of a wrong dtype."""
    return not input.is_floating_point() and input.dtype in _TOKENS and input.dim() < 3


def given_lengths(lengths: Any, input: Tensor) -> Tensor:
    """lengths as int64 on the device of input [T, B, I] or [T, B]."""
    B = input.shape[1]
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected an integer tensor [{B}], got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected an integer dtype, got {lengths.dtype}")
    if tuple(lengths.shape) != (B,):
        raise RuntimeError(f"lengths: expected [{B}] (batch), got {list(lengths.shape)}")
    if lengths.is_meta and not input.is_meta:
        raise RuntimeError(f"lengths: expected a device with data, as {input.device}, got meta")
    # Pinned memory would be read later, when the caller may have written to it again.
    waits = not lengths.is_cpu or (input.is_cuda and lengths.is_pinned())
    return lengths.to(input.device, torch.int64, non_blocking=not waits)


def check_values_of(lengths: Tensor, T: int) -> None:
    """For what looks at lengths before a kernel does, which says the same."""
    wrong = lengths[(lengths < 0) | (lengths > T)]
    if wrong.numel():
        raise ValueError(f"lengths: expected values in [0, {T}], got {int(wrong[0])}")


def check_resets(resets: Any, reset_state: Any, expected: Sequence[int], device: torch.device) -> None:
    if resets is None:
        if reset_state is not None:
            raise ValueError("reset_state: expected None without resets, got a state")
        return
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets: expected a bool tensor {list(expected)}, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise TypeError(f"resets: expected dtype torch.bool, got {resets.dtype}")
    if tuple(resets.shape) != tuple(expected):
        raise RuntimeError(f"resets: expected {list(expected)}, got {list(resets.shape)}")
    if resets.device != device:
        raise RuntimeError(f"resets: expected device {device} (that of input), got {resets.device}")


def check_weights(
    cell: str,
    input: Tensor,
    weights: Sequence[Sequence[LayerWeights]],
    tokens: bool,
    name_of: Callable[[int, int, str], str] = lambda layer, direction, field: f"weights[{layer}][{direction}].{field}",
) -> None:
    """Do all of them fit the input and each other? The first one says what H and R are, and with tokens I and dtype."""
    info, first = CELLS[cell], weights[0][0]
    for field, x in (*zip(LayerWeights._fields[:2], first[:2], strict=True), ("weight_hr", first.weight_hr)):
        if field == "weight_hr" and x is None:
            continue
        if not is_tensor_like(x) or x.dim() != 2:  # type: ignore[union-attr]
            got = list(x.shape) if is_tensor_like(x) else type(x).__name__  # type: ignore[union-attr]
            raise RuntimeError(f"{name_of(0, 0, field)}: expected a tensor of 2 dimensions, got {got}")
    if first.weight_hr is not None and info.states == 1:
        raise RuntimeError(f"{name_of(0, 0, 'weight_hr')}: expected None, for only an LSTM has it, got a tensor")
    R = first.weight_hh.shape[1]
    H = R if first.weight_hr is None else first.weight_hr.shape[1]
    if R == 0 or H == 0:
        raise RuntimeError(f"{name_of(0, 0, 'weight_hh')}: expected sizes above 0, got {list(first.weight_hh.shape)}")
    width = first.weight_ih.shape[1] if tokens else input.shape[-1]
    other, whose = (first.weight_ih, name_of(0, 0, "weight_ih")) if tokens else (input, "input")
    for i, layer in enumerate(weights):
        shapes = ((info.gates * H, width), (info.gates * H, R), (info.gates * H,), (info.gates * H,), (R, H))
        for d, w in enumerate(layer):
            for field, x, shape, as_first in zip(LayerWeights._fields, w, shapes, first, strict=True):
                name = name_of(i, d, field)
                if x is not None and not is_tensor_like(x):
                    raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
                if (x is None) != (as_first is None):
                    wanted, got = ("None", "a tensor") if as_first is None else ("a tensor", "None")
                    raise RuntimeError(f"{name}: expected {wanted}, as in the first layer and direction, got {got}")
                if x is None:
                    continue
                if tuple(x.shape) != shape:
                    raise RuntimeError(f"{name}: expected {list(shape)}, got {list(x.shape)}")
                check_fits(name, x, other, whose)
                if tokens and x.device != input.device:
                    raise RuntimeError(f"{name}: expected device {input.device} (that of input), got {x.device}")
        width = len(layer) * R


def explain(
    cell: str,
    input: Tensor,
    weights: Sequence[Sequence[LayerWeights]],
    name_of: Callable[[int, int, str], str],
) -> None:
    """After a call of a module has failed: raises in the caller's names if a parameter is what does not fit.

    A good call pays nothing for it. What has a ``__torch_function__`` of its own may know no shapes to look at.
    """
    if not is_overloaded(input, *(x for layer in weights for w in layer for x in w)):
        check_weights(cell, input, weights, are_tokens(input), name_of)


def _checked(
    cell: str,
    input: Tensor,
    state: Any,
    weights: Sequence[Sequence[LayerWeights]],
    dropout: float,
    training: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_state: Any,
    token_input: bool,
) -> tuple[Tensor, States]:
    """What the public forms share: all checks, then the layers."""
    _check_features(input, 3, "(T, B, I)", token_input)
    _check_steps(input)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a number in [0, 1], got {dropout!r}")
    T, B = input.shape[:2]
    tokens, weights = input.dim() == 2, given_weights(weights)
    check_weights(cell, input, weights, tokens)
    check_resets(resets, reset_state, (T, B), input.device)
    w = weights[0][0]
    L, sizes = len(weights) * len(weights[0]), (w.weight_hh.shape[1], w.weight_hh.shape[0] // CELLS[cell].gates)

    def states(name: str, state: Any) -> States | None:
        if state is None:
            return None
        found = given_states(cell, name, state)
        for (part, x), size in zip(parts_of(name, found), sizes, strict=False):
            if list(x.shape) != [L, B, size]:
                expected = f"{[L, B, size]} (layers * directions, batch, width)"
                raise RuntimeError(f"{part}: expected {expected}, got {list(x.shape)}")
            check_fits(part, x, *((w.weight_ih, "weights[0][0].weight_ih") if tokens else (input, "input")))
        return found

    start, fresh = states("state", state), states("reset_state", reset_state)
    if lengths is not None:
        lengths = given_lengths(lengths, input)
    output, finals, _ = _network(cell, input, start, weights, dropout, training, lengths, resets, fresh)
    return own(output), tuple(map(own, finals))


def own(x: Any) -> Any:
    """A result as a tensor that is no view, on the same memory; None as None. A view could not be detached in place."""
    return x if torch.compiler.is_compiling() else _C.without_view(x)


def _checked_cell(cell: str, input: Tensor, state: Any, weights: Any) -> States:
    _check_features(input, 2, "(B, I)", False)
    w = _layer_weights("weights", weights)
    check_weights(cell, input, [[w]], False, lambda layer, direction, field: f"weights.{field}")
    states = given_states(cell, "state", state)
    sizes = (w.weight_hh.shape[1], w.weight_hh.shape[0] // CELLS[cell].gates)
    for (part, x), size in zip(parts_of("state", states), sizes, strict=False):
        if list(x.shape) != [input.shape[0], size]:
            raise RuntimeError(f"{part}: expected {[input.shape[0], size]} (batch, width), got {list(x.shape)}")
        check_fits(part, x, input, "input")
    return _cell(cell, input, states, w)


def _check_features(input: Any, dims: int, letters: str, token_input: bool) -> None:
    if not is_tensor_like(input):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    if token_input and are_tokens(input) and input.dim() == dims - 1:
        return
    if input.dim() != dims:
        tokens = ", or tokens (T, B)" if token_input else ""
        raise RuntimeError(f"input: expected {dims} dimensions {letters}{tokens}, got {list(input.shape)}")
    if not (input.is_floating_point() or input.is_complex()):
        raise RuntimeError(f"input: expected a float dtype, got {input.dtype}")


def _check_steps(input: Tensor) -> None:
    if input.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


# ---- the layers ----


def _elman(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    return f"rnn_{nonlinearity}"


def _cell(cell: str, input: Tensor, states: States, weights: LayerWeights) -> States:
    if fused.fits(input, [weights], states, ()):
        _, h_n, c_n, _ = fused.layer(cell, input[None], [weights], states, None, None, None)
    elif per_sample.asked_for([weights]):
        _, h_n, c_n, _ = per_sample.layer(cell, input[None], [weights], states, None, None, None, 0.0, False, _project)
    elif _is_for_others(*weights, input, *states):
        return fallback.step(cell, input, states, weights)
    elif cell in ("lstm", "gru") and torch.is_autocast_enabled("cpu") and input.is_cpu:
        # torch.nn's add the state to what autocast's products give, and so keep a wider one's dtype.
        gates_ih = linear(input, weights.weight_ih, weights.bias_ih)[None]
        dtype = torch.promote_types(gates_ih.dtype, states[-1].dtype)
        with torch.autocast("cpu", enabled=False):
            cast = LayerWeights(*(None if x is None else x.to(dtype) for x in weights))  # type: ignore[arg-type]
            after = [x.to(dtype) for x in states]
            _, h_n, c_n, _ = _recurrence(cell, gates_ih.to(dtype), [cast], tuple(after), None, None, None)
    else:
        # F.linear on CUDA: torch.nn's cells obey its switch for TF32, and not that of torch.nn's layers
        project = F.linear if input.is_cuda else linear
        gates_ih = project(input, weights.weight_ih, weights.bias_ih)[None]
        _, h_n, c_n, _ = _recurrence(cell, gates_ih, [weights], states, None, None, None)
    return h_n, c_n


def in_autocast_dtype(x: Any) -> Any:
    """A tensor of the other half type in the dtype of the autocast in force; torch's promotion knows only that one."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.bfloat16, torch.float16):
        return x
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _is_for_others(weight: Tensor, *others: Tensor | None) -> bool:
    """Has a call to be made of torch's ops?"""
    return fallback.is_traced() or fallback.is_exported_to_onnx() or not fallback.has_kernels(weight, *others)


def _recurrence(
    cell: str,
    gates_ih: Tensor,
    weights: Sequence[LayerWeights],
    states: States,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_states: States | None,
    save: bool = False,
    grad_clip: float = 0.0,
    reverse: list[bool] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, or its reference, with one group a direction. gates_ih [T, B, D*G*H]; states [B, D*n]."""

    def stacked(name: str) -> Tensor | None:
        parts = [getattr(w, name) for w in weights]
        if parts[0] is None:
            return None
        return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)

    h, *c = states
    fresh = reset_states or ()
    for_others = _is_for_others(gates_ih)
    if for_others and (fallback.is_traced() or fallback.is_exported_to_onnx()):
        gates_ih = fallback.of_fixed_steps(gates_ih)
    given: tuple[Any, ...] = (
        cell,
        gates_ih,
        stacked("weight_hh"),
        stacked("bias_hh"),
        stacked("weight_hr"),
        h,
        c[0] if c else None,
        lengths,
        resets,
        fresh[0] if fresh else None,
        fresh[1] if len(fresh) > 1 else None,
        [direction == 1 for direction in range(len(weights))] if reverse is None else reverse,
    )
    clip = (grad_clip,) if grad_clip else ()
    if for_others:
        return reference.forward(*given, *clip)
    return recurrent_forward(*given, save, *clip)


def _checkpointed(
    cell: str,
    input: Tensor,
    weights: Sequence[LayerWeights],
    states: States,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_states: States | None,
    grad_clip: float,
    every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer by segments of `every` steps, each a checkpoint of torch's: output, h_n, c_n."""

    def versions(w: LayerWeights) -> list[int]:
        read = (input, *w, *states, lengths, resets, *(reset_states or ()))
        return [x._version for x in read if x is not None and not x.is_inference()]

    def run(
        part: Tensor, s: segments.Segment, w: LayerWeights, walk: segments.Walk, before: list[int]
    ) -> tuple[Tensor, ...]:
        if versions(w) != before:  # a checkpoint saves no tensors, so nobody else would see it
            raise RuntimeError(
                "recompute: expected the input, states and weights as they were in the forward pass, "
                "but one of them has been modified by an inplace operation since"
            )
        gates_ih = _project(part, [w])
        masks = s.lengths, s.resets, walk.fresh
        return _recurrence(cell, gates_ih, [w], s.entry, *masks, False, grad_clip, [walk.reverse])[:3]

    parts = input.split(every)  # one gradient for all, where a slice each would have one of full size
    outputs, finals = [], []
    for direction, w in enumerate(weights):
        walk = segments.Walk(direction == 1, input.shape[0], states, lengths, resets, reset_states, len(weights), every)
        found = {}
        for segment in walk:
            part = parts[segment.begin // every]
            found[segment.begin], *after = checkpoint(
                run, part, segment, w, walk, versions(w), use_reentrant=False, preserve_rng_state=False
            )
            walk.leave(after[: len(states)])
        outputs.append(torch.cat([found[t] for t in sorted(found)]))
        finals.append(walk.states)
    h_n, *c_n = (torch.cat(each, 1) for each in zip(*finals, strict=True))
    return torch.cat(outputs, -1), h_n, c_n[0] if c_n else h_n


def _network(
    cell: str,
    input: Tensor,
    states: States | None,
    weights: Sequence[Sequence[LayerWeights]],
    dropout: float,
    training: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_states: States | None,
    all_states: bool = False,
    batch_sizes: Tensor | None = None,
    grad_clip: float = 0.0,
    recompute: int = 0,
) -> tuple[Tensor, States, Tensor | None]:
    """output, the final states and, for an LSTM with ``all_states``, every c of the last layer [T, B, D*H].

    The latter is read from what the recurrence keeps for its backward anyway, so it has derivatives of every order.
    Where a layer is no single op, a gradient that reaches it takes the composite (see ``saved`` in autograd.py).

    With batch_sizes the input is packed, [N, I], and every layer must fit (``layer.fits``).
    """
    if batch_sizes is None:
        _check_steps(input)
    if torch._C._is_any_autocast_enabled():
        input = in_autocast_dtype(input)
        weights = [[LayerWeights(*map(in_autocast_dtype, w)) for w in of_directions] for of_directions in weights]
        states, reset_states = (None if s is None else tuple(map(in_autocast_dtype, s)) for s in (states, reset_states))
    B = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
    D = len(weights[0])
    all_weights = [x for layer in weights for w in layer for x in w]
    marked = per_sample.asked_for([all_weights])
    if not marked and _is_for_others(weights[0][0].weight_ih, input, *all_weights, *(states or ())):
        tensors = cell, input, states, weights
        if fallback.is_exported_to_onnx():
            if resets is None and not all_states and onnx_nodes.has_nodes(weights):
                return *onnx_nodes.network(*tensors, dropout, training, lengths), None
        elif lengths is None and resets is None and not (all_states or grad_clip or are_tokens(input)):
            return *fallback.network(*tensors, dropout, training), None
    if recompute and lengths is not None and is_plain(lengths) and segments.can_checkpoint():
        check_values_of(lengths, input.shape[0])  # a segment's kernel sees what lies in it alone

    def of_layer(states: States | None, layer: int) -> States | None:
        return None if states is None else tuple(_fold(s[layer * D : (layer + 1) * D]) for s in states)

    finals: list[States] = []
    output, cells = input, None
    for layer, layer_weights in enumerate(weights):
        if layer > 0 and dropout > 0 and training:
            output = F.dropout(output, dropout, training=True)
        start, fresh = of_layer(states, layer), of_layer(reset_states, layer)
        if start is None:
            first = layer_weights[0]
            widths = (first.weight_hh.shape[1], first.weight_hh.shape[0] // CELLS[cell].gates)
            start = tuple(output.new_zeros(B, D * n, dtype=first.weight_hh.dtype) for n in widths[: CELLS[cell].states])
        every_c = all_states and layer == len(weights) - 1
        fits = fused.fits(output, layer_weights, (*start, *(fresh or ())), (lengths, resets))
        if fits or batch_sizes is not None:
            given = (cell, output, layer_weights, start, lengths, resets, fresh, batch_sizes, grad_clip)
            if recompute and not every_c:
                output, h_n, c_n = segments.layer(*given, recompute)
            else:
                output, h_n, c_n, cells = fused.layer(*given, every_c)
        elif per_sample.asked_for(layer_weights):
            output, h_n, c_n, cells = per_sample.layer(
                cell, output, layer_weights, start, lengths, resets, fresh, grad_clip, every_c, _project
            )
        else:
            if layer == 0 and lengths is not None:
                output = fused.without_padding(output, lengths)
            if output.dim() == 2 and not CELLS[cell].separate_gates_hh:
                layer_weights = [_one_bias(w) for w in layer_weights]
            if recompute and not every_c and segments.can_checkpoint():
                output, h_n, c_n = _checkpointed(
                    cell, output, layer_weights, start, lengths, resets, fresh, grad_clip, recompute
                )
            else:
                gates_ih = _project(output, layer_weights)
                output, h_n, c_n, saved = _recurrence(
                    cell, gates_ih, layer_weights, start, lengths, resets, fresh, every_c, grad_clip
                )
            if every_c:
                cells = fused.every_c(cell, saved, D)
        finals.append(tuple(_unfold(s, D) for s in (h_n, c_n)[: CELLS[cell].states]))
    if len(finals) == 1:
        return output, finals[0], cells
    return output, tuple(torch.cat(each) for each in zip(*finals, strict=True)), cells


def _project(input: Tensor, weights: Sequence[LayerWeights]) -> Tensor:
    """W_ih x + b_ih for all steps and directions at once: [T, B, D*G*H], from [T, B, I] or tokens [T, B]."""
    if input.dim() == 2:
        parts = [
            _look_up(input, w.weight_ih) if w.bias_ih is None else _look_up(input, w.weight_ih) + w.bias_ih
            for w in weights
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if len(weights) == 1:
        return linear(input, weights[0].weight_ih, weights[0].bias_ih)
    biases = [w.bias_ih for w in weights if w.bias_ih is not None]
    return linear(input, torch.cat([w.weight_ih for w in weights]), torch.cat(biases) if biases else None)


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


def _fold(state: Tensor) -> Tensor:
    """[D, B, n] -> [B, D*n]"""
    return state[0] if state.shape[0] == 1 else state.transpose(0, 1).flatten(1)


def _unfold(state: Tensor, directions: int) -> Tensor:
    """[B, D*n] -> [D, B, n]"""
    if directions == 1:
        return state.unsqueeze(0)
    return state.unflatten(1, (directions, -1)).transpose(0, 1).contiguous()
