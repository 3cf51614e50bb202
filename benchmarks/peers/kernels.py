"""What a call of fastrnn or torch.nn really runs, asked of the libraries themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import Case, is_training
from benchmarks.data import make_data, module_arguments


def torch_kernel(case: Case, mode: str) -> str:
    """oneDNN's fused layer or the ATen loop: whichever the ops show that two steps of this width dispatch."""
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    short = replace(case, family="", T=min(case.T, 2), shortest=min(case.shortest, 1))
    return _torch_kernel(short, mode.partition("-")[0], onednn)


class Dispatched(TorchDispatchMode):
    """Collects the names of the ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@cache
def _torch_kernel(case: Case, mode: str, onednn: bool) -> str:
    from benchmarks.peers.modules import prepare_module  # it is what asks for the name

    module = getattr(torch.nn, case.cell)(**module_arguments(case))
    prepared = prepare_module(module, case, mode, make_data(case))
    gradients = torch.set_grad_enabled(is_training(mode))  # under inference_mode a mode sees aten::lstm, nothing inside
    with gradients, Dispatched() as dispatched:
        prepared.step()
    fused = sorted(name for name in dispatched.names if "mkldnn_rnn" in name)
    return f"oneDNN, fused layer ({', '.join(fused)})" if fused else "ATen, a loop over time of separate ops"


def fastrnn_kernel(case: Case, mode: str) -> str:
    """Instruction set and how the call is shared out over threads, as `python -m fastrnn` tells it."""
    from fastrnn import info

    cell = case.cell.removesuffix("Cell").lower()
    if cell == "rnn":
        cell = f"rnn_{case.nonlinearity or 'tanh'}"
    directions = 2 if case.bidirectional else 1
    R = case.proj or case.H
    call: Any = info.Sizes(cell, case.dtype, case.T, case.B, directions, case.H, R, case.shortest > 0, case.resets > 0)
    choice = info.cpu_choice(call, case.I, torch.get_num_threads())
    plan = ", ".join(
        f"{name} {value}" for name, value in choice["backward" if is_training(mode) else "forward"].items()
    )
    return f"fused, {choice['instruction_set']}" + (f" ({plan})" if plan else "")
