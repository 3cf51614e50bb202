"""LSTMCell, GRUCell and RNNCell: torch.nn's constructors, parameters, messages and results, on fastrnn's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor
from torch.nn.modules import rnn
from torch.nn.modules.rnn import RNNCellBase

from . import _C, checks, fallback, per_sample
from .module_base import QCONFIG, is_for_torch, leaf, typed_as
from .network import own, step
from .records import LayerWeights, States

_CELL_NAMES = ([["weight_ih", "weight_hh"]], [["weight_ih", "weight_hh", "bias_ih", "bias_hh"]])  # without, with bias


class _Cell(per_sample.Hooked, RNNCellBase):
    _torchs: type[RNNCellBase]  # whose forward takes what no kernel of ours does: tensor-likes, no units, other devices
    qconfig = QCONFIG
    __prepare_scriptable__ = fallback.refuse_script

    def _weights(self) -> LayerWeights:
        return LayerWeights(*map(self._marked, (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)))

    def _step(self, cell: str, input: Tensor, hx: Any) -> States:
        if not torch.compiler.is_compiling() and self._opacus is None:
            names = _CELL_NAMES[bool(self.bias)]
            plain = _C.module_forward(self._parameters, names, cell, 1, 1, None, input, hx, None, None, 0, None)
            if plain is not None:
                return plain[1:]
        kind = type(self).__name__
        if self.hidden_size == 0 or is_for_torch(self.weight_ih, self._parameters.values(), input, hx):
            after = self._torchs.forward(self, input, hx)
            return after if isinstance(after, tuple) else (after,)
        if not checks.is_tensor_like(input):
            raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
        states = None if hx is None else checks.given_states(cell, "hx", hx)
        if input.dim() not in (1, 2):
            raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for i, state in enumerate(states or ()):
            if state.dim() not in (1, 2):
                name = f"hx[{i}]" if cell == "lstm" else "hidden"
                raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {state.dim()}D instead")
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            states = None if states is None else tuple(x.unsqueeze(0) for x in states)
        if input.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}")
        if states is None:
            zeros = input.new_zeros(input.size(0), self.hidden_size)
            states = (zeros, zeros) if cell == "lstm" else (zeros,)
        for i, state in enumerate(states):
            if state.dim() != 2:
                raise RuntimeError(f"Expected 2D hidden{i} (batch x hidden_size), but got {state.dim()}D tensor")
            if state.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{i} batch size {state.size(0)}"
                )
            if state.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{i} has inconsistent hidden_size: got {state.size(1)}, expected {self.hidden_size}"
                )
        weights = self._weights()
        checks.check_fits("input", input, weights.weight_ih, "weight_ih")
        if hx is not None:
            for name, state in checks.parts_of("hx", states):
                checks.check_fits(name, state, input, "input")
        after = self._after(cell, input, states, weights)
        return after if batched else tuple(own(x if x.dim() < 2 else x.squeeze(0)) for x in after)

    def _after(self, cell: str, input: Tensor, states: States, weights: LayerWeights) -> States:
        if torch.compiler.is_compiling():
            return step(cell, input, states, weights)
        try:
            return step(cell, input, states, weights)
        except Exception:
            checks.explain(cell, input, [[weights]], lambda layer, direction, field: field)
            raise


class LSTMCell(_Cell):
    """``torch.nn.LSTMCell``: same arguments, parameters and results."""

    _torchs = rnn.LSTMCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """input [B, I] or [I]; hx ``(h, c)``, each [B, H] or [H], or None. Returns ``(h', c')``."""
        if isinstance(input, torch.fx.Proxy):
            return leaf(self, input, hx)
        h, c = self._step("lstm", input, hx)
        return h, c

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any) -> Any: ...


class GRUCell(_Cell):
    """``torch.nn.GRUCell``: same arguments, parameters and results."""

    _torchs = rnn.GRUCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input [B, I] or [I]; hx [B, H] or [H], or None. Returns h'."""
        return leaf(self, input, hx) if isinstance(input, torch.fx.Proxy) else self._step("gru", input, hx)[0]

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any) -> Any: ...


class RNNCell(_Cell):
    """``torch.nn.RNNCell``: same arguments, parameters and results."""

    _torchs = rnn.RNNCell
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input [B, I] or [I]; hx [B, H] or [H], or None. Returns h'."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        if isinstance(input, torch.fx.Proxy):
            return leaf(self, input, hx)
        return self._step(f"rnn_{self.nonlinearity}", input, hx)[0]

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any) -> Any: ...
