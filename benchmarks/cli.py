"""The command line: which rows, how, and where the results go."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import Row, Suite
from benchmarks.suites import CORES, RUNTIMES, SUITES, select

if TYPE_CHECKING:  # these load torch; pinning has to be set before that
    from benchmarks.peers.base import Peer
    from benchmarks.results import Document, Floor, Result, Settings

PROGRAM = "python -m benchmarks"
OK, FAILURES, USAGE, INTERRUPTED = 0, 1, 2, 130


def regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """What `run` and `report` can both write."""
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write tables and plots as one page that needs no other file"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the plots, each as PNG and SVG")


def run_parser() -> argparse.ArgumentParser:
    suites = "\n".join(f"  {name:10} {suite.description}" for name, suite in SUITES.items())
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} [run]",
        description="fastrnn against its peers, paired, here and now. The method is in benchmarks/README.md.",
        epilog=f"suites:\n{suites}\n\nother commands: report, compare, readme (each has --help)\n\n"
        "exit status: 1 after an error or mismatch, 2 for a wrong command line",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", nargs="+", choices=list(SUITES), help="default: quick; with --filter, all of them")
    add("--filter", metavar="REGEX", type=regular_expression, help="only rows whose id it is found in")
    add("--list", action="store_true", help="print the ids of the rows and stop")
    add("--ours", metavar="KEY", default="fastrnn", help="our side; `torch` times torch.nn against itself")
    add("--peer", metavar="KEY", nargs="+", help=f"default: the suite's peers; all: {' '.join(RUNTIMES)}")
    add("--threads", type=positive(int), metavar="N", help="default: torch's own choice")
    add("--rounds", type=positive(int), metavar="N", default=16, help="pairs per row, made even; default 16")
    add("--budget", type=positive(float), metavar="S", help="seconds of timing per row; default: the suite's")
    add("--longest", type=positive(float), metavar="S", help="skip rows whose one call cannot be shorter")
    add("--min-sample", type=positive(float), metavar="MS", default=20.0, help="shortest sample; default 20")
    add("--tie", type=positive(float), metavar="X", default=0.20, help="gaps below it are ties; default 0.2")
    add("--noisy", type=positive(float), metavar="X", default=0.20, help="wider are noisy; default 0.2")
    add("--seed", type=int, default=0, help="of weights and inputs; default 0")
    add("--json", type=Path, metavar="FILE", help="write everything, samples included")
    add_outputs(parser)
    add("--no-pin", action="store_true", help="do not restart with OMP_PROC_BIND and OMP_PLACES set")
    return parser


def split_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command (`run` when none is named) and its arguments."""
    return (argv[0], list(argv[1:])) if argv and argv[0] in COMMANDS else ("run", list(argv))


def rerun_command(row: Row, settings: Settings) -> str:
    """Reruns exactly this row: ids are found in any suite and hold no special characters."""
    command = f"{PROGRAM} --filter '^{row.id}$' --threads {row.threads or settings.threads}"
    if not any(suite.has(row) for suite in SUITES.values()):
        command += f" --peer {row.peer}"
    if row.kind == "timing":
        command += f" --rounds {settings.rounds}"
        command += "" if settings.budget_s is None else f" --budget {settings.budget_s:g}"
        command += "" if settings.longest_s is None else f" --longest {settings.longest_s:g}"
        own = (
            (settings.min_sample_s * 1e3, 20.0, "min-sample"),
            (settings.tie, 0.2, "tie"),
            (settings.noisy, 0.2, "noisy"),
        )
        command += "".join(f" --{name} {value:g}" for value, default, name in own if abs(value - default) > 1e-9)
    if settings.seed:
        command += f" --seed {settings.seed}"
    return command if settings.ours == "fastrnn" else f"{command} --ours {settings.ours}"


def run_row(row: Row, suite: Suite, peers: dict[str, Peer], settings: Settings, floor: Floor | None) -> Result:
    """Never raises but KeyboardInterrupt; a row that cannot be run is skipped and says why."""
    from benchmarks.accuracy import run_accuracy
    from benchmarks.measure import run_timing
    from benchmarks.memory import run_memory
    from benchmarks.results import Result

    ours, theirs, what = peers[settings.ours], peers[row.peer], (row.case, row.mode)
    reason = theirs.missing() or theirs.supports(*what) or ours.supports(*what)
    if not reason and row.mode == "persample":
        without = [peer.key for peer in (ours, theirs) if not getattr(peer, "per_sample", False)]
        reason = f"{', '.join(without)}: no per-sample gradients" if without else None
    longest = suite.longest_s if settings.longest_s is None else settings.longest_s
    if not reason and floor and longest is not None and floor.seconds > longest:
        reason = f"a call takes at least {floor.seconds:.1f} s here (its floor), more than {longest:g} (--longest)"
    if reason:
        return Result(row, "skipped", reason)
    if row.kind == "accuracy":
        return run_accuracy(row, ours, theirs, settings)
    if row.kind == "memory":
        return run_memory(row, ours.key, theirs.key, settings)
    return run_timing(row, ours, theirs, settings, floor)


def run_rows(
    chosen: dict[Row, Suite],
    peers: dict[str, Peer],
    settings: Settings,
    progress: Progress | None = None,
    rooflines: Sequence[dict[str, Any]] = (),
) -> list[Result]:
    """One result per row, in the order given, whatever happens in a row; fewer only after Ctrl-C.

    `rooflines` are roofline.measure's answers, one per number of threads; without one a row has no floor.
    """
    import torch

    from benchmarks.floor import floor

    by_threads = {roofline["threads"]: roofline for roofline in rooflines}
    results: list[Result] = []
    task = progress.add_task("", total=len(chosen)) if progress else None
    before = torch.get_num_threads()
    try:
        for row, suite in chosen.items():
            if progress and task is not None:
                progress.update(task, description=row.id)
            threads = row.threads or settings.threads
            torch.set_num_threads(threads)
            budget_s = suite.budget_s if settings.budget_s is None else settings.budget_s
            own = replace(settings, budget_s=budget_s, threads=threads)
            shortest = floor(row.case, row.mode, by_threads[threads]) if threads in by_threads else None
            result = run_row(row, suite, peers, own, shortest if row.kind == "timing" else None)
            result.command = rerun_command(row, own)
            results.append(result)
            if progress and task is not None:
                progress.advance(task)
    except KeyboardInterrupt:
        pass
    finally:
        torch.set_num_threads(before)
    return results


def set_floors(results: Sequence[Result], settings: Settings, rooflines: Sequence[dict[str, Any]]) -> None:
    """Gives every timed row the floor of these peaks, in place of the one it started with."""
    from benchmarks.floor import floor

    by_threads = {roofline["threads"]: roofline for roofline in rooflines}
    for result in results:
        threads = result.row.threads or settings.threads
        if result.timing and threads in by_threads:
            result.timing.floor = floor(result.row.case, result.row.mode, by_threads[threads])


def write_outputs(document: Document, options: argparse.Namespace) -> None:
    """Markdown, page and plots, as far as they were asked for."""
    from benchmarks import report

    for file in (options.markdown, options.html):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
    if options.markdown:
        options.markdown.write_text(report.markdown(document.data))
    if options.html:
        from benchmarks import page

        options.html.write_text(page.render(document.data))
    if options.plots:
        from benchmarks import plots

        plots.save(document.data, options.plots)


def print_document(document: Document) -> None:
    from benchmarks import report

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    report.print_report(document.data, console)


def run(argv: Sequence[str], peers: dict[str, Peer] | None = None) -> int:
    """`python -m benchmarks run`; `peers` replaces the registry in tests. Returns the exit status."""
    parser = run_parser()
    options = parser.parse_args(argv)
    wanted = list(RUNTIMES) if options.peer == ["all"] else options.peer
    chosen = select(options.suite, options.filter, wanted)
    if not chosen:
        parser.error(f"no row's id matches {options.filter!r}; see --list --suite {' '.join(SUITES)}")
    if options.list:
        print("\n".join(row.id for row in chosen))
        return OK

    import torch

    from benchmarks import machine, roofline
    from benchmarks.peers import PEERS
    from benchmarks.results import Document, Settings

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
            for threads in sorted({min(row.threads or settings.threads, CORES) for row in timed})
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


def later(name: str) -> Callable[[Sequence[str]], int]:
    """A command of commands.py, which is loaded when it is used."""

    def command(argv: Sequence[str]) -> int:
        from benchmarks import commands

        status: int = getattr(commands, name)(argv)
        return status

    return command


COMMANDS = {"run": run, "report": later("report"), "compare": later("compare"), "readme": later("readme")}


def main(argv: Sequence[str]) -> int:
    command, arguments = split_command(argv)
    return COMMANDS[command](arguments)
