"""Recurrent networks as functions of their weights. See ``modules.py`` for the same with parameters, ``network.py`` for
what both run.

Letters: T steps, B batch, I input features, H hidden units, R output width of a direction (H, or the projected size),
D directions, L layers, G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import heads
from .checks import (
    check_features,
    check_fits,
    check_resets,
    check_steps,
    check_weights,
    given_layer_weights,
    given_lengths,
    given_states,
    given_weights,
    parts_of,
)
from .network import network, own, step
from .ops import CELLS
from .records import PARAMS, LayerWeights, States, joined, split


def lstm(
    input: Tensor,
    state: tuple[Tensor, Tensor] | None,
    weights: Sequence[Sequence[LayerWeights]],
    *,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    token_input: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Multi-layer, uni- or bidirectional LSTM (Hochreiter & Schmidhuber 1997; equations of ``torch.nn.LSTM``).

    Args:
        input: [T, B, I], float32, float64, bfloat16 or float16.
        state: ``(h_0, c_0)``, [L*D, B, R] and [L*D, B, H]; ``None`` for zeros.
        weights: ``weights[layer][direction]``; one direction, or two of which the second runs in reverse. Each is a
            LayerWeights, or a plain tuple or list of its tensors in that order. Their ``params``, where given, are
            [3, H] peepholes of i, f and o (Gers & Schmidhuber 2000), as of ``fastrnn.LSTM(.., peephole=True)``, or
            [18, H] gains and biases of layer normalization (Ba, Kiros & Hinton 2016), as ``layer_norm=True`` has them;
            what biases there are besides are added before it. A ``weight_hh`` [N, G*H/N, H/N] is that of N heads, as of
            ``fastrnn.LSTM(.., num_heads=N)``.
        dropout: probability that an output of any layer but the last is zeroed, when ``training``.
        lengths: integer [B]: row b has the steps 0 .. lengths[b] - 1. The output is 0 behind them, and the final state
            is the one after the last of them (the initial one where there are none).
        resets: bool [T, B]: where True at t, nothing is carried between steps t-1 and t, in either direction; the state
            is ``reset_state`` instead.
        reset_state: like ``state``; ``None`` for zeros. Needs ``resets``.
        token_input: integer input [T, B] is tokens in [0, I): the rows of a one-hot input, which is never made.

    Returns:
        output [T, B, D*R] and ``(h_n, c_n)``, shaped like ``state``.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; T is 0.
        ValueError, TypeError: another kind of object; lengths out of range or not integers; resets not bool.
        IndexError: a token out of range, on the CPU.
    """
    output, states = _checked(
        "lstm", input, state, weights, dropout, training, lengths, resets, reset_state, token_input
    )
    return output, (states[0], states[1])


def gru(
    input: Tensor,
    state: Tensor | None,
    weights: Sequence[Sequence[LayerWeights]],
    *,
    reset_after: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    token_input: bool = False,
) -> tuple[Tensor, Tensor]:
    """Multi-layer, uni- or bidirectional GRU (Cho et al. 2014; equations of ``torch.nn.GRU``, or of the paper where
    ``reset_after`` is False: see ``fastrnn.GRU``).

    Arguments, result and errors as in :func:`lstm`, with the state a single tensor [L*D, B, H]. ``params`` [12, H] are
    those of ``fastrnn.GRU(.., layer_norm=True)``.
    """
    output, states = _checked(
        _gru(reset_after), input, state, weights, dropout, training, lengths, resets, reset_state, token_input
    )
    return output, states[0]


def rnn(
    input: Tensor,
    state: Tensor | None,
    weights: Sequence[Sequence[LayerWeights]],
    *,
    nonlinearity: str = "tanh",
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    token_input: bool = False,
) -> tuple[Tensor, Tensor]:
    """Multi-layer, uni- or bidirectional Elman network (Elman 1990), ``nonlinearity`` 'tanh' or 'relu'.

    Arguments, result and errors as in :func:`lstm`, with the state a single tensor [L*D, B, H].
    """
    cell = _elman(nonlinearity)
    output, states = _checked(cell, input, state, weights, dropout, training, lengths, resets, reset_state, token_input)
    return output, states[0]


def _of_cell(cell: str, title: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of a cell with one state that takes no argument of its own."""

    def function(
        input: Tensor,
        state: Tensor | None,
        weights: Sequence[Sequence[LayerWeights]],
        *,
        dropout: float = 0.0,
        training: bool = False,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        token_input: bool = False,
    ) -> tuple[Tensor, Tensor]:
        output, states = _checked(
            cell, input, state, weights, dropout, training, lengths, resets, reset_state, token_input
        )
        return output, states[0]

    function.__name__ = function.__qualname__ = cell
    function.__doc__ = f"""Multi-layer, uni- or bidirectional {title}.

    Arguments, result and errors as in :func:`lstm`, with the state a single tensor [L*D, B, H].
    """
    return function


ligru = _of_cell("ligru", "light GRU (Ravanelli et al. 2018; equations of :class:`fastrnn.LiGRU`)")
mgu = _of_cell("mgu", "minimal gated unit (Zhou et al. 2016; equations of :class:`fastrnn.MGU`)")


def slstm(
    input: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    weights: Sequence[Sequence[LayerWeights]],
    *,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    token_input: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Multi-layer, uni- or bidirectional sLSTM (Beck et al. 2024; equations of :class:`fastrnn.SLSTM`).

    Arguments, result and errors as in :func:`lstm`, with the state ``(h, c, n, m)`` of [L*D, B, H] each and no
    ``weight_hr`` and ``params`` among the weights.
    """
    output, states = _checked(
        "slstm", input, state, weights, dropout, training, lengths, resets, reset_state, token_input
    )
    h, c, n, m = states
    return output, (h, c, n, m)


def lstm_cell(input: Tensor, state: tuple[Tensor, Tensor], weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: input [B, I], state ``(h, c)`` of [B, H] each; returns the state after the step."""
    h, c = _checked_cell("lstm", input, state, weights)
    return h, c


def gru_cell(input: Tensor, state: Tensor, weights: LayerWeights, reset_after: bool = True) -> Tensor:
    """One step of a GRU: input [B, I], state [B, H]; returns the state after the step."""
    return _checked_cell(_gru(reset_after), input, state, weights)[0]


def rnn_cell(input: Tensor, state: Tensor, weights: LayerWeights, nonlinearity: str = "tanh") -> Tensor:
    """One step of an Elman network: input [B, I], state [B, H]; returns the state after the step."""
    return _checked_cell(_elman(nonlinearity), input, state, weights)[0]


def _checked(
    cell: str,
    input: Tensor,
    state: Any,
    weights: Sequence[Sequence[LayerWeights]],
    dropout: float,
    training: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_state: Any,
    token_input: bool,
) -> tuple[Tensor, States]:
    """What the public forms share: all checks, then the layers."""
    check_features(input, 3, "(T, B, I)", token_input)
    check_steps(input)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a number in [0, 1], got {dropout!r}")
    T, B = input.shape[:2]
    tokens, weights = input.dim() == 2, given_weights(weights)
    cell = _with_params(cell, weights[0][0])
    check_weights(cell, input, weights, tokens, may_have_heads=True)
    check_resets(resets, reset_state, (T, B), input.device)
    w = weights[0][0]
    L, (R, H), count = len(weights) * len(weights[0]), w.widths, CELLS[cell].states

    def states(name: str, state: Any) -> States | None:
        if state is None:
            return None
        found = given_states(cell, name, state)
        for (part, x), size in zip(parts_of(name, found), (R, *[H] * (count - 1)), strict=True):
            if list(x.shape) != [L, B, size]:
                expected = f"{[L, B, size]} (layers * directions, batch, width)"
                raise RuntimeError(f"{part}: expected {expected}, got {list(x.shape)}")
            check_fits(part, x, *((w.weight_ih, "weights[0][0].weight_ih") if tokens else (input, "input")))
        return joined(found)

    start, fresh = states("state", state), states("reset_state", reset_state)
    if lengths is not None:
        lengths = given_lengths(lengths, input)
    output, finals, _ = network(
        cell, input, weights, start, fresh, lengths=lengths, resets=resets, dropout=dropout, training=training,
        num_heads=heads.count(w),
    )  # fmt: skip
    return own(output), tuple(map(own, split(finals, count)))


def _checked_cell(cell: str, input: Tensor, state: Any, weights: Any) -> States:
    check_features(input, 2, "(B, I)", False)
    w = given_layer_weights("weights", weights)
    cell = _with_params(cell, w)
    check_weights(cell, input, [[w]], False, lambda layer, direction, field: f"weights.{field}")
    states = given_states(cell, "state", state)
    for (part, x), size in zip(parts_of("state", states), w.widths, strict=False):
        if list(x.shape) != [input.shape[0], size]:
            raise RuntimeError(f"{part}: expected {[input.shape[0], size]} (batch, width), got {list(x.shape)}")
        check_fits(part, x, input, "input")
    return step(cell, input, states, w)


def _with_params(cell: str, weights: LayerWeights) -> str:
    """The cell that reads such params: how many there are says which."""
    variants = [name for name in PARAMS if weights.params is not None and name.startswith(f"{cell}_")]
    rows = getattr(weights.params, "shape", [0])[:1]
    return next((name for name in variants if [CELLS[name].params] == [*rows]), variants[0] if variants else cell)


def _gru(reset_after: bool) -> str:
    if not isinstance(reset_after, bool):
        raise TypeError(f"reset_after: expected a bool, got {type(reset_after).__name__}")
    return "gru" if reset_after else "gru_reset_before"


def _elman(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    return f"rnn_{nonlinearity}"
