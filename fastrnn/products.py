"""The matrix products around a recurrence: its weight gradients and its input's gradient.

In plain eager execution on a CPU they run on the recurrence's own micro-kernel (``fastrnn::gemm``). Under everything
else (graph capture, torch.func, forward-mode AD, autocast, half types, double backward, other devices, few rows) they
are ATen's, so every transform has its rule already.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter

from . import _C  # noqa: F401  (registers the op)

_gemm = torch.ops.fastrnn.gemm.default
# What make_fx records, of real tensors too, may be differentiated later. Other dispatch modes change nothing: a
# checkpoint's second forward pass may run without the mode of the first, and must do the same.
_MAKE_FX = torch._C._TorchDispatchModeKey.PROXY
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
    )


def is_plain(x: Tensor | None) -> bool:
    """Is it an ordinary CPU tensor, or None? Looks at no size, so that a graph gets no guard from it."""
    return x is None or ((type(x) is Tensor or type(x) is Parameter) and x.is_cpu)


def _has_gemm(a: Tensor, b: Tensor) -> bool:
    """Can the micro-kernel take them?"""
    return is_plain_call() and is_plain(a) and is_plain(b) and {a.dtype, b.dtype} <= {torch.float32, torch.float64}


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: [m, n] from [rows, m] and [rows, n]."""
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
