"""What tools/test_versions.sh found under each torch and Python, for docs/support.md.

python versions.py RESULTS...    adds what pytest wrote into files "TORCH PYTHON.xml", and prints it all as a table
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

RECORD = Path(__file__).parent / "versions.json"
HEADER = ["torch", "Python", "passed", "skipped", "failed", "on"]


def rows() -> list[list[str]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else []


def numbers(version: str) -> list[int]:
    return [int(n) for n in version.partition("+")[0].split(".")]


def row(results: Path) -> list[str]:
    torch, python = results.stem.split()
    (suite,) = ElementTree.parse(results).iter("testsuite")
    tests, skipped, failures, errors = (int(suite.attrib[n]) for n in ("tests", "skipped", "failures", "errors"))
    failed = failures + errors
    return [torch, python, *map(str, (tests - skipped - failed, skipped, failed)), suite.attrib["timestamp"][:10]]


def add(new: list[str]) -> None:
    """In the place of the last run of the same versions, patches aside."""
    kept = [old for old in rows() if [numbers(v)[:2] for v in old[:2]] != [numbers(v)[:2] for v in new[:2]]]
    found = sorted([*kept, new], key=lambda row: [numbers(v) for v in row[:2]])
    RECORD.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in found) + "\n]\n")


if __name__ == "__main__":
    for results in sys.argv[1:]:
        add(row(Path(results)))
    print("\n".join("  ".join(f"{text:>12}" for text in line) for line in [HEADER, *rows()]))
