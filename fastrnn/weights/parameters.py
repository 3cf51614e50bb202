"""The parameters of a module by layer and direction, in another runtime's order of gates.

A runtime's order is written as a permutation: its k-th gate is torch's ``order[k]``-th.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from ..ops import CELLS
from ..options import OF_TRAINING
from ..records import LayerWeights, name_of
from ..swap import _TORCHS, _no_twin, _plain_type

Module = nn.RNNBase | RNNCellBase
Cell = str  # 'LSTM', 'GRU' or 'RNN'


def check_module(name: str, module: Any, may_have: Sequence[str] = ()) -> Cell:
    """A module or cell of ours, or torch.nn's, without options that torch.nn lacks, but for those that it may have and
    those of training.
    """
    if not isinstance(module, Module) or _plain_type(module) not in (*_TORCHS, *_TORCHS.values()):
        reason = _no_twin(module) if isinstance(module, nn.Module) else ""
        got = reason.removeprefix("is a ") or type(module).__name__
        raise TypeError(f"{name}: expected an LSTM, GRU or RNN or a cell of fastrnn or torch.nn, got {got}")
    if _plain_type(module) in _TORCHS and (reason := _no_twin(module, (*may_have, *OF_TRAINING))):
        raise ValueError(f"{name}: expected nothing that torch.nn lacks, but it {reason}")
    if getattr(module, "proj_size", 0):
        raise ValueError(f"{name}: expected proj_size=0, got {module.proj_size}: there is none elsewhere")
    kind = _plain_type(module).__name__.removesuffix("Cell")
    assert kind in ("LSTM", "GRU", "RNN")
    return kind


def gates(kind: Cell) -> int:
    return CELLS["rnn_tanh" if kind == "RNN" else kind.lower()].gates


def names(module: Module) -> list[list[str]]:
    """``[layer][direction]``: what comes after "weight_ih" in the names of parameters."""
    if isinstance(module, RNNCellBase):
        return [[""]]
    suffixes = ("", "_reverse") if module.bidirectional else ("",)
    return [[f"_l{layer}{suffix}" for suffix in suffixes] for layer in range(module.num_layers)]


def directions(module: Module) -> Iterator[list[LayerWeights]]:
    """The weights of each layer, one a direction, detached."""
    stems = [name_of(field, getattr(module, "_cell", "")) for field in LayerWeights._fields]
    for layer in names(module):
        found = [[getattr(module, stem + suffix, None) for stem in stems] for suffix in layer]
        yield [LayerWeights(*(None if x is None else x.detach() for x in each)) for each in found]  # type: ignore[arg-type]


def reordered(x: Tensor, order: Sequence[int]) -> Tensor:
    """x [G*H, ...] with torch's gate ``order[k]`` at place k."""
    return x.unflatten(0, (len(order), -1))[list(order)].flatten(0, 1)


def restored(x: Tensor, order: Sequence[int]) -> Tensor:
    """The way back."""
    return reordered(x, [order.index(k) for k in range(len(order))])


def tensor(name: str, x: Any) -> Tensor:
    """A tensor with a copy of an array; NumPy's bfloat16 of ml_dtypes included."""
    if isinstance(x, Tensor):
        found = x.detach().clone()
    elif getattr(getattr(x, "dtype", None), "name", "") == "bfloat16":
        found = torch.tensor(x.astype("float32")).to(torch.bfloat16)
    else:
        try:
            found = torch.tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:  # of whatever stands in a file in an array's place
            of = getattr(x, "dtype", type(x).__name__)
            raise ValueError(f"{name}: expected an array of numbers, got {of}") from error
    if found.is_complex():
        raise ValueError(f"{name}: expected an array of real numbers, got {found.dtype}")
    return found


def check_rank(name: str, x: Tensor, sizes: str) -> None:
    """Of an array of a float dtype; sizes: as a message tells them, "[D, B, H]"."""
    if x.dim() != sizes.count(",") + 1:
        raise ValueError(f"{name}: expected {sizes}, got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a float dtype, got {x.dtype}")


def copy_into(module: Module, weights: Sequence[Sequence[LayerWeights]]) -> None:
    """``weights[layer][direction]`` into the parameters: all of them, or with an error none."""
    plan: list[tuple[Tensor, Tensor]] = []
    for layer, suffixes in zip(weights, names(module), strict=True):
        for each, suffix in zip(layer, suffixes, strict=True):
            for field, x in zip(each._fields, each, strict=True):
                if x is None:
                    continue
                name = name_of(field, getattr(module, "_cell", "")) + suffix
                parameter = module._parameters.get(name)
                if parameter is None:
                    raise ValueError(
                        f"module: expected {name} to be a parameter; "
                        "remove its parametrization, weight norm or pruning first"
                    )
                if parameter.shape != x.shape:
                    raise ValueError(f"{name}: expected {list(parameter.shape)}, got {list(x.shape)}")
                plan.append((parameter, x))
    with torch.no_grad():
        for target, x in plan:
            target.copy_(x)
