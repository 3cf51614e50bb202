"""Sequences of different lengths: padded [T, B, n] with lengths, packed [N, n] with batch sizes, and nested [N, n] with
offsets."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .transforms import is_plain_call


def without_padding(input: Tensor, lengths: Tensor) -> Tensor:
    """input [T, B, I] or [T, B] with zeros behind each row's end.

    A recurrence ignores what stands there, but a NaN would reach weight_ih's gradient through 0 * NaN.
    """
    if lengths.dim() == 2:  # a group's each
        lengths = lengths.amax(1)
    valid = torch.arange(input.shape[0], device=input.device)[:, None] < lengths
    return torch.where(valid if input.dim() == 2 else valid[..., None], input, 0)


def pad(x: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """[N, n] -> [T, B, n], zeros behind each row's end, and the lengths [B], falling."""
    return torch._VF._pad_packed_sequence(x, batch_sizes, False, 0.0, batch_sizes.shape[0])  # type: ignore[attr-defined]


def pack(x: Tensor, lengths: Tensor) -> Tensor:
    """[T, B, n] -> [N, n]; lengths on the CPU, falling."""
    return torch._VF._pack_padded_sequence(x, lengths, False)[0]  # type: ignore[attr-defined]


def on_device(lengths: Tensor, device: torch.device) -> Tensor:
    """lengths [B] of the CPU on another device, for a kernel to read.

    A copy cannot be captured in a CUDA graph, or from pinned memory is read again by every replay. So the values go as
    arguments of kernels, one launch for some hundred lengths that differ.
    """
    if device.type == "cpu" or not is_plain_call():
        return lengths.to(device, non_blocking=True)
    values, counts = lengths.unique_consecutive(return_counts=True)
    found = torch.zeros_like(lengths, device=device)
    if not len(lengths):
        return found
    torch._foreach_add_(found.split(counts.tolist()), values.tolist())
    return found


def permute(x: Tensor, permutation: Tensor | None, dim: int = 1) -> Tensor:
    return x if permutation is None else x.index_select(dim, permutation)


def check_batch_sizes(batch_sizes: Any, rows: int) -> None:
    """Torch's packing routines trust these, down to writes past the end of their memory."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(batch_sizes, Tensor):
        raise TypeError(f"batch_sizes: expected a tensor, got {type(batch_sizes).__name__}")
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


def check_indices(name: str, indices: Any, batch: int, device: torch.device) -> None:
    if torch.compiler.is_compiling():
        return
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(indices).__name__}")
    if indices.dtype not in (torch.int64, torch.int32) or tuple(indices.shape) != (batch,) or indices.device != device:
        raise RuntimeError(
            f"{name}: expected [{batch}] (batch) of int64 on {device}, "
            f"got {list(indices.shape)} of {indices.dtype} on {indices.device}"
        )


class Layout(NamedTuple):
    """How [N, ..] and [T, B, ..] are each other's, by ops that have rules for all of torch.func."""

    steps: int  # T
    rows: int  # B
    lengths: Tensor  # [B]
    places: Tensor  # [N]: where each value stands among the T * B padded ones

    def to(self, device: torch.device) -> Layout:
        lengths, places = (x.to(device, non_blocking=True) for x in (self.lengths, self.places))
        return self._replace(lengths=lengths, places=places)

    def pad(self, x: Tensor | None) -> Any:
        """[N, ..] -> [T, B, ..], zeros behind each row's end."""
        if x is None:
            return None
        padded = x.new_zeros(self.steps * self.rows, *x.shape[1:]).index_copy(0, self.places, x)
        return padded.view(self.steps, self.rows, *x.shape[1:])

    def pack(self, x: Tensor) -> Tensor:
        """The way back."""
        if is_plain_call(x):
            packed: Tensor = _Pack.apply(x, self)
            return packed
        return self.select(x)

    def select(self, x: Tensor) -> Tensor:
        return x.reshape(self.steps * self.rows, *x.shape[2:]).index_select(0, self.places)

    def of_rows(self, x: Tensor) -> Tensor:
        """[B, ..] -> [N, ..]: each row's for all of its values."""
        return x.index_select(0, (self.places % self.rows).to(x.device))


class _Pack(torch.autograd.Function):
    """Layout.pack, whose gradient is a copy: that of index_select adds, as if places were given twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return layout.select(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layout.pad(grad), None


def layout_of_packed(batch_sizes: Tensor, device: torch.device) -> Layout:
    """As layout_of, on another device than the batch sizes'. A plain call waits for no copy (on_device): places are
    made there, of the lengths."""
    if device.type == "cpu" or not is_plain_call():
        layout = layout_of(batch_sizes, None)
        assert layout is not None
        return layout.to(device)
    steps, rows, count = len(batch_sizes), int(batch_sizes[0]), int(batch_sizes.sum())
    lengths = on_device((torch.arange(rows) < batch_sizes[:, None]).sum(0), device)
    valid = (torch.arange(steps, device=device)[:, None] < lengths).flatten()
    # Values are packed in the order of their places, so that each one's number is that of those before; what is none
    # goes behind the last.
    number = torch.where(valid, valid.cumsum(0) - 1, count)
    places = number.new_empty(count + 1).scatter_(0, number, torch.arange(len(valid), device=device))[:count]
    return Layout(steps, rows, lengths, places)


def layout_of(batch_sizes: Tensor | None, offsets: Tensor | None) -> Layout | None:
    """Of the one that there is, on its device."""
    if batch_sizes is not None:
        rows = torch.arange(int(batch_sizes[0]))
        valid = rows < batch_sizes[:, None]  # [T, B]
        return Layout(len(batch_sizes), len(rows), valid.sum(0), valid.flatten().nonzero().squeeze(1))
    if offsets is None:
        return None
    lengths = offsets.diff()
    rows, steps = places(offsets, int(offsets[-1]))
    return Layout(int(lengths.max()), len(lengths), lengths, steps * len(lengths) + rows)


def places(offsets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each of the N values of rows one behind the other its row and its step."""
    of_rows, of_values = (torch.arange(n, device=offsets.device) for n in (len(offsets) - 1, count))
    rows = of_rows.repeat_interleave(offsets.diff(), output_size=count)
    return rows, of_values - offsets[rows]
