"""Builds the extension module fastrnn._C and says which torch it needs; everything else stands in pyproject.toml.

Environment:
  CXX                 the C++ compiler: g++ 12 or newer, on macOS clang. Default: c++.
  FASTRNN_CUDA        1: build the CUDA kernels, 0: do not. Default: build them if torch is a CUDA build and an nvcc of
                      the same CUDA major version is found. Whether this machine has a GPU plays no part.
  FASTRNN_CUDA_ARCHS  compute capabilities to build for, e.g. "9.0a" or "8.0;9.0a+PTX".
  CUDA_HOME           the CUDA toolkit. Default: that of the nvcc on PATH, which may be a script that calls another.
  MAX_JOBS            compiler processes at once (torch's own variable).
  FASTRNN_OBJECTS     a folder of objects that tools/carried_objects.py has made: on another machine, for another torch.
  FASTRNN_LABEL       1: the wheel's version names its torch (0.1.0+torch2.13.0): wheels for two have two file names.
  FASTRNN_SANITIZE    sanitizers of the compiler (address,undefined) to build C++ with, and of the CPU's kernels the
                      baseline's alone; see tools/sanitize.sh.
  FASTRNN_DEBUG_INFO  1: keep debug information, lines of kernels included, which makes the module ten times as large.

Kernels (csrc/cuda/*.cu) are compiled by a ninja file of ours and linked as objects, not by torch's CUDAExtension, which
would put torch's headers on their include path. Only csrc/torch/ sees those.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:  # packing the sources needs no torch
    torch, BuildExtension, CppExtension = None, object, object

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))  # a build backend does not put the project on the path

import carried_objects  # noqa: E402
import cuda_toolkit  # noqa: E402
from build_backend import TORCH, local_label, public_version  # noqa: E402
from cuda_toolkit import ToolkitError  # noqa: E402

# pip's ninja stands beside an interpreter that need not be on PATH; without ninja torch compiles file after file.
os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))

MACOS = sys.platform == "darwin"
OLDEST_GCC = 12
KERNELS = sorted(ROOT.glob("csrc/cuda/*.cu"))


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def switch(name: str) -> str:
    """An environment variable that is "0", "1" or, where it is not set, ""."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return value


def cuda() -> cuda_toolkit.Toolkit | None:
    """The toolkit to build CUDA kernels with, or None for a build without them."""
    wanted = switch("FASTRNN_CUDA")
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
    """Compiles `extension.kernels`, if any, before torch's BuildExtension compiles the rest and links.

    The module exports its entry alone: symbols of a C++ library that is linked into it would meet those of torch's.
    """

    def build_extensions(self):
        check_compiler(os.environ.get("CXX", "c++"))
        super().build_extensions()

    def build_extension(self, extension):
        if MACOS:
            extension.extra_link_args.append("-Wl,-exported_symbol,_PyInit__C")
        else:
            exports = Path(self.build_temp).resolve() / "exports.map"
            exports.parent.mkdir(parents=True, exist_ok=True)
            exports.write_text(carried_objects.EXPORTS)
            extension.extra_link_args.append(f"-Wl,--version-script={exports}")
        if kernels := getattr(extension, "kernels", None):
            extension.extra_objects += self.compile_kernels(*kernels)
        super().build_extension(extension)

    def compile_kernels(self, toolkit, archs):
        folder = Path(self.build_temp).resolve() / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        threads = max(1, jobs // len(KERNELS))  # one file's architectures side by side
        debug = ["-lineinfo", "-Xcompiler=-g"] if switch("FASTRNN_DEBUG_INFO") == "1" else []
        command = toolkit.command(archs, ROOT / "csrc", f"--threads={threads}", *debug)
        objects = [folder / f"{source.stem}.o" for source in KERNELS]
        lines = [
            "rule nvcc",
            f"  command = {' '.join(ninja_word(word) for word in command)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            *(f"build {ninja_path(o)}: nvcc {ninja_path(s)}" for o, s in zip(objects, KERNELS, strict=True)),
        ]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        if shutil.which("ninja") is None:
            raise SystemExit("fastrnn: building CUDA kernels needs ninja (pip install ninja)")
        if subprocess.run(["ninja", "-C", str(folder), "-j", str(jobs)]).returncode:
            raise SystemExit("fastrnn: a CUDA kernel did not compile; nvcc's messages stand above")
        return [str(o) for o in objects]


class Info(egg_info):
    """Ends the version with `label`. An option of setup() would lose against the setup.cfg that packed sources have."""

    label = ""

    def finalize_options(self):
        self.tag_build = self.label or self.tag_build
        super().finalize_options()


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_word(word: str) -> str:
    """For a command line, which ninja hands to the shell."""
    return shlex.quote(word).replace("$", "$$")


def check_compiler(command: str) -> None:
    """torch's own check warns, and the first thousand lines of errors come after it."""
    words = shlex.split(command)
    if not words or shutil.which(words[0]) is None:
        raise SystemExit(
            f"fastrnn: the C++ compiler {command!r} was not found: install g++ {OLDEST_GCC} or newer, or set CXX"
        )
    told, version = (
        subprocess.run([*words, *options], capture_output=True, text=True).stdout.strip()
        for options in (["--version"], ["-dumpfullversion", "-dumpversion"])
    )
    if "Free Software Foundation" in told and int(version.split(".")[0]) < OLDEST_GCC:
        raise SystemExit(f"fastrnn: {command!r} is g++ {version}: expected {OLDEST_GCC} or newer (CXX names another)")
    if "clang" in told and not MACOS:  # its OpenMP is LLVM's and torch's is GNU's: there would be two sets of threads
        raise SystemExit(f"fastrnn: {command!r} is clang: expected g++ {OLDEST_GCC} or newer (CXX names another)")


def check_torch() -> None:
    if torch is None:
        raise SystemExit(
            "fastrnn: there is no torch in this environment, and the extension is built for the one that is: install "
            f"{TORCH} first"
        )
    lowest, too_new = ([int(n) for n in version.split(".")] for version in re.findall(r"\d+\.\d+", TORCH))
    if not lowest <= [int(n) for n in torch.__version__.split(".")[:2]] < too_new:
        raise SystemExit(f"fastrnn: expected {TORCH}, got torch {torch.__version__} in this environment")


def carried(archs: str, cuda_major: int) -> list[str]:
    """The objects of FASTRNN_OBJECTS, if it is set."""
    folder = os.environ.get("FASTRNN_OBJECTS")
    if not folder:
        return []
    if why := carried_objects.misfit(Path(folder), archs, cuda_major):
        raise SystemExit(f"FASTRNN_OBJECTS: {why}: make them anew with tools/carried_objects.py")
    return [str(path.resolve()) for path in carried_objects.objects(Path(folder), bool(archs))]


def extension(toolkit: cuda_toolkit.Toolkit | None) -> CppExtension:
    flags = [*carried_objects.CXX_FLAGS]
    flags.append("-g" if switch("FASTRNN_DEBUG_INFO") == "1" else "-g0")  # Python's own flags before it may hold -g
    macros, links = [("FASTRNN_TORCH", f'"{torch.__version__}"')], []
    if sanitizers := os.environ.get("FASTRNN_SANITIZE"):
        # Types of torch's are not known to be what they are in a module that shows its own to nobody.
        links = [f"-fsanitize={sanitizers}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        flags += [*links, "-fno-omit-frame-pointer", "-O1", "-g1"]
        macros.append(("FASTRNN_BASELINE_ALONE", None))
    files = sources("csrc/cpu/*.cpp", "csrc/torch/*.cpp")
    if toolkit is None:
        ready = carried("", 0)
        files = [f for f in files if not f.endswith("_cuda.cpp") and not (ready and f.startswith("csrc/cpu/"))]
        return CppExtension(
            "fastrnn._C",
            files,
            define_macros=macros,
            libraries=["omp"] if MACOS else [],  # torch's, which stands beside its other libraries
            extra_compile_args={"cxx": flags},
            extra_link_args=links,
            extra_objects=ready,
        )
    archs = os.environ.get("FASTRNN_CUDA_ARCHS") or cuda_toolkit.DEFAULT_ARCHS
    try:
        parsed = cuda_toolkit.parse_archs(archs)
        include_dirs = cuda_toolkit.header_dirs(toolkit)
        runtime = cuda_toolkit.runtime_library(toolkit)
    except ToolkitError as error:
        raise SystemExit(f"fastrnn: {error} (FASTRNN_CUDA=0 builds without CUDA)") from None
    files += sources("csrc/cuda/*.cpp")
    ready = carried(archs, toolkit.version[0])
    if ready:
        files = sources("csrc/torch/*.cpp")
    built = CppExtension(
        "fastrnn._C",
        files,
        include_dirs=[str(p) for p in include_dirs],
        define_macros=[
            *macros,
            ("FASTRNN_CUDA_ARCHS", f'"{archs}"'),
            ("FASTRNN_TORCH_CUDA", f'"{torch.version.cuda}"'),
        ],
        libraries=["c10_cuda", "torch_cuda"],
        extra_compile_args={"cxx": flags},
        extra_link_args=[str(runtime)],
    )
    if ready:
        built.extra_objects = ready
    else:
        built.kernels = toolkit, parsed
    return built


def description() -> str:
    """README.md where its images and links would lead nowhere: the links are told as what they are."""
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n", "", (ROOT / "README.md").read_text(), flags=re.M)
    text = re.sub(r"\[([^\]]*)\]\(#[^)]*\)", r"\1", text)
    return re.sub(r"\[[^\]]*\]\((?!https?:)([^)]*)\)", r"`\1` (in the source distribution)", text)


about = {"long_description": description(), "long_description_content_type": "text/markdown"}
if {"sdist", "bdist_wheel"} <= set(sys.argv):
    raise SystemExit("fastrnn: sdist and bdist_wheel differ in the torch they require: make one at a time")
if "sdist" in sys.argv:  # sources can be built for any torch of the range
    setup(install_requires=[TORCH], **about)
else:
    check_torch()
    toolkit = cuda()
    if switch("FASTRNN_LABEL") == "1":
        Info.label = local_label(torch.__version__, toolkit and torch.version.cuda)
    pinned = f"torch=={public_version(torch.__version__)}"  # a build runs under that alone (fastrnn/binary.py)
    commands = {"build_ext": Build, "egg_info": Info}
    setup(ext_modules=[extension(toolkit)], cmdclass=commands, install_requires=[pinned], **about)
