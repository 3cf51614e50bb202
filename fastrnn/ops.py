"""The two ops as Python sees them: fake kernels, vmap rules and autocast. Their schemas stand in csrc/torch/ops.cpp,
their derivatives in autograd.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from . import _C  # noqa: F401  (registers the ops)
from .imports import when_imported

library = torch.library.Library("fastrnn", "FRAGMENT")
recurrent_forward = torch.ops.fastrnn.recurrent_forward.default
recurrent_backward = torch.ops.fastrnn.recurrent_backward.default
clamp_gradient = torch.ops.fastrnn.clamp_gradient.default


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


# ---- calls without data: the checks of csrc/torch/prepare.cpp again, for graphs never reach those, and the shapes ----

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Door:
    """Checks the arguments of a call whose first tensor is `reference`, as the kernels' door does."""

    def __init__(self, op: str, cell: str, name: str, reference: Tensor, weight_hh: Tensor, args: dict[str, Any]):
        if cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
        self.op, self.name, self.reference, self.info = op, name, reference, CELLS[cell]
        if reference.dtype not in _DTYPES:
            raise TypeError(f"{op}: {name}: expected float32, float64, bfloat16 or float16, got {reference.dtype}")
        self.sized(name, reference, reference.dim() == 3, "3 dimensions")
        gates, second = self.info.gates, self.info.states > 1
        self.sized("weight_hh", weight_hh, weight_hh.dim() == 3, "3 dimensions (groups, gates * hidden, width)")
        self.T, self.B, _ = reference.shape
        self.P, self.Gh, self.R = weight_hh.shape
        self.h = self.Gh // gates
        whole = self.P > 0 and self.h > 0 and self.R > 0 and self.Gh == gates * self.h
        self.sized("weight_hh", weight_hh, whole, f"(groups, {gates} * hidden, width) with every size above 0")
        given = {k for k, x in args.items() if x is not None}
        for unwanted in {"weight_hr", "c_0", "reset_c", "grad_c_n"} & given if not second else ():
            raise RuntimeError(f"{op}: {unwanted}: expected none for cell '{cell}', got a tensor")
        for unwanted in {"reset_h", "reset_c"} & given if "resets" not in given else ():
            raise RuntimeError(f"{op}: {unwanted}: expected none without resets, got a tensor")
        if second and "c_0" not in given:
            raise RuntimeError(f"{op}: c_0: expected a tensor for cell '{cell}', got none")
        if len(args["reverse"]) != self.P:
            raise RuntimeError(f"{op}: reverse: expected {self.P} values (groups), got {len(args['reverse'])}")
        if "weight_hr" not in given:
            self.sized("weight_hh", weight_hh, self.h == self.R, f"[{self.P}, {self.Gh}, {self.h}] without weight_hr")
        self.masks(args.get("lengths"), args.get("resets"))
        B, P, Gh, h, R = self.B, self.P, self.Gh, self.h, self.R
        sizes = {"weight_hh": (P, Gh, R), "bias_hh": (P, Gh), "weight_hr": (P, R, h)}
        sizes |= dict.fromkeys(("h_0", "reset_h", "grad_h_n"), (B, P * R))
        sizes |= dict.fromkeys(("c_0", "reset_c", "grad_c_n"), (B, P * h))
        sizes |= dict.fromkeys(("output", "grad_output"), (self.T, B, P * R))
        sizes |= {"gates_ih": (self.T, B, P * Gh), "saved": (self.T, B, P * self.info.saved * h)}
        for argument, x in ({"weight_hh": weight_hh, name: reference} | args).items():
            if isinstance(x, Tensor) and argument in sizes:
                self.floating(argument, x, sizes[argument])

    def sized(self, name: str, x: Tensor, good: Any, expected: str) -> None:
        torch._check(good, lambda: f"{self.op}: {name}: expected {expected}, got {list(x.shape)}")

    def placed(self, name: str, x: Tensor) -> None:
        if x.device != self.reference.device:
            raise RuntimeError(
                f"{self.op}: {name}: expected device {self.reference.device} (that of {self.name}), got {x.device}"
            )

    def floating(self, name: str, x: Tensor, expected: tuple[int, ...]) -> None:
        self.sized(name, x, x.dim() == len(expected), str(list(expected)))
        for got, want in zip(x.shape, expected, strict=True):
            self.sized(name, x, got == want, str(list(expected)))
        if x.dtype != self.reference.dtype:
            raise RuntimeError(
                f"{self.op}: {name}: expected dtype {self.reference.dtype} (that of {self.name}), got {x.dtype}"
            )
        self.placed(name, x)

    def masks(self, lengths: Tensor | None, resets: Tensor | None) -> None:
        T, B, P = self.T, self.B, self.P
        if lengths is not None:
            if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
                raise TypeError(f"{self.op}: lengths: expected an integer dtype, got {lengths.dtype}")
            fits = lengths.shape in ((B,), (B, P))
            self.sized("lengths", lengths, fits, f"[{B}] or [{B}, {P}] (batch, groups)")
            if lengths.is_meta:
                self.placed("lengths", lengths)
        if resets is not None:
            if resets.dtype != torch.bool:
                raise TypeError(f"{self.op}: resets: expected dtype bool, got {resets.dtype}")
            fits = resets.shape in ((T, B), (T, B, P))
            self.sized("resets", resets, fits, f"[{T}, {B}] or [{T}, {B}, {P}]")
            self.placed("resets", resets)


def _check_grad_clip(op: str, grad_clip: float) -> None:
    if not grad_clip >= 0:
        raise ValueError(f"{op}: grad_clip: expected 0 (none) or a number above, got {grad_clip}")


@torch.library.register_fake("fastrnn::recurrent_forward", lib=library)
def _(
    cell, gates_ih, weight_hh, bias_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c, reverse, save,
    grad_clip=0.0,
):  # fmt: skip
    args = dict(
        bias_hh=bias_hh, weight_hr=weight_hr, h_0=h_0, c_0=c_0, lengths=lengths, resets=resets, reset_h=reset_h,
        reset_c=reset_c, reverse=reverse,
    )  # fmt: skip
    _check_grad_clip("recurrent_forward", grad_clip)
    d = _Door("recurrent_forward", cell, "gates_ih", gates_ih, weight_hh, args)
    empty = gates_ih.new_empty
    return (
        empty(d.T, d.B, d.P * d.R),
        empty(d.B, d.P * d.R),
        empty(d.B, d.P * d.h) if c_0 is not None else empty(0),
        empty(d.T, d.B, d.P * d.info.saved * d.h) if save else empty(0),
    )


@torch.library.register_fake("fastrnn::recurrent_backward", lib=library)
def _(
    cell, grad_output, grad_h_n, grad_c_n, weight_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c,
    reverse, output, saved, initial=True, grad_clip=0.0,
):  # fmt: skip
    args = dict(
        grad_output=grad_output, grad_h_n=grad_h_n, grad_c_n=grad_c_n, weight_hr=weight_hr, h_0=h_0, c_0=c_0,
        lengths=lengths, resets=resets, reset_h=reset_h, reset_c=reset_c, reverse=reverse, saved=saved,
    )  # fmt: skip
    _check_grad_clip("recurrent_backward", grad_clip)
    d = _Door("recurrent_backward", cell, "output", output, weight_hh, args)
    empty = output.new_empty
    return (
        empty(d.T, d.B, d.P * d.Gh),
        empty(d.T, d.B, d.P * d.Gh) if d.info.separate_gates_hh else empty(0),
        empty(d.T, d.B, d.P * d.R) if weight_hr is not None else empty(0),
        empty(d.B, d.P * d.R) if initial else empty(0),
        empty(d.B, d.P * d.h) if initial and c_0 is not None else empty(0),
        empty(d.B, d.P * d.R) if reset_h is not None else empty(0),
        empty(d.B, d.P * d.h) if reset_c is not None else empty(0),
    )


@torch.library.register_fake("fastrnn::clamp_gradient", lib=library)
def _(x, limit):
    return torch.empty_like(x)


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


_DEFAULTS = (True, 0.0)  # of the last arguments: recurrent_backward's initial, and grad_clip


def _vmap_rule(op: Callable[..., tuple[Tensor, ...]], kinds: str, results: str) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        n = info.batch_size
        # torch leaves out trailing arguments that have their default value
        in_dims = (*in_dims, *(None for _ in kinds[len(in_dims) :]))
        args = (*args, *_DEFAULTS[len(_DEFAULTS) - (len(kinds) - len(args)) :])
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
    "fastrnn::recurrent_forward", _vmap_rule(recurrent_forward, "-swwwvvlrvvd--", "svvs"), lib=library
)
torch.library.register_vmap(
    "fastrnn::recurrent_backward", _vmap_rule(recurrent_backward, "-svvwwvvlrvvdss--", "sssvvvv"), lib=library
)


@torch.library.register_vmap("fastrnn::clamp_gradient", lib=library)
def _(info, in_dims, x, limit):
    return clamp_gradient(x, limit), in_dims[0]


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


# ---- inductor: our kernels are what it calls, also where it may not decide so for ops that it does not know ----

when_imported(
    "torch._inductor.lowering",
    lambda lowering: lowering.FALLBACK_ALLOW_LIST.update(
        f"fastrnn::{op}" for op in ("recurrent_forward", "recurrent_backward", "quantized_forward", "clamp_gradient")
    ),
)


# ---- torch.export.draft_export ----


def _beside_real_tensors(mode: Any, op: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
    """A call without data where each one is made with data, too, as by draft_export.

    It asks whether a call has written to its arguments, and takes every optional tensor that is None for one that was
    written to (``MutationChecker`` in torch/_library/utils.py compares None with False). So the call with data is ours.
    """
    asked, mode.propagate_real_tensors = mode.propagate_real_tensors, False
    try:
        results = mode.__torch_dispatch__(op, types, args, kwargs)
    finally:
        mode.propagate_real_tensors = asked
    if asked:
        real = [x.real_tensor if isinstance(x, FakeTensor) else x for x in args]
        if all(x is not None for x, fake in zip(real, args, strict=True) if isinstance(fake, FakeTensor)):
            found = op(*real, **(kwargs or {}))
            pairs = zip(results, found, strict=True) if isinstance(found, tuple) else [(results, found)]
            for fake, x in pairs:
                fake.real_tensor = x
    return results


for _op in ("recurrent_forward", "recurrent_backward", "quantized_forward", "grouped_linear", "gemm"):
    torch.library.register_torch_dispatch(f"fastrnn::{_op}", FakeTensorMode, _beside_real_tensors, lib=library)
