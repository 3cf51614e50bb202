"""How weight matrices are rounded to narrower numbers: for inference (quantized.py) and, still float32, in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

DTYPES = (torch.int8, torch.bfloat16)


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., n] as scale [..] times whole numbers [.., n] in -127..127, both of x's dtype: symmetric, by row."""
    scale = x.abs().amax(-1) / 127
    smallest = torch.finfo(torch.float32).tiny  # of a row of zeros
    return (x / scale.clamp(min=smallest)[..., None]).round().clamp(-127, 127), scale


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What the narrow weight stands for, in the dtype of the exact one."""
    if dtype == torch.bfloat16:
        return weight.to(dtype).to(weight.dtype)
    whole, scale = int8_rows(weight)
    return whole * scale[..., None]


def narrow_fields(dtype: torch.dtype) -> tuple[str, ...]:
    """Of LayerWeights: those that are rounded."""
    return ("weight_ih", "weight_hh") if dtype == torch.int8 else ("weight_ih", "weight_hh", "weight_hr")


class Rounded(nn.Module):
    """A parametrization: the weight rounded, with the gradient of the weight itself."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        """weight [.., n] -> the same shape and dtype."""
        nothing = weight - weight.detach()  # 0, of which every derivative is the weight's
        return rounded(weight.detach(), self.dtype) + nothing

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to the parametrized weight is the exact one."""
        return weight

    def extra_repr(self) -> str:
        return str(self.dtype)


def is_rounded(module: nn.Module, name: str) -> bool:
    """Has the parameter of this name been parametrized so, behind all else?"""
    return parametrize.is_parametrized(module, name) and isinstance(module.parametrizations[name][-1], Rounded)  # type: ignore[union-attr, index]


def unrounded(module: nn.Module, name: str) -> Tensor:
    """A parametrized weight as it is before it is rounded."""
    chain: Any = module.parametrizations[name]  # type: ignore[union-attr, index]
    first, *others = chain
    given = [chain.original] if chain.is_tensor else [getattr(chain, f"original{i}") for i in range(chain.ntensors)]
    if not others:
        return given[0]  # the rounding is all that there is
    weight = first(*given)
    for each in others[:-1]:
        weight = each(weight)
    return weight
