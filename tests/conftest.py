"""Every test starts from the same seed, with one thread (a test about threads asks for more), and exact float32."""

import gc
import random
import signal
import sys
from collections import defaultdict

import pytest
import torch

from .helpers import allow_cudnn_tf32


def pytest_addoption(parser):
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="run one in N of each test's cases")


@pytest.hookimpl(trylast=True)  # of what -k and --deselect leave
def pytest_collection_modifyitems(config, items):
    """Keeps the cases of --one-in, drawn at random: the same ones each time, and of every test at least one."""
    one_in = config.getoption("one_in")
    if one_in < 1:
        raise pytest.UsageError(f"--one-in: expected 1 or more, got {one_in}")
    if one_in == 1:
        return
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for test, of_test in cases.items():
        kept.update(random.Random(test).sample(of_test, -(-len(of_test) // one_in)))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_configure():
    # A shell has what it starts in the background ignore Ctrl-C, and so would the programs that tests send it to.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(20260101)
    torch.set_num_threads(1)
    allow_cudnn_tf32(False)
    # Garbage is collected between tests alone: a collection in the instant in which torch.compile(fullgraph=True) waits
    # for a function's frame may close somebody's forgotten generator, whose frame it then refuses.
    gc.disable()
    yield
    gc.enable()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
