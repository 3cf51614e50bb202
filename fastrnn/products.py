"""The matrix products around a recurrence: the input projection and the weight gradients.

In plain eager execution on a CPU they run on the recurrence's own micro-kernel (``fastrnn::gemm``). Under everything
else (compilation, torch.func, forward-mode AD, autocast, half types, double backward, other devices, few rows) they are
ATen's, so every transform has its rule already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from . import _C  # noqa: F401  (registers the op)

_gemm = torch.ops.fastrnn.gemm.default
# Below this many rows the time goes into packing the other matrix.
_FEWEST_ROWS = 32


def _plain(*tensors: Tensor | None) -> bool:
    """Is this an ordinary eager call on the CPU, on dtypes that the micro-kernel has?"""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return False
    return all(
        x is None
        or (
            type(x) in (Tensor, torch.nn.Parameter)
            and x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)
        )
        for x in tensors
    )


class _Linear(torch.autograd.Function):
    """input [M, I], weight [N, I], bias [N] or None -> [M, N]."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _gemm(input, weight, bias, False, True)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(grad, weight) if needs_input else None,
            transposed_product(grad, input) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``: input [T, B, I], weight [N, I], bias [N] or None -> [T, B, N].

    Where the input is a transposed [B, T, I], so is the result: nothing is copied.
    """
    # _plain first: a comparison of sizes would put a guard into a graph
    if not _plain(input, weight, bias) or input.dtype != weight.dtype or input.numel() == 0:
        return F.linear(input, weight, bias)
    T, B, width = input.shape
    if T * B < _FEWEST_ROWS:
        return F.linear(input, weight, bias)
    batch_major = not input.is_contiguous() and input.transpose(0, 1).is_contiguous()
    rows = (input.transpose(0, 1) if batch_major else input).reshape(T * B, width)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, weight, bias)):
        out = _Linear.apply(rows, weight, bias)
    else:
        out = _gemm(rows, weight, bias, False, True)
    return out.view(B, T, -1).transpose(0, 1) if batch_major else out.view(T, B, -1)


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: [m, n] from [rows, m] and [rows, n]."""
    if torch.is_grad_enabled() or not _plain(a, b) or a.shape[0] < _FEWEST_ROWS:
        return a.t() @ b
    return _gemm(a, b, None, True, False)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b: [rows, n] from [rows, m] and [m, n]."""
    if torch.is_grad_enabled() or not _plain(a, b) or a.shape[0] < _FEWEST_ROWS:
        return a @ b
    return _gemm(a, b, None, False, False)


@torch.library.register_fake("fastrnn::gemm")
def _(a: Tensor, b: Tensor, bias: Tensor | None, transpose_a: bool, transpose_b: bool) -> Tensor:
    return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])
