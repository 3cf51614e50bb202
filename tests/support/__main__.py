"""Measures what works, and writes the page that says so.

python -m tests.support --measure    runs every case and writes failures.json, then the page
python -m tests.support --write      writes docs/support.md
"""

from __future__ import annotations

import argparse
import json
import time
import warnings

import torch

from tests.support.cases import CASES, FAILURES, MEASURED_WITH, RECORD, outcome, torch_version
from tests.support.page import PAGE, page


def measure() -> None:
    """Runs every case: FAILURES and the record hold what came, with this torch."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    FAILURES.clear()
    for case in CASES:
        started = time.perf_counter()
        if text := outcome(case):
            FAILURES[case.id] = text
        print(f"{time.perf_counter() - started:6.2f} s  {case.id}  {text}", flush=True)
    RECORD.write_text(json.dumps({"torch": torch_version(), "failures": FAILURES}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="what works on the modules, as a page")
    parser.add_argument("--measure", action="store_true", help="run every case first")
    parser.add_argument("--write", action="store_true", help="write the page")
    options = parser.parse_args()
    if options.measure:
        measure()
    if options.measure or options.write:
        PAGE.write_text(page(torch_version() if options.measure else MEASURED_WITH))
    else:
        parser.print_help()
