"""The matrix products around a recurrence: its input projection, its weight gradients and its input's gradient.

In plain eager execution on a CPU they run on the recurrence's own micro-kernel (``fastrnn::gemm``). So they do under
``torch.func.vmap``, as two ops with rules of their own, for the products of many samples or members are what per-sample
gradients and ensembles spend their time in. Under everything else (graph capture, other transforms of torch.func,
forward-mode AD, autocast, half types, double backward, other devices, few rows) they are ATen's, so every transform has
its rule already. Of float32 on CUDA they are those two ops' again, on cuBLAS, for ATen's obey another switch for TF32
than torch.nn's recurrent networks do (csrc/torch/precision.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .fallback import is_traced
from .ops import library

_gemm = torch.ops.fastrnn.gemm.default
# What make_fx records, of real tensors too, may be differentiated later. Other dispatch modes change nothing: a
# checkpoint's second forward pass may run without the mode of the first, and must do the same.
_MAKE_FX = torch._C._TorchDispatchModeKey.PROXY
_DISABLED = torch._C._disabled_torch_function_impl
_TENSORS = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
# Below this many rows the time goes into packing the other matrix.
_FEWEST_ROWS = 32


def is_plain_call() -> bool:
    """Is nothing in force that wants to see more of a call than its kernel?"""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_dispatch_mode(_MAKE_FX) is not None
        or is_traced()
    )


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


def _has_gemm(a: Tensor, b: Tensor) -> bool:
    """Can the micro-kernel take them?"""
    return is_plain_call() and is_plain(a) and is_plain(b) and {a.dtype, b.dtype} <= {torch.float32, torch.float64}


def is_vmapped_call(*tensors: Tensor | None) -> bool:
    """Is torch.func.vmap in force, and nothing that makes a graph or casts, and fit the tensors the micro-kernel?"""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._get_dispatch_mode(_MAKE_FX) is not None:
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return (
        any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)
        and all(map(is_plain, tensors))
        and {x.dtype for x in tensors if x is not None} in ({torch.float32}, {torch.float64})
    )


def has_own_precision(*tensors: Tensor) -> bool:
    """Are they float32 on CUDA, and stay it? Then their products obey the switch of torch.nn's recurrent networks."""
    return all(x.is_cuda and x.dtype is torch.float32 for x in tensors) and not torch.is_autocast_enabled("cuda")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``."""
    own = has_own_precision(input, weight)
    if not own and not torch._C._are_functorch_transforms_active():
        return F.linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    if own or is_vmapped_call(input, weight, bias):
        out = grouped_linear(
            rows.unsqueeze(1), weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0)
        ).squeeze(1)
    else:
        # Not of 3 dimensions: F.linear looks at sizes in a way that make_fx of a torch.func.grad cannot trace.
        out = F.linear(rows, weight, bias)
    return out.reshape(*input.shape[:-1], weight.shape[0])


def outer_products(a: Tensor, b: Tensor) -> Tensor:
    """sum over rows r of a[r, p, :] b[r, p, :]^T: [P, m, n] from [rows, P, m] and [rows, P, n]."""
    if has_own_precision(a, b) or is_vmapped_call(a, b):
        return grouped_outer(a, b)
    if a.shape[1] == 1:
        return transposed_product(a.squeeze(1), b.squeeze(1)).unsqueeze(0)
    return outer_by_aten(a, b)


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: [m, n] from [rows, m] and [rows, n]."""
    if has_own_precision(a, b):
        return grouped_outer(a.unsqueeze(1), b.unsqueeze(1)).squeeze(0)
    if torch.is_grad_enabled() or not _has_gemm(a, b) or a.shape[0] < _FEWEST_ROWS:
        return a.t() @ b
    return _gemm(a, b, None, True, False)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b: [rows, n] from [rows, m] and [m, n]."""
    if torch.is_grad_enabled() or not _has_gemm(a, b) or a.shape[0] < _FEWEST_ROWS:
        return a @ b
    return _gemm(a, b, None, False, False)


@torch.library.register_fake("fastrnn::gemm")
def _(a: Tensor, b: Tensor, bias: Tensor | None, transpose_a: bool, transpose_b: bool) -> Tensor:
    return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])


# ---- products of groups ----

grouped_linear = torch.ops.fastrnn.grouped_linear.default
grouped_outer = torch.ops.fastrnn.grouped_outer.default


def linear_by_aten(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight[p] input[r, p, :] + bias[p]: [rows, P, m] from [rows, P, n], [P, m, n] and [P, m]."""
    out = torch.bmm(input.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    return out if bias is None else out + bias


def outer_by_aten(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.permute(1, 2, 0), b.transpose(0, 1))


@torch.library.register_fake("fastrnn::grouped_linear", lib=library)
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(weight.shape[0], input.shape[0], weight.shape[1]).transpose(0, 1)


@torch.library.register_fake("fastrnn::grouped_outer", lib=library)
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], a.shape[2], b.shape[2])


def _into(x: Tensor, dim: int | None, n: int, at: int) -> Tensor:
    """The batch dimension (or n copies where x has none) moved to `at`."""
    return x.unsqueeze(at).expand(*x.shape[:at], n, *x.shape[at:]) if dim is None else x.movedim(dim, at)


@torch.library.register_vmap("fastrnn::grouped_linear", lib=library)
def _(
    info: Any, in_dims: Sequence[int | None], input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, int]:
    n = info.batch_size
    input = _into(input, in_dims[0], n, 1)  # behind the rows: [T, B] stays in its order
    if in_dims[1] is None and in_dims[2] is None:  # more rows
        return grouped_linear(input.flatten(0, 1), weight, bias).unflatten(0, (-1, n)), 1
    weight = _into(weight, in_dims[1], n, 0).flatten(0, 1)  # more groups
    bias = None if bias is None else _into(bias, in_dims[2], n, 0).flatten(0, 1)
    return grouped_linear(input.flatten(1, 2), weight, bias).unflatten(1, (n, -1)), 1


@torch.library.register_vmap("fastrnn::grouped_outer", lib=library)
def _(info: Any, in_dims: Sequence[int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    n = info.batch_size
    a, b = (_into(x, dim, n, 1).flatten(1, 2) for x, dim in zip((a, b), in_dims, strict=True))
    return grouped_outer(a, b).unflatten(0, (n, -1)), 0
