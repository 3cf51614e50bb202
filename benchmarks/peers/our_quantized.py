"""fastrnn.quantize as a contestant: `--ours ourint8` or `--ours ourbf16`, mostly against `int8` and `fastrnn`."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.cases import Case
from benchmarks.data import Data, module_arguments
from benchmarks.peers.base import Prepared
from benchmarks.peers.modules import ModulePeer, prepare_module

TOLERANCE = {torch.int8: 0.2, torch.bfloat16: 0.06}  # of a tensor's largest value; what is found stands in the row


class QuantizedPeer(ModulePeer):
    def __init__(self, key: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        name = str(dtype).removeprefix("torch.")
        super().__init__(key, f"fastrnn, weights {name}", "fastrnn", options=True)

    def supports(self, case: Case, mode: str) -> str | None:
        if mode != "fwd":
            return "inference only"
        if case.tokens or case.recompute or case.variant:
            return "neither tokens nor recompute nor other cells"
        return "only float32 layers" if case.dtype != "float32" or case.is_cell else None

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        module = getattr(self.namespace, case.cell)(**module_arguments(case))
        module.load_state_dict(data.weights)
        prepared = prepare_module(self.namespace.quantize(module, self.dtype), case, mode, data)
        kernel = f"weights {self.dtype}, {self.namespace.instruction_set()}"
        return replace(prepared, tolerance=TOLERANCE[self.dtype], kernel=lambda: kernel)
