"""A short, equal portion of `make fuzz`, and the runner itself. Cases that have failed once stand in test_found.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.fuzz import calls, modules
from tests.fuzz.__main__ import guard

ROOT = Path(__file__).resolve().parents[2]
ALIKE = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@settings(ALIKE, max_examples=30)
@given(modules.CASES)
def test_modules(case: dict[str, Any]) -> None:
    modules.run(case)


@settings(ALIKE, max_examples=400)
@given(calls.CASES)
def test_calls(case: dict[str, Any]) -> None:
    calls.run(case)


def test_every_op_has_cases() -> None:
    """But for cell_names, which has no argument."""
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastrnn::")}
    assert {*calls.OPS} == names - {"cell_names"}


def plain_case() -> dict[str, Any]:
    case = {"kind": "LSTM", "dtype": "float64", "T": 3, "B": 2, "input_size": 3, "hidden_size": 4, "num_layers": 1}
    rest = (
        ("mode", "grad"),
        ("layout", "padded"),
        ("strides", "contiguous"),
        ("scale", 1.0),
        ("threads", 1),
        ("seed", 5),
    )
    off = ("training", "state", "resets", "reset_state", "layer_norm", "peephole", "without_grad", "proj_size")
    off += ("token_input",)
    none = {"zoneout": 0.0, "dropout": 0.0, "locked_dropout": 0.0, "lengths": None}
    return case | dict(rest) | dict.fromkeys(off, False) | none | {"num_heads": 1, "way": "forward"}


def test_noise_of_packed_tokens() -> None:
    """The module pads them first, and draws as much noise as the padding takes."""
    more = {"layout": "packed", "token_input": True, "zoneout": 0.2, "training": True, "B": 3, "seed": 0}
    modules.run(plain_case() | more)


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is one: of a result that is wrong in one number, and of a gradient."""
    case = plain_case()
    modules.run(case)
    actual = modules._Call.actual
    for wrong in (lambda x: torch.cat([x[:-1], x[-1:] * (1 + 1e-6)]), lambda x: x.detach() + (x - x.detach()) * 1.001):
        monkeypatch.setattr(modules._Call, "actual", lambda self, leaves: [wrong(x) for x in actual(self, leaves)])
        with pytest.raises(AssertionError, match=r"error .* is above"):
            modules.run(case)


@pytest.mark.parametrize("mode", ["grad", "jvp", "twice"])
@pytest.mark.parametrize("dtype", modules.DTYPES)
def test_wrong_derivatives_are_found(dtype: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One gradient that is half too large, in every dtype; by jvp the part of a slope that this leaf brings."""
    case = plain_case() | {"dtype": dtype, "mode": mode, "T": 8, "B": 8}
    modules.run(case)
    actual = modules._Call.actual

    def steeper(self: modules._Call, leaves: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        x = leaves["weight_hh_l0"]
        return actual(self, leaves | {"weight_hh_l0": x.detach() + (x - x.detach()) * 1.5})

    monkeypatch.setattr(modules._Call, "actual", steeper)
    with pytest.raises(AssertionError, match=r"(grad|slope) of .*: error .* is above"):
        modules.run(case)


WRITES = """
import ctypes
libc, p = ctypes.CDLL(None), ctypes.c_void_p()
assert libc.posix_memalign(ctypes.byref(p), 64, 20) == 0
assert ctypes.string_at(p, 20) == b"\\xff" * 20
ctypes.memset(p.value + {at}, 0, 1)
libc.free(p)
print("unseen", flush=True)
"""


@pytest.fixture(scope="module")
def red_zones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guard(tmp_path_factory.mktemp("guard"))


@pytest.mark.parametrize("at", [0, 19, 20, 83, -1, -32])
def test_guard(at: int, red_zones: Path) -> None:
    """A byte written outside of 20 ends the process; one inside does not, and fresh memory is NaN."""
    env = {**os.environ, "LD_PRELOAD": str(red_zones), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WRITES.format(at=at)], env=env, capture_output=True, text=True)
    inside = 0 <= at < 20
    assert (done.stdout == "unseen\n") == inside, done.stderr
    assert ("guard: memory was written outside" in done.stderr) != inside


def test_runner(tmp_path: Path) -> None:
    """A crash tells its case, with which it happens again."""
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "20", "--processes", "1", "--kinds", "calls"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "exit status -11; the case again:\npython -m tests.fuzz --case '{" in done.stdout
    assert "}' --isa " in done.stdout


CRASH = """
import sys
if "--work" in sys.orig_argv:
    import ctypes
    from tests.fuzz import calls
    calls.run = lambda case: ctypes.string_at(0)
"""
