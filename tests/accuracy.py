"""What an error is held against: that of plain torch code in the same dtype, both against float64."""

from __future__ import annotations

from collections.abc import Iterable
from unittest import mock

import torch

from fastrnn import reference

HALVES = (torch.bfloat16, torch.float16)


class _Plain:
    """torch as reference.py sees it, such that every operation rounds to the arguments' dtype. tf32: products round
    their factors to 10 bits of mantissa, as cuBLAS does where torch allows it."""

    def __init__(self, tf32: bool) -> None:
        self.tf32 = tf32

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def promote_types(self, dtype: torch.dtype, _: torch.dtype) -> torch.dtype:
        return dtype  # no wider one for half types

    def bmm(self, *factors: torch.Tensor) -> torch.Tensor:
        return torch.bmm(*(map(to_tf32, factors) if self.tf32 else factors))


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    assert x.dtype == torch.float32
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def plain_forward(arguments: Iterable[object], tf32: bool = False, **options: object) -> tuple[torch.Tensor, ...]:
    with mock.patch.object(reference, "torch", _Plain(tf32)):
        return reference.forward(*arguments, **options)


def plain_backward(arguments: Iterable[object], tf32: bool = False, **options: object) -> tuple[torch.Tensor, ...]:
    with mock.patch.object(reference, "torch", _Plain(tf32)):
        return reference.backward(*arguments, **options)


def magnified(cell):
    """How many times a cell may magnify rounding: what a normalisation divides by may be small."""
    return 8 if cell.endswith("norm") else 1


def errors(got, want, plain, dtype, magnified=1):
    """For each result (ours, what is allowed): twice the plain code's error plus rounding, 4 units of a half type or
    32 of a wide one, of the largest value. NaN is never allowed."""
    rounding = torch.finfo(dtype).eps * (4 if dtype in HALVES else 32) * magnified
    for a, b, c in zip(got, want, plain, strict=True):
        assert a.shape == b.shape == c.shape
        if not a.numel():
            yield 0.0, 0.0
            continue
        ours, theirs = ((x.double() - b).abs().max().item() for x in (a, c))
        yield ours, 2 * theirs + rounding * max(b.abs().max().item(), 1e-3)


def assert_as_exact(got, want, plain, dtype, names, case, magnified=1):
    for name, (ours, allowed) in zip(names, errors(got, want, plain, dtype, magnified), strict=True):
        assert ours <= allowed, (case, name, f"{ours:.2e}, allowed {allowed:.2e}")
