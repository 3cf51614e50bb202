"""Initial states: with the batch first, and learned, against the same states passed by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from tests.helpers import (
    assert_equal,
    build,
    collect,
    leaf,
    make_state,
    map_state,
    randn,
    tensors,
    weighted,
)
from tests.sequences.cases import DEEP, KIND, LENGTHS, SIZES, enlarged, results

# ---- states with the batch first ----


@KIND
def test_state_batch_first(kind: str) -> None:
    """Torch.nn's results with the states turned; unbatched ones have no batch to come first."""
    for options in ({}, DEEP, {"batch_first": True}, {"proj_size": 2} if kind == "LSTM" else {"bidirectional": True}):
        theirs = build(nn, kind, 3, 5, dtype=torch.float64, **options)
        ours = build(fastrnn, kind, 3, 5, dtype=torch.float64, state_batch_first=True, **options)
        ours.load_state_dict(theirs.state_dict())
        groups = ours.num_layers * (2 if ours.bidirectional else 1)
        hx = make_state(kind, groups, 4, hidden=5, proj=options.get("proj_size", 0))
        x = randn(4, 6, 3) if ours.batch_first else randn(6, 4, 3)
        packed = pack_padded_sequence(x, torch.tensor([6, 1, 3, 6]), ours.batch_first, enforce_sorted=False)
        for input, state in itertools.product((x, packed), (None, hx)):
            output, finals = ours(input, map_state(lambda s: s.transpose(0, 1), state))
            expected, states = theirs(input, state)
            if input is packed:
                output, expected = output.data, expected.data
            torch.testing.assert_close(output, expected)
            for got, want in zip(tensors(finals), tensors(states), strict=True):
                assert got.is_contiguous()
                torch.testing.assert_close(got, want.transpose(0, 1))
        alone, state = x[0] if ours.batch_first else x[:, 0], map_state(lambda s: s[:, 0], hx)
        assert_equal(results(ours, alone, state), results(theirs, alone, state))


@KIND
def test_state_batch_first_gradients(kind: str) -> None:
    first = build(fastrnn, kind, 3, 5, dtype=torch.float64, state_batch_first=True, **DEEP)
    plain = build(fastrnn, kind, 3, 5, dtype=torch.float64, **DEEP)
    plain.load_state_dict(first.state_dict())
    x, resets = randn(6, 4, 3), torch.rand(6, 4) < 0.3
    hx, fresh = (make_state(kind, 4, 4, hidden=5, seed=seed) for seed in (3, 5))
    found = []
    for module, turn in ((plain, lambda s: s), (first, lambda s: s.transpose(0, 1))):
        states = [leaf(s) for s in (*tensors(hx), *tensors(fresh))]
        given, replaced = states[: len(tensors(hx))], states[len(tensors(hx)) :]
        as_state = (lambda s: tuple(s)) if kind == "LSTM" else (lambda s: s[0])
        output, finals = module(
            x,
            as_state([turn(s) for s in given]),
            lengths=torch.tensor([6, 0, 3, 5]),
            resets=resets,
            reset_state=as_state([turn(s) for s in replaced]),
        )
        module.zero_grad()
        finals = [turn(s) for s in tensors(finals)]
        weighted([output, *finals]).backward()
        found.append([output, *finals, *(s.grad for s in states), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(found[1], found[0])


def test_state_batch_first_bad_states() -> None:
    lstm, gru = fastrnn.LSTM(3, 5, 2, state_batch_first=True), fastrnn.GRU(3, 5, 2, state_batch_first=True)
    x, right, wrong = torch.randn(6, 4, 3), torch.zeros(4, 2, 5), torch.zeros(2, 4, 5)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(4, 2, 5\), got \[2, 4, 5\]"):
        lstm(x, (wrong, right))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(4, 2, 5\), got \[2, 4, 5\]"):
        lstm(x, (right, wrong))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(4, 2, 5\), got \[2, 4, 5\]"):
        gru(x, wrong)
    packed = pack_padded_sequence(x, torch.full((4,), 6))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(4, 2, 5\), got \[2, 4, 5\]"):
        gru(packed, wrong)


# ---- learned initial states ----


@pytest.mark.parametrize("batch_first", [False, True])
@KIND
def test_learned_initial_state(kind: str, batch_first: bool) -> None:
    """The same as passing the parameters, expanded, to torch.nn's module."""
    for H, proj in ((1, 0), (3, 2), (17, 5), (129, 0)) if kind == "LSTM" else ((h, 0) for h in SIZES):
        sizes = {"proj_size": proj} if proj else {}
        options = {"batch_first": batch_first, "dtype": torch.float64, **DEEP, **sizes}
        ours = enlarged(build(fastrnn, kind, 3, H, learn_initial_state=True, **options))
        theirs = build(nn, kind, 3, H, **options)
        theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "_0_l" not in k})
        learned = {name: leaf(p.clone()) for name, p in ours.named_parameters() if "_0_l" in name}
        layers = [f"l{k}{suffix}" for k in range(2) for suffix in ("", "_reverse")]
        names = "hc" if kind == "LSTM" else "h"
        assert sorted(learned) == sorted(f"{s}_0_{at}" for s in names for at in layers)
        assert all(x.shape == ((proj or H) if name[0] == "h" else H,) for name, x in learned.items())
        stacked = [torch.stack([learned[f"{s}_0_{at}"] for at in layers]) for s in names]
        x = randn(4, 5, 3) if batch_first else randn(5, 4, 3)
        packed = pack_padded_sequence(x, LENGTHS, batch_first, enforce_sorted=False)
        for input, B in ((x, 4), (packed, 4), (x[0], None)):
            states = [s if B is None else s.unsqueeze(1).expand(-1, B, -1) for s in stacked]
            got = results(ours, input)
            theirs.zero_grad()
            for leaf_ in learned.values():
                leaf_.grad = None
            output, finals = theirs(input, tuple(states) if kind == "LSTM" else states[0])
            named = dict(theirs.named_parameters()) | learned
            want = collect(output, finals, {name: named[name] for name, _ in ours.named_parameters()})
            assert_equal(got, want)


@KIND
def test_learned_state_is_the_reset_state(kind: str) -> None:
    """Of a row that resets everywhere the state is the learned one before every step; a state that is passed wins."""
    module = enlarged(build(fastrnn, kind, 3, 5, learn_initial_state=True, dtype=torch.float64))
    x = randn(4, 2, 3)
    resets = torch.ones(4, 2, dtype=torch.bool)
    output, _ = module(x, make_state(kind, 1, 2, hidden=5), resets=resets)
    apart, _ = module(x.reshape(1, 8, 3))
    torch.testing.assert_close(output.reshape(8, 5), apart[0])
    gradients = [torch.autograd.grad(y.sin().sum(), list(module.parameters())) for y in (output, apart)]
    torch.testing.assert_close(*gradients)

    zeros = map_state(torch.zeros_like, make_state(kind, 1, 2, hidden=5))
    output, _ = module(x, zeros, resets=resets, reset_state=zeros)
    plain = build(fastrnn, kind, 3, 5, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "_0_l" not in k})
    torch.testing.assert_close(output, plain(x, resets=resets)[0])


def test_learned_state_of_rows_without_steps() -> None:
    module = enlarged(fastrnn.LSTM(3, 5, learn_initial_state=True))
    _, (h, c) = module(torch.randn(4, 2, 3), lengths=torch.tensor([0, 4]))
    assert torch.equal(h[0, 0], module.h_0_l0) and torch.equal(c[0, 0], module.c_0_l0)


@KIND
def test_learned_state_starts_as_zeros(kind: str) -> None:
    """So the module starts as one without it, from the same seed; meta modules are given their values later."""
    torch.manual_seed(3)
    plain = build(fastrnn, kind, 3, 5, **DEEP)
    torch.manual_seed(3)
    learned = build(fastrnn, kind, 3, 5, learn_initial_state=True, **DEEP)
    for name, p in learned.named_parameters():
        assert torch.equal(p, torch.zeros_like(p) if "_0_l" in name else getattr(plain, name))
    x = torch.randn(4, 2, 3)
    assert torch.equal(plain(x)[0], learned(x)[0])
    meta = build(fastrnn, kind, 3, 5, learn_initial_state=True, device="meta", **DEEP)
    assert meta.h_0_l0.is_meta
    meta.to_empty(device="cpu").reset_parameters()
    assert not meta.h_0_l1_reverse.any() and meta.weight_hh_l0.any()


def test_learned_state_dict() -> None:
    plain, learned = fastrnn.LSTM(3, 5), fastrnn.LSTM(3, 5, learn_initial_state=True)
    assert not any("_0_l" in name for name in plain.state_dict())
    assert set(learned.state_dict()) - set(plain.state_dict()) == {"h_0_l0", "c_0_l0"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"h_0_l0", "c_0_l0"'):
        learned.load_state_dict(plain.state_dict())
    assert learned.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["h_0_l0", "c_0_l0"]
    assert list(map(len, learned.all_weights)) == [4]
    assert learned.double().h_0_l0.dtype == torch.float64


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_TANH"])
def test_learned_state_derivatives(kind: str) -> None:
    module = enlarged(build(fastrnn, kind, 2, 2, bidirectional=True, learn_initial_state=True, dtype=torch.float64))
    x, lengths = randn(3, 3, 2), torch.tensor([3, 0, 2])
    resets = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(parameters, values, strict=True))
        output, finals = functional_call(module, named, (x,), {"lengths": lengths, "resets": resets})
        return output, *tensors(finals)

    values = tuple(parameters.values())
    assert gradcheck(function, values, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, values)


def test_learned_state_under_vmap() -> None:
    models = [enlarged(fastrnn.LSTM(3, 5, learn_initial_state=True, dtype=torch.float64)) for _ in range(3)]
    x = randn(6, 4, 3)
    stacked, _ = stack_module_state(models)
    ensemble = vmap(lambda p: functional_call(models[0], p, (x,))[0])({k: v.detach() for k, v in stacked.items()})
    torch.testing.assert_close(ensemble, torch.stack([m(x)[0] for m in models]))
    torch.testing.assert_close(vmap(models[0], 1, (1, 1))(x), models[0](x))
