"""Every test starts from the same seed, with one thread (a test about threads asks for more), and exact float32."""

import sys

import pytest
import torch

torch.backends.cudnn.allow_tf32 = False  # here, for torch's own test helpers forbid it once they are imported


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(20260101)
    torch.set_num_threads(1)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
