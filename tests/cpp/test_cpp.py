"""The C++ parts by themselves: cells, SIMD maths, and who may include what."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastrnn
from tests.helpers import KINDS_OF_CELLS
from tests.more_cells import AROUND_KERNELS, QUICKLY, WITH_MORE_CELLS, only

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import carried_objects  # noqa: E402

CSRC = ROOT / "csrc"
ISAS = ("avx512bf16", "avx512", "avx2", "baseline")


HERE = ("g++",), ()  # the compiler, and what runs its programs
AARCH64 = ("aarch64-linux-gnu-g++", "-static"), ("qemu-aarch64",)
# An error makes it fail, and so does memory that nothing points to any more.
VALGRIND = ("g++",), ("valgrind", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite")


def compile_and_run(source: Path, out: Path, *flags: str, machine=HERE, arguments=()) -> list[list[str]]:
    """Builds a program with csrc/ as its only include path; returns its output, split into words."""
    compiler, runner = machine
    build = [*compiler, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{CSRC}", *flags]
    subprocess.run([*build, str(source), "-o", str(out)], check=True)
    done = subprocess.run([*runner, str(out), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def runnable(isa: str) -> bool:
    here = fastrnn.instruction_set()
    return ISAS.index(isa) >= (0 if here == "amx" else ISAS.index(here))


# ThreadSanitizer takes twice as long to compile the baseline's. `make sanitize` has all of those under it.
SANITIZED = [
    ("address", "baseline"),
    ("address", "avx512bf16"),
    ("thread", "avx512bf16" if runnable("avx512bf16") else "baseline"),
]


def chosen(isa: str) -> list[str]:
    """The compiler's flag for an instruction set; see csrc/cpu/isa-inl.h."""
    return [] if isa == "baseline" else [f"-DFASTRNN_{isa.upper()}"]


def test_every_cell_backward_matches_central_differences(tmp_path):
    """The package's cells, and those that the tests add to them."""
    rows = compile_and_run(ROOT / "tests/cpp/test_cells.cpp", tmp_path / "cells", WITH_MORE_CELLS)
    assert [row[0] for row in rows] == [*fastrnn.ops.CELLS, "norm"]


@pytest.mark.parametrize("isa", ISAS)
def test_simd_accuracy(isa, tmp_path):
    if not runnable(isa):
        pytest.skip(f"this CPU has no {isa}")
    flags = [*chosen(isa), "-DFASTRNN_TEST_STRIDE=499", "-DFASTRNN_TEST_POINTS=300000"]
    rows = compile_and_run(ROOT / "tests/cpp/test_simd.cpp", tmp_path / "simd", *flags)
    assert len(rows) == 25


@pytest.mark.parametrize(("sanitizer", "isa"), SANITIZED)
def test_cpu_kernels_under_a_sanitizer(sanitizer, isa, tmp_path, monkeypatch):
    """Memory, races, reads before writes; the baseline's kernels stand for all whose text they share. Those that
    multiply pairs have some of their own, but what their threads share is the same. Where it is memory that is looked
    at, 32 and more products are made by a matrix unit in C++: no sanitizer sees what the processor's reads.
    """
    matrix = sanitizer == "address" and isa == "avx512bf16"
    monkeypatch.setenv("FASTRNN_ISA", isa)
    if not runnable(isa):
        pytest.skip(f"this CPU has no {isa}")
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    subprocess.run(["g++", f"-fsanitize={sanitizer}", str(empty), "-o", str(tmp_path / "empty")], check=True)
    if subprocess.run([str(tmp_path / "empty")], capture_output=True).returncode != 0:
        pytest.skip("no program of this sanitizer starts here (some kernels place memory where it cannot be)")
    sources = [str(CSRC / f"cpu/{name}.cpp") for name in (*AROUND_KERNELS, f"isa_{isa}")]
    flags = ["-fopenmp", f"-fsanitize={sanitizer}", *QUICKLY, WITH_MORE_CELLS, only(*KINDS_OF_CELLS), *sources]
    flags += [f"-DFASTRNN_TEST_{isa.upper()}", *(["-DFASTRNN_SOFTWARE_MATRIX"] if matrix else [])]
    if sanitizer == "address":
        # It would look at every variable of a block else: half as long again to compile. And its check of an access is
        # called, not written out at each.
        flags += ["-fno-sanitize-address-use-after-scope", "--param", "asan-instrumentation-with-call-threshold=0"]
    rows = compile_and_run(ROOT / "tests/cpp/test_cpu.cpp", tmp_path / "cpu", *flags, arguments=["160"])
    assert rows == [[isa, "160", "calls"]]


@pytest.mark.skipif(not os.environ.get("FASTRNN_VALGRIND"), reason="takes minutes: make sanitize")
@pytest.mark.parametrize("name", ["cells", "cpu"])
def test_under_valgrind(name, tmp_path):
    """What no sanitizer sees: values that nobody has written, wherever they came from, that decide something."""
    source, out = ROOT / f"tests/cpp/test_{name}.cpp", tmp_path / name
    if name == "cells":
        assert len(compile_and_run(source, out, "-g", WITH_MORE_CELLS, machine=VALGRIND)) == len(fastrnn.ops.CELLS) + 1
    else:
        sources = [str(CSRC / f"cpu/{name}.cpp") for name in (*AROUND_KERNELS, "isa_baseline")]
        flags = ["-fopenmp", "-g", "-O1", WITH_MORE_CELLS, only(*KINDS_OF_CELLS), *sources]
        assert compile_and_run(source, out, *flags, machine=VALGRIND) == [["baseline", "80", "calls"]]


def test_members_of_a_call(tmp_path):
    """Barriers, and the choice between threads and one thread."""
    source = ROOT / "tests/cpp/test_team.cpp"
    assert compile_and_run(source, tmp_path / "team", "-fopenmp", str(CSRC / "cpu/team.cpp")) == [["team"]]


PORTABLE = bool(os.environ.get("FASTRNN_PORTABLE"))  # make test-portable


def needs(*programs: str) -> pytest.MarkDecorator:
    """`make test-portable` sees to it that they are there: then a test without them fails instead."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing) and not PORTABLE, reason=f"no {missing} here")


@needs("aarch64-linux-gnu-g++", "qemu-aarch64")
@pytest.mark.parametrize("name", ["cells", "simd", "cpu"])
def test_on_aarch64(name, tmp_path):
    """Cells, functions of vectors, and whole calls of every cell kind, compiled for NEON and run by an emulator."""
    source, out = ROOT / f"tests/cpp/test_{name}.cpp", tmp_path / name
    if name == "cells":
        rows = compile_and_run(source, out, WITH_MORE_CELLS, machine=AARCH64)
        assert [row[0] for row in rows] == [*fastrnn.ops.CELLS, "norm"]
    elif name == "simd":
        stride = ("-DFASTRNN_TEST_STRIDE=9973", "-DFASTRNN_TEST_POINTS=30000")
        assert len(compile_and_run(source, out, *stride, machine=AARCH64)) == 25
    else:
        files = [str(CSRC / f"cpu/{name}.cpp") for name in (*AROUND_KERNELS, "isa_baseline")]
        flags = ["-fopenmp", WITH_MORE_CELLS, only(*KINDS_OF_CELLS), *files]
        if not PORTABLE:  # `make test-portable` takes its time and optimises, as the extension's build does
            flags += QUICKLY
        assert compile_and_run(source, out, *flags, machine=AARCH64) == [["baseline", "80", "calls"]]


@needs("clang++")
def test_clang_takes_the_kernels():
    """As macOS' compiler does, of which it is a relative: all but the kernels of single processors of x86-64."""
    flags = ["-std=c++20", "-fsyntax-only", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    flags.append("-Wno-deprecated-declarations")  # GNU's own headers use what they call deprecated
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        subprocess.run(["clang++", *flags, "-DFASTRNN_BASELINE_ALONE", str(source)], check=True)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


TORCH = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h)")
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_only_the_binding_includes_torch(path):
    if path.parent.name == "torch":
        return
    assert not [i for i in includes(path) if TORCH.match(i) or "torch/" in i]


@pytest.mark.parametrize("path", [p for p in SOURCES if "cells" in p.parts], ids=lambda p: p.name)
def test_cells_know_no_memory(path):
    text = path.read_text()
    headers = {path.name for path in (CSRC / "cells").glob("*.h")}
    assert set(includes(path)) <= {"cmath", "type_traits", "../host_device.h", *headers}
    code = re.sub(r"//.*", "", text)
    assert "*>" not in code and not re.search(r"\b(float|double|V)\s*\*", code), "a cell takes no pointer"


SYNTAX = ["g++", "-std=c++20", "-fsyntax-only", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
# Kernels of one cell: those of others use the same headers, and the compiler looks at the text of all.
SYNTAX.append(only("lstm"))


@pytest.mark.parametrize("path", sorted((CSRC / "cpu").glob("*.h")), ids=lambda p: p.name)
def test_every_cpu_header_compiles_by_itself(path):
    """It includes what it uses and needs nothing before it, with each size of vectors and with products of pairs."""
    syntax = [*SYNTAX, "-x", "c++", "-"]
    text = f'#include "{path}"\n#include "{path}"\n'
    sizes = ["avx512bf16", "avx2", "baseline"] if path.name.endswith("-inl.h") else ["baseline"]
    for isa in ISAS if path.name == "isa-inl.h" else sizes:
        subprocess.run([*syntax, *chosen(isa)], input=text, text=True, check=True)


def test_cpu_sources_compile_without_torch(tmp_path):
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        subprocess.run([*SYNTAX, str(source)], check=True, cwd=tmp_path)


def test_instruction_sets_share_no_code(tmp_path):
    """A weak symbol that two instruction sets define alike would be merged, and might then be the newer one's."""
    owners: dict[str, str] = {}
    for isa in ISAS:
        out = carried_objects.built_in_place(f"isa_{isa}")  # to compile one takes a minute
        if out is None:
            out = tmp_path / f"{isa}.o"
            command = ["g++", "-std=c++20", "-O1", "-fopenmp", "-fPIC", "-Wno-psabi", "-c"]
            subprocess.run([*command, str(CSRC / f"cpu/isa_{isa}.cpp"), "-o", str(out)], check=True)
        symbols = subprocess.run(["nm", "-C", str(out)], check=True, capture_output=True, text=True).stdout
        for kind, name in re.findall(r"^[0-9a-f]+ ([A-Za-z]) (.*)$", symbols, re.M):
            if kind in "WVu" and not name.startswith("DW.ref"):
                assert f"fastrnn::cpu::{isa}::" in name, f"{name} in {isa} belongs to no instruction set"
                assert owners.setdefault(name, isa) == isa
