"""python -m fastrnn, and the planners behind it."""

import json
import subprocess
import sys

import pytest
import torch

import fastrnn
from fastrnn import info
from fastrnn.info import GPUS, Sizes
from tests.helpers import allow_cudnn_tf32

needs_cuda_build = pytest.mark.skipif(not info.has_cuda_kernels(), reason="built without CUDA kernels")
LSTM = Sizes("lstm", "float32", 100, 32, 1, 256, 256)


def run(capsys, *argv):
    status = info.main([*argv, "--json"])
    return status, capsys.readouterr()


def test_environment_is_told(capsys):
    status, out = run(capsys)
    facts = json.loads(out.out)
    assert status == 0 and facts["torch"] == torch.__version__ and facts["fastrnn"] == fastrnn.__version__
    assert facts["instruction_set"] == fastrnn.instruction_set()
    assert facts["cuda_archs"] == fastrnn.build_info()["cuda_archs"]
    assert facts["cells"] == list(fastrnn.ops.CELLS)
    assert "cpu" not in facts and "call" not in facts
    assert info.main([]) == 0
    assert f"torch              {torch.__version__}" in capsys.readouterr().out


def test_runs_as_a_program():
    """By the package's name, and by the module's, which is the same."""
    said = [
        subprocess.run(
            [sys.executable, "-m", name, "--device", "cpu", "--hidden", "64"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in ("fastrnn", "fastrnn.info")
    ]
    assert "split" in said[0] and "instruction_set" in said[0] and said[0] == said[1]


@pytest.mark.parametrize("cell", fastrnn.ops.CELLS)
def test_cpu_choice(cell, capsys):
    status, out = run(capsys, "--cell", cell, "--device", "cpu", "--threads", "2", "--batch", "64")
    told = json.loads(out.out)
    assert status == 0 and told["call"]["cell"] == cell and told["call"]["B"] == 64 and "cuda" not in told
    assert told["cpu"]["road"] == "fused"
    for plan in (told["cpu"]["forward"], told["cpu"]["backward"]):
        assert plan["threads"] == plan["teams"] * plan["team_size"] <= 2


def test_cpu_choice_knows_of_the_projection(capsys):
    """A step of one row is worth a second thread for its two products together, and for neither alone."""
    asked = ("--steps", "1", "--batch", "1", "--hidden", "256", "--device", "cpu", "--threads", "2")
    few, same, half = (
        json.loads(run(capsys, *asked, *more)[1].out)["cpu"]
        for more in (("--features", "1"), (), ("--dtype", "bfloat16"))
    )
    assert (few["forward"]["threads"], same["forward"]["threads"]) == (1, 2)
    assert same["forward"]["steps_at_a_time"] == 1 and same["forward"]["split"] == "units"
    assert few["backward"] == few["forward"] and same["backward"] == same["forward"]
    assert half == same


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_cpu_plan_is_consistent(dtype, threads):
    for batch, groups, hidden in [(1, 1, 8), (1, 1, 1024), (64, 1, 64), (7, 2, 300), (1000, 4, 16)]:
        call = LSTM._replace(dtype=dtype, B=batch, P=groups, h=hidden, R=hidden)
        choice = info.cpu_choice(call, hidden, threads)
        for plan in (choice["forward"], choice["backward"]):
            assert 1 <= plan["threads"] <= threads and plan["teams"] <= groups
            assert (plan["split"] == "none") == (plan["team_size"] == 1)


def test_projection():
    choice = info.cpu_choice(LSTM._replace(R=32), 7, 2)
    assert choice["forward"]["threads"] >= 1
    assert "steps_at_a_time" in choice["backward"], "its gradients are made in the layer's kernel, too"


@pytest.mark.parametrize(
    "argv",
    [
        *(["--proj", "8", "--cell", "gru"], ["--proj", "300"], ["--batch", "-1"], ["--features", "-1"]),
        *([f"--{name}", "0"] for name in ("steps", "batch", "hidden", "features", "proj", "threads")),
    ],
    ids=" ".join,
)
def test_what_fits_nothing_is_refused(argv, capsys):
    status, out = run(capsys, *argv)
    assert status == 2 and "fastrnn: " in out.err


def test_any_option_of_a_call_asks_for_it(capsys):
    for argv in (["--no-tf32"], ["--tf32"], ["--resets"], ["--steps", "3"]):
        assert "steps_at_a_time" in run(capsys, *argv)[1].out, argv
    assert "steps_at_a_time" not in run(capsys)[1].out


@pytest.mark.skipif(info.has_cuda_kernels(), reason="built with CUDA kernels")
def test_cuda_choice_without_cuda_kernels(capsys):
    status, out = run(capsys, "--device", "cuda")
    assert status == 2 and "no CUDA kernels" in out.err


@needs_cuda_build
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("cell", fastrnn.ops.CELLS)
def test_cuda_choice_needs_no_gpu(cell, gpu):
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        for batch, groups, hidden in [(1, 1, 5), (32, 2, 128), (16, 1, 512), (64, 1, 1024), (128, 1, 4096)]:
            for backward in (False, True):
                call = Sizes(cell, dtype, 50, batch, groups, hidden, hidden, lengths=True)
                choice = info.cuda_choice(call, GPUS[gpu], backward, tf32=False)
                assert choice["tier"] in ("step", "resident", "grid")  # cluster: only where it is named
                assert choice["shared_bytes"] <= GPUS[gpu].shared_per_block
                assert not choice["tf32"]
                if choice["tier"] == "grid":  # blocks wait for each other
                    assert choice["blocks"] <= 2 * GPUS[gpu].multiprocessors


@needs_cuda_build
def test_cuda_choice_is_told(capsys):
    status, out = run(capsys, "--device", "cuda", "--gpu", "h100", "--dtype", "bfloat16", "--hidden", "512")
    told = json.loads(out.out)["cuda"]
    assert status == 0 and told["gpu"]["assumed"] == "h100" and told["gpu"]["compute_capability"] == 90
    assert {"tier", "description"} <= told["forward"].keys() & told["backward"].keys()


@needs_cuda_build
def test_tf32_is_what_torch_allows_or_what_is_asked(capsys, monkeypatch):
    monkeypatch.setenv("FASTRNN_CUDA_TIER", "step")
    for allowed in (False, True):
        allow_cudnn_tf32(allowed)
        for asked, expected in ((), allowed), (("--tf32",), True), (("--no-tf32",), False):
            _, out = run(capsys, "--device", "cuda", "--gpu", "h100", *asked)
            told = json.loads(out.out)["cuda"]
            assert told["forward"]["tf32"] is told["backward"]["tf32"] is expected


@needs_cuda_build
def test_a_tier_is_named(capsys, monkeypatch):
    asked = ("--device", "cuda", "--gpu", "h100", "--dtype", "bfloat16", "--hidden", "128")
    for tier in ("step", "resident", "grid", "cluster"):
        monkeypatch.setenv("FASTRNN_CUDA_TIER", tier)
        status, out = run(capsys, *asked)
        told = json.loads(out.out)["cuda"]
        assert status == 0 and told["forward"]["tier"] == told["backward"]["tier"] == tier
    for tier, more in (("grid", ["--proj", "8"]), ("fast", [])):
        monkeypatch.setenv("FASTRNN_CUDA_TIER", tier)
        status, out = run(capsys, *asked, *more)
        assert status == 2 and f"'{tier}' is none, or cannot run this call" in out.err
