"""Tables for people, from the document of a run (fresh or loaded): terminal and Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.results import FAILED, VERDICTS, judged

STYLES = {"error": "bold red", "mismatch": "bold red", "loss": "red", "tie": "yellow", "win": "green"}
TIMING_HEADER = ("row", "verdict", "ratio", "95% interval (pairs)", "ours", "theirs", "ours / floor", "note")
ACCURACY_HEADER = (
    "row", "verdict", "ours out", "theirs out", "ours grad", "theirs grad", "of allowed", "note",
)  # fmt: skip
MEMORY_HEADER = ("row", "verdict", "ratio", "ours", "theirs", "ours / TBH", "theirs / TBH", "note")
DRIFT_HEADER = ("row", "verdict", "rms error after 1, 10, .. steps", "largest", "note")
FITS_HEADER = ("cell", "mode", "peer", "threads", "against", "at", "sizes", "our exponent", "theirs")
SPEEDUPS_HEADER = ("case", "mode", "peer", "threads", "our speed-up", "theirs")


def seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}" if value * factor < 1000 else f"{value * factor:.0f} {unit}"
    raise AssertionError


def time_cell(side: dict[str, Any]) -> str:
    """Median, and the interquartile range as a part of it."""
    spread = side["spread"]
    return f"{seconds(spread['median'])} ({(spread['q3'] - spread['q1']) / spread['median']:.0%})"


def megabytes(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def notes(row: dict[str, Any]) -> str:
    parts = [row["message"]] if row["message"] else []
    timing, accuracy = row["timing"], row["accuracy"]
    if timing and timing["noisy"]:
        ratio = timing["ratio"]
        width = (ratio["high"] - ratio["low"]) / ratio["median"]
        parts.append(f"noisy: interval {width:.0%} wide, other work {timing['other_work']:.0%}")
        if ratio["coverage"] < 0.95:
            parts.append(f"it covers only {ratio['coverage']:.0%}")
    if timing and timing["floor"] and timing["ours"]["spread"]["median"] < 0.95 * timing["floor"]["seconds"]:
        parts.append("under its floor: the peaks were measured too low, or are not the processor's limit")
    if accuracy and accuracy["theirs_missing"]:
        parts.append(f"no such run of the peer: {accuracy['theirs_missing']}")
    return "; ".join(parts)


def row_verdict(row: dict[str, Any]) -> str:
    found = judged(row)
    return found[0] if row["status"] == "ok" and found else row["status"]


def shown_verdict(row: dict[str, Any]) -> str:
    """With a question mark if the row is noisy."""
    return row_verdict(row) + ("?" if row["timing"] and row["timing"]["noisy"] else "")


def floor_cell(timing: dict[str, Any]) -> str:
    """Our time in floors, and what the floor is made of; empty without one."""
    floor = timing["floor"]
    if not floor:
        return ""
    bound = "GEMM" if floor["bound"] == "flops" else f"{floor['level']} reads"
    return f"{timing['ours']['spread']['median'] / floor['seconds']:.1f} ({bound})"


def timing_cells(row: dict[str, Any]) -> tuple[str, ...]:
    timing = row["timing"]
    if not timing:
        return (row["id"], row_verdict(row), "", "", "", "", "", notes(row))
    ratio = timing["ratio"]
    return (
        row["id"],
        shown_verdict(row),
        f"{ratio['median']:.2f}",
        f"{ratio['low']:.2f} to {ratio['high']:.2f} ({ratio['count']})",
        time_cell(timing["ours"]),
        time_cell(timing["theirs"]),
        floor_cell(timing),
        notes(row),
    )


def accuracy_cells(row: dict[str, Any]) -> tuple[str, ...]:
    accuracy = row["accuracy"]
    if not accuracy:
        return (row["id"], row_verdict(row), "", "", "", "", "", notes(row))
    ours, theirs = accuracy["ours"], accuracy["theirs"] or {}

    def both(key: str) -> tuple[str, str]:
        return f"{ours[key]:.1e}", f"{theirs[key]:.1e}" if theirs else "none"

    share = f"{accuracy['worst_error'] / accuracy['worst_allowed']:.0%} ({accuracy['worst']})"
    return (row["id"], row_verdict(row), *both("outputs"), *both("gradients"), share, notes(row))


def memory_cells(row: dict[str, Any]) -> tuple[str, ...]:
    memory = row["memory"]
    if not memory:
        return (row["id"], row_verdict(row), "", "", "", "", "", notes(row))
    peaks = [median(memory[side]) for side in ("ours", "theirs")]
    units = [f"{peak / memory['unit_bytes']:.1f}" for peak in peaks]
    return (row["id"], row_verdict(row), f"{memory['ratio']:.2f}", *map(megabytes, peaks), *units, notes(row))


def part(value: float) -> str:
    """0.0123 as 1.2%."""
    return f"{100 * value:.2g}%" if value < 0.995 else f"{100 * value:.0f}%"


def drift_cells(row: dict[str, Any]) -> tuple[str, ...]:
    drift = row.get("drift")
    if not drift:
        return (row["id"], row_verdict(row), "", "", notes(row))
    columns = (", ".join(map(part, drift[name])) for name in ("rms", "largest"))
    return (row["id"], row_verdict(row), *columns, notes(row))


KINDS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], tuple[str, ...]]]] = {
    "timing": (TIMING_HEADER, timing_cells),
    "accuracy": (ACCURACY_HEADER, accuracy_cells),
    "memory": (MEMORY_HEADER, memory_cells),
    "drift": (DRIFT_HEADER, drift_cells),
}


def fit_cells(fit: dict[str, Any]) -> tuple[str, ...]:
    at = ", ".join(f"{name}={value}" for name, value in fit["fixed"].items())
    sizes = ", ".join(map(str, fit["sizes"]))
    who = (fit["cell"], fit["mode"], fit["peer"], str(fit["threads"] or "the run's"))
    return (*who, fit["axis"], at, sizes, f"{fit['ours']:.2f}", f"{fit['theirs']:.2f}")


def speedup_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    sides = [", ".join(f"{value:.2f}" for value in entry[side]) for side in ("ours", "theirs")]
    return (entry["name"], entry["mode"], entry["peer"], ", ".join(map(str, entry["threads"])), *sides)


def roofline_line(roofline: dict[str, Any]) -> str:
    peaks = ", ".join(f"{dtype} {peak / 1e9:.0f}" for dtype, peak in roofline["gemm_flops"].items())
    reads = ", ".join(f"{level} {speed / 1e9:.0f}" for level, speed in roofline["bandwidth"].items())
    threads = f"{roofline['threads']} thread" + "s" * (roofline["threads"] != 1)
    how = "measured before and after the rows, the better counts"
    return f"floor, from {threads}, {how}: peak GEMM {peaks} GFLOP/s; reads {reads} GB/s"


def method_lines(document: dict[str, Any]) -> list[str]:
    """What a reader must know before any number."""
    settings, machine = document["settings"], document["machine"]
    environment, software = machine["environment"], machine["software"]
    pinning = " ".join(f"{name}={environment.get(name, 'unset')}" for name in ("OMP_PROC_BIND", "OMP_PLACES"))
    cpu = machine["cpu"]
    noise = re.compile(r" \(Git Hash \w+\)|-Product Build \d+|\(R\)| for Intel.* applications|.* usage: ")
    build = ", ".join(noise.sub("", line) for line in software["torch_libraries"])
    ours = settings["ours"]
    kinds = {row["kind"] for row in document["rows"]}
    lines = [
        f"{cpu['model']}, {cpu['physical_cores']} cores, {settings['threads']} threads, {pinning}; "
        f"load average at the start {cpu['load_average_1min']}",
        f"torch {software['torch']} ({build}), fastrnn {software['fastrnn'] or 'not there'}, {machine['date']}",
    ]
    others = [f"{key} = {peer['title']} ({peer['version']})" for key, peer in document["peers"].items()]
    if others:
        lines.append("contestants: " + "; ".join(others))
    if "timing" in kinds:
        lines += [
            f"ratio = the peer's time / {ours}'s time, paired: above 1 {ours} is faster. "
            "Whole layers or cells: the input GEMM is included, packing and weight loading are not.",
            f"tie: the interval holds 1 or the gap is under {settings['tie']:.0%}. "
            f"noisy: the interval is wider than {settings['noisy']:.0%} of the ratio, "
            f"or other work took more than {settings['busy']:.0%} of the cores; such a verdict has a "
            "question mark. Times: median (interquartile range).",
        ]
        lines += [roofline_line(roofline) for roofline in machine["roofline"]]
    if "memory" in kinds:
        lines += [
            "memory: peak resident size of one step above what was resident before it, median of fresh processes, each "
            "with one side. ratio = theirs / ours. TBH: the size of T * B * H elements, that is of one output."
        ]
    if "drift" in kinds:
        lines += [
            "drift: difference of the output from torch.nn in float64 over the first 1, 10, 100, .. steps, over the "
            "root mean square of these steps' outputs. A chaotic network's error grows to about 140% in any arithmetic."
        ]
    if "accuracy" in kinds:
        lines += [
            "accuracy: largest error against torch.nn in float64, over the tensor's largest value. "
            "Allowed for each tensor: twice the peer's error plus one rounding unit of the dtype."
        ]
    if not document["complete"]:
        lines.append(f"INCOMPLETE: {len(document['rows'])} of {document['planned_rows']} rows were run.")
    return lines


def summary_line(document: dict[str, Any]) -> str:
    summary = document["summary"]
    counts = {name: summary["verdicts"][name] for name in VERDICTS}
    counts |= {name: count for name, count in summary["statuses"].items() if name != "ok"}
    names = {"loss": "losses", "tie": "ties", "win": "wins", "error": "errors", "mismatch": "mismatches"}
    text = ", ".join(f"{count} {names.get(name, name)}" for name, count in counts.items())
    return f"{len(document['rows'])} rows: {text}; {summary['noisy']} noisy"


def family_cells(mean: dict[str, Any]) -> tuple[str, ...]:
    ratio = "none" if mean["ratio"] is None else f"{mean['ratio']:.2f}"
    counts = [str(mean[name]) for name in ("rows", *VERDICTS, "noisy", "left_out")]
    return (mean["family"], mean["mode"], mean["peer"], ratio, *counts)


FAMILY_HEADER = (
    "family",
    "mode",
    "peer",
    "geometric mean",
    "rows",
    "losses",
    "ties",
    "wins",
    "noisy",
    "left out",
)


def rerun_commands(document: dict[str, Any]) -> list[str]:
    """Commands of the rows that ask for a second look."""
    return [row["command"] for row in document["rows"] if row["status"] in FAILED or row_verdict(row) == "loss"]


def extra_tables(document: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, header and cells of the tables that are made from several rows; empty ones are left out."""
    summary = document["summary"]
    tables = [
        ("Geometric means", FAMILY_HEADER, [family_cells(mean) for mean in summary["families"]]),
        ("Cost against size: time ~ size ^ exponent", FITS_HEADER, [fit_cells(fit) for fit in summary["fits"]]),
        (
            "Threads: time with the fewest / time with each",
            SPEEDUPS_HEADER,
            list(map(speedup_cells, summary["thread_speedups"])),
        ),
    ]
    return [table for table in tables if table[2]]


def mostly_noisy(document: dict[str, Any]) -> bool:
    return 2 * document["summary"]["noisy"] > len(document["rows"])


NO_EVIDENCE = "Most rows are noisy: these numbers are no evidence. Run again when nothing else runs."


def print_report(document: dict[str, Any], console: Console) -> None:
    for line in method_lines(document):
        console.print(Text(line, style="dim"))
    for kind, (header, cells) in KINDS.items():
        rows = [row for row in document["rows"] if row["kind"] == kind]
        if rows:
            styles = [STYLES.get(row_verdict(row), "") for row in rows]
            console.print(build_table(header, zip(map(cells, rows), styles, strict=True)))
    for title, names, cells_of in extra_tables(document):
        console.print(Text(title, style="bold"))
        console.print(build_table(names, ((cells, "") for cells in cells_of)))
    console.print(summary_line(document))
    if mostly_noisy(document):
        console.print(NO_EVIDENCE)
    if commands := rerun_commands(document):
        console.print("Failures and losses again:")
        for command in commands:
            console.print(Text(f"  {command}"), soft_wrap=True)


def build_table(header: Iterable[str], rows: Iterable[tuple[tuple[str, ...], str]]) -> Table:
    table = Table(header_style="bold", pad_edge=False)
    for name in header:
        table.add_column(name, no_wrap=name in ("row", "ratio"), overflow="fold")
    for cells, style in rows:
        table.add_row(*(Text(cell, style=style if index == 1 else "") for index, cell in enumerate(cells)))
    return table


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def markdown(document: dict[str, Any]) -> str:
    lines = ["# Benchmarks", "", f"`{document['command']}`", ""]
    lines += [*(f"- {line}" for line in method_lines(document)), ""]
    lines += [summary_line(document), *([NO_EVIDENCE] if mostly_noisy(document) else []), ""]
    for kind, (header, cells) in KINDS.items():
        rows = [row for row in document["rows"] if row["kind"] == kind]
        if rows:
            lines += [*markdown_table(header, map(cells, rows)), ""]
    for title, names, cells_of in extra_tables(document):
        lines += [f"## {title}", "", *markdown_table(names, cells_of), ""]
    lines += ["Failures and losses again:", "", *(f"    {command}" for command in rerun_commands(document)), ""]
    lines += ["Any other row: the command stands in the JSON file, under `command`.", ""]
    return "\n".join(lines)
