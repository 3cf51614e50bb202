"""The ops as Python sees them: fake kernels, vmap rules and autocast. Their schemas stand in csrc/torch/ops.cpp, their
derivatives in csrc/torch/autograd.cpp (of a layer) and autograd.py (of the recurrence).

Arguments are found by the names that the schemas give them, so no position of one stands here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from . import _C  # noqa: F401  (registers the ops)
from .imports import when_imported
from .records import LayerWeights, rows_of

library = torch.library.Library("fastrnn", "FRAGMENT")
recurrent_forward = torch.ops.fastrnn.recurrent_forward.default
recurrent_backward = torch.ops.fastrnn.recurrent_backward.default
recurrent_forward_jvp = torch.ops.fastrnn.recurrent_forward_jvp.default
recurrent_backward_jvp = torch.ops.fastrnn.recurrent_backward_jvp.default
clamp_gradient = torch.ops.fastrnn.clamp_gradient.default
bernoulli = torch.ops.fastrnn.bernoulli.default
_MODULE_OPS = (
    "recurrent_forward", "recurrent_backward", "recurrent_forward_jvp", "recurrent_backward_jvp", "layer_forward",
    "layer_backward", "quantized_forward",
)  # fmt: skip


@functools.cache
def names_of(op: Any) -> tuple[str, ...]:
    """An op's arguments by name, in order."""
    return tuple(argument.name for argument in op._schema.arguments)


# Which of a layer's weights, by the names of LayerWeights, each op of the recurrence takes, in order.
FORWARD_WEIGHTS, BACKWARD_WEIGHTS = (
    tuple(name for name in names_of(op) if name in LayerWeights._fields)
    for op in (recurrent_forward, recurrent_backward)
)


def named(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All arguments of a call by name, in the schema's order; torch leaves out those that have their default value."""
    given = dict(zip(names_of(op), args, strict=False)) | dict(kwargs or {})
    return {a.name: given.get(a.name, a.default_value) for a in op._schema.arguments}


def register_fake(op: Any) -> Callable[[Callable[..., Any]], None]:
    """Makes a function an op's fake kernel; it is given all arguments by name. None for a tensor, which torch's parser
    lets through, is refused as the other kernels refuse it.
    """
    tensors = [a.name for a in op._schema.arguments if isinstance(a.type, torch.TensorType)]

    def register(function: Callable[..., Any]) -> None:
        @torch.library.register_fake(op._schema.name, lib=library)
        def fake(*args: Any, **kwargs: Any) -> Any:
            given = named(op, args, kwargs)
            for name in tensors:
                if given[name] is None:
                    raise TypeError(f"{op._schema.name.removeprefix('fastrnn::')}: {name}: expected a tensor, got None")
            return function(**given)

    return register


def results_of(op: Any) -> tuple[str, ...]:
    """An op's results by name, in order."""
    return tuple(result.name for result in op._schema.returns)


class CellInfo(NamedTuple):
    """What a cell needs per hidden unit, as the C++ registry states it."""

    gates: int
    states: int
    saved: int
    params: int
    separate_gates_hh: bool
    keeps_made: bool  # under zoneout of the last state one more value is saved: that state as the cell made it
    zoneout: bool  # it runs under zoneout

    @property
    def in_c(self) -> int:
        """How many states there are besides h. Calls have them side by side as one tensor that they name c, of H
        values a state: [.., in_c * H], of a group or direction."""
        return self.states - 1

    @property
    def tensors(self) -> int:
        """How many tensors a call has its states as: h, or h and c."""
        return min(self.states, 2)

    def widths(self, R: Any, H: Any) -> tuple[Any, ...]:
        """Of h and, where there is one, c."""
        return (R, self.in_c * H)[: self.tensors]

    def is_wide(self, dtype: torch.dtype) -> bool:
        """Has what goes from one op to another to be in a wider dtype than this one, a call's? Where a state is the
        logarithm of what others are divided by, as an sLSTM's m, a half type's rounding of it, and of the gates that it
        comes from, is a factor to those."""
        return self.states > 2 and dtype.itemsize == 2

    def saved_values(self, keep_h: Any, keep_c: Any) -> int:
        """Values of a unit and step in a call's ``saved``; the states besides h are the last of them."""
        return self.saved + (self.keeps_made and (keep_c if self.states > 1 else keep_h) is not None)


CELLS: dict[str, CellInfo] = {
    name: CellInfo(*torch.ops.fastrnn.cell_info(name)) for name in torch.ops.fastrnn.cell_names()
}


def weight_sizes(cell: str, h: Any, R: Any, I: Any = 0) -> dict[str, tuple[Any, ...]]:  # noqa: E741
    """Of a group's weights: h units, R the width of state 0, I input features."""
    Gh = CELLS[cell].gates * h
    return {
        "weight_ih": (Gh, I), "weight_hh": (Gh, R), "bias_ih": (Gh,), "bias_hh": (Gh,), "weight_hr": (R, h),
        "params": (CELLS[cell].params, h),
    }  # fmt: skip


# ---- calls without data: the checks of csrc/torch/prepare.cpp again, for graphs never reach those, and the shapes ----

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Checker:
    """Checks a call of the recurrence as the kernels do; the tensor `name` says dtype and device."""

    def __init__(self, op: str, name: str, args: dict[str, Any]) -> None:
        cell, reference, weight_hh = args["cell"], args[name], args["weight_hh"]
        _check_cell(cell)
        self.op, self.name, self.reference, self.info = op, name, reference, CELLS[cell]
        if reference.dtype not in _DTYPES:
            raise TypeError(f"{op}: {name}: expected float32, float64, bfloat16 or float16, got {reference.dtype}")
        if not args.get("grad_clip", 0.0) >= 0:
            raise ValueError(f"{op}: grad_clip: expected 0 (none) or a number above, got {args['grad_clip']}")
        self.sized(name, reference, reference.dim() == 3, "3 dimensions")
        gates, second, in_c = self.info.gates, self.info.states > 1, self.info.in_c
        self.sized("weight_hh", weight_hh, weight_hh.dim() == 3, "3 dimensions (groups, gates * hidden, width)")
        self.T, self.B, _ = reference.shape
        self.P, self.Gh, self.R = weight_hh.shape
        self.h = self.Gh // gates
        whole = self.P > 0 and self.h > 0 and self.R > 0 and self.Gh == gates * self.h
        self.sized("weight_hh", weight_hh, whole, f"(groups, {gates} * hidden, width) with every size above 0")
        given = {k for k, x in args.items() if x is not None}
        second_states = set() if second else {"c_0", "reset_c", "grad_c_n", "keep_c"}
        params = {"params"} if self.info.params else set()
        zoneout = set() if self.info.zoneout else {"keep_h", "keep_c"}
        projection = set() if self.info.states == 2 else {"weight_hr"}
        for unwanted in (second_states | projection | zoneout | ({"params"} - params)) & given:
            raise RuntimeError(f"{op}: {unwanted}: expected none for cell '{cell}', got a tensor")
        for unwanted in {"reset_h", "reset_c"} & given if "resets" not in given else ():
            raise RuntimeError(f"{op}: {unwanted}: expected none without resets, got a tensor")
        for name in (*("h_0", "c_0")[: self.info.states], *params):
            if name not in given:
                raise RuntimeError(f"{op}: {name}: expected a tensor for cell '{cell}', got none")
        if len(args["reverse"]) != self.P:
            raise RuntimeError(f"{op}: reverse: expected {self.P} values (groups), got {len(args['reverse'])}")
        if "weight_hr" not in given:
            self.sized("weight_hh", weight_hh, self.h == self.R, f"[{self.P}, {self.Gh}, {self.h}] without weight_hr")
        self.boundaries(args["lengths"], args["resets"])
        self.saved = self.info.saved_values(args["keep_h"], args["keep_c"])
        B, P, Gh, h, R = self.B, self.P, self.Gh, self.h, self.R
        sizes = {name: (P, *size) for name, size in weight_sizes(cell, h, R).items()}
        sizes |= dict.fromkeys(("h_0", "reset_h", "grad_h_n", "mask_h"), (B, P * R))
        sizes |= dict.fromkeys(("c_0", "reset_c", "grad_c_n"), (B, P * in_c * h))
        sizes |= dict.fromkeys(("output", "grad_output", "keep_h"), (self.T, B, P * R))
        sizes |= {
            "gates_ih": (self.T, B, P * Gh),
            "keep_c": (self.T, B, P * h),
            "saved": (self.T, B, P * self.saved * h),
        }
        for argument, x in args.items():
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
        if x.dtype != self.reference.dtype and not (name.startswith("keep_") and x.dtype == torch.bool):
            raise RuntimeError(
                f"{self.op}: {name}: expected dtype {self.reference.dtype} (that of {self.name}), got {x.dtype}"
            )
        self.placed(name, x)

    def boundaries(self, lengths: Tensor | None, resets: Tensor | None) -> None:
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


@register_fake(recurrent_forward)
def _(**given):
    c = _Checker("recurrent_forward", "gates_ih", given)
    empty = given["gates_ih"].new_empty
    return (
        empty(c.T, c.B, c.P * c.R),
        empty(c.B, c.P * c.R),
        empty(c.B, c.P * c.info.in_c * c.h) if c.info.states > 1 else empty(0),
        empty(c.T, c.B, c.P * c.saved * c.h) if given["save"] else empty(0),
    )


@register_fake(recurrent_backward)
def _(**given):
    c = _Checker("recurrent_backward", "output", given)
    empty, initial = given["output"].new_empty, given["initial"]
    wide = torch.promote_types(given["output"].dtype, torch.float32)
    return (
        empty(c.T, c.B, c.P * c.Gh),
        empty(c.T, c.B, c.P * c.Gh) if c.info.separate_gates_hh else empty(0),
        empty(c.T, c.B, c.P * c.R) if given["weight_hr"] is not None else empty(0),
        empty(c.B, c.P * c.R) if initial else empty(0),
        empty(c.B, c.P * c.info.in_c * c.h) if initial and c.info.states > 1 else empty(0),
        empty(c.B, c.P * c.R) if given["reset_h"] is not None else empty(0),
        empty(c.B, c.P * c.info.in_c * c.h) if given["reset_c"] is not None else empty(0),
        empty(c.B, c.P * c.info.params * c.h, dtype=wide) if given["params"] is not None else empty(0),
    )


def _register_fake_jvp(op: Any, jvp: Any) -> None:
    """Results as those of op, and their tangents likewise."""

    @register_fake(jvp)
    def _(**given):
        results = op(*(given[name] for name in names_of(op)))
        return (*results, *map(torch.empty_like, results))


_register_fake_jvp(recurrent_forward, recurrent_forward_jvp)
_register_fake_jvp(recurrent_backward, recurrent_backward_jvp)

layer_forward = torch.ops.fastrnn.layer_forward.default
layer_backward = torch.ops.fastrnn.layer_backward.default


def _check_cell(cell: str) -> None:
    if cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")


def _layer_sizes(op: str, given: dict[str, Any]) -> tuple[int, int, int]:
    """P, R, h"""
    _check_cell(given["cell"])
    P = len(given["reverse"])
    if P == 0:
        raise RuntimeError(f"{op}: reverse: expected a value for every group, got none")
    for name in LayerWeights._fields:
        count = len(given[name] or ())
        if count != P and (count or name == "weight_hh"):
            raise RuntimeError(f"{op}: {name}: expected {P} tensors (groups), got {count}")
    weight = given["weight_hh"][0]
    if weight.dim() != 2:
        raise RuntimeError(f"{op}: weight_hh: expected 2 dimensions (gates * hidden, width), got {list(weight.shape)}")
    Gh, R = weight.shape
    return P, R, Gh // CELLS[given["cell"]].gates


def _is_ragged(given: dict[str, Any]) -> bool:
    return given["batch_sizes"] is not None or given["offsets"] is not None


def _input_sizes(given: dict[str, Any]) -> str:
    rows = "N" if _is_ragged(given) else "T, B"
    return f"[{rows}, features], or tokens [{rows}] of an integer dtype"


def _check_layer(given: dict[str, Any], B: int) -> None:
    """That tensors of a call of layer_forward fit each other: one without data brings all of them here."""
    P, R, h = _layer_sizes("layer_forward", given)
    input = given["input"]
    dense = input.is_floating_point()
    first, whose = (input, "input") if dense else (given["weight_ih"][0], "weight_ih")
    I = input.shape[-1] if dense else first.shape[1]  # noqa: E741
    sizes = weight_sizes(given["cell"], h, R, I)
    sizes |= dict.fromkeys(("h_0", "reset_h", "mask_h"), (P, B, R))
    sizes |= dict.fromkeys(("c_0", "reset_c"), (P, B, CELLS[given["cell"]].in_c * h))
    steps = input.shape[:-1] if dense else input.shape
    sizes |= {"keep_h": (*steps, P * R), "keep_c": (*steps, P * h)}

    def check(name: str, x: Tensor, size: tuple[int, ...]) -> None:
        def message() -> str:
            return f"layer_forward: {name}: expected {list(size)}, got {list(x.shape)}"

        torch._check(x.dim() == len(size), message)
        for got, want in zip(x.shape, size, strict=True):
            torch._check(got == want, message)
        for what in ("dtype", "device"):
            if what == "dtype" and name.startswith("keep_") and x.dtype == torch.bool:
                continue
            if getattr(first, what) != getattr(x, what):
                wanted = f"expected {what} {getattr(first, what)} (that of {whose})"
                raise RuntimeError(f"layer_forward: {name}: {wanted}, got {getattr(x, what)}")

    for name, size in sizes.items():
        x = given[name]
        for each in x if isinstance(x, (list, tuple)) else () if x is None else (x,):
            check(name, each, size)


@register_fake(layer_forward)
def _(**given):
    P, R, h = _layer_sizes("layer_forward", given)
    input, h_0, info = given["input"], given["h_0"], CELLS[given["cell"]]
    tokens = not input.is_floating_point()
    if input.dim() != 3 - tokens - _is_ragged(given):
        raise RuntimeError(f"layer_forward: input: expected {_input_sizes(given)}, got {list(input.shape)}")
    if not given["weight_ih"]:
        raise RuntimeError(f"layer_forward: weight_ih: expected {P} tensors (groups), got 0")
    steps = input.shape if tokens else input.shape[:-1]  # T, B or N
    B = rows_of(input, given["batch_sizes"], given["offsets"]) if h_0 is None else h_0.shape[1]
    _check_layer(given, B)
    empty = given["weight_hh"][0].new_empty
    return (
        empty(*steps, P * R),
        empty(P, B, R),
        empty(P, B, info.in_c * h) if info.states > 1 else empty(0),
        empty(*steps, P * info.in_c * h) if given["all_states"] else empty(0),
        empty(*steps, P * info.saved_values(given["keep_h"], given["keep_c"]) * h) if given["save"] else empty(0),
    )


@register_fake(layer_backward)
def _(**given):
    P, R, h = _layer_sizes("layer_backward", given)
    input, weight_ih, output = given["input"], given["weight_ih"], given["output"]
    dense = input is not None and input.is_floating_point()
    I = input.shape[-1] if dense else weight_ih[0].shape[1] if weight_ih else 0  # noqa: E741
    B = rows_of(output, given["batch_sizes"], given["offsets"])
    info = CELLS[given["cell"]]
    of_c = (P, B, info.in_c * h)
    sizes = {
        "input": (*output.shape[:-1], I),
        **{name: (P, *size) for name, size in weight_sizes(given["cell"], h, R, I).items()},
        "h_0": (P, B, R), "c_0": of_c if info.states > 1 else 0, "reset_h": (P, B, R), "reset_c": of_c,
    }  # fmt: skip
    found = []
    for (name, size), needed in zip(sizes.items(), given["needed"], strict=True):
        if needed and name == "weight_ih" and not dense:  # as a look-up's gradient lies in memory
            found.append(output.new_empty(I, P, info.gates * h).permute(1, 2, 0))
        else:
            found.append(output.new_empty(size if needed else 0))
    return tuple(found)


@register_fake(clamp_gradient)
def _(x, limit):
    return torch.empty_like(x)


@register_fake(bernoulli)
def _(seed, size, p, dtype):
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool):
        raise TypeError(f"bernoulli: dtype: expected float32, float64, bfloat16, float16 or bool, got {dtype}")
    return seed.new_empty((*seed.shape, *size), dtype=dtype)


# ---- vmap: a batched call is one call with a larger batch, or, where weights are batched, with more groups ----

# What arguments and results are: a sequence [T, B, P*n], a state [B, P*n], a weight [P, ...], lengths [B] or [B, P],
# resets [T, B] or [T, B, P]. All else is left alone, but for `reverse`, one flag a group.
_KINDS = {
    **dict.fromkeys(("gates_ih", "gates_hh", "projected", "output", "saved", "keep_h", "keep_c"), "sequence"),
    **dict.fromkeys(("h_0", "c_0", "reset_h", "reset_c", "mask_h", "h_n", "c_n"), "state"),
    **dict.fromkeys(("weight_hh", "bias_hh", "weight_hr", "params"), "weight"),
    "grad_params": "state",  # of each row its own
    "lengths": "lengths",
    "resets": "resets",
}
# Where each takes the new dimension.
_INTO_BATCH = {"sequence": 1, "state": 0, "lengths": 0, "resets": 1}
_INTO_GROUPS = {"sequence": 2, "state": 1, "weight": 0, "lengths": 1, "resets": 2}


def _kind(name: str) -> str | None:
    name = name.removeprefix("tangent_")
    return _KINDS.get(name) or _KINDS.get(name.removeprefix("grad_"))


def _fold(x: Tensor, dim: int | None, n: int, at: int) -> Tensor:
    """The batch dimension (or n copies where x has none) moved to `at` and merged with what stands there."""
    copies = x.unsqueeze(at).expand(*x.shape[:at], n, *x.shape[at:]) if dim is None else x.movedim(dim, at)
    return copies.flatten(at, at + 1)


def _mask_into_groups(x: Tensor, dim: int | None, n: int, kind: str, groups: int) -> Tensor:
    """lengths or resets, which groups share unless they have a dimension for them."""
    rank = 1 if kind == "lengths" else 2
    shared = x.dim() - (dim is not None) == rank
    if shared and dim is None:
        return x
    if shared:  # a trailing dimension of its own for every group
        x = x.movedim(dim, 0) if dim is not None else x
        x, dim = x.unsqueeze(-1).expand(*x.shape, groups), 0
    return _fold(x, dim, n, _INTO_GROUPS[kind])


def _vmap_rule(op: Any) -> Callable[..., Any]:
    results = [_kind(name) for name in results_of(op)]

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        n = info.batch_size
        given = named(op, args)
        dims_in = dict(zip(given, (*in_dims, *(None,) * (len(given) - len(in_dims))), strict=True))
        into_groups = any(_kind(name) == "weight" and dim is not None for name, dim in dims_in.items())
        places = _INTO_GROUPS if into_groups else _INTO_BATCH
        groups = len(given["reverse"])

        def folded(name: str, x: Any) -> Any:
            kind, dim = _kind(name), dims_in[name]
            if name == "reverse" and into_groups:
                return list(x) * n
            if x is None or kind not in places:
                return x
            if into_groups and kind in ("lengths", "resets"):
                return _mask_into_groups(x, dim, n, kind, groups)
            return _fold(x, dim, n, places[kind])

        out = op(*(folded(name, x) for name, x in given.items()))
        dims = tuple(places[k] if k is not None and x.dim() > 1 else None for x, k in zip(out, results, strict=True))
        unfolded = tuple(
            x if d is None else x.unflatten(d, (n, x.shape[d] // n)) for x, d in zip(out, dims, strict=True)
        )
        return unfolded, dims

    return rule


for _op in (recurrent_forward, recurrent_backward, recurrent_forward_jvp, recurrent_backward_jvp):
    torch.library.register_vmap(_op._schema.name, _vmap_rule(_op), lib=library)


@torch.library.register_vmap("fastrnn::clamp_gradient", lib=library)
def _(info, in_dims, x, limit):
    return clamp_gradient(x, limit), in_dims[0]


@torch.library.register_vmap("fastrnn::bernoulli", lib=library)
def _(info, in_dims, seed, size, p, dtype):
    return bernoulli(seed.movedim(in_dims[0], 0), size, p, dtype), 0


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
        f"fastrnn::{op}" for op in (*_MODULE_OPS, "clamp_gradient", "bernoulli")
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
        fakes = [x for x in tree_leaves(args) if isinstance(x, FakeTensor)]
        if all(x.real_tensor is not None for x in fakes):
            real = tree_map(lambda x: x.real_tensor if isinstance(x, FakeTensor) else x, args)
            found = op(*real, **(kwargs or {}))
            pairs = zip(results, found, strict=True) if isinstance(found, tuple) else [(results, found)]
            for fake, x in pairs:
                fake.real_tensor = x
    return results


for _name in (*_MODULE_OPS, "grouped_linear", "gemm"):
    torch.library.register_torch_dispatch(f"fastrnn::{_name}", FakeTensorMode, _beside_real_tensors, lib=library)
