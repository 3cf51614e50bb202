"""Many random cases, spread over processes: `make fuzz`, `make fuzz CASES=1000`.

    python -m tests.fuzz --cases 50000 --processes 2
    python -m tests.fuzz --case '{"op": "gemm", ..}'      # one again, as a failure has told it

Chunks of cases take the instruction sets of this processor in turn; --isa, or FASTRNN_ISA, holds all of them to one.

Every process writes a case down before it runs it, so a crash and a hang have a name, too. Allocations have red zones
(guard.c), and little more memory than is in use can be had, so that huge sizes fail at once.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("modules", "calls")
CHUNK = 500  # cases of a process
PATIENCE = 120  # seconds that a case may take, on a machine that does much besides
MORE_MEMORY = 3 << 30  # bytes of address space


def guard(folder: Path) -> Path:
    """The compiled red zones."""
    library = folder / "guard.so"
    source = Path(__file__).with_name("guard.c")
    command = ["cc", "-O2", "-fno-builtin", "-shared", "-fPIC", "-Wall", "-Werror", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def work(kind: str, seed: int, cases: int, record: Path) -> None:
    """Runs a chunk of cases, in a process of its own."""
    import hypothesis
    from hypothesis import HealthCheck

    module = module_of(kind)
    limit_memory()
    with record.open("r+b", buffering=0) as file:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=cases, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
        )
        @hypothesis.given(module.CASES)
        def run(case: dict[str, Any]) -> None:
            told = json.dumps(case).encode()
            os.pwrite(file.fileno(), told, 0)
            file.truncate(len(told))
            module.run(case)

        run()


def module_of(kind: str) -> Any:
    from tests.fuzz import calls, modules

    return {"modules": modules, "calls": calls}[kind]


def limit_memory() -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MORE_MEMORY,) * 2)


class Worker:
    """A process with a chunk of cases."""

    def __init__(self, kind: str, seed: int, cases: int, folder: Path, environment: dict[str, str]) -> None:
        self.kind, self.seed, self.cases = kind, seed, cases
        self.record, self.log = folder / f"{kind}-{seed}.json", folder / f"{kind}-{seed}.log"
        self.record.touch()
        self.isa = environment["FASTRNN_ISA"]
        command = [sys.executable, "-m", "tests.fuzz", "--work", kind, str(seed), str(cases), str(self.record)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def ended(self) -> bool:
        """Has it? One that has been at a case for too long is ended."""
        if self.process.poll() is None and time.time() - self.record.stat().st_mtime > PATIENCE:
            self.process.kill()
            self.process.wait()
            with self.log.open("a") as log:
                log.write(f"\nno end after {PATIENCE} s\n")
        return self.process.poll() is not None

    def failure(self) -> str | None:
        if self.process.returncode == 0:
            return None
        log = self.log.read_text(errors="replace")[-3000:]
        return (
            f"{log}\nexit status {self.process.returncode}; the case again:\n"
            f"python -m tests.fuzz --case '{self.record.read_text()}' --isa {self.isa}\n"
        )


def instruction_sets() -> list[str]:
    from fastrnn import _C
    from tests.helpers import ISAS

    if one := os.environ.get("FASTRNN_ISA"):
        return [one]
    return list(ISAS[ISAS.index(_C.instruction_set()) :])


def run_all(cases: int, seed: int, processes: int, kinds: list[str], folder: Path) -> int:
    """Returns how many chunks have failed."""
    isas = instruction_sets()
    environment = {**os.environ, "LD_PRELOAD": str(guard(folder)), "OMP_NUM_THREADS": "2"}
    chunks = [(kinds[i % len(kinds)], seed + i, min(CHUNK, cases - i * CHUNK)) for i in range(-(-cases // CHUNK))]
    running: list[Worker] = []
    counts, failed, begin = dict.fromkeys(kinds, 0), 0, time.time()
    while chunks or running:
        while chunks and len(running) < processes:
            kind, first, some = chunks.pop(0)
            isa = isas[(first - seed) // len(kinds) % len(isas)]
            running.append(Worker(kind, first, some, folder, environment | {"FASTRNN_ISA": isa}))
        time.sleep(0.2)
        for worker in [w for w in running if w.ended()]:
            running.remove(worker)
            failure = worker.failure()
            if failure is None:
                counts[worker.kind] += worker.cases
            else:
                failed += 1
                print(failure, flush=True)
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"passed: {told}; {failed} chunks of at most {CHUNK} failed; {time.time() - begin:.0f} s")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--case", help="run this one, in this process")
    parser.add_argument("--isa", help="by this instruction set alone")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.isa:
        os.environ["FASTRNN_ISA"] = given.isa
    faulthandler.enable()
    if given.work:
        kind, seed, cases, record = given.work
        work(kind, int(seed), int(cases), Path(record))
    elif given.case:
        case = json.loads(given.case)
        limit_memory()
        module_of("calls" if "op" in case else "modules").run(case)
    else:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(run_all(given.cases, given.seed, given.processes, given.kinds, Path(folder)) > 0)


if __name__ == "__main__":
    main()
