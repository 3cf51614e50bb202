"""Commands on stored runs: `report`, `compare`, `readme`. Nothing is timed here."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from benchmarks import compare as comparison
from benchmarks import readme as generated
from benchmarks.cli import FAILURES, OK, PROGRAM, add_outputs, positive, print_document, write_outputs
from benchmarks.report import build_table
from benchmarks.results import Document


def load(parser: argparse.ArgumentParser, file: Path) -> Document:
    try:
        return Document.load(file)
    except (OSError, ValueError) as error:
        parser.error(str(error) if isinstance(error, ValueError) else f"{file}: {error.strerror}")


def report(argv: Sequence[str]) -> int:
    """`python -m benchmarks report RUN.json`: the report of a stored run once more."""
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} report", description="The report of a stored run.")
    parser.add_argument("run", type=Path, help="a file that --json wrote")
    add_outputs(parser)
    options = parser.parse_args(argv)
    document = load(parser, options.run)
    print_document(document)
    write_outputs(document, options)
    return OK


def compare(argv: Sequence[str]) -> int:
    """`python -m benchmarks compare A.json B.json`: exit status 1 if a row became slower, larger, or wrong."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} compare",
        description="What changed from run A to run B. Ratios to the same peer are compared, not times: machines "
        "drift. A change counts if it is above the threshold and the two 95%% intervals do not overlap; a noisy row "
        "counts as unclear.",
        epilog="exit status: 1 if there is a regression, 2 for a wrong command line",
    )
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument(
        "--threshold", type=positive(float), default=0.10, metavar="X", help="default 0.1, that is 10%%"
    )
    options = parser.parse_args(argv)
    a, b = load(parser, options.a).data, load(parser, options.b).data
    made = comparison.changes(a, b, options.threshold)

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    for line in comparison.differences(a, b):
        console.print(Text(f"the runs differ, {line}", style="yellow"))
    styles = {"regression": "bold red", "unclear": "yellow", "improvement": "green"}
    header = ("row", "outcome", "A: theirs / ours", "B: theirs / ours", "change", "note")
    cells = [
        ((item.id, item.outcome, item.before, item.after, f"{item.change:.2f}" if item.change else "", item.note),
         styles.get(item.outcome, ""))
        for item in made
    ]  # fmt: skip
    console.print(build_table(header, cells))
    counts = Counter(item.outcome for item in made)
    console.print(", ".join(f"{name}: {counts[name]}" for name in comparison.OUTCOMES))
    return FAILURES if counts["regression"] else OK


def readme(argv: Sequence[str]) -> int:
    """`python -m benchmarks readme`: tables and plots of README.md again, from the committed runs."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} readme",
        description="Writes the tables and plots of README.md from benchmarks/results, between their markers.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    parser.add_argument("--file", type=Path, default=generated.README, help="default: README.md")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        stale = generated.update(options.file, write=not options.check)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name in stale:
        console.print(f"{'stale' if options.check else 'written'}: {name}")
    return FAILURES if options.check and stale else OK
