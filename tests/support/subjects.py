"""The modules that the checks run on, of both libraries, with every option, and how each is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from tests.helpers import build, state_shapes
from tests.transform_cases import Function, modules_by_reference

LIBRARIES = {"fastrnn": fastrnn, "torch.nn": nn}
LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
KINDS = LAYERS + CELLS

# What a module is made and called with. "call" options are arguments of forward.
OPTIONS: dict[str, dict[str, Any]] = {
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "proj_size": {"proj_size": 2},
    "bias=False": {"bias": False},
    "batch_first": {"batch_first": True},
    "dropout": {"num_layers": 2, "dropout": 0.5},
    "weight_dropout": {"weight_dropout": 0.5},
    "locked_dropout": {"num_layers": 2, "locked_dropout": 0.5},
    "recurrent_dropout": {"recurrent_dropout": 0.5},
    "zoneout": {"zoneout": 0.3},
    "residual": {"num_layers": 3, "residual": True},
    "unbatched": {},
    "PackedSequence": {},
    "initial state": {},
    "lengths": {},
    "resets": {},
    "reset_state": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}
OURS_DRAW = ("weight_dropout", "locked_dropout", "recurrent_dropout", "zoneout")
OURS_ALONE = ("lengths", "resets", "reset_state", *OURS_DRAW, "residual")
RANDOM = ("dropout", *OURS_DRAW)
PLAIN = ""


@dataclass(frozen=True)
class Subject:
    """A module of one library, and how it is called: always with x [T, B, I], whatever the option."""

    library: str
    kind: str
    option: str = PLAIN
    device: str = "cpu"
    sizes: tuple[int, int] = (2, 3)  # I, H

    @property
    def is_cell(self) -> bool:
        return self.kind in CELLS

    @property
    def dtype(self) -> torch.dtype:
        return OPTIONS.get(self.option, {}).get("dtype", torch.float32)

    @property
    def tolerance(self) -> float:
        return {torch.float64: 1e-8, torch.float32: 1e-4}.get(self.dtype, 0.05)

    def _make(self, library: str) -> nn.Module:
        torch.manual_seed(2)
        options = {"dtype": self.dtype} | OPTIONS.get(self.option, {})
        return build(LIBRARIES[library], self.kind, *self.sizes, device=self.device, **options)

    @cached_property
    def module(self) -> nn.Module:
        return self._make(self.library)

    @cached_property
    def twin(self) -> nn.Module:
        """fastrnn's module with the same parameters, to be run by the reference."""
        twin = self._make("fastrnn")
        twin.load_state_dict(self.module.state_dict())
        return twin

    def x(self, T: int = 3, B: int = 2) -> Tensor:
        """The same numbers in every dtype, up to rounding."""
        count = T * B * self.sizes[0]
        return torch.arange(count, device=self.device).reshape(T, B, -1).add(0.3).sin().to(self.dtype)

    def state(self, B: int, step: float) -> Any:
        """A state made of the sizes alone, so that under vmap every sample has the same."""
        layers = OPTIONS.get(self.option, {}).get("num_layers", 1)
        hidden, proj = self.sizes[1], OPTIONS.get(self.option, {}).get("proj_size", 0)
        leading = (B,) if self.is_cell else (layers, B)
        shapes = state_shapes(self.kind, *leading, hidden=hidden, proj=proj)
        made = tuple(torch.ones(s, device=self.device, dtype=self.dtype).cumsum(-1).mul(step).cos() for s in shapes)
        return made if len(made) > 1 else made[0]

    def call(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """output, h_n and c_n of a layer, h and c of a cell, whatever the option's form of input."""
        T, B = x.shape[:2]
        option, keywords, arguments = self.option, {}, ()
        if option in ("resets", "reset_state"):
            keywords["resets"] = (torch.arange(T * B, device=x.device) % 2 == 1).reshape(T, B)
        if option == "reset_state":
            keywords["reset_state"] = self.state(B, 0.4)
        if option == "lengths":
            keywords["lengths"] = (torch.arange(B, device=x.device) + 1) % (T + 1)
        if option == "initial state" or self.is_cell:
            arguments = (self.state(B, 0.7),)
        given: Any = x
        if self.is_cell:
            given = x[0]
        elif option == "batch_first":
            given = x.transpose(0, 1)
        elif option == "unbatched":
            given = x[:, 0]
        elif option == "PackedSequence":
            given = packed(x)
        result = module(given, *arguments, **keywords)
        output, *finals = result if isinstance(result, tuple) and not self.is_cell else (result,)
        leaves = torch.utils._pytree.tree_leaves((output, finals))
        if option == "PackedSequence":
            leaves = [leaf for leaf in leaves if leaf is not None and leaf.is_floating_point()]
        return tuple(leaves)

    def function(self, module: nn.Module) -> tuple[Function, dict[str, Tensor]]:
        """(parameters, x) -> results, and the parameters."""
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        class Called(nn.Module):  # functional_call gives the parameters to all of `call`
            def __init__(self) -> None:
                super().__init__()
                self.inner = module

            def forward(self, subject: Subject, x: Tensor) -> tuple[Tensor, ...]:
                return subject.call(self.inner, x)

        called = Called()

        def run(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
            return functional_call(called, {f"inner.{k}": p for k, p in parameters.items()}, (self, x))

        return run, parameters

    def same(self, compute: Callable[[nn.Module], Any]) -> Any:
        """`compute` gives the same for the module and for its twin on the reference; returns what it gives."""
        torch.manual_seed(3)
        actual = compute(self.module)
        torch.manual_seed(3)
        with modules_by_reference():
            expected = compute(self.twin)
        assert_near(actual, expected, self.tolerance)
        return actual


def packed(x: Tensor) -> PackedSequence:
    """x with one step less in each row than in the row before it, made of ops that every transform knows."""
    T, B = x.shape[:2]
    kept = [(t, b) for t in range(T) for b in range(B) if b < T - t or b == 0]
    sizes = torch.tensor([sum(t == u for u, _ in kept) for t in range(T)])
    rows = torch.tensor([t * B + b for t, b in kept], device=x.device)
    return PackedSequence(x.reshape(T * B, -1).index_select(0, rows), sizes)


def assert_near(actual: Any, expected: Any, tolerance: float) -> None:
    """Same shapes and dtypes; each tensor's error within `tolerance` of its norm or of 1."""
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (actual, expected)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        error = (a - b).norm()
        assert error <= tolerance * max(1, b.norm()), f"wrong result: off by {error:.2g}"  # so NaN fails


def wide(subject: Subject) -> Subject:
    """The same with sizes that no other dimension has: a compiler takes equal ones for one symbol."""
    return replace(subject, sizes=(8, 12))
