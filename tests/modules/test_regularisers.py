"""Recurrent dropout and zoneout against their equations, written here once more as a loop over one row's steps, with
the masks that a call has drawn: every option, every transform."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import heads, ops
from fastrnn.masks import Noise
from fastrnn.records import Masks
from tests.helpers import (
    KINDS,
    assert_equal,
    build,
    check_derivatives,
    collect,
    evaluate,
    leaf,
    randn,
    tensors,
    threads,
)
from tests.kernels.test_kernels import Case

ROOT = Path(__file__).resolve().parents[2]
T, B, I, H = 6, 3, 4, 5  # noqa: E741
LENGTHS = torch.tensor([6, 2, 4])
NOISES: dict[str, dict[str, Any]] = {
    "recurrent dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "both": {"recurrent_dropout": 0.4, "zoneout": 0.3},
}
# Cells that torch.nn lacks: a class and the options that make it one of them.
UNITS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM, layer norm": ("LSTM", {"layer_norm": True}),
    "GRU, layer norm": ("GRU", {"layer_norm": True}),
    "GRU, reset before": ("GRU", {"reset_after": False}),
    "LiGRU": ("LiGRU", {}),
    "MGU": ("MGU", {}),
    "SLSTM": ("SLSTM", {}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True, "bias": False},
    "projected": {"proj_size": 3, "num_layers": 2},
    "peephole": {"peephole": True},
    "recompute": {"recompute": 2, "bidirectional": True},
    "two directions": {"num_layers": 2, "bidirectional": True},
}
KIND_AND_OPTIONS = pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in KINDS for n in OPTIONS if k == "LSTM" or n not in ("projected", "peephole")]
)
# Of SLSTM there is no zoneout.
UNIT_OPTIONS_AND_NOISE = pytest.mark.parametrize(
    ("unit", "name", "noise"),
    [
        (unit, name, noise)
        for unit in UNITS
        for name in ("two directions", "projected", "recompute")
        for noise in NOISES
        if (name != "projected" or unit == "LSTM, layer norm") and (unit != "SLSTM" or noise == "recurrent dropout")
    ],
)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_noise = pytest.mark.parametrize("noise", NOISES)


def make(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    name, own = UNITS.get(kind, (kind, {}))
    module = build(fastrnn, name, I, H, **{"dtype": torch.float64, **own, **options})
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) * 0.5)
    return module


@contextlib.contextmanager
def drawn() -> Iterator[list[Masks]]:
    """What calls inside it draw, layer by layer."""
    found: list[Masks] = []
    with pytest.MonkeyPatch.context() as patch:
        masks = Noise.masks
        patch.setattr(Noise, "masks", lambda *args: found.append(masks(*args)) or found[-1])
        yield found


def cell_by_hand(
    module: nn.Module, w: dict[str, Tensor], name: str, x: Tensor, multiplied: Tensor, states: list[Tensor]
) -> list[Tensor]:
    """What the cell makes of the states, one row's; products are with `multiplied` in the place of h."""
    gates = len(w[f"weight_ih{name}"]) // H
    bias_ih, bias_hh = (w.get(f"bias_{i}{name}", x.new_zeros(gates * H)).chunk(gates) for i in ("ih", "hh"))
    ih = [W @ x + b for W, b in zip(w[f"weight_ih{name}"].chunk(gates), bias_ih, strict=True)]
    U = w[f"weight_hh{name}"].chunk(gates)
    hh = [W @ multiplied + b for W, b in zip(U, bias_hh, strict=True)]
    h, *others = states
    norm = w.get(f"weight_ln{name}")
    if norm is not None:  # gains of ih, of hh, biases likewise
        gains, biases = norm[: 2 * gates], norm[2 * gates :]
        both = [F.layer_norm(a, (H,), g, b) for a, g, b in zip(ih + hh, gains, biases, strict=False)]
        ih, hh = both[:gates], both[gates:]
    a = [x + y for x, y in zip(ih, hh, strict=True)]
    if module.mode == "LSTM":
        (c,), (i, f, g, o) = others, a
        p_i, p_f, p_o = w.get(f"weight_ch{name}", (0, 0, 0))
        made = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
        seen = made if norm is None else F.layer_norm(made, (H,), norm[16], norm[17])
        new = torch.sigmoid(o + p_o * made) * torch.tanh(seen)
        return [w[f"weight_hr{name}"] @ new if module.proj_size else new, made]
    if module.mode == "SLSTM":  # Beck et al. 2024, equations 8 to 17
        (c, n, m), (i, f, z, o) = others, a
        past = torch.sigmoid(f).log() + m
        top = torch.where(n == 0, i, torch.maximum(past, i))
        c, n = ((past - top).exp() * old + (i - top).exp() * new for old, new in ((c, torch.tanh(z)), (n, 1)))
        return [torch.sigmoid(o) * c / n, c, n, top]
    if module.mode == "GRU":
        r, z = torch.sigmoid(a[0]), torch.sigmoid(a[1])
        n = ih[2] + r * hh[2] if module.reset_after else ih[2] + U[2] @ (r * multiplied) + bias_hh[2]
        return [(1 - z) * torch.tanh(n) + z * h]
    if module.mode == "LiGRU":
        z = torch.sigmoid(a[0])
        return [z * h + (1 - z) * torch.relu(a[1])]
    if module.mode == "MGU":
        f = torch.sigmoid(a[0])
        return [(1 - f) * h + f * torch.tanh(ih[1] + U[1] @ (f * multiplied) + bias_hh[1])]
    return [(torch.tanh if module.mode == "RNN_TANH" else torch.relu)(a[0])]


def by_hand(
    module: nn.Module, masks: list[Masks], x: Tensor, hx: Any = None, lengths: Any = None, resets: Any = None,
    reset_state: Any = None,
) -> Any:  # fmt: skip
    """The network [T, B, I] -> output and final states, a row and a step at a time. Gal and Ghahramani 2016: the
    product reads mask * h. Krueger 2016: what the cell made takes the place of the part 1 - keep of a state."""
    w, D = dict(module.named_parameters()), 1 + module.bidirectional
    widths = module._state_widths()
    R, finals = widths[0], [[] for _ in widths]
    start, fresh = (None if s is None else tensors(s) for s in (hx, reset_state))
    for layer in range(module.num_layers):
        mask_h, *keeps = masks[layer]
        outputs = []
        for d in range(D):
            name, at = f"_l{layer}{'_reverse' if d else ''}", layer * D + d
            zeros = [x.new_zeros(n) for n in widths]
            rows = []
            for b in range(x.shape[1]):
                states, again = (zeros if s is None else [y[at, b] for y in s] for s in (start, fresh))
                steps = range(len(x) if lengths is None else int(lengths[b]))
                row = [x.new_zeros(R) for _ in range(len(x))]
                for t in reversed(steps) if d else steps:
                    boundary = t + d
                    if resets is not None and boundary in steps and resets[boundary, b]:
                        states = again
                    multiplied = states[0] if mask_h is None else mask_h[d, b] * states[0]
                    made = cell_by_hand(module, w, name, x[t, b], multiplied, states)
                    for k, keep in enumerate(keeps):
                        if keep is not None:
                            n = widths[k]
                            kept = keep[t, b, d * n : (d + 1) * n].to(made[k].dtype)
                            made[k] = kept * states[k] + (1 - kept) * made[k]
                    states = made
                    row[t] = states[0]
                rows.append(torch.stack(row))
                for final, last in zip(finals, states, strict=True):
                    final.append(last)
            outputs.append(torch.stack(rows, 1))
        x = torch.cat(outputs, 2)
    states = tuple(torch.stack(final).unflatten(0, (-1, x.shape[1])) for final in finals)
    return x, states if len(states) > 1 else states[0]


def expected(module: nn.Module, masks: list[Masks], x: Tensor, hx: Any = None, **options: Any) -> dict[str, Tensor]:
    module.zero_grad()
    x, leaves = leaf(x), None if hx is None else tuple(map(leaf, tensors(hx)))
    output, finals = by_hand(module, masks, x, leaves, **options)
    named = {"input": x, **dict(zip(("h_0", "c_0", "n_0", "m_0"), leaves or (), strict=False))}
    return collect(output, finals, {**named, **dict(module.named_parameters())})


def state_of(module: nn.Module, seed: int) -> Any:
    count = module.num_layers * (1 + module.bidirectional)
    states = [randn(count, B, n, seed=seed + k) for k, n in enumerate(module._state_widths())]
    if module.mode == "SLSTM":
        states[2] = states[2].abs() + 0.5  # an n is above 0
    return tuple(states) if len(states) > 1 else states[0]


@every_noise
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", ["", "resets", "all"])
@KIND_AND_OPTIONS
def test_every_gradient(kind: str, name: str, given: str, training: bool, noise: str) -> None:
    check_gradients(make(kind, **OPTIONS[name], **NOISES[noise]).train(training), given)


@pytest.mark.parametrize(("training", "given"), [(True, ""), (True, "resets"), (True, "all"), (False, "all")])
@UNIT_OPTIONS_AND_NOISE
def test_every_gradient_of_other_units(unit: str, name: str, given: str, training: bool, noise: str) -> None:
    check_gradients(make(unit, **OPTIONS[name], **NOISES[noise]).train(training), given)


def check_gradients(module: nn.Module, given: str) -> None:
    x, options = randn(T, B, I), {}
    if given:
        options |= {"resets": torch.rand(T, B) < 0.4, "reset_state": state_of(module, 5)}
    if given == "all":
        options["lengths"] = LENGTHS
    hx = state_of(module, 3) if given == "all" else None
    with drawn() as masks:
        got = evaluate(module, x, hx, **options)
    if not masks:  # recurrent dropout alone, in eval mode: C++'s own call
        masks = [Masks()] * module.num_layers
    assert len(masks) == module.num_layers
    assert_equal(got, expected(module, masks, x, hx, **options), 1e-10)


@every_noise
@pytest.mark.parametrize(
    ("kind", "name"),
    [("LSTM", name) for name in ("plain", "two layers, two directions", "projected", "recompute")]
    + [("LSTM, layer norm", "projected")],
)
def test_packed(kind: str, name: str, noise: str) -> None:
    """Masks come by row of the packed sequence, and are drawn for its steps alone."""
    module, x = make(kind, **OPTIONS[name], **NOISES[noise]), randn(T, B, I)
    lengths = torch.tensor([6, 4, 2])
    packed = pack_padded_sequence(x, lengths)
    with drawn() as masks:
        output, finals = module(packed)

    def padded(keep: Tensor | None) -> Tensor | None:
        if keep is None or keep.dim() == 3:
            return keep
        assert len(keep) == lengths.sum()
        return pad_packed_sequence(packed._replace(data=keep))[0]

    whole = [Masks(m.mask_h, padded(m.keep_h), padded(m.keep_c)) for m in masks]
    want, states = by_hand(module, whole, x, lengths=lengths)
    output, _ = pad_packed_sequence(output)
    torch.testing.assert_close((output, *finals), (want, *states))
    got, wanted = (torch.autograd.grad(y.sin().sum(), list(module.parameters())) for y in (output, want))
    torch.testing.assert_close(got, wanted)


@every_kind
def test_in_eval_mode_recurrent_dropout_does_nothing(kind: str) -> None:
    module, plain = make(kind, recurrent_dropout=0.5).eval(), make(kind)
    x = randn(T, B, I)
    assert_equal(evaluate(module, x), evaluate(plain, x), 0)


@every_kind
def test_streams_in_eval_mode(kind: str) -> None:
    """Zoneout's expectation knows no beginning of a call: steps and parts give what the whole does."""
    module, x = make(kind, num_layers=2, zoneout=0.3).eval(), randn(T, B, I)
    want, final = module(x)
    state, outputs = None, []
    for t in range(T):
        output, state = module.step(x[t], state)
        outputs.append(output)
    torch.testing.assert_close((torch.stack(outputs), state), (want, final), rtol=1e-12, atol=1e-12)
    first, state = module(x[:2])
    torch.testing.assert_close(torch.cat([first, module(x[2:], state)[0]]), want, rtol=1e-12, atol=1e-12)


def test_a_step_in_training_is_a_call() -> None:
    module, x = make("GRU", recurrent_dropout=0.5, zoneout=0.3), randn(2, B, I)
    with drawn() as masks:
        _, state = module.step(x[0])
        module.step(x[1], state)
    assert not torch.equal(masks[0].mask_h, masks[1].mask_h)
    assert [m.keep_h.shape for m in masks] == [(1, B, H)] * 2


def near(x: Tensor, probability: float) -> bool:
    """Is the mean of these draws within 5 standard deviations?"""
    return abs(x.double().mean().item() - probability) < 5 * math.sqrt(probability * (1 - probability) / x.numel())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rates(dtype: torch.dtype) -> None:
    """The values of masks, how often each comes, and that rows, units, steps, states and directions have their own."""
    torch.manual_seed(0)
    masks = Noise(0.2, (0.3, 0.05), True).masks(torch.zeros(1, dtype=dtype), 2, (40, 30), 30, (50, 60))
    assert [x.shape for x in masks] == [(2, 30, 50), (40, 30, 100), (40, 30, 120)]
    assert [x.dtype for x in masks] == [dtype, torch.bool, torch.bool]
    mask_h, keep_h, keep_c = masks
    assert set(mask_h.unique().tolist()) == {0.0, torch.tensor(1 / 0.8, dtype=dtype).item()}
    assert set(keep_h.unique().tolist()) == set(keep_c.unique().tolist()) == {0.0, 1.0}
    for dropped in (mask_h == 0, (mask_h == 0)[0], (mask_h == 0)[:, ::2], (mask_h == 0)[..., ::2]):
        assert near(dropped, 0.2)
    for keep, p in ((keep_h, 0.3), (keep_c, 0.05)):
        for part in (keep, keep[0], keep[:, 0], keep[..., 0]):
            assert near(part, p)
    independent = {
        0.2 * 0.2: (mask_h[0] == 0) & (mask_h[1] == 0),
        0.3 * 0.3: keep_h[1:] * keep_h[:-1],
        0.3 * 0.05: keep_h * keep_c[..., :100],
        0.2 * 0.3: (mask_h[0] == 0) * keep_h[0, :, :50],
    }
    assert all(near(both, p) for p, both in independent.items())


def split_mix(seed: int, i: int) -> int:
    """The i-th number of SplitMix64 (Steele, Lea & Flood 2014), 64 bits."""
    z = seed + (i + 1) * 0x9E3779B97F4A7C15 & 2**64 - 1
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    z = (z ^ z >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return z ^ z >> 31


def check_draws_are_of_split_mix() -> None:
    """Element 2i is of the lower half of the i-th number, element 2i + 1 of the upper half."""
    seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
    for size in (1, 2, 17, 129, 1000):
        halves = [half for i in range(size) for half in divmod(split_mix(seed, i), 2**32)[::-1]][:size]
        for p in (0.25, 0.9):
            want = torch.tensor([float(half < int(p * 2**32)) for half in halves])
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool):
                assert torch.equal(ops.bernoulli(torch.tensor(seed), (size,), p, dtype), want.to(dtype))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_draws_on_every_instruction_set(isa: str) -> None:
    names = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
    if names.index(isa) > names.index(fastrnn.instruction_set()):
        pytest.skip(f"this CPU has no {isa}")
    code = "from tests.modules.test_regularisers import *; check_draws_are_of_split_mix()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"FASTRNN_ISA": isa})


def test_draws_of_a_seed() -> None:
    """They are the seed's alone: the same for every dtype and number of threads, by themselves and among others."""
    seeds, size, floats = (
        torch.tensor([[3, -3, 4], [2**62, 0, 1]]),
        (7, 40961),
        (torch.float64, torch.float16, torch.bool),
    )
    draws = ops.bernoulli(seeds, size, 0.3, torch.float32)
    assert draws.shape == (2, 3, *size) and draws.unique().tolist() == [0.0, 1.0]
    apart = draws.flatten(0, 1).flatten(1)
    assert all(near(x, 0.3) for x in apart)
    assert all(near(a * b, 0.09) for i, a in enumerate(apart) for b in apart[:i])
    for count in (1, 3):
        with threads(count):
            assert torch.equal(ops.bernoulli(seeds, size, 0.3, torch.float32), draws)
    for dtype in floats:
        assert torch.equal(ops.bernoulli(seeds, size, 0.3, dtype), draws.to(dtype))
    odd = ops.bernoulli(seeds[1, 2], (5,), 0.3, torch.float32)
    assert torch.equal(odd, draws[1, 2, 0, :5])

    def one(seed: Tensor) -> Tensor:
        return ops.bernoulli(seed, size, 0.3, torch.float32)

    assert torch.equal(torch.vmap(torch.vmap(one), in_dims=1)(seeds), draws.transpose(0, 1))
    for p in (0.0, 1.0):
        assert (ops.bernoulli(seeds[0, 0], size, p, torch.float32) == p).all()
    with pytest.raises(TypeError, match="seed: expected dtype int64, got Float"):
        ops.bernoulli(seeds.float(), size, 0.3, torch.float32)
    with pytest.raises(TypeError, match="dtype: expected float32, float64, bfloat16, float16 or bool, got Int"):
        ops.bernoulli(seeds, size, 0.3, torch.int32)
    with pytest.raises(ValueError, match=r"p: expected a probability, 0 to 1, got 1\.5"):
        ops.bernoulli(seeds, size, 1.5, torch.float32)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always(probability: float) -> None:
    x, hx = randn(T, B, I), state_of(make("LSTM"), 3)
    plain = make("LSTM")
    for training in (True, False):
        module = make("LSTM", zoneout=probability).train(training)
        output, (h, c) = module(x, hx)
        if probability:  # nothing ever changes
            assert torch.equal(output, hx[0].expand(T, B, H)) and torch.equal(h, hx[0]) and torch.equal(c, hx[1])
        else:
            assert "zoneout" not in vars(module)
    module = make("LSTM", recurrent_dropout=probability)
    if probability:  # the product is of zeros
        with torch.no_grad():
            plain.weight_hh_l0.zero_()
    torch.testing.assert_close(module(x, hx), plain(x, hx), rtol=1e-12, atol=1e-12)


@every_noise
@every_kind
def test_reproducible_from_the_seed_for_any_number_of_threads(kind: str, noise: str) -> None:
    module, x = make(kind, num_layers=2, bidirectional=True, **NOISES[noise]), randn(40, 7, I)

    def run(seed: int, count: int) -> tuple[list[Masks], Tensor]:
        torch.manual_seed(seed)
        with threads(count), drawn() as masks:
            output = module(x)[0]
        return masks, output

    masks, output = run(3, 1)
    for count in (1, 3):
        again, same = run(3, count)
        pairs = [pair for m, n in zip(masks, again, strict=True) for pair in zip(m, n, strict=True)]
        assert all(torch.equal(a, b) for a, b in pairs if a is not None)
        torch.testing.assert_close(same, output, rtol=1e-12, atol=1e-12)
    assert not torch.equal(run(4, 1)[1], output)


@every_noise
@every_kind
def test_recompute_and_checkpoint_see_the_same_masks(kind: str, noise: str) -> None:
    from torch.utils.checkpoint import checkpoint

    module, x = make(kind, num_layers=2, bidirectional=True, **NOISES[noise]), randn(T, B, I)
    torch.manual_seed(2)
    want = evaluate(module, x)
    again = copy.deepcopy(module)
    again.recompute = 2
    torch.manual_seed(2)
    assert_equal(evaluate(again, x), want, 1e-12)
    torch.manual_seed(2)
    module.zero_grad()
    given = leaf(x)
    output, finals = checkpoint(module, given, use_reentrant=False)
    assert_equal(collect(output, finals, {"input": given, **dict(module.named_parameters())}), want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kind", "noise"),
    [
        (kind, noise)
        for kind in (*KINDS, *UNITS)
        for noise in NOISES
        if kind != "LiGRU" and (kind != "SLSTM" or noise == "recurrent dropout")  # a LiGRU's relu has a kink
    ],
)
def test_dtypes(kind: str, noise: str, dtype: torch.dtype) -> None:
    """Half types make the gradients of weights from what the recurrence's op returns."""
    options = {"proj_size": 3} if kind == "LSTM, layer norm" else {}
    module, x = make(kind, bidirectional=True, **options, **NOISES[noise]), randn(T, B, I)
    narrow = copy.deepcopy(module).to(dtype)
    with drawn() as masks:
        got = evaluate(narrow, x.to(dtype))
    exact = copy.deepcopy(narrow).double()
    wide = [Masks(*(None if y is None else y.double() for y in m)) for m in masks]
    want = expected(exact, wide, x.to(dtype).double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 2e-2}[dtype]
    for name, y in want.items():
        assert got[name].dtype == dtype
        assert ((got[name].double() - y).abs() <= tolerance * (1 + y.abs().max())).all(), name


def test_another_default_device() -> None:
    """Masks are of the layer's device, whatever tensors are made on by default."""
    module, x = make("LSTM", **NOISES["both"]), randn(T, B, I)
    want = seeded(module, x)
    with torch.device("meta"):
        got = seeded(module, x)
    assert got.is_cpu and torch.equal(got, want)


def seeded(module: fastrnn.LSTM, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return module(x)[0]


def test_autocast() -> None:
    module, x = make("LSTM", num_layers=2, dtype=torch.float32, **NOISES["both"]), randn(T, B, I, dtype=torch.float32)
    with drawn() as masks, torch.autocast("cpu", torch.bfloat16):
        output, _ = module(x)
    assert output.dtype == masks[0].mask_h.dtype == torch.bfloat16
    wide = [Masks(*(y.double() for y in m)) for m in masks]
    want, _ = by_hand(copy.deepcopy(module).double(), wide, x.double())
    torch.testing.assert_close(output.double(), want, rtol=0, atol=3e-2)
    output.float().sum().backward()


@every_noise
@every_kind
def test_both_orders_of_derivatives(kind: str, noise: str) -> None:
    module, x = build(fastrnn, kind, 2, 2, dtype=torch.float64, **NOISES[noise]), leaf(randn(3, 2, 2) + 1)
    if kind == "RNN_RELU":  # away from its kink
        with torch.no_grad():
            for p in module.parameters():
                p.abs_().mul_(0.3)

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        named = dict(zip(dict(module.named_parameters()), weights, strict=True))
        output, state = torch.func.functional_call(module, named, (x,))
        return output, *tensors(state)

    check_derivatives(run, x, *module.parameters())


@every_noise
@every_kind
def test_vmap_honours_randomness(kind: str, noise: str) -> None:
    """As torch.nn.Dropout: masks for every member, or the same for all, or an error."""
    module, x = make(kind, **NOISES[noise]), randn(T, B, I)
    members = x.expand(3, T, B, I)
    same = torch.vmap(lambda x: module(x)[0], randomness="same")(members)
    torch.testing.assert_close(same[0], same[1], rtol=1e-12, atol=1e-12)
    different = torch.vmap(lambda x: module(x)[0], randomness="different")(members)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: module(x)[0])(members)
    weights = {name: p.detach().expand(3, *p.shape) for name, p in module.named_parameters()}

    def member(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, weights, (x,))[0]

    same = torch.vmap(member, randomness="same")(weights)
    torch.testing.assert_close(same[0], same[2])
    different = torch.vmap(member, randomness="different")(weights)
    assert not torch.equal(different[0], different[1])


@every_noise
@pytest.mark.parametrize(
    ("kind", "name"),
    [("LSTM", "plain"), ("LSTM", "projected"), ("LSTM, layer norm", "projected"), ("GRU, reset before", "plain")],
)
def test_per_sample_gradients(kind: str, name: str, noise: str) -> None:
    """Every sample's own, by the masks of its row: those of the loop of that row alone."""
    module, x = make(kind, bidirectional=True, **OPTIONS[name], **NOISES[noise]), randn(B, T, I)
    module.batch_first = True
    with drawn() as masks:
        output = call_for_per_sample_grads(module, batch_size=B, loss_reduction="sum")(x)[0]
    output.sin().sum().backward()
    for b in range(B):
        of_row = [
            Masks(*(None if y is None else y[:, b : b + 1] for y in m)) for m in masks
        ]  # of [D, B, R] and of [T, B, n]
        wanted, _ = by_hand(module, of_row, x[b : b + 1].transpose(0, 1))
        torch.testing.assert_close(output[b : b + 1].transpose(0, 1), wanted)
        grads = torch.autograd.grad(wanted.sin().sum(), list(module.parameters()))
        for (parameter, p), grad in zip(module.named_parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad_sample[b], grad, msg=lambda text, n=parameter: f"{n}: {text}")


@every_noise
@every_kind
def test_compiled_and_exported(kind: str, noise: str) -> None:
    """They draw what the eager call draws, and in eval mode compute the same."""
    module, x = make(kind, **NOISES[noise]), randn(T, B, I)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    want = evaluate(module, x)
    torch.manual_seed(3)
    got = evaluate(compiled, x)
    assert_equal({k.replace("_orig_mod.", ""): v for k, v in got.items()}, want, 1e-12)
    module.eval()
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["LSTM", "LSTM, layer norm"])
def test_tokens_and_every_c(kind: str) -> None:
    module = make(kind, token_input=True, return_all_states=True, **NOISES["both"])
    tokens = torch.tensor([[0, 3, 1], [2, 2, 0], [1, 0, 3], [3, 1, 1], [0, 2, 2], [1, 3, 0]])
    with drawn() as masks:
        output, state, cells = module(tokens)
    want, finals = by_hand(module, masks, nn.functional.one_hot(tokens, I).double())
    torch.testing.assert_close((output, state), (want, finals))
    torch.testing.assert_close(cells[-1], finals[1][0])
    got = torch.autograd.grad(output.sin().sum() + state[1].sum(), list(module.parameters()), retain_graph=True)
    wanted = torch.autograd.grad(want.sin().sum() + finals[1].sum(), list(module.parameters()))
    torch.testing.assert_close(got, wanted)
    of_cells = torch.autograd.grad(cells[-1].sum(), list(module.parameters()))
    want, finals = by_hand(module, masks, nn.functional.one_hot(tokens, I).double())
    torch.testing.assert_close(of_cells, torch.autograd.grad(finals[1].sum(), list(module.parameters())))


@every_noise
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_heads_draw_what_the_dense_layer_draws(kind: str, noise: str) -> None:
    """Their blocks are a dense layer's weight_hh with zeros between them."""
    found = []
    for dense in (False, True):
        torch.manual_seed(4)
        options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64, **NOISES[noise]}
        module = build(fastrnn, kind, I, 6, num_heads=2, **options)
        if dense:
            blocks, module = module, build(fastrnn, kind, I, 6, **options)
            with torch.no_grad():
                for of_layer, of_dense in zip(blocks._weights(), module._weights(), strict=True):
                    for w, to in zip(of_layer, of_dense, strict=True):
                        for name, x in heads.dense(w)._asdict().items():
                            if x is not None:
                                getattr(to, name).copy_(x)
        torch.manual_seed(5)
        results = evaluate(module, randn(T, B, I), resets=randn(T, B) > 0.8, lengths=LENGTHS)
        found.append({name: x for name, x in results.items() if "weight_hh" not in name})
    assert_equal(*found, 1e-12)


def test_grad_clip_is_of_all_that_a_step_hands_on() -> None:
    """A clip that nothing reaches changes nothing; one that all reach bounds the initial state's gradient."""
    x, hx = randn(T, B, I), tuple(map(leaf, state_of(make("LSTM"), 3)))
    found = []
    for clip in (None, 1e6, 1e-3):
        module = make("LSTM", grad_clip=clip, **NOISES["both"])
        torch.manual_seed(5)
        found.append(torch.autograd.grad(module(x, hx)[0].sum(), hx))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    for g in found[2]:
        assert g.abs().max() <= 1e-3 and (g.abs() == 1e-3).any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTM, layer norm", "GRU, reset before"])
def test_quantized(kind: str, dtype: torch.dtype) -> None:
    """Zoneout's expectation; recurrent dropout is gone, as dropout is."""
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float32}
    module = make(kind, **options, **NOISES["both"]).eval()
    made = fastrnn.quantize(module, dtype)
    x = randn(T, B, I, dtype=torch.float32)
    torch.testing.assert_close(made(x)[0], module(x)[0], rtol=0, atol=5e-2)
    plain = fastrnn.quantize(make(kind, **options), dtype)
    assert (made(x)[0] - plain(x)[0]).abs().max() > 0.1
    assert torch.equal(made.train()(x)[0], made(x)[0])


def test_zoneout_of_one_state() -> None:
    for zoneout, there in (((0.2, 0.0), (True, False)), ((0.0, 0.2), (False, True)), ([0.2, 0.1], (True, True))):
        module, x = make("LSTM", zoneout=zoneout), randn(T, B, I)
        with drawn() as masks:
            got = evaluate(module, x)
        assert (masks[0].keep_h is not None, masks[0].keep_c is not None) == there
        assert_equal(got, expected(module, masks, x), 1e-10)


def test_looks_and_copies() -> None:
    module = fastrnn.LSTM(I, H, recurrent_dropout=0.25, zoneout=(0.1, 0.05))
    assert "recurrent_dropout=0.25, zoneout=(0.1, 0.05)" in repr(module)
    for again in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert (again.recurrent_dropout, again.zoneout) == (0.25, (0.1, 0.05))
    plain = fastrnn.LSTM(I, H, recurrent_dropout=0, zoneout=(0, 0))
    assert vars(plain).keys() == vars(fastrnn.LSTM(I, H)).keys()


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("LSTM", {"recurrent_dropout": 1.5}, ValueError, r"recurrent_dropout should be .* being zeroed, got 1\.5"),
        ("GRU", {"recurrent_dropout": True}, ValueError, r"recurrent_dropout should be .* \[0, 1\] .*, got True"),
        ("RNN", {"zoneout": -0.1}, ValueError, r"zoneout should be .* of a unit keeping its state, got -0\.1"),
        ("RNN", {"zoneout": math.nan}, ValueError, r"zoneout should be a number in range \[0, 1\] .*, got nan"),
        ("LSTM", {"zoneout": "0.1"}, ValueError, r"zoneout should be a number in range \[0, 1\] .*, got '0\.1'"),
        ("LSTM", {"zoneout": (0.1,)}, ValueError, r"zoneout should be a number or a pair \(of h, of c\), got 1 values"),
        ("LSTM", {"zoneout": (0.1, 2)}, ValueError, r"zoneout\[1\] should be a number in .*, got 2"),
        ("LSTM", {"zoneout": (0.1, None)}, ValueError, r"zoneout\[1\] should be a number in .*, got None"),
        ("GRU", {"zoneout": (0.1, 0.1)}, TypeError, r"a pair \(of h, of c\) is only supported for LSTM"),
        ("MGU", {"zoneout": (0.1, 0.1)}, TypeError, r"a pair \(of h, of c\) is only supported for LSTM"),
        (
            "SLSTM",
            {"zoneout": 0.1},
            ValueError,
            "zoneout argument is not supported for SLSTM: c and n are kept divided",
        ),
    ],
)
def test_messages(kind: str, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(fastrnn, kind)(I, H, **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("cell", "name"), [("slstm", "keep_h"), *((c, "keep_c") for c, info in ops.CELLS.items() if info.states != 2)]
)
def test_the_op_refuses_what_a_cell_has_not(cell: str, name: str, device: str) -> None:
    arguments = Case(cell, 2, 3, 1, 4).arguments()
    arguments[name] = torch.ones(2, 3, 4, dtype=torch.float64)
    given = [x.to(device) if isinstance(x, Tensor) else x for x in arguments.values()]
    with pytest.raises(RuntimeError, match=f"recurrent_forward: {name}: expected none for cell '{cell}', got a tensor"):
        ops.recurrent_forward(*given, False)


@every_noise
def test_what_others_cannot_express(noise: str) -> None:
    module = make("LSTM", **NOISES[noise])
    named = ", ".join(f"{name}={value}" for name, value in NOISES[noise].items())
    with pytest.raises(TypeError, match=named):
        fastrnn.to_torch(module)
    if "zoneout" in NOISES[noise]:
        with pytest.raises(ValueError, match=r"it has zoneout=0\.3"):
            fastrnn.weights.to_keras(module)
    else:
        fastrnn.weights.to_keras(module)
    traced = torch.jit.trace(module.eval(), (randn(T, B, I),), check_trace=False)
    torch.testing.assert_close(traced(randn(T, B, I)), module(randn(T, B, I)))
