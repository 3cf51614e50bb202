"""cross_build.py {linux-aarch64,macos-arm64} [FOLDER]: compiles and links the extension for another machine than this.

    python tools/cross_build.py macos-arm64         # build/cross/macos-arm64/fastrnn/_C.cpython-311-darwin.so
    python tools/cross_build.py linux-aarch64       # g++-aarch64-linux-gnu has to be there

torch's headers and libraries are those of its wheel for that machine, of a version that has one (`--torch`), Python's
headers this interpreter's. macOS' compiler and libraries are those of the package ziglang, which is clang; Linux' is
the cross-compiler of the distribution. Flags and files are those of setup.py. It shows that everything compiles, and
that nothing is missing but what torch and Python bring; to run it takes such a machine, or qemu.
"""

from __future__ import annotations

import argparse
import os
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
# The wheel's platform; Python's name for the system; options of the linker beside the libraries; the module's suffix.
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
}


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True)


def compiler(target: str, folder: Path) -> list[str]:
    if target == "linux-aarch64":
        return ["aarch64-linux-gnu-g++"]
    python = folder / "zig/bin/python"
    if not python.exists():
        venv.create(folder / "zig", with_pip=True)
        run(python, "-m", "pip", "install", "--quiet", "ziglang")
    return [str(python), "-m", "ziglang", "c++", "-target", "aarch64-macos"]


def torch_of(version: str, platform: str, folder: Path) -> Path:
    """The unpacked wheel's torch/."""
    place = folder / f"torch-{version}"
    if not (place / "torch").exists():
        options = ("--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={TAG}")
        run(sys.executable, "-m", "pip", "download", "--quiet", *options, f"--platform={platform}",
            f"--dest={folder}", f"torch=={version}")  # fmt: skip
        (wheel,) = folder.glob(f"torch-{version}*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        wheel.unlink()
    return place / "torch"


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
    torch = torch_of(options.torch, platform, folder)

    includes = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    flags = [*carried_objects.OTHER_FLAGS, *carried_objects.OPENMP[system]]
    flags += ["-fPIC", "-DNDEBUG", "-g0", "-Werror", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    flags += ["-DTORCH_EXTENSION_NAME=_C", f'-DFASTRNN_TORCH="{options.torch}"', *(f"-isystem{p}" for p in includes)]
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
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    run(*command, *objects, *(word.format(exports=exports) for word in linked), *libraries, "-o", module)
    print(f"{module}: {module.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
