"""What is drawn anew for each call of a module in training."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import per_sample
from .records import LayerWeights


def with_weight_dropout(weights: LayerWeights, p: float) -> LayerWeights:
    """The weights of one direction with DropConnect on weight_hh (Merity et al. 2017, the AWD-LSTM).

    The mask is multiplied in as any other op would be, so that every derivative of the weight knows of it.
    """
    w = weights.weight_hh
    mask = F.dropout(torch.ones(w.shape, dtype=w.dtype, device=w.device), p, training=True)
    return weights._replace(weight_hh=per_sample.masked(w, mask))
