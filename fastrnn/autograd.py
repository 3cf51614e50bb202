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

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

from . import reference
from .ops import CELLS, clamp_gradient, library, named, names_of, recurrent_backward, recurrent_forward, results_of
from .products import grouped_linear, grouped_outer, linear_by_aten, outer_by_aten, outer_products, transposed_product
from .transforms import is_vmapped_call

Grads = tuple[Tensor | None, ...]
Pulled = Mapping[str, Tensor | None]  # gradients by the names of what they are of


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
    unread: frozenset[str]  # arguments that the pullback does not look at
    keeps: tuple[int, ...]  # results that the pullback looks at


def pull_forward(args: Mapping[str, Any], results: Sequence[Tensor], needed: Collection[str], grads: Grads) -> Pulled:
    """recurrent_forward's gradients; results: output and saved, grads: of output, h_n, c_n and saved."""
    weight_hh, reverse = args["weight_hh"], args["reverse"]
    output, saved = results
    grad_output, grad_h_n, grad_c_n, grad_saved = grads
    given = {name: args[name] for name in names_of(recurrent_backward) if name in args}
    given |= dict(grad_output=grad_output, grad_h_n=grad_h_n, output=output, saved=saved)
    given["grad_c_n"] = grad_c_n if args["c_0"] is not None else None
    given["initial"] = "h_0" in needed or "c_0" in needed
    by_kernel = grad_saved is None
    pulled = recurrent_backward(**given) if by_kernel else reference.backward(**given, grad_saved=grad_saved)
    found = dict(zip((name.removeprefix("grad_") for name in results_of(recurrent_backward)), pulled, strict=True))
    grad_gates_hh = found["gates_hh" if CELLS[args["cell"]].separate_gates_hh else "gates_ih"]
    P = weight_hh.shape[0]
    if "weight_hh" in needed:
        h_0, lengths, resets, reset_h, mask_h = (args[k] for k in ("h_0", "lengths", "resets", "reset_h", "mask_h"))
        of_h, rule, of_late = grad_gates_hh, reference.CELLS[args["cell"]], []
        if rule.late:
            of_h, grad_late = reference.early_and_late(args["cell"], grad_gates_hh, P)
            before = reference.multiplied_h(output, h_0, lengths, resets, reset_h, mask_h, reverse)
            of_late = [_grad_weight(grad_late, reference.late_input(args["cell"], saved, before))]
        of_weight = _grad_weight_hh(of_h, output, h_0, lengths, resets, reset_h, mask_h, reverse)
        found["weight_hh"] = torch.cat([of_weight, *of_late], 1) if of_late else of_weight
    if "bias_hh" in needed:
        found["bias_hh"] = grad_gates_hh.sum((0, 1)).reshape(P, -1)
    if "weight_hr" in needed:
        c_0, lengths, resets, reset_c, keep_c = (args[k] for k in ("c_0", "lengths", "resets", "reset_c", "keep_c"))
        hidden = reference.lstm_hidden(args["cell"], saved, c_0, lengths, resets, reset_c, keep_c, reverse)
        found["weight_hr"] = _grad_weight(found["projected"], hidden)
    if "params" in needed:
        found["params"] = found["params"].sum(0).reshape(args["params"].shape).to(output.dtype)
    return {name: x for name, x in found.items() if name in needed}


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
    mask_h: Tensor | None,
    reverse: Sequence[bool],
) -> Tensor:
    """[P, G*h, R]: every step's gate gradients times the state before it, as the product reads that."""
    P, (T, B, _) = len(reverse), output.shape
    if T == 0:
        return output.new_zeros(P, grad_gates_hh.shape[2] // P, output.shape[2] // P)
    # Under vmap the rows of a sample may be few, and a sum of two products for each would be most of the work.
    if resets is not None or mask_h is not None or P > 4 or is_vmapped_call(grad_gates_hh, output):
        of_h = (output, h_0, lengths, resets, reset_h, mask_h, reverse)
        return _grad_weight(grad_gates_hh, reference.multiplied_h(*of_h))
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


def _pull_backward(args: Mapping[str, Any], results: Sequence[Tensor], needed: Collection[str], grads: Grads) -> Pulled:
    which = [name for name in args if name in needed]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return reference.backward(**{**args, **dict(zip(which, values, strict=True))})

    # torch.func.vjp and not torch.autograd.grad, which gives silent zeros once a functorch level has ended.
    primals, pull = torch.func.vjp(
        function,  # type: ignore[misc]
        *(args[name] for name in which),
    )
    pulled = pull(tuple(torch.zeros_like(y) if g is None else g for y, g in zip(primals, grads, strict=True)))
    return dict(zip(which, pulled, strict=True))


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
_FORWARD = _Rule(recurrent_forward, _composite_forward, pull_forward, frozenset(("gates_ih", "bias_hh")), (0, 3))
_BACKWARD = _Rule(recurrent_backward, reference.backward, _pull_backward, frozenset(), ())
_LINEAR = _Rule(grouped_linear, linear_by_aten, _pull_linear, frozenset(("bias",)), ())
_OUTER = _Rule(grouped_outer, outer_by_aten, _pull_outer, frozenset(), ())


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
        read = [None if name in rule.unread else a for name, a in zip(names_of(rule.op), args, strict=False)]
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
        found = ctx.rule.pullback(dict(zip(names, args, strict=False)), results, needed, grads)
        return (None, None, *(found.get(name) for name in names[:count]))


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
            if rule is _FORWARD:  # only here is it known that backward may follow
                args = tuple((named(recurrent_forward, args) | {"save": True}).values())
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
