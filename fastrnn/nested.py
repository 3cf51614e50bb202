"""Nested tensors of layout torch.jagged: rows of any lengths one behind the other, values [N, ..] and offsets [B + 1].

Packed data are the same rows in another order: by step, the longest rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _C
from .autograd import Grads


def is_jagged(input: Any) -> bool:
    return isinstance(input, Tensor) and input.is_nested and input.layout == torch.jagged


class Jagged(NamedTuple):
    """The input of a call, [B, j, I] or tokens [B, j]."""

    input: Any  # NestedTensor, of whose attributes torch.Tensor has none
    values: Tensor  # [N, I] or tokens [N]
    offsets: Tensor  # [B + 1]

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def padded(self) -> Tensor:
        """[T, B, I] or [T, B], zeros behind each row's end."""
        size = None  # torch's choice: the longest row where it is known, else the sum of all
        if self.input._max_seqlen_tensor is None and not torch.compiler.is_compiling():
            size = (len(self.offsets) - 1, int(self.lengths.max()), *self.values.shape[1:])
        return torch.nested.to_padded_tensor(self.input, 0, size).transpose(0, 1)

    def of_padded(self, output: Tensor) -> Tensor:
        """A result [T, B, n] of the padded input, as a nested tensor with the input's offsets."""
        rows, steps = self._places()
        return self._nested(output.flatten(0, 1).index_select(0, steps * output.shape[1] + rows))

    def _places(self) -> tuple[Tensor, Tensor]:
        """For each of the N values its row and its step."""
        lengths, N = self.lengths, self.values.shape[0]
        rows = torch.arange(lengths.shape[0], device=lengths.device).repeat_interleave(lengths, output_size=N)
        return rows, torch.arange(N, device=lengths.device) - self.offsets[rows]

    def _nested(self, values: Tensor) -> Tensor:
        shortest, longest = self.input._maybe_min_seqlen, self.input._maybe_max_seqlen
        return torch.nested.nested_tensor_from_jagged(values, self.offsets, min_seqlen=shortest, max_seqlen=longest)

    def packed(self) -> tuple[PackedSequence, Callable[[PackedSequence], Tensor]] | None:
        """The input packed, and what makes a packed result nested, with the input's offsets. On the CPU.

        None where a row is empty, which packed data cannot hold.
        """
        if not (found := _C.packing_order(self.offsets)):
            return None
        batch_sizes, order, rank, places, sources = found
        data = _Reordered.apply(self.values, sources, places)

        def back(output: PackedSequence) -> Tensor:
            return self._nested(_Reordered.apply(output.data, places, sources))

        return PackedSequence(data, batch_sizes, order, rank), back


class _Reordered(torch.autograd.Function):
    """x[places]; back is the inverse permutation. index_select's own backward adds up rows one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(places, back)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        places, back = ctx.saved_tensors
        return _Reordered.apply(grad, back, places), None, None


def jagged(input: Any) -> Jagged:
    """A nested tensor taken apart; one with holes, as torch.nested.narrow makes, is copied without them.

    Raises:
        ValueError: its rows differ in another dimension than the second.
    """
    if input.dim() < 2 or input._ragged_idx != 1:
        raise ValueError(f"input: expected a nested tensor [B, j, I] with rows of different steps j, got {input.shape}")
    if input.lengths() is not None:
        input = input.contiguous()
    return Jagged(input, input.values(), input.offsets())
