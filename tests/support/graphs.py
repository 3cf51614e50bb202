"""Checks of what makes a graph of a module: torch.compile, export, meta tensors, fx, jit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.export import Dim, export
from torch.func import grad, vmap

from tests.support.checks import check
from tests.support.subjects import Subject, assert_near, wide
from tests.transform_cases import Function, loss_of

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
