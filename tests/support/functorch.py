"""Checks of torch.func: vmap, ensembles, per-sample gradients, Jacobians, make_fx."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from tests.support.checks import check
from tests.support.subjects import Subject, assert_near, wide
from tests.transform_cases import loss_of


@check("`vmap` over the input, any `in_dims`")
def vmap_input(s: Subject) -> None:
    def mapped(module: nn.Module) -> list[Any]:
        many = torch.stack([s.x(), s.x().cos(), -s.x()])
        return [
            vmap(lambda x: s.call(module, x), in_dims=d, randomness="same")(many.movedim(0, d)) for d in (0, 1, 2, -1)
        ]

    s.same(mapped)


def members_of(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.stack([p, p.cos(), -p]) for name, p in parameters.items()}


@check("`vmap` over the weights (an ensemble)")
def vmap_weights(s: Subject) -> None:
    def mapped(module: nn.Module) -> list[Any]:
        run, parameters = s.function(module)
        members = members_of(parameters)
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
        return [vmap(run, in_dims=(0, 1))(members_of(parameters), many), nested(members_of(parameters))]

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
