"""Memory is given back, and where there is none a call fails as torch's do, in a process that goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where nobody else takes memory and little has to be counted."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_no_leak() -> None:
    done = run("from tests.fuzz import soak; print(soak.leaks(2600))")
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_leak_is_found() -> None:
    leaky = "left = []; soak.kinds = lambda: {'one': lambda: left.append(bytes(100)), 'none': lambda: None}"
    done = run(f"from tests.fuzz import soak; {leaky}; print(*soak.leaks(400), sep='|')")
    assert done.stdout.startswith("one: ") and "|" not in done.stdout, done.stdout + done.stderr


# Every call is made with a little more memory to be had than the one before, from none to enough: so each of its
# allocations fails once. 'told' counts the failures, of which torch's own and ours have the same words.
SCARCE = """
import os, resource, sys
import torch, fastrnn
from fastrnn import _C
torch.set_num_threads(1)
torch.manual_seed(0)
module = {make}
x = torch.randn(8, 64, 128, requires_grad=True)
def call():
    output, _ = module(x)
    if {train}:
        return torch.autograd.grad(output.square().sum(), (x, *module.parameters()))
    return (output,)
want = call()
told = set()
enough = 0
for slack in range(120):
    used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (slack << 18), resource.RLIM_INFINITY))
    try:
        got = call()
    except RuntimeError as error:
        told.add("workspace" if "the workspace of a call" in str(error) else "torch")
        assert "can't allocate memory" in str(error), error
        continue
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    assert all(map(torch.equal, got, want))
    del got
    enough += 1
assert enough, "never enough"
print(*sorted(told))
"""


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("make", ["fastrnn.LSTM(128, 256)", "fastrnn.GRU(128, 128, 2, bidirectional=True)"])
def test_failed_allocations(make: str, train: bool) -> None:
    # Memory that is freed goes back to the system, so that every call asks for its own.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    code = SCARCE.format(make=make, train=train)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch", "workspace"]
