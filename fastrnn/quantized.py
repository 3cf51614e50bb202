"""Inference with narrower weights: ``fastrnn.quantize(module, dtype=torch.int8)``, or ``torch.bfloat16``; and training
with weights that are rounded so: ``fastrnn.fake_quantize``.

A step of a few rows is as long as it takes to read the weights, so half or a quarter of the bytes is up to two or four
times the speed. Activations, biases and states stay float32.

* bfloat16: weights rounded to 8 bits of mantissa, products in float32.
* int8: weights by row, w = scale q with q in -127..127 (symmetric, per output row); each input and each h by its own
  largest magnitude to 8 bits as it comes; products in exact integers, with AVX-512 VNNI where the CPU has it. The
  scheme is that of torch.ao.quantization.quantize_dynamic, whose scale is per matrix.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import fallback, heads
from .composed import fold, unfold
from .modules import GRU, LSTM, MGU, RNN, LiGRU, _Recurrent
from .ops import CELLS, register_fake
from .records import LayerWeights, States, name_of
from .rounding import DTYPES, Rounded, int8_rows, is_rounded, narrow_fields, unrounded
from .swap import check_module
from .transforms import has_tangents

_quantized_forward = torch.ops.fastrnn.quantized_forward.default
_UNITS, _DEPTH = 16, 4  # of a block; see LayerParams in csrc/params.h
M = TypeVar("M", bound=nn.Module)
_FIELDS = (  # of a layer's weights, by name and suffix, in the order of csrc/torch/module_call.cpp
    *((field, "") for field in LayerWeights._fields if field != "params"),  # which that knows nothing of
    *((field, suffix) for field in ("weight_ih", "weight_hh") for suffix in ("_scale", "_sum")),
)


def quantize(module: nn.Module, dtype: torch.dtype = torch.int8) -> nn.Module:
    """A copy for inference, with every :class:`fastrnn.LSTM`, ``GRU``, ``RNN``, ``LiGRU`` and ``MGU`` in it on narrower
    weights.

    Args:
        module: one of them, or a module that holds some anywhere; float32 on the CPU. Left as it is. Cells and other
            modules are copied unchanged.
        dtype: ``torch.int8`` or ``torch.bfloat16``, of the weight matrices. An LSTM's ``weight_hr`` stays float32
            beside int8, and so do biases, ``weight_ch`` and ``weight_ln`` beside both.

    Returns:
        The copy. Its recurrent modules take the same arguments (PackedSequence, ``lengths``, ``resets`` and states
        included) and have copies of the hooks of a call, but buffers for their weights, no dropout of any kind,
        zoneout's expectation, and no gradients.

    Raises:
        TypeError: ``module`` is or holds none of them; it holds one of a class derived from theirs, or with a
            ``forward`` of its own; a weight that is not float32, or no parameter (weight norm, pruning).
        ValueError: another ``dtype``; a module on another device, or with ``return_all_states`` or ``token_input``.
        RuntimeError: at a call, where a gradient of the input or a state is asked for.
        TypeError: by the copy's recurrent modules, where they are to move or to be cast: ``half()``, ``cuda()``.
    """
    found = _candidates(module, dtype)
    for m in found:
        for name, weight in _named_weights(m):
            if weight.device.type != "cpu":
                raise ValueError(f"{name}: expected device cpu, got {weight.device}")
    made = [(m, _narrowed(m, dtype)) for m in found]
    memo: dict[int, Any] = {id(m): out for m, out in made}  # deepcopy puts these in their places
    for m, out in made:
        _copy_additions(m, out, memo)
    return copy.deepcopy(module, memo)


def fake_quantize(module: M, dtype: torch.dtype = torch.int8) -> M:
    """Trains with the weights that :func:`quantize` will make: rounds the weight matrices of every
    :class:`fastrnn.LSTM`, ``GRU``, ``RNN``, ``LiGRU`` and ``MGU`` in a module at each forward pass, in place.

    The rounding is a parametrization (``torch.nn.utils.parametrize``) of ``weight_ih`` and ``weight_hh``, for bfloat16
    of an LSTM's ``weight_hr`` too, behind any that is there already. Gradients pass it as if it were not there (the
    straight-through estimator: Bengio, Leonard and Courville 2013; in training for inference in integers: Jacob et al.
    2018). All else is as ever: the fused kernels, every option, device and transform; the Parameters stay the same
    objects and keep the exact values, which an optimizer moves.

    Args:
        module: one of them, or a module that holds some anywhere; float32. Cells and other modules are left alone.
        dtype: ``torch.int8`` or ``torch.bfloat16``, as ``quantize`` will be given.

    Returns:
        The module. ``module.weight_hh_l0`` [G*H, R] is then the rounded weight, and the exact one is
        ``module.parametrizations.weight_hh_l0.original``, also in the state_dict. ``quantize(module, dtype)`` has the
        rounded weights of the training, to the bit. Beside int8 weights it rounds each row of the input and of h as
        well, to 8 bits of its own largest magnitude, which was not trained with.
        ``torch.nn.utils.parametrize.remove_parametrizations(module, name, leave_parametrized=False)`` is the way back.

    Raises:
        TypeError: as ``quantize``'s, which is to take the module one day; a weight that is rounded already.
        ValueError: another ``dtype``; a module with ``return_all_states`` or ``token_input``, of which ``quantize``
            makes none.
    """
    found = [(m, name) for m in _candidates(module, dtype) for name, _ in _named_weights(m)]
    for m, name in found:
        if is_rounded(m, name):
            raise TypeError(f"{name}: expected an exact weight, got one that is rounded at each forward pass already")
    for m, name in found:
        if name.rpartition("_l")[0] in narrow_fields(dtype):
            parametrize.register_parametrization(m, name, Rounded(dtype))
    return module


def _candidates(module: nn.Module, dtype: torch.dtype) -> list[_Recurrent]:
    """Those in it that can have narrow weights, all that there are; see the errors of :func:`quantize`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected torch.int8 or torch.bfloat16, got {dtype}")
    check_module("module", module)
    found = [m for m in module.modules() if isinstance(m, _Recurrent)]
    if not found:
        torchs = [_name(m) for m in module.modules() if isinstance(m, (nn.LSTM, nn.GRU, nn.RNN))]
        got = _name(module) + (f" with a {torchs[0]} in it" if torchs and torchs[0] != _name(module) else "")
        advice = ": convert it first, fastrnn.quantize(fastrnn.convert(module))" if torchs else ""
        raise TypeError(f"module: expected a fastrnn.LSTM, GRU or RNN or a module holding one, got {got}{advice}")
    for m in found:
        if isinstance(m, _Quantized):
            raise TypeError(f"module: expected weights of float32, got {_name(m)}, which is quantized already")
        if not isinstance(m, tuple(_KINDS)):
            raise TypeError(f"module: expected layers that can have narrow weights, got {_name(m)}, which cannot")
        if parametrize.type_before_parametrizations(m) not in _KINDS:
            raise TypeError(f"module: expected layers of fastrnn's own classes, got {_name(m)}, derived from one")
        if "forward" in vars(m):
            raise TypeError(f"module: expected its class's forward, got {_name(m)} with another, set on the instance")
        if m.return_all_states:
            raise ValueError(f"module: expected return_all_states=False, got {_name(m)} with True: only h is kept")
        if m.token_input:
            raise ValueError(
                f"module: expected token_input=False, got {_name(m)} with True: nothing is looked up there"
            )
        learned = [name for names in m._initial_names() for name in names] if m.learn_initial_state else []
        for name in (*(name for name, _ in _named_weights(m)), *learned):
            if not (name in m._parameters or parametrize.is_parametrized(m, name)):
                raise TypeError(f"{name}: expected a parameter, got a tensor: remove its weight norm or pruning first")
        for name, weight in _named_weights(m):
            if weight.dtype != torch.float32:
                raise TypeError(f"{name}: expected torch.float32, got {weight.dtype}")
    return found


def _name(module: nn.Module) -> str:
    """As users import it: torch.nn's and ours by their public names."""
    cls = type(module)
    public = {"torch.nn.modules": "torch.nn"} | {
        f"fastrnn.{x}": "fastrnn" for x in ("cells", "modules", "quantized", "slstm")
    }
    package = next((short for long, short in public.items() if cls.__module__.startswith(long)), cls.__module__)
    return f"{package}.{cls.__qualname__}"


def _named_weights(module: _Recurrent) -> list[tuple[str, Tensor]]:
    return [(name, getattr(module, name)) for names in module._all_weights for name in names]


def _narrowed(module: _Recurrent, dtype: torch.dtype) -> _Quantized:
    kind = next(cls for base, cls in _KINDS.items() if isinstance(module, base))
    out = kind.__new__(kind)
    nn.Module.__init__(out)
    for name, value in vars(module).items():
        if name not in vars(out) and name != "_compiled_call_impl":
            out.__dict__[name] = copy.copy(value)
    out.dtype = dtype
    out._flat_weights_names = []
    out._init_flat_weights()
    for layer, directions in enumerate(_exact_weights(module)):
        if module.num_heads > 1:
            directions = [head for weights in directions for head in heads.by_head(weights)]
        for field in LayerWeights._fields:
            parts = [getattr(weights, field).detach() for weights in directions if getattr(weights, field) is not None]
            if not parts:
                continue
            name, weight = f"{name_of(field, module._cell)}_l{layer}", torch.stack(parts)  # [D*N, ...]: no call stacks
            if field not in narrow_fields(dtype):
                out.register_buffer(name, weight)
            elif dtype == torch.bfloat16:
                out.register_buffer(name, weight.to(dtype))
            else:
                blocks = zip(*(int8_blocks(part, _gates(module)) for part in parts), strict=True)
                for suffix, each in zip(("", "_scale", "_sum"), blocks, strict=True):
                    out.register_buffer(name + suffix, torch.stack(each))
    if module.learn_initial_state:
        for name in (name for names in module._initial_names() for name in names):
            out.register_buffer(name, getattr(module, name).detach().clone())
    states, count = out._state_widths(), 2 if out.bidirectional else 1
    out._names = [
        [
            *(name if name in out._buffers else None for name in (f"{field}_l{i}{end}" for field, end in _FIELDS)),
            states[0],
            states[-1],
            states[0] * count if i else out.input_size,
        ]
        for i in range(module.num_layers)
    ]
    out.training = False
    return out


def _copy_additions(module: _Recurrent, out: _Quantized, memo: dict[int, Any]) -> None:
    """Hooks of a call, parameters, buffers and modules that somebody has added, copied as deepcopy does."""
    ours = {name for name, _ in _named_weights(module)} | {n for names in module._initial_names() for n in names}
    for name, value in vars(module).items():
        if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
            out.__dict__[name] = copy.deepcopy(value, memo)
    for name, parameter in module._parameters.items():
        if name not in ours:
            out.register_parameter(name, copy.deepcopy(parameter, memo))
    for name, buffer in module._buffers.items():
        out.register_buffer(name, copy.deepcopy(buffer, memo), name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        if name != "parametrizations":
            out.add_module(name, copy.deepcopy(child, memo))


def _exact_weights(module: _Recurrent) -> list[list[LayerWeights]]:
    """``[layer][direction]``, as they are before :func:`fake_quantize` rounds them. Of rounded ones, rounded once more,
    a scale might differ by a bit."""
    names = iter(module._all_weights)

    def exact(weights: LayerWeights, own: list[str]) -> LayerWeights:
        return weights._replace(**{n.rpartition("_l")[0]: unrounded(module, n) for n in own if is_rounded(module, n)})

    return [[exact(weights, next(names)) for weights in layer] for layer in module._weights()]


def _gates(module: _Recurrent) -> int:
    return CELLS[module._cell].gates


def int8_blocks(weight: Tensor, gates: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight [G*H, K] as the kernel reads it, B = ceil(H / 16), Q = ceil(K / 4).

    Returns blocks int8 [B, Q, G, 16, 4], scale float32 [B, G, 16] and sum int32 [B, G, 16], 128 times a row's sum.
    """
    H, K = weight.shape[0] // gates, weight.shape[1]
    rows = nn.functional.pad(weight.view(gates, H, K), (0, -K % _DEPTH, 0, -H % _UNITS))
    B, Q = rows.shape[1] // _UNITS, rows.shape[2] // _DEPTH
    quantized, scale = int8_rows(rows)  # [G, B*16, Q*4], [G, B*16]
    blocks = quantized.view(gates, B, _UNITS, Q, _DEPTH).permute(1, 3, 0, 2, 4)

    def of_rows(x: Tensor) -> Tensor:
        return x.view(gates, B, _UNITS).transpose(0, 1).contiguous()

    total = 128 * quantized.to(torch.int32).sum(2, dtype=torch.int32)
    return blocks.to(torch.int8).contiguous(), of_rows(scale), of_rows(total)


class _Quantized(_Recurrent):
    """What the quantized modules share."""

    dtype: torch.dtype
    qconfig = None  # torch.ao.quantization has nothing left to do
    _names: list[list[str | int | None]]  # for _C.module_forward

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"a {type(self).__name__} is made by fastrnn.quantize(module), not by its class")

    def train(self, mode: bool = True) -> _Quantized:
        """Stays in eval mode: there is nothing to train, and no dropout."""
        return super().train(False)  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        raise RuntimeError(f"{type(self).__name__}: quantized weights are not drawn anew: quantize another module")

    def __setstate__(self, d: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, d)  # not RNNBase's, which looks for parameters
        self._init_flat_weights()

    @property
    def _flat_weights(self) -> list[Any]:
        return []

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        if list(weights):
            raise RuntimeError(f"_flat_weights: expected none (quantized weights are buffers), got {len(weights)}")

    def _apply(self, fn: Any, recurse: bool = True) -> _Quantized:
        """What ``to``, ``half``, ``cuda`` and so on come to: refused where the kernels could not follow."""
        after = fn(torch.empty(0))
        if after.dtype != torch.float32 or after.device.type != "cpu":
            raise TypeError(
                f"{type(self).__name__}: expected to stay float32 around {self.dtype} weights on the CPU, got a move "
                f"to {after.dtype} on {after.device}: convert the module that was quantized, and quantize that"
            )

        def moved(x: Tensor) -> Tensor:  # float() leaves weights of bfloat16 as they are
            return fn(x) if fn(x.new_empty(0)).dtype == x.dtype else x

        return nn.Module._apply(self, moved, recurse)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dtype={self.dtype}"

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        if input.dtype != torch.float32:
            raise ValueError(f"input: expected torch.float32 for quantized weights, got {input.dtype}")
        if input.layout is not torch.strided:
            raise ValueError(f"input: expected a dense tensor for quantized weights, got layout {input.layout}")
        if input.device.type != "cpu":
            raise RuntimeError(f"input: expected device cpu for quantized weights, got {input.device}")
        weight = self._all_weights[0][0]
        if not getattr(self, weight).is_cpu:
            raise RuntimeError(f"{weight}: expected device cpu, got {getattr(self, weight).device}")
        self._check_input_size(input, batch_sizes)

    def _input_dtype(self) -> torch.dtype:
        return torch.float32

    def _weights_by_name(self) -> tuple[dict[str, Any], list[Any]]:
        return self._buffers, self._names

    def _network(self, input: Tensor, states: States | None, **sequence: Any) -> tuple[Any, States, None]:
        if fallback.is_traced() or fallback.is_exported_to_onnx():
            raise RuntimeError(
                "quantized modules can be neither traced nor exported to ONNX: torch's ops do not compute the same. "
                "Trace or export the model that fastrnn.quantize was given"
            )
        fresh = sequence.get("reset_states")
        given = input, *(states or ()), *(fresh or ())
        dual = not torch.compiler.is_compiling() and has_tangents(*given)
        if dual or (torch.is_grad_enabled() and torch._C._any_requires_grad(*given)):
            raise RuntimeError(
                "quantized modules are for inference: expected an input and states without requires_grad or tangents"
            )
        directions = 2 if self.bidirectional else 1
        widths, reverse = self._state_widths(), [False] * self.num_heads + [True] * (self.num_heads * (directions - 1))
        if states is None:
            count = self.num_layers * directions
            states = tuple(input.new_zeros(count, input.shape[1], n) for n in widths)
        finals, outputs, output, params = [], [], input, name_of("params", self._cell)
        for layer in range(self.num_layers):
            at = slice(layer * directions, (layer + 1) * directions)
            h, *c = (fold(x[at]) for x in states)
            h_reset, *c_reset = (fold(x[at]) for x in fresh) if fresh else (None,)
            below = output
            masks = self._noise.masks(h, directions, output.shape[:2], h.shape[0], widths)
            output, h_n, c_n = _quantized_forward(
                self._cell, below, *self._matrix(f"weight_ih_l{layer}"), self._buffers.get(f"bias_ih_l{layer}"),
                *self._matrix(f"weight_hh_l{layer}"), self._buffers.get(f"bias_hh_l{layer}"),
                self._buffers.get(f"weight_hr_l{layer}"), self._buffers.get(f"{params}_l{layer}"), h,
                c[0] if c else None, sequence.get("lengths"), sequence.get("resets"), h_reset,
                c_reset[0] if c_reset else None, *masks, reverse,
            )  # fmt: skip
            finals.append([unfold(x, directions) for x in (h_n, c_n)[: len(widths)]])
            if layer > 0 and self.residual:
                output = output + below
            outputs.append(output)
        joined = tuple(torch.cat(each) if len(each) > 1 else each[0] for each in zip(*finals, strict=True))
        return tuple(outputs) if self.return_all_layers else output, joined, None

    def _takes_packed(self, data: Tensor, states: States | None) -> bool:
        return False

    def _is_for_torch(self, input: Any, hx: Any) -> bool:
        return False  # torch's ops have no such weights

    def _matrix(self, name: str) -> tuple[Tensor | None, ...]:
        """With its scales and sums, where it has any."""
        return tuple(self._buffers.get(name + suffix) for suffix in ("", "_scale", "_sum"))


class QuantizedLSTM(_Quantized, LSTM):
    """What :func:`quantize` makes of an LSTM. Called like it; not to be constructed."""


class QuantizedGRU(_Quantized, GRU):
    """What :func:`quantize` makes of a GRU. Called like it; not to be constructed."""


class QuantizedLiGRU(_Quantized, LiGRU):
    """What :func:`quantize` makes of a LiGRU. Called like it; not to be constructed."""


class QuantizedMGU(_Quantized, MGU):
    """What :func:`quantize` makes of an MGU. Called like it; not to be constructed."""


class QuantizedRNN(_Quantized, RNN):
    """What :func:`quantize` makes of an RNN. Called like it; not to be constructed."""


_KINDS: dict[type[_Recurrent], type[_Quantized]] = {
    LSTM: QuantizedLSTM,
    GRU: QuantizedGRU,
    LiGRU: QuantizedLiGRU,
    MGU: QuantizedMGU,
    RNN: QuantizedRNN,
}


@register_fake(_quantized_forward)
def _(
    cell, input, weight_ih, scale_ih, sum_ih, bias_ih, weight_hh, scale_hh, sum_hh, bias_hh, weight_hr, params,
    h_0, c_0, lengths, resets, reset_h, reset_c, mask_h, keep_h, keep_c, reverse,
):  # fmt: skip
    T, B, _ = input.shape
    return (
        input.new_empty(T, B, h_0.shape[1]),
        torch.empty_like(h_0),
        torch.empty_like(c_0) if c_0 is not None else input.new_empty(0),
    )
