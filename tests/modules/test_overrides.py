"""Inputs with a ``__torch_function__`` of their own: their handler sees the call that torch.nn's modules make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import CELL_KINDS, KINDS, build, make_state, map_state, pair, randn, tensors

ANY_KIND = pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])
calls: list[str] = []


def unwrapped(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)(map(unwrapped, x))
    return x._data if isinstance(x, Like) else x


def wrapped(x: Any) -> Any:
    if isinstance(x, (tuple, list)) and not isinstance(x, torch.Size):
        return tuple(map(wrapped, x))
    return Like(x) if isinstance(x, Tensor) else x


class Like:
    """Holds a tensor, and is none."""

    def __init__(self, data: Tensor) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._data, name)
        return (lambda *args: wrapped(found(*unwrapped(args)))) if callable(found) else wrapped(found)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        calls.append(func.__name__)
        return wrapped(func(*unwrapped(args), **(kwargs or {})))


class Watched(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        calls.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


MAKES = {"tensor-like": Like, "subclass": lambda x: x.as_subclass(Watched)}


def arguments(kind: str) -> tuple[Tensor, Any]:
    if "Cell" in kind:
        return randn(3, 4), make_state(kind, 3, hidden=6)
    return randn(5, 3, 4), make_state(kind, 1, 3, hidden=6)


@ANY_KIND
@pytest.mark.parametrize("how", MAKES)
@pytest.mark.parametrize("where", ["input", "both", "state"])
def test_the_handler_sees_torchs_call(kind: str, how: str, where: str) -> None:
    found = []
    for module in pair(kind, 4, 6, dtype=torch.float64):
        x, hx = arguments(kind)
        args = [x] if where == "input" else [x, hx]
        if where != "state":
            args[0] = MAKES[how](x)
        if where != "input":
            args[1] = map_state(MAKES[how], hx)
        calls.clear()
        after = module(*args)
        recurrent = [name for name in calls if name.startswith(("lstm", "gru", "rnn"))]
        results = [y for each in tensors(after) for y in tensors(each)]
        found.append((recurrent, [type(y) for y in results], [unwrapped(y).as_subclass(Tensor) for y in results]))
    (ours, our_types, our_results), (theirs, their_types, their_results) = found
    assert ours == theirs
    assert len(ours) == 1
    assert our_types == their_types
    for a, b in zip(our_results, their_results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_does_not_have_is_ours_to_say(kind: str) -> None:
    """With an option of ours there is no call of torch's: a subclass is computed with, a tensor-like refused."""
    import fastrnn

    module = build(fastrnn, kind, 4, 6, dtype=torch.float64)
    x, lengths = randn(5, 3, 4), torch.tensor([5, 2, 3])
    output, _ = module(x.as_subclass(Watched), lengths=lengths)
    torch.testing.assert_close(output.as_subclass(Tensor), module(x, lengths=lengths)[0])
    with pytest.raises(TypeError, match=r"^input: expected a tensor or a PackedSequence, got Like$"):
        module(Like(x), lengths=lengths)
