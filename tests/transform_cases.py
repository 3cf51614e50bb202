"""What test_transforms_*.py share: calls of the op that are small enough for numeric derivatives, the same
calls through fastrnn.reference, modules, and counts of what ran.

The 45 checks that the construct in fastrnn/autograd.py was chosen by have ids, r01 .. r11, which stand in
brackets in the docstrings of their tests.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import layer, modules, products, reference
from fastrnn.ops import CELLS, recurrent_backward, recurrent_backward_jvp, recurrent_forward, recurrent_forward_jvp
from tests.helpers import as_c

layer_forward = torch.ops.fastrnn.layer_forward.default
layer_backward = torch.ops.fastrnn.layer_backward.default

Function = Callable[..., Any]
CELL_NAMES = tuple(CELLS)


# ---- calls of the op ----

_ARGUMENTS = [
    "gates_ih", "weight_hh", "bias_hh", "weight_hr", "params", "h_0", "c_0", "lengths", "resets", "reset_h", "reset_c",
    "mask_h", "keep_h", "keep_c",
]  # fmt: skip
_CONSTANTS = _ARGUMENTS[-3:]


@dataclass(frozen=True)
class Case:
    """One call of the op. Its functions take some first of `tensors`; the others are as given here."""

    cell: str
    reverse: tuple[bool, ...]
    tensors: dict[str, Tensor]  # by argument: differentiable ones first, then lengths, resets, and the masks

    @property
    def names(self) -> tuple[str, ...]:
        """The differentiable arguments."""
        return tuple(name for name, x in self.tensors.items() if x.is_floating_point() and name not in _CONSTANTS)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors[name] for name in self.names)

    def arguments(self, *given: Any) -> tuple[Any, ...]:
        """The op's arguments, without `save`."""
        named: dict[str, Any] = self.tensors | dict(zip(self.tensors, given, strict=False))
        return (self.cell, *map(named.get, _ARGUMENTS), list(self.reverse))

    def fused(self, *given: Any) -> tuple[Tensor, ...]:
        """output, h_n and, for cells that have it, c_n by the op."""
        return recurrent_forward(*self.arguments(*given), False)[: 1 + CELLS[self.cell].tensors]

    def composite(self, *given: Any) -> tuple[Tensor, ...]:
        """The same by the reference, which torch differentiates."""
        return reference.forward(*self.arguments(*given))[: 1 + CELLS[self.cell].tensors]


def make_case(
    cell: str,
    *,
    T: int = 3,
    B: int = 2,
    h: int = 0,
    reverse: tuple[bool, ...] = (False, True),
    bias: bool = True,
    projection: int = 0,
    lengths: str = "",
    resets: str = "",
    reset_state: bool = False,
    noise: bool = False,
    requires_grad: bool = True,
) -> Case:
    """Random arguments in float64. h: 2, or 3 where units are normalised, of which two are hardly more than 1 and -1.
    `lengths` and `resets` are "", or "rows" or "groups": what has its own values.
    noise: recurrent dropout, and zoneout with any probabilities."""
    h = h or (3 if cell.endswith("_norm") else 2)
    P, G, R = len(reverse), CELLS[cell].gates, projection or h
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, scale: float = 0.7) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    relu = cell in ("rnn_relu", "ligru")  # small recurrent weights and large gates keep its argument off the kink
    scale = 0.1 if relu else 0.7
    gates = normal(T, B, P * G * h)
    tensors = {"gates_ih": gates.sign() * (1 + gates.abs().clamp(max=1)) if relu else gates}
    tensors["weight_hh"] = normal(P, G * h, R, scale=scale)
    if bias:
        tensors["bias_hh"] = normal(P, G * h, scale=scale)
    if projection:
        tensors["weight_hr"] = normal(P, R, h)
    if CELLS[cell].params:
        tensors["params"] = normal(P, CELLS[cell].params, h)
    widths = dict(zip("hc", CELLS[cell].widths(R, h), strict=False))
    states = tuple(widths)
    for which in ("{}_0", "reset_{}")[: 1 + reset_state]:
        for name in states:
            state = normal(B, P * widths[name])
            tensors[which.format(name)] = state if name == "h" else as_c(cell, state, P)
    tensors = {name: x.requires_grad_(requires_grad) for name, x in tensors.items()}
    if lengths:
        shape = (B,) if lengths == "rows" else (B, P)
        count = math.prod(shape)
        tensors["lengths"] = torch.tensor([T, 1, 0, T - 1]).repeat(count)[:count].reshape(shape)
    if resets:
        shape = (T, B) if resets == "rows" else (T, B, P)
        tensors["resets"] = torch.rand(shape, generator=generator) < 0.4
    if noise:
        tensors["mask_h"] = (torch.rand(B, P * R, generator=generator) < 0.6) / 0.6
        for name in states if CELLS[cell].zoneout else ():
            tensors[f"keep_{name}"] = torch.rand(T, B, P * widths[name], generator=generator)
        tensors |= {name: tensors[name].double() for name in _CONSTANTS if name in tensors}
    return Case(cell, reverse, tensors)


def backward_arguments(
    case: Case, *, given: Sequence[bool] = (True, True, True), initial: bool = True, requires_grad: bool = False
) -> list[Any]:
    """What recurrent_backward takes after a call: gradients of output, h_n and c_n where `given`, and all else."""
    results = recurrent_forward(*case.arguments(), True)
    grads = [y.cos() if use and y.numel() else None for y, use in zip(results[:3], given, strict=True)]
    cell, _, weight_hh, _, *shared = case.arguments()
    args = [cell, *grads, weight_hh, *shared, results[0], results[3], initial]
    floating = [isinstance(x, Tensor) and x.is_floating_point() for x in args]
    return [
        x.detach().clone().requires_grad_(requires_grad) if floats else x
        for x, floats in zip(args, floating, strict=True)
    ]


# Ways to call the op that differ in the path taken through it.
_EVERYTHING = {"lengths": "groups", "resets": "groups", "reset_state": True, "noise": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"reverse": (False,)},
    "reversed": {"reverse": (True,), "bias": False},
    "both-directions": {},
    "one-step": {"T": 1},
    "many-rows": {"T": 18, "h": 1},  # enough for the weight gradients to take the kernels' own matrix product
    "five-groups": {"reverse": (False, True, True, False, True), "B": 1},
    "lengths": {"lengths": "rows"},
    "resets": {"resets": "rows"},
    "resets-to-state": {"resets": "rows", "reset_state": True},
    "noise": {"noise": True},
    "everything": _EVERYTHING,
    "projection": {"projection": 3, "h": 2},
    "projection-everything": {"projection": 1, **_EVERYTHING},
}


def variants(*names: str, cells: Sequence[str] = CELL_NAMES) -> pytest.MarkDecorator:
    """Parametrizes a test over `cell` and `options` of make_case: these variants, by default all of them."""
    chosen = names or tuple(VARIANTS)
    return pytest.mark.parametrize(
        ("cell", "options"),
        [
            pytest.param(cell, VARIANTS[name], id=f"{cell}-{name}")
            for cell in cells
            for name in chosen
            if cell == "lstm" or "projection" not in VARIANTS[name]
        ],
    )


every_cell = pytest.mark.parametrize("cell", CELL_NAMES)


# ---- modules ----

# Sizes differ from each other and from the batches of the tests, or the compiler takes them for one symbol.
_MODULES: dict[str, Callable[..., torch.nn.Module]] = {
    "lstm": lambda **kw: fastrnn.LSTM(8, 12, num_layers=2, bidirectional=True, **kw),
    "lstm-projected": lambda **kw: fastrnn.LSTM(8, 12, proj_size=7, **kw),
    "gru": lambda **kw: fastrnn.GRU(8, 12, bidirectional=True, **kw),
    "rnn_tanh": lambda **kw: fastrnn.RNN(8, 12, **kw),
    "rnn_relu": lambda **kw: fastrnn.RNN(8, 12, nonlinearity="relu", bias=False, **kw),
}
every_module = pytest.mark.parametrize("kind", tuple(_MODULES))


def make_module(kind: str, **options: Any) -> torch.nn.Module:
    """Input size 8; its calls of the op are one a layer."""
    torch.manual_seed(2)
    return _MODULES[kind](**options)


def calls_of(module: torch.nn.Module) -> int:
    """How often a forward of the module calls the op."""
    return module.num_layers


def final_states(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


@contextlib.contextmanager
def modules_by_reference() -> Iterator[None]:
    """Within it, fastrnn's modules and functions run the reference in place of the op, and ATen's products."""
    calls = 0

    def by_reference(has_kernels: bool, *read: Tensor | None) -> str:
        nonlocal calls
        calls += 1
        return "reference"

    with pytest.MonkeyPatch.context() as patch:
        for module in (layer, modules):
            patch.setattr(module, "road", by_reference)
        patch.setattr(fastrnn._C, "module_forward", lambda *call: None)
        patch.setattr(products, "_has_gemm", lambda *tensors: False)
        patch.setattr(products, "is_vmapped_call", lambda *tensors: False)
        yield
    assert calls, "the modules did not take the reference"


# ---- what tests do with them ----


def loss_of(function: Function) -> Function:
    """A scalar that every element of every result changes, each differently."""

    def loss(*inputs: Any, **keywords: Any) -> Tensor:
        leaves = torch.utils._pytree.tree_leaves(function(*inputs, **keywords))
        return sum((weight * y.sin()).sum() for weight, y in enumerate(leaves, 1))

    return loss


def gradients(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(function)(*inputs), inputs)


def results_and_gradients(
    function: Function, inputs: Sequence[Tensor], *args: Any, **keywords: Any
) -> tuple[Any, tuple[Tensor, ...]]:
    """Of one call with these arguments; `inputs` are what its gradients are of."""
    results = function(*args, **keywords)
    return results, torch.autograd.grad(loss_of(lambda: results)(), inputs)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def count_calls() -> Iterator[collections.Counter[str]]:
    """Counts what runs in the end, below autograd and all functorch transforms.

    Keys: "forward" and "backward" for calls of the kernels, and "forward jvp" and "backward jvp" for those with
    tangents; "composite forward" and "composite backward" for steps of the reference, seen at its cells, so that it
    does not matter who holds its functions.
    """
    seen: collections.Counter[str] = collections.Counter()
    kernels = dict.fromkeys((recurrent_forward, layer_forward), "forward")
    kernels |= dict.fromkeys((recurrent_backward, layer_backward), "backward")
    kernels |= {recurrent_forward_jvp: "forward jvp", recurrent_backward_jvp: "backward jvp"}

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in kernels:
                seen[kernels[func]] += 1
            return func(*args, **(kwargs or {}))

    def counted(key: str, step: Function) -> Function:
        def count_and_step(*args: Any) -> Any:
            seen[key] += 1
            return step(*args)

        return count_and_step

    with pytest.MonkeyPatch.context() as patch:
        for name, rule in list(reference.CELLS.items()):
            steps = {"forward": rule.forward, "backward": rule.backward}
            counting = {way: counted(f"composite {way}", step) for way, step in steps.items()}
            patch.setitem(reference.CELLS, name, rule._replace(**counting))
        with Mode():
            yield seen


FUSED = {"forward": 1, "backward": 1}  # what count_calls sees of one fused training step


def calls_in(*graphs: torch.fx.Graph) -> dict[str, int]:
    """Calls of the kernels as count_calls has them, of graphs that must hold no composite."""
    names = [str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"]
    ops = {"forward": (recurrent_forward, layer_forward), "backward": (recurrent_backward, layer_backward)}
    calls = {way: sum(names.count(str(op)) for op in each) for way, each in ops.items()}
    # The gradient of weight_hr takes tanh(c) once; a composite has one a step and more.
    assert sum("tanh" in name or "sigmoid" in name for name in names) <= calls["backward"]
    return {way: count for way, count in calls.items() if count}
