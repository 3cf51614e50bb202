"""`python -m benchmarks.gpu`: builds for this GPU, tests, sanitizes, times; JSON and a table at the end.

Steps run as processes of their own with a limit each, so that none can use up the others' time: a copy of the tree is
built under build/gpu, the device tests run, compute-sanitizer looks at small sizes, and the timings get what is left.
Writes gpu.json, the steps' logs and the tests' XML to $OUT (or --out). Exit status 1 if anything about
correctness failed or the tests ran out of their time; slow rows fail nothing. No network is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
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

from benchmarks.gpu.report import document, machine, table
from benchmarks.schema import json_text

ROOT = Path(__file__).resolve().parent.parent.parent
RESERVE_S = 15.0  # for writing, and for processes to end


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

    def process(self, name: str, command: Sequence[str], cwd: Path, limit_s: float, **variables: str) -> int | None:
        """Exit status, None if it ran past its limit. Output goes to <name>.log, and its end to ours."""
        log = self.out / f"{name}.log"
        if self.rehearsal:  # tiny sizes; threads would only wait for each other
            variables |= {"OMP_NUM_THREADS": "1"}
        limit_s = max(1.0, min(limit_s, self.left_s - RESERVE_S))
        with (
            log.open("w") as file,
            subprocess.Popen(
                command, cwd=cwd, env=os.environ | variables, stdout=file, stderr=subprocess.STDOUT, process_group=0
            ) as running,
        ):
            try:
                status: int | None = running.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)  # its children too
                status = None
        if status != 0:
            print("\n".join(log.read_text(errors="replace").splitlines()[-30:]), flush=True)
        return status

    @property
    def failed(self) -> bool:
        return any(step["status"] == "failed" for step in self.steps)


def architecture(device: str) -> str:
    """FASTRNN_CUDA_ARCHS for this GPU alone: Hopper's own instructions need the "a"."""
    if not device.startswith("cuda"):
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")


def build(run: Run) -> Path:
    """The tree that the other steps run in."""
    if run.rehearsal:
        run.record("build", "skipped", detail="dry run: the tree as it is")
        return ROOT
    tree = ROOT / "build" / "gpu"
    archs = architecture(run.device)
    command = [sys.executable, str(ROOT / "tools/build_copy.py"), str(tree)]
    begin = time.perf_counter()
    cuda = {"FASTRNN_CUDA": "1", "FASTRNN_CUDA_ARCHS": archs} if run.device != "cpu" else {"FASTRNN_CUDA": "0"}
    status = run.process("build", command, ROOT, 240, **cuda)
    seconds = time.perf_counter() - begin
    size = sum(p.stat().st_size for p in tree.glob("fastrnn/_C*.so")) >> 20
    run.record("build", "failed" if status else "ok", seconds, f"for {archs}, {size} MiB")
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
        command += ["-n", "4"]
    if select:
        command += ["-k", select]
    begin = time.perf_counter()
    status = run.process("tests", command, tree, 0.4 * run.limit_s, FASTRNN_TEST_DEVICE=run.device)
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
        status = run.process("small", small, tree, 60)
        why = "dry run" if run.rehearsal else "compute-sanitizer was not found"
        name = "skipped" if status == 0 else "failed"
        run.record("sanitizer", name, time.perf_counter() - begin, f"{why}: small sizes ran without it")
        return
    for check in ("memcheck", "racecheck"):
        begin = time.perf_counter()
        command = [tool, f"--tool={check}", "--error-exitcode=9", *small]
        # Every tensor an allocation of its own, so that an access past its end is seen.
        status = run.process(check, command, tree, 0.12 * run.limit_s, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        said = (run.out / f"{check}.log").read_text(errors="replace")
        if status is None:
            run.record(check, "skipped", time.perf_counter() - begin, "ran out of time")
        elif status and "Device not supported" in said:
            run.record(check, "skipped", time.perf_counter() - begin, "the tool refuses this device")
        else:
            summary = [text.strip("= ") for text in said.splitlines() if "SUMMARY" in text]
            run.record(check, "failed" if status else "ok", time.perf_counter() - begin, summary[-1] if summary else "")


def timings(run: Run, tree: Path, budget_s: float, only: str) -> list[dict[str, Any]]:
    path = run.out / "timing.json"
    path.unlink(missing_ok=True)
    budget_s = max(1.0, min(budget_s, run.left_s - 3 * RESERVE_S))
    command = [sys.executable, "-m", "benchmarks.gpu.timing", "--out", str(path), "--device", run.device]
    command += ["--budget", str(budget_s), "--only", only]
    if run.rehearsal:
        command += ["--tiny", "--row", "0.005"]
    begin = time.perf_counter()
    status = run.process("timing", command, tree, budget_s + 2 * RESERVE_S)
    rows = json.loads(path.read_text()) if path.exists() else []
    detail = f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} rows"
    run.record("timing", "ok" if status == 0 else "failed", time.perf_counter() - begin, detail)
    path.unlink(missing_ok=True)  # gpu.json holds it
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Checks and times fastrnn on a GPU.")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "out" / "gpu"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try this script itself")
    parser.add_argument("--dry-run", action="store_true", help="build nothing, tiny sizes")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument("--budget", type=float, default=300, help="seconds for the timings, at most")
    parser.add_argument("--skip", action="append", default=[], choices=["tests", "sanitizer", "timing"])
    parser.add_argument("--only", default="", help="timings whose row contains this")
    parser.add_argument("--select", default="", help="pytest's -k for the device tests")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch sees no GPU (--device cpu --dry-run tries the script without one)", file=sys.stderr
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.out.resolve(), options.device, options.limit, options.dry_run)
    rows: list[dict[str, Any]] = []
    tree = build(run)
    if not run.failed:
        if "tests" not in options.skip:
            tests(run, tree, options.select)
        if "sanitizer" not in options.skip:
            sanitize(run, tree)
        if "timing" not in options.skip:
            rows = timings(run, tree, options.budget, options.only)
            timing_log = run.out / "timing.log"
            print(timing_log.read_text(errors="replace"))
    doc = document(machine(options.device), run.steps, rows)
    (run.out / "gpu.json").write_text(json_text(doc))
    print("\n".join(table(doc)))
    return 1 if doc["summary"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
