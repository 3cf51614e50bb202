"""Sequences of different lengths: padded [T, B, n] with lengths, and packed [N, n] with batch sizes."""

from __future__ import annotations

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
    torch._foreach_add_(found.split(counts.tolist()), values.tolist())
    return found
