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
from .ops import CELLS, named
from .records import GRADIENTS
from .transforms import is_plain

Given = dict[str, Any]  # an op's arguments by name


def _rows(steps: Tensor, given: Given) -> tuple[Any, Any]:
    """Rows of all groups, and those of them that no row comes before in their group's direction of time.

    steps: [T, B, ..] or, with batch_sizes or offsets, [N, ..].
    """
    lengths, batch_sizes, reverse = given["lengths"], given.get("batch_sizes"), given["reverse"]
    P, offsets = len(reverse), given.get("offsets")
    if offsets is not None:
        begun = int((offsets.diff() > 0).sum()) if is_plain(offsets) else steps.shape[0]
        return P * steps.shape[0], P * begun
    if batch_sizes is not None:
        first, last = (int(batch_sizes[at]) for at in (0, -1)) if is_plain(batch_sizes) else (steps.shape[0],) * 2
        return P * steps.shape[0], sum(last if backwards else first for backwards in reverse)
    T, B = steps.shape[:2]
    if lengths is None or not is_plain(lengths):
        return P * T * B, P * B
    of_groups = lengths.expand(P, B) if lengths.dim() == 1 else lengths.t()
    begun = sum(int((of_groups[p] == T if reverse[p] else of_groups[p] > 0).sum()) for p in range(P))
    return int(of_groups.sum()), begun


def _recurrence(weight_hh: Tensor, weight_hr: Tensor | None) -> int:
    """Multiply-adds of a row; weights of one group or of all, [P, ..]."""
    *_, Gh, R = weight_hh.shape
    return Gh * R + (0 if weight_hr is None else R * weight_hr.shape[-1])


def _first(group: list[Tensor]) -> Tensor | None:
    return group[0] if group else None


def _recurrent_forward(given: Given) -> int:
    rows, _ = _rows(given["gates_ih"], given)
    return 2 * rows * _recurrence(given["weight_hh"], given["weight_hr"])


def _layer_forward(given: Given) -> int:
    input, weight_ih = given["input"], given["weight_ih"][0]
    rows, _ = _rows(input, given)
    projection = weight_ih.numel() if input.is_floating_point() else 0  # tokens are looked up
    return 2 * rows * (projection + _recurrence(given["weight_hh"][0], _first(given["weight_hr"])))


def _quantized_forward(given: Given) -> int:
    input, weight_hr = given["input"], given["weight_hr"]
    rows, _ = _rows(input, given)
    R = given["h_0"].shape[1] // len(given["reverse"])
    h = R if weight_hr is None else weight_hr.shape[2]  # int8 weights lie in blocks, whose shape hides it
    of_row = CELLS[given["cell"]].gates * h * (input.shape[2] + R) + (0 if weight_hr is None else R * h)
    return 2 * rows * of_row


def _through_time(given: Given, weight_hh: Tensor, weight_hr: Tensor | None, initial: bool) -> int:
    """Multiply-adds of the states' gradients. What a first row started from has one only where it is wanted."""
    rows, first = _rows(given["output"], given)
    unwanted = 0 if initial or given["reset_h"] is not None else first
    return rows * _recurrence(weight_hh, weight_hr) - unwanted * _recurrence(weight_hh, None)


def _recurrent_backward(given: Given) -> int:
    return 2 * _through_time(given, given["weight_hh"], given["weight_hr"], given["initial"])


def _jvp(formula: Callable[[Given], int]) -> Callable[[Given], int]:
    """A product of dual numbers is two products, and three where the slopes of both factors are given."""

    def of_call(given: Given) -> int:
        weights = given["tangent_weight_hh"], given["tangent_weight_hr"]
        return formula(given) * (2 if all(x is None for x in weights) else 3)

    return of_call


def _layer_backward(given: Given) -> int:
    needed = dict(zip(GRADIENTS, given["needed"], strict=True))
    weight_hh, weight_hr, input = given["weight_hh"][0], _first(given["weight_hr"]), given["input"]
    rows, _ = _rows(given["output"], given)
    Gh, R = weight_hh.shape
    I = 0  # noqa: E741
    if input is None or input.is_floating_point():
        I = input.shape[-1] if input is not None else given["weight_ih"][0].shape[1] if needed["input"] else 0  # noqa: E741
    products = rows * Gh * ((needed["input"] + needed["weight_ih"]) * I + needed["weight_hh"] * R)
    if needed["weight_hr"] and weight_hr is not None:
        products += rows * weight_hr.numel()
    return 2 * (products + _through_time(given, weight_hh, weight_hr, needed["h_0"] or needed["c_0"]))


def _gemm(given: Given) -> int:
    return 2 * given["a"].numel() * given["b"].shape[0 if given["transpose_b"] else 1]


def _grouped_linear(given: Given) -> int:
    return 2 * given["input"].numel() * given["weight"].shape[1]


def _grouped_outer(given: Given) -> int:
    return 2 * given["a"].numel() * given["b"].shape[2]


FORMULAS: dict[str, Callable[[Given], int]] = {
    "recurrent_forward": _recurrent_forward,
    "recurrent_backward": _recurrent_backward,
    "recurrent_forward_jvp": _jvp(_recurrent_forward),
    "recurrent_backward_jvp": _jvp(_recurrent_backward),
    "layer_forward": _layer_forward,
    "layer_backward": _layer_backward,
    "quantized_forward": _quantized_forward,
    "gemm": _gemm,
    "grouped_linear": _grouped_linear,
    "grouped_outer": _grouped_outer,
}


def _register(flop_counter: ModuleType) -> None:
    def by_name(op: Any, formula: Callable[[Given], int]) -> Callable[..., int]:
        return lambda *args, out_val=None, **kwargs: formula(named(op.default, args, kwargs))

    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.fastrnn, name)
        flop_counter.register_flop_formula(op, get_raw=True)(by_name(op, formula))


# Not imported here, for it imports triton where there is one.
when_imported("torch.utils.flop_counter", _register)
