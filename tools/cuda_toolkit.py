"""The CUDA toolkit as the build (setup.py) and the compile checks (tools/check_cuda.py) use it: where it is, which
GPUs to compile for, which flags. Standard library only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
OLDEST_ARCH = 80  # the mma and cp.async wrappers of device_cuda.cuh
# The kernels see csrc/ and the toolkit, never torch: they compile in seconds, for any torch. Relaxed constexpr, because
# kernels ask the constexpr functions of headers that are plain C++ (tiles.h); without it such a kernel becomes a trap.
NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas",
)
# What ATen/cuda/CUDAContextLight.h includes; a toolkit may lack the last four, and pip's CUDA libraries have them.
ATEN_NEEDS = ("cuda_runtime_api.h", "cublas_v2.h", "cublasLt.h", "cusparse.h", "cusolverDn.h")


class ToolkitError(Exception):
    """Something of the toolkit is missing or does not fit; the text says what was looked for and where."""


@dataclass(frozen=True)
class Arch:
    """One entry of FASTRNN_CUDA_ARCHS: number 90, suffix "a", ptx False for "9.0a"."""

    number: int
    suffix: str = ""
    ptx: bool = False

    @property
    def name(self) -> str:
        return f"sm_{self.number}{self.suffix}"

    @property
    def virtual(self) -> str:
        """The architecture that nvcc compiles for before ptxas does for this one. That first half is two thirds of the
        time, and 8.9 shares 8.6's: every kernel's registers and instructions come out the same. (Not 8.0's: loops are
        unrolled otherwise, and some kernels spill.)
        """
        return "compute_86" if self.number == 89 and not self.suffix else f"compute_{self.number}{self.suffix}"

    @property
    def gencode(self) -> list[str]:
        codes = [self.name, self.virtual] if self.ptx else [self.name]
        return [f"-gencode=arch={self.virtual},code={code}" for code in codes]


def parse_archs(text: str) -> list[Arch]:
    """Reads "8.0;9.0a+PTX", also separated by commas or spaces. Raises ToolkitError on what is no architecture."""
    archs = []
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if not match:
            raise ToolkitError(f'FASTRNN_CUDA_ARCHS: expected entries like "8.0", "9.0a" or "12.0+PTX", got {word!r}')
        arch = Arch(10 * int(match[1]) + int(match[2]), match[3], bool(match[4]))
        if arch.number < OLDEST_ARCH:
            raise ToolkitError(f"FASTRNN_CUDA_ARCHS: the kernels need 8.0 or newer, got {word}")
        archs.append(arch)
    return archs


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: tuple[int, int]
    root: Path
    include_dirs: tuple[Path, ...]
    library_dirs: tuple[Path, ...]

    def command(self, archs: Sequence[Arch], include: Path, *flags: str) -> list[str]:
        """nvcc with everything but source and object."""
        host = os.environ.get("CXX")
        bin_dir = ["-ccbin", shlex.split(host)[0]] if host else []
        gencode = [flag for arch in archs for flag in arch.gencode]
        # A third of the size. Drivers of CUDA 12.4 and newer read it.
        packed = ["--compress-mode=size"] if self.version >= (12, 8) else []
        return [self.nvcc, *NVCC_FLAGS, *packed, *bin_dir, f"-I{include}", *gencode, *flags]


def candidates(environment: Mapping[str, str]) -> Iterator[str]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            inside = Path(environment[name]) / "bin" / "nvcc"
            if not inside.is_file():
                raise ToolkitError(f"{name}={environment[name]}: there is no bin/nvcc in it")
            yield str(inside)
    for nvcc in (shutil.which("nvcc", path=environment.get("PATH")), "/usr/local/cuda/bin/nvcc"):
        if nvcc and Path(nvcc).is_file():
            yield nvcc


def find_toolkit(environment: Mapping[str, str] = os.environ) -> Toolkit:
    """The toolkit of CUDA_HOME, CUDA_PATH, the nvcc on PATH or the usual folder, in this order.

    An nvcc may be a script that calls one elsewhere, so its folder says nothing: nvcc itself is asked, whose dry run
    prints TOP (its root), INCLUDES and LIBRARIES without running anything.
    """
    nvcc = next(candidates(environment), None)
    if nvcc is None:
        raise ToolkitError("nvcc was not found (put it on PATH or set CUDA_HOME)")
    dry = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.M)
    root = Path(os.path.realpath(top[1].strip())) if top else Path(os.path.realpath(nvcc)).parent.parent

    def listed(variable: str, option: str) -> list[Path]:
        line = re.search(rf"^#\$ {variable}=(.*)$", dry, re.M)
        return [Path(os.path.realpath(p)) for p in re.findall(rf'"{option}([^"]+)"', line[1])] if line else []

    version = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    if not version:
        raise ToolkitError(f"{nvcc} --version names no release; is it nvcc?")
    includes = [p for p in (*listed("INCLUDES", "-I"), root / "include") if p.is_dir()]
    libraries = [p for p in (*listed("LIBRARIES", "-L"), root / "lib64", root / "lib") if p.is_dir()]
    return Toolkit(nvcc, (int(version[1]), int(version[2])), root, tuple(includes), tuple(libraries))


def pip_folders(name: str) -> list[Path]:
    """Folders `name` (include, lib, bin) of the CUDA libraries that pip installed, such as nvidia/cu13/include."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    return sorted(p for root in roots for p in Path(root).glob(f"*/{name}") if p.is_dir())


def header_dirs(toolkit: Toolkit, headers: Sequence[str] = ATEN_NEEDS) -> list[Path]:
    """Include folders that together hold all headers, the toolkit's first."""
    found: list[Path] = []
    for header in headers:
        known = [*toolkit.include_dirs, *pip_folders("include")]
        folder = next((p for p in known if (p / header).is_file()), None)
        if folder is None:
            raise ToolkitError(
                f"{header} is neither in the toolkit ({toolkit.root}) nor in a CUDA library installed by pip"
            )
        if folder not in found:
            found.append(folder)
    return found


def runtime_library(toolkit: Toolkit) -> Path:
    """libcudart to link against. The process loads torch's, by its soname, so only the major version matters."""
    names = ("libcudart.so", f"libcudart.so.{toolkit.version[0]}")
    for folder in (*toolkit.library_dirs, *pip_folders("lib")):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise ToolkitError(f"{names[1]} is neither in the toolkit ({toolkit.root}) nor installed by pip")


def find_tool(name: str, toolkit: Toolkit | None = None) -> str | None:
    """A program such as cuobjdump: from the toolkit, PATH, pip (nvidia-cuda-cuobjdump, ...) or Triton's wheel."""
    folders = [toolkit.root / "bin"] if toolkit else []
    on_path = shutil.which(name)
    folders += [Path(on_path).parent] if on_path else []
    folders += pip_folders("bin")
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders += sorted(Path(triton.origin).parent.glob("backends/*/bin"))
    return next((str(f / name) for f in folders if os.access(f / name, os.X_OK)), None)
