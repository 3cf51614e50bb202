"""fastrnn's modules give torch.nn's results and gradients on the same parameters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from tests.helpers import (
    CELL_KINDS,
    KINDS,
    assert_equal,
    evaluate,
    evaluate_cell,
    gradient,
    leaf,
    make_state,
    map_state,
    pair,
    randn,
    strided,
    tensors,
    threads,
    weighted,
)

# torch.nn warns once that it has no faster kernel for projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
KIND = pytest.mark.parametrize("kind", KINDS)
BIDIRECTIONAL = pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
BATCH_FIRST = pytest.mark.parametrize("batch_first", [False, True], ids=["time", "batch"])


# ---- the product: everything that can be combined, on tiny sizes ----

STEPS, BATCH, FEATURES, HIDDEN, PROJ = 4, 3, 3, 5, 2
LENGTHS = {"sorted": [4, 2, 1], "unsorted": [1, 4, 2]}  # a permutation that is not its own inverse


@pytest.mark.parametrize("variable", ["full", "sorted", "unsorted"])
@pytest.mark.parametrize(
    ("layers", "dropout"), [(1, 0.0), (2, 0.0), (2, 1.0)], ids=["1layer", "2layers", "2layers-dropout"]
)
@BIDIRECTIONAL
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@FLOATS
@pytest.mark.parametrize("kind", [*KINDS, "LSTM-proj"])
def test_product(
    kind: str, dtype: torch.dtype, bias: bool, bidirectional: bool, layers: int, dropout: float, variable: str
) -> None:
    kind, _, projected = kind.partition("-")
    proj = PROJ if projected else 0
    options: dict[str, Any] = {"proj_size": proj} if proj else {}
    options.update(bias=bias, dropout=dropout, bidirectional=bidirectional, dtype=dtype)
    modules = pair(kind, FEATURES, HIDDEN, layers, **options)
    for batch_first, contiguous, stateful in itertools.product([False, True], repeat=3):
        input: Any = randn(*((BATCH, STEPS) if batch_first else (STEPS, BATCH)), FEATURES, dtype=dtype)
        leading = (layers * (1 + bidirectional), BATCH)
        hx = make_state(kind, *leading, hidden=HIDDEN, proj=proj, dtype=dtype) if stateful else None
        if variable != "full":
            lengths = torch.tensor(LENGTHS[variable])
            input = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=variable == "sorted")
        if not contiguous:
            hx = map_state(strided, hx)
            input = strided(input) if variable == "full" else input._replace(data=strided(input.data))
        results = []
        for module in modules:
            module.batch_first = batch_first
            results.append(evaluate(module, input, hx))
        try:
            assert_equal(*results)
        except AssertionError as error:
            error.add_note(f"with {batch_first=} {contiguous=} {stateful=}")
            raise


# ---- sizes: vector tails, tiles of rows, both ways to share the work ----


@pytest.mark.parametrize(
    ("kind", "hidden", "proj"),
    [
        *((kind, hidden, 0) for kind in KINDS for hidden in (1, 3, 17, 129)),
        ("LSTM", 17, 5),
        ("LSTM", 129, 17),
    ],
)
@FLOATS
def test_sizes(kind: str, dtype: torch.dtype, hidden: int, proj: int) -> None:
    options: dict[str, Any] = {"proj_size": proj} if proj else {}
    for batch, features, steps in ((1, 17, 30), (3, 129, 7), (17, 1, 12), (129, 3, 2)):
        bidirectional, options["batch_first"] = batch in (3, 17), batch in (17, 129)
        ours, theirs = pair(kind, features, hidden, bidirectional=bidirectional, dtype=dtype, **options)
        input = randn(*((batch, steps) if options["batch_first"] else (steps, batch)), features, dtype=dtype)
        hx = make_state(kind, 1 + bidirectional, batch, hidden=hidden, proj=proj, dtype=dtype)
        expected = evaluate(theirs, input, hx)
        for count in (1, 2):
            with threads(count):
                actual = evaluate(ours, input, hx)
            try:
                # Sums over batch and time of up to 360 terms: float32 rounds them in another order.
                assert_equal(actual, expected, 3e-5 if dtype == torch.float32 else None)
            except AssertionError as error:
                error.add_note(f"with {batch=} {features=} {steps=}, {count} threads")
                raise


@FLOATS
@KIND
def test_many_layers(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(kind, 4, 6, 5, bidirectional=True, dtype=dtype)
    input = randn(9, 2, 4, dtype=dtype)
    assert_equal(evaluate(ours, input), evaluate(theirs, input))


# ---- dropout ----


@KIND
@BIDIRECTIONAL
def test_dropout_draws_torchs_masks(kind: str, bidirectional: bool) -> None:
    ours, theirs = pair(kind, 4, 6, 3, dropout=0.4, bidirectional=bidirectional, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        results.append(evaluate(module, randn(5, 3, 4)))
    assert_equal(*results)


@KIND
@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_dropout_is_off_in_eval(kind: str, dropout: float) -> None:
    ours, theirs = (m.eval() for m in pair(kind, 4, 6, 2, dropout=dropout, dtype=torch.float64))
    input = randn(5, 3, 4)
    assert_equal(evaluate(ours, input), evaluate(theirs, input))


@KIND
def test_dropout_of_one_layer_warns_and_does_nothing(kind: str) -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        ours, theirs = pair(kind, 4, 6, dropout=0.5, dtype=torch.float64)
    input = randn(5, 3, 4)
    assert_equal(evaluate(ours, input), evaluate(theirs, input))


# ---- unbatched, empty, odd layouts ----


@KIND
@FLOATS
@BIDIRECTIONAL
@BATCH_FIRST
@pytest.mark.parametrize("stateful", [False, True], ids=["zeros", "states"])
def test_unbatched(kind: str, dtype: torch.dtype, bidirectional: bool, batch_first: bool, stateful: bool) -> None:
    ours, theirs = pair(kind, 3, 5, 2, bidirectional=bidirectional, batch_first=batch_first, dtype=dtype)
    input = randn(4, 3, dtype=dtype)
    hx = make_state(kind, 2 * (1 + bidirectional), hidden=5, dtype=dtype) if stateful else None
    assert_equal(evaluate(ours, input, hx), evaluate(theirs, input, hx))


@FLOATS
@BIDIRECTIONAL
@BATCH_FIRST
def test_unbatched_projection(dtype: torch.dtype, bidirectional: bool, batch_first: bool) -> None:
    options: dict[str, Any] = {"bidirectional": bidirectional, "batch_first": batch_first}
    ours, theirs = pair("LSTM", 3, 5, 2, proj_size=2, dtype=dtype, **options)
    input = randn(4, 3, dtype=dtype)
    hx = make_state("LSTM", 2 * (1 + bidirectional), hidden=5, proj=2, dtype=dtype)
    assert_equal(evaluate(ours, input, hx), evaluate(theirs, input, hx))


@KIND
@BIDIRECTIONAL
@BATCH_FIRST
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("stateful", [False, True], ids=["zeros", "states"])
def test_batch_of_none(kind: str, bidirectional: bool, batch_first: bool, layers: int, stateful: bool) -> None:
    ours, theirs = pair(kind, 3, 5, layers, bidirectional=bidirectional, batch_first=batch_first)
    input = torch.empty((0, 4, 3) if batch_first else (4, 0, 3))
    hx = map_state(
        lambda x: x.float(), make_state(kind, layers * (1 + bidirectional), 0, hidden=5) if stateful else None
    )
    results = [evaluate(m, input, hx) for m in (ours, theirs)]
    assert_equal(*results)
    assert all(not x.any() for name, x in results[0].items() if name.startswith("grad of weight"))


def test_batch_of_none_with_projection() -> None:
    ours, theirs = pair("LSTM", 3, 5, 2, proj_size=2, bidirectional=True)
    input = torch.empty(4, 0, 3)
    assert_equal(evaluate(ours, input), evaluate(theirs, input))


LAYOUTS = {
    "expanded over time": lambda x: x[:1].expand_as(x),
    "expanded over batch": lambda x: x[:, :1].expand_as(x),
    "expanded over features": lambda x: x[..., :1].expand_as(x),
    "one value": lambda x: x[0, 0, 0].expand_as(x),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every other feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every other step": lambda x: x.repeat_interleave(2, 0)[::2],
    "reversed and back": lambda x: x.flip(0).flip(0),
    "negated view": lambda x: torch._neg_view(-x),
    "at an odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@KIND
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_input_and_states(kind: str, layout: str) -> None:
    ours, theirs = pair(kind, 3, 5, bidirectional=True, dtype=torch.float64)
    arrange = LAYOUTS[layout]
    input, hx = arrange(randn(4, 2, 3)), map_state(arrange, make_state(kind, 2, 2, hidden=5))
    results = [evaluate(m, input, hx) for m in (ours, theirs)]
    assert_equal(*results)


@KIND
@BIDIRECTIONAL
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_gradients(kind: str, bidirectional: bool, layout: str) -> None:
    modules = pair(kind, 3, 5, bidirectional=bidirectional, dtype=torch.float64)
    gradients = []
    for module in modules:
        input = leaf(randn(4, 2, 3))
        output, finals = module(input)
        results = (output, *tensors(finals))
        grads = [LAYOUTS[layout](randn(*x.shape, seed=50 + i)) for i, x in enumerate(results)]
        torch.autograd.backward(results, grads)
        named = {"input": input, **dict(module.named_parameters())}
        gradients.append({name: x.grad for name, x in named.items()})
    assert_equal(*gradients)


@KIND
def test_parameters_in_odd_layouts(kind: str) -> None:
    modules = pair(kind, 3, 5, 2, bidirectional=True, dtype=torch.float64)
    for module in modules:
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, torch.nn.Parameter(strided(parameter.detach())))
    input = randn(4, 2, 3)
    assert_equal(*(evaluate(m, input) for m in modules))


@KIND
@FLOATS
@BIDIRECTIONAL
@pytest.mark.parametrize("value", [1e3, -1e4, 1e30, torch.inf, -torch.inf, torch.nan], ids=str)
def test_extreme_values(kind: str, dtype: torch.dtype, bidirectional: bool, value: float) -> None:
    """Gates that saturate, NaN where torch has NaN, and no trace of it in other rows."""
    ours, theirs = pair(kind, 3, 17, 2, bidirectional=bidirectional, dtype=dtype)
    plain = randn(6, 5, 3, dtype=dtype)
    for features in (slice(0, 1), slice(None)):
        input = plain.clone()
        input[2, 3, features] = value
        results = [m(input) for m in (ours, theirs)]
        for a, b in zip(*((output, *tensors(finals)) for output, finals in results), strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a[b.isinf()], b[b.isinf()])
            assert_equal(*({"finite": x[b.isfinite()].detach()} for x in (a, b)))
        others = torch.tensor([0, 1, 2, 4])
        assert torch.equal(results[0][0][:, others], ours(plain)[0][:, others])


# ---- gradients of some results, of some arguments ----


@pytest.mark.parametrize(
    ("kind", "proj", "used"),
    [(k, p, u) for k, p in [*((k, 0) for k in KINDS), ("LSTM", 2)] for u in ("output", "h_n", "last step")]
    + [("LSTM", 0, "c_n"), ("LSTM", 2, "c_n")],
)
@BIDIRECTIONAL
def test_gradient_of_one_result(kind: str, proj: int, bidirectional: bool, used: str) -> None:
    options = {"proj_size": proj} if proj else {}
    gradients = []
    for module in pair(kind, 3, 5, 2, bidirectional=bidirectional, dtype=torch.float64, **options):
        input = leaf(randn(4, 2, 3))
        hx = map_state(leaf, make_state(kind, 2 * (1 + bidirectional), 2, hidden=5, proj=proj))
        output, finals = module(input, hx)
        results = {"output": output, "last step": output[-1], "h_n": tensors(finals)[0]}
        weighted([results.get(used, tensors(finals)[-1])]).backward()
        named = {"input": input, **dict(zip(("h_0", "c_0"), tensors(hx), strict=False))}
        named.update(module.named_parameters())
        gradients.append({name: gradient(x) for name, x in named.items()})
    assert_equal(*gradients)


@pytest.mark.parametrize("needed", ["input", "hx", "weight_ih_l0", "weight_hh_l0_reverse", "bias_ih_l1", "bias_hh_l0"])
@KIND
def test_gradient_of_one_argument(kind: str, needed: str) -> None:
    gradients = []
    for module in pair(kind, 3, 5, 2, bidirectional=True, dtype=torch.float64):
        input, hx = randn(4, 2, 3), make_state(kind, 4, 2, hidden=5)
        module.requires_grad_(False)
        named = {"input": input, "hx": tensors(hx)[-1], **dict(module.named_parameters())}
        wanted = named[needed].requires_grad_()
        output, finals = module(input, hx)
        weighted([output, *tensors(finals)]).backward()
        gradients.append({needed: wanted.grad})
        assert all(x.grad is None for name, x in named.items() if name != needed)
    assert_equal(*gradients)


@KIND
def test_without_gradients(kind: str) -> None:
    ours, theirs = pair(kind, 3, 5, 2, bidirectional=True, dtype=torch.float64)
    input = randn(4, 2, 3)
    plain, (expected, _) = evaluate(ours, input), theirs(input)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output, _ = ours(input)
        assert not output.requires_grad
        assert_equal({"output": output}, {"output": plain["output"]})
    assert_equal({"output": plain["output"]}, {"output": expected.detach()})


@KIND
def test_backward_twice_through_a_kept_graph(kind: str) -> None:
    gradients = []
    for module in pair(kind, 3, 5, 2, bidirectional=True, dtype=torch.float64):
        loss = weighted([module(randn(4, 2, 3))[0]])
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append({name: x.grad for name, x in module.named_parameters()})
    assert_equal(*gradients)


@KIND
def test_truncated_sequence_equals_the_whole(kind: str) -> None:
    """The state of one call, fed to the next, carries values and gradients."""
    module, _ = pair(kind, 3, 5, 2, dtype=torch.float64)
    input = randn(6, 2, 3)
    whole = evaluate(module, input)
    module.zero_grad()
    x = leaf(input)
    first, state = module(x[:2])
    second, finals = module(x[2:], state)
    output = torch.cat([first, second])
    weighted([output, *tensors(finals)]).backward()
    finals = dict(zip(("h_n", "c_n"), tensors(finals), strict=False))
    gradients = {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    assert_equal({"output": output, **finals, "grad of input": x.grad, **gradients}, whole)


# ---- the cells ----


@pytest.mark.parametrize("stateful", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@FLOATS
@pytest.mark.parametrize("kind", CELL_KINDS)
def test_cells(kind: str, dtype: torch.dtype, bias: bool, batched: bool, contiguous: bool, stateful: bool) -> None:
    leading = (3,) if batched else ()
    for features, hidden in ((4, 5), (1, 1), (3, 17), (17, 129)):
        ours, theirs = pair(kind, features, hidden, bias=bias, dtype=dtype)
        input = randn(*leading, features, dtype=dtype)
        hx = make_state(kind, *leading, hidden=hidden, dtype=dtype) if stateful else None
        if not contiguous:
            input, hx = strided(input), map_state(strided, hx)
        assert_equal(evaluate_cell(ours, input, hx), evaluate_cell(theirs, input, hx))


@pytest.mark.parametrize("batch", [0, 1, 17, 129])
@pytest.mark.parametrize("kind", CELL_KINDS)
def test_cells_of_any_batch(kind: str, batch: int) -> None:
    ours, theirs = pair(kind, 4, 5, dtype=torch.float64)
    input, hx = randn(batch, 4), make_state(kind, batch, hidden=5)
    assert_equal(evaluate_cell(ours, input, hx), evaluate_cell(theirs, input, hx))


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("sizes", [(4, 0), (0, 6), (0, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_without_units_or_features(kind: str, sizes: tuple[int, int], bias: bool) -> None:
    features, hidden = sizes
    for batch, given in itertools.product(((), (3,)), (False, True)):
        ours, theirs = pair(kind, *sizes, bias=bias, dtype=torch.float64)
        hx = make_state(kind, *batch, hidden=hidden) if given else None
        x = randn(*batch, features)
        assert_equal(*(evaluate_cell(m, x, hx) for m in (ours, theirs)))


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_cells_in_a_loop(kind: str) -> None:
    gradients = []
    for cell in pair(kind, 4, 4, dtype=torch.float64):
        input = leaf(randn(6, 3, 4))
        state: Any = None
        for x in input:
            state = cell(x, state)
        weighted(tensors(state)).backward()
        gradients.append({"input": input.grad, **{n: p.grad for n, p in cell.named_parameters()}})
    assert_equal(*gradients)
