"""Keras' and ONNX' recurrent layers in NumPy, written from their documents and not from torch's equations.

Keras 3: the ``call`` of the cells in keras/src/layers/rnn/{lstm,gru,simple_rnn}.py. ONNX: the equations of operators
LSTM, GRU and RNN at onnx.ai/onnx/operators. Each is one direction, from the first step to the last.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


# ---- Keras: x [B, I], states [B, H]; kernel [I, G*H], recurrent_kernel [H, G*H] ----


def keras_lstm(
    x: Array, states: list[Array], kernel: Array, recurrent: Array, bias: Array | float = 0.0
) -> list[Array]:
    h, c = states
    z0, z1, z2, z3 = np.split(x @ kernel + h @ recurrent + bias, 4, axis=1)
    i, f = sigmoid(z0), sigmoid(z1)
    c = f * c + i * np.tanh(z2)
    return [sigmoid(z3) * np.tanh(c), c]


def keras_gru(x: Array, states: list[Array], kernel: Array, recurrent: Array, bias: Array | None = None) -> list[Array]:
    """reset_after=True"""
    (h,) = states
    input_bias, recurrent_bias = (0.0, 0.0) if bias is None else bias
    x_z, x_r, x_h = np.split(x @ kernel + input_bias, 3, axis=1)
    h_z, h_r, h_h = np.split(h @ recurrent + recurrent_bias, 3, axis=1)
    z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
    return [z * h + (1 - z) * np.tanh(x_h + r * h_h)]


def keras_gru_before(
    x: Array, states: list[Array], kernel: Array, recurrent: Array, bias: Array | float = 0.0
) -> list[Array]:
    """reset_after=False"""
    (h,) = states
    x_z, x_r, x_h = np.split(x @ kernel + bias, 3, axis=1)
    u_z, u_r, u_h = np.split(recurrent, 3, axis=1)
    z, r = sigmoid(x_z + h @ u_z), sigmoid(x_r + h @ u_r)
    return [z * h + (1 - z) * np.tanh(x_h + (r * h) @ u_h)]


def keras_simple_rnn(
    x: Array, states: list[Array], kernel: Array, recurrent: Array, bias: Array | float = 0.0
) -> list[Array]:
    return [np.tanh(x @ kernel + bias + states[0] @ recurrent)]


# ---- ONNX: W [G*H, I], R [G*H, H], B [2*G*H] ----


def onnx_lstm(x: Array, states: list[Array], W: Array, R: Array, B: Array, P: Array | None = None) -> list[Array]:
    h, c = states
    Pi, Po, Pf = np.split(np.zeros(3 * c.shape[1]) if P is None else P, 3)
    Wi, Wo, Wf, Wc = np.split(W, 4)
    Ri, Ro, Rf, Rc = np.split(R, 4)
    Wbi, Wbo, Wbf, Wbc, Rbi, Rbo, Rbf, Rbc = np.split(B, 8)
    i = sigmoid(x @ Wi.T + h @ Ri.T + Pi * c + Wbi + Rbi)
    f = sigmoid(x @ Wf.T + h @ Rf.T + Pf * c + Wbf + Rbf)
    c = f * c + i * np.tanh(x @ Wc.T + h @ Rc.T + Wbc + Rbc)
    o = sigmoid(x @ Wo.T + h @ Ro.T + Po * c + Wbo + Rbo)
    return [o * np.tanh(c), c]


def onnx_gru(x: Array, states: list[Array], W: Array, R: Array, B: Array) -> list[Array]:
    """linear_before_reset = 1"""
    (h,) = states
    Wz, Wr, Wh = np.split(W, 3)
    Rz, Rr, Rh = np.split(R, 3)
    Wbz, Wbr, Wbh, Rbz, Rbr, Rbh = np.split(B, 6)
    z = sigmoid(x @ Wz.T + h @ Rz.T + Rbz + Wbz)
    r = sigmoid(x @ Wr.T + h @ Rr.T + Rbr + Wbr)
    return [(1 - z) * np.tanh(x @ Wh.T + r * (h @ Rh.T + Rbh) + Wbh) + z * h]


def onnx_gru_before(x: Array, states: list[Array], W: Array, R: Array, B: Array) -> list[Array]:
    """linear_before_reset = 0"""
    (h,) = states
    Wz, Wr, Wh = np.split(W, 3)
    Rz, Rr, Rh = np.split(R, 3)
    Wbz, Wbr, Wbh, Rbz, Rbr, Rbh = np.split(B, 6)
    z = sigmoid(x @ Wz.T + h @ Rz.T + Rbz + Wbz)
    r = sigmoid(x @ Wr.T + h @ Rr.T + Rbr + Wbr)
    return [(1 - z) * np.tanh(x @ Wh.T + (r * h) @ Rh.T + Rbh + Wbh) + z * h]


def onnx_rnn(x: Array, states: list[Array], W: Array, R: Array, B: Array) -> list[Array]:
    Wb, Rb = np.split(B, 2)
    return [np.tanh(x @ W.T + states[0] @ R.T + Wb + Rb)]


def onnx_rnn_relu(x: Array, states: list[Array], W: Array, R: Array, B: Array) -> list[Array]:
    Wb, Rb = np.split(B, 2)
    return [relu(x @ W.T + states[0] @ R.T + Wb + Rb)]


# ---- both ----


def run(
    step: Callable[..., list[Array]],
    x: Array,
    states: list[Array],
    weights: list[Array],
    *,
    lengths: list[int] | None = None,
    reverse: bool = False,
) -> tuple[Array, list[Array]]:
    """x [T, B, I] -> output [T, B, H], 0 behind a row's length, and its states after its last step."""
    T, B, _ = x.shape
    rows, finals = [], []
    for b in range(B):
        state, steps = [s[b : b + 1] for s in states], range(T if lengths is None else lengths[b])
        row = np.zeros((T, states[0].shape[1]))
        for t in reversed(steps) if reverse else steps:
            state = step(x[t, b : b + 1], state, *weights)
            row[t] = state[0][0]
        rows.append(row)
        finals.append(state)
    return np.stack(rows, 1), [np.concatenate(each) for each in zip(*finals, strict=True)]
