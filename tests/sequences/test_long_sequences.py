"""A million steps, training over 200,000 of them, and offsets past 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import fastrnn
from fastrnn.ops import recurrent_forward
from tests.helpers import (
    TOLERANCE,
    build,
    randn,
    tensors,
)
from tests.sequences.cases import KIND, results


@KIND
def test_a_million_steps(kind: str) -> None:
    """Inference over T = 1e6: the end depends on no more than what came shortly before it."""
    T = 1_000_000
    module = build(fastrnn, kind, 2, 3)
    x = torch.randn(T, 1, 2)
    resets = torch.zeros(T, 1, dtype=torch.bool)
    resets[T - 50] = True
    with torch.no_grad():
        output, finals = module(x, resets=resets)
        short, ends = module(x[-50:])
    assert output.shape == (T, 1, 3) and output.isfinite().all()
    torch.testing.assert_close(output[-50:], short)
    torch.testing.assert_close(finals, ends)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_training_over_many_steps(kind: str) -> None:
    """A step of T = 200,000, far past 65,535: the gradients of 20,000 sequences of 10 steps that are one."""
    T, parts = 200_000, 20_000
    module = build(fastrnn, kind, 2, 3, dtype=torch.float64)
    x = randn(T, 1, 2)
    resets = (torch.arange(T) % (T // parts) == 0)[:, None]
    got = results(module, x, resets=resets)
    split = x.view(parts, T // parts, 2).transpose(0, 1)
    module.zero_grad()
    output, _ = module(split)
    torch.testing.assert_close(output.transpose(0, 1).reshape(T, 1, 3), got["output"])
    weights = randn(T, 1, 3, seed=100).view(parts, T // parts, 3).transpose(0, 1)
    finals = {k: v for k, v in got.items() if k in ("h_n", "c_n")}
    last = module(split[:, -1:])[1]
    loss = (output * weights).sum()
    for i, (name, final) in enumerate(zip(finals, tensors(last), strict=True)):
        torch.testing.assert_close(final, finals[name])
        loss = loss + (final * randn(*final.shape, seed=101 + i)).sum()
    loss.backward()
    for name, p in module.named_parameters():
        want = got[f"grad of {name}"]
        assert (p.grad - want).abs().max() <= TOLERANCE[torch.float64] * want.abs().max().clamp(min=1)


def test_offsets_are_64_bit() -> None:
    """Steps further apart than 2^31 elements. Only the pages that are touched take memory."""
    T, H, apart = 3, 3, 2**30 + 2**20
    try:
        far = torch.empty((T - 1) * apart + H, dtype=torch.float32)
    except RuntimeError:
        pytest.skip("no address space for 8 GiB")
    gates = far.as_strided((T, 1, H), (apart, H, 1))
    gates.copy_(torch.randn(T, 1, H))
    weight, h_0 = torch.randn(1, H, H), torch.zeros(1, H)
    args = (weight, None, None, None, h_0, *[None] * 8, [False], False)
    near = recurrent_forward("rnn_tanh", gates.contiguous(), *args)
    assert torch.equal(recurrent_forward("rnn_tanh", gates, *args)[0], near[0])
    module = fastrnn.RNN(H, H)
    with torch.no_grad():
        assert torch.equal(module(gates)[0], module(gates.contiguous())[0])
