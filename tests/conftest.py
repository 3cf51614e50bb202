"""Every test starts from the same seed, with one thread (a test about threads asks for more), and exact float32."""

import gc
import signal
import sys

import pytest
import torch

from .helpers import allow_cudnn_tf32


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
