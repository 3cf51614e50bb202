"""Measures what torch's stable ABI would cost a small call, and under which versions of torch a library of it runs.

    python tools/stable_abi.py
    python tools/stable_abi.py --under OTHER/bin/python ..    # environments with other versions of torch

tools/stable_abi/op.cpp is an op of fastrnn::layer_forward's arguments and results that computes nothing. It is built by
torch's usual C++ interface, as csrc/torch is, which is why a build belongs to one torch; and by the stable ABI, whose
libraries are for one version of torch (--target) and later ones. Both are called from Python in turns, and beside
them fastrnn's own op, and a module, which goes past the dispatcher. Times are the processor's and not the clock's, of
one thread, so that other work on the machine disturbs them less.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shlex
import statistics
import subprocess
import time
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tools/stable_abi/op.cpp"
FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi")
KINDS = {"usual": (), "stable": ("-DFASTRNN_STABLE",), "stable_by_name": ("-DFASTRNN_STABLE", "-DFASTRNN_BY_NAME")}
H = 8

Op = Callable[..., Any]
Call = Callable[[], Any]


def build(folder: Path, target: str) -> dict[str, Path]:
    """A library of each kind. None includes Python's headers, so that they are for any version of that."""
    folder.mkdir(parents=True, exist_ok=True)
    installed = Path(torch.__file__).parent
    major, minor = (int(number) for number in target.split("."))
    oldest = f"-DTORCH_TARGET_VERSION={(major << 56) + (minor << 48):#x}ull"  # with it the usual headers are refused
    built = {kind: folder / f"lib{kind}.so" for kind in KINDS}
    for kind, library in built.items():
        command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, f"-isystem{installed / 'include'}"]
        command += [*KINDS[kind], f"-DFASTRNN_NAMESPACE={space(kind)}", *([oldest] if kind != "usual" else ())]
        command += [str(SOURCE), f"-L{installed / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library)]
        subprocess.run(command, check=True)
    return built


def space(kind: str) -> str:
    return f"fastrnn_{kind}"


def load(kind: str, library: Path) -> Op:
    torch.ops.load_library(str(library))
    return getattr(torch.ops, space(kind)).layer_forward.default


def arguments() -> tuple[Any, ...]:
    """Of an LSTM's step of one row with its state."""
    weights = torch.zeros(4 * H, H), torch.zeros(4 * H, H), torch.zeros(4 * H), torch.zeros(4 * H)
    state = torch.zeros(1, 1, H), torch.zeros(1, 1, H)
    return ("lstm", torch.zeros(1, 1, H), *([x] for x in weights), [], [], *state, *[None] * 8, [False], False)


def calls(ops: dict[str, Op]) -> dict[str, Call]:
    """What is timed, by name."""
    import fastrnn  # here, for an environment with another torch has none

    module, (_, x, *_), state = fastrnn.LSTM(H, H).requires_grad_(False), arguments(), arguments()[8:10]
    return {
        "op, usual C++ interface": partial(ops["usual"], *arguments()),
        "op, stable ABI": partial(ops["stable"], *arguments()),
        "the same, results by `new_empty`": partial(ops["stable_by_name"], *arguments()),
        "`torch.ops.fastrnn.layer_forward`": partial(torch.ops.fastrnn.layer_forward.default, *arguments()),
        "`fastrnn.LSTM`": partial(module, x, state),
    }


def microseconds(timed: dict[str, Call], rounds: int, each: int) -> dict[str, float]:
    """Medians over rounds of so many calls each, the calls in turns."""
    timers = {name: timeit.Timer(function, timer=time.process_time) for name, function in timed.items()}
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, timer in timers.items():
            found[name].append(timer.timeit(each) / each * 1e6)
    return {name: statistics.median(times) for name, times in found.items()}


class _Mallinfo(ctypes.Structure):
    _fields_ = (("fields", ctypes.c_size_t * 10),)


def bytes_lost(function: Call, times: int = 5000) -> float:
    """What malloc has given out at a call and nobody has given back."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    function()
    before = mallinfo().fields[7]  # uordblks
    for _ in range(times):
        function()
    return (mallinfo().fields[7] - before) / times


def try_here(kind: str, library: Path) -> None:
    """In a process of its own (see `under`): the wrong library may end it."""
    print(f"torch {torch.__version__}", flush=True)
    sizes = [tuple(x.shape) for x in load(kind, library)(*arguments())]
    print("runs" if sizes == [(1, 1, H)] * 3 + [(0,)] * 2 else f"gives {sizes}")


def under(python: str, kind: str, library: Path) -> str:
    """The torch of that interpreter, and what comes of a call there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, str(Path(__file__).resolve()), "--try", kind, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    version, *rest = done.stdout.splitlines() or ["no torch"]
    error = re.search(r"^\w+Error: (?:/\S+: )?(.{,80})", done.stderr, re.M)
    said = error[1] if error else f"ended with {done.returncode}"
    return f"{version}: {rest[0] if done.returncode == 0 else said}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/stable_abi", help="default: build/stable_abi")
    parser.add_argument("--target", default="2.11", help="the oldest torch to run under; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=200, help="of a round; default: %(default)s")
    parser.add_argument("--under", nargs="+", default=[], metavar="PYTHON")
    parser.add_argument("--try", nargs=2, dest="tried", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.tried:
        kind, library = options.tried
        return try_here(kind, Path(library))

    built = build(options.folder.resolve(), options.target)
    ops = {kind: load(kind, library) for kind, library in built.items()}
    timed, threads = calls(ops), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            inference = microseconds(timed, options.rounds, options.calls)
        others = microseconds(timed, options.rounds, options.calls)
    finally:
        torch.set_num_threads(threads)
    first = next(iter(timed))
    print(f"torch {torch.__version__}, {options.rounds} rounds of {options.calls} calls, medians of processor time\n")
    print("| a call | under `inference_mode` | without it |\n|---|---|---|")
    for name in timed:
        row = (f"{us[name]:.1f} us ({us[name] / us[first]:.2f})" for us in (inference, others))
        print(f"| {name} | {' | '.join(row)} |")
    print()
    for kind, op in ops.items():
        print(f"{kind}: {bytes_lost(partial(op, *arguments())):.0f} bytes lost a call")
    for python in options.under:
        for kind in ("usual", "stable"):
            print(f"{kind} under {under(python, kind, built[kind])}")


if __name__ == "__main__":
    main()
