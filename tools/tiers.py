"""Makes the table of tiers of what a GPU has measured: tiers.json, as benchmarks/gpu_check.sh writes it, to C++.

    python tools/tiers.py out/gpu/tiers.json        # what the times say, and what they gain
    python tools/tiers.py out/gpu/tiers.json --write csrc/cuda/measured_tiers.inc

An entry is for calls with at most its B and h; of those that hold for a call the first counts, which is the smallest. A
tier is left for another one only where that is faster by more than TIE: sizes between the measured ones take the entry
of the next larger, and a boundary that noise has drawn would be in the wrong place. The file says which run chose its
entries, and each entry the times of all tiers.

The per-step tier's times are eager ones, which is what its launches take. In a graph its kernels take about half as
long, and the table is for both: its times count half.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIE = 0.05
PASSES = ("fwd", "bwd")
KEYS = {"cell": str, "dtype": str, "h": int, "B": int, "tier": str, "fwd": float, "bwd": float}
ARITHMETIC = {"float32": "kFloat32", "tf32": "kTF32", "bfloat16": "kHalf", "float16": "kHalf"}
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}  # the cells that stand for those with as many gates
STEP = 0.5  # of the per-step tier's times


Kind = tuple[str, str, bool]  # cell, dtype, backward


class TiersError(Exception):
    """The file is none that gpu_check.sh has written; the text says where."""


@dataclass(frozen=True)
class Entry:
    """The tier of calls of this kind with at most B rows and h units, and the microseconds a step of every tier."""

    cell: str
    dtype: str
    backward: bool
    B: int
    h: int
    tier: str
    us: dict[str, float]

    def line(self) -> str:
        times = ", ".join(f"{tier} {us:g}" for tier, us in sorted(self.us.items(), key=lambda pair: pair[1]))
        what = f"{GATES[self.cell]}, Arithmetic::{ARITHMETIC[self.dtype]}, {str(self.backward).lower()}"
        return f"{{{what}, {self.B}, {self.h}, Tier::k{self.tier.capitalize()}}},  // {times}"


def read(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The run's machine, and its rows."""
    try:
        found = json.loads(path.read_text())
        run, rows = found["machine"], found["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TiersError(f"{path}: expected JSON with machine and rows: {type(error).__name__}: {error}") from error
    for i, row in enumerate(rows):
        if not any(name in row for name in PASSES):
            raise TiersError(f"{path}: rows[{i}]: expected {' or '.join(PASSES)}, got neither")
        for key, kind in KEYS.items():
            if key in PASSES and key not in row:
                continue  # the tier has no such pass
            value = row.get(key)
            fits = isinstance(value, (int, float)) and value > 0 if kind is not str else isinstance(value, str)
            if not fits:
                raise TiersError(f"{path}: rows[{i}]: {key}: expected {kind.__name__}, got {value!r}")
        for key, known in (("dtype", ARITHMETIC), ("cell", GATES)):
            if row[key] not in known:
                raise TiersError(f"{path}: rows[{i}]: {key}: expected one of {', '.join(known)}, got {row[key]!r}")
    return run, rows


def choose(us: dict[str, float], before: str) -> str:
    """The fastest, or the neighbour's where that is as fast."""
    us = {tier: time * (STEP if tier == "step" else 1) for tier, time in us.items()}
    best = min(us, key=lambda tier: us[tier])
    return before if us.get(before, float("inf")) <= us[best] * (1 + TIE) else best


def times(rows: Iterable[dict[str, Any]]) -> dict[Kind, dict[tuple[int, int], dict[str, float]]]:
    """Of every kind of call, B and h the microseconds a step of each tier. float16 takes the tiers of bfloat16."""
    found: dict[Kind, dict[tuple[int, int], dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        for name in filter(row.__contains__, PASSES if row["dtype"] != "float16" else ()):
            found[row["cell"], row["dtype"], name == "bwd"][row["B"], row["h"]][row["tier"]] = row[name]
    return found


def entries(rows: Iterable[dict[str, Any]]) -> list[Entry]:
    """Of every kind of call by rising B, then h. Neighbours with one tier are one entry, and batches that agree."""
    found: list[Entry] = []
    for kind, sizes in times(rows).items():
        same = 0  # entries of the batch before
        for B in sorted({B for B, _ in sizes}):
            of_batch: list[Entry] = []
            for h in sorted(h for b, h in sizes if b == B):
                us = sizes[B, h]
                tier = choose(us, of_batch[-1].tier if of_batch else "")
                if of_batch and of_batch[-1].tier == tier:
                    of_batch.pop()
                of_batch.append(Entry(*kind, B, h, tier, us))
            if same and [(e.h, e.tier) for e in found[-same:]] == [(e.h, e.tier) for e in of_batch]:
                del found[-same:]  # the larger batch says the same
            found += of_batch
            same = len(of_batch)
    return found


def tier_of(table: Iterable[Entry], cell: str, dtype: str, backward: bool, B: int, h: int) -> str | None:
    """What the table says of a call; None where it says nothing."""
    for entry in table:
        if (entry.cell, entry.dtype, entry.backward) == (cell, dtype, backward) and B <= entry.B and h <= entry.h:
            return entry.tier
    return None


def gains(rows: Sequence[dict[str, Any]], table: Sequence[Entry]) -> list[str]:
    """By how much the table's choice misses the fastest tier, where it does: ties, and launches that count half."""
    lines = []
    for kind, sizes in times(rows).items():
        for (B, h), us in sizes.items():
            tier = tier_of(table, *kind, B, h)
            assert tier is not None
            if us[tier] > min(us.values()):
                cell, dtype, backward = kind
                lines.append(
                    f"{cell} {dtype} B {B} h {h} {'backward' if backward else 'forward'}: {tier} {us[tier]:g} us a "
                    f"step, fastest {min(us.values()):g}"
                )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes the table of tiers of a run's tiers.json.")
    parser.add_argument("tiers", type=Path, help="tiers.json")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the entries")
    options = parser.parse_args(argv)
    try:
        run, rows = read(options.tiers)
    except TiersError as error:
        print(f"tiers: {error}", file=sys.stderr)
        return 2
    table = entries(rows)
    head = f"// Made by tools/tiers.py of a run on {run}.\n// Behind each entry the times of the tiers, in us a step."
    lines = [head, *(entry.line() for entry in table)]
    if options.write:
        options.write.write_text("\n".join(lines) + "\n")
    else:
        print("\n".join(lines))
    calls = len({(row["cell"], row["dtype"], row["B"], row["h"]) for row in rows})
    print(f"{len(table)} entries of {calls} measured calls, {run}", file=sys.stderr)
    for line in gains(rows, table):
        print(f"  not the fastest: {line}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
