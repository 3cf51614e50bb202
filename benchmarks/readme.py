"""Tables and plots inside Markdown files, made from committed runs.

A part of the file looks so, and everything between the two lines is written by `python -m benchmarks readme`:

    <!-- benchmarks begin: 2026-11-21-quick-epyc-2-threads.json families -->
    <!-- benchmarks end -->

The first word is a file of benchmarks/results, or a pattern like `*-quick-*.json` for the newest of several. The second
is one of VIEWS or, for a run on a GPU (results/gpu), of GPU_VIEWS, or `plot:NAME` with a name of plots.PLOTS.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import FITS_HEADER, fit_cells, markdown_table, median, megabytes, part, row_verdict
from benchmarks.results import FAILED, VERDICTS, Document, judged
from benchmarks.stats import geometric_mean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = tuple(ROOT / name for name in ("README.md", "docs/measured.md", "docs/performance-cpu.md", "docs/gpu.md"))
PART = re.compile(r"(<!-- benchmarks begin: (\S+) (\S+) -->\n).*?(<!-- benchmarks end -->)", re.DOTALL)
LINE = re.compile(r"<!-- benchmarks (begin|end)")
TITLES = {
    "lstm": "LSTM", "gru": "GRU", "rnn": "RNN (tanh)", "packed": "PackedSequence", "proj": "LSTM with `proj_size`",
    "bidir": "bidirectional", "decode": "one step, layers", "cell": "one step, cells", "float64": "float64",
    "rl": "resets inside sequences", "sweep": "grid of sizes",
}  # fmt: skip
WORDS = {"win": ("win", "wins"), "tie": ("tie", "ties"), "loss": ("loss", "losses")}


def counted(mean: dict[str, Any]) -> str:
    """`3 wins, 1 tie`: what there is none of is left out."""
    counts = [(mean[name], WORDS[name]) for name in reversed(VERDICTS) if mean[name]]
    parts = [f"{count} {one if count == 1 else many}" for count, (one, many) in counts]
    if mean["noisy"]:
        parts.append(f"{mean['noisy']} noisy")
    if mean["left_out"]:
        parts.append(f"{mean['left_out']} without a ratio")
    return ", ".join(parts)


def families(data: dict[str, Any]) -> list[str]:
    """Geometric means: a line per family and peer that has one of these modes, a column per mode."""
    means = {(mean["family"], mean["peer"], mean["mode"]): mean for mean in data["summary"]["families"]}
    keys = sorted(
        {key[:2] for key in means}, key=lambda key: (list(TITLES).index(key[0]) if key[0] in TITLES else 99, key)
    )
    several = len({peer for _, peer in keys}) > 1

    def cell(mean: dict[str, Any] | None) -> str:
        if not mean:
            return ""
        return f"**{mean['ratio']:.2f}** ({counted(mean)})" if mean["ratio"] else counted(mean)

    lines = [
        (
            TITLES.get(family, family) + (f", {data['peers'].get(peer, {}).get('title', peer)}" if several else ""),
            *(cell(means.get((family, peer, mode))) for mode in ("fwd", "train")),
        )
        for family, peer in keys
        if (family, peer, "fwd") in means or (family, peer, "train") in means
    ]
    return markdown_table(("", "forward", "training step"), lines)


def headline(data: dict[str, Any]) -> list[str]:
    """One sentence: the means of the three kinds of layer."""
    means = {(mean["family"], mean["mode"]): mean["ratio"] for mean in data["summary"]["families"]}
    found = [
        f"{TITLES[family]} {means[family, 'fwd']:.2f} and {means[family, 'train']:.2f}"
        for family in ("lstm", "gru", "rnn")
        if means.get((family, "fwd")) and means.get((family, "train"))
    ]
    return [f"forward and training step: {', '.join(found)} ({machine(data)})."]


def losses(data: dict[str, Any]) -> list[str]:
    """Failures and losses, the worst first, each with the command that runs it again."""
    rows = [row for row in data["rows"] if row["status"] in FAILED or row_verdict(row) == "loss"]
    if not rows:
        return ["No row is lost, and none failed."]

    def shown(row: dict[str, Any]) -> str:
        found = judged(row)
        noisy = ", noisy" if row["timing"] and row["timing"]["noisy"] else ""
        return f"{found[1]:.2f}{noisy}" if found else f"{row['status']}: {row['message']}"

    return markdown_table(
        ("lost row", "ratio", "again"), ((row["id"], shown(row), f"`{row['command']}`") for row in rows)
    )


def memory(data: dict[str, Any]) -> list[str]:
    """Peak memory of the rows that measured it."""
    cells = []
    for row in data["rows"]:
        if row["memory"]:
            sides = [megabytes(median(row["memory"][side])) for side in ("ours", "theirs")]
            cells.append((row["id"].removeprefix("memory-"), *sides, f"{row['memory']['ratio']:.2f}"))
    return markdown_table(("peak memory of a step", "ours", "theirs", "theirs / ours"), cells)


def peers(data: dict[str, Any]) -> list[str]:
    """Ratio of every case to every peer; a question mark where the row is noisy, a dash where there is no ratio."""
    rows = [row for row in data["rows"] if row["kind"] == "timing"]
    keys = [key for key in data["peers"] if any(row["peer"] == key and row["timing"] for row in rows)]
    found = {(row["mode"], row["case"]["cell"], row["case"]["name"], row["peer"]): row for row in rows}

    def cell(row: dict[str, Any] | None) -> str:
        if not row or not row["timing"]:
            return "-"
        return f"{row['timing']['ratio']['median']:.2f}" + "?" * row["timing"]["noisy"]

    cases = sorted({key[:3] for key in found})
    lines = [(f"{case[2]} {case[0]}", *(cell(found.get((*case, key))) for key in keys)) for case in cases]
    return markdown_table(("theirs / ours", *keys), lines)


def drift(data: dict[str, Any], peer: str) -> list[str]:
    """A peer's error after each number of steps: root mean square, in brackets the largest."""
    rows = [row for row in data["rows"] if row.get("drift") and row["peer"] == peer]
    rows.sort(key=lambda row: (row["case"]["cell"], row["case"]["trained"], row["case"]["gain"], row["case"]["H"]))

    def cells(row: dict[str, Any]) -> list[str]:
        case, found = row["case"], row["drift"]
        what = "trained" if case["trained"] else f"initial x{case['gain']:g}"
        errors = (f"{part(rms)} ({part(most)})" for rms, most in zip(found["rms"], found["largest"], strict=True))
        return [f"{case['cell']} {case['H']}, {what}", *errors]

    steps: list[int] = next((row["drift"]["steps"] for row in rows), [])
    return markdown_table(
        ("error after", *(f"{count:,} step" + "s" * (count > 1) for count in steps)), map(cells, rows)
    )


def scaling(data: dict[str, Any]) -> list[str]:
    """Fitted exponents."""
    return markdown_table(FITS_HEADER, map(fit_cells, data["summary"]["fits"]))


def threads(data: dict[str, Any]) -> list[str]:
    """Of every case a line: for each number of threads the ratio, and in brackets our speed beside one thread's."""
    rows = [row for row in data["rows"] if row["timing"]]
    conditions = sorted({(row.get("busy", 0), row["threads"]) for row in rows})
    found = {(row["case"]["name"], row["mode"], row.get("busy", 0), row["threads"]): row["timing"] for row in rows}

    def cell(case: tuple[str, str], busy: int, count: int) -> str:
        timing, alone = found.get((*case, busy, count)), found.get((*case, busy, 1))
        if not timing or not alone:
            return "-"
        speed = alone["ours"]["spread"]["median"] / timing["ours"]["spread"]["median"]
        return f"{timing['ratio']['median']:.2f}{'?' * timing['noisy']} ({speed:.2f})"

    titles = (f"{count}" + (f", beside {busy} busy" if busy else "") for busy, count in conditions)
    cases = sorted({key[:2] for key in found})
    lines = [(" ".join(case), *(cell(case, busy, count) for busy, count in conditions)) for case in cases]
    return markdown_table(("threads", *titles), lines)


def machine(data: dict[str, Any]) -> str:
    """Processor, threads, versions, date."""
    facts = data["machine"]
    threads = f"{data['settings']['threads']} thread" + "s" * (data["settings"]["threads"] != 1)
    others = [
        f"{peer['title']} {peer['version']}" for key, peer in data["peers"].items() if key not in ("fastrnn", "torch")
    ]
    versions = [f"torch {facts['software']['torch']}", *others]
    return ", ".join([facts["cpu"]["model"], threads, *versions, facts["date"][:10]])


def conditions(data: dict[str, Any]) -> list[str]:
    """One sentence: machine, threads, versions, date, command."""
    counts = f"{len(data['rows'])} rows, {data['summary']['noisy']} of them noisy"
    return [f"{machine(data)}; `{data['command']}`; {counts}."]


def gpu_means(data: dict[str, Any]) -> list[str]:
    """Geometric means over all rows of a dtype, and how many of them are lost."""
    ratios: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for row in data["rows"]:
        for variant, timing in row["variants"].items():
            if "ratio" in timing:
                dtype = "float32 as TF32" if row["tf32"] else row["case"]["dtype"]
                found = timing["ratio"]["median"], timing["verdict"]
                for name in (dtype, "all"):
                    ratios.setdefault((name, f"{row['mode']} {variant}"), []).append(found)

    def cell(found: list[tuple[float, str]]) -> str:
        lost = sum(verdict == "loss" for _, verdict in found)
        return f"**{geometric_mean([ratio for ratio, _ in found]):.2f}** ({len(found)} rows, {lost} lost)"

    dtypes = [*sorted({name for name, _ in ratios} - {"all"}), "all"]
    modes = {"fwd graph": "forward", "train graph": "training step", "fwd eager": "forward, eager",
             "train eager": "training step, eager"}  # fmt: skip
    return markdown_table(
        ("cuDNN's time / ours", *modes.values()),
        ((name, *(cell(ratios[name, mode]) if (name, mode) in ratios else "-" for mode in modes)) for name in dtypes),
    )


def gpu_conditions(data: dict[str, Any]) -> list[str]:
    """One sentence: GPU, versions, date, what was tested and timed."""
    facts = data["machine"]
    steps = "; ".join(f"{step['name']}: {step['detail']}" for step in data["steps"] if step["name"] != "build")
    return [
        f"{facts['gpu']['name']}, driver {facts['gpu']['driver_version']}, torch {facts['torch']}, cuDNN "
        f"{facts['cudnn']}, {facts['date'][:10]}; `benchmarks/gpu_check.sh`; {steps}."
    ]


View = Callable[[dict[str, Any]], list[str]]
VIEWS: dict[str, View] = {
    "families": families, "headline": headline, "losses": losses, "memory": memory, "peers": peers, "scaling": scaling,
    "threads": threads, "conditions": conditions, "drift-int8": partial(drift, peer="ourint8"),
    "drift-bf16": partial(drift, peer="ourbf16"),
}  # fmt: skip
GPU_VIEWS: dict[str, View] = {"gpu-means": gpu_means, "gpu-conditions": gpu_conditions}


def digest(run: Path) -> str:
    return hashlib.sha256(run.read_bytes()).hexdigest()


def plot_file(run: Path, name: str) -> Path:
    return run.parent / "plots" / f"{run.stem}-{name}.svg"


def plot_is_current(run: Path, name: str) -> bool:
    """The plot says which file it was made from: its bytes depend on matplotlib's version, too."""
    file = plot_file(run, name)
    return file.exists() and digest(run) in file.read_text()


def write_plot(run: Path, name: str) -> None:
    from benchmarks import plots

    made = plots.figures(Document.load(run).data)
    if name not in made:
        raise ValueError(f"{run.name} has no rows for the plot {name!r}; it has {', '.join(made)}")
    plot_file(run, name).parent.mkdir(exist_ok=True)
    plot_file(run, name).write_text(plots.svg(made[name][1], f"from {run.name}, sha256 {digest(run)}"))


def render(text: str, folder: Path = ROOT, results: Path = RESULTS) -> tuple[str, list[tuple[Path, str]]]:
    """The text of a file in `folder` with every part made anew, and the (run, name) of the plots it shows.

    Raises:
        ValueError: a part names no file or no view, or has no end.
    """
    plots: list[tuple[Path, str]] = []

    def part(match: re.Match[str]) -> str:
        runs, view = sorted(results.glob(match[2])), match[3]
        if not runs:
            raise ValueError(f"benchmarks begin: {match[2]} is not in benchmarks/results")
        run = runs[-1]
        if view.startswith("plot:"):
            name = view.removeprefix("plot:")
            plots.append((run, name))
            lines = [f"![{name}, from {run.name}]({os.path.relpath(plot_file(run, name), folder)})"]
        elif view in VIEWS:
            lines = VIEWS[view](Document.load(run).data)
        elif view in GPU_VIEWS:
            lines = GPU_VIEWS[view](json.loads(run.read_text()))
        else:
            known = ", ".join((*VIEWS, *GPU_VIEWS))
            raise ValueError(f"benchmarks begin: expected one of {known} or plot:NAME, got {view!r}")
        return match[1] + "\n".join(lines) + "\n" + match[4]

    made = PART.sub(part, text)
    if 2 * len(PART.findall(text)) != len(LINE.findall(text)):
        raise ValueError("a 'benchmarks begin' has no end, or an end no begin")
    return made, plots


def update(file: Path, write: bool = True) -> list[str]:
    """Names of what was not up to date: the file itself, plots. Written unless `write` is false."""
    text = file.read_text()
    made, plots = render(text, file.parent)
    stale = [file.name] if made != text else []
    stale += [plot_file(run, name).name for run, name in dict.fromkeys(plots) if not plot_is_current(run, name)]
    if write:
        if made != text:
            file.write_text(made)
        for run, name in dict.fromkeys(plots):
            if not plot_is_current(run, name):
                write_plot(run, name)
    return stale
