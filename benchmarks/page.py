"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2

from benchmarks import plots, report
from benchmarks.results import FAILED, VERDICTS

TEMPLATES = Path(__file__).parent / "templates"
KIND_TITLES = {
    "timing": "Time",
    "accuracy": "Error against float64",
    "memory": "Peak memory",
    "drift": "Error by steps",
}


def inline_svg(text: str) -> str:
    """Without what belongs to a file of its own, and as wide as the page lets it be."""
    text = text[text.index("<svg") :]
    return re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r'<svg \1style="max-width:\2pt"', text, count=1)


def row_view(row: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of a row: its cells by kind, and what is behind it."""
    timing = row["timing"] or {}
    details = {}
    if row["command"]:
        details["again"] = row["command"]
    kernels = timing.get("kernels") or {}
    for side in ("ours", "theirs"):
        if kernels.get(side):
            details[f"{side} ran"] = kernels[side]
    if check := timing.get("check"):
        details["checked before"] = (
            f"largest difference {check['error']:.1e} of the tensor's largest value, in {check['worst']}; "
            f"allowed {check['tolerance']:.0e}"
        )
    if floor := timing.get("floor"):
        details["floor"] = (
            f"{report.seconds(floor['seconds'])}: {floor['flops'] / 1e9:.3g} GFLOP, "
            f"{floor['weight_bytes'] / 1e6:.3g} MB of weights read, which fit in {floor['level']}; "
            f"the {'arithmetic' if floor['bound'] == 'flops' else 'reading'} decides"
        )
    cells = report.KINDS[row["kind"]][1](row)
    return {"verdict": report.row_verdict(row), "cells": cells, "details": details, "failed": row["status"] in FAILED}


def facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Machine and software, name and value."""
    machine = document["machine"]
    cpu, software = machine["cpu"], machine["software"]
    caches = ", ".join(
        f"L{cache['level']} {cache['size']}" + (f" shared by {cache['shared_by']}" if cache["shared_by"] > 1 else "")
        for cache in cpu["caches"]
        if cache["type"] != "Instruction"
    )
    environment = " ".join(f"{name}={value}" for name, value in machine["environment"].items())
    return [
        ("date", machine["date"]),
        ("processor", f"{cpu['model']}, {cpu['physical_cores']} cores"),
        ("instruction sets", " ".join(cpu["flags"])),
        ("caches", caches),
        ("memory", f"{cpu['memory_bytes'] / 2**30:.1f} GiB"),
        ("threads", str(document["settings"]["threads"])),
        ("load at the start", str(cpu["load_average_1min"])),
        ("environment", environment or "nothing that matters is set"),
        ("system", f"{software['system']}, {software['libc']}, Python {software['python']}"),
        ("torch", f"{software['torch']}; {'; '.join(software['torch_libraries'])}"),
        *((peer["title"], peer["version"]) for key, peer in document["peers"].items() if key != "torch"),
        *(("peaks", report.roofline_line(roofline).removeprefix("floor, from ")) for roofline in machine["roofline"]),
    ]


def render(document: dict[str, Any]) -> str:
    """The page. `document` is the JSON form, fresh or loaded."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rows = document["rows"]
    bad = [row for row in rows if row["status"] in FAILED or report.row_verdict(row) == "loss"]
    counts = document["summary"]["verdicts"] | document["summary"]["statuses"]

    def tables(chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"kind": kind, "title": KIND_TITLES[kind], "header": header, "rows": members}
            for kind, (header, _) in report.KINDS.items()
            if (members := [row_view(row) for row in chosen if row["kind"] == kind])
        ]

    return environment.get_template("report.html.j2").render(
        document=document,
        counts=[(name, counts[name]) for name in ("error", "mismatch", *VERDICTS, "skipped")],
        bad=tables(bad),
        tables=tables(rows),
        extra=[
            {"title": title, "header": header, "rows": cells} for title, header, cells in report.extra_tables(document)
        ],
        method=report.method_lines(document)[2:],
        facts=facts(document),
        summary=report.summary_line(document),
        no_evidence=report.NO_EVIDENCE if report.mostly_noisy(document) else "",
        figures=[
            {"name": name, "title": title, "svg": inline_svg(plots.svg(figure))}
            for name, (title, figure) in plots.figures(document).items()
        ],
    )
