"""Builds the extension module fastrnn._C; everything else about the package stands in pyproject.toml.

Environment:
  FASTRNN_CUDA        1: build the CUDA kernels, 0: do not. Default: build them if torch is a CUDA build and an nvcc of
                      the same CUDA major version is found. Whether this machine has a GPU plays no part.
  FASTRNN_CUDA_ARCHS  compute capabilities to build for, e.g. "9.0a" or "8.0;9.0a+PTX".
  CUDA_HOME           the CUDA toolkit. Default: that of the nvcc on PATH, which may be a script that calls another.
  MAX_JOBS            compiler processes at once (torch's own variable).

Kernels (csrc/cuda/*.cu) are compiled by a ninja file of ours and linked as objects, not by torch's CUDAExtension, which
would put torch's headers on their include path. Only csrc/torch/ sees those.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))  # a build backend does not put the project on the path

import cuda_toolkit  # noqa: E402
from cuda_toolkit import ToolkitError  # noqa: E402

KERNELS = sorted(ROOT.glob("csrc/cuda/*.cu"))


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def cuda() -> cuda_toolkit.Toolkit | None:
    """The toolkit to build CUDA kernels with, or None for a build without them."""
    wanted = os.environ.get("FASTRNN_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"FASTRNN_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    try:
        if torch.version.cuda is None:
            raise ToolkitError("torch is a CPU build")
        if not KERNELS:
            raise ToolkitError("this version has no CUDA kernels")
        toolkit = cuda_toolkit.find_toolkit()
        if toolkit.version[0] != int(torch.version.cuda.split(".")[0]):
            raise ToolkitError(
                f"nvcc is of CUDA {'.'.join(map(str, toolkit.version))}, torch {torch.__version__} of CUDA "
                f"{torch.version.cuda}: the major versions must agree"
            )
        return toolkit
    except ToolkitError as error:
        if wanted == "1":
            raise SystemExit(f"FASTRNN_CUDA=1: {error}") from None
        print(f"fastrnn: building without CUDA kernels: {error}", file=sys.stderr)
        return None


class Build(BuildExtension):
    """Compiles `extension.kernels`, if any, before torch's BuildExtension compiles the rest and links."""

    def build_extension(self, extension):
        if kernels := getattr(extension, "kernels", None):
            extension.extra_objects += self.compile_kernels(*kernels)
        super().build_extension(extension)

    def compile_kernels(self, toolkit, archs):
        folder = Path(self.build_temp).resolve() / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        threads = max(1, jobs // len(KERNELS))  # one file's architectures side by side
        command = toolkit.command(archs, ROOT / "csrc", f"--threads={threads}")
        objects = [folder / f"{source.stem}.o" for source in KERNELS]
        lines = [
            "rule nvcc",
            f"  command = {' '.join(ninja_word(word) for word in command)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            *(f"build {ninja_path(o)}: nvcc {ninja_path(s)}" for o, s in zip(objects, KERNELS, strict=True)),
        ]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        if subprocess.run([*ninja, "-C", str(folder), "-j", str(jobs)]).returncode:
            raise SystemExit("fastrnn: a CUDA kernel did not compile; nvcc's messages stand above")
        return [str(o) for o in objects]


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_word(word: str) -> str:
    """For a command line, which ninja hands to the shell."""
    return shlex.quote(word).replace("$", "$$")


def extension() -> CppExtension:
    # OpenMP is compiled in but not linked: its symbols then come from the runtime that torch has loaded, so that the
    # process has one thread pool and not two.
    flags = ["-std=c++20", "-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
    files = sources("csrc/cpu/*.cpp", "csrc/torch/*.cpp")
    toolkit = cuda()
    if toolkit is None:
        files = [f for f in files if not f.endswith("_cuda.cpp")]
        return CppExtension("fastrnn._C", files, extra_compile_args={"cxx": flags})
    archs = os.environ.get("FASTRNN_CUDA_ARCHS") or cuda_toolkit.DEFAULT_ARCHS
    try:
        parsed = cuda_toolkit.parse_archs(archs)
        include_dirs = cuda_toolkit.header_dirs(toolkit)
        runtime = cuda_toolkit.runtime_library(toolkit)
    except ToolkitError as error:
        raise SystemExit(f"fastrnn: {error} (FASTRNN_CUDA=0 builds without CUDA)") from None
    built = CppExtension(
        "fastrnn._C",
        files + sources("csrc/cuda/*.cpp"),
        include_dirs=[str(p) for p in include_dirs],
        define_macros=[("FASTRNN_CUDA_ARCHS", f'"{archs}"')],
        libraries=["c10_cuda", "torch_cuda"],
        extra_compile_args={"cxx": flags},
        extra_link_args=[str(runtime)],
    )
    built.kernels = toolkit, parsed
    return built


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
