"""torch.onnx.export of models that hold our modules, by either exporter, against ONNX Runtime's output; and the graph
of TensorBoard, which is made of a trace."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn

from ..helpers import CELL_KINDS, KINDS, build, make_state, randn
from .packages import needs

onnx = needs("onnx")
ort = needs("onnxruntime")
needs("onnxscript")

T, B, I, H = 5, 2, 3, 4  # noqa: E741
FREE = torch.export.Dim.DYNAMIC
KIND = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore")
OTHER_SIZES = ((T, B), (7, 3), (1, 1))
Inputs = Callable[[int, int], tuple[Any, ...]]


class Model(nn.Module):
    """A layer inside of a model, all its results as outputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.rnn = module

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None, resets: Tensor | None = None) -> Any:
        options = {"lengths": lengths, "resets": resets}
        results = self.rnn(x, hx, **{name: y for name, y in options.items() if y is not None})
        return tuple(torch.utils._pytree.tree_leaves(results))


def single(*sizes: int) -> Tensor:
    return randn(*sizes, dtype=torch.float32)


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def check(model: Any, module: nn.Module, inputs: Inputs, sizes: Any = OTHER_SIZES) -> None:
    """The ONNX model gives what the module gives."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for each in sizes:
        given = inputs(*each)
        feeds = [x.numpy() for x in torch.utils._pytree.tree_leaves(given) if x is not None]
        found = session.run(None, dict(zip([x.name for x in session.get_inputs()], feeds, strict=True)))
        expected = torch.utils._pytree.tree_leaves(module(*given))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b.detach(), rtol=0, atol=2e-6)


def exported(module: nn.Module, given: tuple[Any, ...], free: Any = None) -> Any:
    return torch.onnx.export(module, given, dynamo=True, dynamic_shapes=free, verbose=False).model_proto


def exported_by_trace(module: nn.Module, given: tuple[Any, ...], batch_first: bool = False) -> Any:
    buffer = io.BytesIO()
    axes = {0: "B", 1: "T"} if batch_first else {0: "T", 1: "B"}
    torch.onnx.export(module, given, buffer, dynamo=False, input_names=["x"], dynamic_axes={"x": axes})
    return onnx.load_from_string(buffer.getvalue())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"num_layers": 2, "dropout": 0.5},
    {"num_layers": 2, "residual": True, "return_all_layers": True, "weight_dropout": 0.5, "locked_dropout": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS)
@KIND
def test_layers(kind: str, options: dict[str, Any]) -> None:
    """One node a layer, of any T and B."""
    model = Model(build(fastrnn, kind, I, H, **options)).eval()

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        return (single(*((B, T) if options.get("batch_first") else (T, B)), I),)

    name, layers = kind.partition("_")[0], options.get("num_layers", 1)
    free = ({0: FREE, 1: FREE},)
    for found in (
        exported(model, inputs(T, B), free),
        exported_by_trace(model, inputs(T, B), bool(options.get("batch_first"))),
    ):
        assert operators(found).count(name) == layers
        check(found, model, inputs)
    static = exported(model, inputs(T, B))
    assert operators(static).count(name) == layers
    check(static, model, inputs, [(T, B)])


@pytest.mark.parametrize("given", ["states", "lengths", "tokens", "learned", "peephole", "heads", "reset_after"])
@KIND
def test_what_onnx_has(kind: str, given: str) -> None:
    """States, lengths, tokens and options that change no product."""
    if given == "peephole" and kind != "LSTM":
        pytest.skip("peepholes are an LSTM's")
    if given == "reset_after" and kind != "GRU":
        pytest.skip("the reset gate is a GRU's")
    learned = given == "learned"
    options = {"learn_initial_state": True, "state_batch_first": True, "grad_clip": 0.5} if learned else {}
    if given == "tokens":
        options = {"token_input": True}
    if given == "peephole":
        options = {"peephole": True}
    if given == "heads":
        options = {"num_heads": H}
    if given == "reset_after":
        options = {"reset_after": False}
    model = Model(build(fastrnn, kind, I, H, 2, bidirectional=True, **options)).eval()
    if learned:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(single(*p.shape) * 0.3)

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        if given == "states":
            return single(T, B, I), make_state(kind, 4, B, hidden=H, dtype=torch.float32)
        if given == "lengths":
            return single(T, B, I), None, torch.arange(B) % T + 1
        return (torch.arange(T * B).reshape(T, B) % I,) if given == "tokens" else (single(T, B, I),)

    state = {1: FREE}
    free = {
        "states": ({0: FREE, 1: FREE}, (state, state) if kind == "LSTM" else state),
        "lengths": ({0: FREE, 1: FREE}, None, {0: FREE}),
    }.get(given, ({0: FREE, 1: FREE},))
    found = exported(model, inputs(T, B), free)
    assert operators(found).count(kind.partition("_")[0]) == 2
    check(found, model, inputs)


@pytest.mark.parametrize("given", ["resets", "proj_size", "return_all_states"])
def test_what_onnx_lacks(given: str) -> None:
    """A loop over the steps, right for this T."""
    options: dict[str, Any] = {"proj_size": 2} if given == "proj_size" else {}
    if given == "return_all_states":
        options["return_all_states"] = True
    model = Model(fastrnn.LSTM(I, H, 2, bidirectional=True, **options)).eval()

    def inputs(T: int, B: int) -> tuple[Any, ...]:
        x = single(T, B, I)
        return (x, None, None, x[..., 0] > 0.3) if given == "resets" else (x,)

    with pytest.warns(UserWarning, match="a loop over a fixed number of steps is recorded"):
        found = exported(model, inputs(T, B))
    assert "LSTM" not in operators(found)
    check(found, model, inputs, [(T, B)])


UNITS = [
    ("LiGRU", {"num_layers": 2}),
    ("MGU", {"bidirectional": True}),
    ("SLSTM", {"num_heads": 2}),
    ("LSTM", {"layer_norm": True}),
    ("GRU", {"layer_norm": True}),
    ("LSTM", {"zoneout": 0.2}),
    ("GRU", {"num_heads": 2, "num_layers": 2}),
]


@pytest.mark.parametrize(("kind", "options"), UNITS, ids=str)
def test_what_onnx_lacks_and_heads(kind: str, options: dict[str, Any]) -> None:
    """Units without an operator are a loop, too, and heads a dense product, by either exporter."""
    model = Model(getattr(fastrnn, kind)(I, H, **options)).eval()
    given = (single(2, B, I),)
    for found in (exported(model, given), exported_by_trace(model, given)):
        check(found, model, lambda T, B: (single(T, B, I),), [(2, B)])


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_cells(kind: str) -> None:
    model = build(fastrnn, kind, I, H)
    found = exported(model, (single(B, I),), ({0: FREE},))
    check(found, model, lambda T, B: (single(B, I),))
    check(exported_by_trace(model, (single(B, I),)), model, lambda T, B: (single(B, I),), [(T, B)])


def test_export_alone_keeps_our_ops() -> None:
    model = Model(fastrnn.GRU(I, H))
    torch.onnx.export(model, (single(T, B, I),), dynamo=True, verbose=False)
    program = torch.export.export(model, (single(T, B, I),))
    assert "fastrnn.layer_forward" in str(program.graph)


def test_a_quantized_module_says_what_to_do() -> None:
    model = Model(fastrnn.quantize(fastrnn.GRU(I, H)))
    with pytest.raises(RuntimeError, match=r"export the model that fastrnn\.quantize was given"):
        exported_by_trace(model, (single(T, B, I),))


@KIND
def test_tensorboard_graph(kind: str) -> None:
    needs("tensorboard")
    graph = needs("torch.utils.tensorboard._pytorch_graph").graph
    found, _ = graph(Model(build(fastrnn, kind, I, H)), (single(T, B, I),))
    assert f"aten::{kind.lower()}" in {node.op for node in found.node}
