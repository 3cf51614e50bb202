"""tools/carried_objects.py: objects of what knows no torch, for a build on another machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import carried_objects  # noqa: E402

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A tree of one file of each kind."""
    files = {
        "cpu/team.cpp": '#include "../params.h"\nint team() { return kNumber; }\n',
        "cuda/grid.cu": '#include "params.h"\n__global__ void kernel(int* x) { *x = kNumber; }\n',
        "cuda/tiles.cuh": "\n",
        "torch/ops.cpp": "#error of no use here\n",
        "params.h": "constexpr int kNumber = 1;\n",
    }
    (tmp_path / "setup.py").touch()
    for name, text in files.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(carried_objects, "ROOT", tmp_path)
    return tmp_path / "csrc"


@needs_nvcc
def test_objects_fit_what_they_were_made_of(sources, tmp_path, capsys):
    folder = tmp_path / "objects"
    assert "there is no objects.json" in carried_objects.misfit(folder, "9.0a", 13)
    assert carried_objects.main([str(folder), "--archs", "9.0a"]) == 0
    assert "2 objects for 9.0a" in capsys.readouterr().out
    assert {path.name for path in carried_objects.objects(folder, cuda=True)} == {"cpu-team.o", "cuda-grid.o"}
    symbols = subprocess.run(["nm", *carried_objects.objects(folder, cuda=True)], capture_output=True, text=True).stdout
    assert "_Z4teamv" in symbols and "_Z6kernelPi" in symbols
    major = carried_objects.find_toolkit().version[0]
    assert carried_objects.misfit(folder, "9.0a", major) == ""
    assert "archs: expected 8.0, got 9.0a" in carried_objects.misfit(folder, "8.0", major)
    assert f"cuda: expected {major + 1}, got {major}" in carried_objects.misfit(folder, "9.0a", major + 1)
    (sources / "torch/ops.cpp").write_text("// another one\n")
    assert carried_objects.misfit(folder, "9.0a", major) == ""
    for name in ("params.h", "cpu/team.cpp", "cuda/tiles.cuh"):
        before = (sources / name).read_text()
        (sources / name).write_text(before + "// changed\n")
        assert "sources: expected" in carried_objects.misfit(folder, "9.0a", major), name
        (sources / name).write_text(before)


@needs_nvcc
def test_what_does_not_compile_leaves_nothing_to_use(sources, tmp_path, capsys):
    folder = tmp_path / "objects"
    assert carried_objects.main([str(folder)]) == 0
    (sources / "cuda/grid.cu").write_text("no code\n")
    assert carried_objects.main([str(folder)]) == 1
    assert "carried_objects: grid.cu does not compile" in capsys.readouterr().err
    assert not (folder / "objects.json").exists()


def test_the_cpus_are_those_that_were_built_in_place(sources, tmp_path, capsys):
    """For a build without CUDA, as long as no source is newer."""
    folder, built = tmp_path / "objects", tmp_path / "build/temp.linux/csrc/cpu/team.o"
    built.parent.mkdir(parents=True)
    built.write_bytes(b"an object")
    for made, seconds in ((b"an object", 1), (b"\x7fELF", -1)):
        time = (sources / "params.h").stat().st_mtime + seconds
        os.utime(built, (time, time))
        assert carried_objects.main([str(folder), "--cpu"]) == 0
        assert "1 objects for the CPU" in capsys.readouterr().out
        (only,) = carried_objects.objects(folder, cuda=False)
        assert only.name == "cpu-team.o" and only.read_bytes().startswith(made)
        assert carried_objects.misfit(folder, "", 0) == ""
    assert "archs: expected 9.0a, got none; cuda: expected 13, got none" in carried_objects.misfit(folder, "9.0a", 13)
    (sources / "cuda/tiles.cuh").unlink()
    assert "sources: expected" in carried_objects.misfit(folder, "", 0)
