"""Second derivatives of the recurrence, by its own kernels on dual numbers (``recurrent_forward_jvp`` and
``recurrent_backward_jvp``, csrc/torch/jvp.cpp), where autograd.py asks for them.

Let F(x) be recurrent_forward's results, x its arguments, and B(x, g) = F'(x)^T g their gradients. ``pull_dual`` makes
B(x, g) and its derivative in a direction, d/dt B(x + t v, g + t w) at t = 0: forward over reverse. It is all that there
is to be made, for

* of J(x, v) = (F(x), F'(x) v) with cotangents (a, b), reverse over forward, the gradients are
  by v  B(x, b)                     by x  B(x, a) + d/dt B(x + t v, b) = d/dt B(x + t v, b + t a)
* of B(x, g) with cotangent u, reverse over reverse, they are, since second derivatives are symmetric,
  by g  F'(x) u                     by x  d/dt B(x + t u, g)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import reference
from .fallback import KERNELS
from .gradients import Grads, Pulled, of_weights, pull_forward
from .ops import (
    names_of,
    recurrent_backward,
    recurrent_backward_jvp,
    recurrent_forward,
    recurrent_forward_jvp,
    results_of,
)
from .transforms import is_recorded

Args = Mapping[str, Any]  # an op's arguments by name

_GRADS = ("grad_output", "grad_h_n", "grad_c_n")
_CONSTANTS = ("mask_h", "keep_h", "keep_c")
_TransformType = torch._C._functorch.TransformType
_alive = torch._C._functorch.unwrap_if_dead  # for a pullback may run when its level of torch.func has ended


def _levels() -> Sequence[Any]:
    return torch._C._functorch.get_interpreter_stack() or ()


def are_batched(tensors: Iterable[Tensor | None]) -> bool:
    """By the legacy vmap of torch.autograd (is_grads_batched, vectorize), whose tensors take no tangents?"""
    return any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors)


def forward_levels() -> int:
    """How many derivatives forward are being made here?"""
    count = sum(level.key() == _TransformType.Jvp for level in _levels())
    return max(count, forward_ad._current_level + 1)


def has_kernel(args: Iterable[Any]) -> bool:
    """Do the ops with tangents take these arguments?"""
    floating = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
    return len({x.dtype for x in floating}) == 1 and all(x.is_cpu and x.dtype in KERNELS["cpu"] for x in floating)


def in_reverse_alone() -> bool:
    """Is there no transform here but reverse mode, and no graph being made?"""
    only = all(level.key() == _TransformType.Grad for level in _levels())
    return only and forward_ad._current_level < 0 and not is_recorded()


def is_differentiated_twice(args: Args) -> bool:
    """Is recurrent_forward called under torch.func, with another level there, or around it, that may ask for its
    gradients' gradients? And is their derivative one of the kernels', as that of clamped ones is not?"""
    levels, tensors = _levels(), [x for x in args.values() if _is_tensor(x)]
    if not levels or not in_reverse_alone() or args["grad_clip"] or not has_kernel(tensors):
        return False
    functorch = torch._C._functorch
    below = (functorch.get_unwrapped(x) if functorch.is_gradtrackingtensor(x) else x for x in tensors)
    return len(levels) > 1 or any(x.requires_grad for x in below)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _call(op: Any, given: Args) -> Any:
    return op(*(given.get(name) for name in names_of(op)))


def pull_dual(
    args: Args, tangents: Mapping[str, Tensor], needed: Collection[str], grads: Grads, along: Grads
) -> tuple[Sequence[Tensor], Pulled, Pulled]:
    """F'(x) v; B(x, g) and d/dt B(x + t v, g + t w), of what is needed.

    args: x, and tangents: v, those that are not zero, by the names of recurrent_forward. grads and along: g and w, of
    output, h_n and c_n.
    """
    given = {**args, "save": True, "grad_clip": 0.0, **{f"tangent_{name}": v for name, v in tangents.items()}}
    output, _, _, saved, *slopes = _call(recurrent_forward_jvp, given)
    if not needed:
        return slopes[:3], {}, {}
    given |= {"output": output, "saved": saved, "tangent_output": slopes[0], "tangent_saved": slopes[3]}
    given["initial"] = "h_0" in needed or "c_0" in needed
    count = len(_GRADS) if args["c_0"] is not None else len(_GRADS) - 1
    for name, g, w in list(zip(_GRADS, grads, along, strict=True))[:count]:
        given[name] = torch.zeros_like(w) if g is None and w is not None else g
        given[f"tangent_{name}"] = w
    pulled = _call(recurrent_backward_jvp, given)
    names = [name.removeprefix("grad_") for name in results_of(recurrent_backward)]
    found, found_along = (dict(zip(names, x, strict=True)) for x in (pulled[: len(names)], pulled[len(names) :]))

    def weights(found: Mapping[str, Tensor], results: Sequence[Tensor], own: Mapping[str, Tensor]) -> Pulled:
        return of_weights({**args, **own}, results, needed, found)

    primals = (found, (output, saved), {name: args[name] for name in tangents})
    return slopes[:3], *torch.func.jvp(weights, primals, (found_along, (slopes[0], slopes[3]), dict(tangents)))


# ---- as torch differentiates the reference, where something else than reverse mode is in force ----


def by_composite(composite: Callable[..., Any], args: Args, needed: Collection[str], grads: Grads) -> Pulled:
    """The gradients of composite(**args) by what is needed, given those of its results."""
    which = [name for name in args if name in needed]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return composite(**{**args, **dict(zip(which, values, strict=True))})  # type: ignore[no-any-return]

    # torch.func.vjp and not torch.autograd.grad, which gives silent zeros once a functorch level has ended.
    primals, pull = torch.func.vjp(
        function,  # type: ignore[misc]
        *(args[name] for name in which),
    )
    pulled = pull(tuple(torch.zeros_like(y) if g is None else g for y, g in zip(primals, grads, strict=True)))
    return dict(zip(which, pulled, strict=True))


def composite_jvp(composite: Callable[..., Any], **given: Any) -> tuple[Tensor, ...]:
    """The results of a composite and their tangents, which stand in `given` as ``tangent_..`` of its arguments.

    By reverse mode, for there may be a level of forward mode already, and torch bears no second: a pullback is a linear
    function, whose own pullback is the derivative forward.
    """
    args = {name: x for name, x in given.items() if not name.startswith("tangent_")}
    along = {name: x for name in args if (x := given.get(f"tangent_{name}")) is not None}

    def pulled(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(by_composite(composite, args, along, cotangents).values())  # type: ignore[arg-type]

    results = composite(**args)
    push = torch.func.vjp(pulled, *map(torch.zeros_like, results))[1]  # type: ignore[misc]
    return (*results, *push(tuple(along[name] for name in args if name in along)))


# ---- reverse over forward ----


def pull_forward_jvp(args: Args, results: Sequence[Tensor], needed: Collection[str], grads: Grads) -> Pulled:
    """recurrent_forward_jvp's gradients."""
    count = len(grads) // 2
    (*of_results, of_saved), (*of_tangents, of_saved_tangent) = grads[:count], grads[count:]
    of_saves = of_saved is not None or of_saved_tangent is not None
    if not in_reverse_alone() or args["grad_clip"] or of_saves or are_batched(grads):

        def forward(save: bool, **given: Any) -> tuple[Tensor, ...]:
            return reference.forward(**given)

        return by_composite(lambda **given: composite_jvp(forward, **given), args, needed, grads)
    given = {name: _alive(x) if _is_tensor(x) else x for name, x in args.items()}
    own = {name: given.pop(f"tangent_{name}", None) for name in names_of(recurrent_forward)}
    tangents = {name: v for name, v in own.items() if v is not None}
    both = {name.removeprefix("tangent_") for name in needed}
    _, values, slopes = pull_dual(given, tangents, both, tuple(of_tangents), tuple(of_results))
    found = {f"tangent_{name}": x for name, x in values.items()} | dict(slopes)
    return {name: found.get(name) for name in needed}


# ---- reverse over reverse ----


class _Gradients(torch.autograd.Function):
    """recurrent_forward's gradients as a function of its arguments, whatever forward has kept: output and saved have no
    gradient here, for that of the arguments is the whole one."""

    @staticmethod
    def forward(plain: dict[str, Any], names: Sequence[str], needed: Sequence[str], *tensors: Tensor) -> Any:
        args = {**plain, **dict(zip(names, tensors, strict=True))}
        grads = (*(args.get(name) for name in _GRADS), None)
        found = pull_forward(args, (args["output"], args["saved"]), needed, grads)
        return tuple(found[name] for name in needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plain, ctx.names, ctx.needed, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> Any:
        args = {**ctx.plain, **dict(zip(ctx.names, map(_alive, ctx.saved_tensors), strict=True))}
        asked = [name for name, need in zip(ctx.names, ctx.needs_input_grad[3:], strict=True) if need]
        asked = [name for name in asked if name not in ("output", "saved")]
        tangents = {name: u for name, u in zip(ctx.needed, along, strict=True) if u is not None}
        found: Pulled = {}
        if tangents and (forward_levels() or are_batched(along)):
            found = by_composite(_composite_gradients(ctx.needed), args, asked, along)
        elif tangents:
            grads = tuple(args.get(name) for name in _GRADS)
            of_args = [name for name in asked if name not in _GRADS]
            results, _, slopes = pull_dual(args, tangents, of_args, grads, (None,) * 3)
            found = {**slopes, **{name: x for name, x in zip(_GRADS, results, strict=True) if name in asked}}
        return (None, None, None, *(found.get(name) for name in ctx.names))


def _composite_gradients(needed: Sequence[str]) -> Callable[..., tuple[Tensor, ...]]:
    def gradients(**args: Any) -> tuple[Tensor, ...]:
        given = {name: args.get(name) for name in names_of(recurrent_forward) if name != "save"}
        grads = (*(args.get(name) for name in _GRADS), None)
        found = by_composite(reference.forward, given, needed, grads)
        return tuple(found[name] for name in needed)  # type: ignore[misc]

    return gradients


def gradients(args: Args, results: Sequence[Tensor], needed: Sequence[str], grads: Grads) -> Pulled:
    """pull_forward with a derivative by these kernels, of all that recurrent_forward was given."""
    *of_results, of_saved = grads
    if of_saved is not None or not in_reverse_alone():
        return pull_forward(args, results, needed, grads)
    needed = tuple(name for name in needed if name not in _CONSTANTS)
    given = {**args, **dict(zip(_GRADS, of_results, strict=True)), "output": results[0], "saved": results[1]}
    tensors = {name: _alive(x) for name, x in given.items() if _is_tensor(x)}
    plain = {name: x for name, x in given.items() if not _is_tensor(x)}
    return dict(zip(needed, _Gradients.apply(plain, tuple(tensors), needed, *tensors.values()), strict=True))
