"""pool(): one row for each sequence, by its length; detach(): a state that leads no further back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from tests.helpers import (
    leaf,
    randn,
    weighted,
)
from tests.sequences.cases import DEEP, LENGTHS, SIZES

# ---- pool ----


def pooled_by_hand(output: Tensor, lengths: list[int], how: str, bidirectional: bool) -> Tensor:
    rows = []
    for b, length in enumerate(lengths):
        steps = output[:length, b]
        if length == 0:
            rows.append(torch.zeros_like(output[0, b]))
        elif how == "last":
            half = output.shape[2] // 2 if bidirectional else output.shape[2]
            rows.append(torch.cat([steps[-1, :half], steps[0, half:]]))
        else:
            rows.append(steps.mean(0) if how == "mean" else steps.max(0).values)
    return torch.stack(rows)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("how", ["last", "mean", "max"])
def test_pool(how: Any, bidirectional: bool) -> None:
    """Results, and gradients that are exactly 0 in a padding of NaN and inf."""
    for T, N in itertools.product(SIZES, (2, 18, 130)):
        lengths = [T, 0, 1, (T + 1) // 2]
        given = torch.tensor(lengths)
        padding = torch.arange(T)[:, None] >= given
        clean = leaf(randn(T, 4, N))
        want = pooled_by_hand(clean, lengths, how, bidirectional)
        (want_grad,) = torch.autograd.grad(weighted([want]), clean)
        for dirt in (torch.nan, torch.inf):
            dirty = leaf(torch.where(padding[..., None], dirt, clean.detach()))
            for input, options in ((dirty, {}), (dirty.transpose(0, 1), {"batch_first": True})):
                got = fastrnn.pool(input, given.int(), how, bidirectional=bidirectional, **options)
                (got_grad,) = torch.autograd.grad(weighted([got]), dirty)
                torch.testing.assert_close(got, want)
                torch.testing.assert_close(got_grad, want_grad)
                assert (got_grad[padding] == 0).all()
        whole = fastrnn.pool(clean, how=how, bidirectional=bidirectional)
        torch.testing.assert_close(whole, pooled_by_hand(clean, [T] * 4, how, bidirectional))


@pytest.mark.parametrize("how", ["last", "mean", "max"])
def test_pool_of_packed_and_derivatives(how: Any) -> None:
    output = randn(5, 4, 3)
    want = pooled_by_hand(output, LENGTHS.tolist(), how, False)
    for batch_first in (False, True):  # a PackedSequence has no layout
        packed = pack_padded_sequence(output, LENGTHS, enforce_sorted=False)
        torch.testing.assert_close(fastrnn.pool(packed, how=how, batch_first=batch_first), want)
    function = lambda x: fastrnn.pool(x.sin(), torch.tensor([5, 0, 1, 4]), how)  # noqa: E731
    assert gradcheck(function, (output.requires_grad_(),), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, (output,))
    torch.testing.assert_close(
        vmap(lambda x, n: fastrnn.pool(x, n, how))(
            torch.stack([output, -output]), torch.stack([LENGTHS, LENGTHS.flip(0)])
        ),
        torch.stack([fastrnn.pool(output, LENGTHS, how), fastrnn.pool(-output, LENGTHS.flip(0), how)]),
    )


def test_pool_last_is_the_final_state() -> None:
    module = fastrnn.GRU(3, 5, **DEEP)
    lengths = torch.tensor([5, 0, 1, 4])
    output, h_n = module(torch.randn(5, 4, 3), lengths=lengths)
    got = fastrnn.pool(output, lengths, bidirectional=True)
    assert torch.equal(got, torch.cat([h_n[-2], h_n[-1]], 1))


def test_pool_of_half_types() -> None:
    """A mean of values whose sum float16 does not hold."""
    output = torch.full((100, 2, 3), 1000, dtype=torch.float16)
    got = fastrnn.pool(output, torch.tensor([100, 70]), "mean")
    assert got.dtype == torch.float16 and (got == 1000).all()


X = torch.zeros(5, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, None, "first"), ValueError, "how: expected 'last', 'mean' or 'max', got 'first'"),
        ((X[0],), RuntimeError, r"output: expected 3 dimensions, got \[4, 3\]"),
        ((X[:0], torch.zeros(4, dtype=torch.int64)), RuntimeError, "output: expected at least one step"),
        (([X],), TypeError, "output: expected a tensor or a PackedSequence, got list"),
        ((X.long(),), TypeError, "output: expected a float dtype, got torch.int64"),
        ((X, [5, 5, 5, 5]), TypeError, r"lengths: expected an integer tensor \[4\], got list"),
        ((X, torch.ones(4)), TypeError, "lengths: expected an integer dtype, got torch.float32"),
        ((X, torch.ones(5).long()), RuntimeError, r"lengths: expected \[4\] \(batch\), got \[5\]"),
        ((X, torch.tensor([5, 6, 0, 0])), ValueError, r"lengths: expected values in \[0, 5\], got 6"),
        ((X, torch.tensor([5, 0, -1, 0])), ValueError, r"lengths: expected values in \[0, 5\], got -1"),
        ((pack_padded_sequence(X, torch.tensor([5, 4, 3, 2])), torch.ones(4)), ValueError, "lengths: expected None"),
    ],
    ids=range(11),
)
def test_pool_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastrnn.pool(*arguments)
    if len(arguments) == 1 and error is RuntimeError:
        with pytest.raises(RuntimeError, match="an even last dimension with bidirectional, got 3"):
            fastrnn.pool(X, bidirectional=True)


# ---- detach ----


def test_detach() -> None:
    x = torch.ones(2, requires_grad=True) * 2
    state = {"lstm": (x, x), "gru": x, "list": [None, (x,)]}
    got = fastrnn.detach(state)
    assert type(got["lstm"]) is tuple and type(got["list"]) is list and got["list"][0] is None
    for y in (*got["lstm"], got["gru"], got["list"][1][0]):
        assert not y.requires_grad and y.data_ptr() == x.data_ptr()
    assert fastrnn.detach(None) is None
    pair_of = torch.return_types.max((x, x))
    assert type(fastrnn.detach(PackedSequence(x, torch.tensor([2])))) is PackedSequence
    assert not fastrnn.detach(tuple(pair_of))[0].requires_grad
    assert not any(y.requires_grad for y in fastrnn.detach(pair_of)), "of torch's own kind of tuple, too"
    (kept,) = fastrnn.detach(type("Cache", (list,), {})([x]))  # its constructor takes one iterable, as list's does
    assert torch.equal(kept, x) and not kept.requires_grad
    with pytest.raises(TypeError, match="state: expected tensors, None, tuples, lists or dicts of them, got float"):
        fastrnn.detach((x, 1.0))
