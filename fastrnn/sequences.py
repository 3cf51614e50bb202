"""Around a recurrent network: a sequence's outputs as one vector, a state without its history, equal bits in chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ._C import set_uniform
from .checks import check_values_of, given_lengths
from .nested import is_jagged, jagged
from .packing import on_device, pad
from .transforms import is_plain, is_plain_call


def pool(
    output: Tensor | PackedSequence,
    lengths: Tensor | None = None,
    how: Literal["last", "mean", "max"] = "last",
    *,
    batch_first: bool = False,
    bidirectional: bool = False,
) -> Tensor:
    """One vector for each sequence, from the steps that it has.

    What stands in the padding, NaN included, reaches neither the result nor a gradient.

    Args:
        output: [T, B, N], with ``batch_first`` [B, T, N]; any float dtype. Or packed, or jagged [B, j, N].
        lengths: integer [B], of any device; ``None`` where every row has T steps, and beside packed or nested output.
        how: ``'last'``, the output at step lengths - 1; ``'mean'`` or ``'max'`` over the steps.
        batch_first: the layout of output; packed and nested ones have their own.
        bidirectional: for ``'last'``: the second half of N comes from step 0, where the reverse direction ends, so that
            the result is what ``h_n`` holds of the last layer. Without it that half is of the step that the
            reverse direction has begun with, which has seen no other. Mean and max are the same for both.

    Returns:
        [B, N], in the order of the batch (a PackedSequence's before it was sorted). A row of length 0 is 0.

    Raises:
        TypeError: output or lengths of another kind or dtype.
        ValueError: lengths beside packed or nested output, or out of range; another ``how``.
        RuntimeError: a shape that does not fit; T is 0.
    """
    if how not in ("last", "mean", "max"):
        raise ValueError(f"how: expected 'last', 'mean' or 'max', got {how!r}")
    order = None
    if isinstance(output, PackedSequence):
        if lengths is not None:
            raise ValueError(f"lengths: expected None with a PackedSequence, got {type(lengths).__name__}")
        order = output.unsorted_indices
        output, lengths = pad(output.data, output.batch_sizes)
        lengths, batch_first = on_device(lengths, output.device), False
    elif is_jagged(output, "output"):
        if lengths is not None:
            raise ValueError(f"lengths: expected None with a nested output, got {type(lengths).__name__}")
        rows = jagged(output)
        output, lengths, batch_first = rows.padded(), rows.lengths, False
    if not isinstance(output, Tensor):
        raise TypeError(f"output: expected a tensor or a PackedSequence, got {type(output).__name__}")
    if not output.is_floating_point():
        raise TypeError(f"output: expected a float dtype, got {output.dtype}")
    if output.dim() != 3:
        raise RuntimeError(f"output: expected 3 dimensions, got {list(output.shape)}")
    if batch_first:
        output = output.transpose(0, 1)
    T, B, N = output.shape
    if T == 0:
        raise RuntimeError(f"output: expected at least one step, got {list(output.shape)}")
    if bidirectional and N % 2:
        raise RuntimeError(f"output: expected an even last dimension with bidirectional, got {N}")
    ends = torch.full((B,), T, device=output.device) if lengths is None else _ends(lengths, output)
    ends = ends[:, None]
    if how == "last":
        last = output.gather(0, (ends - 1).clamp(min=0).expand(B, N)[None])[0]
        if bidirectional:
            last = torch.where(torch.arange(N, device=output.device) < N // 2, last, output[0])
        pooled = torch.where(ends > 0, last, 0)
    else:
        valid = (torch.arange(T, device=output.device)[:, None] < ends[:, 0])[..., None]
        if how == "max":
            pooled = torch.where(ends > 0, torch.where(valid, output, -torch.inf).amax(0), 0)
        else:
            wide = torch.promote_types(output.dtype, torch.float32)
            pooled = (torch.where(valid, output, 0).sum(0, dtype=wide) / ends.clamp(min=1)).to(output.dtype)
    return pooled if order is None else pooled.index_select(0, order)


def _ends(lengths: Any, output: Tensor) -> Tensor:
    """lengths as int64 on output's device. Their values are looked at where that waits for nothing, else clamped."""
    T, found = output.shape[0], given_lengths(lengths, output)
    if is_plain_call(lengths) and is_plain(lengths):
        check_values_of(lengths, T)
    return found.clamp(0, T)


def detach(state: Any) -> Any:
    """The state without its history, for truncated backpropagation through time.

    Args:
        state: a tensor, ``None``, or tuples, lists and dicts of such, however deep.

    Returns:
        The same structure (of a subclass of dict, list or tuple a plain one, but of a named tuple the same), every
        tensor detached. Nothing is copied.

    Raises:
        TypeError: something else in it.
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, dict):
        return {key: detach(value) for key, value in state.items()}
    if isinstance(state, list):
        return [detach(x) for x in state]
    if isinstance(state, tuple):
        found = tuple(map(detach, state))
        return type(state)._make(found) if hasattr(state, "_make") else found
    raise TypeError(f"state: expected tensors, None, tuples, lists or dicts of them, got {type(state).__name__}")


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """Within it a sequence gives the same bits in one call and in chunks of any sizes, on any number of threads.

    Otherwise a short call may add up a sum in another order than a long one. For equal inputs and states every output
    and final state of a forward pass is equal: of float32 and float64, dense input or tokens, of quantized modules,
    with and without gradients. Calls must have the same rows (batch), run on the CPU, in this thread, and in plain
    eager mode: under torch.compile, autocast and torch.func torch's own matrix product takes part, whose sums are its
    own; of half types, states are rounded where one call hands them to the next. Gradients are not covered. A reverse
    direction has no chunks to hand its state along.

    A call of one step costs the same. A longer one of few rows (the batch) is slower, for its weights are read as they
    lie; see docs/performance-cpu.md.
    """
    before = set_uniform(True)
    try:
        yield
    finally:
        set_uniform(before)
