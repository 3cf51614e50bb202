"""What this machine can do at most, measured in about two seconds: peak GEMM and read bandwidth per memory level."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

LEVELS = ("L2", "L3", "DRAM")
SIZE, HALF_SIZE = 1024, 256  # of the square matrices; half types may have no fast product, and take seconds
SPENT_S = 0.12  # on each figure; the shortest call counts
DRAM_BYTES = 192 << 20  # at least, and four times the last cache

Shortest = Callable[[Callable[[], object]], float]


def shortest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of many calls: a peak is what the machine could do undisturbed."""
    call()
    best, end = float("inf"), time.perf_counter() + SPENT_S
    while True:
        start = time.perf_counter_ns()
        call()
        best = min(best, (time.perf_counter_ns() - start) * 1e-9)
        if time.perf_counter() > end:
            return best


def cache_bytes(caches: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Level -> bytes of one core's own or shared data cache, from machine.caches(); missing levels are left out."""
    found = {}
    for cache in caches:
        size = re.fullmatch(r"(\d+)([KM]?)", cache["size"])
        if size and cache["type"] != "Instruction":
            found[f"L{cache['level']}"] = int(size[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[size[2]]
    return found


def gemm_flops(dtype: torch.dtype, shortest: Shortest = shortest) -> float:
    """Per second, on square matrices, of the faster of torch.mm and fastrnn's own product.

    A library's product may be far from what the processor can do (MKL on AMD), and would then be a floor to walk under.
    """
    size = SIZE if dtype.itemsize >= 4 else HALF_SIZE
    a, b = torch.ones(2, size, size, dtype=dtype).unbind()
    out = torch.empty_like(a)
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
    if dtype in (torch.float32, torch.float64) and hasattr(torch.ops.fastrnn, "gemm"):
        products.append(lambda: torch.ops.fastrnn.gemm(a, b, None, False, False))
    return 2 * size**3 / min(shortest(product) for product in products)


def read_bandwidth(size: int, shortest: Shortest = shortest) -> float:
    """Bytes per second of summing `size` bytes of float32 over and over, less the cost of an empty call."""
    buffer, few = torch.ones(size // 4), torch.ones(4)
    best = 0.0
    for read in (torch.sum, lambda x: torch.dot(x, x)):
        spent = shortest(lambda read=read: read(buffer)) - shortest(lambda read=read: read(few))  # type: ignore[misc]
        best = max(best, size / max(spent, 1e-9))
    return best


def measure(
    threads: int, caches: Iterable[dict[str, Any]], dtypes: Iterable[str], shortest: Shortest = shortest
) -> dict[str, Any]:
    """{"threads", "gemm_flops": by dtype, "bandwidth": by level, "cache_bytes": by level}.

    A core's own cache (L2) is read by one thread and counted once per thread. A level the machine does not tell about
    is left out; DRAM is always there.
    """
    sizes = cache_bytes(caches)
    before = torch.get_num_threads()
    bandwidth = {}
    try:
        torch.set_num_threads(threads)
        peaks = {dtype: gemm_flops(getattr(torch, dtype), shortest) for dtype in sorted({"float32", *dtypes})}
        if "L3" in sizes:
            inside = min(sizes["L3"] // 2, max(3 * threads * sizes.get("L2", 0), sizes["L3"] // 4))
            bandwidth["L3"] = read_bandwidth(inside, shortest)
        bandwidth["DRAM"] = read_bandwidth(max(DRAM_BYTES, 4 * sizes.get("L3", 0)), shortest)
        if "L2" in sizes:
            torch.set_num_threads(1)
            bandwidth["L2"] = threads * read_bandwidth(sizes["L2"] // 2, shortest)
    finally:
        torch.set_num_threads(before)
    levels: dict[str, float] = {}
    for level in reversed(LEVELS):
        if level in bandwidth:  # noise must not make an inner level the slower one
            levels[level] = max(bandwidth[level], *levels.values(), 0.0)
    return {"threads": threads, "gemm_flops": peaks, "bandwidth": levels, "cache_bytes": sizes}


def best_of(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measurements' figures, for the same number of threads."""
    merged = {
        key: {name: max(value, second[key].get(name, 0.0)) for name, value in first[key].items()}
        for key in ("gemm_flops", "bandwidth")
    }
    return first | merged
