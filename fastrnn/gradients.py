"""The recurrence's gradients: what ``recurrent_backward`` makes, and from that those of the weights, with ATen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .ops import CELLS, names_of, recurrent_backward, results_of
from .products import outer_products, transposed_product
from .transforms import is_vmapped_call

Grads = tuple[Tensor | None, ...]
Pulled = Mapping[str, Tensor | None]  # gradients by the names of what they are of


def pull_forward(args: Mapping[str, Any], results: Sequence[Tensor], needed: Collection[str], grads: Grads) -> Pulled:
    """recurrent_forward's gradients; results: output and saved, grads: of output, h_n, c_n and saved."""
    output, saved = results
    grad_output, grad_h_n, grad_c_n, grad_saved = grads
    given = {name: args[name] for name in names_of(recurrent_backward) if name in args}
    given |= dict(grad_output=grad_output, grad_h_n=grad_h_n, output=output, saved=saved)
    given["grad_c_n"] = grad_c_n if args["c_0"] is not None else None
    given["initial"] = "h_0" in needed or "c_0" in needed
    by_kernel = grad_saved is None
    pulled = recurrent_backward(**given) if by_kernel else reference.backward(**given, grad_saved=grad_saved)
    found = dict(zip((name.removeprefix("grad_") for name in results_of(recurrent_backward)), pulled, strict=True))
    return of_weights(args, results, needed, found)


def of_weights(
    args: Mapping[str, Any], results: Sequence[Tensor], needed: Collection[str], found: Mapping[str, Tensor]
) -> Pulled:
    """All that is needed, from what recurrent_backward finds: of gates, states and each row's params."""
    output, saved = results
    pulled, P = dict(found), args["weight_hh"].shape[0]
    grad_gates_hh = found["gates_hh" if CELLS[args["cell"]].separate_gates_hh else "gates_ih"]
    if "weight_hh" in needed:
        reverse = args["reverse"]
        h_0, lengths, resets, reset_h, mask_h = (args[k] for k in ("h_0", "lengths", "resets", "reset_h", "mask_h"))
        of_h, rule, of_late = grad_gates_hh, reference.CELLS[args["cell"]], []
        if rule.late:
            of_h, grad_late = reference.early_and_late(args["cell"], grad_gates_hh, P)
            before = reference.multiplied_h(output, h_0, lengths, resets, reset_h, mask_h, reverse)
            of_late = [_grad_weight(grad_late, reference.late_input(args["cell"], saved, before))]
        of_weight = _grad_weight_hh(of_h, output, h_0, lengths, resets, reset_h, mask_h, reverse)
        pulled["weight_hh"] = torch.cat([of_weight, *of_late], 1) if of_late else of_weight
    if "bias_hh" in needed:
        pulled["bias_hh"] = grad_gates_hh.sum((0, 1)).reshape(P, -1)
    if "weight_hr" in needed:
        c_0, lengths, resets, reset_c, keep_c = (args[k] for k in ("c_0", "lengths", "resets", "reset_c", "keep_c"))
        of_states = (c_0, lengths, resets, reset_c, keep_c, args["reverse"])
        hidden = reference.lstm_hidden(args["cell"], saved, *of_states)
        pulled["weight_hr"] = _grad_weight(found["projected"], hidden)
    if "params" in needed:
        pulled["params"] = found["params"].sum(0).reshape(args["params"].shape).to(output.dtype)
    return {name: x for name, x in pulled.items() if name in needed}


def _grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """sum over T, B of grad[t, b, p, :] x[t, b, p, :]^T: [P, m, n] from [T, B, P*m] and [T, B, P, n]."""
    # reshape throughout, for legacy vmap (is_grads_batched=True) has no rule for flatten and unflatten
    P, n = x.shape[2:]
    return outer_products(grad.reshape(-1, P, grad.shape[2] // P), x.reshape(-1, P, n))


def _grad_weight_hh(
    grad_gates_hh: Tensor,
    output: Tensor,
    h_0: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    mask_h: Tensor | None,
    reverse: Sequence[bool],
) -> Tensor:
    """[P, G*h, R]: every step's gate gradients times the state before it, as the product reads that."""
    P, (T, B, _) = len(reverse), output.shape
    if T == 0:
        return output.new_zeros(P, grad_gates_hh.shape[2] // P, output.shape[2] // P)
    # Under vmap the rows of a sample may be few, and a sum of two products for each would be most of the work.
    if resets is not None or mask_h is not None or P > 4 or is_vmapped_call(grad_gates_hh, output):
        of_h = (output, h_0, lengths, resets, reset_h, mask_h, reverse)
        return _grad_weight(grad_gates_hh, reference.multiplied_h(*of_h))
    # The states before are the outputs one step on, so views of both serve and nothing is copied: at padded steps both
    # are 0. What is left is each row's first step, whose state before is h_0.
    weights = []
    for p, backwards in enumerate(reverse):
        grad, h, first = _group(grad_gates_hh, p, P), _group(output, p, P), _group(h_0, p, P)
        # By rows and not by steps: a graph of T = 2 would hold one step, and take that size for fixed.
        later, before = (
            x.reshape(-1, x.shape[2]).narrow(0, at, (T - 1) * B)
            for x, at in ((grad, 0 if backwards else B), (h, B if backwards else 0))
        )
        # -1 and not T - 1: indexing with a symbolic size would fix it
        start = grad[-1 if backwards else 0]
        if backwards and lengths is not None:
            ends = lengths if lengths.dim() == 1 else lengths[:, p]
            ends = ends.to(grad.device, torch.int64, non_blocking=ends.is_cpu)
            ends = (ends - 1).clamp(min=0)[None, :, None]
            start = grad.gather(0, ends.expand(1, -1, grad.shape[2]))[0]
        if T > 1:
            weights.append(transposed_product(start, first) + transposed_product(later, before))
        else:  # a cell's step, too: of ATen, whose switch for TF32 torch.nn's cells obey
            weights.append(start.t() @ first)
    return torch.stack(weights) if P > 1 else weights[0][None]


def _group(x: Tensor, p: int, groups: int) -> Tensor:
    n = x.shape[-1] // groups
    return x if groups == 1 else x.narrow(-1, p * n, n)
