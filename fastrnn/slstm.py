"""xLSTM's cell of scalar memory as a module: four states, which torch.nn has no twin of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
import torch.fx
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from .initial_values import Init
from .module_base import leaf, typed_as
from .modules import _Recurrent
from .options import documented
from .packing import permute
from .records import States, joined, split

F = TypeVar("F", bound=Callable[..., None])
SLSTMState = tuple[Tensor, Tensor, Tensor, Tensor]

_LACKING = {
    "proj_size": "h = o c / n is not projected",
    "peephole": "its gates do not see c",
    "layer_norm": "there is no such cell",
    "zoneout": "c and n are kept divided by e^m, so that none of the three can be kept without the others",
}


def _without(init: F) -> F:
    """For ``__init__``: says in words which of LSTM's arguments there are none of."""

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, reason in _LACKING.items():
            if kwargs.pop(name, None):
                raise ValueError(f"{name} argument is not supported for SLSTM: {reason}")
        if not isinstance(kwargs.get("init", ""), str):
            raise ValueError("init should be 'torch' or 'orthogonal' for SLSTM, which has no chrono initialization")
        init(self, *args, **kwargs)

    return checked_init  # type: ignore[return-value]


@documented
class SLSTM(_Recurrent):
    """The sLSTM of xLSTM (Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", equations 8 to 17), which
    torch.nn lacks; ``output, (h_n, c_n, n_n, m_n) = slstm(input, hx)``.

    With the pre-activations ``i, f, z, o = W_ih x + b_ih + W_hh h + b_hh`` (rows in this order, an LSTM's; z stands for
    its g), an exponential input gate and a sigmoid forget gate::

        m' = max(log sigmoid(f) + m, i)
        c' = exp(log sigmoid(f) + m - m') c + exp(i - m') tanh(z)
        n' = exp(log sigmoid(f) + m - m') n + exp(i - m')
        h' = sigmoid(o) c' / n'

    All states are 0 at first. Where n is 0, a unit has seen nothing: m' = i, and the exponential that multiplies zeros
    is at most 1. So n is 1 after the first step and never below 1 from then on, and no h' is 0 / 0 whatever the gates
    are. An n that a caller passes is 0 or above. Gradients go through the maximum as through ``torch.maximum``. m makes
    no difference to h' but for rounding: where a state of a half type is handed to another call, m is rounded, and with
    it what that call's inputs count beside the past. (Within a call nothing is lost so: with ``recompute`` a half
    type's steps run in float32; under torch.func, forward-mode AD and for the gradient of every sample, in float64.)
    The paper's other forget gate, exp, is not in it, and neither are its convolution and its block around the cell.
    With ``learn_initial_state`` n_0 is 1, and h_0, c_0 and m_0 are learned: c_0 is then what the memory holds, and m_0
    how much that counts beside the input. (A learned n would say nothing more, and c / n has a pole where it is 0.)
    With ``num_heads`` the recurrence is the paper's block-diagonal one. Parameters are named and shaped as an LSTM's.
    """

    mode = "SLSTM"
    _STATE = "``(h_0, c_0, n_0, m_0)`` of [L*D, B, H] each"

    @_without
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        learn_initial_state: bool = False,
        state_batch_first: bool = False,
        return_all_states: bool = False,
        token_input: bool = False,
        residual: bool = False,
        return_all_layers: bool = False,
        num_heads: int = 1,
        grad_clip: float | None = None,
        recompute: int = 0,
        weight_dropout: float = 0.0,
        locked_dropout: float = 0.0,
        init: Init = "torch",
        forget_bias: float | None = None,
        recurrent_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            self.mode,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            learn_initial_state=learn_initial_state,
            state_batch_first=state_batch_first,
            return_all_states=return_all_states,
            token_input=token_input,
            residual=residual,
            return_all_layers=return_all_layers,
            num_heads=num_heads,
            grad_clip=grad_clip,
            recompute=recompute,
            weight_dropout=weight_dropout,
            locked_dropout=locked_dropout,
            init=init,
            forget_bias=forget_bias,
            recurrent_dropout=recurrent_dropout,
        )

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: SLSTMState, batch_sizes: Tensor | None
    ) -> None:
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        for i, state in enumerate(hidden):
            self.check_hidden_size(state, expected, f"Expected hidden[{i}] size {{}}, got {{}}")

    def _initial_names(self) -> list[list[str]]:
        h, c, _, m = super()._initial_names()
        return [h, c, m]

    def _with_fixed(self, learned: States) -> States:
        h, c, m = learned
        return h, c, torch.ones_like(c), m

    def permute_hidden(self, hx: SLSTMState, permutation: Tensor | None) -> States:  # type: ignore[override]
        return tuple(permute(x, permutation) for x in hx)

    def _user_state(self, states: States) -> Any:
        return states

    def _network(self, input: Tensor, states: States | None, **sequence: Any) -> tuple[Any, States, Any]:
        """The states as users have them: four. With ``return_all_states`` a tuple of c, n and m of every step."""
        fresh = sequence.pop("reset_states")
        output, finals, cells = super()._network(
            input,
            None if states is None else joined(states),
            reset_states=None if fresh is None else joined(fresh),
            **sequence,
        )
        every: States | None = None
        if cells is not None:  # [.., D*3*H]
            D = 2 if self.bidirectional else 1
            parts = cells.chunk(3 * D, -1)
            every = tuple(torch.cat(parts[k::3], -1) for k in range(3))
        return output, split(finals, 4), every

    @overload  # type: ignore[override]
    def forward(
        self,
        input: Tensor,
        hx: SLSTMState | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: SLSTMState | None = None,
    ) -> tuple[Tensor, SLSTMState]: ...

    @overload
    def forward(self, input: PackedSequence, hx: SLSTMState | None = None) -> tuple[PackedSequence, SLSTMState]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: SLSTMState | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: SLSTMState | None = None,
    ) -> tuple[Any, ...]:
        """input [T, B, I] ([B, T, I] with batch_first, [T, I] unbatched, packed or nested); hx
        ``(h_0, c_0, n_0, m_0)``, [L*D, B, H] each, or None.

        Returns output [T, B, D*H], laid out like the input, and ``(h_n, c_n, n_n, m_n)``; with ``return_all_states``
        also a tuple of the last layer's c, n and m after every step, [T, B, D*H] each.
        """
        if isinstance(input, torch.fx.Proxy):
            return leaf(self, input, hx, lengths=lengths, resets=resets, reset_state=reset_state)
        output, finals, cells = self._run(input, hx, lengths, resets, reset_state)
        h, c, n, m = finals
        state = (h, c, n, m)
        return (output, state) if cells is None else (output, state, cells)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any) -> Any: ...
