"""Every test starts from the same seed, with one thread (a test about threads asks for more), and exact float32."""

import sys

import pytest
import torch

from .helpers import allow_cudnn_tf32


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(20260101)
    torch.set_num_threads(1)
    allow_cudnn_tf32(False)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
