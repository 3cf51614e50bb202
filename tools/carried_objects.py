"""Compiles all that knows no torch, kernels of CUDA and of the CPU, for another machine or another torch.

    python tools/carried_objects.py build/objects --archs 9.0a      # here
    FASTRNN_OBJECTS=build/objects pip install --no-build-isolation .    # there: setup.py compiles csrc/torch alone
    python tools/carried_objects.py build/objects --cpu     # for a build without CUDA

The other machine needs the same processor, CUDA of the same major version, and the same sources: objects.json beside
the objects says what they were made of, and a build that differs refuses them. With --cpu, what setup.py has built in
place of these sources is taken and not compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
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


def sources(cuda: bool) -> list[Path]:
    return sorted([*ROOT.glob("csrc/cpu/*.cpp"), *(ROOT.glob("csrc/cuda/*.cu") if cuda else ())])


def headers() -> list[Path]:
    found = (path for path in ROOT.glob("csrc/**/*") if path.parent.name != "torch")
    return sorted(path for path in found if path.suffix in (".h", ".cuh", ".inc"))


def digest() -> str:
    """Of all that the objects are made of."""
    found = hashlib.sha256()
    for path in sorted([*headers(), *sources(cuda=True)]):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def made_of(archs: str, cuda_major: int) -> dict[str, Any]:
    return {"sources": digest(), "archs": archs, "cuda": cuda_major}


def misfit(folder: Path, archs: str, cuda_major: int) -> str:
    """Why a build for these architectures ("" and 0: without CUDA) cannot take the folder's objects, or ""."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"there is no {MANIFEST} in {folder}"
    have, wanted = json.loads(path.read_text()), made_of(archs, cuda_major)
    differ = [key for key in wanted if have.get(key) != wanted[key]]
    return "; ".join(f"{key}: expected {wanted[key] or 'none'}, got {have.get(key) or 'none'}" for key in differ)


def objects(folder: Path, cuda: bool) -> list[Path]:
    return [folder / f"{path.parent.name}-{path.stem}.o" for path in sources(cuda)]


def built_in_place(name: str) -> Path | None:
    """setup.py's object of csrc/cpu/`name`.cpp, if none of the sources is newer, nor what says how to compile them."""
    made_of = [*headers(), *sources(cuda=False), ROOT / "setup.py", Path(__file__)]
    newest = max(path.stat().st_mtime for path in made_of)
    made = ROOT.glob(f"build/temp.*/csrc/cpu/{name}.o")
    return next((path for path in sorted(made) if path.stat().st_mtime > newest), None)


def make(folder: Path, archs: str, jobs: int) -> None:
    """For these architectures, or "" for the CPU alone. Raises ToolkitError where something does not compile."""
    toolkit = find_toolkit() if archs else None
    nvcc = toolkit.command(parse_archs(archs), ROOT / "csrc") if toolkit else []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    cxx = [*shlex.split(os.environ.get("CXX", "c++")), *CXX_FLAGS, "-fPIC", "-DNDEBUG", "-g0"]

    def compile_one(source: Path, target: Path) -> None:
        if not archs and (built := built_in_place(source.stem)):
            shutil.copyfile(built, target)
            return
        command = nvcc if source.suffix == ".cu" else cxx
        done = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            raise ToolkitError(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, sources(bool(archs)), objects(folder, bool(archs))))
    made = made_of(archs, toolkit.version[0] if toolkit else 0)
    (folder / MANIFEST).write_text(json.dumps(made, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compiles the kernels for a build on another machine.")
    parser.add_argument("folder", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--archs", default="9.0a", help="as FASTRNN_CUDA_ARCHS; default 9.0a")
    which.add_argument("--cpu", dest="archs", action="store_const", const="", help="the CPU's alone")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    options = parser.parse_args(argv)
    try:
        make(options.folder, options.archs, max(1, options.jobs))
    except ToolkitError as error:
        print(f"carried_objects: {error}", file=sys.stderr)
        return 1
    made = objects(options.folder, bool(options.archs))
    size = sum(path.stat().st_size for path in made) >> 20
    print(f"{len(made)} objects for {options.archs or 'the CPU'}, {size} MiB, in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
