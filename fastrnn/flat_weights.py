"""``_flat_weights`` of torch.nn's layers, for whoever reads or writes it: torch's own helpers, weight dropping recipes.

There is no flat buffer here. What is written becomes what the module computes with, until a parameter is set anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import RNNBase


class _FlatWeights(list[Any]):
    """What a module's ``_flat_weights`` gives: a write into it is one to the module, as it is with torch.nn's."""

    def __init__(self, weights: Iterable[Tensor | None] = (), module: HasFlatWeights | None = None) -> None:
        super().__init__(weights)
        self._module = module  # none: a list that somebody has made of one, as handlers of __torch_function__ do


def _writing(name: str) -> Any:
    method = getattr(list, name)

    def write(self: _FlatWeights, *args: Any) -> Any:
        if self._module is not None:  # a list that was taken before others were written to has their values, too
            list.__setitem__(self, slice(None), self._module._flat_weights)
        result = method(self, *args)
        if self._module is not None:
            self._module._flat_weights = list(self)
        return result

    return functools.wraps(method)(write)


for _name in ("__setitem__", "__delitem__", "__iadd__", "append", "extend", "insert", "pop", "clear"):
    setattr(_FlatWeights, _name, _writing(_name))


class HasFlatWeights(RNNBase):
    """A layer of which ``_flat_weights`` may be read and written, as torch.nn's."""

    # What was written into _flat_weights, and the attributes of that time: as long as those are in their places, it is
    # what the module computes with, as in torch.nn.
    _written: tuple[list[Any], list[Any]] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super(RNNBase, self).__setattr__(name, value)  # not RNNBase's, which writes into _flat_weights, too

    def _own_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @property
    def _flat_weights(self) -> list[Any]:  # type: ignore[override]
        self._update_flat_weights()
        return _FlatWeights(self._own_weights() if self._written is None else self._written[0], self)

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        own = self._own_weights()
        if [*map(id, weights)] == [*map(id, own)]:
            self.__dict__.pop("_written", None)
        else:
            self.__dict__["_written"] = weights, own

    def _weights_have_changed(self) -> bool:
        """Since ``_flat_weights`` was written to."""
        if self._written is None or torch.compiler.is_compiling():  # which sees other objects
            return False
        pairs = zip(self._own_weights(), self._written[1], strict=True)
        return any(x is not None and x is not before for x, before in pairs)

    def _init_flat_weights(self) -> None:
        self.__dict__.pop("_written", None)
        # No references as torch.nn's layers keep: ``torch.utils.swap_tensors`` refuses any.
        self._flat_weight_refs = [None] * len(self._flat_weights_names)

    def _named_weights(self) -> dict[str, Any] | None:
        """The weights by name where ``_flat_weights`` was written to; None where they are the attributes."""
        if self._written is not None:
            self._update_flat_weights()
        if self._written is None:
            return None
        names, weights = self._flat_weights_names, self._written[0]
        if len(weights) != len(names):
            raise RuntimeError(f"_flat_weights: expected {len(names)} tensors ({', '.join(names)}), got {len(weights)}")
        for i, (name, weight) in enumerate(zip(names, weights, strict=True)):
            if not isinstance(weight, Tensor):
                raise TypeError(f"_flat_weights[{i}] ({name}): expected a tensor, got {type(weight).__name__}")
        return dict(zip(names, weights, strict=True))

    def __setstate__(self, d: dict[str, Any]) -> None:
        d = {name: value for name, value in d.items() if name != "_flat_weights"}  # of older pickles: a list
        super().__setstate__(d)
        self._flat_weight_refs = [None] * len(self._flat_weights_names)
