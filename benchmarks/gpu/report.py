"""The document of a GPU run: one JSON file, and the short table that ends the run's output."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.stats import geometric_mean

SCHEMA = "fastrnn-gpu"
SCHEMA_VERSION = 1  # raise it when a key is removed or changes its meaning
FAILED = ("error", "mismatch")
QUERY = "name,driver_version,memory.total,power.limit,clocks.sm,clocks.max.sm,temperature.gpu"  # read, never set


def nvidia_smi() -> dict[str, str]:
    """Facts that torch does not tell, of the first GPU; empty where the tool is missing."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return {}
    try:
        asked = subprocess.run(
            [tool, "--id=0", f"--query-gpu={QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(QUERY.split(","), (word.strip() for word in asked.stdout.split(",")), strict=False))


def machine(device: str) -> dict[str, Any]:
    """GPU, driver and versions; no names and no paths."""
    gpu: dict[str, Any] = nvidia_smi()
    if device.startswith("cuda") and torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        gpu |= {
            "name": facts.name,
            "compute_capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "memory_bytes": facts.total_memory,
            "count": torch.cuda.device_count(),
        }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def document(
    machine: dict[str, Any],
    steps: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    calls: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """steps: what ran before and around the timings, each {name, status, seconds, ...}. calls: of calls.py."""
    statuses = [row["status"] for row in rows]
    failed = [step["name"] for step in steps if step["status"] == "failed"]
    failed += sorted({status for status in statuses if status in FAILED})
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "machine": machine,
        "steps": list(steps),
        "rows": list(rows),
        "calls": list(calls),
        "summary": {
            "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
            "means": means(rows),
            "failed": failed,
        },
    }


def timed(rows: Iterable[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], str, dict[str, Any]]]:
    """(row, "eager" or "graph", its timing)"""
    for row in rows:
        for name, variant in row["variants"].items():
            if "ratio" in variant:
                yield row, name, variant


def means(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean of the ratios by family, dtype, mode and variant, with the worst row of each."""
    groups: dict[tuple[str, ...], list[tuple[float, str]]] = {}
    for row, variant, timing in timed(rows):
        dtype = "tf32" if row["tf32"] else row["case"]["dtype"]
        key = (row["case"]["family"], dtype, row["mode"], variant)
        groups.setdefault(key, []).append((timing["ratio"]["median"], row["id"]))
    return [
        dict(zip(("family", "dtype", "mode", "variant"), key, strict=True))
        | {
            "ratio": geometric_mean([ratio for ratio, _ in members]),
            "rows": len(members),
            "worst": min(members)[0],
            "worst_row": min(members)[1],
        }
        for key, members in groups.items()
    ]


def losses(rows: Iterable[dict[str, Any]]) -> list[str]:
    found = [(t["ratio"]["median"], row["id"], name) for row, name, t in timed(rows) if t["verdict"] == "loss"]
    return [f"  {ratio:.2f}  {row} ({name})" for ratio, row, name in sorted(found)]


def table(doc: dict[str, Any]) -> list[str]:
    """Short: what failed, where cuDNN is faster, and the means. Ratios are cuDNN's time over ours."""
    facts, summary = doc["machine"], doc["summary"]
    name = facts["gpu"].get("name", "no GPU")
    lines = [
        f"{name}, driver {facts['gpu'].get('driver_version', '-')}, torch {facts['torch']}, CUDA {facts['cuda']}, "
        f"cuDNN {facts['cudnn']}, {facts['date']}",
        *(f"{s['name']:<12} {s['status']:<8} {s['seconds']:>6.0f} s  {s.get('detail', '')}" for s in doc["steps"]),
        "rows: " + (", ".join(f"{n} {status}" for status, n in summary["statuses"].items()) or "none"),
    ]
    for row in doc["rows"]:
        if row["status"] in FAILED:
            lines.append(f"  {row['status']}: {row['id']}: {row['message'][:120]}")
    slower = losses(doc["rows"])
    lines += ["slower than cuDNN (ratio, row):" if slower else "slower than cuDNN: no row", *slower[:25]]
    if len(slower) > 25:
        lines.append(f"  and {len(slower) - 25} more")
    columns: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for mean in summary["means"]:
        columns.setdefault((mean["family"], mean["dtype"]), {})[f"{mean['mode']} {mean['variant']}"] = mean
    heads = ("fwd eager", "fwd graph", "train eager", "train graph")
    lines.append(f"{'mean ratio (worst)':<26}" + "".join(f"{head:>14}" for head in heads))
    for (family, dtype), cells in columns.items():
        shown = [f"{cells[h]['ratio']:.2f} ({cells[h]['worst']:.2f})" if h in cells else "-" for h in heads]
        lines.append(f"{family + ' ' + dtype:<26}" + "".join(f"{text:>14}" for text in shown))
    lines.append("FAILED: " + ", ".join(summary["failed"]) if summary["failed"] else "passed")
    return lines
