"""Peak memory of one step: each side alone, in fresh processes, from the kernel's own high-water mark.

A process prepares the side (weights, inputs and gradients exist), runs one tiny step of the same kind so that code and
thread pools are loaded, hands free heap back, resets the mark, runs the step once and reads the mark. What is reported
is the mark less the resident size before the step. Linux only: the mark is VmHWM, reset through clear_refs.

    python -m benchmarks.memory SIDE ID SEED THREADS      (prints bytes; made for this file, which starts it)
"""

from __future__ import annotations

import ctypes
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.cases import Case, Row
from benchmarks.floor import BYTES
from benchmarks.results import Floor, Memory, Result, Settings

PROCESSES = 3  # of each side; the median counts
LIMIT_S = 300
ROOT = Path(__file__).resolve().parents[1]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"{name} is not in {STATUS}")
    return int(found[1]) * 1024


def peak_of(step: Callable[[], object]) -> int:
    """Bytes that were resident at most during the call, above what was resident before it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    CLEAR.write_text("5")
    before = resident("VmRSS")
    step()
    return max(resident("VmHWM") - before, 0)


def small(case: Case) -> Case:
    """The same kind of case, next to nothing in size."""
    lengths = 1 if case.shortest else 0
    return replace(
        case,
        T=min(case.T, 2),
        B=1,
        I=8,
        H=8,
        proj=4 if case.proj else 0,
        shortest=lengths,
        recompute=min(case.recompute, 1),
    )


def child(side: str, row_id: str, seed: int, threads: int) -> int:
    """What a fresh process does; the peak in bytes."""
    import torch

    from benchmarks import suites
    from benchmarks.data import make_data
    from benchmarks.peers import PEERS

    torch.set_num_threads(threads)
    (row,) = suites.select(None, f"^{re.escape(row_id)}$", [row_id.rpartition("-vs-")[2]])
    tiny = small(row.case)
    warm = PEERS[side].prepare(tiny, row.mode, make_data(tiny, seed))
    with warm.context():
        warm.step()
    prepared = PEERS[side].prepare(row.case, row.mode, make_data(row.case, seed))
    with prepared.context():
        return peak_of(prepared.step)


def launch(side: str, row: Row, settings: Settings) -> int:
    """Runs `child` in a process of its own.

    Raises:
        RuntimeError: the process failed; the text is the last line that it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.memory", side, row.id, str(settings.seed), str(settings.threads)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"{side}: {(done.stderr.strip().splitlines() or ['no text'])[-1]}")
    return int(done.stdout.split()[-1])


def run_memory(
    row: Row,
    ours: str,
    theirs: str,
    settings: Settings,
    floor: Floor | None = None,
    launch: Callable[[str, Row, Settings], int] = launch,
) -> Result:
    """`ours` and `theirs` are keys of peers.PEERS. Verdict as for times: a gap under `tie` is a tie."""
    if not CLEAR.exists():
        return Result(row, "skipped", "peak memory is read from /proc, which this system has not")
    try:
        peaks = {
            side: [launch(side, row, settings) for _ in range(PROCESSES)] for side in dict.fromkeys((ours, theirs))
        }
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return Result(row, "error", str(error))
    ratio = statistics.median(peaks[theirs]) / max(statistics.median(peaks[ours]), 1)
    tie = 1 / (1 + settings.tie) < ratio < 1 + settings.tie
    verdict = "tie" if tie else ("win" if ratio > 1 else "loss")
    unit = row.case.T * row.case.B * row.case.H * BYTES[row.case.dtype]
    return Result(row, "ok", memory=Memory(peaks[ours], peaks[theirs], ratio, verdict, unit))


if __name__ == "__main__":
    print(child(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
