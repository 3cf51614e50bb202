"""Drop-in modules: torch.nn's constructors, parameters, state_dict, messages and results, on fastrnn's kernels.

They derive from ``torch.nn.RNNBase``, which supplies names, checks, repr and pickling, and not from ``torch.nn.LSTM``
and its siblings, which torch.compile refuses by name.

``forward`` takes three keyword arguments more than torch's: ``lengths``, ``resets`` and ``reset_state``; see
:func:`fastrnn.functional.lstm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import RNNBase
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from . import functional
from .functional import LayerWeights, States


def _permute(x: Tensor, permutation: Tensor | None) -> Tensor:
    return x if permutation is None else x.index_select(1, permutation)


def _check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """Torch's packing routines trust these, down to writes past the end of their memory."""
    if torch.compiler.is_compiling():
        return
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        raise RuntimeError(
            "batch_sizes: expected a 1-D tensor of int64 on the CPU, "
            f"got {list(batch_sizes.shape)} of {batch_sizes.dtype} on {batch_sizes.device}"
        )
    falling = len(batch_sizes) > 0 and not (batch_sizes[1:] > batch_sizes[:-1]).any() and batch_sizes[-1] >= 0
    if not falling or batch_sizes.sum() != rows:
        raise RuntimeError(
            f"batch_sizes: expected sizes that do not grow and sum to {rows} (rows of data), got {batch_sizes}"
        )


class _Recurrent(RNNBase):
    """What LSTM, GRU and RNN share. States are tuples here: (h,) or (h, c)."""

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flat weight buffer; parameters are read by name at each forward."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        weight = getattr(self, self._all_weights[0][0])
        if input.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
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

    def _check_input_size(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        dims = 2 if batch_sizes is not None else 3
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def _weights(self) -> list[list[LayerWeights]]:
        """``[layer][direction]``, read by name, so that parametrizations and swapped parameters are seen."""
        one_direction = [
            LayerWeights(**{name.rsplit("_l", 1)[0]: getattr(self, name) for name in names})
            for names in self._all_weights
        ]
        directions = 2 if self.bidirectional else 1
        return [one_direction[i : i + directions] for i in range(0, len(one_direction), directions)]

    def _network(self, input: Tensor, states: States | None, **sequence: Any) -> tuple[Tensor, States]:
        """input [T, B, I] -> output [T, B, D*R] and final states."""
        cell = self.mode.lower()
        fresh = sequence.pop("reset_states", None)
        return functional._network(
            cell,
            input,
            states,
            self._weights(),
            self.dropout,
            self.training,
            sequence.get("lengths"),
            sequence.get("resets"),
            fresh,
        )

    def _check_states(self, input: Tensor, states: States, batch_sizes: Tensor | None) -> None:
        for state in states:
            if state.device != input.device:
                raise RuntimeError(
                    "Input and hidden tensors are not at the same device, "
                    f"found input tensor at {input.device} and hidden tensor at {state.device}"
                )
        self.check_forward_args(input, self._user_state(states), batch_sizes)

    def _user_state(self, states: States) -> Any:
        """As forward takes and returns it: a tensor, or for an LSTM a pair."""
        return states[0]

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | None,
        resets: Tensor | None,
        reset_state: Any,
    ) -> tuple[Tensor | PackedSequence, States]:
        states, reset_states = (
            None if state is None else functional.given_states(self.mode.lower(), name, state)
            for name, state in (("hx", hx), ("reset_state", reset_state))
        )
        if isinstance(input, PackedSequence):
            for name, given in (("lengths", lengths), ("resets", resets), ("reset_state", reset_state)):
                if given is not None:
                    raise ValueError(f"{name}: expected None with a PackedSequence, got {type(given).__name__}")
            return self._run_packed(input, states)
        if input.dim() not in (2, 3):
            tensor = " tensor" if self.mode.startswith("RNN") else ""
            raise ValueError(f"{self._kind()}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead")
        batched = input.dim() == 3
        self._check_ranks(states, batched)
        self._check_ranks(reset_states, batched)
        functional.check_resets(resets, reset_state, input.shape[:-1], input.device)
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            states, reset_states = (
                None if s is None else tuple(x.unsqueeze(1) for x in s) for s in (states, reset_states)
            )
            if resets is not None:
                resets = resets.unsqueeze(batch_dim)
            if lengths is not None:
                raise ValueError("lengths: expected None with unbatched input, got a tensor")
        self.check_input(input, None)
        for each in (states, reset_states):
            if each is not None:
                self._check_states(input, each, None)
        if self.batch_first:
            input = input.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        if lengths is not None:
            lengths, input = functional.given_lengths(lengths, input)
        output, finals = self._network(input, states, lengths=lengths, resets=resets, reset_states=reset_states)
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            output, finals = output.squeeze(batch_dim), tuple(x.squeeze(1) for x in finals)
        return output, finals

    def _run_packed(self, input: PackedSequence, states: States | None) -> tuple[PackedSequence, States]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self.check_input(data, batch_sizes)
        _check_batch_sizes(batch_sizes, data.shape[0])
        if states is not None:
            self._check_states(data, states, batch_sizes)
            states = tuple(_permute(x, sorted_indices) for x in states)
        padded, lengths = torch._VF._pad_packed_sequence(  # type: ignore[attr-defined]
            data, batch_sizes, False, 0.0, batch_sizes.shape[0]
        )
        output, finals = self._network(padded, states, lengths=lengths)
        packed, _ = torch._VF._pack_padded_sequence(output, lengths, False)  # type: ignore[attr-defined]
        return (
            PackedSequence(packed, batch_sizes, sorted_indices, unsorted_indices),
            tuple(_permute(x, unsorted_indices) for x in finals),
        )

    def _kind(self) -> str:
        return self.mode.partition("_")[0]

    def _check_ranks(self, states: States | None, batched: bool) -> None:
        dims, kind = (3, "batched") if batched else (2, "unbatched")
        if states is None or all(x.dim() == dims for x in states):
            return
        got = [f"{x.dim()}-D" for x in states]
        if len(got) == 1:
            raise RuntimeError(f"For {kind} {dims}-D input, hx should also be {dims}-D but got {got[0]} tensor")
        found = f"({', '.join(got)})"
        raise RuntimeError(f"For {kind} {dims}-D input, hx and cx should also be {dims}-D but got {found} tensors")


class _SingleState(_Recurrent):
    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """input [T, B, I] ([B, T, I] with batch_first, [T, I] unbatched, or packed), hx [L*D, B, H] or None.

        Returns output [T, B, D*H], laid out like the input, and h_n [L*D, B, H].
        """
        output, finals = self._run(input, hx, lengths, resets, reset_state)
        return output, finals[0]


class LSTM(_Recurrent):
    """``torch.nn.LSTM``: same arguments, parameters and results.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            in ``torch.nn.LSTM``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        self.check_input(input, batch_sizes)
        expected = (
            self.get_expected_hidden_size(input, batch_sizes),
            self.get_expected_cell_size(input, batch_sizes),
        )
        for i in range(2):
            self.check_hidden_size(hidden[i], expected[i], f"Expected hidden[{i}] size {{}}, got {{}}")

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _permute(hx[0], permutation), _permute(hx[1], permutation)

    def _user_state(self, states: States) -> Any:
        return states

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """input [T, B, I] ([B, T, I] with batch_first, [T, I] unbatched, or packed); hx ``(h_0, c_0)``,
        [L*D, B, R] and [L*D, B, H], or None.

        Returns output [T, B, D*R], laid out like the input, and ``(h_n, c_n)``.
        """
        output, finals = self._run(input, hx, lengths, resets, reset_state)
        return output, (finals[0], finals[1])


class GRU(_SingleState):
    """``torch.nn.GRU``: same arguments, parameters and results."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class RNN(_SingleState):
    """``torch.nn.RNN``: same arguments (the fourth by position is ``nonlinearity``), parameters and results."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


class _Cell(RNNCellBase):
    def _weights(self) -> LayerWeights:
        return LayerWeights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)

    def _step(self, cell: str, input: Tensor, hx: Any) -> States:
        kind = type(self).__name__
        states = None if hx is None else functional.given_states(cell, "hx", hx)
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
        after = functional._cell(cell, input, states, self._weights())
        return after if batched else tuple(x if x.dim() < 2 else x.squeeze(0) for x in after)


class LSTMCell(_Cell):
    """``torch.nn.LSTMCell``: same arguments, parameters and results."""

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """input [B, I] or [I]; hx ``(h, c)``, each [B, H] or [H], or None. Returns ``(h', c')``."""
        h, c = self._step("lstm", input, hx)
        return h, c


class GRUCell(_Cell):
    """``torch.nn.GRUCell``: same arguments, parameters and results."""

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input [B, I] or [I]; hx [B, H] or [H], or None. Returns h'."""
        return self._step("gru", input, hx)[0]


class RNNCell(_Cell):
    """``torch.nn.RNNCell``: same arguments, parameters and results."""

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
        return self._step(f"rnn_{self.nonlinearity}", input, hx)[0]
