"""Nested tensors of layout torch.jagged: rows of any lengths one behind the other, values [N, ..], offsets [B + 1]."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packing import places


def is_jagged(input: Any, name: str = "input") -> bool:
    """Raises ValueError for a nested tensor of torch's older layout: none of our modules takes that."""
    if not isinstance(input, Tensor) or not input.is_nested:
        return False
    if input.layout != torch.jagged:
        raise ValueError(
            f"{name}: expected a nested tensor of layout torch.jagged, got {input.layout}: pass layout=torch.jagged to "
            "torch.nested.nested_tensor"
        )
    return True


class Jagged(NamedTuple):
    """The input of a call, [B, j, I] or tokens [B, j]."""

    input: Any  # NestedTensor, of whose attributes torch.Tensor has none
    values: Tensor  # [N, I] or tokens [N]
    offsets: Tensor  # [B + 1]

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    @property
    def batch(self) -> Tensor:
        """[B] as a tensor [1], where checks of torch.nn look for it."""
        return torch.tensor([len(self.offsets) - 1])

    def padded(self) -> Tensor:
        """[T, B, I] or [T, B], zeros behind each row's end."""
        size = None  # torch's choice: the longest row where it is known, else the sum of all
        if self.input._max_seqlen_tensor is None and not torch.compiler.is_compiling():
            size = (len(self.offsets) - 1, int(self.lengths.max()), *self.values.shape[1:])
        return torch.nested.to_padded_tensor(self.input, 0, size).transpose(0, 1)

    def of_padded(self, output: Tensor) -> Tensor:
        """A result [T, B, n] of the padded input, as a nested tensor with the input's offsets."""
        rows, steps = places(self.offsets, self.values.shape[0])
        return self.nested(output.flatten(0, 1).index_select(0, steps * output.shape[1] + rows))

    def nested(self, values: Tensor) -> Tensor:
        """The same of a result's values [N, n]."""
        shortest, longest = self.input._maybe_min_seqlen, self.input._maybe_max_seqlen
        return torch.nested.nested_tensor_from_jagged(values, self.offsets, min_seqlen=shortest, max_seqlen=longest)


def jagged(input: Any) -> Jagged:
    """A nested tensor taken apart; one with holes, as torch.nested.narrow makes, is copied without them.

    Raises:
        ValueError: its rows differ in another dimension than the second, or there are more values than rows have.
    """
    if input.dim() < 2 or input._ragged_idx != 1:
        raise ValueError(f"input: expected a nested tensor [B, j, I] with rows of different steps j, got {input.shape}")
    if input.lengths() is not None:
        input = input.contiguous()
    rows = Jagged(input, input.values(), input.offsets())
    if rows.offsets.is_cpu and not torch.compiler.is_compiling() and rows.offsets[-1] != len(rows.values):
        raise ValueError(f"input: expected offsets up to {len(rows.values)} (its values), got {int(rows.offsets[-1])}")
    return rows
