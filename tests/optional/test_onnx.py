"""Weights from ONNX nodes and models made of modules, against ONNX Runtime's own output."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastrnn
from fastrnn.weights import Reversed

from ..helpers import build, make_state, tensors
from .packages import needs

onnx = needs("onnx")
ort = needs("onnxruntime")

T, B, I, H = 6, 3, 4, 5  # noqa: E741
KINDS = ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"]
KIND = pytest.mark.parametrize("kind", KINDS)


def run(model: Any, feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {k: v.numpy() for k, v in feeds.items()})]


def assert_near(actual: Any, expected: Any) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=0, atol=2e-6)


def node_model(
    kind: str, direction: str, *, lengths: bool, peepholes: bool = False, linear_before_reset: int = 1
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of one node with everything given, and what it is fed."""
    G, D = {"LSTM": 4, "GRU": 3}.get(kind, 1), 2 if direction == "bidirectional" else 1
    rng = np.random.default_rng(3)
    shapes = {"W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H), "initial_h": (D, B, H)}
    if kind == "LSTM":
        shapes["initial_c"] = (D, B, H)
    arrays: dict[str, Any] = {k: rng.normal(size=s).astype("float32") * 0.6 for k, s in shapes.items()}
    if peepholes:
        arrays["P"] = rng.normal(size=(D, 3 * H)).astype("float32")
    if lengths:
        arrays["sequence_lens"] = np.array([6, 2, 4], "int32")
    attributes: dict[str, Any] = {"hidden_size": H, "direction": direction}
    if kind == "GRU":
        attributes["linear_before_reset"] = linear_before_reset
    if kind == "RNN_RELU":
        attributes["activations"] = ["Relu"] * D
    names = ["X", *(k if k in arrays else "" for k in ("W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"))]
    outputs = ["Y", "Y_h", "Y_c"][: 3 if kind == "LSTM" else 2]
    op = onnx.helper.make_node(kind.partition("_")[0], [*names][: 8 if kind == "LSTM" else 6], outputs, **attributes)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [op], "one", [info("X", 1, [T, B, I])], [info(name, 1, None) for name in outputs],
        [onnx.numpy_helper.from_array(v, k) for k, v in arrays.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    return model, {"X": torch.from_numpy(rng.normal(size=(T, B, I)).astype("float32"))}


@KIND
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("peepholes", [True, False])
def test_from_onnx(kind: str, direction: str, lengths: bool, peepholes: bool) -> None:
    if peepholes and kind != "LSTM":
        pytest.skip("peepholes are an LSTM's")
    model, feeds = node_model(kind, direction, lengths=lengths, peepholes=peepholes)
    Y, *states = run(model, feeds)
    initializers = {x.name: x for x in model.graph.initializer}
    module, hx, steps = fastrnn.from_onnx(model.graph.node[0], initializers)
    output, finals = module(feeds["X"], hx, lengths=steps)
    assert_near([output, *tensors(finals)], [Y.transpose(1, 2).flatten(2), *states])


@KIND
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 3}, {"num_layers": 2, "bias": False}])
@pytest.mark.parametrize("given", ["", "lengths", "states", "both"])
def test_to_onnx(kind: str, batch_first: bool, options: dict[str, Any], given: str) -> None:
    module = build(fastrnn, kind, I, H, batch_first=batch_first, **options)
    check_model(module, kind, given in ("states", "both"), given in ("lengths", "both"))
    check_model(fastrnn.to_torch(module), kind, given in ("states", "both"), False)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
@pytest.mark.parametrize("given", ["", "both"])
def test_to_onnx_with_peepholes(options: dict[str, Any], given: str) -> None:
    module = fastrnn.LSTM(I, H, peephole=True, **options)
    check_model(module, "LSTM", given == "both", given == "both")
    model = fastrnn.to_onnx(module)
    initializers = {x.name: x for x in model.graph.initializer}
    back = [fastrnn.from_onnx(n, initializers).module for n in model.graph.node if n.op_type == "LSTM"]
    assert all(torch.equal(m.weight_ch_l0, getattr(module, f"weight_ch_l{k}")) for k, m in enumerate(back))


@KIND
def test_to_onnx_with_heads(kind: str) -> None:
    check_model(build(fastrnn, kind, I, H, num_layers=2, bidirectional=True, num_heads=H), kind, True, True)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("lengths", [True, False])
def test_from_onnx_with_the_reset_before_the_product(direction: str, lengths: bool) -> None:
    model, feeds = node_model("GRU", direction, lengths=lengths, linear_before_reset=0)
    Y, *states = run(model, feeds)
    initializers = {x.name: x for x in model.graph.initializer}
    module, hx, steps = fastrnn.from_onnx(model.graph.node[0], initializers)
    output, finals = module(feeds["X"], hx, lengths=steps)
    assert_near([output, *tensors(finals)], [Y.transpose(1, 2).flatten(2), *states])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}])
@pytest.mark.parametrize("given", ["", "both"])
def test_to_onnx_with_the_reset_before_the_product(options: dict[str, Any], given: str) -> None:
    check_model(fastrnn.GRU(I, H, reset_after=False, **options), "GRU", given == "both", given == "both")


def check_model(module: nn.Module, kind: str, states: bool, lengths: bool) -> None:
    inner: Any = module.module if isinstance(module, Reversed) else module
    model = fastrnn.to_onnx(module, states=states, lengths=lengths)
    for steps, batch in ((T, B), (1, 4)):  # T and B are free
        x = torch.randn((batch, steps, I) if inner.batch_first else (steps, batch, I))
        feeds, hx, options = {"input": x}, None, {}
        if states:
            count = inner.num_layers * (1 + inner.bidirectional)
            hx = make_state(kind, count, batch, hidden=H, dtype=torch.float32)
            feeds.update(zip(("h_0", "c_0"), tensors(hx), strict=False))
        if lengths:
            options["lengths"] = torch.arange(batch).remainder(steps) + 1
            feeds["lengths"] = options["lengths"].to(torch.int32)
        output, finals = module(x, hx, **options)
        assert_near([output, *tensors(finals)], run(model, feeds))


@KIND
@pytest.mark.parametrize("lengths", [True, False])
def test_reverse_there_and_back(kind: str, lengths: bool) -> None:
    module = Reversed(build(fastrnn, kind, I, H))
    check_model(module, kind, True, lengths)
    model = fastrnn.to_onnx(module)
    op = next(n for n in model.graph.node if n.op_type in ("LSTM", "GRU", "RNN"))
    twin = fastrnn.from_onnx(op, {x.name: x for x in model.graph.initializer}).module
    for a, b in zip(twin.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_to_onnx_refuses() -> None:
    for module, error, message in (
        (fastrnn.LSTMCell(I, H), TypeError, "ONNX has no cells"),
        (nn.Linear(I, H), TypeError, "module: expected an LSTM"),
        (fastrnn.LSTM(I, H, proj_size=2), ValueError, "proj_size=0, got 2"),
        (
            fastrnn.LSTM(I, H, dtype=torch.bfloat16),
            TypeError,
            "expected float32, float64 or float16, got torch.bfloat16",
        ),
        (fastrnn.quantize(fastrnn.LSTM(I, H)), TypeError, "got fastrnn.quantized.QuantizedLSTM"),
        (fastrnn.LiGRU(I, H), TypeError, "got fastrnn.modules.LiGRU"),
        (Reversed(fastrnn.MGU(I, H)), TypeError, "got fastrnn.modules.MGU"),
        (fastrnn.SLSTM(I, H, num_heads=H), TypeError, "got fastrnn.slstm.SLSTM"),
        (fastrnn.LSTM(I, H, layer_norm=True), ValueError, "but it has layer_norm=True"),
        (fastrnn.GRU(I, H, zoneout=0.1), ValueError, "but it has zoneout=0.1"),
        (fastrnn.RNN(I, H, 2, residual=True), ValueError, "but it has residual=True"),
        (fastrnn.LSTM(I, H, 2, return_all_layers=True), ValueError, "but it has return_all_layers=True"),
    ):
        with pytest.raises(error, match=message):
            fastrnn.to_onnx(module)


@KIND
def test_torch_exports_the_twin(kind: str) -> None:
    """torch.onnx.export knows torch.nn's modules: to_torch makes a model of ours one of those."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = build(fastrnn, kind, I, H, 2, bidirectional=True)
            self.head = nn.Linear(2 * H, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0])

    model, x, buffer = Model().eval(), torch.randn(T, B, I), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = fastrnn.to_torch(copy.deepcopy(model))
        torch.onnx.export(twin, (x,), buffer, input_names=["x"], dynamo=False)
    exported = onnx.load_from_string(buffer.getvalue())
    assert kind.partition("_")[0] in {n.op_type for n in exported.graph.node}
    assert_near([model(x)], run(exported, {"x": x}))
