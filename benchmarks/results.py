"""What a run leaves behind: one record per row, and the versioned JSON document around them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import scaling
from benchmarks.cases import Row
from benchmarks.schema import SCHEMA, SCHEMA_VERSION, STATUSES, json_text, schema_problems, upgraded
from benchmarks.stats import Interval, Spread, geometric_mean

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
    longest_s: float | None = None  # rows whose floor is above it are skipped; None: the suite's own


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
class Floor:
    """The shortest time a call could take, from the machine's measured peaks; see floor.py."""

    seconds: float
    flops: float
    weight_bytes: float  # streamed, recurrent weights once a step
    level: str  # the smallest memory that holds a thread's share of the weights: L1, L2, L3 or DRAM
    bound: str  # "flops" or "weights": which of the two took longer


@dataclass
class Timing:
    ratio: Interval  # theirs / ours, pair by pair; above 1 we are faster
    verdict: str
    noisy: bool  # the interval is too wide, or too much other work went on: no evidence either way
    other_work: float  # meanwhile, as a part of all cores' time
    ours: Side
    theirs: Side
    check: Check
    kernels: dict[str, str] = field(default_factory=dict)  # "ours", "theirs": what runs inside
    floor: Floor | None = None


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
class Memory:
    """Peak resident memory of one step above what was there before it, in bytes; see memory.py."""

    ours: list[int]  # one value per process
    theirs: list[int]
    ratio: float  # theirs / ours, of the medians: above 1 we take less
    verdict: str
    unit_bytes: int  # T * B * H elements of the case: one tensor as large as an output


@dataclass
class Drift:
    """The peer's error against float64 over the first steps of its output, over the root mean square of these; see
    drift.py."""

    steps: list[int]  # 1, 10, 100, ..
    rms: list[float]  # root mean square, for each of them
    largest: list[float]


@dataclass
class Result:
    """One row of a report. Exactly one of `timing`, `accuracy`, `memory`, `drift` is there when `status` is ok."""

    row: Row
    status: str
    message: str = ""
    timing: Timing | None = None
    accuracy: Accuracy | None = None
    memory: Memory | None = None
    drift: Drift | None = None
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.row.id,
            "kind": self.row.kind,
            "family": self.row.case.family,
            "mode": self.row.mode,
            "peer": self.row.peer,
            "threads": self.row.threads,
            "busy": self.row.busy,
            "case": asdict(self.row.case) | {"name": self.row.case.name},
            "status": self.status,
            "message": self.message,
            "timing": asdict(self.timing) if self.timing else None,
            "accuracy": asdict(self.accuracy) if self.accuracy else None,
            "memory": asdict(self.memory) if self.memory else None,
            "drift": asdict(self.drift) if self.drift else None,
            "command": self.command,
        }


def judged(row: dict[str, Any]) -> tuple[str, float] | None:
    """Verdict and ratio (theirs / ours) of a row that has them."""
    if row["timing"]:
        return row["timing"]["verdict"], row["timing"]["ratio"]["median"]
    return (row["memory"]["verdict"], row["memory"]["ratio"]) if row["memory"] else None


def sort_key(row: dict[str, Any]) -> tuple[int, float, str]:
    """Failures, then losses (worst first), ties, wins, rows without a verdict, skipped rows."""
    if row["status"] in FAILED:
        return (0, 0.0, row["id"])
    if row["status"] == "skipped":
        return (5, 0.0, row["id"])
    if found := judged(row):
        return (1 + VERDICTS.index(found[0]), found[1], row["id"])
    if drift := row.get("drift"):
        return (4, -drift["rms"][-1], row["id"])
    return (4, -row["accuracy"]["worst_error"] / row["accuracy"]["worst_allowed"], row["id"])


def family_means(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean of the median ratios per family, mode and peer, lowest first; `left_out` rows have no ratio."""
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
    return sorted(means, key=lambda mean: (mean["ratio"] is None, mean["ratio"] or 0.0))


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
        peers: dict[str, dict[str, str]] | None = None,
    ) -> Document:
        """`peers`: title and version of every contestant that took part, under its key."""
        rows = sorted((result.to_json() for result in results), key=sort_key)
        counts = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
        verdicts = [found[0] for found in map(judged, rows) if found]
        data = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "command": command,
            "complete": len(rows) == planned,
            "planned_rows": planned,
            "settings": asdict(settings),
            "includes_input_gemm": True,
            "machine": machine,
            "peers": peers or {},
            "rows": rows,
            "summary": {
                "statuses": counts,
                "verdicts": {name: verdicts.count(name) for name in VERDICTS},
                "noisy": sum(bool(row["timing"] and row["timing"]["noisy"]) for row in rows),
                "families": family_means(rows),
                "fits": scaling.fits(rows),
                "thread_speedups": scaling.thread_speedups(rows),
            },
        }
        return cls(data)

    @property
    def failed(self) -> bool:
        return any(row["status"] in FAILED for row in self.data["rows"])

    def save(self, path: Path) -> None:
        path.write_text(json_text(self.data))

    @classmethod
    def load(cls, path: Path) -> Document:
        """Reads this version and every older one.

        Raises:
            ValueError: the file is no such document; the text says what is wrong with it.
        """
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name} is no JSON: {error}") from error
        problems = schema_problems(upgraded(data))
        if problems:
            raise ValueError(f"{path.name} is no {SCHEMA} file: " + "; ".join(problems))
        return cls(data)
