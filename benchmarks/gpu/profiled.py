"""One call of each row, for a profiler: `ncu ... python -m benchmarks.gpu.profiled ROW ... [--device cuda]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.gpu.rows import TABLE, tiny
from benchmarks.gpu.steps import prepare

# Kernels whose time is looked into, by a part of their names, and a row that runs each of them.
KERNELS = {
    "grid_forward": "lstm-128x16x512x512-bf16-fwd",
    "grid_backward": "lstm-128x16x512x512-bf16-train",
    "resident_ffma_forward": "lstm-128x32x128x128-fwd",
    "cluster": "lstm-128x16x512x512-f16-train",
}
SECTIONS = ("LaunchStats", "Occupancy", "SpeedOfLight", "InstructionStats", "WarpStateStats")


def command(tool: str, kernel: str, python: Sequence[str]) -> list[str]:
    """Profiles the first launch of the kernel in its row, as text."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    wanted = ["--kernel-name", f"regex:{kernel}", "--launch-count", "1", "--clock-control", "none"]
    return [tool, *wanted, *sections, *python, "-m", "benchmarks.gpu.profiled", KERNELS[kernel]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One call of each row.")
    parser.add_argument("rows", nargs="+", metavar="ROW")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(argv)
    known = {row.id: row for row in TABLE}
    for name in options.rows:
        if name not in known:
            parser.error(f"expected ids of benchmarks/gpu/rows.py, got {name!r}")
        row = tiny(known[name]) if options.tiny else known[name]
        prepare(row, torch.device(options.device)).ours()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
