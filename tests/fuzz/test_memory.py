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


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ("soak.MAY_GROW = 200", ""),  # in three seconds few caches are full
        (
            "left = []; soak.kinds = lambda: {'one': lambda: left.append(bytes(10_000)) or time.sleep(0.001)}",
            "MiB more",
        ),
        ("soak.kinds = lambda: {'one': lambda: 1 / 0}", "ZeroDivisionError"),
    ],
    ids=["ours", "a leak", "an error"],
)
def test_side_by_side(kinds: str, told: str) -> None:
    done = run(f"import time; from tests.fuzz import soak; {kinds}\nprint('found', *soak.side_by_side(0.05, 4))")
    found = done.stdout.partition("found")[2].strip()
    assert told in found if told else done.stdout.endswith("found\n"), done.stdout + done.stderr


def test_large_results() -> None:
    done = run("from tests.fuzz import soak; print(soak.large(1 << 20), soak.large(1 << 60))")
    assert done.stdout.startswith("[] ['large results are left out: expected "), done.stdout + done.stderr


# Every call is made with a little more memory to be had than the one before, from none to enough: so each of its
# allocations fails once. 'told' counts the failures, of which torch's own and ours have the same words.
SCARCE = """
import os, resource, sys
import torch, fastrnn
from torch.nn.utils.rnn import pack_padded_sequence
torch.set_num_threads(1)
torch.manual_seed(0)
module = fastrnn.{make}
x, lengths = torch.randn(8, 64, 128, requires_grad=True), torch.arange(64) % 8 + 1
def gradients(output):
    return torch.autograd.grad(output.square().sum(), (x, *module.parameters()))
def call():
    return {call}
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


@pytest.mark.parametrize(
    ("make", "call"),
    [
        ("LSTM(128, 256)", "[module(x)[0]]"),
        ("LSTM(128, 256)", "gradients(module(x)[0])"),
        ("GRU(128, 128, 2, bidirectional=True)", "[module(x)[0]]"),
        ("GRU(128, 128, 2, bidirectional=True)", "gradients(module(x)[0])"),
        ("GRU(128, 256, dtype=torch.bfloat16)", "gradients(module(x.bfloat16())[0])"),
        ("LSTM(128, 256)", "gradients(module(pack_padded_sequence(x, lengths, enforce_sorted=False))[0].data)"),
        ("LSTMCell(128, 256)", "gradients(module(x.flatten(0, 1))[0])"),
        ("GRU(128, 128)", "torch.func.jvp(lambda x: module(x)[0], (x,), (x,))"),
        ("quantize(fastrnn.LSTM(128, 256))", "[module(x.detach())[0]]"),
        ("quantize(fastrnn.GRU(128, 256), torch.bfloat16)", "[module(x.detach())[0]]"),
    ],
)
def test_failed_allocations(make: str, call: str) -> None:
    # Memory that is freed goes back to the system, so that every call asks for its own.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    code = SCARCE.format(make=make, call=call)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch", "workspace"]
