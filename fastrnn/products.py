"""The matrix products of a composed layer: its input projection, its weight gradients and its input's gradient.

A fused layer has its own (csrc/torch/layer.cpp). Where a composed one's backward is not to be differentiated, they
run on the recurrence's micro-kernel (``fastrnn::gemm``). So they do under ``torch.func.vmap``, as two ops with rules
of their own, for the products of many samples or members are what per-sample gradients and ensembles spend their time
in. Under everything else (other transforms of torch.func, forward-mode AD, double backward, few rows) they are
ATen's, so every transform has its rule already. Of float32 on CUDA they are those two ops' again, on cuBLAS, for
ATen's obey another switch for TF32 than torch.nn's recurrent networks do (csrc/torch/precision.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import library, register_fake
from .transforms import is_plain, is_plain_call, is_vmapped_call

_gemm = torch.ops.fastrnn.gemm.default
# Below this many rows the time goes into packing the other matrix.
_FEWEST_ROWS = 32


def _has_gemm(a: Tensor, b: Tensor) -> bool:
    """Can the micro-kernel take them?"""
    return is_plain_call(a, b) and is_plain(a) and is_plain(b) and {a.dtype, b.dtype} <= {torch.float32, torch.float64}


def has_own_precision(*tensors: Tensor) -> bool:
    """Are they float32 on CUDA, and stay it? Then their products obey the switch of torch.nn's recurrent networks."""
    return all(x.is_cuda and x.dtype is torch.float32 for x in tensors) and not torch.is_autocast_enabled("cuda")


def _is_slow(*tensors: Tensor) -> bool:
    """ATen multiplies float16 on a CPU at a tenth of the speed of float32, where it also sums in float32."""
    return all(x.is_cpu and x.dtype is torch.float16 for x in tensors)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``."""
    if _is_slow(input, weight):
        return linear(input.float(), weight.float(), None if bias is None else bias.float()).to(input.dtype)
    own = has_own_precision(input, weight)
    if not own and not torch._C._are_functorch_transforms_active():
        return F.linear(input, weight, bias)
    rows = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
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
    if _is_slow(a, b):
        return outer_products(a.float(), b.float()).to(a.dtype)
    if has_own_precision(a, b) or is_vmapped_call(a, b):
        return grouped_outer(a, b)
    if a.shape[1] == 1:
        return transposed_product(a.squeeze(1), b.squeeze(1)).unsqueeze(0)
    return outer_by_aten(a, b)


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: [m, n] from [rows, m] and [rows, n]."""
    if _is_slow(a, b):
        return transposed_product(a.float(), b.float()).to(a.dtype)
    if has_own_precision(a, b):
        return grouped_outer(a.unsqueeze(1), b.unsqueeze(1)).squeeze(0)
    if torch.is_grad_enabled() or not _has_gemm(a, b) or a.shape[0] < _FEWEST_ROWS:
        return a.t() @ b
    return _gemm(a, b, None, True, False)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b: [rows, n] from [rows, m] and [m, n]."""
    if _is_slow(a, b):
        return product(a.float(), b.float()).to(a.dtype)
    if torch.is_grad_enabled() or not _has_gemm(a, b) or a.shape[0] < _FEWEST_ROWS:
        return a @ b
    return _gemm(a, b, None, False, False)


@register_fake(_gemm)
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


@register_fake(grouped_linear)
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(weight.shape[0], input.shape[0], weight.shape[1]).transpose(0, 1)


@register_fake(grouped_outer)
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
