"""More threads than processors: no call takes more threads than the process may use processors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastrnn
from fastrnn import _C
from tests.helpers import evaluate, randn, threads

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "SLSTM", "LiGRU", "MGU"])
def test_one_thread_and_two(kind: str, dtype: torch.dtype) -> None:
    """Results and gradients have the same bits each time. One count's differ from the other's by the order of sums
    alone: by 16 eps of the largest value, twice what was seen in calls of random sizes. Sums of half types are float32,
    and what differs is their last rounding.
    """
    narrow = dtype == torch.int8
    if narrow and kind == "SLSTM":
        pytest.skip("it has no narrow weights")
    dtype = torch.float32 if narrow else dtype
    for steps, rows, features, hidden in ((60, 33, 5, 65), (3, 1, 64, 256), (9, 100, 3, 17)):
        module = getattr(fastrnn, kind)(features, hidden, dtype=dtype)
        if narrow:
            module = fastrnn.quantize(module)
        x, found = randn(steps, rows, features, dtype=dtype), []
        for count in (1, 2):
            with threads(count):
                first, *again = ({"output": module(x)[0]} if narrow else evaluate(module, x) for _ in range(3))
            assert all(torch.equal(other[name], first[name]) for other in again for name in first)
            found.append(first)
        for name, one in found[0].items():
            bound = (2 if dtype.itemsize == 2 else 16) * torch.finfo(dtype).eps * one.abs().max()
            assert (one - found[1][name]).abs().max() <= bound, name


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


PIPELINES: dict[str, Callable[[int], Any]] = {
    "lstm": lambda layers: fastrnn.LSTM(24, 40, layers),
    "gru, odd sizes": lambda layers: fastrnn.GRU(17, 33, layers, dtype=torch.float64),
    "rnn without biases": lambda layers: fastrnn.RNN(1, 64, layers, bias=False),
    "projected": lambda layers: fastrnn.LSTM(24, 40, layers, proj_size=7),
    "peephole": lambda layers: fastrnn.LSTM(24, 40, layers, peephole=True),
    "layer norm": lambda layers: fastrnn.GRU(24, 40, layers, layer_norm=True),
    "bfloat16": lambda layers: fastrnn.LSTM(24, 40, layers, dtype=torch.bfloat16),
    "quantized": lambda layers: fastrnn.quantize(fastrnn.GRU(24, 40, layers)),
    "units split": lambda layers: fastrnn.LSTM(24, 129, layers),
}


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(("layers", "steps", "rows"), [(2, 100, 1), (3, 47, 3), (5, 65, 1)])
@pytest.mark.parametrize("case", PIPELINES)
def test_layers_that_follow_each_other(case: str, layers: int, steps: int, rows: int, resets: bool) -> None:
    """In inference, threads may share the layers: what one thread computes, from a state and across resets."""
    torch.manual_seed(steps)
    module = PIPELINES[case](layers)
    dtype = torch.float32 if case == "quantized" else module.weight_ih_l0.dtype
    x = torch.randn(steps, rows, module.input_size, dtype=dtype)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if module.mode == "LSTM" else 1]
    state = tuple(torch.randn(layers, rows, n, dtype=dtype) for n in sizes)
    options = {"resets": torch.rand(steps, rows) < 0.1} if resets else {}
    found = []
    for count in (1, 2, 2):
        with threads(count), torch.inference_mode():
            output, after = module(x, state if len(state) > 1 else state[0], **options)
        found.append([output, *(after if isinstance(after, tuple) else (after,))])
    bound = (2 if dtype.itemsize == 2 else 16) * torch.finfo(dtype).eps
    for alone, first, again in zip(*found, strict=True):
        assert torch.equal(first, again)
        assert (first.double() - alone.double()).abs().max() <= bound * alone.abs().max()
