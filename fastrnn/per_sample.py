"""The gradient of every sample of a batch, for tools that ask the weights for it: Opacus' hooks, and torch's
ExpandedWeights (``torch.nn.utils._per_sample_grad.call_for_per_sample_grads``, Opacus' mode "ew").

Such a tool's weights come into a call marked. A layer of marked weights is a node of its own: one forward and one
backward of the recurrence for the whole batch, as ever, and then the weights' gradients with each sample's terms apart,
which go to the tool. The node sees all of the call (lengths, states, the gradients of the final states), of which a
module's hooks would see the first argument and the first result.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from . import composed, reference
from .autograd import Grads, keep, kept
from .imports import when_imported
from .ops import BACKWARD_WEIGHTS, CELLS, FORWARD_WEIGHTS, recurrent_backward, recurrent_forward
from .packing import without_padding
from .products import grouped_outer, outer_by_aten
from .records import LayerCall, LayerResults, LayerStates, LayerWeights
from .transforms import in_autocast_dtype, is_plain, is_plain_call, wide_dtype

_FIELDS, _STATES = len(LayerWeights._fields), len(LayerStates._fields)

# Takes the gradients of a weight by sample, [B, ..]; returns the weight's own, or None.
Sampler = Callable[[Tensor], Tensor | None]


class SampledWeight(Tensor):
    """A parameter, marked for Opacus."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    original: Parameter
    hooks: OpacusHooks


# By type of a marked weight: the weight without its mark, and the sampler for a call with a batch of this size.
_KINDS: dict[type, Callable[[Any, int], tuple[Tensor, Sampler]]] = {}


def asked_for(weights: Iterable[Iterable[Tensor | None]]) -> bool:
    """Is any of them marked?"""
    return not torch.compiler.is_compiling() and any(type(x) in _KINDS for direction in weights for x in direction)


def _unmarked(x: Any, batch: int) -> tuple[Any, Sampler | None]:
    return _KINDS[type(x)](x, batch) if type(x) in _KINDS else (x, None)


class _Masked(NamedTuple):
    """A marked weight times a mask."""

    weight: Any
    mask: Tensor


def masked(weight: Any, mask: Tensor) -> Any:
    """A weight times a mask that all samples share; a marked one stays marked."""
    return _Masked(weight, mask) if type(weight) in _KINDS else weight * mask


def _of_masked(x: _Masked, batch: int) -> tuple[Tensor, Sampler]:
    weight, sampler = _unmarked(x.weight, batch)
    assert sampler is not None

    def take(of_samples: Tensor) -> Tensor | None:
        # The tool gets the samples' gradients of the weight; autograd, where the tool leaves it something, that of
        # the product.
        return None if sampler(of_samples * x.mask) is None else of_samples.sum(0)

    return weight * x.mask, take


_KINDS[_Masked] = _of_masked


def layer(call: LayerCall) -> LayerResults:
    """A layer of marked weights."""
    pairs = [_unmarked(x, call.batch) for w in call.weights for x in w]
    flat, samplers = [x for x, _ in pairs], [sampler for _, sampler in pairs]
    call = call._replace(weights=[LayerWeights(*flat[i : i + _FIELDS]) for i in range(0, len(flat), _FIELDS)])
    dtype = in_autocast_dtype(call.weights[0].weight_hh).dtype
    if CELLS[call.cell].is_wide(dtype):
        cast = call.mapped(in_autocast_dtype)
        if cast.has_one_dtype:
            samplers = [None if take is None else _in_dtype(take, call.dtype) for take in samplers]
            return _layer(cast.widened(wide_dtype(call.input)), samplers).to(dtype)
    return _layer(call, samplers)


def _in_dtype(take: Sampler, dtype: torch.dtype) -> Sampler:
    return lambda of_samples: take(of_samples.to(dtype))


def _layer(call: LayerCall, samplers: list[Sampler | None]) -> LayerResults:
    input, lengths, directions = call.input, call.states.lengths, call.weights
    if lengths is not None:
        input = without_padding(input, lengths)
    with torch.no_grad():
        gates_ih = composed.project(input, directions)
    weight_hh = torch.stack([w.weight_hh for w in directions])
    states = composed.folded(call.states, call.cell, weight_hh, call.batch)
    options = call._replace(weights=[], states=None, input=None), samplers  # type: ignore[arg-type]
    flat = [x for w in directions for x in w]
    output, h_n, c_n, cells = _SampledLayer.apply(options, gates_ih, input, *states, *flat)
    D = len(directions)
    c_n = composed.unfold(c_n, D) if CELLS[call.cell].states > 1 else c_n
    return LayerResults(output, composed.unfold(h_n, D), c_n, cells, output.new_empty(0))


def initial_states(weights: Sequence[Any], batch: int) -> Tensor:
    """[weights, batch, n] of one row each."""
    rows = []
    for marked in weights:
        weight, sampler = _unmarked(marked, batch)
        rows.append(weight.expand(batch, -1) if sampler is None else _SampledRows.apply(sampler, weight, batch))
    return torch.stack(rows)


class _SampledRows(torch.autograd.Function):
    """One row for every sample."""

    @staticmethod
    def forward(ctx: Any, sampler: Sampler, weight: Tensor, batch: int) -> Tensor:
        ctx.sampler = sampler
        return weight.expand(batch, -1).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:
        return None, ctx.sampler(grad), None


def _stacked(flat: Sequence[Tensor | None]) -> LayerWeights:
    """The weights of all directions: [D, ...] each."""
    fields = (flat[i::_FIELDS] for i in range(_FIELDS))
    return LayerWeights(*(None if x[0] is None else torch.stack(x) for x in fields))  # type: ignore[arg-type, type-var]


class _SampledLayer(torch.autograd.Function):
    """Arguments: (the call without tensors, a sampler or None for each weight), gates_ih, input, the fields of
    LayerStates, with states [B, D*n], and those of each direction's LayerWeights."""

    @staticmethod
    def forward(ctx: Any, options: Any, gates_ih: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        call, _ = ctx.options = options
        states, w = LayerStates(*rest[:_STATES]), _stacked(rest[_STATES:])
        D = len(w.weight_hh)
        output, h_n, c_n, saved = recurrent_forward(
            call.cell,
            gates_ih,
            *(getattr(w, name) for name in FORWARD_WEIGHTS),
            *states,
            list(call.reverse[:D]),
            True,
        )
        ctx.set_materialize_grads(False)
        keep(ctx, [input, *rest, output, saved])
        cells = composed.every_c(call.cell, saved, D, states.keep_c) if call.all_states else output.new_empty(0)
        return output, h_n, c_n, cells

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        call, samplers = ctx.options
        needs = ctx.needs_input_grad[2:]
        input, *rest, output, saved = kept(ctx)
        states, flat = LayerStates(*rest[:_STATES]), rest[_STATES:]
        found, of_others = _gradients(call, grads, input, states, flat, output, saved, needs)
        of_weights: list[Tensor | None] = []
        for at, (weight, sampler) in enumerate(zip(flat, samplers, strict=True)):
            p, field = divmod(at, _FIELDS)
            grad = found[field]
            if grad is None or not needs[1 + _STATES + at]:
                of_weights.append(None)
                continue
            of_samples = grad[:, p].to(weight.dtype)
            of_weights.append(of_samples.sum(0) if sampler is None else sampler(of_samples))
        names = ("input", *LayerStates._fields)
        wanted = [of_others.get(name) if need else None for name, need in zip(names, needs, strict=False)]
        return (None, None, *wanted, *of_weights)


def _gradients(
    call: LayerCall,
    grads: Grads,
    input: Tensor,
    states: LayerStates,
    flat: Sequence[Any],
    output: Tensor,
    saved: Tensor,
    needs: Sequence[bool],
) -> tuple[list[Tensor | None], dict[str, Tensor | None]]:
    """Of the weights' fields by sample [B, P, ..], and by name of input, h_0, c_0, reset_h, reset_c."""
    cell, dtype = call.cell, output.dtype  # under autocast not the arguments'
    states = LayerStates(*(x.to(dtype) if x is not None and x.is_floating_point() else x for x in states))
    w = LayerWeights(*(None if x is None else x.to(dtype) for x in _stacked(flat)))  # type: ignore[arg-type]
    weight_ih, weight_hh = w.weight_ih, w.weight_hh
    (T, B, _), P = output.shape, len(weight_hh)
    reverse = list(call.reverse[:P])
    given: dict[str, Any] = dict(
        cell=cell,
        grad_output=grads[0],
        grad_h_n=grads[1],
        grad_c_n=grads[2] if states.c_0 is not None else None,
        **{name: getattr(w, name) for name in BACKWARD_WEIGHTS},
        **states._asdict(),
        reverse=reverse,
        output=output,
        saved=saved,
        grad_clip=call.grad_clip,
    )
    if grads[3] is None:
        pulled = recurrent_backward(**given)
    else:
        pulled = reference.backward(**given, grad_saved=composed.in_saved(cell, grads[3], P, states.keep_c))
    gates_ih, gates_hh, projected, *of_states, of_params = pulled
    if not CELLS[cell].separate_gates_hh:
        gates_hh = gates_ih

    def of_input() -> Tensor:
        if input.dim() == 3:
            return _outer(gates_ih, input.to(dtype)).unflatten(1, (P, gates_ih.shape[2] // P))
        vocabulary = weight_ih.shape[2]
        of_tokens = gates_ih.new_zeros(B * vocabulary, gates_ih.shape[2])
        places = input + vocabulary * torch.arange(B, device=input.device)
        of_tokens.index_add_(0, places.flatten(), gates_ih.flatten(0, 1))
        return of_tokens.view(B, vocabulary, P, gates_ih.shape[2] // P).permute(0, 2, 3, 1)

    def of_groups(grad: Tensor, x: Tensor) -> Tensor:
        # sizes and not -1: of an empty batch, which Opacus draws, nothing could be found out
        return _outer(grad.reshape(T, B * P, grad.shape[2] // P), x.flatten(1, 2)).unflatten(0, (B, P))

    def before() -> Tensor:
        assert states.h_0 is not None
        steps = states.lengths, states.resets
        return reference.multiplied_h(output, states.h_0, *steps, states.reset_h, states.mask_h, reverse)

    def hidden() -> Tensor:
        assert states.c_0 is not None
        steps = states.lengths, states.resets
        return reference.lstm_hidden(cell, saved, states.c_0, *steps, states.reset_c, states.keep_c, reverse)

    def of_weight_hh() -> Tensor:
        h = before()
        if not reference.CELLS[cell].late:
            return of_groups(gates_hh, h)
        parts, inputs = reference.early_and_late(cell, gates_hh, P), (h, reference.late_input(cell, saved, h))
        return torch.cat([of_groups(grad, x) for grad, x in zip(parts, inputs, strict=True)], 2)

    forms: list[Callable[[], Tensor]] = [
        of_input,
        of_weight_hh,
        lambda: gates_ih.sum(0).unflatten(1, (P, gates_ih.shape[2] // P)),
        lambda: gates_hh.sum(0).unflatten(1, (P, gates_hh.shape[2] // P)),
        lambda: of_groups(projected, hidden()),
        lambda: of_params.reshape(B, *w.params.shape),  # type: ignore[union-attr]
    ]
    found = [form() if any(needs[1 + _STATES + i :: _FIELDS]) else None for i, form in enumerate(forms)]
    grad_input = gates_ih @ weight_ih.flatten(0, 1) if needs[0] else None
    return found, dict(zip(("input", "h_0", "c_0", "reset_h", "reset_c"), (grad_input, *of_states), strict=True))


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """sum over t of a[t, g, :] b[t, g, :]^T: [G, m, n] from [T, G, m] and [T, G, n]."""
    fits = is_plain_call(a, b) and is_plain(a) and a.dtype in (torch.float32, torch.float64)
    return grouped_outer(a, b) if fits else outer_by_aten(a, b)


# ---- Opacus ----


class OpacusHooks(NamedTuple):
    """What Opacus would have hooked a module with."""

    owner: Any  # opacus.grad_sample.GradSampleHooks
    loss_reduction: str


class _Found(nn.Module):
    """A weight in one call: to Opacus a layer of its own, whose "backprops" are the gradients that the node found."""

    def __init__(self, weight: Parameter, hooks: OpacusHooks, batch: int) -> None:
        super().__init__()
        self.weight, self.hooks = weight, hooks
        hooks.owner.GRAD_SAMPLERS[_Found] = _Found.by_parameter
        hooks.owner.capture_activations_hook(self, (weight.new_empty(batch, 0),), None)

    def take(self, of_samples: Tensor) -> Tensor:
        self.hooks.owner.capture_backprops_hook(
            self, None, (of_samples,), loss_reduction=self.hooks.loss_reduction, batch_first=True
        )
        return of_samples.sum(0)

    def by_parameter(self, activations: Any, backprops: Tensor) -> dict[Tensor, Tensor]:
        return {self.weight: backprops}

    def ft_compute_sample_grad(self, parameters: Any, activations: Any, backprops: Tensor) -> list[Tensor]:
        """By this name Opacus asks with force_functorch."""
        return [backprops]


_KINDS[SampledWeight] = lambda x, batch: (x.original, _Found(x.original, x.hooks, batch).take)


class _Handle(RemovableHandle):
    """Of a hook that a module has not taken."""

    def __init__(self, module: Hooked | None) -> None:
        super().__init__(OrderedDict())
        self.module = module

    def remove(self) -> None:
        if self.module is not None:
            self.module.__dict__.pop("_opacus", None)


class Hooked(nn.Module):
    """A module that keeps Opacus' hooks in place of being hooked, and marks its weights for them."""

    _opacus: OpacusHooks | None = None

    def register_forward_hook(self, hook: Any, **options: Any) -> RemovableHandle:  # type: ignore[override]
        if _is_of_opacus(hook, "capture_activations_hook"):
            return _Handle(None)
        return super().register_forward_hook(hook, **options)

    def register_full_backward_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        function = getattr(hook, "func", hook)
        if _is_of_opacus(function, "capture_backprops_hook"):
            self._opacus = OpacusHooks(function.__self__, hook.keywords["loss_reduction"])
            return _Handle(self)
        return super().register_full_backward_hook(hook, prepend)

    def _marked(self, weight: Any) -> Any:
        """The weight for a call."""
        hooks = self._opacus
        if hooks is None or torch.compiler.is_compiling():
            return weight
        if not (hooks.owner.hooks_enabled and self.training and torch.is_grad_enabled()):
            return weight
        if not (isinstance(weight, Parameter) and weight.requires_grad):
            return weight
        marked: Any = Tensor._make_subclass(SampledWeight, weight, True)  # type: ignore[arg-type]
        marked.original, marked.hooks = weight, hooks
        return marked


def _is_of_opacus(hook: Any, name: str) -> bool:
    owner = getattr(hook, "__self__", None)
    return getattr(hook, "__name__", None) == name and hasattr(owner, "GRAD_SAMPLERS")


# ---- ExpandedWeights ----


def _take_expanded(module: ModuleType) -> None:
    def unmarked(x: Any, batch: int) -> tuple[Tensor, Sampler]:
        if x.batch_size != batch:
            raise RuntimeError(
                "Expected ExpandedWeights to have batch size matching input but got "
                f"input batch size of {batch} with ExpandedWeight of batch size {x.batch_size}"
            )

        def take(of_samples: Tensor) -> None:
            utils = sys.modules["torch.nn.utils._expanded_weights.expanded_weights_utils"]
            utils.set_grad_sample_if_exists(x, lambda _: of_samples)  # and no .grad, as with torch's own layers

        return x.orig_weight, take

    _KINDS[module.ExpandedWeight] = unmarked


when_imported("torch.nn.utils._expanded_weights.expanded_weights_impl", _take_expanded)
