"""cross_build.py TARGET [FOLDER]: compiles and links the extension for another machine than this.

    python tools/cross_build.py macos-arm64         # build/cross/macos-arm64/fastrnn/_C.cpython-311-darwin.so
    python tools/cross_build.py linux-aarch64       # g++-aarch64-linux-gnu has to be there
    python tools/cross_build.py windows-x86_64      # objects alone, and the kernels' library

torch's headers and libraries are those of its wheel for that machine, of a version that has one (`--torch`), Python's
headers this interpreter's. The compiler and libraries of macOS and Windows are those of the package ziglang, which is
clang; Linux' is the cross-compiler of the distribution. Flags and files are those of setup.py. It shows that everything
compiles, and that nothing is missing but what torch and Python bring; to run it takes such a machine, or qemu.

Windows' torch is made of Microsoft's C++ library, which comes with Visual Studio alone; ziglang's is another, of
another ABI. So the extension is compiled and not linked; what knows no torch is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import carried_objects

ROOT = Path(__file__).resolve().parent.parent
TAG = f"{sys.version_info.major}{sys.version_info.minor}"
# The wheel's platform; Python's name for the system; options of the linker beside the libraries; the file's suffix.
TARGETS = {
    "linux-aarch64": (
        "manylinux_2_28_aarch64",
        "linux",
        ("-shared", "-Wl,--version-script={exports}"),
        f".cpython-{TAG}-aarch64-linux-gnu.so",
    ),
    "macos-arm64": (
        "macosx_11_0_arm64",
        "darwin",
        ("-dynamiclib", "-undefined", "dynamic_lookup", "-lomp"),  # zig's linker has no -exported_symbol
        f".cpython-{TAG}-darwin.so",
    ),
    "windows-x86_64": ("win_amd64", "win32", ("-shared",), ".dll"),
}
ZIG = {"macos-arm64": "aarch64-macos", "windows-x86_64": "x86_64-windows-gnu"}
# Where Windows' Python differs from this interpreter in what Python.h reads. It stands before every file, and Python.h
# includes its own neighbour no more.
PYCONFIG = """\
#include <pyconfig.h>
#define MS_WINDOWS
#define MS_WIN64
#define NT_THREADS
#define Py_ENABLE_SHARED 1
#undef HAVE_PTHREAD_H
#undef HAVE_SYS_SELECT_H
#undef HAVE_SYS_TIME_H
#undef SIZEOF_LONG
#define SIZEOF_LONG 4
#undef SIZEOF_WCHAR_T
#define SIZEOF_WCHAR_T 2
"""


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True)


def compiler(target: str, folder: Path) -> list[str]:
    if target == "linux-aarch64":
        return ["aarch64-linux-gnu-g++"]
    python = folder / "zig/bin/python"
    if not python.exists():
        venv.create(folder / "zig", with_pip=True)
        run(python, "-m", "pip", "install", "--quiet", "ziglang")
    return [str(python), "-m", "ziglang", "c++", "-target", ZIG[target]]


def unpacked(wheel: str, platform: str, folder: Path) -> Path:
    """The wheel's files; `wheel` is name==version, or a name alone."""
    place = folder / wheel.replace("==", "-")
    if not place.exists():
        coming = place.with_suffix(".coming")  # what a broken run has left is no wheel's files
        shutil.rmtree(coming, ignore_errors=True)
        options = ("--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={TAG}")
        run(sys.executable, "-m", "pip", "download", "--quiet", *options, f"--platform={platform}",
            f"--dest={coming}", wheel)  # fmt: skip
        (found,) = coming.glob("*.whl")
        with zipfile.ZipFile(found) as archive:
            archive.extractall(coming)
        found.unlink()
        coming.rename(place)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("folder", nargs="?", type=Path, help="default: build/cross/TARGET")
    parser.add_argument("--torch", default="2.11.0", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    platform, system, linked, suffix = TARGETS[options.target]
    folder = (options.folder or ROOT / "build/cross" / options.target).resolve()
    (folder / "fastrnn").mkdir(parents=True, exist_ok=True)
    command = compiler(options.target, folder)
    torch = unpacked(f"torch=={options.torch}", platform, folder) / "torch"
    windows = system == "win32"

    includes = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    flags = [*carried_objects.OTHER_FLAGS, *carried_objects.OPENMP.get(system, carried_objects.OPENMP["linux"])]
    flags += ["-fPIC", "-DNDEBUG", "-g0", "-Werror", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    flags += ["-DTORCH_EXTENSION_NAME=_C", f'-DFASTRNN_TORCH="{options.torch}"', *(f"-isystem{p}" for p in includes)]
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    if windows:
        # torch's wheel has the library of OpenMP, but neither its header nor what a linker needs. Nothing of torch's is
        # declared as imported: for MinGW no variable of a thread can be, nor a template of a class without linkage.
        openmp = unpacked("intel-openmp", platform, folder)
        (folder / "pyconfig.h").write_text(PYCONFIG)
        (header,), (library,) = openmp.rglob("omp.h"), openmp.rglob("libiomp5md.lib")
        flags += [f"-isystem{header.parent}", "-include", str(folder / "pyconfig.h")]
        flags += ["-DC10_USING_CUSTOM_GENERATED_MACROS"]
        libraries = [str(library)]
    sources = [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/torch/*.cpp")]
    sources = sorted(path for path in sources if not path.stem.endswith("_cuda"))
    objects = [folder / f"{path.stem}.o" for path in sources]

    def compile_one(source: Path, target: Path) -> None:
        run(*command, *flags, "-c", source, "-o", target)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(compile_one, sources, objects))
    exports = folder / "exports.map"
    exports.write_text(carried_objects.EXPORTS)
    module = folder / "fastrnn" / f"_C{suffix}"
    if windows:
        objects = [made for source, made in zip(sources, objects, strict=True) if source.parent.name == "cpu"]
    run(*command, *objects, *(word.format(exports=exports) for word in linked), *libraries, "-o", module)
    print(f"{module}: {module.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
