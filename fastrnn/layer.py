"""A whole layer as one op, input projection included, where plain eager execution on a CPU is all that is asked for.

``fastrnn::layer_forward`` makes the gates of a few steps at a time and never stores them: they would be the largest
tensor of an inference. ``fastrnn::layer_backward`` does the same with their gradients. Where the backward is to be
differentiated itself, it is made of ops that have derivatives: the recurrence's backward and the products around it.
A packed sequence stays as it is packed. Under everything else (graph capture, torch.func, forward-mode AD,
autocast, half types, other devices, tensor subclasses) ``functional.py`` composes a layer of ``F.linear`` and
``recurrent_forward``, whose rules cover all that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C
from .autograd import Grads, keep, kept, pull_forward
from .ops import CELLS
from .products import is_plain, is_plain_call, product, transposed_product

_layer_forward = torch.ops.fastrnn.layer_forward.default
_layer_backward = torch.ops.fastrnn.layer_backward.default

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
    batch_sizes: Tensor | None = None,
    grad_clip: float = 0.0,
    all_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One layer: input [T, B, I], weights one ``LayerWeights`` a direction, states [B, D*n] each.

    With batch_sizes, int64 [T] on the CPU, input and output are packed: [N, ..] in place of [T, B, ..].

    Returns output [T, B, D*R], h_n [B, D*R], c_n [B, D*H] (of size 0 for cells without c) and, for an LSTM with
    all_states, c after every step [T, B, D*H], else None.
    """
    given = given_of(states, lengths, resets, reset_states)
    flat = [x for direction in weights for x in direction]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(input, *given, *flat):
        output, h_n, c_n, _, cells = _Layer.apply(cell, batch_sizes, grad_clip, all_states, input, *given, *flat)
    else:
        output, h_n, c_n, saved = _layer_forward(*_arguments(cell, input, given, flat), all_states, batch_sizes)
        cells = every_c(cell, saved, len(weights)) if all_states else None
    return output, h_n, c_n, cells


def every_c(cell: str, saved: Tensor, directions: int) -> Tensor:
    """[.., D*H] of saved [.., D*S*H]: the last of each direction's S values."""
    S = CELLS[cell].saved
    return torch.cat(saved.chunk(directions * S, -1)[S - 1 :: S], -1)


def layers(
    cell: str, input: Tensor, weights: Sequence[Sequence[Tensor | None]], states: Sequence[Tensor], grad_clip: float
) -> tuple[Tensor, ...]:
    """A network of one direction where a derivative is asked for, as ``_C.plain_forward`` found it to be plain.

    input [T, B, I], of every layer five weights, states [L, B, n] or none -> output [T, B, R] and final states.
    """
    finals = []
    for i, of_layer in enumerate(weights):
        weight_hh = of_layer[1]
        if states:
            start = [x[i] for x in states]
        else:
            assert weight_hh is not None
            B, info = input.shape[1], CELLS[cell]
            widths = (weight_hh.shape[1], weight_hh.shape[0] // info.gates)[: info.states]
            start = [input.new_zeros(B, n) for n in widths]
        input, *after = layer(cell, input, [of_layer], start, None, None, None, None, grad_clip)[:3]
        finals.append(after[: len(start)])
    if len(finals) == 1:
        return input, *(x.unsqueeze(0) for x in finals[0])
    return input, *(torch.stack(each) for each in zip(*finals, strict=True))


def given_of(
    states: Sequence[Tensor], lengths: Tensor | None, resets: Tensor | None, reset_states: Sequence[Tensor] | None
) -> tuple[Tensor | None, ...]:
    """h_0, c_0, lengths, resets, reset_h, reset_c."""
    h, *c = states
    fresh = reset_states or ()
    return (
        h,
        c[0] if c else None,
        lengths,
        resets,
        fresh[0] if fresh else None,
        fresh[1] if len(fresh) > 1 else None,
    )


def stacked(flat: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The weights of all directions, field by field: [D, ...] each."""
    if len(flat) == FIELDS:
        return [None if x is None else x.unsqueeze(0) for x in flat]
    return [
        None if flat[i] is None else torch.stack([x for x in flat[i::FIELDS] if x is not None]) for i in range(FIELDS)
    ]


def _arguments(cell: str, input: Tensor, given: Sequence[Any], flat: Sequence[Tensor | None]) -> tuple[Any, ...]:
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = stacked(flat)
    reverse = [False, True][: len(flat) // FIELDS]
    return (cell, input, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, *given, reverse)


class _Layer(torch.autograd.Function):
    """Arguments: cell, batch_sizes, grad_clip, all_states, input, h_0, c_0, lengths, resets, reset_h, reset_c, FIELDS
    weights a direction."""

    @staticmethod
    def forward(
        ctx: Any, cell: str, batch_sizes: Tensor | None, grad_clip: float, all_states: bool, input: Tensor, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        results = None
        if not torch.compiler.is_compiling():
            results = _C.plain_layer_forward(cell, batch_sizes, input, *rest)
        if results is None:
            results = _layer_forward(*_arguments(cell, input, rest[:6], rest[6:]), True, batch_sizes)
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.grad_clip = cell, grad_clip
        # Biases are not looked at again; the input is for weight_ih's gradient alone, and weight_ih for the input's.
        read = list(rest)
        for first in range(6, len(rest), FIELDS):
            read[first + 2] = read[first + 3] = None
            if not ctx.needs_input_grad[4]:
                read[first] = None
        read_input = input if any(ctx.needs_input_grad[11::FIELDS]) else None
        keep(ctx, [batch_sizes, read_input, *read, results[0], results[3]])
        return (*results, every_c(cell, results[3], len(rest[6:]) // FIELDS) if all_states else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        present, needs = ctx.saved_tensors, ctx.needs_input_grad[4:]
        if not torch.compiler.is_compiling():
            found = _C.plain_layer_backward(ctx.cell, ctx.grad_clip, needs, grads, present, ctx.absent)
            if found is not None:
                return (None, None, None, None, *found)
        batch_sizes, input, *rest, output, saved = kept(ctx, present)
        states = rest[:6]
        weight_ih, weight_hh, _, _, weight_hr = stacked(rest[6:])
        assert weight_hh is not None
        P = weight_hh.shape[0]
        needed = Needed(needs[0], needs[1] or needs[2], *(any(needs[7 + i :: FIELDS]) for i in range(FIELDS)))
        given = (input, states, weight_ih, weight_hh, weight_hr, output, saved)
        grad_input, fields, of_states = gradients(
            ctx.cell, needed, grads, given, [False, True][:P], batch_sizes, ctx.grad_clip
        )
        of_weights = [
            x[p] if x is not None and needs[7 + p * FIELDS + i] else None
            for p in range(P)
            for i, x in enumerate(fields)
        ]
        given_grads = (grad_input, *of_states[:2], None, None, *of_states[2:])
        wanted_grads = [x if need else None for x, need in zip(given_grads, needs, strict=False)]
        return (None, None, None, None, *wanted_grads, *of_weights)


class Needed(NamedTuple):
    """Which gradients are asked for; initial: that of h_0 or c_0."""

    input: bool
    initial: bool
    weight_ih: bool
    weight_hh: bool
    bias_ih: bool
    bias_hh: bool
    weight_hr: bool


def gradients(
    cell: str,
    needed: Needed,
    grads: Grads,
    given: tuple[Any, ...],
    reverse: list[bool],
    batch_sizes: Tensor | None,
    grad_clip: float,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """A layer's backward: the gradients of input, of the weights' fields and of h_0, c_0, reset_h, reset_c.

    grads: of layer_forward's results and of every c. given: input, the six that ``layer`` gives after it, weight_ih,
    weight_hh and weight_hr of all directions, output and saved.
    """
    input, states, weight_ih, weight_hh, weight_hr, output, saved = given
    *of_results, of_cells = grads
    fused = weight_hr is None and grads[3] is None and not torch.is_grad_enabled() and is_plain_call()
    if not (fused and all(map(is_plain, grads))):
        if of_cells is not None:
            of_results[3] = _in_saved(cell, of_cells, len(reverse), of_results[3])
        return _composed(cell, needed, tuple(of_results), given, reverse, batch_sizes, grad_clip)
    wanted = [needed.input, needed.weight_ih, needed.weight_hh, needed.bias_ih, needed.bias_hh, needed.initial]
    grad_input, weight_ih, weight_hh, bias_ih, bias_hh, *of_states = _layer_backward(
        cell, *grads[:2], grads[2] if states[1] is not None else None, input, weight_ih, weight_hh, *states,
        reverse, output, saved, wanted, batch_sizes, grad_clip, of_cells,
    )  # fmt: skip
    return grad_input, (weight_ih, weight_hh, bias_ih, bias_hh, None), of_states


def _in_saved(cell: str, grad: Tensor, directions: int, others: Tensor | None) -> Tensor:
    """The gradient of every c as one of saved, added to the others of that."""
    S, (*steps, width) = CELLS[cell].saved, grad.shape
    H = width // directions
    # reshape, for legacy vmap (is_grads_batched=True) has no rule for flatten and unflatten
    placed = F.pad(grad.reshape(*steps, directions, H), ((S - 1) * H, 0)).reshape(*steps, directions * S * H)
    return placed if others is None else placed + others


def _composed(
    cell: str,
    needed: Needed,
    grads: Grads,
    given: tuple[Any, ...],
    reverse: list[bool],
    batch_sizes: Tensor | None,
    grad_clip: float,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """A layer's backward of ops that have derivatives: the gradients of input, weights and states."""
    input, states, weight_ih, weight_hh, weight_hr, output, saved = given
    h_0, c_0, lengths, resets, reset_h, reset_c = states
    P = weight_hh.shape[0]
    if batch_sizes is not None:
        lengths = pad(output, batch_sizes)[1]
        input, output, saved, grad_output, grad_saved = (
            None if x is None else pad(x, batch_sizes)[0] for x in (input, output, saved, grads[0], grads[3])
        )
        grads = (grad_output, *grads[1:3], grad_saved)
    elif lengths is not None and input is not None:
        input = without_padding(input, lengths)
    pulled = pull_forward(
        [cell, None, weight_hh, None, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c, reverse, True,
         *([grad_clip] if grad_clip else [])],
        (output, saved),
        [
            False, needed.input or needed.weight_ih or needed.bias_ih, needed.weight_hh, needed.bias_hh,
            needed.weight_hr, needed.initial, needed.initial, False, False, reset_h is not None, reset_c is not None,
            False, False,
        ],
        grads,
    )  # fmt: skip
    grad_gates, grad_bias_hh = pulled[1], pulled[3]
    grad_input = grad_weight_ih = grad_bias_ih = None
    if grad_gates is not None:
        T, B, Gh = grad_gates.shape
        rows = grad_gates.reshape(T * B, Gh)
        if needed.input:
            grad_input = product(rows, weight_ih.flatten(0, 1)).view(T, B, weight_ih.shape[2])
            if batch_sizes is not None:
                grad_input = pack(grad_input, lengths)
        if needed.weight_ih:
            I = input.shape[2]  # noqa: E741
            grad_weight_ih = transposed_product(rows, input.reshape(T * B, I)).view(P, Gh // P, I)
        if needed.bias_ih:
            if grad_bias_hh is None or CELLS[cell].separate_gates_hh:
                grad_bias_ih = rows.sum(0).view(P, Gh // P)
            else:
                grad_bias_ih = grad_bias_hh.clone()  # equal; a copy, for both become somebody's .grad
    fields = (grad_weight_ih, pulled[2], grad_bias_ih, grad_bias_hh, pulled[4])
    return grad_input, fields, (pulled[5], pulled[6], pulled[9], pulled[10])


def without_padding(input: Tensor, lengths: Tensor) -> Tensor:
    """input [T, B, I] or [T, B] with zeros behind each row's end.

    A recurrence ignores what stands there, but a NaN would reach weight_ih's gradient through 0 * NaN.
    """
    if lengths.dim() == 2:  # a group's each
        lengths = lengths.amax(1)
    valid = torch.arange(input.shape[0], device=input.device)[:, None] < lengths
    return torch.where(valid if input.dim() == 2 else valid[..., None], input, 0)


def pad(x: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """[N, n] -> [T, B, n], zeros behind each row's end, and the lengths [B], falling."""
    return torch._VF._pad_packed_sequence(x, batch_sizes, False, 0.0, batch_sizes.shape[0])  # type: ignore[attr-defined]


def on_device(lengths: Tensor, device: torch.device) -> Tensor:
    """lengths [B] of the CPU on another device, for a kernel to read.

    A copy cannot be captured in a CUDA graph, or from pinned memory is read again by every replay. So the values go as
    arguments of kernels, one launch for some hundred lengths that differ.
    """
    if device.type == "cpu" or not is_plain_call():
        return lengths.to(device, non_blocking=True)
    values, counts = lengths.unique_consecutive(return_counts=True)
    found = torch.zeros_like(lengths, device=device)
    torch._foreach_add_(found.split(counts.tolist()), values.tolist())
    return found


def pack(x: Tensor, lengths: Tensor) -> Tensor:
    """[T, B, n] -> [N, n]; lengths on the CPU, falling."""
    return torch._VF._pack_padded_sequence(x, lengths, False)[0]  # type: ignore[attr-defined]


@torch.library.register_fake("fastrnn::layer_forward")
def _(
    cell, input, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c,
    reverse, save, batch_sizes=None,
):  # fmt: skip
    *steps, _ = input.shape  # T, B or N
    B = h_0.shape[0]
    P, _, R = weight_hh.shape
    info = CELLS[cell]
    h = weight_hh.shape[1] // info.gates
    return (
        input.new_empty(*steps, P * R),
        input.new_empty(B, P * R),
        input.new_empty(B, P * h) if c_0 is not None else input.new_empty(0),
        input.new_empty(*steps, P * info.saved * h) if save else input.new_empty(0),
    )


@torch.library.register_fake("fastrnn::layer_backward")
def _(
    cell, grad_output, grad_h_n, grad_c_n, input, weight_ih, weight_hh, h_0, c_0, lengths, resets, reset_h, reset_c,
    reverse, output, saved, wanted, batch_sizes=None, grad_clip=0.0, grad_cells=None,
):  # fmt: skip
    def like(x, wanted=True):
        return output.new_empty(x.shape if x is not None and wanted else 0)

    P, Gh, _ = weight_hh.shape
    I = (weight_ih if input is None else input).shape[-1] if wanted[0] or wanted[1] else 0  # noqa: E741
    sizes = ((*output.shape[:-1], I), (P, Gh, I), weight_hh.shape, (P, Gh), (P, Gh))
    return (
        *(output.new_empty(size if want else 0) for size, want in zip(sizes, wanted, strict=False)),
        like(h_0, wanted[5]),
        like(c_0, wanted[5]),
        like(reset_h),
        like(reset_c),
    )
