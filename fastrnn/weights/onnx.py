"""Recurrent nodes of ONNX (operators LSTM, GRU and RNN of domain ai.onnx; onnx.ai/onnx/operators).

Inputs of a node: X, W [D, G*H, I], R [D, G*H, H], B [D, 2*G*H] (of W, then of R), sequence_lens [B], initial_h
[D, B, H], and for an LSTM initial_c and P (peepholes). Its gates are i o f c and z r h, where torch has i f g o and
r z n.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import heads, modules
from ..checks import are_tokens, given_lengths
from ..records import LayerWeights
from .parameters import (
    Cell,
    Module,
    check_module,
    check_rank,
    copy_into,
    directions,
    gates,
    reordered,
    restored,
    tensor,
)

ORDERS: dict[Cell, tuple[int, ...]] = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_DIRECTIONS = ("forward", "reverse", "bidirectional")
_PEEPHOLES = (0, 2, 1)  # ONNX' are i o f, ours i f o


def peepholes_of_onnx(params: Tensor) -> Tensor:
    """A direction's P [3*H] from ours [3, H]."""
    return params[list(_PEEPHOLES)].flatten()


class Reversed(nn.Module):
    """A module of one direction that runs from the last step to the first: ONNX' direction "reverse".

    Args:
        module: LSTM, GRU or RNN of one direction.

    Called like it, with a tensor; ``output`` stands at the time of its input, and h_n (c_n) is the state after the
    first step. With ``lengths`` a row begins at its last valid step.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        if not isinstance(module, nn.RNNBase) or module.bidirectional:
            raise TypeError(f"module: expected an LSTM, GRU or RNN of one direction, got {module!r}")
        self.module = module

    def forward(self, input: Tensor, hx: Any = None, *, lengths: Tensor | None = None) -> tuple[Any, ...]:
        """input and hx as of the module; lengths integer [B] or None. Returns what the module returns."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
        tokens = getattr(self.module, "token_input", False) and are_tokens(input)
        batched = input.dim() + tokens == 3
        time = 1 if self.module.batch_first and batched else 0
        if lengths is None:
            output, finals, *cells = self.module(input.flip(time), hx)
        elif not batched:
            raise ValueError("lengths: expected None with unbatched input, got a tensor")
        else:
            lengths = given_lengths(lengths, input.transpose(0, time))
            output, finals, *cells = self.module(_flipped(input, lengths, time), hx, lengths=lengths)

        def back(x: Any) -> Any:  # a tuple: of all layers' outputs, or of all of an SLSTM's states
            if isinstance(x, tuple):
                return tuple(map(back, x))
            return x.flip(time) if lengths is None else _flipped(x, lengths, time)

        return back(output), finals, *map(back, cells)


def _flipped(x: Tensor, lengths: Tensor, time: int) -> Tensor:
    """The valid steps of each row in the other order; x [T, B, ...], or [B, T, ...] for time=1."""
    t, last = torch.arange(x.shape[time], device=x.device), lengths[:, None] - 1
    source = torch.where(t <= last, last - t, t).clamp(max=x.shape[time] - 1)  # [B, T]; the module refuses longer ones
    source = (source if time else source.t()).reshape(*x.shape[:2], *(1 for _ in x.shape[2:]))
    return x.gather(time, source.expand_as(x))


class OnnxLayer(NamedTuple):
    """What :func:`fastrnn.from_onnx` makes of a node: call ``module(X, hx, lengths=lengths)``."""

    module: Module | Reversed  #: of the node's weights
    hx: Any  #: (h_0, c_0) or h_0, [D, B, H] each; None where the initialisers have none
    lengths: Tensor | None  #: [B]


def from_onnx(node: Any, initializers: Mapping[str, Any]) -> OnnxLayer:
    """A module with the weights and sizes of an ONNX node LSTM, GRU or RNN.

    Args:
        node: an ``onnx.NodeProto``. onnx itself is not imported.
        initializers: by name, the graph's initialisers, ``{x.name: x for x in model.graph.initializer}``, or arrays in
            their place. W, R and, if the node has it, B must be among them.

    Returns:
        ``module``, a new :class:`fastrnn.LSTM`, ``GRU`` or ``RNN`` of one layer on the CPU in the dtype of W, with
        ``batch_first`` where the node's layout is 1; inside a :class:`fastrnn.weights.Reversed` where its direction is
        "reverse". ``hx`` and ``lengths``, initial states and sequence_lens, where they are initialisers; where they are
        computed by the graph, they are the caller's to pass. ``module``'s output is [T, B, D*H], that of the node
        [T, D, B, H].

    Raises:
        TypeError: another operator.
        ValueError: an initialiser is not there, has another shape or is no array of numbers; what the equations of
            torch's modules lack: other than the default activations (Relu for an RNN), ``input_forget``, ``clip``.
    """
    kind = getattr(node, "op_type", type(node).__name__)
    if kind not in ORDERS or node.domain not in ("", "ai.onnx"):
        raise TypeError(f"node: expected an LSTM, GRU or RNN of domain ai.onnx, got {kind}")
    attributes = {a.name: a for a in node.attribute}

    def integer(name: str) -> int:
        return attributes[name].i if name in attributes else 0

    direction = attributes["direction"].s.decode() if "direction" in attributes else "forward"
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(_DIRECTIONS)}, got {direction}")
    if integer("input_forget"):
        raise ValueError("input_forget: expected 0, got 1")
    if "clip" in attributes:
        raise ValueError(f"clip: expected none, got {attributes['clip'].f}")
    D = 2 if direction == "bidirectional" else 1
    nonlinearity = _nonlinearity(kind, D, attributes)
    inputs = dict(zip(_INPUTS, node.input, strict=False))

    def given(name: str) -> Tensor | None:
        x = initializers.get(inputs.get(name, ""))
        return None if x is None else tensor(name, _array(x))

    W, R, B, P = (given(name) for name in "WRBP")
    for name, x in (("W", W), ("R", R), ("B", B), ("P", P)):
        if x is None and (name in "WR" or inputs.get(name)):
            raise ValueError(f"{name}: expected {inputs.get(name, '')!r} to be among the initialisers")
    assert W is not None
    assert R is not None
    check_rank("W", W, "[D, gates * H, I]")
    check_rank("R", R, "[D, gates * H, H]")
    if integer("layout") not in (0, 1):
        raise ValueError(f"layout: expected 0 or 1, got {integer('layout')}")
    G, H = gates(kind), R.shape[-1]
    if "hidden_size" in attributes and integer("hidden_size") != H:
        raise ValueError(f"R: expected hidden_size {integer('hidden_size')} for its last dimension, got {H}")
    shapes = {"W": (D, G * H, W.shape[-1]), "R": (D, G * H, H), "B": (D, 2 * G * H), "P": (D, 3 * H)}
    for name, x in (("W", W), ("R", R), ("B", B), ("P", P)):
        if x is not None and tuple(x.shape) != shapes[name]:
            raise ValueError(f"{name}: expected {list(shapes[name])}, got {list(x.shape)}")
    options: dict[str, Any] = {"nonlinearity": nonlinearity} if kind == "RNN" else {}
    if P is not None:
        options["peephole"] = True
    if kind == "GRU" and not integer("linear_before_reset"):
        options["reset_after"] = False
    module: Any = getattr(modules, kind)(
        W.shape[-1],
        H,
        bias=B is not None,
        batch_first=integer("layout") == 1,
        bidirectional=D == 2,
        dtype=W.dtype,
        **options,
    )
    order, weights = ORDERS[kind], []
    for d in range(D):
        parts = [W[d], R[d]] if B is None else [W[d], R[d], *B[d].chunk(2)]
        of_direction = LayerWeights(*(restored(x, order) for x in parts))
        weights.append(of_direction if P is None else of_direction._replace(params=P[d].view(3, H)[list(_PEEPHOLES)]))
    copy_into(module, [weights])
    names = [name for name in ("initial_h", "initial_c")[: 2 if kind == "LSTM" else 1] if inputs.get(name)]
    states = {name: x for name in names if (x := given(name)) is not None}
    if states and len(states) < len(names):
        raise ValueError(f"{names}: expected all of them or none to be among the initialisers, got {list(states)}")
    for name, x in states.items():
        check_rank(name, x, "[D, B, H]")
    lengths = given("sequence_lens")
    if lengths is not None and (lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype is torch.bool):
        raise ValueError(f"sequence_lens: expected integers [B], got {lengths.dtype} {list(lengths.shape)}")
    hx: Any = None
    if states:
        zeros = torch.zeros_like(next(iter(states.values())))
        h, c = (states.get(name, zeros) for name in ("initial_h", "initial_c"))
        if module.batch_first:  # ONNX' states are then, too
            h, c = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        hx = (h, c) if kind == "LSTM" else h
    return OnnxLayer(Reversed(module) if direction == "reverse" else module, hx, lengths)


def to_onnx(module: Module | Reversed, *, states: bool = False, lengths: bool = False) -> Any:
    """An ``onnx.ModelProto`` (opset 14) that computes what a module computes in eval mode; T and B stay free.

    Args:
        module: LSTM, GRU or RNN, fastrnn's or torch.nn's, or a :class:`fastrnn.weights.Reversed` of one; float32,
            float64 or float16.
        states: the model has inputs ``h_0`` (and ``c_0``), [L*D, B, H]; zeros otherwise.
        lengths: the model has an input ``lengths``, int32 [B]. For a row of length 0 ONNX Runtime 1.31 gives final
            states of 0, where the module gives the initial ones.

    Returns:
        A model with the input ``input`` and the outputs ``output``, ``h_n`` (and ``c_n``), laid out as the module's,
        one node a layer. Needs the package onnx.

    Raises:
        ImportError: there is no onnx.
        TypeError: ``module`` is none of these, or its dtype.
        ValueError: a ``proj_size`` or another option that ONNX' operators lack.
    """
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise ImportError("to_onnx needs the package onnx (pip install onnx)") from error
    inner: Any = module.module if isinstance(module, Reversed) else module
    kind = check_module("module", inner, may_have=("peephole", "num_heads", "reset_after"))
    if not isinstance(inner, nn.RNNBase):
        raise TypeError(f"module: expected an LSTM, GRU or RNN, got {type(inner).__name__}: ONNX has no cells")
    types = {torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE, torch.float16: TensorProto.FLOAT16}
    layers = list(directions(inner))
    if getattr(inner, "num_heads", 1) > 1:
        layers = [list(map(heads.dense, layer)) for layer in layers]
    dtype = layers[0][0].weight_ih.dtype
    if dtype not in types:
        raise TypeError(f"module: expected float32, float64 or float16, got {dtype}")
    L, D, H = inner.num_layers, 2 if inner.bidirectional else 1, inner.hidden_size
    order = ORDERS[kind]
    direction = "bidirectional" if D == 2 else "reverse" if isinstance(module, Reversed) else "forward"
    attributes: dict[str, Any] = {"hidden_size": H, "direction": direction}
    if kind == "GRU":
        attributes["linear_before_reset"] = int(getattr(inner, "reset_after", True))
    if inner.mode == "RNN_RELU":
        attributes["activations"] = ["Relu"] * D
    nodes: list[Any] = []
    initializers: list[Any] = []

    def constant(name: str, x: Tensor) -> str:
        initializers.append(numpy_helper.from_array(x.cpu().contiguous().numpy(), name))
        return name

    def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    letters = ("h", "c")[: 2 if kind == "LSTM" else 1]
    starts = {x: [f"{x}_0" if states else ""] * L for x in letters}
    if states and L > 1:
        sizes = constant("state_sizes", torch.full((L,), D))
        for x in letters:
            starts[x] = [f"{x}_0_l{k}" for k in range(L)]
            node("Split", [f"{x}_0", sizes], starts[x], axis=0)
    value = node("Transpose", ["input"], ["input_steps"], perm=[1, 0, 2]) if inner.batch_first else "input"
    merged = constant("merged", torch.tensor([0, 0, D * H]))
    for k, layer in enumerate(layers):
        W, R = (
            constant(f"{name}_l{k}", torch.stack([reordered(w[i], order) for w in layer]))  # type: ignore[arg-type]
            for i, name in enumerate(("W", "R"))
        )
        B = ""
        if inner.bias:
            halves = [torch.cat([reordered(x, order) for x in (w.bias_ih, w.bias_hh) if x is not None]) for w in layer]
            B = constant(f"B_l{k}", torch.stack(halves))
        inputs = [value, W, R, B, "lengths" if lengths else "", *(starts[x][k] for x in letters)]
        if layer[0].params is not None:
            of_directions = [peepholes_of_onnx(w.params) for w in layer if w.params is not None]
            inputs.append(constant(f"P_l{k}", torch.stack(of_directions)))
        node(kind, inputs, [f"Y_l{k}", *(f"{x}_n_l{k}" for x in letters)], **attributes)
        value = node("Transpose", [f"Y_l{k}"], [f"Y_rows_l{k}"], perm=[0, 2, 1, 3])  # [T, B, D, H]
        value = node("Reshape", [value, merged], [f"output_l{k}"])
    if inner.batch_first:
        node("Transpose", [value], ["output"], perm=[1, 0, 2])
    else:
        node("Identity", [value], ["output"])
    for x in letters:
        node("Concat", [f"{x}_n_l{k}" for k in range(L)], [f"{x}_n"], axis=0)

    def info(name: str, type: int, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, type, shape)

    sequence = ["B", "T"] if inner.batch_first else ["T", "B"]
    given = [info("input", types[dtype], [*sequence, inner.input_size])]
    if lengths:
        given.append(info("lengths", TensorProto.INT32, ["B"]))
    if states:
        given += [info(f"{x}_0", types[dtype], [L * D, "B", H]) for x in letters]
    results = [info("output", types[dtype], [*sequence, D * H])]
    results += [info(f"{x}_n", types[dtype], [L * D, "B", H]) for x in letters]
    graph = helper.make_graph(nodes, kind, given, results, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _nonlinearity(kind: Cell, D: int, attributes: Mapping[str, Any]) -> str:
    expected = _ACTIVATIONS[kind] * D
    found = [s.decode() for s in attributes["activations"].strings] if "activations" in attributes else expected
    if kind == "RNN" and [s.lower() for s in found] == ["relu"] * D:
        return "relu"
    if [s.lower() for s in found] != [s.lower() for s in expected]:
        wanted = f"{expected} or {['Relu'] * D}" if kind == "RNN" else str(expected)
        raise ValueError(f"activations: expected {wanted}, got {found}")
    return "tanh"


def _array(x: Any) -> Any:
    """Of a TensorProto; anything else is one already."""
    if hasattr(x, "raw_data"):
        from onnx import numpy_helper

        return numpy_helper.to_array(x)
    return x
