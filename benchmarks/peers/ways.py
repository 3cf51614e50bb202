"""Ways to make a call: the same module under autocast, in a checkpoint, compiled, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

STEPS = 32  # of a cell's loop
Call = Callable[..., Any]


def in_autocast(module: torch.nn.Module) -> Call:
    def call(*arguments: Any, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return module(*arguments, **options)

    return call


def in_checkpoint(module: torch.nn.Module) -> Call:
    return lambda *arguments, **options: checkpoint(module, *arguments, use_reentrant=False, **options)


def compiled(module: torch.nn.Module) -> Call:
    torch._dynamo.reset()
    return torch.compile(module, dynamic=False)


def in_loop(cell: torch.nn.Module) -> Call:
    """A cell, called STEPS times on the same input."""

    def call(input: Tensor, state: Any) -> Any:
        for _ in range(STEPS):
            state = cell(input, state)
        return state

    return call


def by_step(layer: Any) -> Call:
    """One step of a layer by its ``step``, where it has one."""
    if not hasattr(layer, "step"):
        return layer

    def call(input: Tensor, state: Any) -> Any:
        output, state = layer.step(input[0], state)
        return output[None], state

    return call


WAYS: dict[str, Callable[[Any], Call]] = {
    "": lambda module: module,
    "autocast": in_autocast,
    "checkpoint": in_checkpoint,
    "compiled": compiled,
    "loop": in_loop,
    "step": by_step,
}
