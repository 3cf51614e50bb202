"""Derivatives of the ops: one kernel of our own at the Autograd key of each.

The kernel decides, in this order:

1. an argument has a forward tangent at this level: run the composite of reference.py, which torch differentiates;
2. grad mode is on and an argument requires grad: make a node; its backward calls ``recurrent_backward``, an op again,
   and forms the weight gradients with ATen;
3. else: on to the kernels below.

``recurrent_backward`` has the same kernel. Its own backward, that is double backward, is lazy: torch.func runs every
first backward with grad mode on, so the first backward must stay the fused op even when a graph of it is asked for.
``saved`` is an ordinary result for that reason: its gradient arises only here and takes the composite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

from . import reference
from .ops import CELLS, clamp_gradient, library, recurrent_backward, recurrent_forward
from .products import (
    grouped_linear,
    grouped_outer,
    is_vmapped_call,
    linear_by_aten,
    outer_by_aten,
    outer_products,
    transposed_product,
)

Grads = tuple[Tensor | None, ...]
_SAVE = 12  # recurrent_forward's save; behind it, where it is not 0, grad_clip


def _composite_forward(*args: Any) -> tuple[Tensor, ...]:
    return reference.forward(*args[:_SAVE], *args[_SAVE + 1 :])


class _Rule(NamedTuple):
    """An op and how it is differentiated."""

    op: Any
    composite: Callable[..., Any]
    pullback: Callable[[list[Any], Sequence[Tensor], Sequence[bool], Grads], Grads]
    reads: frozenset[int]  # arguments that the pullback looks at
    keeps: tuple[int, ...]  # results that the pullback looks at


def pull_forward(args: list[Any], results: Sequence[Tensor], needed: Sequence[bool], grads: Grads) -> Grads:
    cell, _, weight_hh, _, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c, reverse, _, *clip = args
    output, saved = results
    grad_output, grad_h_n, grad_c_n, grad_saved = grads
    states = (h_0, c_0, lengths, resets, reset_h, reset_c, reverse)
    given = (
        cell,
        grad_output,
        grad_h_n,
        grad_c_n if c_0 is not None else None,
        weight_hh,
        weight_hr,
        *states,
    )
    initial = needed[5] or needed[6]
    if grad_saved is None:
        pulled = recurrent_backward(*given, output, saved, initial, *clip)
    else:
        pulled = reference.backward(*given, output, saved, initial, clip[0] if clip else 0.0, grad_saved)
    grad_gates_ih, grad_gates_hh, grad_projected, grad_h_0, grad_c_0, grad_reset_h, grad_reset_c = pulled
    if not CELLS[cell].separate_gates_hh:
        grad_gates_hh = grad_gates_ih

    def when(index: int, grad: Callable[[], Tensor]) -> Tensor | None:
        return grad() if needed[index] else None

    P = weight_hh.shape[0]
    return (
        None,
        when(1, lambda: grad_gates_ih),
        when(2, lambda: _grad_weight_hh(grad_gates_hh, output, h_0, lengths, resets, reset_h, reverse)),
        when(3, lambda: grad_gates_hh.sum((0, 1)).reshape(P, -1)),
        when(4, lambda: _grad_weight(grad_projected, reference.lstm_hidden(saved, P))),
        when(5, lambda: grad_h_0),
        when(6, lambda: grad_c_0),
        None,
        None,
        when(9, lambda: grad_reset_h),
        when(10, lambda: grad_reset_c),
        *(None,) * (len(args) - 11),
    )


def _grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """sum over T, B of grad[t, b, p, :] x[t, b, p, :]^T: [P, m, n] from [T, B, P*m] and [T, B, P, n]."""
    # reshape throughout, for legacy vmap (is_grads_batched=True) has no rule for flatten and unflatten
    P, n = x.shape[2:]
    return outer_products(grad.reshape(-1, P, grad.shape[2] // P), x.reshape(-1, P, n))


def _grad_weight_hh(
    grad_gates_hh: Tensor,
    output: Tensor,
    h_0: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reverse: Sequence[bool],
) -> Tensor:
    """[P, G*h, R]: every step's gate gradients times the state before it."""
    P, (T, B, _) = len(reverse), output.shape
    if T == 0:
        return output.new_zeros(P, grad_gates_hh.shape[2] // P, output.shape[2] // P)
    # Under vmap the rows of a sample may be few, and a sum of two products for each would be most of the work.
    if resets is not None or P > 4 or is_vmapped_call(grad_gates_hh, output):
        return _grad_weight(grad_gates_hh, reference.previous_h(output, h_0, lengths, resets, reset_h, reverse))
    # The states before are the outputs one step on, so views of both serve and nothing is copied: at padded steps both
    # are 0. What is left is each row's first step, whose state before is h_0.
    weights = []
    for p, backwards in enumerate(reverse):
        grad, h, first = _group(grad_gates_hh, p, P), _group(output, p, P), _group(h_0, p, P)
        # By rows and not by steps: a graph of T = 2 would hold one step, and take that size for fixed.
        later, before = (
            x.reshape(-1, x.shape[2]).narrow(0, at, (T - 1) * B)
            for x, at in ((grad, 0 if backwards else B), (h, B if backwards else 0))
        )
        # -1 and not T - 1: indexing with a symbolic size would fix it
        start = grad[-1 if backwards else 0]
        if backwards and lengths is not None:
            ends = lengths if lengths.dim() == 1 else lengths[:, p]
            ends = ends.to(grad.device, torch.int64, non_blocking=ends.is_cpu)
            ends = (ends - 1).clamp(min=0)[None, :, None]
            start = grad.gather(0, ends.expand(1, -1, grad.shape[2]))[0]
        if T > 1:
            weights.append(transposed_product(start, first) + transposed_product(later, before))
        else:  # a cell's step, too: of ATen, whose switch for TF32 torch.nn's cells obey
            weights.append(start.t() @ first)
    return torch.stack(weights) if P > 1 else weights[0][None]


def _group(x: Tensor, p: int, groups: int) -> Tensor:
    n = x.shape[-1] // groups
    return x if groups == 1 else x.narrow(-1, p * n, n)


def _pull_backward(args: list[Any], results: Sequence[Tensor], needed: Sequence[bool], grads: Grads) -> Grads:
    which = [i for i, need in enumerate(needed) if need]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(args)
        for i, value in zip(which, values, strict=True):
            full[i] = value
        return reference.backward(*full)

    # torch.func.vjp and not torch.autograd.grad, which gives silent zeros once a functorch level has ended.
    primals, pull = torch.func.vjp(
        function,  # type: ignore[misc]
        *(args[i] for i in which),
    )
    pulled = iter(pull(tuple(torch.zeros_like(y) if g is None else g for y, g in zip(primals, grads, strict=True))))
    return tuple(next(pulled) if need else None for need in needed)


_FORWARD = _Rule(
    recurrent_forward,
    _composite_forward,
    pull_forward,
    frozenset((0, 2, 4, 5, 6, 7, 8, 9, 10, 11, _SAVE, _SAVE + 1)),
    (0, 3),  # output and saved; h_n and c_n stay free for in-place use
)


def _pull_linear(args: list[Any], results: Sequence[Tensor], needed: Sequence[bool], grads: Grads) -> Grads:
    input, weight, _ = args
    (grad,) = grads
    assert grad is not None
    return (
        grouped_linear(grad, weight.transpose(1, 2), None) if needed[0] else None,
        grouped_outer(grad, input) if needed[1] else None,
        grad.sum(0) if needed[2] else None,
    )


def _pull_outer(args: list[Any], results: Sequence[Tensor], needed: Sequence[bool], grads: Grads) -> Grads:
    a, b = args
    (grad,) = grads
    assert grad is not None
    return (
        grouped_linear(b, grad, None) if needed[0] else None,
        grouped_linear(a, grad.transpose(1, 2), None) if needed[1] else None,
    )


_BACKWARD = _Rule(recurrent_backward, reference.backward, _pull_backward, frozenset(range(17)), ())
_LINEAR = _Rule(grouped_linear, linear_by_aten, _pull_linear, frozenset((0, 1)), ())
_OUTER = _Rule(grouped_outer, outer_by_aten, _pull_outer, frozenset((0, 1)), ())


def keep(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """``ctx.save_for_backward`` without the Nones, at which what draws or walks a graph stumbles; see ``kept``."""
    ctx.absent = [x is None for x in tensors]
    ctx.save_for_backward(*[x for x in tensors if x is not None])


def kept(ctx: Any, present: tuple[Tensor, ...] | None = None) -> list[Any]:
    """What ``keep`` was given. present: ``ctx.saved_tensors`` where they were read: a checkpoint bears that once."""
    saved = iter(ctx.saved_tensors if present is None else present)
    return [None if absent else next(saved) for absent in ctx.absent]


class _Recurrent(torch.autograd.Function):
    """The one node type, for any of the ops."""

    @staticmethod
    def forward(ctx: Any, rule: _Rule, keyset: Any, *args: Any) -> Any:
        # Function.forward runs with both grad modes off, but a functorch level below this one must see them on.
        with (
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            results = rule.op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        ctx.set_materialize_grads(False)
        ctx.rule = rule
        read = [a if i in rule.reads else None for i, a in enumerate(args)]
        ctx.plain = [None if isinstance(a, Tensor) else a for a in read]
        keep(ctx, [a if isinstance(a, Tensor) else None for a in read] + [results[i] for i in rule.keeps])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        tensors, count = kept(ctx), len(ctx.plain)
        args = [plain if x is None else x for plain, x in zip(ctx.plain, tensors[:count], strict=True)]
        results = tensors[count:]
        return (None, None, *ctx.rule.pullback(args, results, ctx.needs_input_grad[2:], grads))


class _RecurrentLevel(torch.autograd.function._SingleLevelFunction):
    """The same node at one functorch level: what functorch itself makes of an autograd.Function."""

    forward = staticmethod(_Recurrent.forward)
    backward = staticmethod(_Recurrent.backward)


def _has_tangent(args: Sequence[Any]) -> bool:
    if forward_ad._current_level < 0:
        # Graphs that dynamo made enter dual levels without this global: look at functorch's own stack.
        if not torch._C._are_functorch_transforms_active():
            return False
        top = torch._C._functorch.peek_interpreter_stack()
        if top.key() != torch._C._functorch.TransformType.Jvp:
            return False
    return any(
        isinstance(x, Tensor) and x.is_floating_point() and forward_ad.unpack_dual(x, level=0).tangent is not None
        for x in args
    )


def _autograd_kernel(rule: _Rule) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any) -> Any:
        if _has_tangent(args):
            return rule.composite(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if rule is _FORWARD:
                args = (*args[:_SAVE], True, *args[_SAVE + 1 :])  # save: only here is it known that backward may follow
            if not torch._C._are_functorch_transforms_active():
                return _Recurrent.apply(rule, keyset, *args)
            with enable_single_level_autograd_function():
                return _RecurrentLevel.apply(rule, keyset, *args)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return rule.op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


for _rule in (_FORWARD, _BACKWARD, _LINEAR, _OUTER):
    library.impl(_rule.op._schema.name, _autograd_kernel(_rule), "Autograd", with_keyset=True)


# ---- clamp_gradient: the identity, whose gradient is clamped ----


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        with (
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return clamp_gradient.redispatch(keyset & torch._C._after_autograd_keyset, x, limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        return None, grad.clamp(-ctx.limit, ctx.limit), None


class _ClampLevel(torch.autograd.function._SingleLevelFunction):
    forward = staticmethod(_Clamp.forward)
    backward = staticmethod(_Clamp.backward)


def _clamp_kernel(keyset: Any, x: Tensor, limit: float) -> Tensor:
    if _has_tangent((x,)):  # the tangent is the derivative's: nothing is clamped on the way forward
        primal, tangent = forward_ad.unpack_dual(x, level=0)
        return forward_ad.make_dual(clamp_gradient(primal, limit), tangent, level=0)
    if torch.is_grad_enabled() and x.requires_grad:
        if not torch._C._are_functorch_transforms_active():
            return _Clamp.apply(keyset, x, limit)
        with enable_single_level_autograd_function():
            return _ClampLevel.apply(keyset, x, limit)  # type: ignore[attr-defined]
    with torch._C._AutoDispatchBelowAutograd():
        return clamp_gradient.redispatch(keyset & torch._C._after_autograd_keyset, x, limit)


library.impl("clamp_gradient", _clamp_kernel, "Autograd", with_keyset=True)
