"""Weights from Keras on TensorFlow and back, against Keras' own output."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

import fastrnn

from .packages import needs

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
needs("tensorflow")
keras = needs("keras")

T, B, I, H = 7, 3, 5, 6  # noqa: E741
KIND = pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])


def shaken(layer: Any) -> Any:
    """Built, with all weights random: Keras' biases start at 0 and 1."""
    layer.build((B, T, I))
    rng = np.random.default_rng(5)
    layer.set_weights([rng.normal(size=x.shape).astype("float32") * 0.5 for x in layer.get_weights()])
    return layer


def inputs() -> Any:
    return np.random.default_rng(1).normal(size=(B, T, I)).astype("float32")


def assert_near(actual: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(np.asarray(expected)), rtol=0, atol=2e-6)


def test_backend() -> None:
    assert keras.backend.backend() == "tensorflow"


@KIND
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_from_keras(kind: str, bias: bool, bidirectional: bool) -> None:
    """Outputs and final states, and the same after the module's weights went back into a fresh layer."""

    def make() -> Any:
        layer = getattr(keras.layers, kind)(H, use_bias=bias, return_sequences=True, return_state=True)
        return shaken(keras.layers.Bidirectional(layer) if bidirectional else layer)

    layer, x = make(), inputs()
    output, *states = layer(x)
    module = fastrnn.from_keras(layer)
    actual, finals = module(torch.from_numpy(x))
    assert_near(actual, output)
    h_n, *c_n = finals if kind == "LSTM" else (finals,)
    ours = [s[d] for d in range(1 + bidirectional) for s in (h_n, *c_n)]
    for a, b in zip(ours, states, strict=True):
        assert_near(a, b)
    torch.nn.init.normal_(module.weight_hh_l0, std=0.3)
    layer.set_weights(fastrnn.to_keras(module)[0])
    assert_near(module(torch.from_numpy(x))[0], layer(x)[0])


def test_relu_cells_and_stacks() -> None:
    x = inputs()
    layer = shaken(keras.layers.SimpleRNN(H, activation="relu", return_sequences=True))
    assert_near(fastrnn.from_keras(layer)(torch.from_numpy(x))[0], layer(x))
    for kind in ("LSTMCell", "GRUCell", "SimpleRNNCell"):
        cell = getattr(keras.layers, kind)(H)
        cell.build((B, I))
        zeros = np.zeros((B, H), "float32")
        _, after = cell(x[:, 0], [zeros] * (2 if kind == "LSTMCell" else 1))
        ours = fastrnn.from_keras(cell)(torch.from_numpy(x[:, 0]))
        assert_near(ours[0] if kind == "LSTMCell" else ours, after[0])
    model = keras.Sequential([keras.layers.Bidirectional(keras.layers.GRU(H, return_sequences=True)) for _ in range(2)])
    expected = model(x)
    assert_near(fastrnn.from_keras(model.layers)(torch.from_numpy(x))[0], expected)


@pytest.mark.parametrize("bias", [True, False])
def test_gru_with_the_reset_before_the_product(bias: bool) -> None:
    def make() -> Any:
        return shaken(keras.layers.GRU(H, reset_after=False, use_bias=bias, return_sequences=True))

    layer, x = make(), inputs()
    module = fastrnn.from_keras(layer)
    assert not module.reset_after
    assert_near(module(torch.from_numpy(x))[0], layer(x))
    other = make()
    other.set_weights(fastrnn.to_keras(module)[0])
    assert_near(module(torch.from_numpy(x))[0], other(x))


def test_layers_of_other_equations() -> None:
    for layer, name in (
        (keras.layers.LSTM(H, activation="relu"), "activation"),
        (keras.layers.LSTM(H, recurrent_activation="hard_sigmoid"), "recurrent_activation"),
        (keras.layers.LSTM(H, go_backwards=True), "go_backwards"),
        (keras.layers.Bidirectional(keras.layers.LSTM(H), merge_mode="sum"), "merge_mode"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            fastrnn.from_keras(shaken(layer))
    with pytest.raises(ValueError, match="that is built"):
        fastrnn.from_keras(keras.layers.LSTM(H))
    with pytest.raises(TypeError, match="got ConvLSTM2D"):
        fastrnn.from_keras(keras.layers.ConvLSTM2D(3, 3))


def test_mixed_precision() -> None:
    """Variables of float32, whatever the layer computes in."""
    layer = shaken(keras.layers.LSTM(H, dtype="mixed_bfloat16"))
    assert fastrnn.from_keras(layer).weight_ih_l0.dtype == torch.float32
    layer = shaken(keras.layers.LSTM(H, dtype="bfloat16", recurrent_initializer="glorot_uniform"))
    module = fastrnn.from_keras(layer)
    assert module.weight_ih_l0.dtype == torch.bfloat16
    assert torch.equal(module.weight_ih_l0.float(), torch.tensor(np.asarray(layer.get_weights()[0], "float32")).t())
