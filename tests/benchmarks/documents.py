"""Runs made up for the tests of the benchmark suite's reports: no clock is read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind everything else: an installed fastrnn stays the one that is imported

for needed in ("rich", "psutil", "cpuinfo", "numpy"):
    pytest.importorskip(needed)

from benchmarks import results, stats  # noqa: E402
from benchmarks.cases import Case, Row  # noqa: E402

SETTINGS = results.Settings(threads=2)
ROOFLINE: dict[str, Any] = {
    "threads": 2,
    "gemm_flops": {"float32": 1e11, "float64": 5e10},
    "bandwidth": {"L2": 1e11, "L3": 3e10, "DRAM": 1e10},
    "cache_bytes": {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20},
}


def machine_facts() -> dict[str, Any]:
    cache = {"level": 2, "type": "Unified", "size": "1024K", "shared_by": 1}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "threads": 2,
        "environment": {"OMP_PROC_BIND": "true"},
        "cpu": {
            "model": "a processor", "flags": ["avx2"], "physical_cores": 2, "logical_cores": 2, "caches": [cache],
            "memory_bytes": 2**34, "load_average_1min": 0.1,
        },
        "software": {
            "python": "3.11.0", "system": "Linux", "libc": "glibc", "torch": "2.13.0", "torch_libraries": ["oneDNN"],
            "fastrnn": "0.1.0",
        },
        "roofline": [ROOFLINE],
    }  # fmt: skip


def timed(
    ratio: float,
    half_width: float = 0.01,
    peer: str = "torch",
    mode: str = "fwd",
    threads: int = 0,
    ours_s: float = 1e-3,
    noisy: bool = False,
    **case: Any,
) -> results.Result:
    """A row of a chosen ratio; `case` are fields of its Case beside these defaults."""
    fields: dict[str, Any] = {"family": "lstm", "cell": "LSTM", "T": 8, "B": 2, "I": 16, "H": 16} | case
    row = Row("timing", Case(**fields), mode, peer, threads)
    interval = stats.Interval(ratio, ratio - half_width, ratio + half_width, 0.97, 16)

    def side(seconds: float) -> results.Side:
        return results.Side(stats.Spread(seconds, 0.99 * seconds, 1.01 * seconds), 1, [seconds])

    timing = results.Timing(
        interval, stats.verdict(interval, SETTINGS.tie), noisy, 0.0, side(ours_s), side(ratio * ours_s),
        results.Check("output", 1e-7, 1e-4), {"ours": "fused", "theirs": "a loop"},
        results.Floor(ours_s / 2, 1e6, 2e6, "L2", "weights"),
    )  # fmt: skip
    return results.Result(row, "ok", timing=timing, command=f"rerun {row.id}")


def failed(status: str, message: str, **case: Any) -> results.Result:
    row = timed(1.0, **case).row
    return results.Result(row, status, message, command=f"rerun {row.id}")


def measured_memory(ours: list[int], theirs: list[int], **case: Any) -> results.Result:
    fields: dict[str, Any] = {"family": "memory", "cell": "GRU", "T": 4, "B": 4, "I": 8, "H": 8} | case
    row = Row("memory", Case(**fields), "train", "torch")
    ratio = sorted(theirs)[len(theirs) // 2] / sorted(ours)[len(ours) // 2]
    verdict = "win" if ratio > 1.2 else "loss" if ratio < 1 / 1.2 else "tie"
    return results.Result(row, "ok", memory=results.Memory(ours, theirs, ratio, verdict, 512), command="rerun")


def accurate(error: float, dtype: str = "float32") -> results.Result:
    case = Case(family="lstm", cell="LSTM", T=4, B=2, I=3, H=5, dtype=dtype)
    sides = [results.Errors(error * factor, 2 * error * factor) for factor in (1, 1.5)]
    accuracy = results.Accuracy(sides[0], sides[1], None, "output", error, 2 * error)
    return results.Result(Row("accuracy", case, "train", "torch"), "ok", accuracy=accuracy, command="rerun")


def drifted(rms: float, peer: str = "torch", **case: Any) -> results.Result:
    fields: dict[str, Any] = {"family": "drift", "cell": "GRU", "T": 10, "B": 2, "I": 8, "H": 8} | case
    errors = results.Drift([1, 10], [rms / 2, rms], [rms, 5 * rms])
    return results.Result(Row("drift", Case(**fields), "fwd", peer), "ok", drift=errors, command="rerun")


def document(*made: results.Result, planned: int | None = None, **facts: Any) -> dict[str, Any]:
    """`facts` stand in for entries of the machine."""
    peers = {
        key: {"title": key.upper(), "version": "1.0"}
        for key in dict.fromkeys(["fastrnn", *(item.row.peer for item in made)])
    }
    count = len(made) if planned is None else planned
    command = "python -m benchmarks --suite made-up"
    return results.Document.build(made, SETTINGS, machine_facts() | facts, command, count, peers).data


def every_kind() -> dict[str, Any]:
    """A document with something for every table and every plot."""
    grid = [timed(0.4 + 0.1 * B + H / 64, B=B, I=H, H=H, ours_s=1e-5 * B * H) for B in (1, 2, 4) for H in (16, 32, 64)]
    threads = [timed(1.5, threads=count, T=99, ours_s=1e-2 / count) for count in (1, 2)]
    others = [timed(ratio, peer=peer, T=77) for peer, ratio in (("jax", 0.5), ("keras", 3.0), ("torch", 1.1))]
    return document(
        *grid, *threads, *others,
        timed(2.0, half_width=0.5, noisy=True, T=55),
        failed("mismatch", "output: <differs> | by 1", T=56), failed("skipped", "inference only", T=57),
        measured_memory([100 << 20] * 3, [300 << 20] * 3), measured_memory([9 << 20] * 3, [3 << 20] * 3, cell="RNN"),
        accurate(1e-7), accurate(1e-3, "bfloat16"), drifted(0.01), drifted(1.4, gain=4.0), drifted(0.1, trained=True),
    )  # fmt: skip
