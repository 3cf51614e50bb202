"""What may be in force around a call: transforms of torch.func, forward-mode AD, graphs being made, autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter

from .fallback import is_traced

# What make_fx records, of real tensors too, may be differentiated later. Other dispatch modes change nothing: a
# checkpoint's second forward pass may run without the mode of the first, and must do the same.
_MAKE_FX = torch._C._TorchDispatchModeKey.PROXY
_DISABLED = torch._C._disabled_torch_function_impl
_TENSORS = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def is_transformed(*tensors: Tensor | None) -> bool:
    """Does somebody differentiate, batch or record this call in a way for which only composed ops have rules?

    A graph of torch.compile or torch.export is none such: its ops are differentiated before it is made.

    Args:
        tensors: what the call reads. A level of forward-mode AD is all threads': that somebody else's is none of this
            call's business is told by tensors without tangents alone. Without tensors, any thread's counts.
    """
    if torch._C._are_functorch_transforms_active() or has_tangents(*tensors):
        return True
    return not torch.compiler.is_compiling() and is_traced_by_make_fx()


def has_tangents(*tensors: Tensor | None) -> bool:
    """Has one of them a tangent of forward-mode AD? Where that can't be seen: may one have?"""
    if forward_ad._current_level < 0:
        return False
    # A graph that dynamo makes shows no tangents; tensors of the legacy vmap (is_grads_batched) have no rule for it.
    if len(tensors) == 0 or torch.compiler.is_compiling():
        return True
    for x in tensors:
        if x is not None and x.is_floating_point():
            if torch._C._functorch.is_legacy_batchedtensor(x):
                return True
            if forward_ad.unpack_dual(x, level=0).tangent is not None:
                return True
    return False


def is_traced_by_make_fx() -> bool:
    return torch._C._get_dispatch_mode(_MAKE_FX) is not None


def is_recorded() -> bool:
    """Is a graph being made of what is called?"""
    return torch.compiler.is_compiling() or is_traced_by_make_fx()


def is_plain_call(*tensors: Tensor | None) -> bool:
    """Is nothing in force that wants to see more of a call than its kernel? tensors: see is_transformed."""
    if torch.compiler.is_compiling() or is_transformed(*tensors):
        return False
    return not (torch.is_autocast_enabled("cpu") or is_traced())


def is_plain(x: Tensor | None) -> bool:
    """Is it an ordinary CPU tensor, or None? Looks at no size, so that a graph gets no guard from it."""
    return x is None or ((type(x) is Tensor or type(x) is Parameter) and x.is_cpu)


def is_overloaded(*args: Any) -> bool:
    """Has one of them, or of the tuples among them, a ``__torch_function__`` of its own, as tensor-likes do?"""
    if torch.compiler.is_compiling():
        return False
    for x in args:
        if type(x) is tuple:
            if is_overloaded(*x):
                return True
        elif type(x) is not Tensor:
            found = getattr(type(x), "__torch_function__", _DISABLED)
            if found is not _DISABLED and getattr(found, "__func__", None) is not _TENSORS:
                return True
    return False


def is_unbatched(x: Tensor | None) -> bool:
    """Is it no tensor that a vmap has wrapped? In a backward with is_grads_batched=True nothing else tells of it."""
    functorch = torch._C._functorch
    return x is None or not (functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x))


def is_vmapped_call(*tensors: Tensor | None) -> bool:
    """Is torch.func.vmap in force, and nothing that makes a graph or casts, and fit the tensors the micro-kernel?"""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    if torch.is_autocast_enabled("cpu") or is_traced_by_make_fx():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return (
        any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)
        and all(map(is_plain, tensors))
        and {x.dtype for x in tensors if x is not None} in ({torch.float32}, {torch.float64})
    )


def wide_dtype(x: Tensor) -> torch.dtype:
    """A wider one for what is of a half type. No autocast casts it, nor one that a graph of the call runs under."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # there is no other there


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, no op casts what is on the tensor's device."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def in_autocast_dtype(x: Any) -> Any:
    """A tensor as the autocast in force casts an argument of a matrix product."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    kind = x.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
