"""Weights from Keras and ONNX and back, against their equations in NumPy (runtime_equations.py)."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn.weights import Reversed
from tests.helpers import build, tensors
from tests.weights import runtime_equations as equations

T, B, I, H = 5, 3, 4, 6  # noqa: E741
LENGTHS = [5, 2, 3]
KERAS = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "SimpleRNN"}
KERAS_STEPS = {"LSTM": equations.keras_lstm, "GRU": equations.keras_gru, "RNN": equations.keras_simple_rnn}
ONNX_STEPS = {
    "LSTM": equations.onnx_lstm,
    "GRU": equations.onnx_gru,
    "RNN": equations.onnx_rnn,
    "RNN_RELU": equations.onnx_rnn_relu,
}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "RNN_RELU": 1}
KIND = pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
BIAS = pytest.mark.parametrize("bias", [True, False])


def random(*shape: int, seed: int) -> equations.Array:
    return np.random.default_rng(seed).normal(size=shape) * 0.7


def assert_near(actual: torch.Tensor, expected: equations.Array) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), rtol=0, atol=1e-12)


# ---- Keras ----


class Layer:
    """What from_keras reads of a Keras layer."""

    def __init__(self, arrays: list[Any], **config: Any) -> None:
        self.arrays, self.config = arrays, config

    def get_weights(self) -> list[Any]:
        return self.arrays

    def get_config(self) -> dict[str, Any]:
        return self.config


def keras_arrays(kind: str, inputs: int, *, bias: bool = True, seed: int = 0) -> list[equations.Array]:
    G = GATES[kind]
    arrays = [random(inputs, G * H, seed=seed), random(H, G * H, seed=seed + 1)]
    shape = (2, 3 * H) if kind == "GRU" else (G * H,)
    return [*arrays, random(*shape, seed=seed + 2)] if bias else arrays


def keras_layer(kind: str, arrays: list[Any], name: str = "", **config: Any) -> Any:
    config = {"units": H, "use_bias": len(arrays) == 3, "activation": "tanh", "go_backwards": False, **config}
    if kind != "RNN":
        config.setdefault("recurrent_activation", "sigmoid")
    if kind == "GRU":
        config.setdefault("reset_after", True)
    return type(name or KERAS[kind], (Layer,), {})(arrays, **config)


def bidirectional(forward: Any, backward: Any, merge_mode: str = "concat") -> Any:
    layer = type("Bidirectional", (Layer,), {})(forward.arrays + backward.arrays)
    layer.forward_layer, layer.backward_layer, layer.merge_mode = forward, backward, merge_mode
    return layer


def keras_run(kind: str, arrays: list[Any], x: equations.Array, reverse: bool = False) -> equations.Array:
    zeros = [np.zeros((B, H))] * (2 if kind == "LSTM" else 1)
    return equations.run(KERAS_STEPS[kind], x, zeros, arrays, reverse=reverse)[0]


@BIAS
@KIND
def test_from_keras(kind: str, bias: bool) -> None:
    arrays = keras_arrays(kind, I, bias=bias)
    module = fastrnn.from_keras(keras_layer(kind, arrays))
    assert type(module) is getattr(fastrnn, kind)
    assert module.batch_first
    assert next(module.parameters()).dtype == torch.float64
    x = random(T, B, I, seed=9)
    output, _ = module(torch.from_numpy(x).transpose(0, 1))
    assert_near(output.transpose(0, 1), keras_run(kind, arrays, x))


@KIND
def test_keras_stack_of_bidirectional_layers(kind: str) -> None:
    """Two layers of two directions: sequences in and out, concatenated, as Keras models stack them."""
    x = value = random(T, B, I, seed=9)
    layers = []
    for seed, width in ((0, I), (10, 2 * H)):
        halves = [keras_arrays(kind, width, seed=seed + 3 * d) for d in range(2)]
        layers.append(bidirectional(*(keras_layer(kind, a, go_backwards=d == 1) for d, a in enumerate(halves))))
        value = np.concatenate([keras_run(kind, a, value, d == 1) for d, a in enumerate(halves)], axis=2)
    module = fastrnn.from_keras(layers, batch_first=False)
    assert (module.num_layers, module.bidirectional) == (2, True)
    assert_near(module(torch.from_numpy(x))[0], value)


@BIAS
@KIND
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("namespace", [fastrnn, nn])
def test_keras_and_back(kind: str, bias: bool, directions: int, namespace: Any) -> None:
    """The arrays that come out are those that went in; the module computes the same after the way there and back."""
    layers = [
        [x for d in range(directions) for x in keras_arrays(kind, width, bias=bias, seed=20 * k + 3 * d)]
        for k, width in enumerate((I, directions * H))
    ]
    module = build(namespace, kind, I, H, 2, bias=bias, bidirectional=directions == 2, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    fastrnn.load_keras(module, layers)
    assert all(p is parameters[n] for n, p in module.named_parameters())
    for actual, expected in zip(fastrnn.to_keras(module), layers, strict=True):
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    torch.nn.init.normal_(next(module.parameters()))
    other = build(namespace, kind, I, H, 2, bias=bias, bidirectional=directions == 2, dtype=torch.float64)
    fastrnn.load_keras(other, fastrnn.to_keras(module))
    x = torch.from_numpy(random(T, B, I, seed=9))
    torch.testing.assert_close(other(x)[0], module(x)[0], rtol=0, atol=1e-12)


@KIND
def test_keras_cells(kind: str) -> None:
    arrays = keras_arrays(kind, I)
    cell = fastrnn.from_keras(keras_layer(kind, arrays, name=f"{KERAS[kind]}Cell"))
    assert type(cell) is getattr(fastrnn, f"{kind}Cell")
    x, states = random(B, I, seed=9), [random(B, H, seed=8 + k) for k in range(2 if kind == "LSTM" else 1)]
    hx = [torch.from_numpy(s) for s in states]
    after = tensors(cell(torch.from_numpy(x), hx if kind == "LSTM" else hx[0]))
    for a, b in zip(after, KERAS_STEPS[kind](x, states, *arrays), strict=True):
        assert_near(a, b)
    np.testing.assert_array_equal(fastrnn.to_keras(cell)[0][1], arrays[1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_keras_of_a_dtype_that_numpy_lacks(kind: str) -> None:
    """Arrays of float32 with the same values, which come back as they were."""
    module, other = (getattr(fastrnn, kind)(I, H, dtype=torch.bfloat16) for _ in range(2))
    (arrays,) = fastrnn.to_keras(module)
    assert all(a.dtype == np.float32 for a in arrays)
    fastrnn.load_keras(other, arrays)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert torch.equal(getattr(other, name), getattr(module, name))


@BIAS
@pytest.mark.parametrize("directions", [1, 2])
def test_keras_gru_with_the_reset_before_the_product(directions: int, bias: bool) -> None:
    """reset_after=False, whose bias is one: there, back, and what it computes."""
    halves = []
    for d in range(directions):
        kernels = keras_arrays("GRU", I, bias=False, seed=3 * d)
        halves.append([*kernels, random(3 * H, seed=5 + d)] if bias else kernels)
    config = {"use_bias": bias, "reset_after": False}
    layers = [keras_layer("GRU", a, go_backwards=d == 1, **config) for d, a in enumerate(halves)]
    module = fastrnn.from_keras(bidirectional(*layers) if directions == 2 else layers[0], batch_first=False)
    assert type(module) is fastrnn.GRU and not module.reset_after
    x, zeros = random(T, B, I, seed=9), [np.zeros((B, H))]
    runs = [equations.run(equations.keras_gru_before, x, zeros, a, reverse=d == 1)[0] for d, a in enumerate(halves)]
    assert_near(module(torch.from_numpy(x))[0], np.concatenate(runs, axis=2))
    (back,) = fastrnn.to_keras(module)
    for a, b in zip(back, [a for half in halves for a in half], strict=True):
        np.testing.assert_array_equal(a, b)
    if bias:
        with pytest.raises(ValueError, match=r"bias: expected \[18\], got \[2, 18\]"):
            fastrnn.load_keras(module, [x for _ in halves for x in keras_arrays("GRU", I)])
    with pytest.raises(ValueError, match=r"reset_after: expected True for a cell, got False"):
        fastrnn.from_keras(keras_layer("GRU", halves[0], name="GRUCell", **config))


def test_keras_relu_dtypes_and_layers_as_sources() -> None:
    arrays = [x.astype(np.float16) for x in keras_arrays("RNN", I)]
    layer = keras_layer("RNN", arrays, activation="relu")
    module = fastrnn.from_keras(layer)
    assert (module.nonlinearity, module.weight_ih_l0.dtype) == ("relu", torch.float16)
    wider = fastrnn.RNN(I, H, nonlinearity="relu")
    fastrnn.load_keras(wider, layer)
    assert wider.weight_ih_l0.dtype == torch.float32
    assert torch.equal(wider.weight_ih_l0, module.weight_ih_l0.float())
    halves = [torch.tensor(x).bfloat16() for x in arrays]
    assert fastrnn.from_keras(keras_layer("RNN", halves)).weight_ih_l0.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("LSTM", {"activation": "relu"}, "activation: expected 'tanh', got 'relu'"),
        ("RNN", {"activation": "gelu"}, "activation: expected 'tanh' or 'relu', got 'gelu'"),
        ("LSTM", {"recurrent_activation": "hard_sigmoid"}, "recurrent_activation: expected 'sigmoid', got 'hard_sig"),
        ("GRU", {"go_backwards": True}, "go_backwards: expected False, got True"),
    ],
)
def test_keras_layers_of_other_equations(kind: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        fastrnn.from_keras(keras_layer(kind, keras_arrays(kind, I), **config))


def test_keras_sources_that_do_not_fit() -> None:
    lstm, gru = (keras_layer(kind, keras_arrays(kind, I)) for kind in ("LSTM", "GRU"))
    backward = keras_layer("LSTM", keras_arrays("LSTM", I), go_backwards=True)
    bad: list[tuple[Any, type[Exception], str]] = [
        ([], ValueError, "source: expected one layer or more, got none"),
        (keras_layer("LSTM", []), ValueError, "source: expected a layer that is built"),
        (keras_layer("LSTM", [], name="ConvLSTM2D"), TypeError, "source: expected a Keras LSTM, .*, got ConvLSTM2D"),
        ([lstm, gru], ValueError, r"source\[1\]: expected the same kind"),
        (bidirectional(lstm, backward, "sum"), ValueError, "merge_mode: expected 'concat', got 'sum'"),
        (bidirectional(lstm, lstm), ValueError, "go_backwards: expected True, got False"),
        (bidirectional(lstm, keras_layer("GRU", [], go_backwards=True)), ValueError, "backward_layer: expected it to"),
        (
            [keras_layer("GRU", keras_arrays("GRU", I), name="GRUCell")] * 2,
            ValueError,
            "source: expected one cell, got 2",
        ),
        (
            [keras_layer("GRU", keras_arrays("GRU", I))] * 2,
            ValueError,
            r"weight_ih_l1: expected \[18, 6\], got \[18, 4\]",
        ),
    ]
    for source, error, message in bad:
        with pytest.raises(error, match=f"^{message}"):
            fastrnn.from_keras(source)


@KIND
def test_keras_arrays_that_do_not_fit(kind: str) -> None:
    """Nothing is copied: the first layer's arrays are right each time."""
    module = build(fastrnn, kind, I, H, 2, dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    first, second = keras_arrays(kind, I), keras_arrays(kind, H)
    G = GATES[kind]
    bad: list[tuple[Any, str]] = [
        ([first], "source: expected 2 layers, got 1"),
        (first, "source: expected 2 layers, got 1"),
        (
            [first, second[:2]],
            r"source: expected 3 arrays a layer \(kernel, recurrent_kernel and bias, 1 times\), got 2",
        ),
        ([first, first], rf"weight_ih_l1: expected \[{G * H}, {H}\], got \[{G * H}, {I}\]"),
        ([first, [second[0][:, 1:], *second[1:]]], rf"kernel: expected \[\*, {G * H}\]"),
        ([first, [*second[:2], np.zeros(G * H + 1)]], r"bias: expected \["),
        ("weights.h5", "source: expected a Keras layer, its list of arrays"),
    ]
    if kind == "GRU":
        bad.append(([first, [*second[:2], np.zeros(3 * H)]], r"bias: .*, got \[18\]: of a GRU with reset_after=False"))
    for source, message in bad:
        with pytest.raises(ValueError, match=f"^{message}"):
            fastrnn.load_keras(module, source)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_modules_that_have_no_such_weights() -> None:
    quantized = fastrnn.quantize(fastrnn.LSTM(I, H))
    normed = parametrizations.weight_norm(fastrnn.LSTM(I, H), "weight_hh_l0")
    arrays = keras_arrays("LSTM", I)
    bad: list[tuple[Any, type[Exception], str]] = [
        (
            nn.Linear(I, H),
            TypeError,
            "module: expected an LSTM, GRU or RNN or a cell of fastrnn or torch.nn, got Linear",
        ),
        (quantized, TypeError, "module: expected an LSTM.*, got fastrnn.quantized.QuantizedLSTM"),
        (fastrnn.LSTM(I, H, proj_size=2), ValueError, "module: expected proj_size=0, got 2"),
        (normed, ValueError, "module: expected weight_hh_l0 to be a parameter; remove its parametrization"),
    ]
    for module, error, message in bad:
        with pytest.raises(error, match=f"^{message}"):
            fastrnn.load_keras(module, arrays)
    assert fastrnn.to_keras(normed)[0][1].shape == (H, 4 * H)  # read as it is computed


# ---- ONNX ----

ONNX_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


def node(kind: str, inputs: list[str], domain: str = "", **attributes: Any) -> Any:
    """An onnx.NodeProto, as far as it is read."""

    def attribute(name: str, value: Any) -> Any:
        fields: dict[str, Any] = {"name": name, "i": 0, "f": 0.0, "s": b"", "strings": []}
        field = {int: "i", float: "f", str: "s", list: "strings"}[type(value)]
        encoded = {"s": lambda: value.encode(), "strings": lambda: [v.encode() for v in value]}
        return SimpleNamespace(**{**fields, field: encoded.get(field, lambda: value)()})

    found = [attribute(k, v) for k, v in attributes.items()]
    return SimpleNamespace(op_type=kind.partition("_")[0], domain=domain, input=inputs, attribute=found)


def onnx_case(kind: str, direction: str = "forward", *, layout: int = 0, given: str = "BLS", **more: Any) -> Any:
    """A node and its initialisers. `given`: B biases, L lengths, S states, P peepholes."""
    G, D = GATES[kind], 2 if direction == "bidirectional" else 1
    arrays: dict[str, Any] = {"W": random(D, G * H, I, seed=1), "R": random(D, G * H, H, seed=2)}
    if "B" in given:
        arrays["B"] = random(D, 2 * G * H, seed=3)
    if "L" in given:
        arrays["sequence_lens"] = np.array(LENGTHS, np.int32)
    if "S" in given:
        for k, name in enumerate(("initial_h", "initial_c")[: 2 if kind == "LSTM" else 1]):
            state = random(D, B, H, seed=4 + k)
            arrays[name] = state if layout == 0 else np.ascontiguousarray(state.transpose(1, 0, 2))
    if "P" in given:
        arrays["P"] = random(D, 3 * H, seed=6)
    attributes: dict[str, Any] = {"hidden_size": H, "direction": direction, "layout": layout, **more}
    if kind == "GRU":
        attributes.setdefault("linear_before_reset", 1)
    if kind == "RNN_RELU":
        attributes["activations"] = ["Relu"] * D
    inputs = ["X", *(f"name of {x}" if x in arrays else "" for x in ONNX_INPUTS[1:])]
    return node(kind, inputs, **attributes), {f"name of {k}": v for k, v in arrays.items()}


def onnx_run(kind: str, direction: str, arrays: dict[str, Any], x: equations.Array) -> tuple[Any, list[Any]]:
    """Outputs [T, B, D*H] and states [D, B, H]."""
    get = {k.removeprefix("name of "): v for k, v in arrays.items()}
    flags = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    runs = []
    for d, reverse in enumerate(flags):
        G = GATES[kind]
        bias = get["B"][d] if "B" in get else np.zeros(2 * G * H)
        states = [get.get(name, np.zeros((2, B, H)))[d] for name in ("initial_h", "initial_c")]
        states = states[: 2 if kind == "LSTM" else 1]
        lengths = LENGTHS if "sequence_lens" in get else None
        weights = [get["W"][d], get["R"][d], bias, *([get["P"][d]] if "P" in get else [])]
        runs.append(equations.run(ONNX_STEPS[kind], x, states, weights, lengths=lengths, reverse=reverse))
    return np.concatenate([y for y, _ in runs], axis=2), [np.stack(s) for s in zip(*(f for _, f in runs), strict=True)]


@pytest.mark.parametrize("given", ["BLS", "", "B", "S", "L", "P", "BLSP"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ONNX_STEPS)
def test_from_onnx(kind: str, direction: str, given: str) -> None:
    if "P" in given and kind != "LSTM":
        pytest.skip("peepholes are an LSTM's")
    layer, arrays = onnx_case(kind, direction, given=given)
    module, hx, lengths = fastrnn.from_onnx(layer, arrays)
    assert isinstance(module, Reversed) == (direction == "reverse")
    x = random(T, B, I, seed=9)
    output, finals = module(torch.from_numpy(x), hx, lengths=lengths)
    expected, states = onnx_run(kind, direction, arrays, x)
    assert_near(output, expected)
    for a, b in zip(tensors(finals), states, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("given", ["BLS", "", "B"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("attributes", [{"linear_before_reset": 0}, {}], ids=["0", "default"])
def test_onnx_gru_with_the_reset_before_the_product(
    attributes: dict[str, int], direction: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """linear_before_reset=0, which is ONNX' default."""
    layer, arrays = onnx_case("GRU", direction, given=given)
    layer = node("GRU", layer.input, hidden_size=H, direction=direction, **attributes)
    module, hx, lengths = fastrnn.from_onnx(layer, arrays)
    inner = module.module if isinstance(module, Reversed) else module
    assert not inner.reset_after
    monkeypatch.setitem(ONNX_STEPS, "GRU", equations.onnx_gru_before)
    x = random(T, B, I, seed=9)
    output, finals = module(torch.from_numpy(x), hx, lengths=lengths)
    expected, states = onnx_run("GRU", direction, arrays, x)
    assert_near(output, expected)
    assert_near(finals, states[0])


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@KIND
def test_onnx_layout(kind: str, direction: str) -> None:
    """Batch first; the names of activations in any case, as runtimes read them; tensors for arrays."""
    D = 2 if direction == "bidirectional" else 1
    activations = {"LSTM": ["sigmoid", "tanh", "TANH"], "GRU": ["Sigmoid", "tanh"], "RNN": ["tanh"]}[kind] * D
    layer, arrays = onnx_case(kind, direction, layout=1, activations=activations)
    module, hx, lengths = fastrnn.from_onnx(layer, {k: torch.from_numpy(v) for k, v in arrays.items()})
    x = random(T, B, I, seed=9)
    output, finals = module(torch.from_numpy(x).transpose(0, 1), hx, lengths=lengths)
    swapped = {k: v.transpose(1, 0, 2) if "initial" in k else v for k, v in arrays.items()}
    expected, states = onnx_run(kind, direction, swapped, x)
    assert_near(output.transpose(0, 1), expected)
    for a, b in zip(tensors(finals), states, strict=True):
        assert_near(a, b)


def test_onnx_inputs_that_the_graph_computes() -> None:
    """Trailing inputs may be missing; states and lengths that are no initialisers are the caller's."""
    layer, arrays = onnx_case("LSTM")
    for name in ("initial_h", "initial_c", "sequence_lens"):
        del arrays[f"name of {name}"]
    made = fastrnn.from_onnx(layer, arrays)
    assert made.hx is made.lengths is None
    assert made.module.bias
    layer.input = layer.input[:3]
    assert not fastrnn.from_onnx(layer, arrays).module.bias


@pytest.mark.parametrize(
    ("kind", "attributes", "error", "message"),
    [
        ("LSTM", {"direction": "sideways"}, ValueError, "direction: expected one of forward, .*, got sideways"),
        ("LSTM", {"input_forget": 1}, ValueError, "input_forget: expected 0, got 1"),
        ("LSTM", {"clip": 3.0}, ValueError, "clip: expected none, got 3.0"),
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"]}, ValueError, r"activations: expected \['Sigmoid', 'Tanh"),
        (
            "GRU",
            {"activations": ["HardSigmoid", "Tanh"]},
            ValueError,
            r"activations: expected \['Sigmoid', 'Tanh'\], got",
        ),
        ("RNN", {"activations": ["Elu"]}, ValueError, r"activations: expected \['Tanh'\] or \['Relu'\], got \['Elu'\]"),
        ("LSTM", {"hidden_size": H + 1}, ValueError, "R: expected hidden_size 7 for its last dimension, got 6"),
        ("LSTM", {"domain": "com.microsoft"}, TypeError, "node: expected an LSTM, GRU or RNN of domain ai.onnx, got"),
    ],
)
def test_onnx_nodes_of_other_equations(kind: str, attributes: Any, error: type[Exception], message: str) -> None:
    layer, arrays = onnx_case(kind)
    if "direction" in attributes:
        layer, arrays = onnx_case(kind, attributes["direction"])
    else:
        attributes = {"linear_before_reset": 1, **attributes} if kind == "GRU" else attributes
        layer = node(kind, layer.input, **attributes)
    with pytest.raises(error, match=f"^{message}"):
        fastrnn.from_onnx(layer, arrays)


def test_onnx_inputs_that_do_not_fit() -> None:
    layer, arrays = onnx_case("LSTM", "bidirectional")

    def without(*names: str) -> dict[str, Any]:
        return {k: v for k, v in arrays.items() if k.removeprefix("name of ") not in names}

    def instead(name: str, *shape: int) -> dict[str, Any]:
        return {**arrays, f"name of {name}": np.zeros(shape)}

    bad: list[tuple[Any, str]] = [
        (without("W"), "W: expected 'name of W' to be among the initialisers"),
        (without("R"), "R: expected 'name of R' to be among the initialisers"),
        (without("B"), "B: expected 'name of B' to be among the initialisers"),
        (without("initial_c"), r"\['initial_h', 'initial_c'\]: expected all of them or none .*, got \['initial_h'\]"),
        (instead("W", 1, 4 * H, I), r"W: expected \[2, 24, 4\], got \[1, 24, 4\]"),
        (instead("B", 2, 4 * H), r"B: expected \[2, 48\], got \[2, 24\]"),
        (instead("R", 2, 4 * H, H - 1), "R: expected hidden_size 6 for its last dimension, got 5"),
    ]
    for initializers, message in bad:
        with pytest.raises(ValueError, match=f"^{message}"):
            fastrnn.from_onnx(layer, initializers)
    layer, arrays = onnx_case("LSTM", given="P")
    for initializers, message in [
        (without("P"), "P: expected 'name of P' to be among the initialisers"),
        (instead("P", 1, 2 * H), r"P: expected \[1, 18\], got \[1, 12\]"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            fastrnn.from_onnx(layer, initializers)
    with pytest.raises(TypeError, match=r"^node: expected an LSTM, GRU or RNN of domain ai.onnx, got dict"):
        fastrnn.from_onnx({}, arrays)


def test_reversed_modules() -> None:
    """Padding reaches nothing, gradients included; bad lengths and inputs are refused as by the module inside."""
    module = Reversed(fastrnn.GRU(I, H, batch_first=True, dtype=torch.float64))
    x = torch.from_numpy(random(B, T, I, seed=9))
    for b, length in enumerate(LENGTHS):
        x[b, length:] = torch.nan
    x.requires_grad_()
    output, h_n = module(x, lengths=torch.tensor(LENGTHS))
    (output.sum() + h_n.sum()).backward()
    for b, length in enumerate(LENGTHS):
        assert not output[b, length:].any()
        assert not x.grad[b, length:].any()
        alone, h = module(x[b : b + 1, :length].detach())
        torch.testing.assert_close(alone[0], output[b, :length])
        torch.testing.assert_close(h[:, 0], h_n[:, b])
        torch.testing.assert_close(module(x[b, :length].detach())[0], alone[0])
    with pytest.raises(ValueError, match="lengths"):
        module(x.nan_to_num(), lengths=torch.tensor([6, 2, 3]))
    with pytest.raises(ValueError, match="lengths: expected None with unbatched input"):
        module(x[0], lengths=torch.tensor([5]))
    with pytest.raises(TypeError, match="input: expected a tensor, got PackedSequence"):
        module(nn.utils.rnn.pack_sequence([x[0].detach()]))
    with pytest.raises(TypeError, match="module: expected an LSTM, GRU or RNN of one direction"):
        Reversed(fastrnn.GRU(I, H, bidirectional=True))


def test_options_of_training_are_nothing_of_the_weights() -> None:
    """What an AWD-LSTM is trained with, and how its gradients were clipped: its weights go out and come in."""
    options = {"dropout": 0.3, "weight_dropout": 0.5, "locked_dropout": 0.4, "recurrent_dropout": 0.2, "grad_clip": 0.1}
    module, plain = fastrnn.LSTM(I, H, 2, **options), fastrnn.LSTM(I, H, 2)
    plain.load_state_dict(module.state_dict())
    arrays = fastrnn.to_keras(module)
    for layer, of_plain in zip(arrays, fastrnn.to_keras(plain), strict=True):
        assert all(map(np.array_equal, layer, of_plain))
    other = fastrnn.LSTM(I, H, 2, **options)
    fastrnn.load_keras(other, arrays)
    x = torch.randn(T, B, I)
    torch.testing.assert_close(other.eval()(x)[0], plain(x)[0])


@pytest.mark.parametrize(
    "module",
    [
        fastrnn.LSTM(I, H, 2, return_all_layers=True, return_all_states=True),
        fastrnn.SLSTM(I, H, return_all_states=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_reversed_modules_of_many_results(module: Any) -> None:
    """Tuples of outputs and of states after every step."""
    x = torch.randn(T, B, I)
    for lengths in (None, torch.tensor([T] * B)):
        got = Reversed(module)(x, lengths=lengths)
        want = module(x.flip(0))
        for a, b in zip(tree_leaves((got[0], got[2])), tree_leaves((want[0], want[2])), strict=True):
            torch.testing.assert_close(a, b.flip(0))
        assert all(map(torch.equal, got[1], want[1]))


@pytest.mark.parametrize("batch_first", [True, False])
def test_reversed_modules_of_tokens_and_every_c(batch_first: bool) -> None:
    module = Reversed(fastrnn.LSTM(I, H, batch_first=batch_first, return_all_states=True, token_input=True))
    tokens = torch.randint(I, (B, T) if batch_first else (T, B))
    dense = nn.functional.one_hot(tokens, I).float()
    time = 1 if batch_first else 0
    for lengths in (None, torch.tensor(LENGTHS)):
        found, expected = (module(x, lengths=lengths) for x in (tokens, dense))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        output, (h_n, c_n), cells = found
        torch.testing.assert_close(output.select(time, 0), h_n[0])
        torch.testing.assert_close(cells.select(time, 0), c_n[0])


def test_to_onnx_without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"to_onnx needs the package onnx"):
        fastrnn.to_onnx(fastrnn.LSTM(I, H))
