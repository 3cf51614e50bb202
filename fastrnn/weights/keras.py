"""Weights of Keras 3's recurrent layers (keras/src/layers/rnn/{lstm,gru,simple_rnn}.py, their ``build`` and ``call``).

Keras multiplies from the left, so its kernels are the transposes of torch's: kernel [I, G*H], recurrent_kernel
[H, G*H]. Its gates are i f c o and z r h, where torch has i f g o and r z n. LSTM and SimpleRNN have one bias [G*H]
where torch adds two; GRU has two, [2, 3*H], with ``reset_after=True``, which is torch's GRU, and else one, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import modules
from ..records import LayerWeights
from .parameters import (
    Cell,
    Module,
    check_module,
    check_rank,
    copy_into,
    directions,
    gates,
    names,
    reordered,
    restored,
    tensor,
)

_ORDERS: dict[Cell, tuple[int, ...]] = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "RNN": (0,)}
_KINDS = {
    f"{theirs}{suffix}": f"{ours}{suffix}"
    for theirs, ours in (("LSTM", "LSTM"), ("GRU", "GRU"), ("SimpleRNN", "RNN"))
    for suffix in ("", "Cell")
}


def from_keras(source: Any, *, batch_first: bool = True) -> Module:
    """A module with the weights and sizes of Keras' LSTM, GRU, SimpleRNN, Bidirectional of one, or a cell.

    Args:
        source: a built Keras layer or cell, or for a module of several layers a sequence of layers. Read by its
            attributes: Keras itself is not imported.
        batch_first: of the module made; True as in Keras.

    Returns:
        A new :class:`fastrnn.LSTM`, ``GRU``, ``RNN`` or cell on the CPU in the dtype of the weights.
        ``return_sequences``, ``return_state``, ``stateful`` and ``unroll`` say what a call returns or keeps, not what
        the layer computes, and are not looked at. Keras' ``dropout`` and ``recurrent_dropout`` act in training only
        and are left out.

    Raises:
        TypeError: another kind of layer.
        ValueError: what the equations of torch's modules lack: activations other than tanh and sigmoid (relu for
            SimpleRNN), ``reset_after=False`` of a cell, ``go_backwards``, a ``merge_mode`` other than 'concat'; layers
            that do not fit on each other; a layer that is not built; a config or an array that is none.
    """
    layers = list(source) if isinstance(source, (list, tuple)) else [source]
    if not layers:
        raise ValueError("source: expected one layer or more, got none")
    kinds, options = [], []
    for layer in layers:
        bidirectional = type(layer).__name__ == "Bidirectional"
        parts = [layer.forward_layer, layer.backward_layer] if bidirectional else [layer]
        if bidirectional and layer.merge_mode != "concat":
            raise ValueError(f"merge_mode: expected 'concat', got {layer.merge_mode!r}")
        found = [(_kind(part), *_checked_config(part, reverse=i == 1)) for i, part in enumerate(parts)]
        for other in found[1:]:
            if other != found[0]:
                raise ValueError(f"backward_layer: expected it to be as the forward layer {found[0]}, got {other}")
        kinds.append(found[0][0])
        options.append((*found[0][1:], bidirectional))
    kind, (units, use_bias, activation, reset_after, bidirectional) = kinds[0], options[0]
    for i in range(1, len(layers)):
        if (kinds[i], options[i]) != (kind, options[0]):
            raise ValueError(
                f"source[{i}]: expected the same kind, units, use_bias, activation, reset_after and directions as in "
                f"source[0], {(kind, *options[0])}, got {(kinds[i], *options[i])}"
            )
    arrays = [layer.get_weights() for layer in layers]
    if not arrays[0]:
        raise ValueError("source: expected a layer that is built, got one without weights")
    kernel = tensor("kernel", arrays[0][0])
    check_rank("kernel", kernel, "[I, gates * units]")
    given: dict[str, Any] = dict(input_size=len(kernel), hidden_size=units, bias=use_bias, dtype=kernel.dtype)
    if kind.startswith("RNN"):
        given["nonlinearity"] = activation
    if not kind.endswith("Cell"):
        given.update(num_layers=len(layers), batch_first=batch_first, bidirectional=bidirectional)
        if not reset_after:
            given["reset_after"] = False
    elif len(layers) > 1:
        raise ValueError(f"source: expected one cell, got {len(layers)}")
    elif not reset_after:
        raise ValueError("reset_after: expected True for a cell, got False: fastrnn.GRU has it")
    module: Module = getattr(modules, kind)(**given)
    load_keras(module, arrays)
    return module


def load_keras(module: Module, source: Any) -> None:
    """Copies the weights of Keras layers into a module of the same kind and sizes.

    Args:
        module: LSTM, GRU, RNN or a cell, fastrnn's or torch.nn's; any device and dtype.
        source: a Keras layer; what its ``get_weights()`` returns: kernel [I, G*H], recurrent_kernel [H, G*H] and, if
            the module has biases, bias ([G*H]; [2, 3*H] for a GRU but with ``reset_after=False``), then the same of the
            backward layer of a Bidirectional; or for a module of several layers a sequence of either. ``bias_hh``
            becomes zero where Keras has one bias.

    Raises:
        TypeError: ``module`` is none of these.
        ValueError: a number of layers or arrays, or a shape, that does not fit; an option of ``module`` that torch.nn
            lacks and Keras with it. Nothing is copied then.
    """
    kind = check_module("module", module, may_have=("reset_after",))
    two_biases = _has_two_biases(module)
    layers = _by_layer(source)
    count = len(names(module))
    if len(layers) != count:
        raise ValueError(f"source: expected {count} layers, got {len(layers)}")
    weights = []
    for layer, suffixes in zip(layers, names(module), strict=True):
        each = 3 if module.bias else 2
        if len(layer) != each * len(suffixes):
            wanted = "kernel, recurrent_kernel and bias" if module.bias else "kernel and recurrent_kernel"
            raise ValueError(
                f"source: expected {each * len(suffixes)} arrays a layer ({wanted}, {len(suffixes)} times), "
                f"got {len(layer)}"
            )
        weights.append(
            [
                _from_arrays(kind, module.hidden_size, layer[i : i + each], two_biases)
                for i in range(0, len(layer), each)
            ]
        )
    copy_into(module, weights)


def to_keras(module: Module) -> list[list[Any]]:
    """The weights of a module as NumPy arrays for Keras: ``layer.set_weights(arrays)`` for each layer.

    Args:
        module: LSTM, GRU, RNN or a cell, fastrnn's or torch.nn's, of any dtype.

    Returns:
        One list of arrays a layer, as :func:`load_keras` takes them; a bidirectional layer's are for a Bidirectional.
        They have the weights' dtype, float32 for bfloat16, which NumPy lacks.
        Where Keras has one bias it is the sum of torch's two: the function is kept, the split is not.

    Raises:
        TypeError: ``module`` is none of these.
        ValueError: a ``proj_size`` or another option that Keras' layers lack.
    """
    kind = check_module("module", module, may_have=("reset_after",))
    two_biases = _has_two_biases(module)
    return [[_array(x) for w in layer for x in _to_arrays(kind, w, two_biases)] for layer in directions(module)]


def _array(x: Tensor) -> Any:
    return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()


def _has_two_biases(module: Module) -> bool:
    return isinstance(module, (nn.GRU, nn.GRUCell, modules.GRU, modules.GRUCell)) and getattr(
        module, "reset_after", True
    )


def _by_layer(source: Any) -> list[Sequence[Any]]:
    if hasattr(source, "get_weights"):
        return [source.get_weights()]
    if isinstance(source, (list, tuple)) and source and not hasattr(source[0], "shape"):
        return [each for layer in source for each in _by_layer(layer)]
    if isinstance(source, (list, tuple)) and all(hasattr(x, "shape") for x in source):
        return [source]
    raise ValueError(f"source: expected a Keras layer, its list of arrays, or a sequence of those, got {source!r:.80}")


def _from_arrays(kind: Cell, H: int, arrays: Sequence[Any], two_biases: bool) -> LayerWeights:
    order = _ORDERS[kind]
    kernel, recurrent_kernel, *biases = (
        tensor(name, x) for name, x in zip(("kernel", "recurrent_kernel", "bias"), arrays, strict=False)
    )
    for name, x in (("kernel", kernel), ("recurrent_kernel", recurrent_kernel)):
        if x.dim() != 2 or x.shape[1] != len(order) * H:
            raise ValueError(f"{name}: expected [*, {len(order) * H}] ({len(order)} * units), got {list(x.shape)}")
    weight_ih, weight_hh = (restored(x.t(), order) for x in (kernel, recurrent_kernel))
    if not biases:
        return LayerWeights(weight_ih, weight_hh)
    (bias,) = biases
    Gh = gates(kind) * H
    wanted = (2, Gh) if two_biases else (Gh,)
    if tuple(bias.shape) != wanted:
        other = ": of a GRU with reset_after=False" if two_biases and bias.shape == (Gh,) else ""
        raise ValueError(f"bias: expected {list(wanted)}, got {list(bias.shape)}{other}")
    bias_ih, bias_hh = bias if two_biases else (bias, torch.zeros_like(bias))
    return LayerWeights(weight_ih, weight_hh, restored(bias_ih, order), restored(bias_hh, order))


def _to_arrays(kind: Cell, weights: LayerWeights, two_biases: bool) -> list[Tensor]:
    order = _ORDERS[kind]
    kernels = [reordered(x, order).t().contiguous() for x in weights[:2]]
    if weights.bias_ih is None or weights.bias_hh is None:
        return kernels
    biases = [reordered(x, order) for x in (weights.bias_ih, weights.bias_hh)]
    return [*kernels, torch.stack(biases) if two_biases else biases[0] + biases[1]]


def _kind(layer: Any) -> str:
    name = type(layer).__name__
    if name not in _KINDS:
        raise TypeError(f"source: expected a Keras {', '.join(_KINDS)} or Bidirectional, got {name}")
    return _KINDS[name]


def _checked_config(layer: Any, *, reverse: bool) -> tuple[int, bool, str, bool]:
    """units, use_bias, activation and reset_after."""
    config = layer.get_config()
    kind = _kind(layer)
    allowed = ("tanh", "relu") if kind.startswith("RNN") else ("tanh",)
    expected: dict[str, tuple[Any, ...]] = {"activation": allowed, "go_backwards": (reverse,)}
    if not kind.startswith("RNN"):
        expected["recurrent_activation"] = ("sigmoid",)
    for name, values in expected.items():
        if config.get(name, values[0]) not in values:
            wanted = " or ".join(map(repr, values))
            raise ValueError(f"{name}: expected {wanted}, got {config[name]!r}")
    kinds = {"units": int, "use_bias": bool, "activation": str, "reset_after": bool}
    found = {name: config.get(name, True if name == "reset_after" else None) for name in kinds}
    for name, type_ in kinds.items():
        if type(found[name]) is not type_:
            raise ValueError(f"{name}: expected {type_.__name__} in the layer's config, got {found[name]!r:.80}")
    if found["units"] < 1:
        raise ValueError(f"units: expected a number above 0, got {found['units']}")
    return found["units"], found["use_bias"], found["activation"], found["reset_after"]
