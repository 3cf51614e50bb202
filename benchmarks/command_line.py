"""What may stand on the command line. Nothing here loads torch: pinning has to be set before that."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import suites

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
    described = "\n".join(f"  {name:10} {suite.description}" for name, suite in suites.SUITES.items())
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} [run]",
        description="fastrnn against its peers, paired, here and now. The method is in benchmarks/README.md.",
        epilog=f"suites:\n{described}\n\nother commands: report, compare, readme (each has --help)\n\n"
        "exit status: 1 after an error or mismatch, 2 for a wrong command line",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", nargs="+", choices=list(suites.SUITES), help="default: quick; with --filter, all of them")
    add("--filter", metavar="REGEX", type=regular_expression, help="only rows whose id it is found in")
    add("--list", action="store_true", help="print the ids of the rows and stop")
    add("--ours", metavar="KEY", default="fastrnn", help="our side; `torch` times torch.nn against itself")
    add("--peer", metavar="KEY", nargs="+", help=f"default: the suite's peers; all: {' '.join(suites.RUNTIMES)}")
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
