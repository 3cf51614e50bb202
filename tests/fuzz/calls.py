"""Calls of every op of torch.ops.fastrnn with arguments that are wrong in some way: each gives results or an exception
of the kinds that torch's own ops raise, which says something."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import fastrnn  # noqa: F401  (registers the ops)
from fastrnn.ops import (
    CELLS,
    layer_backward,
    layer_forward,
    named,
    names_of,
    recurrent_backward,
    recurrent_backward_jvp,
    recurrent_forward,
    recurrent_forward_jvp,
)
from tests.fuzz.modules import one_of
from tests.helpers import as_c, threads

Arguments = dict[str, Any]
_ops = torch.ops.fastrnn
OPS = {
    op._schema.name.partition("::")[2]: op
    for op in (
        recurrent_forward,
        recurrent_backward,
        recurrent_forward_jvp,
        recurrent_backward_jvp,
        layer_forward,
        layer_backward,
        _ops.quantized_forward.default,
        _ops.gemm.default,
        _ops.grouped_linear.default,
        _ops.grouped_outer.default,
        _ops.clamp_gradient.default,
        _ops.bernoulli.default,
        _ops.cell_info.default,
    )
}
SIZES = (1, 2, 3, 5, 8, 17, 33)
DTYPES = ("float32", "float64", "bfloat16", "float16")
WRONG = (
    "rank + 1", "scalar", "flat", "size + 1", "size of 0", "half", "dtype", "complex", "meta",
    "sparse", "mkldnn", "quantized", "expanded", "huge", "no memory", "less memory", "negative view", "extreme", "nan",
    "other kind", "none",
)  # fmt: skip
# One mutation: of the argument at this place (modulo their number) in this way, with a number for what it leaves open.
_MUTATION = st.tuples(st.integers(0, 40), one_of(*WRONG), st.integers(0, 2**16))
CASES = st.fixed_dictionaries(
    {
        "op": one_of(*OPS),
        "cell": one_of(*CELLS),
        "dtype": one_of(*DTYPES, "float32"),
        "T": one_of(*SIZES, 0),
        "B": one_of(*SIZES, 0),
        "P": one_of(1, 2, 3),
        "h": one_of(*SIZES),
        "I": one_of(*SIZES, 0),
        "R": one_of(0, 0, *SIZES),
        "options": st.integers(0, 2**14 - 1),  # bit i: is an argument there?
        "threads": one_of(1, 1, 2),
        "seed": st.integers(0, 2**31 - 1),
        "mutations": st.lists(_MUTATION, min_size=0, max_size=3),
    }
)


def arguments_of(case: Arguments) -> Arguments:
    """A call's arguments by name, good ones."""
    generator = torch.Generator().manual_seed(case["seed"])
    own, cell, info = getattr(torch, case["dtype"]), case["cell"], CELLS[case["cell"]]
    T, B, P, h, I = (case[k] for k in ("T", "B", "P", "h", "I"))  # noqa: E741
    R = case["R"] if case["R"] and info.states == 2 else h
    op, bits = case["op"], case["options"]

    def random(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype or own)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    if op in ("gemm", "grouped_linear", "grouped_outer"):
        own = torch.float64 if bits & 8 else torch.float32
    if op == "gemm":
        a, b = random(T, B), random(B, h)
        a, b = (x.t().contiguous() if bits & bit else x for x, bit in ((a, 1), (b, 2)))
        bias = random(h) if bits & 4 else None
        return {"a": a, "b": b, "bias": bias, "transpose_a": bool(bits & 1), "transpose_b": bool(bits & 2)}
    if op == "grouped_linear":
        n = 40 * (1 + bits % 2)
        return {"input": random(T * n, P, I), "weight": random(P, h, I), "bias": random(P, h) if bits & 4 else None}
    if op == "grouped_outer":
        return {"a": random(T * 40, P, h), "b": random(T * 40, P, I)}
    if op == "clamp_gradient":
        return {"x": random(T, B), "limit": 0.5}
    if op == "bernoulli":
        seed = integers(-(2**62), 2**62, *((P,) if bits & 1 else ()))
        return {"seed": seed, "size": [T, B, h], "p": 0.25, "dtype": own}
    if op == "cell_info":
        return {"cell": cell}

    layer = op.startswith("layer")
    ragged = layer and bits & 1 and T > 0 and B > 0
    nested = ragged and bits & 8192
    packed = ragged and not nested
    Gh, K, C = info.gates * h, info.params, info.in_c
    sizes = integers(1, B + 1, T).sort(descending=True).values if packed else None
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), integers(0, T + 1, B).cumsum(0)]) if nested else None
    if packed:
        B = int(sizes[0])
    steps = (int(sizes.sum() if packed else offsets[-1]),) if ragged else (T, B)

    def state(n: int, of_c: bool = False) -> Tensor:
        x = random(B, P * n)
        x = as_c(cell, x, P) if of_c and n else x
        return x.view(B, P, n).transpose(0, 1).contiguous() if layer else x

    tokens = layer and bits & 2 and I > 0
    given: Arguments = {
        "cell": cell,
        "weight_hh": random(P, Gh, R) / R**0.5,
        "bias_hh": random(P, Gh) if bits & 4 else None,
        "weight_hr": random(P, R, h) if h != R else None,
        "params": random(P, K, h) if K else None,
        "h_0": state(R),
        "c_0": state(C * h, True) if C else None,
        "reverse": [bool(bits >> p & 8) for p in range(P)],
        "grad_clip": 0.5 if bits & 4096 else 0.0,
        "initial": not bits & 8192,
    }
    if not ragged:
        if bits & 64:
            given["lengths"] = integers(0, T + 1, *((B, P) if bits & 128 else (B,)), dtype=torch.int32)
        if bits & 256:
            given["resets"] = integers(0, 2, *((T, B, P) if bits & 128 else (T, B))).bool()
            if bits & 512:
                given |= {"reset_h": state(R)} | ({"reset_c": state(C * h, True)} if C else {})
    if bits & 1024:
        given["mask_h"] = state(R).abs()
    if bits & 2048 and info.zoneout:
        given["keep_h"] = random(*steps, P * R).sigmoid()
        if C:
            given["keep_c"] = random(*steps, P * h).sigmoid()
        if bits & 4096:
            given |= {name: given[name] > 0.5 for name in ("keep_h", "keep_c") if name in given}
    if layer:
        for name in ("weight_hh", "bias_hh", "weight_hr", "params"):
            given[name] = [] if given[name] is None else list(given[name])
        given["weight_ih"] = [random(Gh, I) for _ in range(P)]
        given["bias_ih"] = [random(Gh) for _ in range(P)] if bits & 4 else []
        given |= {"batch_sizes": sizes, "offsets": offsets}
        given["input"] = integers(0, I, *steps) if tokens else random(*steps, I)
        given |= {"save": True}
    elif op == "quantized_forward":
        blocks = -(-h // 16)
        given["input"] = random(T, B, I, dtype=torch.float32)
        for suffix, n in (("ih", I), ("hh", R)):
            if bits & 16:
                shape = (P, blocks, -(-n // 4), info.gates, 16, 4)
                given[f"weight_{suffix}"] = integers(-127, 128, *shape, dtype=torch.int8)
                given[f"scale_{suffix}"] = random(P, blocks, info.gates, 16, dtype=torch.float32) / 500
                given[f"sum_{suffix}"] = integers(-999, 999, P, blocks, info.gates, 16, dtype=torch.int32)
            else:
                given[f"weight_{suffix}"] = random(P, Gh, n, dtype=torch.bfloat16)
        if given["weight_hr"] is not None:
            given["weight_hr"] = given["weight_hr"].to(torch.float32 if bits & 16 else torch.bfloat16)
        given["bias_ih"] = given["bias_hh"]
        for name, x in given.items():
            if isinstance(x, Tensor) and x.is_floating_point() and not name.startswith(("weight", "scale")):
                given[name] = x.float()
    else:
        given |= {"gates_ih": random(T, B, P * Gh), "save": True}
    if op.startswith(("recurrent_backward", "layer_backward")):
        forward = layer_forward if layer else recurrent_forward
        output, h_n, c_n, *_, saved = forward(*in_order(forward, given).values())
        given |= {
            "output": output,
            "saved": saved,
            "grad_output": random(*output.shape),
            "grad_h_n": random(*h_n.shape),
        }
        if C and bits & 32:
            given["grad_c_n"] = random(*c_n.shape)
        if layer and C and bits & 16:
            given["grad_cells"] = random(*steps, P * C * h)
        given["needed"] = [bool(bits >> i % 12 & 1) for i in range(11)]
    tangents = [name for name in names_of(OPS[op]) if name.startswith("tangent_")]
    for i, name in enumerate(tangents):
        x = given.get(name.removeprefix("tangent_"))
        if x is not None and bits >> (13 - i) & 1:  # other bits than those that say whether x is there
            given[name] = random(*x.shape, dtype=x.dtype)
    return in_order(OPS[op], given)


def in_order(op: Any, given: Arguments) -> Arguments:
    """What the op's schema has of it, None or the default for the rest."""
    defaults = named(op, ())
    return {name: given.get(name, defaults[name]) for name in names_of(op)}


def has_memory(x: Tensor) -> bool:
    """torch's own functions, by which tensors are changed here, take it for granted."""
    if x.layout is not torch.strided or x.is_meta or x.is_quantized or not x.numel():
        return x.layout is torch.strided and not x.is_meta and not x.is_quantized
    last = x.storage_offset() + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() <= x.untyped_storage().nbytes()


_NUMBERS = (math.nan, math.inf, -1.0, 1e308, 0.0, 2**70)
_SIZES = ([-1], [2**62], [2**31, 2**31, 2**31], [0], [1] * 70, [])
_OBJECTS = ("text", 3.5, -1, 2**70, None, [], [None], {}, object(), torch.zeros(2), [torch.zeros(2)], b"\0")
_CELLS = ("", "LSTM", "gru\0", "x" * 100_000, "\u00e9", *CELLS)


def mutated(x: Any, how: str, number: int) -> Any:
    """x in a wrong way; x itself where this way is not one of its kind."""
    if how == "none":
        return None
    if how == "other kind":
        return _OBJECTS[number % len(_OBJECTS)]
    if isinstance(x, str):
        return _CELLS[number % len(_CELLS)]
    if isinstance(x, bool):
        return not x
    if isinstance(x, float):
        return _NUMBERS[number % len(_NUMBERS)]
    if isinstance(x, torch.dtype):
        return (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.quint8, torch.float32)[number % 6]
    if isinstance(x, list):
        if x and isinstance(x[0], Tensor) and how not in ("rank + 1", "scalar", "flat"):
            k = number % len(x)
            return [*x[:k], mutated(x[k], how, number), *x[k + 1 :]]
        if x and type(x[0]) is int:
            return _SIZES[number % len(_SIZES)]
        return ([], x[:-1], [*x, *x[:1]], x[:2] * 50_000)[number % 4]
    if not isinstance(x, Tensor) or not has_memory(x):
        return x
    if x.numel() > 1 << 24:  # "huge" already: torch's own functions would be at it for hours
        return x
    d = number % max(x.dim(), 1)
    if how == "rank + 1":
        return x[None]
    if how == "scalar":
        return x.new_zeros(())
    if how == "flat":
        return x.flatten()
    if how == "dtype":
        others = (torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2)
        return x.to(others[number % len(others)])
    if how == "complex":
        return x.to(torch.complex64)
    if how == "meta":
        return x.to("meta")
    if how == "sparse":
        return x.to_sparse()
    if how == "mkldnn":
        return x.to_mkldnn() if x.dtype == torch.float32 and x.numel() else x
    if how == "quantized":
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
    if how == "no memory":
        x = x.clone()
        x.untyped_storage().resize_(0)
        return x
    if how == "less memory":
        x = x.clone()
        x.untyped_storage().resize_(x.untyped_storage().nbytes() // 2)
        return x
    if how == "negative view":
        return torch._neg_view(x) if x.is_floating_point() else x
    if how == "nan":
        return torch.full_like(x, torch.nan) if x.is_floating_point() else x
    if how == "extreme":
        if x.is_floating_point():
            return torch.full_like(x, (torch.inf, 1e30, 1e-42)[number % 3])
        if x.dtype not in (torch.int8, torch.int32, torch.int64):
            return x
        limits = torch.iinfo(x.dtype)
        return torch.full_like(x, (limits.min, limits.max, -1, limits.max // 2)[number % 4])
    if x.dim() == 0:
        return x
    if how == "size + 1":
        return torch.cat([x, x.narrow(d, 0, 1)], d) if x.shape[d] else x.new_zeros(*x.shape[:d], 1, *x.shape[d + 1 :])
    if how == "size of 0":
        return x.narrow(d, 0, 0)
    if how == "half":
        return x.narrow(d, 0, x.shape[d] // 2)
    sizes = list(x.shape)
    sizes[d] = sizes[d] if how == "expanded" else 2 ** (33, 40, 62)[number // 7 % 3]
    return x.narrow(d, 0, 1).expand(sizes)


NO_TENSORS = ("cell", "limit", "p", "dtype", "size", "reverse", "needed")
_RAISED = (TypeError, ValueError, RuntimeError, IndexError)


def is_told(error: Exception) -> bool:
    """Is it an error of a kind that torch's ops raise, with a text for whoever called?"""
    text = str(error)
    return (
        isinstance(error, _RAISED) and len(text) > 15 and "INTERNAL ASSERT" not in text and "report a bug" not in text
    )


def run(case: Arguments) -> None:
    """Fails where the call raises something else, or takes a tensor for good that cannot be."""
    op, given = OPS[case["op"]], arguments_of(case)
    names, unchanged = list(given), dict(given)
    hopeless: dict[str, str] = {}  # arguments that cannot be taken, and why
    for place, how, number in case["mutations"]:
        name = names[place % len(names)]
        before = given[name]
        if how.endswith("memory") and (name in NO_TENSORS or type(before) is not type(unchanged[name])):
            continue  # torch would print the tensor that is in the place of something else, or a list of such
        with contextlib.suppress(RuntimeError):  # torch has no such tensor
            given[name] = mutated(before, how, number)
        full = isinstance(before, Tensor) and before.numel() > 1
        if given[name] is not before:
            hopeless.pop(name, None)
            if full and how in ("no memory", "less memory"):
                hopeless[name] = how
    with threads(case["threads"]):
        try:
            results = op(**given)
        except Exception as error:
            assert is_told(error), f"{type(error).__name__}: {error}"
            assert case["mutations"], f"{type(error).__name__}: {error}"
            return
    meta = any(isinstance(x, Tensor) and x.is_meta for v in given.values() for x in (v if isinstance(v, list) else [v]))
    assert meta or not hopeless, hopeless
    for x in results if isinstance(results, (tuple, list)) else [results]:
        if isinstance(x, Tensor) and x.device.type == "cpu" and x.layout is torch.strided and not x.is_quantized:
            x.to(torch.float64 if not x.is_complex() else torch.complex128).sum().item()
