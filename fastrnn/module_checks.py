"""What LSTM, GRU and RNN check of a call before it runs, in the caller's names; torch.nn's texts where it has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .flat_weights import HasFlatWeights
from .records import States


def check_none(beside: str, **given: Any) -> None:
    """Input that says itself how long its rows are takes none of these."""
    for name, x in given.items():
        if x is not None:
            raise ValueError(f"{name}: expected None with {beside}, got {type(x).__name__}")


class ChecksCalls(HasFlatWeights):
    """The checks of a layer's module."""

    state_batch_first: bool
    token_input: bool

    @property
    def _cell(self) -> str:
        """The name of its cell, as the ops know it."""
        raise NotImplementedError

    def _state_widths(self) -> tuple[int, ...]:
        """Of h and of the states besides."""
        raise NotImplementedError

    def _kind(self) -> str:
        return self.mode.partition("_")[0]

    def _input_dtype(self) -> torch.dtype:
        return self._first_weight().dtype

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        weight = self._first_weight()
        if not checks.dtypes_fit(input.dtype, weight.dtype) and not self._holds_tokens(input, batch_sizes):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
            )
        if input.device != weight.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, "
                f"found input tensor at {input.device} and parameter tensor at {weight.device}"
            )
        self._check_input_size(input, batch_sizes)

    def _first_weight(self) -> Tensor:
        name, written = self._all_weights[0][0], self._named_weights()
        return getattr(self, name) if written is None else written[name]

    def _holds_tokens(self, input: Tensor, batch_sizes: Tensor | None) -> bool:
        dims = 1 if batch_sizes is not None else 2
        return self.token_input and checks.are_tokens(input) and input.dim() == dims

    def _check_input_size(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        dims = 2 if batch_sizes is not None else 3
        if input.dim() != dims:
            if self._holds_tokens(input, batch_sizes):
                return
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def get_expected_hidden_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        layers, batch, width = super().get_expected_hidden_size(input, batch_sizes)
        return (batch, layers, width) if self.state_batch_first else (layers, batch, width)

    def _check_ranks(self, name: str, states: States | None, batched: bool) -> None:
        dims, kind = (3, "batched") if batched else (2, "unbatched")
        if states is None or all(x.dim() == dims for x in states):
            return
        got = [f"{x.dim()}-D" for x in states]
        if len(got) == 1:
            raise RuntimeError(f"For {kind} {dims}-D input, {name} should also be {dims}-D but got {got[0]} tensor")
        names, found = "hx and cx" if name == "hx" else name, f"({', '.join(got)})"  # torch.nn's own text of hx
        raise RuntimeError(f"For {kind} {dims}-D input, {names} should also be {dims}-D but got {found} tensors")

    def _check_states(self, name: str, input: Tensor, states: States, batch_sizes: Tensor | None) -> None:
        """Of hx torch.nn's texts, and the same of reset_state under its name."""
        told = "hidden" if name == "hx" else name
        for state in states:
            if state.device != input.device:
                raise RuntimeError(
                    f"Input and {told} tensors are not at the same device, "
                    f"found input tensor at {input.device} and {told} tensor at {state.device}"
                )
        if name == "hx":
            self.check_forward_args(input, self._user_state(states), batch_sizes)
        else:
            expected = self.get_expected_hidden_size(input, batch_sizes)
            for (part, state), width in zip(checks.parts_of(name, states), self._state_widths(), strict=True):
                self.check_hidden_size(state, (*expected[:2], width), f"Expected {part} size {{}}, got {{}}")
        tokens = self._holds_tokens(input, batch_sizes)
        other, whose = (self._first_weight(), "weight_ih_l0") if tokens else (input, "input")
        for part, state in checks.parts_of(name, states):
            checks.check_fits(part, state, other, whose)

    def _user_state(self, states: States) -> Any:
        """As forward takes and returns it: a tensor, or for an LSTM a pair."""
        return states[0]

    def _check_step(self, x: Tensor, dims: int, state: Any, reset_state: Any) -> None:
        """What ``forward`` checks, said of the arguments of ``step``."""
        weight, tokens = self._first_weight(), x.dim() < dims
        if not tokens and x.shape[-1] != self.input_size:
            raise RuntimeError(f"x: expected {self.input_size} features (input_size), got {x.shape[-1]}")
        if not tokens and not checks.dtypes_fit(x.dtype, self._input_dtype()):
            raise ValueError(f"x: expected {self._input_dtype()}, got {x.dtype}")
        for name, given in (("state", state), ("reset_state", reset_state)):
            if given is None:
                continue
            states = checks.given_states(self._cell, name, given)
            count = self.num_layers * (2 if self.bidirectional else 1)
            batch = [] if dims == 1 else [x.shape[0]]
            leading = [*batch, count] if self.state_batch_first else [count, *batch]
            for (part, found), width in zip(checks.parts_of(name, states), self._state_widths(), strict=True):
                if list(found.shape) != [*leading, width]:
                    raise RuntimeError(f"{part}: expected {[*leading, width]}, got {list(found.shape)}")
                checks.check_fits(part, found, *((weight, "weight_ih_l0") if tokens else (x, "x")))
