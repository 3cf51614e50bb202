"""What LSTM, GRU and RNN fill their parameters with beside torch.nn's uniform draws: ``init=`` and ``forget_bias=``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# By mode, the gates that say how long a state is kept, and whether a positive bias makes that longer or shorter.
_KEEPING = {"LSTM": {0: -1, 1: 1}, "GRU": {1: 1}, "LiGRU": {0: 1}, "MGU": {0: -1}}
Init = str | tuple[str, float]  # 'torch', 'orthogonal', 'identity' or ('chrono', T_max)


def check_init(mode: str, bias: bool, init: Any, forget_bias: float | None) -> Init:
    """``init`` and ``forget_bias`` of a module of this mode, torch.nn's word for its cell; a list becomes a tuple."""
    expected = "'torch', 'orthogonal', 'identity' or ('chrono', T_max)"
    if not isinstance(init, (str, tuple, list)):
        raise TypeError(f"init should be {expected}, got: {type(init).__name__}")
    chrono = not isinstance(init, str)
    if chrono:
        if len(init) != 2 or init[0] != "chrono":
            raise ValueError(f"init should be {expected}, got {init!r}")
        longest = init[1]
        if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not 2 <= longest < math.inf:
            raise ValueError(f"T_max of init=('chrono', T_max) should be a number of steps, 2 or more, got {longest!r}")
        if mode not in _KEEPING:
            kinds = ", ".join(_KEEPING)
            raise ValueError(f"init=('chrono', T_max) is only supported for {kinds}: an RNN has no gates")
    elif init not in ("torch", "orthogonal", "identity"):
        raise ValueError(f"init should be {expected}, got {init!r}")
    if init == "identity" and mode != "RNN_RELU":
        kind, _, nonlinearity = mode.partition("_")
        got = f"{kind} with {nonlinearity.lower()!r}" if nonlinearity else kind
        raise ValueError(f"init='identity' is only supported for RNN with nonlinearity 'relu' (IRNN), got {got}")
    if forget_bias is not None and chrono:
        raise ValueError(f"forget_bias should be None with init={init!r}, which draws these biases, got {forget_bias}")
    for name, asks in (("forget_bias", forget_bias is not None), ("init=('chrono', T_max)", chrono)):
        if asks and not bias:
            raise ValueError(f"{name} needs biases to set, got bias=False")
    return tuple(init) if chrono else init


@torch.no_grad()
def initialize(module: nn.RNNBase, gates: int, init: Init, forget_bias: float | None) -> None:
    """Fills what ``init`` and ``forget_bias`` speak of. Everything else stays as it is. gates: of the module's cell."""
    if init == "torch" and forget_bias is None:
        return
    for names in module._all_weights:
        by_stem = {name.rsplit("_l", 1)[0]: name for name in names}

        def fill(stem: str, value: Callable[[Tensor], Tensor], by_stem: dict[str, str] = by_stem) -> None:
            if (name := by_stem.get(stem)) is not None:
                _set(module, name, value(getattr(module, name)))

        if init in ("orthogonal", "identity"):
            fill("bias_ih", torch.zeros_like)
            fill("bias_hh", torch.zeros_like)
        if init == "orthogonal":
            fill("weight_ih", lambda w: _by_gate(w, gates, nn.init.xavier_uniform_))
            fill("weight_hh", lambda w: _by_gate(w, gates, nn.init.orthogonal_))
            fill("weight_hr", lambda w: _by_gate(w, 1, nn.init.orthogonal_))
        elif init == "identity":
            fill("weight_hh", lambda w: _by_gate(w, 1, nn.init.eye_))
        of_ih: dict[int, Tensor] = {}  # by gate, what the sum of both biases is to be
        bias = getattr(module, by_stem["bias_ih"]) if "bias_ih" in by_stem else None
        if bias is not None and not isinstance(init, str):
            keeping = torch.empty(module.hidden_size, dtype=_wide(bias), device=bias.device)
            keeping.uniform_(1, init[1] - 1).log_()
            of_ih = {gate: sign * keeping for gate, sign in _KEEPING[module.mode].items()}
        elif bias is not None and forget_bias is not None:
            of_ih = {1: torch.full((module.hidden_size,), forget_bias, dtype=bias.dtype, device=bias.device)}
        if of_ih:
            fill("bias_ih", lambda b, of_ih=of_ih: _with_gates(b, gates, of_ih))  # type: ignore[misc]
            fill("bias_hh", lambda b, of_ih=of_ih: _with_gates(b, gates, dict.fromkeys(of_ih, 0.0)))  # type: ignore[misc]


def _wide(x: Tensor) -> torch.dtype:
    """What values are drawn and decomposed in: torch's routines lack half types."""
    return torch.promote_types(x.dtype, torch.float32)


def _by_gate(weight: Tensor, gates: int, initializer: Callable[[Tensor], Tensor]) -> Tensor:
    """A matrix like weight [G*H, n] (or of heads [N, G*h, n]) of which each gate's block [H, n] is filled by itself."""
    if weight.dim() == 3:
        return torch.stack([_by_gate(head, gates, initializer) for head in weight])
    rows = weight.shape[0] // gates
    blocks = (torch.empty(rows, weight.shape[1], dtype=_wide(weight), device=weight.device) for _ in range(gates))
    return torch.cat([initializer(block) for block in blocks])


def _with_gates(bias: Tensor, gates: int, values: dict[int, Any]) -> Tensor:
    """A copy of bias [G*H] with some gates' part replaced."""
    filled = bias.clone()
    for gate, value in values.items():
        filled.unflatten(0, (gates, -1))[gate] = value
    return filled


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    if parametrize.is_parametrized(module, name):
        setattr(module, name, value.to(getattr(module, name).dtype))  # through its right inverse
    else:
        getattr(module, name).copy_(value)
