"""A layer as one node of ONNX, for ``torch.onnx.export(model, dynamo=True)``: LSTM, GRU or RNN, with any T and B.

torch's own exporter has such a node for an LSTM and a GRU of fixed T alone. See ``weights/onnx.py`` for the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import CELLS

if TYPE_CHECKING:
    from .records import LayerWeights

_DTYPES = (torch.float32, torch.float64, torch.float16)


def has_nodes(cell: str, weights: Sequence[Sequence[LayerWeights]]) -> bool:
    """Are there operators for such a network? None has a projection or layer normalization, or is another unit."""
    first, has_operator = weights[0][0], cell.startswith(("lstm", "gru", "rnn")) and not cell.endswith("_norm")
    return has_operator and first.weight_hr is None and first.weight_hh.dtype in _DTYPES


def of_gates(gates: Tensor, weights: Sequence[LayerWeights]) -> tuple[Tensor, list[LayerWeights]]:
    """The layer whose input is W_ih x itself, of all directions: [T, B, D*G*H]."""
    eye = torch.eye(gates.shape[2], dtype=gates.dtype, device=gates.device)
    return gates, [w._replace(weight_ih=part) for w, part in zip(weights, eye.chunk(len(weights)), strict=True)]


def layer(
    cell: str,
    input: Tensor,
    weights: Sequence[LayerWeights],
    states: Sequence[Tensor] | None,
    lengths: Tensor | None,
) -> tuple[Tensor, ...]:
    """input [T, B, I] or tokens [T, B], one or two directions, states [D, B, H] (None: 0), lengths [B].

    Returns output [T, B, D*H] and the final states [D, B, H].
    """
    if input.dim() == 2:
        input, weights = of_gates(F.embedding(input, torch.cat([w.weight_ih for w in weights]).t()), weights)
    from .weights.onnx import ORDERS, peepholes_of_onnx
    from .weights.parameters import reordered

    kind = cell.partition("_")[0].upper()
    T, B, _ = input.shape
    D, H, count = len(weights), weights[0].weight_hh.shape[1], CELLS[cell].states

    def stacked(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([reordered(x, ORDERS[kind]) for x in parts])

    bias = None
    if any(b is not None for w in weights for b in (w.bias_ih, w.bias_hh)):
        halves = ([w.weight_hh.new_zeros(len(w.weight_hh)) if b is None else b for b in w[2:4]] for w in weights)
        bias = torch.cat([stacked(half) for half in zip(*halves, strict=True)], 1)
    attributes: dict[str, Any] = {"hidden_size": H}
    attributes["direction"] = "bidirectional" if D == 2 else "forward"
    if kind == "GRU":
        attributes["linear_before_reset"] = int(cell == "gru")
    if cell == "rnn_relu":
        attributes["activations"] = ["Relu"] * D
    peepholes = []
    if weights[0].params is not None:
        peepholes = [torch.stack([peepholes_of_onnx(w.params) for w in weights if w.params is not None])]
    matrices = [stacked([w.weight_ih for w in weights]), stacked([w.weight_hh for w in weights])]
    steps = None if lengths is None else lengths.to(torch.int32)
    start: Sequence[Tensor | None] = states or [None] * count
    results = torch.onnx.ops.symbolic_multi_out(
        kind,
        [input, *matrices, bias, steps, *start, *peepholes],
        attributes,
        dtypes=[input.dtype] * (1 + count),
        shapes=[(T, D, B, H), *([(D, B, H)] * count)],
    )
    output, *finals = (x.to(input.device) for x in results)  # for torch makes them on the CPU
    return output.transpose(1, 2).flatten(2), *finals
