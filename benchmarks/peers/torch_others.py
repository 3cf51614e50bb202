"""torch.nn in two other ways: without oneDNN, and with weights in int8."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.data import Data, module_arguments
from benchmarks.peers.base import Prepared
from benchmarks.peers.kernels import torch_kernel
from benchmarks.peers.modules import ModulePeer, prepare_module


class AtenPeer(ModulePeer):
    """torch.nn with oneDNN switched off, which is faster for some sizes and which a user can choose, too."""

    def __init__(self) -> None:
        super().__init__("aten", "torch.nn, oneDNN off", "torch.nn", version_of="torch", kernel=torch_kernel)

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        prepared = super().prepare(case, mode, data)
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # flags() sets that one, too

        def context() -> AbstractContextManager[Any]:
            stack = ExitStack()
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(prepared.context())
            return stack

        def results() -> dict[str, torch.Tensor]:
            with context():
                return prepared.results()

        def kernel() -> str:
            with torch.backends.mkldnn.flags(enabled=False):
                return prepared.kernel()

        return replace(prepared, results=results, context=context, kernel=kernel)


class DynamicInt8Peer:
    """torch.ao's dynamic quantization: weights in int8, rows of the input quantized on the way, the rest float32."""

    key, title = "int8", "torch dynamic int8"
    tolerance = 0.2  # of a tensor's largest value; the difference that is found stands in the row

    def missing(self) -> str | None:
        return None if torch.backends.quantized.engine != "none" else "torch was built without a quantized engine"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def supports(self, case: Case, mode: str) -> str | None:
        if mode != "fwd":
            return "inference only"
        if case.dtype != "float32" or case.proj or case.cell == "RNN" or not case.bias:
            return "only float32 LSTM, GRU and cells, with bias and without proj_size"
        return f"it has no {', '.join(case.beyond_torch)}" if case.beyond_torch else None

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        kind = getattr(torch.nn, case.cell)
        module = kind(**module_arguments(case))
        module.load_state_dict(data.weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is to move into a package of its own, and says so
            quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(module), {kind}, dtype=torch.qint8)
        prepared = prepare_module(quantized[0], case, mode, data)
        engine = torch.backends.quantized.engine
        return replace(prepared, tolerance=self.tolerance, kernel=lambda: f"int8 weights, engine {engine}")
