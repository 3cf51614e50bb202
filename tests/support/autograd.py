"""Checks of torch.autograd: first and higher order, forward mode, hooks, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp
from torch.utils.checkpoint import checkpoint

from tests.support.checks import check
from tests.support.subjects import Subject
from tests.transform_cases import loss_of


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
