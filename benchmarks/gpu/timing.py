"""Times rows on a GPU against cuDNN: `python -m benchmarks.gpu.timing --out timing.json --budget 240`.

Every row is checked first, then timed eager and as a CUDA graph, in interleaved pairs (A B, B A, ...) between CUDA
events. Rows run in the table's order until the time is spent; what is left is listed as not run. Exit status 1 if a
row's results differ or a row fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cudnn import algorithms
from benchmarks.gpu.rows import TABLE, GpuRow, tiny
from benchmarks.gpu.steps import Contest, capture, case_facts, prepare, worst_error
from benchmarks.stats import median_interval, pair_ratios, spread, verdict
from fastrnn import info

MIN_PAIRS = 6  # the fewest whose extremes cover the median with 95%
MAX_PAIRS = 24
TIE = 0.05  # of a ratio; a quiet GPU repeats to a few percent

Call = Callable[[], object]
H100 = (9, 0), 132  # assumed where there is no GPU


def seconds_per_call(call: Call, repeats: int, device: torch.device) -> float:
    if device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def calibrate(call: Call, device: torch.device, sample_s: float) -> int:
    """Warms up, and says how many calls last `sample_s`."""
    for _ in range(3):
        once = seconds_per_call(call, 1, device)
    few = max(1, min(20, int(sample_s / max(once, 1e-7))))
    return max(1, min(10_000, round(sample_s / max(seconds_per_call(call, few, device), 1e-7))))


def time_pairs(ours: Call, theirs: Call, device: torch.device, budget_s: float) -> dict[str, Any]:
    """Microseconds per call of both sides, and the ratio theirs / ours: above 1 we are faster."""
    begin = time.perf_counter()
    sides = [(call, calibrate(call, device, budget_s / 60)) for call in (ours, theirs)]
    taken: tuple[list[float], list[float]] = ([], [])
    while len(taken[0]) < MAX_PAIRS:
        if len(taken[0]) >= MIN_PAIRS and time.perf_counter() - begin > budget_s:
            break
        for order in ((0, 1), (1, 0)):
            for side in order:
                taken[side].append(1e6 * seconds_per_call(*sides[side], device))
    ratio = median_interval(pair_ratios(*taken))
    return {
        "ours_us": asdict(spread(taken[0])),
        "theirs_us": asdict(spread(taken[1])),
        "ratio": asdict(ratio),
        "verdict": verdict(ratio, TIE),
    }


def choices(row: GpuRow, device: torch.device) -> dict[str, Any]:
    """The kernels of ours that the row takes; None for each where none is built."""
    case, passes = row.case, ("forward", "backward") if row.mode == "train" else ("forward",)
    if not info.has_cuda_kernels():
        return dict.fromkeys(passes)
    cell = f"{case.cell.lower()}_tanh" if case.cell == "RNN" else case.cell.lower()
    call = info.Sizes(
        cell, case.dtype, case.T, case.B, 2 if case.bidirectional else 1, case.H, case.proj or case.H,
        bool(case.shortest), bool(row.resets),
    )  # fmt: skip
    gpu = info.present_gpu(device.index) if device.type == "cuda" else info.GPUS["h100"]
    assert gpu is not None
    tier = os.environ.get("FASTRNN_CUDA_TIER", "")
    return {name: info.cuda_choice(call, gpu, name == "backward", row.tf32, tier) for name in passes}


def graphs(contest: Contest, device: torch.device) -> tuple[Call, Call]:
    if device.type == "cpu":  # a rehearsal: the same calls
        return contest.ours, contest.theirs
    return capture(contest.ours), capture(contest.theirs)


def allow_tf32(allowed: bool) -> None:
    if not torch.cuda.is_available():  # a rehearsal: the switches have no effect, and may be locked
        return
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def peer_of(row: GpuRow, capability: tuple[int, int], multiprocessors: int) -> str:
    """What stands for cuDNN in the row."""
    if row.peer != "torch":
        return row.peer
    return "a call per step" if row.resets else algorithms(row.case, row.mode, capability, multiprocessors)


def run_row(row: GpuRow, device: torch.device, budget_s: float) -> dict[str, Any]:
    """Never raises for what a side does: that becomes the row's status and message."""
    capability, multiprocessors = H100
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        capability, multiprocessors = (facts.major, facts.minor), facts.multi_processor_count
    record: dict[str, Any] = {
        "id": row.id, "case": case_facts(row.case), "mode": row.mode, "tf32": row.tf32, "resets": row.resets,
        "cudnn": peer_of(row, capability, multiprocessors),
        "ours": None, "status": "ok", "message": "", "error": None, "variants": {},
    }  # fmt: skip
    try:
        allow_tf32(row.tf32)
        record["ours"] = choices(row, device)
        contest = prepare(row, device)
        name, error, allowed = worst_error(row, contest)
        record["error"] = {"tensor": name, "error": error, "allowed": allowed}
        if not error <= allowed:
            record |= {"status": "mismatch", "message": f"{name}: differs by {error:.1e}, allowed {allowed:.0e}"}
            return record
        record["variants"]["eager"] = time_pairs(contest.ours, contest.theirs, device, budget_s)
        if contest.capturable:
            record["variants"]["graph"] = {"message": contest.capturable}
        else:
            record["variants"]["graph"] = time_pairs(*graphs(contest, device), device, budget_s)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        record |= {"status": "error", "message": f"{type(error).__name__}: {first}"}
    finally:
        allow_tf32(False)
    return record


def not_run(row: GpuRow, why: str = "out of time") -> dict[str, Any]:
    return {
        "id": row.id, "case": case_facts(row.case), "mode": row.mode, "tf32": row.tf32, "resets": row.resets,
        "cudnn": None, "ours": None, "status": "not run", "message": why, "error": None, "variants": {},
    }  # fmt: skip


def run(table: Sequence[GpuRow], device: torch.device, budget_s: float, row_s: float) -> Iterator[dict[str, Any]]:
    begin = time.perf_counter()
    for row in table:
        if time.perf_counter() - begin > budget_s:
            yield not_run(row)
            continue
        if row.peer != "torch" and importlib.util.find_spec(row.peer) is None:
            yield not_run(row, f"{row.peer} is not installed")
            continue
        yield run_row(row, device, row_s)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def shown(variant: dict[str, Any] | None, T: int) -> str:
    """ours / theirs in us per step, and the ratio with its interval."""
    if not variant or "ratio" not in variant:
        return f"{'-':>30}"
    ours, theirs, ratio = (variant[key] for key in ("ours_us", "theirs_us", "ratio"))
    interval = f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
    return f"{ours['median'] / T:>7.2f}/{theirs['median'] / T:>7.2f} {interval:>15}"


def line(record: dict[str, Any]) -> str:
    tiers = [choice["tier"] for choice in (record["ours"] or {}).values() if choice]
    tier = "/".join(dict.fromkeys(tiers)) or "-"
    text = f"{record['id']:<44} {record['cudnn'] or '-':<18} {tier:<14}"
    if record["status"] != "ok":
        return f"{text} {record['status']}: {record['message'][:70]}"
    T, variants = record["case"]["T"], record["variants"]
    return f"{text} {shown(variants.get('eager'), T)} | {shown(variants.get('graph'), T)}"


HEADER = f"{'row':<44} {'cuDNN':<18} {'ours':<14} {'eager us/step, ratio':>30} | {'graph us/step, ratio':>30}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times fastrnn against cuDNN.")
    parser.add_argument("--out", type=Path, required=True, help="where to write JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=240, help="seconds in all")
    parser.add_argument("--row", type=float, default=0.4, help="seconds for each of a row's two timings")
    parser.add_argument("--only", default="", help="rows whose id contains this")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: the rows at tiny sizes")
    options = parser.parse_args(argv)
    table = [row for row in TABLE if options.only in row.id]
    if options.tiny:
        table = list({small.id: small for small in map(tiny, table)}.values())
    print(HEADER)
    records: list[dict[str, Any]] = []
    for record in run(table, torch.device(options.device), options.budget, options.row):
        records.append(record)
        options.out.write_text(json.dumps(records, indent=1) + "\n")  # a row that hangs costs only itself
        if record["status"] != "not run":
            print(line(record), flush=True)
    return 1 if any(record["status"] in ("error", "mismatch") for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
