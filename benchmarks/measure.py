"""Times one row: check first, then pairs of samples, A B and B A in turn, in one process."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import Row
from benchmarks.data import Data, make_data
from benchmarks.machine import OtherWork
from benchmarks.peers.base import NoResult, Peer, Prepared
from benchmarks.results import Check, Floor, Result, Settings, Side, Timing
from benchmarks.stats import is_noisy, median_interval, pair_ratios, spread, verdict

MIN_PAIRS = 6  # the fewest whose extremes cover the median with 95%
BUDGET_S = 5.0  # of a row's timed part where neither the command line nor the suite says

# Largest difference between two right answers, over the tensor's largest value. The two sum in different
# orders, over T * B terms in a weight gradient; the accuracy suite judges more sharply, against float64.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}


class ContestantError(Exception):
    """One side raised; the text says which, what and where, without a machine's paths."""


@contextmanager
def blame(side: str) -> Iterator[None]:
    try:
        yield
    except NoResult:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).splitlines() or [""])[0]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        raise ContestantError(f"{side}: {type(error).__name__}: {text} ({where})") from error


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def scaled_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest reference value, both absolute; inf for a NaN or a wrong shape."""
    if value.shape != reference.shape:
        return math.inf
    if value.numel() == 0:
        return 0.0
    wide = reference.double()
    difference = (value.double() - wide).abs().max().item()
    scale = max(wide.abs().max().item(), torch.finfo(torch.float32).tiny)
    return difference / scale if math.isfinite(difference) else math.inf


NOT_COMPARED = Check("nothing", 0.0, 1.0)


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float | None = None) -> tuple[Check, str]:
    """Every named tensor of both sides. The text is empty when all agree, else it says what does not.

    `tolerance`, if given, stands in for that of the dtype: for a contestant that rounds its weights by design.
    """
    lonely = sorted(ours.keys() ^ theirs.keys())
    problems = [f"{name}: only {'theirs' if name in theirs else 'ours'} has it" for name in lonely]
    worst = Check("nothing in common", -1.0, 1.0)
    for name in [name for name in theirs if name in ours]:
        a, b = ours[name], theirs[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            problems.append(f"{name}: {list(a.shape)} {a.dtype}, theirs {list(b.shape)} {b.dtype}")
            continue
        check = Check(name, scaled_error(a, b), tolerance or TOLERANCE[b.dtype])
        if not check.error <= check.tolerance:
            share = f"{check.error:.1e} of its largest value"
            problems.append(f"{name}: differs by {share}, allowed {check.tolerance:.0e}")
        if check.error / check.tolerance > worst.error / worst.tolerance:
            worst = check
    return worst, "; ".join(problems)


def sample(prepared: Prepared, repeats: int) -> float:
    """Seconds per call over `repeats` calls."""
    step = prepared.step
    with prepared.context():
        start = time.perf_counter_ns()
        for _ in repeat(None, repeats):
            step()
        prepared.synchronize()
        return (time.perf_counter_ns() - start) * 1e-9 / repeats


def warm_up(prepared: Prepared, settings: Settings) -> int:
    """Runs for `warmup_s`, or the budget if that is less; returns how many calls last `min_sample_s`."""
    spent, calls = sample(prepared, 1), 1
    enough = settings.warmup_s if settings.budget_s is None else min(settings.warmup_s, settings.budget_s)
    while True:
        lasted = max(calls * sample(prepared, calls), 1e-9)
        spent += lasted
        if lasted < settings.min_sample_s:
            calls = max(calls + 1, min(10 * calls, math.ceil(1.1 * calls * settings.min_sample_s / lasted)))
        elif spent >= enough:
            return calls


def time_pairs(
    ours: Prepared,
    theirs: Prepared,
    repeats: tuple[int, int],
    settings: Settings,
    take: Callable[[Prepared, int], float] = sample,
) -> tuple[list[float], list[float]]:
    """Seconds per call of both sides, one value per pair; pair 0 is A B, pair 1 is B A, and so on.

    Pairs come in twos, so that each side is first equally often. Ends after `rounds` pairs, or when the
    budget is spent and there are MIN_PAIRS.
    """
    times: tuple[list[float], list[float]] = ([], [])
    sides = ((ours, 0), (theirs, 1))
    budget_s = BUDGET_S if settings.budget_s is None else settings.budget_s
    start = time.perf_counter()
    while len(times[0]) < settings.rounds:
        if len(times[0]) >= MIN_PAIRS and time.perf_counter() - start > budget_s:
            break
        for order in (sides, sides[::-1]):
            for prepared, side in order:
                times[side].append(take(prepared, repeats[side]))
    return times


# Ends with its parent, however that ends.
SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(100000):\n        pass"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many other processes compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def prepare(peer: Peer, row: Row, data: Data) -> tuple[Prepared, dict[str, Tensor]]:
    """The contestant's step on its own copy of the data, and that step's results."""
    with blame(peer.key):
        prepared = peer.prepare(row.case, row.mode, data.to(getattr(torch, row.case.dtype)))
        return prepared, prepared.results()


def run_timing(row: Row, ours: Peer, theirs: Peer, settings: Settings, floor: Floor | None = None) -> Result:
    """Never raises for what a contestant does: that becomes a row with status error, mismatch or skipped."""
    try:
        data = make_data(row.case, settings.seed)
        a, our_results = prepare(ours, row, data)
        b, their_results = prepare(theirs, row, data)
        check, problems = NOT_COMPARED, ""
        if not (a.another_layer or b.another_layer):
            check, problems = compare(our_results, their_results, a.tolerance or b.tolerance)
        if problems:
            return Result(row, "mismatch", problems)
        kernels = {"ours": a.kernel(), "theirs": b.kernel()}
        with no_garbage_collection(), busy_processes(row.busy):
            other_work = OtherWork()
            with blame(ours.key):
                our_repeats = warm_up(a, settings)
            with blame(theirs.key):
                their_repeats = warm_up(b, settings)
            our_times, their_times = time_pairs(a, b, (our_repeats, their_repeats), settings)
            others = other_work.share()
    except NoResult as reason:
        return Result(row, "skipped", str(reason))
    except Exception as error:
        text = str(error) if isinstance(error, ContestantError) else f"{type(error).__name__}: {error}"
        return Result(row, "error", text)
    ratio = median_interval(pair_ratios(our_times, their_times))
    timing = Timing(
        ratio=ratio,
        verdict=verdict(ratio, settings.tie),
        noisy=is_noisy(ratio, settings.noisy) or (others > settings.busy and not row.busy),
        other_work=others,
        ours=Side(spread(our_times), our_repeats, our_times),
        theirs=Side(spread(their_times), their_repeats, their_times),
        check=check,
        kernels=kernels,
        floor=floor,
    )
    loose = f"their results differ by {check.error:.0e}, by design" if a.tolerance or b.tolerance else ""
    if check is NOT_COMPARED:
        loose = "another layer by design: results are not compared"
    return Result(row, "ok", loose, timing=timing)
