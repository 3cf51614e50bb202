"""`python -m benchmarks.gpu`: builds for this GPU, tests, sanitizes, times; JSON and a table at the end.

Steps run as processes of their own with a limit each, so that none can use up the others' time. A copy of the tree is
built under build/gpu, of the objects in build/objects if tools/carried_objects.py has made them of the same sources.
Then --correctness: the device tests, and compute-sanitizer on small sizes. Or --timings: what calls cost beside their
kernels, every tier by itself, the CPU's suite `scaling`, profiles of named kernels, and with what time is left the rows
against cuDNN. Without either both, in one run.

Writes gpu.json, gpu.log, the tests' XML, tiers.json, scaling.json and profile.txt to $OUT (or --out). Exit status 1 if
anything about correctness failed or the tests ran out of their time; slow rows fail nothing. No network is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import profiled
from benchmarks.gpu.report import document, machine, table
from benchmarks.gpu.rows import TABLE
from benchmarks.schema import json_text

ROOT = Path(__file__).resolve().parent.parent.parent
OBJECTS = ROOT / "build" / "objects"
sys.path.insert(0, str(ROOT / "tools"))

import carried_objects  # noqa: E402

RESERVE_S = 10.0  # for writing, and for processes to end
CORRECTNESS = ("tests", "sanitizer")
TIMINGS = ("calls", "tiers", "scaling", "profile", "timing")
# Seconds that a step may take; the rows against cuDNN take what is left.
LIMITS = {
    "build": 200, "tests": 110, "memcheck": 50, "racecheck": 55, "calls": 40, "tiers": 45, "scaling": 25, "profile": 40,
}  # fmt: skip
# Of the suite what 20 seconds suffice for: one size of each cell, and three of one, by 1 to 16 threads.
SCALING = r"lstm-128x16x(64x64|256x256|512x512)-|gru-128x16x256x256-"


@dataclass
class Run:
    """One whole run: where it writes, and how long it may take."""

    out: Path
    device: str
    limit_s: float
    rehearsal: bool  # --dry-run: nothing is built, sizes are tiny
    steps: list[dict[str, Any]] = field(default_factory=list)
    begin: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.perf_counter() - self.begin)

    def record(self, name: str, status: str, seconds: float = 0.0, detail: str = "") -> None:
        self.steps.append({"name": name, "status": status, "seconds": round(seconds, 1), "detail": detail})
        print(f"== {name}: {status} ({seconds:.0f} s) {detail}", flush=True)

    def limit_of(self, name: str) -> float:
        """Seconds that a step may take; many in a rehearsal, on whatever machine and beside whatever else."""
        return math.inf if self.rehearsal else LIMITS.get(name, math.inf)

    def process(
        self, name: str, command: Sequence[str], cwd: Path, limit_s: float = math.inf, **variables: str
    ) -> tuple[int | None, str]:
        """Exit status, None if it ran past its limit, and output, which gpu.log has too. A failure's end is shown."""
        log = self.out / "gpu.log"
        if self.rehearsal:  # tiny sizes; threads would only wait for each other
            variables |= {"OMP_NUM_THREADS": "1"}
        limit_s = min(limit_s, self.limit_of(name))
        limit_s = max(1.0, min(limit_s, self.left_s - RESERVE_S))
        with log.open("a") as file:
            file.write(f"== {name}\n")
        begin = log.stat().st_size
        with (
            log.open("a") as file,
            subprocess.Popen(
                command, cwd=cwd, env=os.environ | variables, stdout=file, stderr=subprocess.STDOUT, process_group=0
            ) as running,
        ):
            try:
                status: int | None = running.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)  # its children too
                status = None
        said = log.read_bytes()[begin:].decode(errors="replace")
        if status != 0:
            print("\n".join(said.splitlines()[-30:]), flush=True)
        return status, said

    @property
    def failed(self) -> bool:
        return any(step["status"] == "failed" for step in self.steps)


def architecture(device: str) -> str:
    """FASTRNN_CUDA_ARCHS for this GPU alone: Hopper's own instructions need the "a"."""
    if not device.startswith("cuda"):
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")


def build(run: Run, carried: bool) -> Path:
    """The tree that the other steps run in. carried: is its extension here already, built on another machine?"""
    if run.rehearsal or carried:
        run.record("build", "skipped", detail="the tree as it is" + ("" if carried else ": dry run"))
        return ROOT
    tree = ROOT / "build" / "gpu"
    archs = architecture(run.device)
    command = [sys.executable, str(ROOT / "tools/build_copy.py"), str(tree)]
    begin = time.perf_counter()
    variables = {"FASTRNN_CUDA": "0"}
    why = "no GPU"
    if run.device != "cpu":
        variables = {"FASTRNN_CUDA": "1", "FASTRNN_CUDA_ARCHS": archs}
        why = carried_objects.misfit(OBJECTS, archs, int((torch.version.cuda or "0").split(".")[0]))
        if not why:
            variables["FASTRNN_OBJECTS"] = str(OBJECTS)
    status, _ = run.process("build", command, ROOT, LIMITS["build"], **variables)
    seconds = time.perf_counter() - begin
    size = sum(p.stat().st_size for p in tree.glob("fastrnn/_C*.so")) >> 20
    detail = f"for {archs}, {size} MiB, " + (f"all of it ({why})" if why else "with the objects carried")
    run.record("build", "ok" if status == 0 else "failed", seconds, detail)
    return tree


def count_tests(path: Path) -> dict[str, int]:
    suites = ElementTree.parse(path).getroot().iter("testsuite") if path.exists() else ()
    names = ("tests", "failures", "errors", "skipped")
    totals = dict.fromkeys(names, 0)
    for suite in suites:
        for name in names:
            totals[name] += int(suite.get(name, 0))
    return totals


def tests(run: Run, tree: Path, select: str) -> None:
    report = run.out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/cuda/test_gpu.py"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-o", "addopts=-q", "-o", "faulthandler_timeout=90"]  # a kernel that hangs names its test
    if not run.rehearsal and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]  # references on the CPU take most of the time
    if select:
        command += ["-k", select]
    begin = time.perf_counter()
    status, _ = run.process("tests", command, tree, FASTRNN_TEST_DEVICE=run.device, OMP_NUM_THREADS="1")
    counts = count_tests(report)
    detail = ", ".join(f"{n} {name}" for name, n in counts.items())
    if status is None:
        detail += "; ran out of time"
    ran = counts["tests"] > counts["skipped"]
    run.record("tests", "ok" if status == 0 and ran else "failed", time.perf_counter() - begin, detail)


def sanitize(run: Run, tree: Path) -> None:
    tool = shutil.which("compute-sanitizer")
    small = [sys.executable, "-m", "benchmarks.gpu.small", "--device", run.device]
    if run.rehearsal or not tool:
        begin = time.perf_counter()
        status, _ = run.process("small", small, tree, 60)
        why = "dry run" if run.rehearsal else "compute-sanitizer was not found"
        name = "skipped" if status == 0 else "failed"
        run.record("sanitizer", name, time.perf_counter() - begin, f"{why}: small sizes ran without it")
        return
    for check in ("memcheck", "racecheck"):
        begin = time.perf_counter()
        command = [tool, f"--tool={check}", "--error-exitcode=9", *small]
        # Every tensor an allocation of its own, so that an access past its end is seen.
        status, said = run.process(check, command, tree, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if status is None:
            run.record(check, "skipped", time.perf_counter() - begin, "ran out of time")
        elif status and "Device not supported" in said:
            run.record(check, "skipped", time.perf_counter() - begin, "the tool refuses this device")
        else:
            summary = [text.strip("= ") for text in said.splitlines() if "SUMMARY" in text]
            run.record(check, "failed" if status else "ok", time.perf_counter() - begin, summary[-1] if summary else "")


def measured(run: Run, tree: Path, name: str, budget_s: float, *more: str) -> tuple[bool, list[dict[str, Any]]]:
    """Runs benchmarks.gpu.<name>, which stops by itself after its budget and a call, and prints what it says."""
    path = run.out / f"{name}.part"
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--out", str(path), "--device", run.device]
    command += ["--budget", str(budget_s), *more, *(["--tiny"] if run.rehearsal else [])]
    status, said = run.process(name, command, tree, math.inf if run.rehearsal else budget_s + RESERVE_S)
    print(said, flush=True)
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    path.unlink(missing_ok=True)  # gpu.json holds it
    return status == 0, rows


def timings(run: Run, tree: Path, budget_s: float, only: str) -> list[dict[str, Any]]:
    begin = time.perf_counter()
    budget_s = max(1.0, min(budget_s, run.left_s - 2 * RESERVE_S))
    row_s = 0.005 if run.rehearsal else min(0.4, 0.35 * budget_s / len(TABLE))  # so that all rows find the time
    ok, rows = measured(run, tree, "timing", budget_s, "--only", only, "--row", f"{row_s:.3f}")
    detail = f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} rows"
    run.record("timing", "ok" if ok else "failed", time.perf_counter() - begin, detail)
    return rows


def calls(run: Run, tree: Path) -> list[dict[str, Any]]:
    begin = time.perf_counter()
    ok, found = measured(run, tree, "calls", LIMITS["calls"] - RESERVE_S)
    run.record("calls", "ok" if ok else "failed", time.perf_counter() - begin, f"{len(found)} calls")
    return found


def tiers(run: Run, tree: Path) -> None:
    begin, path = time.perf_counter(), run.out / "tiers.json"
    command = [sys.executable, "-m", "benchmarks.gpu.tiers", "--out", str(path), "--device", run.device]
    command += ["--budget", str(LIMITS["tiers"] - RESERVE_S), *(["--tiny"] if run.rehearsal else [])]
    status, said = run.process("tiers", command, tree)
    run.record("tiers", "ok" if status == 0 else "failed", time.perf_counter() - begin, said.strip()[-80:])


def scaling(run: Run, tree: Path) -> None:
    """The CPU's suite, for machines with more processors than those that the rest is measured on."""
    if missing := next((name for name in ("rich", "numpy") if importlib.util.find_spec(name) is None), ""):
        run.record("scaling", "skipped", detail=f"{missing} is not installed")
        return
    begin, path = time.perf_counter(), run.out / "scaling.json"
    command = [sys.executable, "-m", "benchmarks", "--suite", "scaling", "--json", str(path), "--filter"]
    command += ["lstm-8x16x256x256-fwd-threads1-" if run.rehearsal else SCALING]
    command += ["--rounds", "4", "--budget", "0.05", "--min-sample", "2"]
    status, _ = run.process("scaling", command, tree)
    why = "ran out of time" if status is None else f"{os.cpu_count()} processors"
    run.record("scaling", "ok" if status == 0 else "failed", time.perf_counter() - begin, why)


def profile(run: Run, tree: Path) -> None:
    """A short one of each named kernel, as text."""
    tool = shutil.which("ncu")
    if run.rehearsal or not tool:
        begin = time.perf_counter()
        small = [sys.executable, "-m", "benchmarks.gpu.profiled", "--device", run.device, "--tiny"]
        ran, _ = run.process("profile", [*small, *profiled.KERNELS.values()], tree)
        why = "dry run" if run.rehearsal else "ncu was not found"
        name = "skipped" if ran == 0 else "failed"
        run.record("profile", name, time.perf_counter() - begin, f"{why}: the rows ran without it")
        return
    begin, found, texts = time.perf_counter(), 0, []
    for kernel, row in profiled.KERNELS.items():
        left = LIMITS["profile"] - (time.perf_counter() - begin)
        if left < 1:
            break
        result, said = run.process("profile", profiled.command(tool, kernel, [sys.executable]), tree, left)
        found += result == 0 and "Duration" in said
        texts.append(f"==== {kernel}, {row}\n{said}")
    (run.out / "profile.txt").write_text("\n".join(texts))
    run.record("profile", "ok" if found else "skipped", time.perf_counter() - begin, f"{found} kernels")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Checks and times fastrnn on a GPU.")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "out" / "gpu"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try this script itself")
    parser.add_argument("--dry-run", action="store_true", help="build nothing, tiny sizes")
    parser.add_argument("--no-build", action="store_true", help="the extension has been carried here, beside fastrnn/")
    parser.add_argument("--correctness", action="store_true", help=f"of the steps only {', '.join(CORRECTNESS)}")
    parser.add_argument("--timings", action="store_true", help=f"of the steps only {', '.join(TIMINGS)}")
    parser.add_argument("--limit", type=float, help="seconds for everything; default 290, of all steps 540")
    parser.add_argument("--budget", type=float, default=300, help="seconds for the rows against cuDNN, at most")
    parser.add_argument("--skip", action="append", default=[], choices=[*CORRECTNESS, *TIMINGS])
    parser.add_argument("--only", default="", help="timings whose row contains this")
    parser.add_argument("--select", default="", help="pytest's -k for the device tests")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch sees no GPU (--device cpu --dry-run tries the script without one)", file=sys.stderr
        )
        return 2
    both = options.correctness == options.timings
    wanted = [*(CORRECTNESS if both or options.correctness else ()), *(TIMINGS if both or options.timings else ())]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.log").unlink(missing_ok=True)
    limit_s = options.limit or (540 if both else 290)
    run = Run(options.out.resolve(), options.device, limit_s, options.dry_run)
    facts = machine(options.device)
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []

    def write() -> dict[str, Any]:
        doc = document(facts, run.steps, rows, costs)
        (run.out / "gpu.json").write_text(json_text(doc))
        return doc

    tree = build(run, options.no_build)
    for step in wanted if not run.failed else ():
        write()  # what there is, should this run be ended from outside
        if step in options.skip:
            continue
        if step == "tests":
            tests(run, tree, options.select)
        elif step == "calls":
            costs = calls(run, tree)
        elif step == "timing":
            rows = timings(run, tree, options.budget, options.only)
        else:
            {"sanitizer": sanitize, "tiers": tiers, "scaling": scaling, "profile": profile}[step](run, tree)
    doc = write()
    print("\n".join(table(doc)))
    return 1 if doc["summary"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
