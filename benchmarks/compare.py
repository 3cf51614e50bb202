"""Two runs against each other, row by row: what became slower, what became faster, what cannot be told."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.report import row_verdict
from benchmarks.results import FAILED

OUTCOMES = ("regression", "unclear", "same", "improvement", "only in A", "only in B")


@dataclass(frozen=True)
class Change:
    """One id. `change` is B's ratio (theirs / ours) over A's: below 1 we became slower beside the same peer."""

    id: str
    outcome: str  # one of OUTCOMES
    before: str = ""  # the ratio with its interval, or the status
    after: str = ""
    change: float | None = None
    note: str = ""


def shown(row: dict[str, Any]) -> str:
    if row["timing"]:
        ratio = row["timing"]["ratio"]
        return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{row['memory']['ratio']:.2f}" if row["memory"] else row_verdict(row)


def judge(change: float, apart: bool, noisy: bool, threshold: float) -> str:
    """`apart`: the two intervals do not overlap. A change counts if it is apart and above the threshold."""
    if 1 / (1 + threshold) < change < 1 + threshold:
        return "same"
    if noisy or not apart:
        return "unclear"
    return "regression" if change < 1 else "improvement"


def change_of(a: dict[str, Any], b: dict[str, Any], threshold: float) -> Change:
    """Both rows have the same id."""
    name, before, after = a["id"], shown(a), shown(b)
    if a["status"] != "ok" or b["status"] != "ok":
        if b["status"] in FAILED and a["status"] not in FAILED:
            return Change(name, "regression", before, after, note=b["message"])
        if a["status"] in FAILED and b["status"] == "ok":
            return Change(name, "improvement", before, after, note="it failed before")
        return Change(name, "same" if a["status"] == b["status"] else "unclear", before, after, note=b["message"])
    if b["timing"] and a["timing"]:
        first, second = a["timing"], b["timing"]
        ratios = first["ratio"], second["ratio"]
        change = ratios[1]["median"] / ratios[0]["median"]
        apart = ratios[1]["high"] < ratios[0]["low"] or ratios[0]["high"] < ratios[1]["low"]
        noisy = first["noisy"] or second["noisy"]
        notes = ["noisy"] * noisy + ["the intervals overlap"] * (not apart)
        outcome = judge(change, apart, noisy, threshold)
        return Change(name, outcome, before, after, change, "" if outcome == "same" else ", ".join(notes))
    if b["memory"] and a["memory"]:
        change = median(a["memory"]["ours"]) / max(median(b["memory"]["ours"]), 1)
        apart = min(b["memory"]["ours"]) > max(a["memory"]["ours"]) or max(b["memory"]["ours"]) < min(
            a["memory"]["ours"]
        )
        return Change(name, judge(change, apart, False, threshold), before, after, change, "our peak memory")
    if b.get("drift") and a.get("drift"):
        errors = [each["drift"]["rms"][-1] for each in (a, b)]
        change = errors[0] / errors[1] if errors[1] else 1.0
        outcome = "unclear" if change < 0.5 else "same"
        return Change(name, outcome, f"{errors[0]:.1e}", f"{errors[1]:.1e}", change, "error after all steps")
    first, second = a["accuracy"], b["accuracy"]
    change = first["worst_error"] / second["worst_error"] if second["worst_error"] else 1.0
    # both passed: twice the error is the least that is worth a look, and is no failure
    outcome = "unclear" if change < 0.5 else "same"
    return Change(
        name, outcome, f"{first['worst_error']:.1e}", f"{second['worst_error']:.1e}", change, "error against float64"
    )


def changes(a: dict[str, Any], b: dict[str, Any], threshold: float) -> list[Change]:
    """Every id of both documents, regressions first and the largest of them first."""
    rows_a, rows_b = ({row["id"]: row for row in document["rows"]} for document in (a, b))
    made = [change_of(rows_a[name], rows_b[name], threshold) for name in rows_a if name in rows_b]
    made += [Change(name, "only in A", before=shown(rows_a[name])) for name in rows_a if name not in rows_b]
    made += [Change(name, "only in B", after=shown(rows_b[name])) for name in rows_b if name not in rows_a]
    return sorted(made, key=lambda item: (OUTCOMES.index(item.outcome), item.change or 0.0, item.id))


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Why the two runs may not be comparable, in words."""

    def facts(document: dict[str, Any]) -> dict[str, Any]:
        machine, settings = document["machine"], document["settings"]
        cpu, software = machine["cpu"], machine["software"]
        return {
            "processor": cpu["model"],
            "instruction sets": " ".join(cpu["flags"]),
            "cores": cpu["physical_cores"],
            "threads": settings["threads"],
            "torch": software["torch"],
            "torch's libraries": "; ".join(software["torch_libraries"]),
            "python": software["python"],
            "environment": " ".join(f"{name}={value}" for name, value in sorted(machine["environment"].items())),
            "our side": settings["ours"],
            "seed": settings["seed"],
        } | {f"version of {key}": peer["version"] for key, peer in document["peers"].items() if key != settings["ours"]}

    first, second = facts(a), facts(b)
    differ = [
        f"{name}: {first[name]} | {second[name]}" for name in first if name in second and first[name] != second[name]
    ]
    for label, document in (("A", a), ("B", b)):
        if not document["complete"]:
            differ.append(f"{label} is incomplete: {len(document['rows'])} of {document['planned_rows']} rows")
        noisy, count = document["summary"]["noisy"], len(document["rows"])
        if 2 * noisy > count:
            differ.append(f"{label} is mostly noisy: {noisy} of {count} rows")
    return differ
