"""One CUDA source compiled by one call of nvcc with no torch on the include path, and what came of it: registers and
spills as ptxas prints them, opcodes as cuobjdump does. Used by tools/check_cuda.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cuda_toolkit import Arch, Toolkit, ToolkitError, find_tool

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda-check"


@dataclass
class Kernel:
    """What ptxas and the disassembly say of one kernel for one architecture."""

    name: str
    registers: int = 0
    shared: int = 0  # static, bytes
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)  # empty without a disassembler
    turn: int = 0  # instructions of the longest loop that does nothing but wait for other blocks; 0: none does
    step: int = 0  # instructions of the loop around all of those, as they stand in memory

    def count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))


@dataclass
class Object:
    """One file compiled for one architecture."""

    source: str
    arch: str
    seconds: float  # of the compilation, also where it comes from the cache; shared out evenly where it is of several
    bytes: int  # likewise
    log: str
    kernels: list[Kernel]


def demangle(names: Sequence[str], toolkit: Toolkit | None = None) -> dict[str, str]:
    """Mangled -> "step_kernel<LSTMCell, float>": no return type, arguments, or namespaces of ours."""
    tool = find_tool("cu++filt", toolkit) or find_tool("c++filt")
    if not tool or not names:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: shorten(full) for name, full in zip(names, done.stdout.splitlines(), strict=True)}


def shorten(full: str) -> str:
    name, depth = full.removeprefix("void "), 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and i > 0 and not name.startswith("(anonymous", i):
            name = name[:i]
            break
    return re.sub(r"\b(?:fastrnn|cuda|dev|mutants)::|\(anonymous namespace\)::", "", name)


def parse_ptxas(log: str, arch: str) -> dict[str, Kernel]:
    """An architecture's kernels by mangled name, from the output of -Xptxas -v, which tells of one after the other."""
    kernels: dict[str, Kernel] = {}
    current: Kernel | None = None
    of_arch = False
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            of_arch = entry[2] == arch
            if of_arch:
                kernels[entry[1]] = Kernel(entry[1])
            current = kernels[entry[1]] if of_arch else None
        elif re.search(r"Function properties for (\S+)", line):  # of no kernel: a device function that was not inlined
            current = kernels.get(line.split()[-1]) if of_arch else None
        elif current and (
            frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ):
            current.stack, current.spill_stores, current.spill_loads = map(int, frame.groups())
        elif current and (used := re.search(r"Used (\d+) registers", line)):
            current.registers = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared = int(shared[1]) if shared else 0
    return kernels


class Instruction(NamedTuple):
    address: int
    opcode: str
    target: int | None  # where it goes, if it is a branch


def parse_sass(lines: Iterable[str]) -> dict[str, list[Instruction]]:
    """By mangled name, from the output of cuobjdump -sass."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    instruction = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")
    for line in lines:
        if "Function :" in line:
            current = functions.setdefault(line.split()[-1], [])
        elif match := instruction.match(line):
            branch = re.search(r"\b0x([0-9a-f]+)\s*$", match[3]) if match[2].startswith("BRA") else None
            current.append(Instruction(int(match[1], 16), match[2], int(branch[1], 16) if branch else None))
    return functions


def waiting_loops(code: Sequence[Instruction]) -> tuple[int, int]:
    """Instructions of the longest innermost and of the longest loop with a load, or a look at an mbarrier, that other
    blocks are waited for by.

    A loop reaches from where a branch goes back to, to the last branch that does; what stands between counts, also
    where a branch leads past it. What stands behind the last EXIT are detours, whose way back is no loop: of lanes that
    a barrier of the warp has to bring together, or of a wait for an mbarrier, which may have its turns there.
    """
    loops: dict[int, int] = {}
    end = max((at for at, opcode, _ in code if opcode == "EXIT"), default=0)
    for at, _, target in code:
        if target is not None and target <= at and (at < end or target > end):
            loops[target] = max(at, loops.get(target, 0))
    looks = [at for at, opcode, _ in code if re.match(r"LD.*\.STRONG\.|SYNCS\.PHASECHK\..*TRYWAIT", opcode)]
    waits = [(first, last) for first, last in loops.items() if any(first <= at <= last for at in looks)]
    lengths = {loop: sum(loop[0] <= at <= loop[1] for at, _, _ in code) for loop in waits}
    inner = [
        a for a in waits if not any(a != b and ((a[0] <= b[0] and b[1] <= a[1]) or a[1] < end < b[0]) for b in waits)
    ]
    return max((lengths[loop] for loop in inner), default=0), max(lengths.values(), default=0)


def disassemble(path: Path, arch: str, cuobjdump: str, nvdisasm: str) -> dict[str, list[Instruction]]:
    search = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])
    command = [cuobjdump, "-sass", "-arch", arch, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PATH": search}) as run:
        assert run.stdout is not None
        functions = parse_sass(run.stdout)
    if run.returncode:
        raise ToolkitError(f"cuobjdump -sass failed on {path.name}")
    return functions


def headers_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".inc")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_object(source: Path, archs: Sequence[Arch], toolkit: Toolkit, headers: str) -> list[Object]:
    """Compiles for architectures of one first half (Arch.virtual), or takes from build/cuda-check what was compiled of
    the same bytes. Raises ToolkitError.
    """
    names = [arch.name for arch in archs]
    command = toolkit.command([Arch(arch.number, arch.suffix) for arch in archs], CSRC, "-Xptxas=-v")
    told = "\0".join([headers, str(toolkit.version), *command]).encode()
    stem = CACHE / f"{source.stem}-{archs[0].virtual}-{hashlib.sha256(told + source.read_bytes()).hexdigest()[:16]}"
    target, record = stem.with_suffix(".o"), stem.with_suffix(".json")
    if not record.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = stem.with_suffix(f".{os.getpid()}.o")
        hidden = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")  # no other way to a torch header either
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "-c", str(source), "-o", str(partial)], capture_output=True, text=True, env=environment
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[:20])
            raise ToolkitError(f"{source.name} does not compile for {', '.join(names)}:\n{said}")
        partial.rename(target)
        record.write_text(json.dumps({"seconds": seconds, "log": done.stdout + done.stderr, "opcodes": {}}))
    made = json.loads(record.read_text())
    cuobjdump, nvdisasm = find_tool("cuobjdump", toolkit), find_tool("nvdisasm", toolkit)
    if "waits" not in made and cuobjdump and nvdisasm:
        code = {arch: disassemble(target, arch, cuobjdump, nvdisasm) for arch in names}
        made["opcodes"] = {
            arch: {name: Counter(i.opcode for i in instructions) for name, instructions in of.items()}
            for arch, of in code.items()
        }
        made["waits"] = {
            arch: {name: waiting_loops(instructions) for name, instructions in of.items()} for arch, of in code.items()
        }
        record.write_text(json.dumps(made))
    seconds, size = made["seconds"] / len(archs), target.stat().st_size // len(archs)
    return [Object(source.name, arch, seconds, size, made["log"], kernels_of(made, arch, toolkit)) for arch in names]


def kernels_of(made: dict[str, Any], arch: str, toolkit: Toolkit) -> list[Kernel]:
    """From the record of a compilation."""
    kernels = parse_ptxas(made["log"], arch)
    opcodes, waits = (made.get(key, {}).get(arch, {}) for key in ("opcodes", "waits"))
    told = demangle(list(kernels), toolkit)
    for mangled, kernel in kernels.items():
        kernel.name = told[mangled]
        kernel.opcodes = Counter(opcodes.get(mangled, {}))
        kernel.turn, kernel.step = waits.get(mangled, (0, 0))
    return list(kernels.values())


def compile_all(
    sources: Sequence[Path], archs: Sequence[Arch], toolkit: Toolkit, jobs: int
) -> tuple[list[Object], list[str]]:
    """The objects, and what the compiler said of those that there are not."""
    headers = headers_digest()
    objects, errors = [], []
    calls: dict[str, list[Arch]] = {}
    for arch in archs:
        calls.setdefault(arch.virtual, []).append(arch)
    with ThreadPoolExecutor(jobs) as pool:
        pending = [pool.submit(compile_object, s, each, toolkit, headers) for s in sources for each in calls.values()]
        for each in pending:
            try:
                objects += each.result()
            except ToolkitError as error:
                errors.append(str(error))
    return objects, errors
