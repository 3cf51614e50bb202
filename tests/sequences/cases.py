"""What the tests of sequence options share: modules that take tokens, everyday parameters, whole calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrnn.options import SWITCHES
from tests.helpers import (
    KINDS,
    Results,
    State,
    collect,
    leaf,
    map_state,
    pair,
    tensors,
)

KIND = pytest.mark.parametrize("kind", KINDS)
SIZES = (1, 3, 17, 129)
DEEP = {"num_layers": 2, "bidirectional": True}
LENGTHS = torch.tensor([5, 2, 1, 4])
# of an LSTM; layer_norm goes without peepholes
ALL: dict[str, Any] = {name: name != "layer_norm" for name in SWITCHES if name != "reset_after"}


def results(module: nn.Module, input: Any, hx: State = None, **options: Any) -> Results:
    """Of a call and its backward pass: output, states, and gradients of states and parameters."""
    module.zero_grad()
    hx = map_state(leaf, hx)
    output, finals, *_ = module(input, hx, **options)
    return collect(
        output, finals, dict(zip(("h_0", "c_0"), tensors(hx), strict=False)) | dict(module.named_parameters())
    )


def token_pair(kind: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, which takes tokens, torch.nn's) with the same parameters."""
    ours, theirs = pair(kind, *args, **kwargs)
    ours.token_input = True
    return ours, theirs


def random_tokens(*shape: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, shape)


def one_hot(tokens: Tensor, vocabulary: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.one_hot(tokens.long(), vocabulary).to(dtype)


def enlarged(module: nn.Module) -> nn.Module:
    """With parameters of everyday size, learned states included, which start as zeros."""
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) * 0.6)
    return module
