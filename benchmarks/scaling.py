"""How time grows with one size or with threads, from rows that differ in nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

AXES = ("T", "B", "H")  # H with I: rows where I = H move both
FEWEST = 3  # points that make a fit


def exponent(sizes: list[int], times: list[float]) -> float:
    """Slope of log(time) over log(size), least squares: 1 is linear, 2 quadratic."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def timed_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["status"] == "ok" and row["timing"]]


def fixed_part(row: dict[str, Any], free: str) -> tuple[tuple[str, Any], ...]:
    """Everything that must be equal in a group, as sorted pairs; `free` may differ."""
    case = {key: value for key, value in row["case"].items() if key not in ("family", "name")}
    if free == "H":
        case["I"] = "H" if case["I"] == case["H"] else case["I"]
    fixed = case | {"mode": row["mode"], "peer": row["peer"], "threads": row["threads"], "busy": row.get("busy", 0)}
    fixed.pop(free)
    return tuple(sorted(fixed.items(), key=lambda pair: pair[0]))


def groups(rows: Iterable[dict[str, Any]], free: str) -> dict[tuple[tuple[str, Any], ...], list[dict[str, Any]]]:
    found: dict[tuple[tuple[str, Any], ...], list[dict[str, Any]]] = {}
    for row in timed_rows(rows):
        found.setdefault(fixed_part(row, free), []).append(row)
    return found


def median(row: dict[str, Any], side: str) -> float:
    return row["timing"][side]["spread"]["median"]


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per axis and group of at least three sizes: exponents of both sides' times."""
    made = []
    for axis in AXES:
        for fixed, members in groups(rows, axis).items():
            members = sorted(members, key=lambda row: row["case"][axis])
            sizes = [row["case"][axis] for row in members]
            if len(set(sizes)) < FEWEST:
                continue
            case = dict(fixed)
            times = {side: [median(row, side) for row in members] for side in ("ours", "theirs")}
            made.append(
                {
                    "axis": axis,
                    "cell": case["cell"],
                    "mode": case["mode"],
                    "peer": case["peer"],
                    "threads": case["threads"],
                    "fixed": {name: case[name] for name in AXES if name != axis},
                    "sizes": sizes,
                    "ours_s": times["ours"],
                    "theirs_s": times["theirs"],
                    "ours": exponent(sizes, times["ours"]),
                    "theirs": exponent(sizes, times["theirs"]),
                }
            )
    return made


def thread_speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case, mode and peer with rows at several thread counts: time with the fewest over time with each."""
    made = []
    for members in groups(rows, "threads").values():
        members = sorted(members, key=lambda row: row["threads"])
        if len({row["threads"] for row in members}) < 2:
            continue
        first = members[0]
        made.append(
            {
                "name": first["case"]["name"]
                + (f" beside {first['busy']} busy processes" if first.get("busy") else ""),
                "mode": first["mode"],
                "peer": first["peer"],
                "threads": [row["threads"] for row in members],
                "ours": [median(first, "ours") / median(row, "ours") for row in members],
                "theirs": [median(first, "theirs") / median(row, "theirs") for row in members],
            }
        )
    return made
