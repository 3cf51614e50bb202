"""What callers pass, checked before anything runs: errors name the caller's arguments, the expected and the actual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import heads
from .ops import CELLS, weight_sizes
from .records import LayerWeights, States
from .transforms import is_overloaded

TOKENS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def is_tensor_like(x: Any) -> bool:
    return isinstance(x, Tensor) or hasattr(x, "__torch_function__")


def given_states(cell: str, name: str, state: Any) -> States:
    """A state as callers pass it, a tensor or of a cell with several states a tuple, as a tuple."""
    count = CELLS[cell].states
    states = (state,) if count == 1 else state
    if isinstance(states, (tuple, list)) and len(states) == count and all(map(is_tensor_like, states)):
        return tuple(states)
    names = ", ".join("hcnm"[:count])
    wanted = "a tensor" if count == 1 else f"{'a pair' if count == 2 else 'a tuple'} of tensors ({names})"
    raise TypeError(f"{name}: expected {wanted}, got {kind_of(state)}")


def kind_of(x: Any) -> str:
    got = type(x).__name__
    return f"{got} of {[type(y).__name__ for y in x]}" if isinstance(x, (tuple, list)) else got


def parts_of(name: str, states: States) -> list[tuple[str, Tensor]]:
    """The tensors of a state as a caller would name them."""
    return [(f"{name}[{i}]" if len(states) > 1 else name, x) for i, x in enumerate(states)]


def given_weights(weights: Any) -> list[list[LayerWeights]]:
    """``weights[layer][direction]`` as callers pass it: a plain tuple or list stands for the LayerWeights of it."""

    def items(name: str, x: Any, wanted: str) -> Sequence[Any]:
        if not isinstance(x, (tuple, list)) or isinstance(x, LayerWeights) or not x:
            raise TypeError(f"{name}: expected {wanted}, got {kind_of(x)}")
        return x

    layers = items("weights", weights, "weights[layer][direction], a list of layers")
    found: list[list[LayerWeights]] = []
    for i, layer in enumerate(layers):
        directions = items(f"weights[{i}]", layer, "a list of one or two directions' LayerWeights")
        count = (1, 2) if i == 0 else (len(found[0]),)
        if len(directions) not in count:
            raise ValueError(f"weights[{i}]: expected {' or '.join(map(str, count))} directions, got {len(directions)}")
        found.append([given_layer_weights(f"weights[{i}][{d}]", w) for d, w in enumerate(directions)])
    return found


def given_layer_weights(name: str, weights: Any) -> LayerWeights:
    if isinstance(weights, LayerWeights):
        return weights
    good = isinstance(weights, (tuple, list)) and 2 <= len(weights) <= len(LayerWeights._fields)
    if not good or not all(x is None or is_tensor_like(x) for x in weights):
        fields = ", ".join(LayerWeights._fields)
        raise TypeError(f"{name}: expected LayerWeights or a tuple of {fields}, got {kind_of(weights)}")
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
    return not input.is_floating_point() and input.dtype in TOKENS and input.dim() < 3


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
    may_have_heads: bool = False,
) -> None:
    """Do all of them fit the input and each other? The first one says what H and R are, and with tokens I and dtype."""
    info, first = CELLS[cell], weights[0][0]
    for field, x in (*zip(LayerWeights._fields[:2], first[:2], strict=True), ("weight_hr", first.weight_hr)):
        if field == "weight_hr" and x is None:
            continue
        dims = (2, 3) if field == "weight_hh" and may_have_heads else (2,)
        if not is_tensor_like(x) or x.dim() not in dims:  # type: ignore[union-attr]
            got = list(x.shape) if is_tensor_like(x) else type(x).__name__  # type: ignore[union-attr]
            wanted = "2 dimensions" + (", or 3 with heads" if len(dims) > 1 else "")
            raise RuntimeError(f"{name_of(0, 0, field)}: expected a tensor of {wanted}, got {got}")
    if first.weight_hr is not None and info.states != 2:
        raise RuntimeError(f"{name_of(0, 0, 'weight_hr')}: expected None, for only an LSTM has it, got a tensor")
    if first.params is not None and not info.params:
        raise RuntimeError(f"{name_of(0, 0, 'params')}: expected None for cell '{cell}', got a tensor")
    N, (R, H) = heads.count(first), first.widths
    if N and first.weight_hr is not None:
        raise RuntimeError(f"{name_of(0, 0, 'weight_hr')}: expected None with heads, got a tensor")
    if N and cell.endswith("_norm"):
        raise RuntimeError(f"{name_of(0, 0, 'weight_hh')}: expected 2 dimensions with layer norm, got heads")
    if R == 0 or H == 0:
        raise RuntimeError(f"{name_of(0, 0, 'weight_hh')}: expected sizes above 0, got {list(first.weight_hh.shape)}")
    width = first.weight_ih.shape[1] if tokens else input.shape[-1]
    other, whose = (first.weight_ih, name_of(0, 0, "weight_ih")) if tokens else (input, "input")
    for i, layer in enumerate(weights):
        sizes = weight_sizes(cell, H, R, width)
        if N:
            sizes["weight_hh"] = N, info.gates * H // N, H // N
        shapes = sizes.values()
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
    may_have_heads: bool = False,
) -> None:
    """After a call of a module has failed: raises in the caller's names if a parameter is what does not fit.

    A good call pays nothing for it. What has a ``__torch_function__`` of its own may know no shapes to look at.
    """
    if not is_overloaded(input, *(x for layer in weights for w in layer for x in w)):
        check_weights(cell, input, weights, are_tokens(input), name_of, may_have_heads)


def check_features(input: Any, dims: int, letters: str, token_input: bool) -> None:
    if not is_tensor_like(input):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    if token_input and are_tokens(input) and input.dim() == dims - 1:
        return
    if input.dim() != dims:
        tokens = ", or tokens (T, B)" if token_input else ""
        raise RuntimeError(f"input: expected {dims} dimensions {letters}{tokens}, got {list(input.shape)}")
    if not (input.is_floating_point() or input.is_complex()):
        raise RuntimeError(f"input: expected a float dtype, got {input.dtype}")


def check_steps(input: Tensor) -> None:
    if input.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
