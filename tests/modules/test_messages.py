"""Every error speaks of what the caller passed: each argument of each public call is given in every wrong way, and the
text has to name it, what was expected and what came, or to be torch.nn's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import functional
from fastrnn.functional import LayerWeights
from fastrnn.weights.onnx import Reversed
from tests.helpers import CELL_KINDS, KINDS, build, tensors

T, B, I, H = 3, 2, 4, 6  # noqa: E741
X = torch.zeros(T, B, I)
RESETS, LENGTHS = torch.zeros(T, B, dtype=torch.bool), torch.tensor([3, 1])
Arguments = dict[str, Any]

# torch.nn's own sentences, and what of them is said of our arguments
TORCHS = "|".join(
    [
        r"RNN input dtype \(torch\.\w+\) does not match weight dtype",
        r"Input and (parameter|hidden|reset_state) tensors are not at the same device",
        r"For (un)?batched [23]-D input, (hx|hx and cx|reset_state) should also be [23]-D but got",
        r"Expected (hidden|hidden\[[01]\]|reset_state|reset_state\[[01]\]) size \(.*\), got \[",
        r"Expected 2D hidden[01] \(batch x hidden_size\), but got",
        r"Expected sequence length to be larger than 0 in RNN",
        r"input\.size\(-1\) must be equal to input_size\. Expected \d+, got",
        r"input must have [23] dimensions, got",
        r"input has inconsistent input_size: got \d+ expected",
        r"hidden[01] has inconsistent hidden_size: got \d+, expected",
        r"Input batch size \d+ doesn't match hidden[01] batch size",
        r"(LSTM|GRU|RNN)(Cell)?: Expected (input|tokens|hidden|hx\[[01]\]) to be",
    ]
)


def wrong_values(x: Any) -> Iterator[tuple[str, Any]]:
    """Other kinds of object, and of a tensor every other rank, size, dtype and device."""
    for value in ("text", 3.5, [1.0], {}, object(), ("a", "b"), torch.nn.Identity, None):
        yield f"{type(value).__name__} {value!r:.12}", value
    if isinstance(x, (tuple, list)) and all(isinstance(part, Tensor) for part in x):
        yield "one part", x[:1]
        yield "three parts", (*x, x[0])
        for i, part in enumerate(x):
            for note, value in wrong_values(part):
                yield f"part {i}: {note}", type(x)((*x[:i], value, *x[i + 1 :]))
    if not isinstance(x, Tensor):
        return
    yield "array", x.detach().numpy()
    yield "numbers", x.tolist()
    yield "rank + 1", x[None]
    yield "scalar", x.new_zeros(())
    yield "flat", x.flatten()
    for d in range(x.dim()):
        yield f"size {d} + 1", torch.cat([x, x.narrow(d, 0, 1)], d)
        yield f"size {d} of 0", x.narrow(d, 0, 0)
        yield f"size {d} of 1", x.narrow(d, 0, 1)
        yield f"without {d}", x.select(d, 0)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int64, torch.int8, torch.bool, torch.complex64):
        if dtype != x.dtype:
            yield str(dtype), x.to(dtype)
    yield "meta", x.to("meta")


def check(call: Callable[..., Any], arguments: Arguments, *names: str, also: tuple[str, ...] = ()) -> int:
    """Gives the named arguments in every wrong way; returns how many errors there were."""
    call(**arguments)
    errors = 0
    own = "|".join(map(re.escape, (*arguments, *also)))
    ours = rf"({own})(\[\d\]|\.\w+)*: expected .*\bgot "
    for name in names or arguments:
        for note, value in wrong_values(arguments[name]):
            try:
                call(**{**arguments, name: value})
            except Exception as error:
                errors += 1
                told = f"{name}, {note}: {type(error).__name__}: {error}"
                assert isinstance(error, (TypeError, ValueError, RuntimeError, IndexError)), told
                assert re.match(rf"(?s){ours}|{TORCHS}", str(error)), told
    return errors


def state(kind: str, *leading: int) -> Any:
    made = torch.zeros(*leading, H)
    return (made, made.clone()) if kind.startswith("LSTM") else made


SHAPES: dict[str, dict[str, Any]] = {"": {}, "deep": {"num_layers": 2, "bidirectional": True}}
KIND, CELL = pytest.mark.parametrize("kind", KINDS), pytest.mark.parametrize("kind", CELL_KINDS)
SHAPE = pytest.mark.parametrize("shape", SHAPES)


def sequence_arguments(kind: str, shape: str) -> Arguments:
    count = 4 if shape else 1
    return {
        "input": X,
        "hx": state(kind, count, B),
        "lengths": LENGTHS,
        "resets": RESETS,
        "reset_state": state(kind, count, B),
    }


@SHAPE
@pytest.mark.parametrize("quantized", [None, torch.int8, torch.bfloat16], ids=str)
@KIND
def test_layers(kind: str, quantized: torch.dtype | None, shape: str) -> None:
    module = build(fastrnn, kind, I, H, **SHAPES[shape])
    if quantized is not None:
        module = fastrnn.quantize(module, quantized)
    arguments = sequence_arguments(kind, shape)
    weights = ("weight_ih_l0",)
    assert check(module, arguments, also=weights) > 100
    assert check(module, {k: arguments[k] for k in ("input", "hx")}, also=weights) > 30
    assert check(module, {"input": X}, also=weights) > 15


@pytest.mark.parametrize("quantized", [False, True])
@KIND
def test_steps(kind: str, quantized: bool) -> None:
    module = build(fastrnn, kind, I, H, 2)
    if quantized:
        module = fastrnn.quantize(module)
    arguments = {"x": X[0], "state": state(kind, 2, B), "resets": RESETS[0], "reset_state": state(kind, 2, B)}
    assert check(module.step, arguments) > 60
    assert check(module.step, {"x": X[0], "state": state(kind, 2, B)}) > 30


@KIND
def test_packed(kind: str) -> None:
    module = build(fastrnn, kind, I, H)
    packed = pack_padded_sequence(X, torch.tensor([1, 3]), enforce_sorted=False)
    assert check(module, {"input": packed, "hx": state(kind, 1, B)}, "hx") > 15

    def call(**fields: Any) -> None:
        module(packed._replace(**fields), state(kind, 1, B))

    assert check(call, packed._asdict()) > 60


@CELL
def test_cells(kind: str) -> None:
    module = build(fastrnn, kind, I, H)
    assert check(module, {"input": X[0], "hx": state(kind, B)}, also=("weight_ih",)) > 30
    assert check(module, {"input": X[0]}, also=("weight_ih",)) > 15


@pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])
def test_parameters(kind: str) -> None:
    """A weight that was exchanged for one that does not fit."""
    module = build(fastrnn, kind, I, H, **({} if "Cell" in kind else SHAPES["deep"]))
    names = dict(module.named_parameters())
    kinds = {"rank + 1", "scalar", "size 0 + 1", "size 1 + 1", "torch.float64", "torch.complex64", "meta"}
    for name, weight in names.items():
        for note, value in wrong_values(weight.detach()):
            if note not in kinds:
                continue
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
            with pytest.raises((RuntimeError, ValueError)) as error:
                module(X[0] if "Cell" in kind else X)
            # the first weight says what the others have to fit, so one of them may be the one that does not
            assert re.match(rf"(?s)(input|{'|'.join(names)}): expected .*\bgot |{TORCHS}", str(error.value)), (
                name,
                note,
            )
        module._parameters[name] = weight


def function(kind: str, cell: bool = False) -> Callable[..., Any]:
    name, _, nonlinearity = kind.lower().partition("_")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    run = getattr(functional, f"{name}_cell" if cell else name)
    return lambda **arguments: run(**arguments, **options)


@SHAPE
@KIND
def test_functions(kind: str, shape: str) -> None:
    weights = build(fastrnn, kind, I, H, **SHAPES[shape])._weights()
    arguments = sequence_arguments(kind, shape)
    arguments["state"] = arguments.pop("hx")
    arguments |= {"weights": weights, "dropout": 0.5}
    assert check(function(kind), arguments) > 100
    first = weights[0][0]
    for field in LayerWeights._fields[:4]:

        def call(weight: Any) -> None:
            function(kind)(input=X, state=None, weights=[[first._replace(**{field: weight})]])

        if shape == "":
            assert check(call, {"weight": getattr(first, field)}, also=("weights",)) > 15
    for wrong in ([], [[]], first, [first], [[X]], [[first, first, first]], [[first], [first, first]], [[(X,)]]):
        with pytest.raises((TypeError, ValueError), match=r"weights(\[\d\])*: expected .*, got "):
            function(kind)(input=X, state=None, weights=wrong)


@KIND
def test_functions_of_a_step(kind: str) -> None:
    ((weights,),) = build(fastrnn, kind, I, H)._weights()
    arguments = {"input": X[0], "state": state(kind, B), "weights": weights}
    assert check(function(kind, cell=True), arguments) > 30


def plain(weights: Any) -> Any:
    return [[list(w) for w in layer] for layer in weights]


@KIND
def test_plain_tuples_are_weights(kind: str) -> None:
    """In the order of LayerWeights, without the last ones where a network has none."""
    module = build(fastrnn, kind, I, H, 2, bidirectional=True)
    x, weights = torch.randn(T, B, I), module._weights()
    expected = tensors(function(kind)(input=x, state=None, weights=weights))
    for given in (plain(weights), [[tuple(w[:4]) for w in layer] for layer in weights]):
        for a, b in zip(tensors(function(kind)(input=x, state=None, weights=given)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    one, start = build(fastrnn, kind, I, H, bias=False)._weights()[0][0], state(kind, B)
    run = function(kind, cell=True)
    found, wanted = (run(input=x[0], state=start, weights=w) for w in (tuple(one[:2]), one))
    assert all(map(torch.equal, tensors(found), tensors(wanted)))


def test_around_sequences() -> None:
    output = torch.zeros(T, B, H)
    assert check(fastrnn.pool, {"output": output, "lengths": LENGTHS, "how": "mean"}) > 25
    with pytest.raises(TypeError, match=r"^state: expected tensors, None, tuples, lists or dicts of them, got str"):
        fastrnn.detach((output, "a"))
    reversed_ = Reversed(fastrnn.GRU(I, H))
    assert check(reversed_, {"input": X, "hx": state("GRU", 1, B), "lengths": LENGTHS}) > 40
    assert check(Reversed, {"module": fastrnn.GRU(I, H)}) >= 8


def test_around_models() -> None:
    for call in (fastrnn.convert, fastrnn.to_torch, fastrnn.unconverted):
        assert check(call, {"model": fastrnn.GRU(I, H)}) >= 7
    assert check(fastrnn.quantize, {"module": fastrnn.GRU(I, H), "dtype": torch.int8}) >= 15


def test_weights_of_other_runtimes() -> None:
    module = fastrnn.LSTM(I, H)
    (arrays,) = fastrnn.to_keras(module)
    assert (
        check(fastrnn.load_keras, {"module": module, "source": arrays}, also=("kernel", "recurrent_kernel", "bias"))
        > 10
    )
    for call in (fastrnn.from_keras, fastrnn.to_keras):
        name = "source" if call is fastrnn.from_keras else "module"
        for _, value in wrong_values(None):
            with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*\bgot "):
                call(**{name: value})
    for _, value in wrong_values(None):
        with pytest.raises((TypeError, ValueError), match=r"^node: expected .*\bgot "):
            fastrnn.from_onnx(value, {})
