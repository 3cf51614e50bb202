"""Bad input: torch's own type and text where torch.nn has the check, and a named argument, what was expected and what
came where only we do. Nothing crashes, broadcasts silently or returns what was never written.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import functional, reference
from fastrnn.functional import LayerWeights
from fastrnn.ops import CELLS
from tests.helpers import KINDS, as_c, build, make_state, map_state, tensors

KIND = pytest.mark.parametrize("kind", KINDS)
X = torch.zeros(3, 2, 4)  # [T, B, I]
F64 = torch.float64


def raised(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Exception:
    with pytest.raises(Exception) as info:
        function(*args, **kwargs)
    return info.value


def packed(features: int = 4, enforce_sorted: bool = False, **options: Any) -> PackedSequence:
    lengths = torch.tensor([3, 2] if enforce_sorted else [2, 3])
    return pack_padded_sequence(torch.zeros(3, 2, features, **options), lengths, enforce_sorted=enforce_sorted)


def state(kind: str, *leading: int, hidden: int = 6, **options: Any) -> Any:
    return map_state(lambda x: x.to(torch.float32).to(**options), make_state(kind, *leading, hidden=hidden))


# ---- torch.nn's checks: both raise, with one type and one text ----

Case = Callable[[ModuleType, str], Any]  # (torch.nn or fastrnn, kind) -> never

CONSTRUCTORS: dict[str, Case] = {
    "dropout below 0": lambda s, k: build(s, k, 4, 6, 2, dropout=-0.1),
    "dropout above 1": lambda s, k: build(s, k, 4, 6, 2, dropout=1.5),
    "dropout bool": lambda s, k: build(s, k, 4, 6, 2, dropout=True),
    "dropout number as text": lambda s, k: build(s, k, 4, 6, 2, dropout="0.5"),
    "dropout text": lambda s, k: build(s, k, 4, 6, 2, dropout="half"),
    "dropout nan": lambda s, k: build(s, k, 4, 6, 2, dropout=float("nan")),
    "bias int": lambda s, k: build(s, k, 4, 6, bias=1),
    "bias none": lambda s, k: build(s, k, 4, 6, bias=None),
    "batch_first int": lambda s, k: build(s, k, 4, 6, batch_first=0),
    "batch_first text": lambda s, k: build(s, k, 4, 6, batch_first="True"),
    "input_size float": lambda s, k: build(s, k, 4.0, 6),
    "input_size text": lambda s, k: build(s, k, "4", 6),
    "input_size 0": lambda s, k: build(s, k, 0, 6),
    "input_size -1": lambda s, k: build(s, k, -1, 6),
    "hidden_size float": lambda s, k: build(s, k, 4, 6.0),
    "hidden_size 0": lambda s, k: build(s, k, 4, 0),
    "hidden_size -2": lambda s, k: build(s, k, 4, -2),
    "num_layers 0": lambda s, k: build(s, k, 4, 6, 0),
    "num_layers -1": lambda s, k: build(s, k, 4, 6, num_layers=-1),
    "proj_size by name": lambda s, k: build(s, k, 4, 6, proj_size=-1 if k == "LSTM" else 3),
    "unknown keyword": lambda s, k: build(s, k, 4, 6, heads=2),
    "no sizes": lambda s, k: build(s, k),
    "one size": lambda s, k: build(s, k, 4),
    "size given twice": lambda s, k: build(s, k, 4, 6, hidden_size=6),
    "unknown dtype": lambda s, k: build(s, k, 4, 6, dtype=torch.int64),
}

INPUTS: dict[str, Case] = {
    "input 1-D": lambda s, k: build(s, k, 4, 6)(X[0, 0]),
    "input 4-D": lambda s, k: build(s, k, 4, 6)(X[None]),
    "input scalar": lambda s, k: build(s, k, 4, 6)(torch.tensor(1.0)),
    "features": lambda s, k: build(s, k, 7, 6)(X),
    "features unbatched": lambda s, k: build(s, k, 7, 6)(X[:, 0]),
    "features batch first": lambda s, k: build(s, k, 7, 6, batch_first=True)(X),
    "no features": lambda s, k: build(s, k, 4, 6)(X[..., :0]),
    "dtype of input": lambda s, k: build(s, k, 4, 6)(X.double()),
    "dtype of module": lambda s, k: build(s, k, 4, 6, dtype=torch.bfloat16)(X),
    "dtype int": lambda s, k: build(s, k, 4, 6)(X.long()),
    "dtype int unbatched": lambda s, k: build(s, k, 4, 6)(X[:, 0].long()),
    "dtype int8 unbatched": lambda s, k: build(s, k, 4, 6)(X[:, 0].to(torch.int8)),
    "tokens": lambda s, k: build(s, k, 4, 6)(torch.zeros(3, 2, dtype=torch.int64)),
    "tokens batch first": lambda s, k: build(s, k, 4, 6, batch_first=True)(torch.zeros(2, 3, dtype=torch.int32)),
    "tokens 1-D": lambda s, k: build(s, k, 4, 6)(torch.zeros(3, dtype=torch.int64)),
    "tokens scalar": lambda s, k: build(s, k, 4, 6)(torch.tensor(3)),
    "no steps": lambda s, k: build(s, k, 4, 6)(X[:0]),
    "no steps unbatched": lambda s, k: build(s, k, 4, 6)(X[:0, 0]),
    "no steps batch first": lambda s, k: build(s, k, 4, 6, batch_first=True)(X[:, :0]),
    "no steps with states": lambda s, k: build(s, k, 4, 6)(X[:0], state(k, 1, 2)),
    "no steps, no batch": lambda s, k: build(s, k, 4, 6)(X[:0, :0]),
    "parameters on meta": lambda s, k: build(s, k, 4, 6, device="meta")(X),
    "input on meta": lambda s, k: build(s, k, 4, 6)(X.to("meta")),
    "states on meta": lambda s, k: build(s, k, 4, 6)(X, state(k, 1, 2, device="meta")),
}

STATES: dict[str, Case] = {
    "batch": lambda s, k: build(s, k, 4, 6)(X, state(k, 1, 3)),
    "batch of 1": lambda s, k: build(s, k, 4, 6)(X, state(k, 1, 1)),
    "hidden": lambda s, k: build(s, k, 4, 6)(X, state(k, 1, 2, hidden=7)),
    "layers": lambda s, k: build(s, k, 4, 6, 2)(X, state(k, 1, 2)),
    "directions": lambda s, k: build(s, k, 4, 6, bidirectional=True)(X, state(k, 1, 2)),
    "batch first is not for states": lambda s, k: build(s, k, 4, 6, 2, batch_first=True)(X, state(k, 3, 2)),
    "rank 2": lambda s, k: build(s, k, 4, 6)(X, state(k, 2)),
    "rank 4": lambda s, k: build(s, k, 4, 6)(X, state(k, 1, 1, 2)),
    "rank 1": lambda s, k: build(s, k, 4, 6)(X, state(k)),
    "unbatched rank 3": lambda s, k: build(s, k, 4, 6)(X[:, 0], state(k, 1, 1)),
    "unbatched rank 1": lambda s, k: build(s, k, 4, 6)(X[:, 0], state(k)),
    "unbatched hidden": lambda s, k: build(s, k, 4, 6)(X[:, 0], state(k, 1, hidden=7)),
    "unbatched layers": lambda s, k: build(s, k, 4, 6, 2)(X[:, 0], state(k, 1)),
}

PACKED: dict[str, Case] = {
    "features": lambda s, k: build(s, k, 7, 6)(packed()),
    "dtype": lambda s, k: build(s, k, 4, 6)(packed(dtype=F64)),
    "dtype int": lambda s, k: build(s, k, 4, 6)(packed(dtype=torch.int64)),
    "tokens": lambda s, k: build(s, k, 4, 6)(packed()._replace(data=torch.zeros(5, dtype=torch.int64))),
    "hidden": lambda s, k: build(s, k, 4, 6)(packed(), state(k, 1, 2, hidden=7)),
    "layers": lambda s, k: build(s, k, 4, 6, 2)(packed(), state(k, 1, 2)),
    "batch": lambda s, k: build(s, k, 4, 6)(packed(enforce_sorted=True), state(k, 1, 3)),
    "rank 2": lambda s, k: build(s, k, 4, 6)(packed(enforce_sorted=True), state(k, 2)),
    "data rank 3": lambda s, k: build(s, k, 4, 6)(packed()._replace(data=X)),
}

LSTM_ONLY: dict[str, Case] = {
    "proj_size as large as hidden_size": lambda s, k: s.LSTM(4, 6, proj_size=6),
    "proj_size by position": lambda s, k: s.LSTM(4, 6, 1, True, False, 0.0, False, 7),
    "second state's batch": lambda s, k: s.LSTM(4, 6)(X, (torch.zeros(1, 2, 6), torch.zeros(1, 3, 6))),
    "second state's rank": lambda s, k: s.LSTM(4, 6)(X, (torch.zeros(1, 2, 6), torch.zeros(2, 6))),
    "first state is not projected": lambda s, k: s.LSTM(4, 6, proj_size=2)(X, (torch.zeros(1, 2, 6),) * 2),
    "second state is projected": lambda s, k: s.LSTM(4, 6, proj_size=2)(X, (torch.zeros(1, 2, 2),) * 2),
}

OTHERS: dict[str, Case] = {
    "GRU has no projection": lambda s, k: s.GRU(4, 6, proj_size=2),
    "RNN has no projection": lambda s, k: s.RNN(4, 6, proj_size=0),
    "unknown nonlinearity": lambda s, k: s.RNN(4, 6, nonlinearity="selu"),
    "unknown nonlinearity by position": lambda s, k: s.RNN(4, 6, 1, "selu"),
    "bias where nonlinearity stands": lambda s, k: s.RNN(4, 6, 1, False),
    "unknown nonlinearity of a cell": lambda s, k: s.RNNCell(4, 6, nonlinearity="selu")(X[0]),
}


def both_raise(case: Case, kind: str) -> tuple[Exception, Exception]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return raised(case, fastrnn, kind), raised(case, nn, kind)


def assert_torchs_error(case: Case, kind: str) -> None:
    ours, theirs = both_raise(case, kind)
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


@KIND
@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_constructors(kind: str, case: str) -> None:
    """What Python says of an argument that no parameter takes, it says of the class that was called."""
    ours, theirs = both_raise(CONSTRUCTORS[case], kind)
    text = str(theirs).replace("RNNBase.__init__()", f"{kind.partition('_')[0]}.__init__()")
    assert (type(ours), str(ours)) == (type(theirs), text)


@KIND
@pytest.mark.parametrize("case", INPUTS)
def test_inputs(kind: str, case: str) -> None:
    assert_torchs_error(INPUTS[case], kind)


@KIND
@pytest.mark.parametrize("case", STATES)
def test_states(kind: str, case: str) -> None:
    assert_torchs_error(STATES[case], kind)


@pytest.mark.parametrize("kind", ["GRU", "RNN_TANH", "RNN_RELU"])
@pytest.mark.parametrize("case", PACKED)
def test_packed(kind: str, case: str) -> None:
    assert_torchs_error(PACKED[case], kind)


@pytest.mark.parametrize("case", PACKED)
def test_packed_lstm_says_what_the_others_do(case: str) -> None:
    """torch.nn.LSTM skips these checks and fails in a matrix product, or not at all."""
    ours, theirs = raised(PACKED[case], fastrnn, "LSTM"), raised(PACKED[case], nn, "GRU")
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs).replace("Expected hidden size", "Expected hidden[0] size")


@pytest.mark.parametrize("case", LSTM_ONLY)
def test_lstm_only(case: str) -> None:
    assert_torchs_error(LSTM_ONLY[case], "LSTM")


@pytest.mark.parametrize("case", OTHERS)
def test_other_constructors(case: str) -> None:
    assert_torchs_error(OTHERS[case], "")


@KIND
def test_dropout_of_one_layer_warns(kind: str) -> None:
    found = []
    for space in (fastrnn, nn):
        with pytest.warns(UserWarning) as record:
            build(space, kind, 4, 6, dropout=0.5)
        found.append([(w.category, str(w.message)) for w in record])
    assert found[0] == found[1]


@KIND
def test_dtype_is_not_checked_under_autocast(kind: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            build(fastrnn, kind, 4, 6)(X.to(dtype))


CELL_ERRORS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "features": ((2, 5), (2, 6)),
    "hidden": ((2, 4), (2, 7)),
    "batch": ((2, 4), (3, 6)),
    "batch of 1": ((2, 4), (1, 6)),
    "features without state": ((2, 5), None),
    "unbatched features": ((5,), (6,)),
    "unbatched hidden": ((4,), (7,)),
    "input 3-D": ((1, 2, 4), (2, 6)),
    "input scalar": ((), (2, 6)),
    "state 3-D": ((2, 4), (1, 2, 6)),
    "state scalar": ((2, 4), ()),
}
CELL_KIND = pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell_TANH", "RNNCell_RELU"])


def run_cell(space: ModuleType, kind: str, input: tuple[int, ...], *hidden: tuple[int, ...] | None) -> Any:
    states = tuple(None if h is None else torch.zeros(h) for h in hidden)
    if "LSTM" not in kind or states[0] is None:
        return build(space, kind, 4, 6)(torch.zeros(input), states[0])
    return build(space, kind, 4, 6)(torch.zeros(input), (states[0], states[-1]))


@CELL_KIND
@pytest.mark.parametrize("case", CELL_ERRORS)
def test_cells(kind: str, case: str) -> None:
    assert_torchs_error(lambda space, kind: run_cell(space, kind, *CELL_ERRORS[case]), kind)


@pytest.mark.parametrize("shape", [(3, 6), (2, 7), (1, 2, 6)])
def test_second_state_of_a_cell(shape: tuple[int, ...]) -> None:
    assert_torchs_error(lambda space, kind: run_cell(space, kind, (2, 4), (2, 6), shape), "LSTMCell")


@CELL_KIND
@pytest.mark.parametrize(("input", "hidden"), [((2, 4), (6,)), ((2, 4), (2,)), ((4,), (1, 6)), ((4,), (2, 6))], ids=str)
@pytest.mark.parametrize("second", [False, True])
def test_ranks_of_cells(kind: str, input: tuple[int, ...], hidden: tuple[int, ...], second: bool) -> None:
    """A check that torch has had since 2.15; before, it names a size that is not one."""
    right = (2, 6) if len(input) == 2 else (6,)
    shapes = (input, right, hidden) if second and "LSTM" in kind else (input, hidden)
    ours, theirs = both_raise(lambda space, kind: run_cell(space, kind, *shapes), kind)
    if "Expected 2D hidden" in str(theirs):
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
    index, rank = len(shapes) - 2, 1 if len(input) == 2 else 3
    assert str(ours) == f"Expected 2D hidden{index} (batch x hidden_size), but got {rank}D tensor"


# ---- our own arguments ----


def wants(argument: str, *parts: object) -> str:
    """A pattern: the argument, then 'expected', then 'got', with each part in between or after."""
    text = "".join(f".*{re.escape(str(part))}" for part in parts)
    return rf"(?s)\b{re.escape(argument)}: expected\b(?=.*\bgot\b){text}"


WRONG_STATES = {
    "tensor": torch.zeros(1, 2, 6),
    **{f"{n}-tuple": (torch.zeros(1, 2, 6),) * n for n in range(4)},
    "number": 0.0,
    "lists": ([0.0], [0.0]),
    "text": "ab",
}


@KIND
@pytest.mark.parametrize("form", ["hx", "packed", "cell", "reset_state", "state", "functional reset_state"])
@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_states_of_the_wrong_kind(kind: str, form: str, wrong: str) -> None:
    if wrong == ("2-tuple" if kind == "LSTM" else "tensor"):
        return  # right
    hx = WRONG_STATES[wrong]
    module = build(fastrnn, kind, 4, 6)
    cell = build(fastrnn, kind.replace("_", "Cell_") if "_" in kind else f"{kind}Cell", 4, 6)
    resets = torch.zeros(3, 2, dtype=torch.bool)
    calls: dict[str, Callable[[], Any]] = {
        "hx": lambda: module(X, hx),
        "packed": lambda: module(packed(), hx),
        "cell": lambda: cell(X[0], hx),
        "reset_state": lambda: module(X, resets=resets, reset_state=hx),
        "state": lambda: call(kind, X, hx),
        "functional reset_state": lambda: call(kind, X, resets=resets, reset_state=hx),
    }
    name = form.split()[-1] if "state" in form else "hx"
    with pytest.raises(TypeError, match=wants(name, "a pair of tensors" if kind == "LSTM" else "a tensor")):
        calls[form]()


def weights(kind: str, bidirectional: bool = False) -> list[list[LayerWeights]]:
    return build(fastrnn, kind, 4, 6, bidirectional=bidirectional)._weights()


def call(kind: str, input: Tensor, state: Any = None, **options: Any) -> Any:
    name, _, nonlinearity = kind.partition("_")
    if nonlinearity:
        options["nonlinearity"] = nonlinearity.lower()
    given = options.pop("weights", None) or weights(kind)
    return getattr(functional, name.lower())(input, state, given, **options)


SEQUENCE_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lengths below 0": ({"lengths": [-1, 2]}, ValueError, wants("lengths", "[0, 3]", "-1")),
    "lengths above T": ({"lengths": [2, 4]}, ValueError, wants("lengths", "[0, 3]", "4", "index 1")),
    "lengths float": ({"lengths": [1.0, 2.0]}, TypeError, wants("lengths", "integer", "loat")),
    "lengths bool": ({"lengths": [True, False]}, TypeError, wants("lengths", "integer", "ool")),
    "lengths complex": ({"lengths": [1j, 2j]}, TypeError, wants("lengths", "integer")),
    "lengths too few": ({"lengths": [1]}, RuntimeError, wants("lengths", "[2]", "[1]")),
    "lengths too many": ({"lengths": [1, 2, 3]}, RuntimeError, wants("lengths", "[2]", "[3]")),
    "lengths scalar": ({"lengths": 2}, RuntimeError, wants("lengths", "[2]", "[]")),
    "lengths per direction": ({"lengths": [[1, 2], [1, 2]]}, RuntimeError, wants("lengths", "[2]", "[2, 2]")),
    "lengths none of them": ({"lengths": []}, (RuntimeError, TypeError), wants("lengths")),
    "resets int": ({"resets": [[0, 1]] * 3}, TypeError, wants("resets", "bool")),
    "resets float": ({"resets": [[0.0, 1.0]] * 3}, TypeError, wants("resets", "bool")),
    "resets too short": ({"resets": [[True, False]] * 2}, RuntimeError, wants("resets", "[3, 2]", "[2, 2]")),
    "resets of one step": ({"resets": [[True, False]]}, RuntimeError, wants("resets", "[3, 2]", "[1, 2]")),
    "resets transposed": ({"resets": [[True] * 3] * 2}, RuntimeError, wants("resets", "[3, 2]", "[2, 3]")),
    "resets rank 1": ({"resets": [True] * 3}, RuntimeError, wants("resets", "[3, 2]", "[3]")),
    "resets per direction": ({"resets": [[[True]] * 2] * 3}, RuntimeError, wants("resets", "[3, 2]", "[3, 2, 1]")),
    "resets scalar": ({"resets": True}, RuntimeError, wants("resets", "[3, 2]", "[]")),
}


@pytest.mark.parametrize("case", SEQUENCE_ERRORS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("form", ["module", "functional"])
@KIND
def test_sequences(kind: str, form: str, bidirectional: bool, case: str) -> None:
    values, error, pattern = SEQUENCE_ERRORS[case]
    arguments = {name: torch.tensor(value) for name, value in values.items()}
    with pytest.raises(error, match=pattern):
        if form == "module":
            build(fastrnn, kind, 4, 6, bidirectional=bidirectional)(X, **arguments)
        else:
            call(kind, X, weights=weights(kind, bidirectional), **arguments)


@pytest.mark.parametrize(
    ("resets", "got"), [([True] * 3, "[3]"), ([[True, False]] * 3, "[3, 2]"), ([[True] * 3], "[1, 3]"), (True, "[]")]
)
def test_resets_batch_first(resets: Any, got: str) -> None:
    """The message speaks of the caller's layout."""
    module = fastrnn.GRU(4, 6, batch_first=True)
    with pytest.raises(RuntimeError, match=wants("resets", "[2, 3]", got)):
        module(X.transpose(0, 1), resets=torch.tensor(resets))


@pytest.mark.parametrize(("resets", "got"), [([True, False], "[2]"), ([[True]] * 3, "[3, 1]"), (True, "[]")])
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_unbatched(resets: Any, got: str, batch_first: bool) -> None:
    module = fastrnn.GRU(4, 6, batch_first=batch_first)
    with pytest.raises(RuntimeError, match=wants("resets", "[3]", got)):
        module(X[:, 0], resets=torch.tensor(resets))


@pytest.mark.parametrize("form", ["module", "functional"])
def test_sequences_that_are_no_tensors(form: str) -> None:
    run = fastrnn.GRU(4, 6) if form == "module" else lambda x, **options: call("GRU", x, **options)
    with pytest.raises(TypeError, match=wants("lengths", "tensor", "list")):
        run(X, lengths=[2, 1])
    with pytest.raises(TypeError, match=wants("resets", "tensor", "list")):
        run(X, resets=[[False, False]] * 3)


@pytest.mark.parametrize("form", ["module", "functional"])
def test_sequences_on_another_device(form: str) -> None:
    run = fastrnn.GRU(4, 6) if form == "module" else lambda x, **options: call("GRU", x, **options)
    with pytest.raises(RuntimeError, match=wants("lengths", "meta")):
        run(X, lengths=torch.ones(2, dtype=torch.int64, device="meta"))
    with pytest.raises(RuntimeError, match=wants("resets", "cpu", "meta")):
        run(X, resets=torch.ones(3, 2, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("name", ["lengths", "resets", "reset_state"])
@KIND
def test_packed_sequences_take_none_of_them(kind: str, name: str) -> None:
    arguments = {
        "lengths": torch.tensor([2, 3]),
        "resets": torch.zeros(3, 2, dtype=torch.bool),
        "reset_state": state(kind, 1, 2),
    }
    with pytest.raises(ValueError, match=wants(name, "None", "PackedSequence")):
        build(fastrnn, kind, 4, 6)(packed(), **{name: arguments[name]})


def test_input_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="input: expected a tensor or a PackedSequence, got ndarray"):
        fastrnn.GRU(4, 6)(X.numpy())


def test_unbatched_input_has_no_lengths() -> None:
    with pytest.raises(ValueError, match=wants("lengths", "None", "unbatched")):
        fastrnn.GRU(4, 6)(X[:, 0], lengths=torch.tensor([2]))


@KIND
@pytest.mark.parametrize("form", ["module", "functional"])
def test_reset_state_needs_resets(kind: str, form: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=wants("reset_state", "None", "resets")):
        if form == "module":
            build(fastrnn, kind, 4, 6)(X, reset_state=state(kind, 1, 2))
        else:
            call(kind, X, reset_state=state(kind, 1, 2))


@KIND
@pytest.mark.parametrize("leading", [(1, 3), (1, 1), (2, 2), (2,), (1, 1, 2)])
def test_reset_state_of_wrong_shape(kind: str, leading: tuple[int, ...]) -> None:
    """As for hx, which has the same shape."""
    module = build(fastrnn, kind, 4, 6)
    resets = torch.zeros(3, 2, dtype=torch.bool)
    ours, hx = (
        raised(module, X, resets=resets, reset_state=state(kind, *leading)),
        raised(module, X, state(kind, *leading)),
    )
    assert type(ours) is type(hx)
    assert str(list(tensors(state(kind, *leading))[0].shape)) in str(ours) or f"{len(leading) + 1}-D" in str(ours)


@KIND
@pytest.mark.parametrize("name", ["hx", "reset_state"])
def test_states_of_another_dtype(kind: str, name: str) -> None:
    arguments = {name: state(kind, 1, 2, dtype=F64), "resets": torch.zeros(3, 2, dtype=torch.bool)}
    named = f"{name}[0]" if kind == "LSTM" else name
    with pytest.raises(RuntimeError, match=wants(named, "torch.float32", "torch.float64")):
        build(fastrnn, kind, 4, 6)(X, **arguments)


BATCH_SIZES = {
    "negative": [3, -1, 3],
    "growing": [2, 3],
    "too many rows": [3, 3],
    "too few rows": [2, 1],
    "huge": [2**40, 3],
    "none": [],
}


@pytest.mark.parametrize("case", BATCH_SIZES)
@KIND
def test_malformed_packed_sequences(kind: str, case: str) -> None:
    sizes = torch.tensor(BATCH_SIZES[case], dtype=torch.int64)
    with pytest.raises((RuntimeError, ValueError), match=wants("batch_sizes")):
        build(fastrnn, kind, 4, 6)(PackedSequence(torch.zeros(5, 4), sizes))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_batch_sizes_of_another_dtype(dtype: torch.dtype) -> None:
    with pytest.raises((RuntimeError, TypeError), match=wants("batch_sizes", "int64", dtype)):
        fastrnn.GRU(4, 6)(PackedSequence(torch.zeros(5, 4), torch.tensor([3, 2], dtype=dtype)))


@KIND
@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("leading", [(2,), (), (1, 1, 2), (1, 1), (1, 3)])
def test_packed_states(kind: str, enforce_sorted: bool, leading: tuple[int, ...]) -> None:
    """Torch permutes before it looks: an unsorted sequence gives other errors, or takes rows of too large a batch."""
    hidden = "hidden[0]" if kind == "LSTM" else "hidden"
    shape = list(tensors(state(kind, *leading))[0].shape)
    with pytest.raises(RuntimeError, match=re.escape(f"Expected {hidden} size (1, 2, 6), got {shape}")):
        build(fastrnn, kind, 4, 6)(packed(enforce_sorted=enforce_sorted), state(kind, *leading))


# ---- the functional forms ----


@KIND
@pytest.mark.parametrize("leading", [(1, 3), (1, 1), (2, 2), (0, 2), (2,), (1, 1, 2)])
@pytest.mark.parametrize("name", ["state", "reset_state"])
def test_functional_states(kind: str, name: str, leading: tuple[int, ...]) -> None:
    arguments: dict[str, Any] = {name: state(kind, *leading)}
    if name == "reset_state":
        arguments["resets"] = torch.zeros(3, 2, dtype=torch.bool)
    named = f"{name}[0]" if kind == "LSTM" else name
    with pytest.raises(RuntimeError, match=wants(named, "[1, 2, 6]", [*leading, 6])):
        call(kind, X, **arguments)


@KIND
@pytest.mark.parametrize("shape", [(3, 2), (4,), (1, 3, 2, 4)])
def test_functional_input_rank(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=wants("input", list(shape))):
        call(kind, torch.zeros(shape))


@KIND
def test_functional_without_steps(kind: str) -> None:
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        call(kind, X[:0])


def test_functional_nonlinearity() -> None:
    for run in (
        lambda: functional.rnn(X, None, weights("RNN_TANH"), nonlinearity="selu"),
        lambda: functional.rnn_cell(X[0], torch.zeros(2, 6), weights("RNN_TANH")[0][0], "selu"),
    ):
        with pytest.raises(ValueError, match=wants("nonlinearity", "'tanh' or 'relu'", "selu")):
            run()


def resized(w: LayerWeights, name: str, change: str) -> LayerWeights:
    x = getattr(w, name)
    changed = {
        "one row": x[:1],
        "one row less": x[:-1],
        "rank": x[None, None],  # with one dimension more, weight_hh would be that of one head
        "dtype": x.double(),
        "none": None,
        "meta": x.to("meta"),
    }
    return w._replace(**{name: changed[change]})


@KIND
@pytest.mark.parametrize("name", LayerWeights._fields[:4])
@pytest.mark.parametrize("change", ["one row", "one row less", "rank", "dtype", "none", "meta"])
@pytest.mark.parametrize("which", ["only", "first", "second"])
def test_functional_weights(kind: str, name: str, change: str, which: str) -> None:
    if change == "none" and (which == "only" and name.startswith("bias")):
        return  # that is allowed
    layer = weights(kind, bidirectional=which != "only")[0]
    index = 1 if which == "second" else 0
    layer[index] = resized(layer[index], name, change)
    error = raised(call, kind, X, weights=[layer])
    assert isinstance(error, (RuntimeError, TypeError, ValueError))
    assert re.search(wants(name), str(error)), error


# ---- the ops themselves ----

T, B, P = 3, 2, 2
OP_CELLS = {  # gates, width; 5 hidden
    "lstm": (4, 5), "projected lstm": (4, 3), "lstm_peephole": (4, 5), "gru": (3, 5), "rnn_tanh": (1, 5),
    "lstm_norm": (4, 5), "gru_norm": (3, 5), "gru_reset_before": (3, 5),
    "slstm": (4, 5),
}  # fmt: skip
DEVICE = pytest.mark.parametrize("device", ["cpu", "meta"])
OP_CELL = pytest.mark.parametrize("cell", OP_CELLS)
REFERENCE = {"forward": "gates_ih", "backward": "output"}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape).to(dtype) - 0.5


def forward_arguments(cell: str) -> dict[str, Any]:
    """Everything given that the cell can take."""
    gates, width = OP_CELLS[cell]
    name = cell.split()[-1]
    in_c, zoneout = CELLS[name].in_c, CELLS[name].zoneout
    return {
        "cell": name,
        "gates_ih": random(T, B, P * gates * 5),
        "weight_hh": random(P, gates * 5, width),
        "bias_hh": random(P, gates * 5),
        "weight_hr": random(P, width, 5) if width != 5 else None,
        "params": random(P, CELLS[name].params, 5) if CELLS[name].params else None,
        "h_0": random(B, P * width),
        "c_0": random(B, P * in_c * 5) if in_c else None,
        "lengths": torch.tensor([3, 1]),
        "resets": torch.zeros(T, B, dtype=torch.bool),
        "reset_h": random(B, P * width),
        "reset_c": random(B, P * in_c * 5) if in_c else None,
        "mask_h": random(B, P * width),
        "keep_h": random(T, B, P * width) if zoneout else None,
        "keep_c": random(T, B, P * 5) if in_c and zoneout else None,
        "reverse": [False, True],
        "save": True,
    }


def backward_arguments(cell: str) -> dict[str, Any]:
    given = forward_arguments(cell)
    _, width = OP_CELLS[cell]
    output, h_n, c_n, saved = torch.ops.fastrnn.recurrent_forward(**given)
    lstm = "lstm" in cell
    shared = {k: v for k, v in given.items() if k not in ("cell", "gates_ih", "bias_hh", "save")}
    return {
        "cell": given["cell"],
        "grad_output": random(T, B, P * width),
        "grad_h_n": random(*h_n.shape),
        "grad_c_n": random(*c_n.shape) if lstm else None,
        **shared,
        "output": output,
        "saved": saved,
        "initial": True,
    }


ARGUMENTS = {"forward": forward_arguments, "backward": backward_arguments}


def run_op(which: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.fastrnn, f"recurrent_{which}")(**arguments)


def wrong_shapes(x: Tensor) -> dict[str, Tensor]:
    variants = {"rank + 1": x[None], "scalar": x.new_zeros(())}
    if x.dim() > 1:
        variants["rank - 1"] = x[0]
    for d in range(x.dim()):
        variants[f"size {d} + 1"] = torch.cat([x, x.narrow(d, 0, 1)], d)
        variants[f"size {d} of 0"] = x.narrow(d, 0, 0)
        if x.shape[d] > 1:
            variants[f"size {d} of 1"] = x.narrow(d, 0, 1)
    return variants


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


@OP_CELL
@DEVICE
@pytest.mark.parametrize("which", ARGUMENTS)
def test_op_shapes(which: str, device: str, cell: str) -> None:
    """Every tensor argument in every wrong shape, with data and without."""
    arguments = on(device, ARGUMENTS[which](cell))
    run_op(which, arguments)
    names = [name for name, x in arguments.items() if isinstance(x, Tensor)]
    for name in names:
        if arguments[name].numel() == 0:  # the saved values of an Elman cell: none
            continue
        for change, value in wrong_shapes(arguments[name]).items():
            error = raised(run_op, which, arguments | {name: value})
            note = f"{name}, {change}: {error!r}"
            assert isinstance(error, (RuntimeError, TypeError, ValueError)), note
            # The sizes come from these two: where one is wrong, another argument may be the one not to fit.
            guilty = [*names, "reverse"] if name in (REFERENCE[which], "weight_hh") else [name]
            # values of lengths are told without the op, for modules have lengths, too
            op = rf"(?:recurrent_{which}: |(?=lengths: expected values))"
            found = re.match(rf"{op}(\w+): expected .*got ", str(error), re.DOTALL)
            assert found is not None and found[1] in guilty, note
            if found[1] == name:
                assert str(list(value.shape)) in str(error), note


@OP_CELL
@DEVICE
@pytest.mark.parametrize("which", ARGUMENTS)
def test_op_dtypes(which: str, device: str, cell: str) -> None:
    arguments = on(device, ARGUMENTS[which](cell))
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            continue
        for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64, torch.float16):
            if dtype == x.dtype or (name.startswith("keep_") and dtype is torch.bool):  # which they may be
                continue
            error = raised(run_op, which, arguments | {name: x.to(dtype)})
            note = f"{name} as {dtype}: {error}"
            assert isinstance(error, (RuntimeError, TypeError)), note
            is_reference = name == REFERENCE[which]
            guilty = list(arguments) if is_reference and dtype.is_floating_point else [name]
            found = re.match(rf"recurrent_{which}: (\w+): expected .*got ", str(error), re.DOTALL)
            assert found is not None and found[1] in guilty, note


@OP_CELL
@pytest.mark.parametrize("which", ARGUMENTS)
def test_op_devices(which: str, cell: str) -> None:
    """One argument without data among others: no result may come of it."""
    arguments = ARGUMENTS[which](cell)
    names = [name for name, x in arguments.items() if isinstance(x, Tensor)]
    for name in names:
        error = raised(run_op, which, arguments | {name: arguments[name].to("meta")})
        assert isinstance(error, RuntimeError), name
        guilty = names if name == REFERENCE[which] else [name]
        found = re.match(rf"recurrent_{which}: (\w+): expected .*got ", str(error), re.DOTALL)
        assert found is not None and found[1] in guilty, f"{name}: {error}"
        assert "meta" in str(error)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("which", ARGUMENTS)
@pytest.mark.parametrize("name", ["", "lstmx", "LSTM", "rnn", "\x00", "gru\x00"])
def test_unknown_cell(which: str, name: str, requires_grad: bool) -> None:
    arguments = ARGUMENTS[which]("gru") | {"cell": name}
    arguments["weight_hh"].requires_grad_(requires_grad)
    with pytest.raises(ValueError, match=f"cell: expected one of {', '.join(CELLS)}, got "):
        run_op(which, arguments)


@pytest.mark.parametrize("which", ARGUMENTS)
def test_unknown_cell_without_data(which: str) -> None:
    arguments = on("meta", ARGUMENTS[which]("gru"))
    with pytest.raises(ValueError, match=f"cell: expected one of {', '.join(CELLS)}, got "):
        run_op(which, arguments | {"cell": "lstmx"})


def test_unknown_cell_info() -> None:
    with pytest.raises(ValueError, match="cell: expected one of"):
        torch.ops.fastrnn.cell_info("lstmx")


Change = dict[str, Any]
OP_ERRORS: dict[str, tuple[str, Change, type[Exception], str]] = {
    "missing c_0": ("lstm", {"c_0": None}, RuntimeError, wants("c_0", "a tensor", "lstm", "none")),
    "c_0 of gru": ("gru", {"c_0": torch.zeros(B, P * 5)}, RuntimeError, wants("c_0", "none", "gru", "a tensor")),
    "c_0 of rnn": ("rnn_tanh", {"c_0": torch.zeros(B, P * 5)}, RuntimeError, wants("c_0", "none", "rnn_tanh")),
    "reset_c of gru": ("gru", {"reset_c": torch.zeros(B, P * 5)}, RuntimeError, wants("reset_c", "none", "gru")),
    "keep_c of gru": ("gru", {"keep_c": torch.zeros(T, B, P * 5)}, RuntimeError, wants("keep_c", "none", "gru")),
    "weight_hr of gru": ("gru", {"weight_hr": torch.zeros(P, 3, 5)}, RuntimeError, wants("weight_hr", "none", "gru")),
    "weight_hr of rnn": ("rnn_tanh", {"weight_hr": torch.zeros(P, 5, 5)}, RuntimeError, wants("weight_hr", "none")),
    "missing weight_hr": ("projected lstm", {"weight_hr": None}, RuntimeError, wants("weight_hh", "[2, 20, 5]")),
    "missing params": ("lstm_peephole", {"params": None}, RuntimeError, wants("params", "a tensor", "lstm_peephole")),
    "params of lstm": ("lstm", {"params": torch.zeros(P, 3, 5)}, RuntimeError, wants("params", "none", "lstm")),
    "reset_h without resets": ("gru", {"resets": None}, RuntimeError, wants("reset_h", "none", "a tensor")),
    "reset_c without resets": (
        "lstm",
        {"resets": None, "reset_h": None},
        RuntimeError,
        wants("reset_c", "none", "a tensor"),
    ),
    "reverse of 0": ("lstm", {"reverse": []}, RuntimeError, wants("reverse", 2, 0)),
    "reverse of 1": ("lstm", {"reverse": [True]}, RuntimeError, wants("reverse", 2, 1)),
    "reverse of 3": ("lstm", {"reverse": [True] * 3}, RuntimeError, wants("reverse", 2, 3)),
    "lengths below 0": ("lstm", {"lengths": torch.tensor([1, -1])}, ValueError, wants("lengths", "[0, 3]", -1)),
    "lengths above T": ("lstm", {"lengths": torch.tensor([4, 1])}, ValueError, wants("lengths", "[0, 3]", 4)),
    "lengths very far below": (
        "lstm",
        {"lengths": torch.tensor([-(2**63), 0])},
        ValueError,
        wants("lengths", -(2**63)),
    ),
    "lengths of one group": (
        "lstm",
        {"lengths": torch.tensor([[3, 4], [1, 1]])},
        ValueError,
        wants("lengths", "[0, 3]", 4),
    ),
    "lengths uint8 above T": ("lstm", {"lengths": torch.tensor([255, 0], dtype=torch.uint8)}, ValueError, "255"),
}


@DEVICE
@pytest.mark.parametrize("which", ARGUMENTS)
@pytest.mark.parametrize("case", OP_ERRORS)
def test_op_combinations(which: str, device: str, case: str) -> None:
    cell, change, error, pattern = OP_ERRORS[case]
    if device == "meta" and error is ValueError:
        return  # values, of which there are none
    prefix = "" if error is ValueError else f"recurrent_{which}: "  # lengths have the name that modules give them
    with pytest.raises(error, match=pattern) as raised:
        run_op(which, on(device, ARGUMENTS[which](cell) | change))
    assert re.match(rf"{prefix}\w+: expected ", str(raised.value))


@DEVICE
def test_gradient_of_a_state_that_a_cell_does_not_have(device: str) -> None:
    arguments = backward_arguments("gru") | {"grad_c_n": torch.zeros(B, P * 5)}
    with pytest.raises(RuntimeError, match=wants("grad_c_n", "none", "gru")):
        run_op("backward", on(device, arguments))


@pytest.mark.parametrize("convert", ["to_sparse", "to_mkldnn"])
@pytest.mark.parametrize("name", ["gates_ih", "weight_hh", "bias_hh", "h_0", "c_0"])
def test_other_layouts_raise(name: str, convert: str) -> None:
    arguments = forward_arguments("lstm")
    arguments[name] = getattr(arguments[name], convert)()
    with pytest.raises(NotImplementedError, match="recurrent_forward"):
        run_op("forward", arguments)


@pytest.mark.parametrize("name", ["gates_ih", "weight_hh", "weight_hr", "bias_hh", "h_0", "c_0", "reset_h", "reset_c"])
def test_lazy_layouts_are_read_right(name: str) -> None:
    """Views that negate, zeros without memory and expanded values are tensors like others."""
    for make in (
        lambda x: torch._neg_view(x),
        lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
        lambda x: x.flatten()[0].expand_as(x),
    ):
        arguments = forward_arguments("projected lstm")
        arguments["resets"][1] = True
        lazy = make(arguments[name])
        arguments[name] = lazy
        actual = run_op("forward", arguments)
        expected = run_op("forward", arguments | {name: lazy.clone().resolve_neg().contiguous() + 0})
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


def test_too_large_for_memory() -> None:
    huge = torch.zeros(1).expand
    arguments = forward_arguments("lstm") | {"lengths": None, "resets": None, "reset_h": None, "reset_c": None}
    for change in (
        {"gates_ih": huge(2**42, B, P * 20)},
        {"gates_ih": huge(T, 2**50, P * 20), "h_0": huge(2**50, P * 5), "c_0": huge(2**50, P * 5)},
    ):
        error = raised(run_op, "forward", arguments | change)
        assert isinstance(error, (RuntimeError, MemoryError))


@OP_CELL
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("steps", "batch"), [(0, B), (T, 0), (0, 0)])
def test_op_without_steps_or_rows(cell: str, steps: int, batch: int, requires_grad: bool) -> None:
    """The final state is the first one; gradients go straight through."""
    given = forward_arguments(cell)
    for name, x in given.items():
        if not isinstance(x, Tensor):
            continue
        if name in ("gates_ih", "resets", "keep_h", "keep_c"):
            x = x[:steps, :batch]
        elif name in ("h_0", "c_0", "lengths", "reset_h", "reset_c", "mask_h"):
            x = x[:batch]
        constant = name in ("mask_h", "keep_h", "keep_c") or not x.is_floating_point()
        given[name] = x * 0 if name == "lengths" else x if constant else x.requires_grad_(requires_grad)
    output, h_n, c_n, _ = run_op("forward", given)
    assert output.shape[:2] == (steps, batch)
    assert steps or torch.equal(h_n, given["h_0"])
    if requires_grad:
        (h_n.sum() + c_n.sum() + output.sum()).backward()
        assert torch.equal(given["h_0"].grad, torch.ones_like(given["h_0"]))
        assert not given["weight_hh"].grad.any()


# ---- random malformed calls: an error that names an argument, or the right result ----

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@st.composite
def op_calls(draw: Any) -> tuple[str, dict[str, Any]]:
    """A well-formed call in which up to two arguments are replaced by something else."""
    cell = draw(st.sampled_from(sorted(CELLS)))
    info = CELLS[cell]
    lstm = info.states > 1
    steps, batch, groups, hidden = (draw(st.integers(low, 3)) for low in (0, 0, 1, 1))
    width = draw(st.integers(1, 3)) if info.states == 2 and draw(st.booleans()) else None
    dtype = draw(st.sampled_from([torch.float64] * 4 + FLOATS))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    R, states = width or hidden, groups * info.in_c * hidden

    def maybe(make: Callable[[], Any], chance: bool = True) -> Any:
        return make() if chance and draw(st.booleans()) else None

    def numbers(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=seed, dtype=F64) - 0.5).to(dtype)

    def c() -> Tensor:
        return as_c(cell, numbers(batch, states), groups)

    backward = draw(st.booleans())
    has_resets = draw(st.booleans())
    shared: dict[str, Any] = {
        "weight_hr": numbers(groups, width, hidden) if width else None,
        "params": numbers(groups, info.params, hidden) if info.params else None,
        "h_0": numbers(batch, groups * R),
        "c_0": c() if lstm else None,
        "lengths": maybe(
            lambda: torch.randint(0, steps + 1, (batch, groups) if draw(st.booleans()) else (batch,), generator=seed)
        ),
        "resets": (
            torch.rand((steps, batch, groups) if draw(st.booleans()) else (steps, batch), generator=seed) > 0.5
            if has_resets
            else None
        ),
        "reset_h": maybe(lambda: numbers(batch, groups * R), has_resets),
        "reset_c": maybe(c, has_resets and lstm),
        "mask_h": maybe(lambda: numbers(batch, groups * R)),
        "keep_h": maybe(lambda: numbers(steps, batch, groups * R), info.zoneout),
        "keep_c": maybe(lambda: numbers(steps, batch, states), lstm and info.zoneout),
        "reverse": [draw(st.booleans()) for _ in range(groups)],
    }
    weight_hh = numbers(groups, info.gates * hidden, R)
    if backward:
        arguments = {
            "cell": cell,
            "grad_output": maybe(lambda: numbers(steps, batch, groups * R)),
            "grad_h_n": maybe(lambda: numbers(batch, groups * R)),
            "grad_c_n": maybe(lambda: numbers(batch, states), lstm),
            "weight_hh": weight_hh,
            **shared,
            "output": numbers(steps, batch, groups * R),
            "saved": numbers(steps, batch, groups * info.saved_values(shared["keep_h"], shared["keep_c"]) * hidden),
            "initial": draw(st.booleans()),
        }
    else:
        arguments = {
            "cell": cell,
            "gates_ih": numbers(steps, batch, groups * info.gates * hidden),
            "weight_hh": weight_hh,
            "bias_hh": maybe(lambda: numbers(groups, info.gates * hidden)),
            **shared,
            "save": draw(st.booleans()),
        }
    tensor_names = [k for k in arguments if k not in ("cell", "reverse", "save", "initial")]
    for name in draw(st.lists(st.sampled_from([*tensor_names, "reverse", "cell"]), max_size=2)):
        if name == "cell":
            arguments[name] = draw(st.sampled_from([*CELLS, "nonsense"]))
        elif name == "reverse":
            arguments[name] = draw(st.lists(st.booleans(), max_size=4))
        else:
            shape = draw(st.lists(st.integers(0, 13), max_size=4).filter(lambda s: torch.Size(s).numel() < 500))
            other = draw(st.sampled_from([dtype] * 4 + [*FLOATS, torch.int64, torch.bool, torch.uint8]))
            values = torch.rand(shape, generator=seed, dtype=F64) * 3 - 0.5
            arguments[name] = draw(st.sampled_from([values.to(other)] * 3 + [None, values.to(other).to("meta")]))
    return "backward" if backward else "forward", arguments


REQUIRED = ("gates_ih", "weight_hh", "h_0", "output", "saved")


@given(op_calls())
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_random_calls(call: tuple[str, dict[str, Any]]) -> None:
    which, arguments = call
    if any(arguments.get(name, 0) is None for name in REQUIRED):
        return  # the dispatcher's own check
    try:
        results = run_op(which, arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        assert re.match(rf"(recurrent_{which}: )?(\w+): expected", str(error)), error
        return
    assert not any(isinstance(x, Tensor) and x.is_meta for x in arguments.values()), "results that nothing wrote"
    if which == "backward" and "norm" in arguments["cell"]:
        return  # its formulas hold for what forward saves, deviations from a mean, and not for any numbers
    keep = arguments.pop("save", True)
    expected = getattr(reference, which)(**arguments)
    if not keep:
        expected = (*expected[:3], expected[3].new_empty(0))
    tolerance = 1e-10 if results[0].dtype == F64 else 16 * torch.finfo(results[0].dtype).eps
    for index, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), index
        assert torch.allclose(a.to(F64), b.to(F64), rtol=tolerance, atol=tolerance), index
