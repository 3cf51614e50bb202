"""Derivatives of the ops: one kernel of our own at the Autograd key of each.

The kernel decides, in this order:

1. an argument has a forward tangent at this level: the op's own kernel makes results and tangents at once, on dual
   numbers (``recurrent_forward_jvp``); where there is none (CUDA, tangents of tangents), run the composite
   of reference.py, which torch differentiates;
2. grad mode is on and an argument requires grad: make a node; its backward calls ``recurrent_backward``, an op again,
   and forms the weight gradients with ATen;
3. else: on to the kernels below.

Where both 1 and 2 hold, in a dual level of torch.autograd.forward_ad, the node has the tangents in its ``jvp``: what it
saves is dual then, and so is its backward.

``recurrent_backward`` has the same kernel. Its own backward, that is double backward, is lazy: torch.func runs every
first backward with grad mode on, so the first backward must stay the fused op even when a graph of it is asked for.
``saved`` is an ordinary result for that reason: its gradient arises only here and takes the composite. Where
second_order.py has the second derivative by kernels, backward is a function of its own, which does without.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

from . import reference
from .gradients import Grads, Pulled, pull_forward
from .ops import (
    clamp_gradient,
    library,
    named,
    names_of,
    recurrent_backward,
    recurrent_backward_jvp,
    recurrent_forward,
    recurrent_forward_jvp,
)
from .products import grouped_linear, grouped_outer, linear_by_aten, outer_by_aten
from .second_order import (
    are_batched,
    by_composite,
    composite_jvp,
    forward_levels,
    gradients,
    has_kernel,
    is_differentiated_twice,
    pull_forward_jvp,
)


def _composite_forward(*args: Any) -> tuple[Tensor, ...]:
    given = named(recurrent_forward, args)
    del given["save"]
    return reference.forward(**given)


class _Rule(NamedTuple):
    """An op and how it is differentiated."""

    op: Any
    composite: Callable[..., Any]
    # (arguments by name, results that are kept, names of what gradients are needed of, gradients of the results)
    pullback: Callable[[Mapping[str, Any], Sequence[Tensor], Collection[str], Grads], Pulled]
    unread: frozenset[str] = frozenset()  # arguments that the pullback does not look at
    keeps: tuple[int, ...] = ()  # results that the pullback looks at
    jvp: Any = None  # the op with tangents


def _pull_backward(args: Mapping[str, Any], results: Sequence[Tensor], needed: Collection[str], grads: Grads) -> Pulled:
    return by_composite(reference.backward, args, needed, grads)


def _pull_backward_jvp(
    args: Mapping[str, Any], results: Sequence[Tensor], needed: Collection[str], grads: Grads
) -> Pulled:
    return by_composite(lambda **given: composite_jvp(reference.backward, **given), args, needed, grads)


def _refuse_tangents(*args: Any) -> Any:
    raise NotImplementedError("recurrent_forward_jvp, recurrent_backward_jvp: expected tensors that have no tangents")


def _pull_linear(args: Mapping[str, Any], results: Sequence[Tensor], needed: Collection[str], grads: Grads) -> Pulled:
    (grad,) = grads
    assert grad is not None
    forms: dict[str, Callable[[], Tensor]] = {
        "input": lambda: grouped_linear(grad, args["weight"].transpose(1, 2), None),
        "weight": lambda: grouped_outer(grad, args["input"]),
        "bias": lambda: grad.sum(0),
    }
    return {name: forms[name]() for name in needed}


def _pull_outer(args: Mapping[str, Any], results: Sequence[Tensor], needed: Collection[str], grads: Grads) -> Pulled:
    (grad,) = grads
    assert grad is not None
    forms: dict[str, Callable[[], Tensor]] = {
        "a": lambda: grouped_linear(args["b"], grad, None),
        "b": lambda: grouped_linear(args["a"], grad.transpose(1, 2), None),
    }
    return {name: forms[name]() for name in needed}


# Of recurrent_forward output and saved are kept; h_n and c_n stay free for in-place use.
_FORWARD = _Rule(
    recurrent_forward,
    _composite_forward,
    pull_forward,
    unread=frozenset(("gates_ih", "bias_hh")),
    keeps=(0, 3),
    jvp=recurrent_forward_jvp,
)
_BACKWARD = _Rule(recurrent_backward, reference.backward, _pull_backward, jvp=recurrent_backward_jvp)
_FORWARD_JVP = _Rule(recurrent_forward_jvp, _refuse_tangents, pull_forward_jvp)
_BACKWARD_JVP = _Rule(recurrent_backward_jvp, _refuse_tangents, _pull_backward_jvp)
_LINEAR = _Rule(grouped_linear, linear_by_aten, _pull_linear, unread=frozenset(("bias",)))
_OUTER = _Rule(grouped_outer, outer_by_aten, _pull_outer)


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
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            if rule.jvp is not None and _tangents_of(args):
                ctx.args = args  # for jvp, which autograd calls next
            with torch._C._AutoDispatchBelowAutograd():
                results = rule.op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        ctx.set_materialize_grads(False)
        ctx.rule, ctx.twice = rule, rule is _FORWARD and is_differentiated_twice(named(rule.op, args))
        unread = () if ctx.twice else rule.unread
        read = [None if name in unread else a for name, a in zip(names_of(rule.op), args, strict=False)]
        ctx.plain = [None if isinstance(a, Tensor) else a for a in read]
        keep(ctx, [a if isinstance(a, Tensor) else None for a in read] + [results[i] for i in rule.keeps])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        tensors, count = kept(ctx), len(ctx.plain)
        args = [plain if x is None else x for plain, x in zip(ctx.plain, tensors[:count], strict=True)]
        names, results = names_of(ctx.rule.op), tensors[count:]
        needed = [name for name, need in zip(names, ctx.needs_input_grad[2:], strict=False) if need]
        pullback = gradients if ctx.twice else ctx.rule.pullback
        found = pullback(dict(zip(names, args, strict=False)), results, needed, grads)
        return (None, None, *(found.get(name) for name in names[:count]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        args = ctx.args
        del ctx.args
        with forward_ad._set_fwd_grad_enabled(True):  # without it no tensor shows a tangent
            return _with_tangents(ctx.rule, args)[1]


class _RecurrentLevel(torch.autograd.function._SingleLevelFunction):
    """The same node at one functorch level: what functorch itself makes of an autograd.Function."""

    forward = staticmethod(_Recurrent.forward)
    backward = staticmethod(_Recurrent.backward)
    jvp = staticmethod(_Recurrent.jvp)


def _tangents_of(args: Sequence[Any]) -> list[Tensor]:
    """Those that arguments have at this level."""
    if forward_ad._current_level < 0:
        # Graphs that dynamo made enter dual levels without this global: look at functorch's own stack.
        if not torch._C._are_functorch_transforms_active():
            return []
        top = torch._C._functorch.peek_interpreter_stack()
        if top.key() != torch._C._functorch.TransformType.Jvp:
            return []
    floating = (x for x in args if isinstance(x, Tensor) and x.is_floating_point())
    return [tangent for x in floating if (tangent := forward_ad.unpack_dual(x, level=0).tangent) is not None]


def _is_one_kernel(rule: _Rule, args: Sequence[Any], tangents: Sequence[Tensor]) -> bool:
    """Are results and tangents made by the op with tangents? Those must not have tangents themselves, and results that
    legacy vmap has batched would be no tensors to give tangents to."""
    if rule.jvp is None or forward_levels() > 1 or not has_kernel(args):
        return False
    return not are_batched(tangents)


def _with_tangents(rule: _Rule, args: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results and their tangents, of arguments that have such at this level."""
    given = named(rule.op, args)
    for name, x in list(given.items()):
        if isinstance(x, Tensor) and x.is_floating_point():
            given[name], given[f"tangent_{name}"] = forward_ad.unpack_dual(x, level=0)
    found = rule.jvp(*(given.get(name) for name in names_of(rule.jvp)))
    count = len(found) // 2
    return found[:count], found[count:]


def _autograd_kernel(rule: _Rule) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any) -> Any:
        tangents = _tangents_of(args)
        if tangents and not _is_one_kernel(rule, args, tangents):
            return rule.composite(*args)
        # At a functorch level of forward mode nobody asks for gradients, whatever tensors of other levels require.
        forward_alone = tangents and torch._C._are_functorch_transforms_active()
        if not forward_alone and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if rule is _FORWARD:  # only here is it known that backward may follow
                args = tuple((named(recurrent_forward, args) | {"save": True}).values())
            if not torch._C._are_functorch_transforms_active():
                return _Recurrent.apply(rule, keyset, *args)
            with enable_single_level_autograd_function():
                return _RecurrentLevel.apply(rule, keyset, *args)  # type: ignore[attr-defined]
        if tangents:
            pairs = zip(*_with_tangents(rule, args), strict=True)
            return tuple(forward_ad.make_dual(x, tangent, level=0) for x, tangent in pairs)
        with torch._C._AutoDispatchBelowAutograd():
            return rule.op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


for _rule in (_FORWARD, _BACKWARD, _FORWARD_JVP, _BACKWARD_JVP, _LINEAR, _OUTER):
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
    if x is None:  # which a schema's Tensor may be
        raise TypeError("clamp_gradient: x: expected a tensor, got None")
    if _tangents_of((x,)):  # the tangent is the derivative's: nothing is clamped on the way forward
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
