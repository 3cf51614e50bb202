"""torch.nn's recurrent modules and ours in each other's places: in a model, and by name.

A module changes its class and stays the object that it was. Its parameters, hooks and parametrizations stay, and
whoever holds it or them (optimizers, other modules, two names in one model) sees the same as before.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import rnn
from torch.nn.utils import parametrize

from . import modules
from .fallback import lacking
from .options import CHANGE_RESULTS

M = TypeVar("M", bound=nn.Module)

_NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
_OURS: dict[type[nn.Module], type[nn.Module]] = {getattr(rnn, name): getattr(modules, name) for name in _NAMES}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


def convert(model: M, *, strict: bool = False) -> M:
    """Swaps every torch.nn.LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell in a model for ours, in place.

    Args:
        model: one of them, or a module that holds some at any depth. A copy of the model that stays torch's:
            ``fastrnn.convert(copy.deepcopy(model))``.
        strict: raise where a recurrent module would be left alone, and convert nothing.

    Returns:
        The model. Modules and Parameters are the same objects as before, so that optimizers, tied weights, hooks,
        parametrizations and wrappers around the model keep working; the state_dict is the same. What changes is a
        module's class: ``isinstance(m, torch.nn.LSTM)`` is False afterwards. For code that asks, see :func:`patch`.
        Tools that look a module up by its exact type find nothing: thop, ptflops, an initialiser with
        ``type(m) == nn.GRU`` (run it before), torch.ao.quantization.quantize_dynamic (which warns: call
        :func:`fastrnn.quantize` before it).

    What is left alone is told in a UserWarning, and by :func:`unconverted` at any time.

    Raises:
        TypeError: ``model`` is no module, or with ``strict`` something would be left alone.
    """
    check_module("model", model)
    left = unconverted(model)
    if left:
        told = "; ".join(f"{name or 'the module itself'} {reason}" for name, reason in left.items())
        if strict:
            raise TypeError(f"model: expected recurrent modules that can all be converted, but {told}")
        warnings.warn(f"fastrnn.convert leaves alone: {told}", stacklevel=2)
    return _swapped(model, _OURS, left)


def unconverted(model: nn.Module) -> dict[str, str]:
    """The recurrent modules of a model that :func:`convert` leaves alone: why, by name ("" is the model itself).

    Those are subclasses of torch.nn's classes (their own methods may count on torch's), modules that torch has
    quantized or scripted, modules whose ``forward`` was replaced on the instance, and those whose parameters are of a
    device, dtype or layout without kernels: they would gain nothing. A converted module that is moved there later
    computes what torch.nn's does, by torch's own ops.
    """
    check_module("model", model)
    found = ((name, _why_not(module)) for name, module in model.named_modules())
    return {name: reason for name, reason in found if reason}


def to_torch(model: M) -> M:
    """The way back: swaps every recurrent module of ours in a model for torch.nn's, in place, as :func:`convert` does.

    For what knows only torch's, as ``torch.jit.script(fastrnn.to_torch(copy.deepcopy(model)))``.

    Raises:
        TypeError: ``model`` is no module; it holds something that torch.nn has no twin for (an option of ours that is
            switched on, a quantized module, a subclass). Nothing is swapped then.
    """
    check_module("model", model)
    refused = [
        f"{name or 'the module itself'} {reason}" for name, m in model.named_modules() if (reason := _no_twin(m))
    ]
    if refused:
        raise TypeError(f"model: expected recurrent modules that torch.nn has, but {'; '.join(refused)}")
    return _swapped(model, _TORCHS, {})


_patch_lock = threading.Lock()
_patch_depth = 0


@contextlib.contextmanager
def patch() -> Iterator[None]:
    """Inside, torch.nn.LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell are ours.

    A context manager or decorator, for code that builds its modules as ``torch.nn.LSTM(...)`` or asks
    ``isinstance(m, torch.nn.LSTM)``: ours are made, and ours are instances. Modules keep their class when it ends.
    It may be entered again inside itself, and ends where an exception leaves it.

    Out of reach are names that were bound earlier (``from torch.nn import LSTM`` in a module that is imported already)
    and classes derived from torch's before. Such names bound inside keep ours afterwards. ``torch.nn.modules.rnn``
    keeps torch's classes, so that they can be pickled inside. The names change for all threads.

    ``torch._dynamo.config.allow_rnn`` is True inside, in this thread: torch.compile refuses instances of torch.nn.LSTM,
    which ours then are.
    """
    import torch._dynamo  # before the names change: it may look at them

    global _patch_depth
    with torch._dynamo.config.patch(allow_rnn=True):
        with _patch_lock:
            _patch_depth += 1
            if _patch_depth == 1:
                _rename(_OURS)
        try:
            yield
        finally:
            with _patch_lock:
                _patch_depth -= 1
                if _patch_depth == 0:
                    _rename({torchs: torchs for torchs in _OURS})


def _rename(classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for torchs, cls in classes.items():
        for namespace in (torch.nn, torch.nn.modules):
            setattr(namespace, torchs.__name__, cls)


def check_module(name: str, module: Any) -> None:
    if not isinstance(module, nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"{name}: expected a torch.nn.Module, got {got}")


def _plain_type(module: nn.Module) -> type[nn.Module]:
    """The class without its parametrizations."""
    return parametrize.type_before_parametrizations(module)


def _why_not(module: nn.Module) -> str:
    """Why a recurrent module cannot be converted; "" for others."""
    cls = _plain_type(module)
    if cls in _OURS:
        return "has a forward of its own, set on the instance" if "forward" in vars(module) else lacking(module)
    for torchs in _OURS:
        if issubclass(cls, torchs):
            return f"is a {_full_name(cls)}, derived from torch.nn.{torchs.__name__}"
    scripted = getattr(module, "original_name", None) if isinstance(module, torch.jit.ScriptModule) else None
    if scripted in _NAMES:
        return f"is a torch.nn.{scripted} scripted by torch.jit"
    if cls.__module__.startswith("torch.ao.nn.") and any(
        base.__name__ in (*_NAMES, "RNNBase", "RNNCellBase") for base in cls.__mro__
    ):
        return f"is a {_full_name(cls)}"
    return ""


def _no_twin(module: nn.Module, may_have: Sequence[str] = ()) -> str:
    """Why a recurrent module of ours has no twin in torch.nn; "" for others. may_have: options that are no reason."""
    cls = _plain_type(module)
    if cls not in _TORCHS:
        return f"is a {_full_name(cls)}" if isinstance(module, (modules._Recurrent, *_TORCHS)) else ""
    if "forward" in vars(module):
        return "has a forward of its own, set on the instance"
    options = set(CHANGE_RESULTS).difference(may_have)
    on = [name for name in sorted(options) if getattr(module, name, None) != getattr(cls, name, None)]
    return f"has {', '.join(f'{name}={getattr(module, name)!r}' for name in on)}" if on else ""


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _swapped(model: M, classes: dict[type[nn.Module], type[nn.Module]], left: dict[str, str]) -> M:
    found = [(m, _plain_type(m)) for name, m in model.named_modules() if name not in left]
    for module, new in [(m, classes[cls]) for m, cls in found if cls in classes]:
        layer, written = isinstance(module, nn.RNNBase), None
        if parametrize.is_parametrized(module):  # torch gave it a class of its own, with a property for each
            own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
            new = type(f"Parametrized{new.__name__}", (new,), own)
        elif layer:  # what somebody wrote there; of parametrized ones torch's forward left computed weights
            module._update_flat_weights()
            written = module._flat_weights
        module.__dict__.pop("_flat_weights", None)  # ours make theirs when asked
        module.__class__ = new
        if layer:
            module._init_flat_weights()
            if written is not None:
                module._flat_weights = list(written)
    return model
