"""Plots of a document, as matplotlib figures: ratios, heat maps, time against floor, errors, memory, scaling."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from benchmarks.report import row_verdict
from benchmarks.scaling import timed_rows

OURS, THEIRS = "#0f766e", "#c2410c"
VERDICTS = {"loss": ("#b91c1c", "v"), "tie": ("#a16207", "o"), "win": ("#15803d", "^")}  # colour and marker
ROW_INCHES = 0.21
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "svg.hashsalt": "fastrnn", "figure.facecolor": "white",
}  # fmt: skip


def ratio_axis(axes: Axes, values: list[float]) -> None:
    """Logarithmic, with 1 in it and plain numbers on it."""
    low, high = min(0.8, *values) / 1.1, max(1.25, *values) * 1.1
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=0.8)


def rows_figure(count: int, width: float = 9.0) -> tuple[Figure, Axes]:
    """One line of `count` per row, the first on top."""
    height = 1.1 + ROW_INCHES * count
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_ylim(count - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return figure, axes


def ratios(document: dict[str, Any]) -> Figure | None:
    """Every timed row with its interval, losses on top."""
    rows = timed_rows(document["rows"])
    if not rows:
        return None
    figure, axes = rows_figure(len(rows))
    tie = document["settings"]["tie"]
    axes.axvspan(1 / (1 + tie), 1 + tie, color="black", alpha=0.06, linewidth=0)
    ends: list[float] = []
    for index, row in enumerate(rows):
        ratio, (colour, marker) = row["timing"]["ratio"], VERDICTS[row_verdict(row)]
        filled = "white" if row["timing"]["noisy"] else colour
        axes.plot([ratio["low"], ratio["high"]], [index, index], color=colour, linewidth=1.5)
        axes.plot(ratio["median"], index, marker, color=colour, markerfacecolor=filled, markersize=5)
        ends += [ratio["low"], ratio["high"]]
    ratio_axis(axes, ends)
    axes.set_yticks(range(len(rows)), [row["id"] for row in rows], fontsize=7.5)
    axes.set_xlabel("theirs / ours, median and 95% interval; right of 1 ours is faster; grey: tie; hollow: noisy")
    return figure


def write_ratio(axes: Axes, x: float, y: float, ratio: float, largest: float) -> None:
    """In a cell of a heat map, readable on its colour."""
    dark = abs(np.log2(ratio)) > 0.65 * largest
    axes.text(x, y, f"{ratio:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")


def heat_map(axes: Axes, points: dict[tuple[int, int], float], largest: float) -> Any:
    """`points`: (B, H) -> ratio. Colour is log2 of it, white at 1; a cell without a row stays grey."""
    batches, widths = (sorted({point[index] for point in points}) for index in (0, 1))
    grid = np.full((len(batches), len(widths)), np.nan)
    for (B, H), ratio in points.items():
        grid[batches.index(B), widths.index(H)] = np.log2(ratio)
        write_ratio(axes, widths.index(H), batches.index(B), ratio, largest)
    axes.set_facecolor("#d4d4d4")
    image = axes.imshow(grid, cmap="PiYG", norm=TwoSlopeNorm(0, -largest, largest), aspect="auto", origin="lower")
    axes.set_xticks(range(len(widths)), [str(width) for width in widths])
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axes.grid(visible=False)
    return image


def heat_maps(document: dict[str, Any]) -> dict[str, Figure]:
    """One figure per cell and peer with a grid of sizes: ratio over (B, H), one panel per T and mode."""
    panels: dict[tuple[str, str], dict[tuple[int, str], dict[tuple[int, int], float]]] = {}
    plain = {"layers": 1, "bidirectional": False, "proj": 0, "shortest": 0, "dtype": "float32"}
    for row in timed_rows(document["rows"]):
        case = row["case"]
        if case["I"] == case["H"] and all(case[name] == value for name, value in plain.items()):
            panel = panels.setdefault((case["cell"], row["peer"]), {}).setdefault((case["T"], row["mode"]), {})
            panel[case["B"], case["H"]] = row["timing"]["ratio"]["median"]
    figures = {}
    for (cell, peer), found in panels.items():
        full = {key: panel for key, panel in found.items() if is_grid(panel)}
        if not full:
            continue
        steps, modes = sorted({key[0] for key in full}), sorted({key[1] for key in full})
        largest = max(1.0, *(abs(np.log2(ratio)) for panel in full.values() for ratio in panel.values()))
        figure = Figure((1 + 4.2 * len(modes), 0.6 + 2.6 * len(steps)), layout="constrained")
        grid = figure.subplots(len(steps), len(modes), squeeze=False)
        for i, T in enumerate(steps):
            for j, mode in enumerate(modes):
                axes = grid[i, j]
                if (T, mode) not in full:
                    axes.set_axis_off()
                    continue
                image = heat_map(axes, full[T, mode], largest)
                axes.set_title(f"{cell}, {mode}, T = {T}", fontsize=9)
                axes.set_xlabel("H = I")
                axes.set_ylabel("B")
        bar = figure.colorbar(image, ax=grid, shrink=0.8)
        ticks = [tick for tick in range(-8, 9) if abs(tick) <= largest]
        bar.set_ticks(ticks, labels=[f"{2.0**tick:g}" for tick in ticks])
        bar.set_label(f"{peer} / ours: green is faster here")
        figures[f"heat-{cell.lower()}-vs-{peer}"] = figure
    return figures


def peers_map(document: dict[str, Any]) -> Figure | None:
    """Ratio of every case (down) and peer (across), where there are three peers or more; grey has no ratio."""
    rows = [row for row in document["rows"] if row["kind"] == "timing"]
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    if len(peers) < 3:
        return None
    found = {
        ((row["mode"], row["case"]["cell"], row["case"]["name"]), row["peer"]): row["timing"]["ratio"]["median"]
        for row in timed_rows(rows)
    }
    met = Counter(case for case, _ in found)
    cases = sorted(case for case, count in met.items() if count > 1)  # a case with one peer is in `ratios`
    if not cases:
        return None
    grid = np.array([[np.log2(found.get((case, peer), np.nan)) for peer in peers] for case in cases])
    largest = max(1.0, float(np.nanmax(np.abs(grid))))
    figure = Figure((2.6 + 0.75 * len(peers), 1.0 + 0.24 * len(cases)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("#d4d4d4")
    axes.imshow(grid, cmap="PiYG", norm=TwoSlopeNorm(0, -largest, largest), aspect="auto")
    for (case, peer), ratio in found.items():
        if case in cases:
            write_ratio(axes, peers.index(peer), cases.index(case), ratio, largest)
    axes.set_xticks(range(len(peers)), peers, rotation=30, ha="left")
    axes.set_yticks(range(len(cases)), [f"{name} {mode}" for mode, _, name in cases], fontsize=7.5)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(visible=False)
    return figure


def is_grid(points: dict[tuple[int, int], float]) -> bool:
    """At least two of each, and more than half of the cells are filled."""
    batches, widths = ({point[index] for point in points} for index in (0, 1))
    return min(len(batches), len(widths)) >= 2 and 2 * len(points) > len(batches) * len(widths)


def floors(document: dict[str, Any]) -> Figure | None:
    """Time against floor, both sides, one panel per mode."""
    rows = [row for row in timed_rows(document["rows"]) if row["timing"]["floor"]]
    if not rows:
        return None
    modes = sorted({row["mode"] for row in rows})
    figure = Figure((1 + 4.2 * len(modes), 4.0), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        members = [row for row in rows if row["mode"] == mode]
        x = [row["timing"]["floor"]["seconds"] * 1e3 for row in members]
        for side, colour, marker in (("theirs", THEIRS, "x"), ("ours", OURS, "o")):
            y = [row["timing"][side]["spread"]["median"] * 1e3 for row in members]
            axes.loglog(x, y, marker, color=colour, markersize=5, alpha=0.8, label=side)
        ends = np.array([min(x) / 1.5, max(x) * 1.5])
        for factor, style in ((1, "-"), (2, "--"), (10, ":")):
            axes.plot(ends, factor * ends, style, color="black", linewidth=0.8)
            axes.annotate(f"{factor} x", (ends[1], factor * ends[1]), fontsize=7, va="center")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.set_title(mode, fontsize=9)
        axes.set_xlabel("floor, ms")
        axes.set_ylabel("time of a call, ms")
        axes.legend(frameon=False)
    return figure


def errors(document: dict[str, Any]) -> Figure | None:
    """Largest error against float64, ours and theirs, gradients."""
    rows = [row for row in document["rows"] if row["status"] == "ok" and row["accuracy"]]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: (row["case"]["dtype"], row["id"]))
    figure, axes = rows_figure(len(rows))
    for side, colour, marker in (("theirs", THEIRS, "x"), ("ours", OURS, "o")):
        found = [(row["accuracy"][side], index) for index, row in enumerate(rows)]
        for key, alpha in (("outputs", 0.45), ("gradients", 1.0)):
            points = [(sides[key], index) for sides, index in found if sides]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, alpha=alpha, label=f"{side}, {key}")
    axes.set_xscale("log")
    names = [row["case"]["name"] + (f" vs {row['peer']}" if row["peer"] != "torch" else "") for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7.5)
    axes.set_xlabel("largest error against float64, over the tensor's largest value")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def drift(document: dict[str, Any]) -> Figure | None:
    """Root mean square error after each number of steps, a panel for each kind of layer and a line for each row."""
    rows = [row for row in document["rows"] if row.get("drift")]
    if not rows:
        return None
    kinds, peers = (sorted({at(row) for row in rows}) for at in (lambda r: r["case"]["cell"], lambda r: r["peer"]))
    figure = Figure((1 + 3.2 * len(kinds), 3.8), layout="constrained")
    colours = (THEIRS, "#1d4ed8", OURS, "#a16207")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0], kinds, strict=True):
        for row in (row for row in rows if row["case"]["cell"] == kind):
            colour = colours[peers.index(row["peer"]) % len(colours)]
            style = "--" if row["case"]["trained"] else "-"
            axes.loglog(
                row["drift"]["steps"], row["drift"]["rms"], style, marker="o", color=colour, markersize=3, alpha=0.6
            )
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("steps")
    figure.axes[0].set_ylabel("error, over the output's root mean square")
    handles = [Line2D([], [], color=colours[i % len(colours)], label=peer) for i, peer in enumerate(peers)]
    handles.append(Line2D([], [], color="black", linestyle="--", label="trained"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def memory(document: dict[str, Any]) -> Figure | None:
    """Peak memory of a step, both sides."""
    rows = [row for row in document["rows"] if row["status"] == "ok" and row["memory"]]
    if not rows:
        return None
    figure, axes = rows_figure(2 * len(rows))
    for index, row in enumerate(rows):
        for offset, side, colour in ((0, "ours", OURS), (0.8, "theirs", THEIRS)):
            value = float(np.median(row["memory"][side])) / 2**20
            label = side if index == 0 else None
            axes.barh(2 * index + offset, value, height=0.75, color=colour, label=label)
            axes.text(value, 2 * index + offset, f" {value:.0f}", va="center", fontsize=7.5)
    axes.set_yticks([2 * index + 0.4 for index in range(len(rows))], [row["id"] for row in rows], fontsize=7.5)
    axes.set_xlabel("peak memory of a step above inputs and weights, MiB")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def scaling(document: dict[str, Any]) -> Figure | None:
    """Fitted lines of time against T, B and H, and speed-up against threads."""
    fits, speedups = document["summary"]["fits"], document["summary"]["thread_speedups"]
    axis_names = [axis for axis in ("T", "B", "H") if any(fit["axis"] == axis for fit in fits)]
    count = len(axis_names) + bool(speedups)
    if not count:
        return None
    figure = Figure((1 + 3.6 * count, 3.8), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, name in zip(panels, axis_names, strict=False):
        for fit in (fit for fit in fits if fit["axis"] == name):
            for side, colour, marker in (("theirs_s", THEIRS, "x"), ("ours_s", OURS, "o")):
                style = "-" if fit["mode"] == "fwd" else "--"
                axes.loglog(
                    fit["sizes"], np.array(fit[side]) * 1e3, marker + style, color=colour, markersize=3, alpha=0.6
                )
        axes.set_xlabel(name)
        axes.set_ylabel("time of a call, ms")
    if speedups:
        axes = panels[-1]
        for entry in speedups:
            for side, colour, marker in (("theirs", THEIRS, "x"), ("ours", OURS, "o")):
                axes.plot(entry["threads"], entry[side], f"{marker}-", color=colour, markersize=3, alpha=0.5)
        counts = sorted({threads for entry in speedups for threads in entry["threads"]})
        axes.plot(counts, np.array(counts) / counts[0], color="black", linewidth=0.8)
        axes.set_xticks(counts)
        axes.set_xlabel("threads")
        axes.set_ylabel("speed-up")
    figure.suptitle("ours: teal, theirs: orange; solid: forward, dashed: training", fontsize=9)
    return figure


PLOTS: dict[str, tuple[str, Callable[[dict[str, Any]], Figure | None]]] = {
    "ratios": ("Time: theirs / ours, every row", ratios),
    "peers": ("Time: theirs / ours, by peer (green: faster here; grey: no ratio)", peers_map),
    "floor": ("Time against the floor of this machine", floors),
    "memory": ("Peak memory", memory),
    "error": ("Error against float64", errors),
    "drift": ("Error after so many steps", drift),
    "scaling": ("Cost against size and threads", scaling),
}


def figures(document: dict[str, Any]) -> dict[str, tuple[str, Figure]]:
    """Name -> title and figure, for whatever the document has rows for."""
    with matplotlib.rc_context(STYLE):
        made = {
            name: (title, figure) for name, (title, draw) in PLOTS.items() if (figure := draw(document)) is not None
        }
        for name, figure in heat_maps(document).items():
            made[name] = (f"Ratio over batch and width: {name.removeprefix('heat-')}", figure)
    return made


def svg(figure: Figure, description: str = "") -> str:
    """The same text for the same document: no date in it, and ids do not depend on chance."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Description": description or None}
        )
    return buffer.getvalue()


def save(document: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot as NAME.svg and NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (_, figure) in figures(document).items():
        written += [folder / f"{name}.svg", folder / f"{name}.png"]
        written[-2].write_text(svg(figure))
        with matplotlib.rc_context(STYLE):
            figure.savefig(written[-1], dpi=130)
    return written
