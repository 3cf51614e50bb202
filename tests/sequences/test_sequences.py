"""Rows of different length and episodes inside a sequence: `lengths`, `resets` and `reset_state`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import functional
from tests.helpers import (
    KINDS,
    Results,
    assert_equal,
    build,
    collect,
    evaluate,
    leaf,
    make_state,
    map_state,
    pair,
    randn,
    tensors,
    threads,
    weighted,
)

STEPS, BATCH, FEATURES, HIDDEN = 7, 5, 3, 6
LENGTHS = [4, 7, 1, 6, 2]
WITH_ZERO = [4, 0, 7, 0, 2]
F64 = torch.float64

KIND = pytest.mark.parametrize("kind", KINDS)
KIND_AND_PROJ = pytest.mark.parametrize(("kind", "proj"), [*((kind, 0) for kind in KINDS), ("LSTM", 2)])
LAYERS = pytest.mark.parametrize("layers", [1, 2], ids=["1layer", "2layers"])
BIDIRECTIONAL = pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
BATCH_FIRST = pytest.mark.parametrize("batch_first", [False, True], ids=["time", "batch"])
STATEFUL = pytest.mark.parametrize("stateful", [False, True], ids=["zeros", "states"])


def network(kind: str, proj: int = 0, layers: int = 2, bidirectional: bool = True, **options: Any) -> nn.Module:
    if proj:
        options["proj_size"] = proj
    return build(fastrnn, kind, FEATURES, HIDDEN, layers, bidirectional=bidirectional, dtype=F64, **options)


def states_of(module: nn.Module, batch: int = BATCH, seed: int = 7) -> Any:
    leading = (module.num_layers * (1 + module.bidirectional), batch)
    return make_state(module.mode, *leading, hidden=HIDDEN, proj=module.proj_size, seed=seed)


def padding(lengths: list[int], steps: int = STEPS) -> Tensor:
    """[T, B], True where there is none."""
    return torch.arange(steps)[:, None] >= torch.tensor(lengths)


def assert_same(actual: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> None:
    """Two (output, final states), up to the order of sums."""
    results = [{str(i): x.detach() for i, x in enumerate((output, *tensors(s)))} for output, s in (actual, expected)]
    assert_equal(*results, tolerance=1e-12)


def random_resets(seed: int = 3, share: float = 0.3) -> Tensor:
    resets = torch.rand(STEPS, BATCH, generator=torch.Generator().manual_seed(seed)) < share
    resets[0, 0] = resets[3, 1] = resets[4, 1] = True
    return resets


# ---- an oracle: torch.nn's modules, one layer, one direction and one step at a time ----


def step_by_step(
    module: nn.Module, input: Tensor, hx: Any, lengths: Tensor | None, resets: Tensor | None, reset_state: Any
) -> tuple[Tensor, Any]:
    """What `module` (ours, time first) should compute. Any of the last four may be None."""
    steps, batch, _ = input.shape
    directions = 1 + module.bidirectional
    ends = torch.full((batch,), steps) if lengths is None else lengths
    resets = torch.zeros(steps, batch, dtype=torch.bool) if resets is None else resets
    zeros = map_state(torch.zeros_like, states_of(module, batch))
    hx, reset_state = zeros if hx is None else hx, zeros if reset_state is None else reset_state
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            suffix = f"_l{layer}{'_reverse' if direction else ''}"
            parameters = {
                f"{n.removesuffix(suffix)}_l0": p
                for n, p in module.named_parameters()
                if n.endswith(suffix)
                and n.removesuffix(suffix) in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            }
            options = {"proj_size": module.proj_size} if module.proj_size else {}
            one = build(nn, module.mode, input.shape[2], HIDDEN, dtype=F64, **options)
            now, fresh = tensors(map_state(lambda s: s[index], hx)), tensors(map_state(lambda s: s[index], reset_state))
            rows: list[Any] = [None] * steps
            for t in reversed(range(steps)) if direction else range(steps):
                valid = (t < ends)[:, None]
                boundary = t + direction  # the first step behind the boundary that is crossed to enter t
                if boundary < steps:
                    crossed = (resets[boundary] & (boundary < ends))[:, None]
                    now = tuple(torch.where(crossed, f, s) for f, s in zip(fresh, now, strict=True))
                before = tuple(s[None] for s in now)
                _, after = functional_call(one, parameters, (input[t][None], before if len(before) > 1 else before[0]))
                after = tuple(s[0] for s in tensors(after))
                rows[t] = torch.where(valid, after[0], 0)
                now = tuple(torch.where(valid, a, s) for a, s in zip(after, now, strict=True))
            outputs.append(torch.stack(rows))
            finals.append(now)
        input = torch.cat(outputs, -1)
    stacked = tuple(torch.stack(each) for each in zip(*finals, strict=True))
    return input, stacked if len(stacked) > 1 else stacked[0]


def compare_with_steps(
    module: nn.Module,
    hx: Any = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Any = None,
    input: Tensor | None = None,
) -> Results:
    """Results and all gradients, also reset_state's, against the oracle."""
    found = []
    for oracle in (False, True):
        module.zero_grad()
        x = leaf(randn(STEPS, BATCH, FEATURES) if input is None else input)
        start, fresh = map_state(leaf, hx), map_state(leaf, reset_state)
        if oracle:
            output, finals = step_by_step(module, x, start, lengths, resets, fresh)
        else:
            output, finals = module(x, start, lengths=lengths, resets=resets, reset_state=fresh)
        named = {"input": x, **dict(zip(("h_0", "c_0"), tensors(start), strict=False))}
        named.update(zip(("reset_h", "reset_c"), tensors(fresh), strict=False))
        results = collect(output, finals, {**named, **dict(module.named_parameters())})
        found.append({name: value.clone() for name, value in results.items()})
    assert_equal(*found)
    return found[0]


@KIND_AND_PROJ
def test_the_oracle_is_torchs_module(kind: str, proj: int) -> None:
    ours = network(kind, proj)
    options = {"proj_size": proj} if proj else {}
    theirs = build(nn, kind, FEATURES, HIDDEN, 2, bidirectional=True, dtype=F64, **options)
    theirs.load_state_dict(ours.state_dict())
    input, hx = randn(STEPS, BATCH, FEATURES), states_of(ours)
    expected, finals = theirs(input, hx)
    output, last = step_by_step(ours, input, hx, None, None, None)
    assert_same((output, last), (expected, finals))


# ---- lengths ----


@KIND_AND_PROJ
@LAYERS
@BIDIRECTIONAL
@BATCH_FIRST
@STATEFUL
def test_lengths_equal_torchs_packed_sequences(
    kind: str, proj: int, layers: int, bidirectional: bool, batch_first: bool, stateful: bool
) -> None:
    options: dict[str, Any] = {"proj_size": proj} if proj else {}
    options.update(bidirectional=bidirectional, batch_first=batch_first, dtype=F64)
    ours, theirs = pair(kind, FEATURES, HIDDEN, layers, **options)
    shape = (BATCH, STEPS) if batch_first else (STEPS, BATCH)
    lengths = torch.tensor(LENGTHS)
    hx = states_of(ours) if stateful else None
    actual = evaluate(ours, randn(*shape, FEATURES), hx, lengths=lengths)

    input, start = leaf(randn(*shape, FEATURES)), map_state(leaf, hx)
    packed = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
    output, finals = theirs(packed, start)
    output, _ = pad_packed_sequence(output, batch_first, total_length=STEPS)
    named = {"input": input, **dict(zip(("h_0", "c_0"), tensors(start), strict=False))}
    assert_equal(actual, collect(output, finals, {**named, **dict(theirs.named_parameters())}))


@KIND
@BIDIRECTIONAL
def test_lengths_equal_our_packed_sequences(kind: str, bidirectional: bool) -> None:
    module = network(kind, bidirectional=bidirectional)
    input, lengths = randn(STEPS, BATCH, FEATURES), torch.tensor(LENGTHS)
    output, finals = module(input, lengths=lengths)
    packed, packed_finals = module(pack_padded_sequence(input, lengths, enforce_sorted=False))
    assert_same((output, finals), (pad_packed_sequence(packed, total_length=STEPS)[0], packed_finals))


INTEGERS = ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("form", ["module", "functional", "strided"])
def test_integer_dtypes(dtype: str, form: str) -> None:
    module, input = network("GRU"), randn(STEPS, BATCH, FEATURES)
    expected, _ = module(input, lengths=torch.tensor(WITH_ZERO))
    lengths = torch.tensor(WITH_ZERO).to(getattr(torch, dtype))
    if form == "functional":
        output, _ = functional.gru(input, None, module._weights(), lengths=lengths)
    elif form == "strided":
        output, _ = module(input, lengths=torch.stack([lengths, lengths], 1)[:, 0])
    else:
        output, _ = module(input, lengths=lengths)
    assert torch.equal(output, expected)


@KIND_AND_PROJ
@BIDIRECTIONAL
@LAYERS
@pytest.mark.parametrize("lengths", [LENGTHS, WITH_ZERO, [0] * BATCH, [0, 0, 0, 0, 1], [STEPS] * BATCH], ids=str)
def test_lengths(kind: str, proj: int, layers: int, bidirectional: bool, lengths: list[int]) -> None:
    module = network(kind, proj, layers, bidirectional)
    hx = states_of(module)
    results = compare_with_steps(module, hx, torch.tensor(lengths))
    assert not results["output"][padding(lengths)].any()
    assert not results["grad of input"][padding(lengths)].any()
    for name, start in zip(("h_n", "c_n"), tensors(hx), strict=False):
        empty = torch.tensor(lengths) == 0
        assert torch.equal(results[name][:, empty], start[:, empty])


@KIND
def test_lengths_of_all_steps_change_nothing(kind: str) -> None:
    module, input = network(kind), randn(STEPS, BATCH, FEATURES)
    assert_equal(evaluate(module, input, lengths=torch.full((BATCH,), STEPS)), evaluate(module, input), 1e-12)


@KIND
def test_rows_of_length_zero_pass_their_gradients_on(kind: str) -> None:
    module = network(kind)
    hx = map_state(leaf, states_of(module))
    _, finals = module(randn(STEPS, BATCH, FEATURES), hx, lengths=torch.tensor(WITH_ZERO))
    gradients = [randn(*x.shape, seed=60 + i) for i, x in enumerate(tensors(finals))]
    torch.autograd.backward(tensors(finals), gradients)
    empty = torch.tensor(WITH_ZERO) == 0
    for x, gradient in zip(tensors(hx), gradients, strict=True):
        assert torch.equal(x.grad[:, empty], gradient[:, empty])


@KIND
def test_batch_of_none_with_lengths(kind: str) -> None:
    module = network(kind)
    results = evaluate(module, torch.empty(STEPS, 0, FEATURES, dtype=F64), lengths=torch.empty(0, dtype=torch.int64))
    assert results["output"].shape == (STEPS, 0, 2 * HIDDEN)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@KIND_AND_PROJ
@LAYERS
@BIDIRECTIONAL
@pytest.mark.parametrize("form", ["time", "batch", "functional"])
def test_what_stands_in_the_padding_is_not_read(
    kind: str, proj: int, layers: int, bidirectional: bool, form: str, value: float
) -> None:
    """Neither in the input nor in the gradient of the output."""
    module = network(kind, proj, layers, bidirectional, batch_first=form == "batch")
    lengths = torch.tensor(WITH_ZERO)
    mask = padding(WITH_ZERO)
    clean = randn(STEPS, BATCH, FEATURES)
    found = []
    for fill in (0.0, value):
        module.zero_grad()
        input = torch.where(mask[..., None], fill, clean)
        x = leaf(input.transpose(0, 1) if form == "batch" else input)
        if form == "functional":
            options = {"nonlinearity": kind[4:].lower()} if kind.startswith("RNN") else {}
            run = getattr(functional, kind.partition("_")[0].lower())
            output, finals = run(x, None, module._weights(), lengths=lengths, **options)
        else:
            output, finals = module(x, lengths=lengths)
        time_first = output.transpose(0, 1) if form == "batch" else output
        gradient = torch.where(mask[..., None], fill, randn(*time_first.shape, seed=9))
        last = tensors(finals)
        torch.autograd.backward((time_first, *last), (gradient, *(randn(*s.shape, seed=8) for s in last)))
        results = {"output": output, "grad of input": x.grad}
        results.update({f"final {i}": s for i, s in enumerate(last)})
        results.update({f"grad of {n}": p.grad.clone() for n, p in module.named_parameters()})
        found.append(results)
    assert_equal(found[1], found[0], tolerance=0.0)
    outside = found[1]["grad of input"].transpose(0, 1) if form == "batch" else found[1]["grad of input"]
    assert not outside[mask].any()


# ---- resets ----


@KIND_AND_PROJ
@LAYERS
@BIDIRECTIONAL
@STATEFUL
@pytest.mark.parametrize("fresh", [False, True], ids=["to zeros", "to reset_state"])
@pytest.mark.parametrize("lengths", [None, WITH_ZERO], ids=["full", "lengths"])
def test_resets(
    kind: str, proj: int, layers: int, bidirectional: bool, stateful: bool, fresh: bool, lengths: list[int] | None
) -> None:
    module = network(kind, proj, layers, bidirectional)
    hx, reset_state = states_of(module), states_of(module, seed=30)
    compare_with_steps(
        module,
        hx if stateful else None,
        None if lengths is None else torch.tensor(lengths),
        random_resets(),
        reset_state if fresh else None,
    )


@KIND
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["never", "always"])
def test_resets_never_and_always(kind: str, share: float) -> None:
    module = network(kind)
    hx, reset_state = states_of(module), states_of(module, seed=30)
    resets = torch.full((STEPS, BATCH), bool(share))
    results = compare_with_steps(module, hx, None, resets, reset_state)
    if not share:
        assert_same((results["output"], None), (module(randn(STEPS, BATCH, FEATURES), hx)[0], None))
        assert not results["grad of reset_h"].any()


@KIND
def test_resets_batch_first(kind: str) -> None:
    module, first = network(kind), network(kind, batch_first=True)
    first.load_state_dict(module.state_dict())
    input, resets, reset_state = randn(STEPS, BATCH, FEATURES), random_resets(), states_of(module)
    lengths = torch.tensor(WITH_ZERO)
    output, finals = module(input, resets=resets, reset_state=reset_state, lengths=lengths)
    other, other_finals = first(input.transpose(0, 1), resets=resets.t(), reset_state=reset_state, lengths=lengths)
    assert_same((output, finals), (other.transpose(0, 1), other_finals))


@KIND
@BATCH_FIRST
def test_resets_unbatched(kind: str, batch_first: bool) -> None:
    module, resets = network(kind, batch_first=batch_first), random_resets()[:, 1]
    input, hx, reset_state = randn(STEPS, FEATURES), states_of(module, 1), states_of(module, 1, seed=30)
    module.batch_first = False
    expected, expected_finals = module(input[:, None], hx, resets=resets[:, None], reset_state=reset_state)
    module.batch_first = batch_first
    flat = [map_state(lambda s: s[:, 0], s) for s in (hx, reset_state)]
    output, finals = module(input, flat[0], resets=resets, reset_state=flat[1])
    assert_same((output, finals), (expected[:, 0], map_state(lambda s: s[:, 0], expected_finals)))


@pytest.mark.parametrize("layout", ["transposed", "expanded over batch", "expanded over time", "strided"])
def test_layouts_of_resets(layout: str) -> None:
    resets = {
        "transposed": random_resets().t().contiguous().t(),
        "expanded over batch": random_resets()[:, 1:2].expand(STEPS, BATCH),
        "expanded over time": random_resets()[3:4].expand(STEPS, BATCH),
        "strided": random_resets().repeat_interleave(2, 1)[:, ::2],
    }[layout]
    module, input = network("LSTM"), randn(STEPS, BATCH, FEATURES)
    assert_equal(evaluate(module, input, resets=resets), evaluate(module, input, resets=resets.contiguous()), 0.0)


@KIND_AND_PROJ
@pytest.mark.parametrize("at", [0, 3, STEPS - 1])
def test_gradients_do_not_cross_a_reset(kind: str, proj: int, at: int) -> None:
    """From either side, in either direction; they reach reset_state instead."""
    module = network(kind, proj, layers=1)
    width = proj or HIDDEN
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    resets[at] = True
    for direction, after, before in ((0, slice(at, None), slice(None, at)), (1, slice(None, at), slice(at, None))):
        x = leaf(randn(STEPS, BATCH, FEATURES))
        hx, fresh = map_state(leaf, states_of(module)), map_state(leaf, states_of(module, seed=30))
        output, _ = module(x, hx, resets=resets, reset_state=fresh)
        mine = output[after, :, direction * width : (direction + 1) * width]
        if not mine.numel():
            continue
        weighted([mine]).backward()
        assert not x.grad[before].any()
        assert x.grad[after].any()
        for start, new in zip(tensors(hx), tensors(fresh), strict=True):
            assert start.grad is None or not start.grad.any()
            reached = new.grad[direction].any(-1)
            assert reached.all() or (kind == "RNN_RELU" and reached.any())  # all units of a row may be off
            assert not new.grad[1 - direction].any()


@KIND
@BIDIRECTIONAL
def test_values_do_not_cross_a_reset(kind: str, bidirectional: bool) -> None:
    """Not even NaN, nor inf."""
    module = network(kind, layers=1, bidirectional=bidirectional)
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    resets[3] = True
    clean = randn(STEPS, BATCH, FEATURES)
    expected, _ = module(clean, resets=resets)
    for value in (torch.nan, torch.inf):
        before, after = clean.clone(), clean.clone()
        before[1], after[5] = value, value
        assert torch.equal(module(before, resets=resets)[0][3:], expected[3:])
        assert torch.equal(module(after, resets=resets)[0][:3], expected[:3])
        hx = map_state(lambda s: torch.full_like(s, value), states_of(module))
        assert torch.equal(module(clean, hx, resets=resets)[0][3:, :, :HIDDEN], expected[3:, :, :HIDDEN])
        assert torch.equal(module(clean, hx, resets=resets)[0][:3, :, HIDDEN:], expected[:3, :, HIDDEN:])


@KIND
def test_an_episode_equals_a_call_of_its_own(kind: str) -> None:
    module = network(kind, layers=1, bidirectional=False)
    input, fresh = randn(STEPS, BATCH, FEATURES), states_of(module)
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    resets[4] = True
    whole, finals = module(input, resets=resets, reset_state=fresh)
    first, _ = module(input[:4])
    second, last = module(input[4:], fresh)
    assert_same((whole, finals), (torch.cat([first, second]), last))


# ---- repeatability ----

ROWS = torch.arange(24)
SEQUENCES: dict[str, dict[str, Any]] = {
    "full": {},
    "lengths": {"lengths": ROWS % 11},
    "resets": {"resets": randn(10, 24, seed=4) > 1},
    "both": {"lengths": ROWS % 11, "resets": randn(10, 24, seed=4) > 1},
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@KIND
def test_two_runs_agree_to_the_last_bit(kind: str, dtype: torch.dtype, sequences: str, count: int) -> None:
    module = build(fastrnn, kind, 16, 40, 2, bidirectional=True, dropout=0.3, dtype=dtype)
    input = randn(10, 24, 16, dtype=dtype)
    found = []
    with threads(count):
        for _ in range(2):
            torch.manual_seed(1)
            found.append(evaluate(module, input, **SEQUENCES[sequences]))
    assert_equal(*found, tolerance=0.0)


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize(("batch", "hidden"), [(24, 40), (3, 260)], ids=["rows shared", "units shared"])
@KIND
def test_thread_counts_agree(kind: str, batch: int, hidden: int, sequences: str) -> None:
    """Up to the order of sums."""
    module = build(fastrnn, kind, 16, hidden, 2, dtype=F64)
    input = randn(10, batch, 16)
    extra = {name: x[..., :batch] for name, x in SEQUENCES[sequences].items()}
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(evaluate(module, input, **extra))
    for other in found[1:]:
        assert_equal(other, found[0])


@KIND
def test_more_steps_than_16_bits_count(kind: str) -> None:
    module = build(fastrnn, kind, 1, 2, dtype=F64)
    input = randn(70_000, 1, 1)
    whole = evaluate(module, input)
    module.zero_grad()
    x = leaf(input)
    first, state = module(x[:65_000])
    second, _ = module(x[65_000:], state)
    assert_equal({"output": torch.cat([first, second]).detach()}, {"output": whole["output"]})
    assert whole["grad of input"].isfinite().all()


def test_packed_rows_come_back_in_order() -> None:
    """Rows that no other row resembles, so that a wrong permutation shows."""
    module = network("LSTM", layers=1)
    lengths = torch.tensor([2, 5, 3, 7, 1])
    input = torch.arange(BATCH, dtype=F64)[None, :, None].expand(STEPS, BATCH, FEATURES).contiguous()
    packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
    output, (h_n, _) = module(packed)
    assert isinstance(output, PackedSequence)
    padded, found = pad_packed_sequence(output)
    assert torch.equal(found, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, (h, _) = module(input[:length, row : row + 1])
        assert_same((padded[:length, row], h_n[:, row]), (alone[:, 0], h[:, 0]))
