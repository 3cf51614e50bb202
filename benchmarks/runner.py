"""Runs rows: each by its kind, whatever happens in it, with its floor and the command that runs it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.progress import Progress

from benchmarks import suites
from benchmarks.accuracy import run_accuracy
from benchmarks.cases import Row, Suite
from benchmarks.command_line import PROGRAM
from benchmarks.drift import run_drift
from benchmarks.floor import floor
from benchmarks.measure import run_timing
from benchmarks.memory import run_memory
from benchmarks.peers.base import Peer
from benchmarks.results import Floor, Result, Settings


def rerun_command(row: Row, settings: Settings) -> str:
    """Reruns exactly this row: ids are found in any suite and hold no special characters."""
    command = f"{PROGRAM} --filter '^{row.id}$' --threads {row.threads or settings.threads}"
    if not any(suite.has(row) for suite in suites.SUITES.values()):
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
    if row.kind == "drift":
        return run_drift(row, theirs, settings)
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
    by_threads = {roofline["threads"]: roofline for roofline in rooflines}
    for result in results:
        threads = result.row.threads or settings.threads
        if result.timing and threads in by_threads:
            result.timing.floor = floor(result.row.case, result.row.mode, by_threads[threads])
