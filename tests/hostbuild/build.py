"""Builds CUDA kernel sources with g++ against the emulator, as one shared object.

    python tests/hostbuild/build.py csrc/cuda/foo_forward.cu my_driver.cpp -o build/hostbuild/libfoo.so

.cu files are kernels and are instrumented, .cpp files are host code and are not. Objects are kept under
build/hostbuild by a hash of their flags, their source and every header, so only what changed is compiled.
"""

import argparse
import fcntl
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / "build" / "hostbuild"
EMULATOR = [
    HERE / name
    for name in (
        "fibers.cpp",
        "schedule.cpp",
        "run.cpp",
        "memory.cpp",
        "races.cpp",
        "words.cpp",
        "collectives.cpp",
        "cluster.cpp",
        "undefined.cpp",
        "report.cpp",
        "c_api.cpp",
    )
]

COMMON = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
# The cell that the tests add, in every library: kernels compile for minutes, and so they do it once.
COMMON += [f'-DFASTRNN_MORE_CELLS="{ROOT / "tests" / "more_cells.h"}"']
HOST = [*COMMON, "-O2", "-ftree-vectorize"]
KERNEL = [
    *COMMON,
    "-x",
    "c++",
    "-O1",
    "-Wno-unknown-pragmas",
    "-fsanitize=thread",
    "--param",
    "tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,shift,signed-integer-overflow,integer-divide-by-zero,alignment,null",
]
# The project's own kernels take longer to compile than to run. They are not optimised, and what their headers mark as
# always_inline is not: copies of it at every call are most of an unoptimised kernel. Undefined behaviour ends the
# process with SIGILL: calls that report it, as in the emulator's own test kernels, take twice as long to compile.
QUICKLY = ["-O0", "-Dalways_inline=unused", "-fsanitize-undefined-trap-on-error"]


def headers_hash():
    digest = hashlib.sha256()
    for folder in (ROOT / "csrc", HERE):
        for path in sorted(folder.rglob("*.h")) + sorted(folder.rglob("*.cuh")):
            digest.update(path.read_bytes())
    digest.update((ROOT / "tests" / "more_cells.h").read_bytes())
    return digest.hexdigest()


def replace_text(path, text):
    """Writes a file that others never see half of."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.rename(path)


def object_of(source, defines, compiler, headers, optimise):
    flags = KERNEL + QUICKLY * (not optimise) if source.suffix == ".cu" else HOST
    flags = flags + [f"-D{d}" for d in defines]
    told = "\0".join([compiler, headers, *flags]).encode()
    key = hashlib.sha256(told + source.read_bytes()).hexdigest()[:16]
    target = OUT / f"{source.stem}-{key}.o"
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one compiles, the others wait and take its object
        if not target.exists():
            partial = target.with_suffix(".partial.o")
            command = [compiler, *flags, "-c", str(source), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            partial.rename(target)
    return target


def build(sources, library, defines=(), compiler=None, jobs=None, optimise=False):
    """Compiles `sources` (.cu and .cpp) and the emulator into `library`; returns its path. Kernels are not optimised,
    unless asked to be.
    """
    compiler = compiler or os.environ.get("CXX", "g++")
    OUT.mkdir(parents=True, exist_ok=True)
    headers = headers_hash()
    every = [Path(source).resolve() for source in (*sources, *EMULATOR)]
    with ThreadPoolExecutor(jobs or min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda source: object_of(source, defines, compiler, headers, optimise), every))
    library = Path(library)
    stamp = library.with_suffix(".objects")
    names = "\n".join(map(str, objects))
    if not (library.exists() and stamp.exists() and stamp.read_text() == names):
        # Several test processes may be here at once: each makes its own and puts it in place whole.
        partial = library.with_suffix(f".{os.getpid()}.so")
        command = [
            compiler,
            "-shared",
            "-Wl,-Bsymbolic",
            "-Wl,-z,defs",
            *map(str, objects),
            "-o",
            str(partial),
            "-ldl",
            "-lrt",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        partial.rename(library)
        replace_text(stamp, names)
    return library


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("-o", dest="library", default=str(OUT / "libhostbuild.so"))
    parser.add_argument("-D", dest="defines", action="append", default=[])
    parser.add_argument("-j", dest="jobs", type=int)
    options = parser.parse_args()
    print(build(options.sources, options.library, options.defines, jobs=options.jobs))
