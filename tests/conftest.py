"""Every test starts from the same seed, with one thread; a test that is about threads asks for more."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(20260101)
    torch.set_num_threads(1)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
