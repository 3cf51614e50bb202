"""Which switch float32 products on CUDA obey, and what they ask of cuBLAS, with a cuBLAS of our own. Needs no GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastrnn import _C
from tests.helpers import allow_cudnn_tf32

HERE = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).parent
OPERATIONS = ("rnn", "conv", "matmul", "all")


@pytest.fixture
def precision():
    """Sets torch's switch of an operation on CUDA."""
    before = {name: torch._C._get_fp32_precision_getter("cuda", name) for name in OPERATIONS}
    yield lambda operation, value: torch._C._set_fp32_precision_setter("cuda", operation, value)
    for name, value in before.items():
        torch._C._set_fp32_precision_setter("cuda", name, value)


@pytest.mark.parametrize("matmul", ["ieee", "tf32"])
@pytest.mark.parametrize("rnn", ["ieee", "tf32"])
def test_sequences_obey_cudnn_and_cells_both(precision, rnn, matmul):
    precision("rnn", rnn)
    precision("matmul", matmul)
    assert torch.backends.cudnn.rnn.fp32_precision == rnn and torch.backends.cuda.matmul.fp32_precision == matmul
    assert _C.allow_tf32(2) is (rnn == "tf32")
    assert _C.allow_tf32(1) is (rnn == matmul == "tf32")


def test_the_switches_of_old_and_the_default(precision):
    assert _C.allow_tf32(5) is (torch.backends.cudnn.rnn.fp32_precision == "tf32")
    for allowed in (False, True):
        allow_cudnn_tf32(allowed)
        assert _C.allow_tf32(5) is allowed


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_products_of_every_layout(tmp_path):
    program = tmp_path / "products"
    command = ["g++", "-std=c++20", "-O0", f"-I{HERE / 'cublas'}", f"-I{TORCH / 'include'}"]
    command += [str(HERE / "cublas/products.cpp"), "-o", str(program), f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
    built = subprocess.run([*command, f"-Wl,-rpath,{TORCH / 'lib'}"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 1000
