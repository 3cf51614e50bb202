"""return_all_states: the cell state c of every step, against a loop over torch.nn's cells in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from tests.helpers import (
    leaf,
    make_state,
    map_state,
    randn,
    weighted,
)
from tests.sequences.cases import DEEP, SIZES, enlarged
from tests.transform_cases import FUSED, count_calls


def lstm_by_hand(module: nn.Module, x: Tensor, h: Tensor, c: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """h and c of every step of one layer, [T, B, D*n] each, by a loop over rows and steps; 0 in the padding."""
    every_h, every_c = [], []
    for d, weights in enumerate(module._weights()[0]):
        w_ih, w_hh, b_ih, b_hh, w_hr, _ = weights
        rows_h, rows_c = [], []
        for b, length in enumerate(lengths):
            hs, cs = [torch.zeros_like(h[d, b])] * len(x), [torch.zeros_like(c[d, b])] * len(x)
            state = h[d, b], c[d, b]
            for t in reversed(range(length)) if d else range(length):
                i, f, g, o = (w_ih @ x[t, b] + b_ih + w_hh @ state[0] + b_hh).chunk(4)
                after = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
                out = o.sigmoid() * after.tanh()
                state = (out if w_hr is None else w_hr @ out), after
                hs[t], cs[t] = state
            rows_h.append(torch.stack(hs))
            rows_c.append(torch.stack(cs))
        every_h.append(torch.stack(rows_h, 1))
        every_c.append(torch.stack(rows_c, 1))
    return torch.cat(every_h, 2), torch.cat(every_c, 2)


@pytest.mark.parametrize("proj", [0, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_c(bidirectional: bool, proj: int) -> None:
    """Values, and the gradients of a loss of h, c, or both, of all arguments; lengths with a 0 among them."""
    D = 2 if bidirectional else 1
    options = {"bidirectional": bidirectional, "proj_size": proj, "dtype": torch.float64}
    for H in (3, 17, 129) if proj else SIZES:
        module = fastrnn.LSTM(3, H, return_all_states=True, **options)
        x, (h, c) = leaf(randn(5, 4, 3)), map_state(leaf, make_state("LSTM", D, 4, hidden=H, proj=proj))
        for lengths in (None, [5, 0, 1, 4]):
            given = None if lengths is None else torch.tensor(lengths)
            got = [(r := module(x, (h, c), lengths=given))[0], r[2]]
            want = lstm_by_hand(module, x, h, c, lengths or [5] * 4)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
            for used in ([0], [1], [0, 1]):
                leaves = [x, h, c, *module.parameters()]
                found = [
                    torch.autograd.grad(weighted([ys[i] for i in used]), leaves, retain_graph=True)
                    for ys in (got, want)
                ]
                torch.testing.assert_close(*found)


@pytest.mark.parametrize("proj", [0, 2])
def test_every_c_batched_gradients(proj: int) -> None:
    module = fastrnn.LSTM(
        3, 5, bidirectional=True, return_all_states=True, proj_size=proj, dtype=torch.float64, token_input=True
    )
    for x in (randn(6, 2, 3), torch.arange(12).reshape(6, 2) % 3):
        state, vectors = map_state(leaf, make_state("LSTM", 2, 2, hidden=5, proj=proj)), randn(4, 6, 2, 10)
        leaves, c = [*state, *module.parameters()], module(x, state)[2]
        got = torch.autograd.grad(c, leaves, vectors, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(c, leaves, v, retain_graph=True) for v in vectors]
        torch.testing.assert_close(got, tuple(map(torch.stack, zip(*each, strict=True))))


def test_every_c_of_layouts() -> None:
    """Batch first, unbatched, packed, stacked, with resets: the same numbers, laid out as the output is."""
    module = fastrnn.LSTM(3, 5, **DEEP, return_all_states=True)
    x, lengths = torch.randn(5, 4, 3), torch.tensor([5, 2, 1, 4])
    output, (_, c_n), c = module(x, lengths=lengths)
    assert output.shape == c.shape == (5, 4, 10)
    last = fastrnn.pool(c, lengths, bidirectional=True)
    assert torch.equal(last, torch.cat([c_n[-2], c_n[-1]], 1))
    packed, _, packed_c = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert isinstance(packed_c, PackedSequence) and torch.equal(packed_c.batch_sizes, packed.batch_sizes)
    assert torch.equal(pad_packed_sequence(packed_c)[0], c)
    alone = module(x[:, 0])[2]
    assert alone.shape == (5, 10)
    torch.testing.assert_close(alone, c[:, 0])
    first = copy.deepcopy(module)
    first.batch_first = True
    torch.testing.assert_close(first(x.transpose(0, 1), lengths=lengths)[2], c.transpose(0, 1))
    resets = torch.zeros(5, 4, dtype=torch.bool)
    resets[2] = True
    again = module(x, resets=resets)[2]
    torch.testing.assert_close(again, torch.cat([module(x[:2])[2], module(x[2:])[2]]))


def test_every_c_derivatives() -> None:
    module = enlarged(fastrnn.LSTM(2, 2, bidirectional=True, return_all_states=True, dtype=torch.float64))
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    resets = torch.tensor([[0, 0], [1, 0], [0, 0]], dtype=torch.bool)

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(parameters, values, strict=True))
        options = {"lengths": torch.tensor([3, 2]), "resets": resets}
        output, _, c = functional_call(module, named, (x,), options)
        return output, c

    values = (randn(3, 2, 2).requires_grad_(), *parameters.values())
    assert gradcheck(function, values, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, values)


def test_every_c_under_vmap() -> None:
    module = fastrnn.LSTM(3, 5, bidirectional=True, return_all_states=True, dtype=torch.float64)
    x = randn(6, 4, 3)
    torch.testing.assert_close(vmap(lambda row: module(row)[2], 1, 1)(x), module(x)[2])
    x.requires_grad_()
    per_row = vmap(grad(lambda row: module(row)[2].sin().sum()), 1, 1)(x)
    torch.testing.assert_close(per_row, torch.autograd.grad(module(x)[2].sin().sum(), x)[0])


@pytest.mark.parametrize("proj", [0, 2])
def test_when_backward_is_fused(proj: int) -> None:
    module, x = fastrnn.LSTM(3, 5, return_all_states=True, proj_size=proj), torch.randn(6, 2, 3)
    with count_calls() as seen:
        output, _, c = module(x)
        (output.sum() + c.detach().sum()).backward()
    assert seen == FUSED
    with count_calls() as seen:
        output, _, c = module(x)
        (output.sum() + c.sum()).backward()
    assert seen == FUSED


def test_every_c_of_a_packed_sequence_and_of_lengths_have_the_same_gradients() -> None:
    module = fastrnn.LSTM(3, 5, **DEEP, return_all_states=True, grad_clip=0.1, dtype=torch.float64)
    x, lengths, found = leaf(randn(70, 40, 3)), torch.randint(1, 71, (40,)), []
    for packed in (False, True):
        if packed:
            _, _, c = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
            c = pad_packed_sequence(c, total_length=70)[0]
        else:
            c = module(x, lengths=lengths)[2]
        found.append(torch.autograd.grad(weighted([c]), [x, *module.parameters()]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_c_of_half_types(dtype: torch.dtype) -> None:
    """Of half weights, and under autocast; gradients through c included."""
    x = torch.randn(6, 2, 3)
    wide = fastrnn.LSTM(3, 5, bidirectional=True, return_all_states=True)
    half = copy.deepcopy(wide).to(dtype)
    found = []
    for module, input, cast in ((wide, x, False), (half, x.to(dtype), False), (wide, x, True)):
        with torch.autocast("cpu", dtype, enabled=cast):
            _, _, c = module(input)
        module.zero_grad()
        c.float().sin().sum().backward()
        assert c.dtype == (torch.float32 if len(found) == 0 else dtype)
        found.append([c.float(), *(p.grad.float() for p in module.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0.05, atol=30 * torch.finfo(dtype).eps)


def test_every_c_is_the_users() -> None:
    """In-place writing breaks no backward pass, for it is a copy of what backward reads."""
    module = fastrnn.LSTM(3, 5, return_all_states=True)
    for x in (torch.randn(6, 2, 3), torch.randn(1, 1, 3)):
        output, _, c = module(x)
        c.zero_()
        output.sum().backward()
