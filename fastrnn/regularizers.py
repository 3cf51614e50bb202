"""What is drawn anew for each call of a module in training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import per_sample
from .masks import draw
from .packing import layout_of
from .records import LayerWeights, rows_of


def with_weight_dropout(weights: LayerWeights, p: float) -> LayerWeights:
    """The weights of one direction with DropConnect on weight_hh (Merity et al. 2017, the AWD-LSTM).

    The mask is multiplied in as any other op would be, so that every derivative of the weight knows of it.
    """
    w = weights.weight_hh
    mask = draw(w.shape, 1 - p, w.dtype, w.device) * (1 / (1 - p) if p < 1 else 0)
    return weights._replace(weight_hh=per_sample.masked(w, mask))


def between_layers(
    output: Tensor,
    dropout: float,
    locked_dropout: float,
    batch_sizes: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """What the next layer is given of an output [T, B, n], or with batch_sizes or offsets [N, n], in training.

    dropout: of every number by itself, as torch.nn has it. locked_dropout: with one mask for all steps of a row.
    """
    if dropout > 0:
        output = F.dropout(output, dropout, training=True)
    if locked_dropout > 0:
        rows = rows_of(output, batch_sizes, offsets)
        mask = F.dropout(output.new_ones(rows, output.shape[-1]), locked_dropout, training=True)
        layout = layout_of(batch_sizes, offsets)
        output = output * (mask if layout is None else layout.of_rows(mask))
    return output
