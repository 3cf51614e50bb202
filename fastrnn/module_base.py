"""What layers and cells share: how they look to type checkers, torch.fx and torch's quantization, and which of their
calls are torch.nn's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import fallback, per_sample
from .transforms import is_overloaded

F = TypeVar("F")


def typed_as(function: F) -> Callable[[Any], F]:
    """For type checkers: a module is called as its ``forward`` is. torch.nn.Module's ``__call__`` takes anything."""
    return lambda _: function


def _given_qconfig(self: nn.Module) -> Any:
    if "qconfig" not in self.__dict__:
        raise AttributeError("qconfig")
    return self.__dict__["qconfig"]


def _give_qconfig(self: nn.Module, value: Any) -> None:
    self.__dict__["qconfig"] = value
    warnings.warn(
        f"torch.ao.quantization knows torch.nn's classes alone and leaves this fastrnn.{type(self).__name__} as it is. "
        "Before it, call fastrnn.quantize(model) for int8 weights of layers, or fastrnn.to_torch(model)",
        stacklevel=2,
    )


# torch's eager quantization gives every module of a model its ``qconfig`` and then swaps modules by their exact type.
QCONFIG = property(_given_qconfig, _give_qconfig, lambda self: self.__dict__.pop("qconfig"))


def leaf(module: nn.Module, input: Any, *args: Any, **options: Any) -> Any:
    """A call of the module in the graph that ``torch.fx`` traces: it takes torch.nn's own modules so."""
    given = {name: value for name, value in options.items() if value is not None}
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), (input, *args), given)


def is_for_torch(weight: Tensor, weights: Iterable[Tensor | None], input: Any, hx: Any) -> bool:
    """Is a call that asks for nothing of ours one that torch.nn's own forward, run on the module, has to compute?"""
    if is_overloaded(input, hx) or fallback.is_traced():
        return True
    weights = list(weights)
    if per_sample.asked_for([weights]):  # marked weights bear no look at them
        return False
    x = input.data if isinstance(input, PackedSequence) else input
    states = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
    kinds_fit = all(isinstance(y, Tensor) and not isinstance(y, PackedSequence) for y in (x, *states))
    if not kinds_fit or x.dtype != weight.dtype:  # an error, which ours tells in the caller's names
        return False
    return not fallback.has_kernels(weight, *weights, *states, x)
