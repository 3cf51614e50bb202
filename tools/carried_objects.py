"""Compiles all that knows no torch, kernels of CUDA and of the CPU, for a build on another machine.

    python tools/carried_objects.py build/objects --archs 9.0a      # here
    FASTRNN_OBJECTS=build/objects pip install --no-build-isolation .    # there: setup.py compiles csrc/torch alone

The other machine needs the same processor, CUDA of the same major version, and the same sources: objects.json beside
the objects says what they were made of, and a build that differs refuses them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cuda_toolkit import ToolkitError, find_toolkit, parse_archs

ROOT = Path(__file__).resolve().parent.parent
# OpenMP is compiled in but not linked: its symbols then come from the runtime that torch has loaded, so that the
# process has one thread pool and not two. Apple's clang has no such option of its own, only its parts behind it.
OPENMP = {"linux": ("-fopenmp",), "darwin": ("-Xpreprocessor", "-fopenmp")}
OTHER_FLAGS = ("-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas")
CXX_FLAGS = (*OTHER_FLAGS, *OPENMP.get(sys.platform, OPENMP["linux"]))
# What the module exports, in the words of GNU's linkers; setup.py says why.
EXPORTS = "{ global: PyInit__C; local: *; };\n"
MANIFEST = "objects.json"


def sources() -> list[Path]:
    return sorted([*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")])


def digest() -> str:
    """Of all that the objects are made of."""
    found_in = (path for path in ROOT.glob("csrc/**/*") if path.parent.name != "torch")
    headers = [path for path in found_in if path.suffix in (".h", ".cuh", ".inc")]
    found = hashlib.sha256()
    for path in sorted([*headers, *sources()]):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def made_of(archs: str, cuda_major: int) -> dict[str, Any]:
    return {"sources": digest(), "archs": archs, "cuda": cuda_major}


def misfit(folder: Path, archs: str, cuda_major: int) -> str:
    """Why a build for these architectures cannot take the folder's objects; empty if it can."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"there is no {MANIFEST} in {folder}"
    have, wanted = json.loads(path.read_text()), made_of(archs, cuda_major)
    differ = [key for key in wanted if have.get(key) != wanted[key]]
    return "; ".join(f"{key}: expected {wanted[key]}, got {have.get(key)}" for key in differ)


def objects(folder: Path) -> list[Path]:
    return [folder / f"{path.parent.name}-{path.stem}.o" for path in sources()]


def make(folder: Path, archs: str, jobs: int) -> None:
    """Raises ToolkitError where something does not compile."""
    toolkit, parsed = find_toolkit(), parse_archs(archs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    cxx = [*shlex.split(os.environ.get("CXX", "c++")), *CXX_FLAGS, "-fPIC", "-DNDEBUG", "-g0"]
    nvcc = toolkit.command(parsed, ROOT / "csrc")

    def compile_one(source: Path, target: Path) -> None:
        command = nvcc if source.suffix == ".cu" else cxx
        done = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            raise ToolkitError(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, sources(), objects(folder)))
    (folder / MANIFEST).write_text(json.dumps(made_of(archs, toolkit.version[0]), indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compiles the kernels for a build on another machine.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--archs", default="9.0a", help="as FASTRNN_CUDA_ARCHS; default 9.0a")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    options = parser.parse_args(argv)
    try:
        make(options.folder, options.archs, max(1, options.jobs))
    except ToolkitError as error:
        print(f"carried_objects: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in objects(options.folder)) >> 20
    print(f"{len(sources())} objects for {options.archs}, {size} MiB, in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
