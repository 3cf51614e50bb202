"""A case as an ONNX model: one LSTM, GRU or RNN node on torch.nn's weights. For ONNX Runtime and OpenVINO."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.data import Data

OPSET, IR_VERSION = 17, 8  # old enough for every runtime that is still installed somewhere
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}  # ONNX has i o f c and z r h; torch i f g o and r z n


def reordered(values: np.ndarray, cell: str) -> np.ndarray:
    """Gate blocks along the first axis, from torch's order to ONNX's."""
    blocks = np.split(values, len(GATES[cell]))
    return np.concatenate([blocks[gate] for gate in GATES[cell]])


def state_names(cell: str) -> list[str]:
    return ["h", "c"] if cell == "LSTM" else ["h"]


def inputs(case: Case, data: Data) -> dict[str, np.ndarray]:
    """X [T, B, I] and, where the case passes states, initial_h (and initial_c) [1, B, H]."""
    arrays = {"X": data.input.numpy()}
    if data.state is not None:
        arrays |= {f"initial_{name}": s.numpy() for name, s in zip(state_names(case.cell), data.state, strict=True)}
    return arrays


def build(case: Case, data: Data) -> Any:
    """Inputs as in `inputs`; outputs Y [T, 1, B, H], Y_h and (LSTM) Y_c [1, B, H]. Shapes are fixed."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = {name: value.numpy() for name, value in data.weights.items()}
    bias = np.concatenate([reordered(weights[f"bias_{side}_l0"], case.cell) for side in ("ih", "hh")])
    constants = {
        "W": reordered(weights["weight_ih_l0"], case.cell)[None],  # [1, G*H, I]
        "R": reordered(weights["weight_hh_l0"], case.cell)[None],  # [1, G*H, H]
        "B": bias[None],  # [1, 2*G*H]
    }
    given = inputs(case, data)
    states = [name if name in given else "" for name in ("initial_h", "initial_c")]
    names = ["Y", *(f"Y_{name}" for name in state_names(case.cell))]
    attributes: dict[str, Any] = {"hidden_size": case.H}
    if case.cell == "GRU":
        attributes["linear_before_reset"] = 1  # torch's GRU: the reset gate multiplies W_hn h + b_hn
    if case.nonlinearity == "relu":
        attributes["activations"] = ["Relu"]
    operands = ["X", "W", "R", "B", "", *states]
    while not operands[-1]:
        operands.pop()
    node = helper.make_node(case.cell, operands, names, **attributes)
    shapes = {"Y": [case.T, 1, case.B, case.H]} | {name: [1, case.B, case.H] for name in names[1:]}
    graph = helper.make_graph(
        [node],
        case.name,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in given.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model
