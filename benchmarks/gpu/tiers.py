"""Times every tier by itself, whatever the table says: `python -m benchmarks.gpu.tiers --out tiers.json --budget 40`.

For each cell, dtype (tf32: float32 whose products may be rounded), hidden size and batch: microseconds a step of the
recurrence's op alone, forward and backward, eager, with the tier forced by FASTRNN_CUDA_TIER, as the shortest of
several calls between CUDA events. tools/tiers.py makes the table of it. What the time does not suffice for is left
out, the last sizes first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import machine
from benchmarks.gpu.timing import allow_tf32
from fastrnn import ops
from fastrnn.records import LayerStates

STEPS, CALLS = 100, 5
TIERS = ("resident", "grid", "cluster", "step")
HIDDEN, BATCH = (64, 128, 192, 256, 512, 1024), (1, 8, 16, 32, 64, 128)
MORE_HIDDEN, MORE_BATCH = (96, 384, 768, 1536, 2048), (4, 256)
CELLS, DTYPES = ("lstm", "gru", "rnn_tanh"), ("bfloat16", "float32", "tf32", "float16")


def sizes(tiny: bool) -> Iterator[tuple[str, str, int, int]]:
    """(cell, dtype, h, B), the most important first."""
    if tiny:
        yield from product(CELLS[:2], DTYPES[:2], (8, 16), (1, 3))
        return
    for dtypes, cells, hidden, batch in (
        (DTYPES[:3], CELLS[:2], HIDDEN, BATCH),
        (DTYPES[:3], CELLS[:2], MORE_HIDDEN, BATCH),
        (DTYPES[:3], CELLS[2:], HIDDEN, BATCH),
        (DTYPES[:3], CELLS, HIDDEN, MORE_BATCH),
        (DTYPES[3:], CELLS[:1], HIDDEN, BATCH),
    ):
        yield from product(cells, dtypes, hidden, batch)


def shortest_us(call: Callable[[], object], device: torch.device) -> float:
    """Of several calls, the first of which is not counted."""
    found = []
    for _ in range(CALLS + 1):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            found.append(1e3 * start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            found.append(1e6 * (time.perf_counter() - begin))
    return min(found[1:])


def calls(
    cell: str, dtype: str, h: int, B: int, steps: int, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The recurrence forward and backward, on the same values for every tier."""
    facts = ops.CELLS[cell]
    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, "float32" if dtype == "tf32" else dtype)}
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, **options) * scale

    gates = normal(steps, B, facts.gates * h)
    weight = normal(1, facts.gates * h, h, scale=h**-0.5)
    zeros = [torch.zeros(B, h, **options) for _ in range(facts.states)]
    params = normal(1, facts.params, h) if facts.params else None
    shared = (None, params, *LayerStates(*zeros), [False])
    bias = normal(1, facts.gates * h)

    def forward() -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = ops.recurrent_forward(cell, gates, weight, bias, *shared, True)
        return found

    output, _, _, saved = forward()
    grad = torch.ones_like(output)

    def backward() -> object:
        return ops.recurrent_backward(cell, grad, None, None, weight, *shared, output, saved)

    return forward, backward


def run(device: torch.device, budget_s: float, tiny: bool) -> Iterator[dict[str, Any]]:
    begin, steps = time.perf_counter(), 3 if tiny else STEPS
    for cell, dtype, h, B in sizes(tiny):
        if device.type == "cuda":
            allow_tf32(dtype == "tf32")
        both = calls(cell, dtype, h, B, steps, device)
        for tier in TIERS:
            if time.perf_counter() - begin > budget_s:
                return
            us: dict[str, float] = {}
            os.environ["FASTRNN_CUDA_TIER"] = tier
            for name, call in zip(("fwd", "bwd"), both, strict=True):
                # The tier may have no such pass, or this build no such tier.
                with contextlib.suppress(NotImplementedError, ValueError):
                    us[name] = round(shortest_us(call, device) / steps, 3)
            del os.environ["FASTRNN_CUDA_TIER"]
            if us:
                yield {"cell": cell, "dtype": dtype, "h": h, "B": B, "tier": tier, **us}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times every tier by itself.")
    parser.add_argument("--out", type=Path, required=True, help="where to write JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=40, help="seconds in all")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at tiny sizes")
    options = parser.parse_args(argv)
    facts = machine(options.device)
    gpu = facts["gpu"].get("name", "no GPU")
    told = f"{gpu}, torch {facts['torch']}, driver {facts['gpu'].get('driver_version', '-')}, {facts['date'][:10]}"
    what = f"microseconds a step, eager, of the recurrence alone, T={STEPS}, one group, each tier forced"
    rows: list[dict[str, Any]] = []
    try:
        for row in run(torch.device(options.device), options.budget, options.tiny):
            rows.append(row)
    finally:
        lines = ",\n".join(json.dumps(row) for row in rows)
        head = json.dumps({"what": what, "machine": told}, indent=1)[:-2]
        options.out.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    print(f"{len(rows)} calls of {len({row['tier'] for row in rows})} tiers")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
