"""One layer's call as records with named fields. ``csrc/torch/arguments.h`` has the same fields in the same order, and
the ops' schemas their names.

Letters: T steps, B batch, I input features, H hidden units, R output width of a direction (H, or the projected size),
D directions, G gates, S saved values, K parameters of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LayerWeights(NamedTuple):
    """The parameters of one layer in one direction, with torch.nn's names, shapes and gate order."""

    weight_ih: Tensor  #: [G*H, I]
    weight_hh: Tensor  #: [G*H, R], or of N heads [N, G*H/N, H/N]
    bias_ih: Tensor | None = None  #: [G*H]
    bias_hh: Tensor | None = None  #: [G*H]
    weight_hr: Tensor | None = None  #: [R, H], LSTM only
    params: Tensor | None = None  #: [K, H], numbers of a unit that its cell reads beside the gates

    @property
    def widths(self) -> tuple[int, int]:
        """R and H."""
        R = self.weight_hh.shape[1] if self.weight_hh.dim() == 2 else self.weight_hh.shape[0] * self.weight_hh.shape[2]
        return R, R if self.weight_hr is None else self.weight_hr.shape[1]


# What modules call the params of a cell that has such, without their layer.
PARAMS = {"lstm_peephole": "weight_ch", "lstm_norm": "weight_ln", "gru_norm": "weight_ln"}


def name_of(field: str, cell: str) -> str:
    """Of LayerWeights: what the parameters of a module that it holds are called, without their layer."""
    return PARAMS.get(cell, field) if field == "params" else field


# (h,) or (h, c). Users have (h, c, n, m) of a cell with four states; all below has those but h side by side as its c:
# joined and split change one into the other.
States = tuple[Tensor, ...]


def joined(states: States) -> States:
    return states if len(states) <= 2 else (states[0], torch.cat(states[1:], -1))


def split(states: States, count: int) -> States:
    """count: of the cell's states."""
    return states if count <= 2 else (states[0], *(x.contiguous() for x in states[1].chunk(count - 1, -1)))


class LayerStates(NamedTuple):
    """What a layer starts from, how long its rows are, and where it starts anew."""

    h_0: Tensor | None = None  # [D, B, R]; None for zeros
    c_0: Tensor | None = None  # [D, B, C*H], of cells with C states besides h (an LSTM: 1); None for zeros
    lengths: Tensor | None = None  # integer [B]
    resets: Tensor | None = None  # bool [T, B]
    reset_h: Tensor | None = None  # [D, B, R]; None for zeros
    reset_c: Tensor | None = None  # [D, B, C*H]
    # Constants, without gradients. Recurrent dropout: what h is multiplied with where it enters the recurrent product,
    # and only there, in every step. Zoneout: a state after a step is keep times the one before it and (1 - keep) times
    # what the cell made.
    mask_h: Tensor | None = None  # [D, B, R]; None for ones
    keep_h: Tensor | None = None  # [T, B, D*R], where there is nothing between 0 and 1 perhaps bool; None for zeros
    keep_c: Tensor | None = None  # [T, B, D*H] likewise, LSTM only


class Masks(NamedTuple):
    """The last fields of LayerStates."""

    mask_h: Tensor | None = None
    keep_h: Tensor | None = None
    keep_c: Tensor | None = None


NO_MASKS = Masks()


def layer_states(
    states: States | None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    fresh: States | None = None,
    masks: Masks = NO_MASKS,
) -> LayerStates:
    """Of states and reset states as tuples."""
    h, c = (*(states or ()), None, None)[:2]
    reset_h, reset_c = (*(fresh or ()), None, None)[:2]
    return LayerStates(h, c, lengths, resets, reset_h, reset_c, *masks)


def rows_of(steps: Tensor, batch_sizes: Tensor | None, offsets: Tensor | None) -> int:
    """B, of steps [T, B, ..] or [N, ..]."""
    if offsets is not None:
        return offsets.shape[0] - 1
    return steps.shape[1] if batch_sizes is None else int(batch_sizes[0])


class LayerCall(NamedTuple):
    """One call of a layer."""

    cell: str
    input: Tensor  # [T, B, I], or integer tokens [T, B] for its one-hot rows
    weights: Sequence[LayerWeights]  # one a direction
    states: LayerStates = LayerStates()
    # Where tensors [N, ..] stand for [T, B, ..], one of these, on the CPU: int64 [T] of a packed sequence, or [B + 1]
    # of rows one behind the other, the b-th from offsets[b] to offsets[b + 1].
    batch_sizes: Tensor | None = None
    offsets: Tensor | None = None
    reverse: tuple[bool, ...] = (False, True)  # of each direction, as far as there are
    grad_clip: float = 0.0
    all_states: bool = False

    @property
    def directions(self) -> list[bool]:
        return list(self.reverse[: len(self.weights)])

    @property
    def batch(self) -> int:
        return rows_of(self.input, self.batch_sizes, self.offsets)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].weight_hh.dtype

    @property
    def has_one_dtype(self) -> bool:
        """As it has to: what runs refuses others, and names them."""
        given = self.input, *self.states, *(x for w in self.weights for x in w)
        return all(x.dtype == self.dtype for x in given if x is not None and x.is_floating_point())

    def mapped(self, function: Callable[[Any], Any]) -> LayerCall:
        """Of each tensor, or None, what the function gives."""
        weights = [LayerWeights(*map(function, w)) for w in self.weights]
        states = LayerStates(*map(function, self.states))
        return self._replace(input=function(self.input), weights=weights, states=states)

    def widened(self, dtype: torch.dtype) -> LayerCall:
        """The call with those of its tensors in this dtype that are of its own."""
        return self.mapped(lambda x: x.to(dtype) if x is not None and x.dtype == self.dtype else x)

    def by_field(self) -> list[list[Tensor]]:
        """Of each of the weights' fields what there is, as the ops take it."""
        return [[x for x in of_directions if x is not None] for of_directions in zip(*self.weights, strict=True)]


class LayerResults(NamedTuple):
    """What a layer's call gives. What does not apply has size 0."""

    output: Tensor  # [T, B, D*R]
    h_n: Tensor  # [D, B, R]
    c_n: Tensor  # [D, B, C*H]
    cells: Tensor  # [T, B, D*C*H]: c after every step, where all_states
    saved: Tensor  # [T, B, D*S*H]: where backward may follow; S: CellInfo.saved_values

    def to(self, dtype: torch.dtype) -> LayerResults:
        return LayerResults(*(x.to(dtype) for x in self))


# What a layer's gradients are of, in the order of layer_backward's results.
GRADIENTS = ("input", *LayerWeights._fields, "h_0", "c_0", "reset_h", "reset_c")
