"""Compiles every CUDA kernel with no torch on the include path and looks at what the compiler made of it.

    python tools/check_cuda.py                          # all architectures of a release
    python tools/check_cuda.py --archs 9.0a             # one
    python tools/check_cuda.py --update                 # accept the registers of this build into the table

Per kernel and architecture: registers against csrc/cuda/registers.json (within its register_slack); no spill, no stack
frame, no local memory but where the table's "allowed" says so and why; the matrix instructions that the kernel's name
promises; no duplicated divergent path (WARPSYNC.COLLECTIVE); where a kernel waits for other blocks, the instructions of
a turn of that loop and of the loop over steps, which may not grow. Reports seconds and object size per file. Needs
nvcc; the disassembly needs cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or Triton's
wheel).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cuda_object import CSRC, Kernel, Object, compile_all
from cuda_toolkit import DEFAULT_ARCHS, ToolkitError, find_tool, find_toolkit, parse_archs

TABLE = CSRC / "cuda" / "registers.json"
REGISTER_SLACK = 8  # what another point release of ptxas may well change; one allocation unit
# Two more numbers of a kernel that waits for other blocks, whose time is mostly these instructions (docs/gpu.md).
WAITS = ("in a turn of the loop that waits", "in the loop over steps")
# A shuffle in a loop that ptxas cannot prove convergent is emitted twice, the second time lane by lane.
MOST_COLLECTIVES = 8
CLUSTER_ARCHS = r"sm_(90|10\d)"  # where dev::kClusters is true; kernels of the cluster tier are empty elsewhere


def promised(name: str, arch: str = "sm_90a") -> dict[str, bool]:
    """Opcode patterns that must (True) or must not (False) be there, by the kernel's name and template arguments.

    "mma" in it: matrix units, of the format of the template argument (TF32 for float). "ffma": exact float32 products,
    and none of those. Neither: no product.
    """
    if name.startswith("cluster_") and not re.match(CLUSTER_ARCHS, arch):
        return {r"HMMA|FFMA|SYNCS": False}
    name = name.lower()
    if "ffma" in name:
        return {r"HMMA": False, r"FFMA": True}
    if "mma" not in name:
        return {r"HMMA": False}
    if "__nv_bfloat16" in name:
        return {r"HMMA\.16816\.F32\.BF16": True, r"HMMA.*TF32": False}
    if "__half" in name:
        return {r"HMMA\.16816\.F32$": True, r"HMMA.*(BF16|TF32)": False}
    return {r"HMMA\.1688\.F32\.TF32": True, r"HMMA.*BF16": False}


def problems_of(kernel: Kernel, allowed: dict[str, Any], arch: str = "sm_90a") -> list[str]:
    """What is wrong with a kernel by itself. allowed: {"stack": bytes, "spill": bytes, "collective": count}."""
    found = []
    if kernel.stack > allowed.get("stack", 0):
        found.append(f"stack frame of {kernel.stack} bytes")
    if (spilled := kernel.spill_stores + kernel.spill_loads) > allowed.get("spill", 0):
        found.append(f"{kernel.spill_stores} bytes of spill stores, {kernel.spill_loads} of spill loads ({spilled})")
    if not kernel.opcodes:
        return found
    if (local := kernel.count(r"(LDL|STL)\b")) and not (allowed.get("stack") or allowed.get("spill")):
        found.append(f"{local} accesses of local memory (LDL, STL)")
    if (collectives := kernel.count(r"WARPSYNC\.COLLECTIVE")) > allowed.get("collective", MOST_COLLECTIVES):
        found.append(f"{collectives} WARPSYNC.COLLECTIVE: shuffles in a loop that may diverge are emitted twice")
    for pattern, wanted in promised(kernel.name, arch).items():
        if bool(kernel.count(pattern)) != wanted:
            has = Counter({k: n for k, n in kernel.opcodes.items() if k.startswith(("HMMA", "FFMA", "HGMMA"))})
            found.append(f"{'no' if wanted else 'unexpected'} {pattern}; has {dict(has) or 'no product'}")
    return found


def allowance(table: dict[str, Any], kernel: str, arch: str) -> dict[str, Any]:
    """The first entry of "allowed" whose pattern fits "kernel @ arch"; * and ? are wild."""
    for pattern, entry in table.get("allowed", {}).items():
        escaped = pattern.replace("[", "[[]")
        if fnmatch.fnmatchcase(f"{kernel} @ {arch}", escaped):
            return entry
    return {}


def compare(objects: Sequence[Object], table: dict[str, Any], version: str) -> list[str]:
    """Every problem, one line each."""
    problems = []
    slack = table.get("register_slack", REGISTER_SLACK)
    for obj in objects:
        known = table.get("kernels", {}).get(obj.source, {})
        for line in obj.log.splitlines():
            if re.search(r"\bwarning\b.*:", line, re.I):
                problems.append(f"{obj.source} {obj.arch}: {line.strip()}")
        for kernel in obj.kernels:
            where = f"{obj.source} {obj.arch} {kernel.name}"
            problems += [
                f"{where}: {p}" for p in problems_of(kernel, allowance(table, kernel.name, obj.arch), obj.arch)
            ]
            row = known.get(kernel.name, {}).get(obj.arch)
            if row is None:
                problems.append(f"{where}: not in the table (accept with --update)")
            elif version == table.get("nvcc") and abs(kernel.registers - row[0]) > slack:
                problems.append(f"{where}: {kernel.registers} registers, table {row[0]} (slack {slack})")
            elif kernel.shared != row[1]:
                problems.append(f"{where}: {kernel.shared} bytes of static shared memory, table {row[1]}")
            elif version == table.get("nvcc") and kernel.opcodes:
                for what, now, most in zip(WAITS, (kernel.turn, kernel.step), row[2:] or (0, 0), strict=True):
                    if now > most:
                        problems.append(f"{where}: {now} instructions {what}, table {most}; it may not grow")
        built = {kernel.name for kernel in obj.kernels}
        for gone in sorted(name for name, rows in known.items() if obj.arch in rows and name not in built):
            problems.append(f"{obj.source} {obj.arch} {gone}: in the table, not in the build (--update)")
    return problems


def updated(objects: Sequence[Object], table: dict[str, Any], version: str) -> dict[str, Any]:
    """The table with this build's numbers; files and architectures that were not built keep theirs."""
    here = {path.name for path in (CSRC / "cuda").glob("*.cu")} | {obj.source for obj in objects}
    kernels = {file: dict(rows) for file, rows in table.get("kernels", {}).items() if file in here}
    for obj in objects:
        rows = kernels.setdefault(obj.source, {})
        for name in list(rows):
            rows[name] = {arch: row for arch, row in rows[name].items() if arch != obj.arch}
        for kernel in obj.kernels:
            waits = [kernel.turn, kernel.step] if kernel.turn else []
            rows.setdefault(kernel.name, {})[obj.arch] = [kernel.registers, kernel.shared, *waits]
    return {
        "nvcc": version,
        "columns": ["registers", "static shared memory in bytes", *(f"instructions {what}" for what in WAITS)],
        "register_slack": table.get("register_slack", REGISTER_SLACK),
        "allowed": table.get("allowed", {}),
        "kernels": {
            file: {name: dict(sorted(row.items())) for name, row in sorted(rows.items()) if row}
            for file, rows in sorted(kernels.items())
        },
    }


def write_table(table: dict[str, Any], path: Path) -> None:
    """JSON with one line a kernel, so that a difference is one line too."""
    text = json.dumps({k: v for k, v in table.items() if k != "kernels"}, indent=1)[:-2]
    files = []
    for file, rows in table["kernels"].items():
        lines = [f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
        files.append(f"  {json.dumps(file)}: {{\n" + ",\n".join(lines) + "\n  }")
    path.write_text(text + ',\n "kernels": {\n' + ",\n".join(files) + "\n }\n}\n")


def report(objects: Sequence[Object]) -> list[str]:
    lines = [f"{'file':<28}{'arch':<9}{'seconds':>8}{'KiB':>8}{'kernels':>9}{'registers':>11}{'shared':>8}"]
    for o in sorted(objects, key=lambda o: (o.source, o.arch)):
        registers = [k.registers for k in o.kernels]
        span = f"{min(registers)}-{max(registers)}" if registers else "-"
        shared = max((k.shared for k in o.kernels), default=0)
        lines.append(
            f"{o.source:<28}{o.arch:<9}{o.seconds:>8.1f}{o.bytes / 1024:>8.0f}{len(o.kernels):>9}{span:>11}{shared:>8}"
        )
    seconds, size = sum(o.seconds for o in objects), sum(o.bytes for o in objects)
    lines.append(f"{'all':<37}{seconds:>8.1f}{size / 1024:>8.0f}{sum(len(o.kernels) for o in objects):>9}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile checks of the CUDA kernels.")
    parser.add_argument("sources", nargs="*", type=Path, help="default: csrc/cuda/*.cu")
    parser.add_argument("--archs", default=os.environ.get("FASTRNN_CUDA_ARCHS") or DEFAULT_ARCHS)
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--update", action="store_true", help="write this build's registers into the table")
    parser.add_argument("--sass", choices=["auto", "require"], default="auto", help="must there be a disassembler?")
    parser.add_argument("--kernels", action="store_true", help="print every kernel")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        toolkit = find_toolkit()
        can_disassemble = all(find_tool(name, toolkit) for name in ("cuobjdump", "nvdisasm"))
        if options.sass == "require" and not can_disassemble:
            raise ToolkitError("cuobjdump and nvdisasm were not found (toolkit, PATH, pip, Triton)")
        sources = options.sources or sorted((CSRC / "cuda").glob("*.cu"))
        objects, errors = compile_all(sources, parse_archs(options.archs), toolkit, max(1, options.jobs))
    except ToolkitError as error:
        print(f"check_cuda: {error}", file=sys.stderr)
        return 2
    version = ".".join(map(str, toolkit.version))
    table = json.loads(options.table.read_text()) if options.table.exists() else {}
    if options.update and not errors:
        table = updated(objects, table, version)
        write_table(table, options.table)
    print("\n".join(report(objects)))
    if options.kernels:
        for o in objects:
            for k in o.kernels:
                print(f"{o.arch:<8} {k.registers:>4} {k.shared:>6} {k.count('HMMA'):>5} {k.count('FFMA'):>5}  {k.name}")
    if version != table.get("nvcc"):
        print(f"registers are not compared: the table is of nvcc {table.get('nvcc')}, this is {version}")
    if not can_disassemble:
        print("instructions are not checked: no cuobjdump and nvdisasm found")
    problems = errors + compare(objects, table, version)
    print("\n".join(problems or ["no problem found"]))
    print(f"{len(problems)} problems, {time.perf_counter() - start:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
