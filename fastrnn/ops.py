"""The two ops as Python sees them: fake kernels, vmap rules and autocast. Their schemas stand in csrc/torch/ops.cpp,
their derivatives in autograd.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers the ops)

library = torch.library.Library("fastrnn", "FRAGMENT")
recurrent_forward = torch.ops.fastrnn.recurrent_forward.default
recurrent_backward = torch.ops.fastrnn.recurrent_backward.default


class CellInfo(NamedTuple):
    """What a cell needs per hidden unit, as the C++ registry states it."""

    gates: int
    states: int
    saved: int
    params: int
    separate_gates_hh: bool


CELLS: dict[str, CellInfo] = {
    name: CellInfo(*torch.ops.fastrnn.cell_info(name)) for name in torch.ops.fastrnn.cell_names()
}


# ---- shapes and dtypes without data ----


@torch.library.register_fake("fastrnn::recurrent_forward", lib=library)
def _(
    cell, gates_ih, weight_hh, bias_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c, reverse, save
):  # fmt: skip
    T, B, _ = gates_ih.shape
    P, Gh, R = weight_hh.shape
    info = CELLS[cell]
    h = Gh // info.gates
    return (
        gates_ih.new_empty(T, B, P * R),
        gates_ih.new_empty(B, P * R),
        gates_ih.new_empty(B, P * h) if c_0 is not None else gates_ih.new_empty(0),
        gates_ih.new_empty(T, B, P * info.saved * h) if save else gates_ih.new_empty(0),
    )


@torch.library.register_fake("fastrnn::recurrent_backward", lib=library)
def _(
    cell, grad_output, grad_h_n, grad_c_n, weight_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c,
    reverse, output, saved,
):  # fmt: skip
    T, B, _ = output.shape
    P, Gh, R = weight_hh.shape
    info = CELLS[cell]
    h = Gh // info.gates
    absent = 0
    return (
        output.new_empty(T, B, P * Gh),
        output.new_empty(T, B, P * Gh) if info.separate_gates_hh else output.new_empty(absent),
        output.new_empty(T, B, P * R) if weight_hr is not None else output.new_empty(absent),
        output.new_empty(B, P * R),
        output.new_empty(B, P * h) if c_0 is not None else output.new_empty(absent),
        output.new_empty(B, P * R) if reset_h is not None else output.new_empty(absent),
        output.new_empty(B, P * h) if reset_c is not None else output.new_empty(absent),
    )


# ---- vmap: a batched call is one call with a larger batch, or, where weights are batched, with more groups ----

# Kinds of arguments and results: s [T, B, P*n], v [B, P*n], w [P, ...], l [B] or [B, P], r [T, B] or [T, B, P],
# d one flag per group, - anything else. Where each kind takes the new dimension:
_INTO_BATCH = {"s": 1, "v": 0, "l": 0, "r": 1}
_INTO_GROUPS = {"s": 2, "v": 1, "w": 0, "l": 1, "r": 2}


def _fold(x: Tensor, dim: int | None, n: int, at: int) -> Tensor:
    """The batch dimension (or n copies where x has none) moved to `at` and merged with what stands there."""
    copies = x.unsqueeze(at).expand(*x.shape[:at], n, *x.shape[at:]) if dim is None else x.movedim(dim, at)
    return copies.flatten(at, at + 1)


def _mask_into_groups(x: Tensor, dim: int | None, n: int, kind: str, groups: int) -> Tensor:
    """lengths or resets, which groups share unless they have a dimension for them."""
    rank = 1 if kind == "l" else 2
    shared = x.dim() - (dim is not None) == rank
    if shared and dim is None:
        return x
    if shared:  # a trailing dimension of its own for every group
        x = x.movedim(dim, 0) if dim is not None else x
        x, dim = x.unsqueeze(-1).expand(*x.shape, groups), 0
    return _fold(x, dim, n, _INTO_GROUPS[kind])


def _vmap_rule(op: Callable[..., tuple[Tensor, ...]], kinds: str, results: str) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        n = info.batch_size
        into_groups = any(k == "w" and d is not None for k, d in zip(kinds, in_dims, strict=True))
        places = _INTO_GROUPS if into_groups else _INTO_BATCH
        groups = len(args[kinds.index("d")])

        def folded(x: Any, dim: int | None, kind: str) -> Any:
            if kind == "d" and into_groups:
                return list(x) * n
            if x is None or kind not in places:
                return x
            if into_groups and kind in "lr":
                return _mask_into_groups(x, dim, n, kind, groups)
            return _fold(x, dim, n, places[kind])

        out = op(*(folded(*each) for each in zip(args, in_dims, kinds, strict=True)))
        dims = tuple(places[k] if x.dim() > 1 else None for x, k in zip(out, results, strict=True))
        unfolded = tuple(
            x if d is None else x.unflatten(d, (n, x.shape[d] // n)) for x, d in zip(out, dims, strict=True)
        )
        return unfolded, dims

    return rule


torch.library.register_vmap(
    "fastrnn::recurrent_forward", _vmap_rule(recurrent_forward, "-swwwvvlrvvd-", "svvs"), lib=library
)
torch.library.register_vmap(
    "fastrnn::recurrent_backward", _vmap_rule(recurrent_backward, "-svvwwvvlrvvdss", "sssvvvv"), lib=library
)


# ---- autocast: the recurrence runs in the autocast dtype, as torch's matrix products do ----


def _register_autocast(device_type: str) -> None:
    key = f"Autocast{device_type.upper()}"
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(x: Any) -> Any:
            eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if eligible else x

        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return recurrent_forward(*map(cast, args))

    library.impl("recurrent_forward", kernel, key)


for _device_type in ("cpu", "cuda"):
    _register_autocast(_device_type)
