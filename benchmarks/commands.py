"""The commands: `run`, and `report`, `compare` and `readme`, which work on stored runs and time nothing.

torch is loaded when a run begins: before that the process may have to start anew, pinned (__main__.py).
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from benchmarks import compare as comparison
from benchmarks import readme as generated
from benchmarks import report as tables
from benchmarks import suites
from benchmarks.command_line import FAILURES, INTERRUPTED, OK, PROGRAM, add_outputs, positive, run_parser
from benchmarks.results import Document, Settings

if TYPE_CHECKING:  # it loads torch
    from benchmarks.peers.base import Peer


def write_outputs(document: Document, options: argparse.Namespace) -> None:
    """Markdown, page and plots, as far as they were asked for."""
    for file in (options.markdown, options.html):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
    if options.markdown:
        options.markdown.write_text(tables.markdown(document.data))
    if options.html:
        from benchmarks import page  # this and plots load matplotlib, which a run without them does not need

        options.html.write_text(page.render(document.data))
    if options.plots:
        from benchmarks import plots

        plots.save(document.data, options.plots)


def print_document(document: Document) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    tables.print_report(document.data, console)


def run(argv: Sequence[str], peers: dict[str, Peer] | None = None) -> int:
    """`python -m benchmarks run`; `peers` replaces the registry in tests. Returns the exit status."""
    parser = run_parser()
    options = parser.parse_args(argv)
    wanted = list(suites.RUNTIMES) if options.peer == ["all"] else options.peer
    chosen = suites.select(options.suite, options.filter, wanted)
    if not chosen:
        parser.error(f"no row's id matches {options.filter!r}; see --list --suite {' '.join(suites.SUITES)}")
    if options.list:
        print("\n".join(row.id for row in chosen))
        return OK

    import torch  # only now: the ids above are there at once

    from benchmarks import machine, roofline
    from benchmarks.peers import PEERS
    from benchmarks.runner import run_rows, set_floors

    if peers is None:
        peers = PEERS
    for key in (options.ours, *(row.peer for row in chosen)):
        if key not in peers:
            parser.error(f"unknown contestant {key!r}; there are {', '.join(peers)}")
    if reason := peers[options.ours].missing():
        parser.error(reason)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        ours=options.ours,
        threads=torch.get_num_threads(),
        rounds=options.rounds + options.rounds % 2,
        budget_s=options.budget,
        min_sample_s=options.min_sample * 1e-3,
        tie=options.tie,
        noisy=options.noisy,
        seed=options.seed,
        longest_s=options.longest,
    )
    facts = machine.machine_facts(settings.threads)
    errors = Console(stderr=True)
    if facts["cpu"]["load_average_1min"] > 0.5 * (facts["cpu"]["logical_cores"] or 1):
        errors.print(f"load average {facts['cpu']['load_average_1min']}: other work is running, expect noise")
    timed = [row for row in chosen if row.kind == "timing"]

    def measured() -> list[dict[str, Any]]:
        return [
            roofline.measure(threads, facts["cpu"]["caches"], {row.case.dtype for row in timed})
            for threads in sorted({min(row.threads or settings.threads, suites.CORES) for row in timed})
        ]

    facts["roofline"] = measured()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        results = run_rows(chosen, peers, settings, progress, facts["roofline"])
    facts["roofline"] = list(map(roofline.best_of, facts["roofline"], measured()))
    set_floors(results, settings, facts["roofline"])
    keys = dict.fromkeys((settings.ours, *(result.row.peer for result in results if result.status != "skipped")))
    present = {key: {"title": peers[key].title, "version": peers[key].version()} for key in keys}
    files = {str(file): file.name for file in (options.json, options.markdown, options.html, options.plots) if file}
    command = shlex.join([*PROGRAM.split(), *(files.get(argument, argument) for argument in argv)])
    document = Document.build(results, settings, facts, command, planned=len(chosen), peers=present)

    print_document(document)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document.save(options.json)
    write_outputs(document, options)
    if not document.data["complete"]:
        return INTERRUPTED
    return FAILURES if document.failed else OK


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
    console.print(tables.build_table(header, cells))
    counts = Counter(item.outcome for item in made)
    console.print(", ".join(f"{name}: {counts[name]}" for name in comparison.OUTCOMES))
    return FAILURES if counts["regression"] else OK


def readme(argv: Sequence[str]) -> int:
    """`python -m benchmarks readme`: tables and plots of the documents again, from the committed runs."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} readme",
        description="Writes the tables and plots of the documents from benchmarks/results, between their markers.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    parser.add_argument("--file", type=Path, help="default: README.md and those in docs/ that have such tables")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        files = [options.file.resolve()] if options.file else generated.DOCUMENTS
        stale = [name for file in files for name in generated.update(file, write=not options.check)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name in stale:
        console.print(f"{'stale' if options.check else 'written'}: {name}")
    return FAILURES if options.check and stale else OK


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": run,
    "report": report,
    "compare": compare,
    "readme": readme,
}


def split_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command (`run` when none is named) and its arguments."""
    return (argv[0], list(argv[1:])) if argv and argv[0] in COMMANDS else ("run", list(argv))


def main(argv: Sequence[str]) -> int:
    command, arguments = split_command(argv)
    return COMMANDS[command](arguments)
