"""Calls that our kernels cannot take, and what computes them instead: torch's own ops, as torch.nn's modules call them.

A module outlives the place that it was made for. After ``model.to("mps")`` or ``model.to(torch.complex64)`` there is no
kernel of ours, and where ``torch.jit.trace`` or ``torch.onnx.export`` records a call, whoever reads the record knows
none. Such a call computes what torch.nn's would, or fails with torch's own error. Where an option is on that torch's
ops lack (lengths, resets, tokens, grad_clip ...), ``layer.py`` takes the recurrence of ``reference.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from . import _C

if TYPE_CHECKING:
    from .records import LayerWeights, States

_FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
# The dtypes that kernels of this build take, by type of device. Of meta tensors there are only shapes to compute.
KERNELS: dict[str, frozenset[torch.dtype]] = {"cpu": _FLOATS, "meta": _FLOATS}
if _C.build_info()["cuda_archs"] is not None:
    KERNELS["cuda"] = _FLOATS


def has_kernels(weight: Tensor, *others: Tensor | None) -> bool:
    """Is a call with this weight one of a device, dtype and layouts that our kernels take?

    Tensors of another device or dtype than the weight's are an error, which is not told here.
    """
    if weight.dtype not in KERNELS.get(weight.device.type, ()) or weight.layout is not torch.strided:
        return False
    return all(x is None or (x.layout is torch.strided and not x.is_nested) for x in others)


def lacking(module: nn.Module) -> str:
    """Why a torch.nn module's own parameters are none that kernels take; "" if they are."""
    for name, x in module.named_parameters():
        if x.dtype not in KERNELS.get(x.device.type, ()):
            return f"has parameters of {x.dtype} on {x.device.type}, for which there are no kernels"
        if x.layout is not torch.strided:
            return f"has a {name} of layout {x.layout}, for which there are no kernels"
    return ""


# Checks of sizes compare what a trace takes for data. torch ignores this warning of its own modules' checks, too.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"fastrnn\.")


def is_traced() -> bool:
    """Does ``torch.jit.trace``, or ``torch.onnx.export(dynamo=False)``, record this call?"""
    return torch._C._get_tracing_state() is not None


def is_exported_to_onnx() -> bool:
    """Does ``torch.onnx.export(dynamo=True)`` record this call?

    A plain ``torch.export`` keeps our ops in its program: what runs that has them.
    """
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def has_op(cell: str, input: Tensor, all_states: bool, grad_clip: float) -> bool:
    """Does one of torch's ops compute such a network?"""
    return hasattr(torch._VF, cell) and input.dim() == 3 and not (all_states or grad_clip)


def of_fixed_steps(x: Tensor) -> Tensor:
    """x [T, ..], for a loop over time in what is recorded: a warning says so, and a trace refuses another T."""
    warnings.warn(
        "torch's own ops and ONNX' have no LiGRU, MGU and SLSTM, resets, return_all_states, layer_norm, grad_clip, "
        "recurrent_dropout or zoneout, and some no lengths, tokens, proj_size, peephole or reset_after: a loop over a "
        "fixed number of steps is recorded, which fails for another",
        stacklevel=2,
    )
    return torch.stack(x.unbind()) if is_traced() else x


def refuse_script(self: nn.Module) -> NoReturn:
    """``__prepare_scriptable__`` of our modules: what torch.jit.script calls first."""
    raise RuntimeError(
        f"torch.jit.script: expected modules that it can compile, as torch.nn's, got a fastrnn.{type(self).__name__}. "
        "Script fastrnn.to_torch(copy.deepcopy(model)), which computes the same, or use torch.jit.trace"
    )


def network(
    cell: str,
    input: Tensor,
    states: States | None,
    weights: Sequence[Sequence[LayerWeights]],
    dropout: float,
    training: bool,
) -> tuple[Tensor, States]:
    """A network by one call of torch's op: input [T, B, I], states [L*D, B, n] -> output [T, B, D*R], final states."""
    first, count = weights[0][0], len(weights) * len(weights[0])
    has_bias = first.bias_ih is not None or first.bias_hh is not None
    flat = []
    for w in (w for layer in weights for w in layer):
        flat += [w.weight_ih, w.weight_hh]
        if has_bias:  # torch's op knows both of them or none
            flat += [torch.zeros_like(w.weight_ih[:, 0]) if b is None else b for b in (w.bias_ih, w.bias_hh)]
        if w.weight_hr is not None:
            flat.append(w.weight_hr)
    if states is None:
        widths = first.widths if cell == "lstm" else first.widths[:1]
        states = tuple(torch.zeros(count, input.shape[1], n, dtype=input.dtype, device=input.device) for n in widths)
    hx = states if cell == "lstm" else states[0]
    op = getattr(torch._VF, cell)
    output, *finals = op(input, hx, flat, has_bias, len(weights), dropout, training, len(weights[0]) > 1, False)
    return output, tuple(finals)


def layer(cell: str, input: Tensor, weights: Sequence[LayerWeights], states: States | None) -> tuple[Tensor, ...]:
    """One layer: input [T, B, I], states [D, B, n] -> output [T, B, D*R] and the final states."""
    output, finals = network(cell, input, states, [weights], 0.0, False)
    return output, *finals


def step(cell: str, input: Tensor, states: States, weights: LayerWeights) -> States:
    """A cell by torch's op: input [B, I], states [B, H] -> the states after the step."""
    op = getattr(torch._VF, f"{cell}_cell")
    after = op(input, states if cell == "lstm" else states[0], *weights[:4])
    return tuple(after) if cell == "lstm" else (after,)
