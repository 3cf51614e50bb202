"""One layer's call, and the road that it takes. There are three, and ``road`` says which:

* ``fused``: the ops ``fastrnn::layer_forward`` and ``layer_backward``, on the CPU and on CUDA; a node of autograd made
  in C++ (csrc/torch/autograd.cpp). Eager calls, for training and inference, and graphs of torch.compile and
  torch.export.
* ``composed``: ``linear`` around the recurrence's own op, which have rules for torch.func and forward-mode AD
  (composed.py).
* ``reference``: the recurrence in plain PyTorch (reference.py), where there is no kernel of ours: other devices and
  dtypes, and what torch.jit.trace and ONNX record.

Where a whole network is one call of torch's own op, it does not come here (fallback.py).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import composed, fallback, per_sample
from .records import LayerCall, LayerResults
from .transforms import is_transformed

Road = Literal["fused", "composed", "reference"]
_layer_forward = torch.ops.fastrnn.layer_forward.default


def road(has_kernels: bool, *tensors: Tensor | None) -> Road:
    """Which way does a layer's call go that reads these tensors, under what is in force now?"""
    if not has_kernels or fallback.is_traced() or fallback.is_exported_to_onnx():
        return "reference"
    return "composed" if is_transformed(*tensors) else "fused"


def layer(call: LayerCall) -> LayerResults:
    """One layer, by its road."""
    if per_sample.asked_for(call.weights):
        return per_sample.layer(call)
    if call.batch_sizes is not None or call.offsets is not None:
        return fused(call)  # no other road takes such rows: who gives them has asked for it
    first = call.weights[0]
    read = call.input, *call.states, *(x for w in call.weights for x in w)
    taken = road(fallback.has_kernels(first.weight_ih, call.input, *first), *read)
    return fused(call) if taken == "fused" else composed.layer(call, by_reference=taken == "reference")


def fused(call: LayerCall, save: bool = False) -> LayerResults:
    """The op. save: keep what layer_backward reads, also where no derivative is asked for."""
    how = call.directions, save, call.grad_clip, call.all_states
    found = _layer_forward(call.cell, call.input, *call.by_field(), *call.states, call.batch_sizes, *how, call.offsets)
    return LayerResults(*found)
