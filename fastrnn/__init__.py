"""fastrnn: fused LSTM, GRU and Elman networks for PyTorch, drop-in for torch.nn's."""

from .interpreter import check_gil, check_interpreter

check_interpreter()

from . import binary

with binary.checked():  # everything below imports it, too
    from . import _C

check_gil()

from . import autograd as _autograd  # noqa: F401  (gives the ops their derivatives)
from . import flops as _flops  # noqa: F401  (tells FlopCounterMode about the ops)
from . import functional
from .modules import GRU, LSTM, MGU, RNN, GRUCell, LiGRU, LSTMCell, RNNCell
from .quantized import fake_quantize, quantize
from .sequences import detach, pool, streaming
from .slstm import SLSTM
from .swap import convert, patch, to_torch, unconverted
from .weights import from_keras, from_onnx, load_keras, to_keras, to_onnx

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "SLSTM",
    "GRUCell",
    "LSTMCell",
    "LiGRU",
    "RNNCell",
    "build_info",
    "convert",
    "detach",
    "fake_quantize",
    "from_keras",
    "from_onnx",
    "functional",
    "instruction_set",
    "load_keras",
    "patch",
    "pool",
    "quantize",
    "streaming",
    "to_keras",
    "to_onnx",
    "to_torch",
    "unconverted",
]


def build_info() -> dict[str, str | None]:
    """How the extension was built: torch and compiler versions, CUDA architectures (None without CUDA)."""
    return _C.build_info()


def instruction_set() -> str:
    """The instruction set of the CPU kernels in use: 'avx512', 'avx2' or 'baseline', which the environment variable
    FASTRNN_ISA chooses among; or 'avx512bf16' or 'amx', which are 'avx512' but for bfloat16."""
    return _C.instruction_set()
