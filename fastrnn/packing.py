"""Sequences of different lengths: padded [T, B, n] with lengths, and packed [N, n] with batch sizes."""

from __future__ import annotations

from typing import Any

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


def packed_layout(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """lengths [B], and where each row of packed data stands among the T * B rows of padded data."""
    rows = torch.arange(int(batch_sizes[0]))
    valid = rows < batch_sizes[:, None]  # [T, B]
    return valid.sum(0), valid.flatten().nonzero().squeeze(1)
