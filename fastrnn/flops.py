"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the ops: two for each multiply-add of their matrix
products, as it does for ATen's products, and nothing for what is done element by element.

A row is one step of one sequence. Packed sequences and lengths on the CPU count the rows that are there. Lengths that
cannot be read (on another device, or without data) count as full ones.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .imports import when_imported
from .ops import CELLS
from .products import is_plain


def _rows(steps: Tensor, h_0: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None, reverse: list[bool]) -> Any:
    """Rows of all groups, and those of them that no row comes before in their group's direction of time.

    steps: [T, B, ..] or, with batch_sizes, [N, ..].
    """
    P = len(reverse)
    if batch_sizes is not None:
        last = int(batch_sizes[-1]) if is_plain(batch_sizes) else h_0.shape[0]
        return P * steps.shape[0], sum(last if backwards else h_0.shape[0] for backwards in reverse)
    T, B = steps.shape[:2]
    if lengths is None or not is_plain(lengths):
        return P * T * B, P * B
    of_groups = lengths.expand(P, B) if lengths.dim() == 1 else lengths.t()
    first = sum(int((of_groups[p] == T if reverse[p] else of_groups[p] > 0).sum()) for p in range(P))
    return int(of_groups.sum()), first


def _recurrence(weight_hh: Tensor, weight_hr: Tensor | None) -> int:
    """Multiply-adds of a row."""
    _, Gh, R = weight_hh.shape
    return Gh * R + (0 if weight_hr is None else R * weight_hr.shape[2])


def _recurrent_forward(
    cell, gates_ih, weight_hh, bias_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c, reverse, save,
    grad_clip=0.0, out_val=None,
):  # fmt: skip
    rows, _ = _rows(gates_ih, h_0, lengths, None, reverse)
    return 2 * rows * _recurrence(weight_hh, weight_hr)


def _layer_forward(
    cell, input, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c,
    reverse, save, batch_sizes=None, out_val=None,
):  # fmt: skip
    rows, _ = _rows(input, h_0, lengths, batch_sizes, reverse)
    return 2 * rows * (weight_ih.shape[1] * weight_ih.shape[2] + _recurrence(weight_hh, weight_hr))


def _quantized_forward(
    cell, input, weight_ih, scale_ih, sum_ih, bias_ih, weight_hh, scale_hh, sum_hh, bias_hh, weight_hr, h_0, c_0,
    lengths, resets, reset_h, reset_c, reverse, out_val=None,
):  # fmt: skip
    rows, _ = _rows(input, h_0, lengths, None, reverse)
    R = h_0.shape[1] // len(reverse)
    h = R if weight_hr is None else weight_hr.shape[2]  # int8 weights lie in blocks, whose shape hides it
    return 2 * rows * (CELLS[cell].gates * h * (input.shape[2] + R) + (0 if weight_hr is None else R * h))


def _recurrent_backward(
    cell, grad_output, grad_h_n, grad_c_n, weight_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c,
    reverse, output, saved, initial=True, grad_clip=0.0, out_val=None,
):  # fmt: skip
    return 2 * _through_time(output, weight_hh, weight_hr, h_0, lengths, reset_h, reverse, None, initial)


def _through_time(
    output: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    h_0: Tensor,
    lengths: Tensor | None,
    reset_h: Tensor | None,
    reverse: list[bool],
    batch_sizes: Tensor | None,
    initial: bool,
) -> int:
    """Multiply-adds of the states' gradients. What a first row started from has one only where it is wanted."""
    rows, first = _rows(output, h_0, lengths, batch_sizes, reverse)
    unwanted = 0 if initial or reset_h is not None else first
    return rows * _recurrence(weight_hh, weight_hr) - unwanted * _recurrence(weight_hh, None)


def _layer_backward(
    cell, grad_output, grad_h_n, grad_c_n, input, weight_ih, weight_hh, h_0, c_0, lengths, resets, reset_h, reset_c,
    reverse, output, saved, wanted, batch_sizes=None, grad_clip=0.0, grad_cells=None, out_val=None,
):  # fmt: skip
    of_input, of_weight_ih, of_weight_hh, _, _, initial = wanted
    rows, _ = _rows(output, h_0, lengths, batch_sizes, reverse)
    _, Gh, R = weight_hh.shape
    I = (weight_ih if input is None else input).shape[-1] if of_input or of_weight_ih else 0  # noqa: E741
    products = rows * Gh * ((of_input + of_weight_ih) * I + of_weight_hh * R)
    return 2 * (products + _through_time(output, weight_hh, None, h_0, lengths, reset_h, reverse, batch_sizes, initial))


def _gemm(a, b, bias, transpose_a, transpose_b, out_val=None):
    return 2 * a.numel() * b.shape[0 if transpose_b else 1]


def _grouped_linear(input, weight, bias, out_val=None):
    return 2 * input.numel() * weight.shape[1]


def _grouped_outer(a, b, out_val=None):
    return 2 * a.numel() * b.shape[2]


FORMULAS: dict[str, Callable[..., int]] = {
    "recurrent_forward": _recurrent_forward,
    "recurrent_backward": _recurrent_backward,
    "layer_forward": _layer_forward,
    "layer_backward": _layer_backward,
    "quantized_forward": _quantized_forward,
    "gemm": _gemm,
    "grouped_linear": _grouped_linear,
    "grouped_outer": _grouped_outer,
}


def _register(flop_counter: ModuleType) -> None:
    for op, formula in FORMULAS.items():
        flop_counter.register_flop_formula(getattr(torch.ops.fastrnn, op), get_raw=True)(formula)


# Not imported here, for it imports triton where there is one.
when_imported("torch.utils.flop_counter", _register)
