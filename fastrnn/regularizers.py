"""What is drawn anew for each call of a module in training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import per_sample
from .masks import draw
from .packing import packed_layout
from .records import LayerWeights


def with_weight_dropout(weights: LayerWeights, p: float) -> LayerWeights:
    """The weights of one direction with DropConnect on weight_hh (Merity et al. 2017, the AWD-LSTM).

    The mask is multiplied in as any other op would be, so that every derivative of the weight knows of it.
    """
    w = weights.weight_hh
    mask = draw(w.shape, 1 - p, w.dtype, w.device) * (1 / (1 - p) if p < 1 else 0)
    return weights._replace(weight_hh=per_sample.masked(w, mask))


def between_layers(output: Tensor, dropout: float, locked_dropout: float, batch_sizes: Tensor | None = None) -> Tensor:
    """What the next layer is given of an output [T, B, n], or with batch_sizes packed [N, n], in training.

    dropout: of every number by itself, as torch.nn has it. locked_dropout: with one mask for all steps of a row.
    """
    if dropout > 0:
        output = F.dropout(output, dropout, training=True)
    if locked_dropout > 0:
        rows = output.shape[1] if batch_sizes is None else int(batch_sizes[0])
        mask = F.dropout(output.new_ones(rows, output.shape[-1]), locked_dropout, training=True)
        if batch_sizes is not None:
            _, places = packed_layout(batch_sizes)
            mask = mask.index_select(0, (places % rows).to(output.device))
        output = output * mask
    return output
