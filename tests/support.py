"""What docs/support.md says, as one list: checks, each run on fastrnn's modules and, unchanged, on torch.nn's.

A case is a kind of module, an option and a check. ``tests/test_support.py`` runs every case. Those in
``tests/support_failures.json`` must fail, with the error that stands there, and all others must pass: so the page,
which is written from these lists, cannot be out of date.

    python -m tests.support --measure    runs every case and writes support_failures.json, then the page
    python -m tests.support --write      writes docs/support.md
"""

from __future__ import annotations

import argparse
import io
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim, export
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

import fastrnn

from .helpers import build, state_shapes
from .transform_cases import Function, loss_of, modules_by_reference

PAGE = Path(__file__).parent.parent / "docs/support.md"
RECORD = Path(__file__).parent / "support_failures.json"  # {case id: the error}
LIBRARIES = {"fastrnn": fastrnn, "torch.nn": nn}
LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
KINDS = LAYERS + CELLS

# ---- modules and how they are called ----

# What a module is made and called with. "call" options are arguments of forward.
OPTIONS: dict[str, dict[str, Any]] = {
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "proj_size": {"proj_size": 2},
    "bias=False": {"bias": False},
    "batch_first": {"batch_first": True},
    "dropout": {"num_layers": 2, "dropout": 0.5},
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
OURS_ALONE = ("lengths", "resets", "reset_state")
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


# ---- the checks ----

CHECKS: dict[str, Callable[[Subject], None]] = {}
TITLES: dict[str, str] = {}


def check(title: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Enters a check under its function's name, with what the page calls it."""

    def enter(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CHECKS[function.__name__], TITLES[function.__name__] = function, title
        return function

    return enter


def gradients(s: Subject, module: nn.Module, **options: Any) -> tuple[Tensor, ...]:
    x = s.x().requires_grad_()
    return torch.autograd.grad(loss_of(s.call)(module, x), (x, *module.parameters()), **options)


def numeric(s: Subject, **options: Any) -> None:
    """gradgradcheck by the input and every parameter at once, in float64."""
    s = replace(s, option="float64")
    run, parameters = s.function(s.module)
    names = list(parameters)
    inputs = (s.x(2, 1), *parameters.values())

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return run(dict(zip(names, values, strict=True)), x)

    assert gradgradcheck(function, tuple(x.detach().requires_grad_() for x in inputs), **options)


@check("backward")
def backward(s: Subject) -> None:
    assert all(g.any() for g in s.same(partial(gradients, s)))


@check("backward in eval mode")
def backward_in_eval(s: Subject) -> None:
    s.same(lambda module: gradients(s, module.eval()))


@check("double backward")
def double_backward(s: Subject) -> None:
    def second(module: nn.Module) -> tuple[Tensor, ...]:
        x = s.x().requires_grad_()
        inputs = (x, *module.parameters())
        first = torch.autograd.grad(loss_of(s.call)(module, x), inputs, create_graph=True)
        return torch.autograd.grad(loss_of(lambda: first)(), inputs)

    s.same(second)


@check("`gradgradcheck`")
def gradgradcheck_passes(s: Subject) -> None:
    numeric(s)


@check("third order")
def third_order(s: Subject) -> None:
    def third(module: nn.Module) -> tuple[Tensor, ...]:
        x = s.x(2, 1).requires_grad_()
        y = loss_of(s.call)(module, x)
        for _ in range(2):
            y = loss_of(lambda y=y: torch.autograd.grad(y, (x, *module.parameters()), create_graph=True))()
        return torch.autograd.grad(y, (x, *module.parameters()))

    s.same(third)


@check("`torch.autograd.forward_ad`")
def dual_numbers(s: Subject) -> None:
    def tangents(module: nn.Module) -> list[Tensor]:
        run, parameters = s.function(module)
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(p, p.cos()) for name, p in parameters.items()}
            results = run(duals, forward_ad.make_dual(s.x(), s.x().cos()))
            return [forward_ad.unpack_dual(y).tangent for y in results]

    assert all(t is not None and t.any() for t in s.same(tangents))


@check("`torch.func.jvp`")
def func_jvp(s: Subject) -> None:
    def tangents(module: nn.Module) -> Any:
        run, parameters = s.function(module)
        along = {name: p.cos() for name, p in parameters.items()}
        return jvp(run, (parameters, s.x()), (along, s.x().cos()))

    assert all(t.any() for t in s.same(tangents)[1])


@check("forward over reverse")
def forward_over_reverse(s: Subject) -> None:
    def product(module: nn.Module) -> Any:
        run, parameters = s.function(module)
        along = {name: p.cos() for name, p in parameters.items()}
        return jvp(grad(loss_of(run)), (parameters, s.x()), (along, s.x().cos()))

    s.same(product)


@check("`gradcheck` of forward mode, `gradgradcheck` of forward over reverse")
def forward_gradcheck(s: Subject) -> None:
    s = replace(s, option="float64")
    run, parameters = s.function(s.module)
    x = s.x(2, 1).requires_grad_()
    assert gradcheck(partial(run, parameters), (x,), check_forward_ad=True, check_batched_forward_grad=True)
    numeric(s, check_fwd_over_rev=True, check_undefined_grad=False)


@check("`is_grads_batched`")
def batched_gradients(s: Subject) -> None:
    def batched(module: nn.Module) -> tuple[Tensor, ...]:
        x = s.x().requires_grad_()
        output = s.call(module, x)[0]
        grads = torch.stack([output.detach().cos(), output.detach().sin()])
        return torch.autograd.grad(output, (x, *module.parameters()), grads, is_grads_batched=True)

    s.same(batched)


@check("`retain_graph`, several backward passes")
def several_backwards(s: Subject) -> None:
    def twice(module: nn.Module) -> list[Tensor]:
        x, parameters = s.x().requires_grad_(), list(module.parameters())
        results = s.call(module, x)
        loss_of(lambda: results)().backward(retain_graph=True)
        first = [p.grad.clone() for p in parameters]
        results[0].square().sum().backward(retain_graph=True)  # another loss, added to the gradients
        loss_of(lambda: results)().backward()
        return [*first, *(p.grad for p in parameters), x.grad]

    s.same(twice)


@check("`backward(inputs=)`, frozen parameters")
def some_inputs(s: Subject) -> None:
    def some(module: nn.Module) -> list[Tensor]:
        names = dict(module.named_parameters())
        found = []
        for name, p in names.items():
            loss_of(s.call)(module, s.x()).backward(inputs=[p])
            assert [n for n, q in names.items() if q.grad is not None] == [name]
            found.append(p.grad)
            p.grad = None
        frozen = next(iter(names.values()))
        frozen.requires_grad_(False)
        loss_of(s.call)(module, s.x()).backward()
        assert frozen.grad is None
        return [*found, *(p.grad for p in list(names.values())[1:])]

    s.same(some)


@check("each result alone")
def unused_outputs(s: Subject) -> None:
    def alone(module: nn.Module) -> list[Any]:
        x = s.x().requires_grad_()
        count = len(s.call(module, x))
        inputs = (x, *module.parameters())
        return [torch.autograd.grad(s.call(module, x)[i].sin().sum(), inputs) for i in range(count)]

    s.same(alone)


@check("hooks of tensors, parameters and modules")
def hooks(s: Subject) -> None:
    def hooked(module: nn.Module) -> list[Tensor]:
        x, seen = s.x().requires_grad_(), []
        parameter = next(module.parameters())
        handles = [
            parameter.register_hook(lambda g: seen.append(g.clone()) or g * 2),
            parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone())),
            module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:])),
            module.register_forward_hook(lambda m, args, result: seen.append(args[0].detach())),
            module.register_full_backward_hook(lambda m, g_in, g_out: seen.append(g_in[0].clone())),
        ]
        results = s.call(module, x)
        results[0].register_hook(lambda g: g + 1)
        loss_of(lambda: results)().backward()
        for handle in handles:
            handle.remove()
        assert len(seen) == 4
        return [x.grad, *(p.grad for p in module.parameters()), *seen]

    s.same(hooked)


@check("`saved_tensors_hooks`, `save_on_cpu`")
def saved_tensors(s: Subject) -> None:
    def saved(module: nn.Module) -> list[Tensor]:
        found = []
        for context in (
            torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
            torch.autograd.graph.save_on_cpu(),
        ):
            with context:
                x = s.x().requires_grad_()
                loss = loss_of(s.call)(module, x)
            found += torch.autograd.grad(loss, (x, *module.parameters()))
        return found

    s.same(saved)


@check("`checkpoint`, both kinds")
def checkpoints(s: Subject) -> None:
    def recomputed(module: nn.Module) -> list[Tensor]:
        found = []
        for reentrant in (True, False):
            module.zero_grad()
            x = s.x().requires_grad_()
            results = checkpoint(lambda x: s.call(module, x), x, use_reentrant=reentrant)
            loss_of(lambda: results)().backward()
            found += [x.grad, *(p.grad for p in module.parameters())]
        return found

    s.same(recomputed)


@check("`vmap` over the input, any `in_dims`")
def vmap_input(s: Subject) -> None:
    def mapped(module: nn.Module) -> list[Any]:
        many = torch.stack([s.x(), s.x().cos(), -s.x()])
        return [
            vmap(lambda x: s.call(module, x), in_dims=d, randomness="same")(many.movedim(0, d)) for d in (0, 1, 2, -1)
        ]

    s.same(mapped)


def _members(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.stack([p, p.cos(), -p]) for name, p in parameters.items()}


@check("`vmap` over the weights (an ensemble)")
def vmap_weights(s: Subject) -> None:
    def mapped(module: nn.Module) -> list[Any]:
        run, parameters = s.function(module)
        members = _members(parameters)
        swapped = {name: p.movedim(0, -1) for name, p in members.items()}
        all_but_one = dict.fromkeys(members, 0) | {(first := next(iter(members))): None}
        return [
            vmap(run, in_dims=(0, None), randomness="same")(members, s.x()),
            vmap(run, in_dims=(-1, None), randomness="same")(swapped, s.x()),
            vmap(run, in_dims=(all_but_one, None), randomness="same")(members | {first: parameters[first]}, s.x()),
        ]

    s.same(mapped)


@check("`vmap` over both")
def vmap_both(s: Subject) -> None:
    def mapped(module: nn.Module) -> list[Any]:
        run, parameters = s.function(module)
        many = torch.stack([s.x(), s.x().cos(), -s.x()], 1)
        nested = vmap(lambda p: vmap(lambda x: run(p, x), in_dims=1)(many))
        return [vmap(run, in_dims=(0, 1))(_members(parameters), many), nested(_members(parameters))]

    s.same(mapped)


@check("per-sample gradients, `vmap(grad)`")
def per_sample_gradients(s: Subject) -> None:
    def of_samples(module: nn.Module) -> Any:
        run, parameters = s.function(module)
        of_one = grad(lambda p, x: loss_of(run)(p, x.unsqueeze(1)))
        return vmap(of_one, in_dims=(None, 1), randomness="same")(parameters, s.x(B=3))

    s.same(of_samples)


@check("gradients of an ensemble")
def ensemble_gradients(s: Subject) -> None:
    def of_members(module: nn.Module) -> Any:
        run, _ = s.function(module)
        members, _ = stack_module_state([module, module])
        total = vmap(loss_of(run), in_dims=(0, None))(members, s.x()).sum()
        by_autograd = torch.autograd.grad(total, list(members.values()))
        return by_autograd, vmap(grad(loss_of(run)), in_dims=(0, None))(members, s.x())

    s.same(of_members)


@check("`functional_call` and `torch.func.grad`")
def functional(s: Subject) -> None:
    def called(module: nn.Module) -> Any:
        run, parameters = s.function(module)
        others = {name: p.cos() for name, p in parameters.items()}
        return run(others, s.x()), grad(loss_of(run), argnums=(0, 1))(others, s.x())

    s.same(called)


@check("`jacrev`, `jacfwd`")
def jacobians(s: Subject) -> None:
    def both(module: nn.Module) -> list[Any]:
        run, parameters = s.function(module)
        return [of(run, argnums=(0, 1))(parameters, s.x(2, 1)) for of in (jacrev, jacfwd)]

    s.same(both)


@check("`hessian`")
def hessians(s: Subject) -> None:
    def squares(module: nn.Module) -> Any:
        run, parameters = s.function(module)
        return hessian(loss_of(run))(parameters, s.x(2, 1))

    s.same(squares)


@check("`make_fx`, symbolic")
def make_fx_traces(s: Subject) -> None:
    w = wide(s)
    run, parameters = w.function(w.module)
    gradient = grad(loss_of(run))
    graph = make_fx(gradient, tracing_mode="symbolic")(parameters, w.x(11, 13))
    assert_near(graph(parameters, w.x(6, 5)), gradient(parameters, w.x(6, 5)), w.tolerance)


SIZES = ((5, 3), (9, 6), (11, 10))  # T, B


def compiled_training(s: Subject, backend: str, sizes: Sequence[tuple[int, int]] = SIZES) -> None:
    """Forward and backward at sizes that change, in one whole graph, equal to the module that is not compiled."""
    w = wide(s)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return w.call(w.module, x)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for i, (T, B) in enumerate(sizes):
        x = w.x(T, B).requires_grad_()
        inputs = (x, *w.module.parameters())
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            results = compiled(x)
            actual = (results, torch.autograd.grad(loss_of(lambda: results)(), inputs))
        results = call(x)
        assert_near(actual, (results, torch.autograd.grad(loss_of(lambda: results)(), inputs)), 10 * w.tolerance)


@check("`torch.compile(fullgraph=True)` with inductor, training, dynamic T and B, no recompilation")
def compile_inductor(s: Subject) -> None:
    compiled_training(s, "inductor")


@check("the same with `aot_eager`")
def compile_aot(s: Subject) -> None:
    compiled_training(s, "aot_eager")


@check("compiled graph independent of T")
def graph_size(s: Subject) -> None:
    w, found = wide(s), []

    def keep(graph: torch.fx.GraphModule, example: object) -> Function:
        found.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    for T in (4, 9):
        torch._dynamo.reset()
        torch.compile(partial(w.call, w.module), fullgraph=True, dynamic=False, backend=keep)(w.x(T, 3))
    assert found[0] == found[1]


@check("`vmap(grad)` inside of a compiled function")
def compiled_per_sample(s: Subject) -> None:
    run, parameters = s.function(s.module)
    of_samples = vmap(grad(lambda p, x: loss_of(run)(p, x.unsqueeze(1))), in_dims=(None, 1))
    compiled = torch.compile(of_samples, fullgraph=True, backend="aot_eager")
    assert_near(compiled(parameters, s.x(B=3)), of_samples(parameters, s.x(B=3)), s.tolerance)


@check("compiled autograd")
def compiled_backward(s: Subject) -> None:
    w = wide(s)
    expected = torch.autograd.grad(loss_of(w.call)(w.module, w.x()), list(w.module.parameters()))
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss_of(w.call)(w.module, w.x()).backward()
    assert_near(tuple(p.grad for p in w.module.parameters()), expected, w.tolerance)


class Exported(nn.Module):
    """x [T, B, I] -> results, for export."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject, self.inner = subject, subject.module

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.subject.call(self.inner, x)


def exported(s: Subject, strict: bool) -> None:
    w = wide(s)
    sizes: Any = {1: Dim("B", min=2, max=100)} if w.is_cell else {0: Dim("T", min=2, max=100), 1: Dim("B", min=2)}
    program = export(Exported(w), (w.x(4, 3),), dynamic_shapes={"x": sizes}, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = w.x(4 if w.is_cell else 7, 6)
    assert_near(torch.export.load(file).module()(x), w.call(w.module, x), w.tolerance)


@check("`torch.export` with dynamic T and B, saved and loaded")
def export_dynamic(s: Subject) -> None:
    exported(s, strict=False)


@check("the same with `strict=True`")
def export_strict(s: Subject) -> None:
    exported(s, strict=True)


@check("meta tensors")
def meta(s: Subject) -> None:
    m = replace(s, device="meta")
    results = m.call(m.module, m.x())
    loss_of(lambda: results)().backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in m.module.parameters())


@check("`torch.fx.symbolic_trace` of a model around it")
def fx_traces(s: Subject) -> None:
    model = nn.Sequential(nn.Identity(), Exported(s))
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is p for name, p in traced.named_parameters())
    assert_near(traced(s.x()), s.call(s.module, s.x()), s.tolerance)
    assert_near(torch.fx.symbolic_trace(traced)(s.x()), s.call(s.module, s.x()), s.tolerance)


@check("`torch.jit.trace`")
def jit_trace(s: Subject) -> None:
    traced = torch.jit.trace(Exported(s), (s.x(),), check_trace=False)
    assert_near(traced(s.x()), s.call(s.module, s.x()), s.tolerance)


# What each option is combined with; COMPILED for one kind alone, being slow, and not where results are random or
# sizes come from data.
COMBINED = (
    "backward",
    "double_backward",
    "func_jvp",
    "forward_over_reverse",
    "saved_tensors",
    "checkpoints",
    "vmap_input",
    "vmap_weights",
    "per_sample_gradients",
    "compile_aot",
    "export_dynamic",
)
COMPILED = ("compile_aot", "export_dynamic")


# ---- the cases ----


@dataclass(frozen=True)
class Case:
    library: str
    kind: str
    option: str
    check: str

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.library, self.kind, self.option.replace(" ", "_"), self.check)))

    def run(self, device: str = "cpu") -> None:
        CHECKS[self.check](Subject(self.library, self.kind, self.option, device))


def applies(library: str, kind: str, option: str) -> bool:
    """torch.nn takes another path for half types on other processors, so what it does with them is not recorded."""
    if option == "proj_size" and kind != "LSTM":
        return False
    return library == "fastrnn" or option not in (*OURS_ALONE, "bfloat16", "float16")


def combined(kind: str, option: str) -> Iterator[str]:
    """The checks that an option is run with."""
    for name in COMBINED:
        if name not in COMPILED or (kind == "LSTM" and option not in ("dropout", "PackedSequence")):
            yield name


CASES = [
    *(Case(library, kind, PLAIN, name) for library in LIBRARIES for name in CHECKS for kind in KINDS),
    *(
        Case(library, kind, option, name)
        for library in LIBRARIES
        for option in OPTIONS
        for kind in LAYERS
        if applies(library, kind, option)
        for name in combined(kind, option)
    ),
]

# ---- what must fail ----

_record = json.loads(RECORD.read_text()) if RECORD.exists() else {"torch": "", "failures": {}}
FAILURES: dict[str, str] = _record["failures"]
MEASURED_WITH: str = _record["torch"]  # what torch.nn does is known of this version alone


def torch_version() -> str:
    return torch.__version__.partition("+")[0]


def described(error: BaseException) -> str:
    """Type and the beginning of the text, without what changes from run to run."""
    text = re.sub(r'"/[^"]*"', '"..."', " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:110].rstrip()


def outcome(case: Case, device: str = "cpu") -> str:
    """ "" if the case passes, else what it raised."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    try:
        case.run(device)
    except Exception as error:
        return described(error)
    return ""


# ---- the page ----

# Tests that have no column: what they show, and where they stand.
MORE = {
    "`opcheck` (schema, fake tensor, autograd registration, AOT dispatch with symbolic sizes) of every op in "
    "`torch.ops.fastrnn`": "transforms/test_export.py::test_every_op_is_checked",
    "AOTInductor package with dynamic T and B, run in a fresh Python process": (
        "transforms/test_export.py::test_aot_inductor_package_in_a_fresh_process"
    ),
    "the same package run from C++, without Python": "transforms/test_export.py::test_aot_inductor_package_from_cpp",
    "`torch.export` program loaded in a fresh process": "transforms/test_export.py::test_program_in_a_fresh_process",
    "one compilation for 20 sizes (T, B), forward and backward": "transforms/test_compile.py::test_twenty_sizes",
    "compiled module given a PackedSequence, one compilation for all lengths": (
        "transforms/test_compile.py::test_packed_sequence"
    ),
    "compiled graph with one node a layer": "transforms/test_compile.py::test_train",
    "compiled graph of equal size at T = 64 and T = 4096": "transforms/test_compile.py::test_graph_of_long_sequences",
    "one kernel call for an ensemble, for per-sample gradients, for nested `vmap`": (
        "transforms/test_functorch.py::test_ensemble"
    ),
    "any subset of arguments that require grad": (
        "transforms/test_autograd.py::test_any_subset_of_inputs_may_require_grad"
    ),
    "derivatives of the op with lengths, resets and projections, per group": "transforms/test_autograd.py",
}
INTRODUCTION = """\
# What works on the modules

Written by `python -m tests.support --write` from the lists that `tests/test_support.py` runs; a test fails while this
page and those differ. **yes** means that a test passes: for a row `check` and a column `kind` it is
`tests/test_support.py::test_support[cpu-fastrnn-KIND-CHECK]`, and for torch's column the same test with `torch.nn`
in place of `fastrnn`. **no** means that the very same test must fail, with the error that stands below; if it passes
one day, the test fails and so says that this page is out of date. Results are compared with `fastrnn/reference.py` on
equal parameters, in float32 unless said.

torch's column is measured with torch {torch} on a CPU. **CUDA**: the tests are the same with `cuda` in place of `cpu`
(and `tests/cuda/test_gpu.py`); they are skipped without a GPU and **have not been run on one**, so nothing is claimed
there. cuDNN was not measured.
"""


def cell_text(cases: Sequence[Case]) -> str:
    failing = [case.kind for case in cases if case.id in FAILURES]
    if not failing:
        return "yes"
    return "**no**" if len(failing) == len(cases) else f"**no**: {', '.join(failing)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def page() -> str:
    by_key = {(case.library, case.kind, case.option, case.check): case for case in CASES}

    def found(library: str, kinds: Sequence[str], option: str, name: str) -> str:
        cases = [by_key[key] for kind in kinds if (key := (library, kind, option, name)) in by_key]
        return cell_text(cases) if cases else "-"

    columns = [(kind,) for kind in LAYERS] + [CELLS]
    names = [*LAYERS, "cells"]
    lines = [INTRODUCTION.format(torch=MEASURED_WITH), "## Transforms", ""]
    lines += table(
        ["", "check", *(f"{library} {name}" for library in LIBRARIES for name in names), "fastrnn on CUDA"],
        [
            [
                TITLES[name],
                f"`{name}`",
                *(found(library, kinds, PLAIN, name) for library in LIBRARIES for kinds in columns),
                "not run",
            ]
            for name in CHECKS
        ],
    )
    for library in LIBRARIES:
        lines += ["", f"## Options of {library}", ""]
        lines += ["The three layers, each with the option and the check; for those that compile, LSTM alone.", ""]
        options = [option for option in OPTIONS if applies(library, "LSTM", option)]
        rows = [[f"`{o}`", *(found(library, LAYERS, o, name) for name in COMBINED)] for o in options]
        lines += table(["", *(f"`{name}`" for name in COMBINED)], rows)
    lines += [
        "",
        "## More tests",
        "",
        *table(["", "test"], [[what, f"`tests/{where}`"] for what, where in MORE.items()]),
    ]
    for library in LIBRARIES:
        lines += ["", f"## What fails in {library}, by name", ""]
        by_error: dict[str, list[str]] = {}
        for case in CASES:
            if case.library == library and case.id in FAILURES:
                by_error.setdefault(FAILURES[case.id], []).append(f"`{case.id}`")
        if not by_error:
            lines.append("Nothing.")
        for error, ids in by_error.items():
            lines += [f"- `{error.replace('`', chr(39))}`", f"  {', '.join(ids)}"]
    return "\n".join(lines) + "\n"


def measure() -> None:
    global MEASURED_WITH
    MEASURED_WITH = torch_version()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    FAILURES.clear()
    for case in CASES:
        started = time.perf_counter()
        if text := outcome(case):
            FAILURES[case.id] = text
        print(f"{time.perf_counter() - started:6.2f} s  {case.id}  {text}", flush=True)
    RECORD.write_text(json.dumps({"torch": torch_version(), "failures": FAILURES}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="what works on the modules, as a page")
    parser.add_argument("--measure", action="store_true", help="run every case first")
    parser.add_argument("--write", action="store_true", help="write the page")
    options = parser.parse_args()
    if options.measure:
        measure()
    if options.measure or options.write:
        PAGE.write_text(page())
    else:
        parser.print_help()
