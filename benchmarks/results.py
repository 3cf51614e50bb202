"""What a run leaves behind: one record per row, and the versioned JSON document around them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Row
from benchmarks.stats import Interval, Spread, geometric_mean

SCHEMA = "fastrnn-benchmarks"
SCHEMA_VERSION = 1  # raise it when a key is removed or changes its meaning; new keys need no new version

STATUSES = ("error", "mismatch", "ok", "skipped")
FAILED = ("error", "mismatch")  # these make the exit status non-zero
VERDICTS = ("loss", "tie", "win")


@dataclass(frozen=True)
class Settings:
    """How rows are run. Times in seconds."""

    ours: str = "fastrnn"
    threads: int = 1
    rounds: int = 16  # pairs aimed at; half of them A B, half B A
    budget_s: float | None = None  # of the timed part of a row; None: the suite's own
    min_sample_s: float = 20e-3
    warmup_s: float = 0.05
    tie: float = 0.20
    noisy: float = 0.20
    busy: float = 0.05
    seed: int = 0


@dataclass
class Side:
    """One side's time per call, in seconds."""

    spread: Spread
    repeats: int  # calls per sample
    samples_s: list[float]


@dataclass
class Check:
    """Ours against theirs before any timing: the worst tensor, its difference over its largest value."""

    worst: str
    error: float
    tolerance: float


@dataclass
class Timing:
    ratio: Interval  # theirs / ours, pair by pair; above 1 we are faster
    verdict: str
    noisy: bool  # the interval is too wide, or too much other work went on: no evidence either way
    other_work: float  # meanwhile, as a part of all cores' time
    ours: Side
    theirs: Side
    check: Check


@dataclass
class Errors:
    """Largest error against float64 over outputs and over gradients, each over the tensor's largest value."""

    outputs: float
    gradients: float


@dataclass
class Accuracy:
    ours: Errors
    theirs: Errors | None  # None: the peer cannot, `theirs_missing` says why
    theirs_missing: str | None
    worst: str  # the tensor where ours came nearest to (or furthest over) what is allowed
    worst_error: float
    worst_allowed: float


@dataclass
class Result:
    """One row of a report. Exactly one of `timing`, `accuracy` is there when `status` is ok."""

    row: Row
    status: str
    message: str = ""
    timing: Timing | None = None
    accuracy: Accuracy | None = None
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.row.id,
            "kind": self.row.kind,
            "family": self.row.case.family,
            "mode": self.row.mode,
            "peer": self.row.peer,
            "case": asdict(self.row.case) | {"name": self.row.case.name},
            "status": self.status,
            "message": self.message,
            "timing": asdict(self.timing) if self.timing else None,
            "accuracy": asdict(self.accuracy) if self.accuracy else None,
            "command": self.command,
        }


def sort_key(row: dict[str, Any]) -> tuple[int, float, str]:
    """Failures, then losses (worst first), ties, wins, rows without a verdict, skipped rows."""
    timing = row["timing"]
    if row["status"] in FAILED:
        return (0, 0.0, row["id"])
    if row["status"] == "skipped":
        return (5, 0.0, row["id"])
    if timing is None:
        return (4, -row["accuracy"]["worst_error"] / row["accuracy"]["worst_allowed"], row["id"])
    return (1 + VERDICTS.index(timing["verdict"]), timing["ratio"]["median"], row["id"])


def family_means(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean of the median ratios per family, mode and peer; `left_out` rows have no ratio."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "timing":
            groups.setdefault((row["family"], row["mode"], row["peer"]), []).append(row)
    means = []
    for (family, mode, peer), members in groups.items():
        timings = [row["timing"] for row in members if row["status"] == "ok"]
        verdicts = [timing["verdict"] for timing in timings]
        mean: dict[str, Any] = {"family": family, "mode": mode, "peer": peer}
        mean["ratio"] = geometric_mean([timing["ratio"]["median"] for timing in timings])
        mean["rows"] = len(timings)
        mean |= {name: verdicts.count(name) for name in VERDICTS}
        mean["noisy"] = sum(timing["noisy"] for timing in timings)
        mean["left_out"] = len(members) - len(timings)
        means.append(mean)
    return means


@dataclass
class Document:
    """The JSON file of a run, as plain dicts and lists (`data`) so that reports work on stored files too."""

    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        results: Iterable[Result],
        settings: Settings,
        machine: dict[str, Any],
        command: str,
        planned: int,
    ) -> Document:
        rows = sorted((result.to_json() for result in results), key=sort_key)
        counts = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
        verdicts = [row["timing"]["verdict"] for row in rows if row["timing"]]
        data = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "command": command,
            "complete": len(rows) == planned,
            "planned_rows": planned,
            "settings": asdict(settings),
            "includes_input_gemm": True,
            "machine": machine,
            "rows": rows,
            "summary": {
                "statuses": counts,
                "verdicts": {name: verdicts.count(name) for name in VERDICTS},
                "noisy": sum(bool(row["timing"] and row["timing"]["noisy"]) for row in rows),
                "families": family_means(rows),
            },
        }
        return cls(data)

    @property
    def failed(self) -> bool:
        return any(row["status"] in FAILED for row in self.data["rows"])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.data, indent=1, default=str) + "\n")

    @classmethod
    def load(cls, path: Path) -> Document:
        data = json.loads(path.read_text())
        problems = schema_problems(data)
        if problems:
            raise ValueError(f"{path.name} is no {SCHEMA} file: " + "; ".join(problems))
        return cls(data)


Types = dict[str, type | tuple[type, ...]]
REQUIRED: Types = {
    "schema": str, "schema_version": int, "command": str, "complete": bool, "planned_rows": int,
    "settings": dict, "includes_input_gemm": bool, "machine": dict, "rows": list, "summary": dict,
}  # fmt: skip
ROW_REQUIRED: Types = {
    "id": str, "kind": str, "family": str, "mode": str, "peer": str, "case": dict, "status": str,
    "message": str, "timing": (dict, type(None)), "accuracy": (dict, type(None)), "command": str,
}  # fmt: skip
MACHINE_REQUIRED: Types = {
    "date": str, "cpu": dict, "threads": int, "environment": dict, "software": dict,
}  # fmt: skip


def schema_problems(data: Any) -> list[str]:
    """What is wrong with a document, in words; empty when it is valid."""
    if not isinstance(data, dict):
        return ["not an object"]
    if data.get("schema") != SCHEMA:
        return [f"schema: expected {SCHEMA!r}, got {data.get('schema')!r}"]
    if data.get("schema_version") != SCHEMA_VERSION:
        return [f"schema_version: expected {SCHEMA_VERSION}, got {data.get('schema_version')!r}"]
    problems: list[str] = []

    def require(where: str, value: Any, required: Types) -> bool:
        if not isinstance(value, dict):
            problems.append(f"{where}: expected an object, got {type(value).__name__}")
            return False
        for key, kind in required.items():
            if key not in value:
                problems.append(f"{where}: {key} is missing")
            elif not isinstance(value[key], kind):
                problems.append(f"{where}: {key} is a {type(value[key]).__name__}")
        return True

    require("document", data, REQUIRED)
    require("machine", data.get("machine"), MACHINE_REQUIRED)
    rows = data.get("rows")
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        where = f"rows[{index}]"
        if not require(where, row, ROW_REQUIRED):
            continue
        if row.get("status") not in STATUSES:
            problems.append(f"{where}: status is {row.get('status')!r}")
        if row.get("status") == "ok" and bool(row.get("timing")) == bool(row.get("accuracy")):
            problems.append(f"{where}: ok, but not exactly one of timing and accuracy")
    return problems
