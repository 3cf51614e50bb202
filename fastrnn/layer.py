"""A whole layer as one op, input projection included, where plain eager execution on a CPU is all that is asked for.

``fastrnn::layer_forward`` makes the gates of a few steps at a time and never stores them: they would be the largest
tensor of an inference. Its backward is that of the recurrence and two products, made of ops that have derivatives
themselves, so double backward needs nothing more. Under everything else (graph capture, torch.func, forward-mode AD,
autocast, half types, other devices, tensor subclasses) ``functional.py`` composes a layer of ``F.linear`` and
``recurrent_forward``, whose rules cover all that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import Grads, pull_forward
from .ops import CELLS
from .products import is_plain, is_plain_call, product, transposed_product

_layer_forward = torch.ops.fastrnn.layer_forward.default

FIELDS = 5  # weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of one direction


def fits(
    input: Tensor,
    weights: Sequence[Sequence[Tensor | None]],
    states: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> bool:
    """Can this call be a layer op? False also where dtypes differ: the composed form says what is wrong."""
    dtype = input.dtype
    if dtype not in (torch.float32, torch.float64) or not is_plain_call():
        return False
    for x in (input, *states, *(x for direction in weights for x in direction)):
        if not is_plain(x) or (x is not None and x.dtype is not dtype):
            return False
    return all(map(is_plain, masks))


def layer(
    cell: str,
    input: Tensor,
    weights: Sequence[Sequence[Tensor | None]],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_states: Sequence[Tensor] | None,
) -> tuple[Tensor, ...]:
    """One layer: input [T, B, I], weights one ``LayerWeights`` a direction, states [B, D*n] each.

    Returns output [T, B, D*R], h_n [B, D*R] and c_n [B, D*H] (of size 0 for cells without c).
    """
    h, *c = states
    fresh = reset_states or ()
    given = (
        h,
        c[0] if c else None,
        lengths,
        resets,
        fresh[0] if fresh else None,
        fresh[1] if len(fresh) > 1 else None,
    )
    flat = [x for direction in weights for x in direction]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(input, *given, *flat):
        return _Layer.apply(cell, input, *given, *flat)[:3]
    return _layer_forward(*_arguments(cell, input, given, flat), False)[:3]


def _stacked(flat: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The weights of all directions, field by field: [D, ...] each."""
    if len(flat) == FIELDS:
        return [None if x is None else x.unsqueeze(0) for x in flat]
    return [
        None if flat[i] is None else torch.stack([x for x in flat[i::FIELDS] if x is not None]) for i in range(FIELDS)
    ]


def _arguments(cell: str, input: Tensor, given: Sequence[Any], flat: Sequence[Tensor | None]) -> tuple[Any, ...]:
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = _stacked(flat)
    reverse = [False, True][: len(flat) // FIELDS]
    return (cell, input, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, *given, reverse)


class _Layer(torch.autograd.Function):
    """Arguments: cell, input, h_0, c_0, lengths, resets, reset_h, reset_c, then FIELDS weights a direction."""

    @staticmethod
    def forward(ctx: Any, cell: str, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        results = _layer_forward(*_arguments(cell, input, rest[:6], rest[6:]), True)
        ctx.set_materialize_grads(False)
        ctx.cell = cell
        # Biases are not looked at again; the input is for weight_ih's gradient alone, and weight_ih for the input's.
        dropped = {2, 3} | (set() if ctx.needs_input_grad[1] else {0})
        kept = [x if i < 6 or (i - 6) % FIELDS not in dropped else None for i, x in enumerate(rest)]
        kept_input = input if any(ctx.needs_input_grad[8::FIELDS]) else None
        ctx.save_for_backward(kept_input, *kept, results[0], results[3])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        input, *rest, output, saved = ctx.saved_tensors
        h_0, c_0, lengths, resets, reset_h, reset_c = rest[:6]
        weight_ih, weight_hh, _, _, weight_hr = _stacked(rest[6:])
        assert weight_hh is not None
        P = weight_hh.shape[0]
        needs = ctx.needs_input_grad

        def any_needed(field: int) -> bool:
            return any(needs[8 + field :: FIELDS])

        needs_gates = needs[1] or any_needed(0) or any_needed(2)
        pulled = pull_forward(
            [ctx.cell, None, weight_hh, None, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c,
             [False, True][:P], True],
            (output, saved),
            [False, needs_gates, any_needed(1), any_needed(3), any_needed(4), needs[2], needs[3], False, False,
             needs[6], needs[7], False, False],
            grads,
        )  # fmt: skip
        grad_gates, grad_bias_hh = pulled[1], pulled[3]
        grad_input = grad_weight_ih = grad_bias_ih = None
        if grad_gates is not None:
            T, B, Gh = grad_gates.shape
            rows = grad_gates.reshape(T * B, Gh)
            if weight_ih is not None:
                grad_input = product(rows, weight_ih.flatten(0, 1)).view(T, B, weight_ih.shape[2])
            if input is not None:
                I = input.shape[2]  # noqa: E741
                grad_weight_ih = transposed_product(rows, input.reshape(T * B, I)).view(P, Gh // P, I)
            if any_needed(2):
                if grad_bias_hh is None or CELLS[ctx.cell].separate_gates_hh:
                    grad_bias_ih = rows.sum(0).view(P, Gh // P)
                else:
                    grad_bias_ih = grad_bias_hh.clone()  # equal; a copy, for both become somebody's .grad
        fields = (grad_weight_ih, pulled[2], grad_bias_ih, grad_bias_hh, pulled[4])
        of_weights = [
            None if x is None or not needs[8 + p * FIELDS + i] else x[p] for p in range(P) for i, x in enumerate(fields)
        ]
        return (None, grad_input, pulled[5], pulled[6], None, None, pulled[9], pulled[10], *of_weights)


@torch.library.register_fake("fastrnn::layer_forward")
def _(
    cell, input, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c,
    reverse, save,
):  # fmt: skip
    T, B, _ = input.shape
    P, _, R = weight_hh.shape
    info = CELLS[cell]
    h = weight_hh.shape[1] // info.gates
    return (
        input.new_empty(T, B, P * R),
        input.new_empty(B, P * R),
        input.new_empty(B, P * h) if c_0 is not None else input.new_empty(0),
        input.new_empty(T, B, P * info.saved * h) if save else input.new_empty(0),
    )
