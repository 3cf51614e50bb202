"""More threads than processors: no call takes more threads than the process may use processors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import _C
from tests.helpers import threads

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment: str) -> list[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


COUNT = """
import os, torch, fastrnn
torch.set_num_threads(8)
module, x = {make}
def tasks():
    return len(os.listdir("/proc/self/task"))
before = tasks()
with torch.inference_mode():
    module(x)
after_forward = tasks()
if {train}:
    x.requires_grad_()
    module(x)[0].sum().backward()
print(len(os.sched_getaffinity(0)), after_forward - before, tasks() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by /proc")
@pytest.mark.parametrize(
    "make",
    [
        "fastrnn.LSTM(64, 256), torch.randn(50, 64, 64)",  # rows are shared out
        "fastrnn.GRU(64, 256), torch.randn(50, 1, 64)",  # units are
        "fastrnn.RNN(64, 256, bidirectional=True).double(), torch.randn(50, 64, 64).double()",
        "fastrnn.quantize(fastrnn.LSTM(64, 256)), torch.randn(50, 64, 64)",
    ],
)
def test_no_more_threads_than_processors(make: str) -> None:
    """Of eight that torch may use. OpenMP starts those that it is asked for."""
    processors, forward, training = map(int, run(COUNT.format(make=make, train="quantize" not in make)))
    assert forward <= min(processors, 8) - 1
    assert training <= min(processors, 8)  # autograd has a thread of its own


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="sets the affinity")
def test_affinity_is_the_limit() -> None:
    code = """
import os, fastrnn
from fastrnn import _C
print(_C.usable_processors())
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(_C.usable_processors())
"""
    before, after = map(int, run(code))
    assert before <= len(os.sched_getaffinity(0))
    assert after == 1


def test_quotas_of_control_groups(tmp_path: Path) -> None:
    """Of a group and its ancestors, in both versions of Linux' control groups; what is not there limits nothing."""

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    def quota(membership: str) -> float:
        return _C.cpu_quota(membership, str(tmp_path))

    assert quota("") == quota("0::/a/b\n") == quota("nonsense") == 0
    write("a/cpu.max", "max 100000\n")
    assert quota("0::/a/b\n") == 0
    write("a/b/cpu.max", "150000 100000\n")
    assert quota("0::/a/b\n") == 1.5
    write("a/cpu.max", "50000 100000\n")
    assert quota("0::/a/b\n") == 0.5
    assert quota("0::/elsewhere\n") == quota("0::/\n") == 0
    write("cpu.max", "400000 100000\n")  # a container that sees its own group as the root
    assert quota("0::/\n") == quota("0::/not/seen\n") == 4
    for folder in ("cpu,cpuacct", "cpu"):
        write(f"{folder}/c/cpu.cfs_quota_us", "-1\n")
        write(f"{folder}/c/cpu.cfs_period_us", "100000\n")
    assert quota("4:cpu,cpuacct:/c\n3:memory:/c\n") == 0
    write("cpu,cpuacct/c/cpu.cfs_quota_us", "250000\n")
    assert quota("4:cpu,cpuacct:/c/d\n3:memory:/c\n") == 2.5
    assert quota("3:memory:/c\n") == 0


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_threads_beyond_the_processors_change_no_bit(kind: str) -> None:
    """The thread count that results depend on is the smaller of the two."""
    module = getattr(fastrnn, kind)(32, 200, 2, bidirectional=True)
    x = torch.randn(40, 24, 32)
    results = []
    for count in (_C.usable_processors(), 4 * _C.usable_processors()):
        with threads(count):
            output, _ = module(x)
            results.append((output, *torch.autograd.grad(output.square().sum(), tuple(module.parameters()))))
    for few, many in zip(*results, strict=True):
        assert torch.equal(few, many)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("hidden", [1, 17, 129])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_turns_of_single_steps_change_no_bit(kind: str, hidden: int, rows: int) -> None:
    """Calls of one step go over the weights in one direction and the other, in turn."""
    module = getattr(fastrnn, kind)(3, hidden, bidirectional=True)
    x = torch.randn(1, rows, 3)
    for count in (1, 2):
        with threads(count), torch.inference_mode():
            first, *others = (module(x)[0] for _ in range(4))
        assert all(torch.equal(first, other) for other in others)
