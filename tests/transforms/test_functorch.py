"""The op and the modules under torch.func: vmap, grad, jvp, hessian and what they compose to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from tests.transform_cases import (
    FUSED,
    Case,
    Function,
    assert_close,
    calls_of,
    count_calls,
    every_cell,
    every_module,
    loss_of,
    make_case,
    make_module,
    modules_by_reference,
    variants,
)

# ---- grad, jvp and their compositions ----


@variants()
def test_grad_and_vjp(cell: str, options: dict):
    """One fused forward and one fused backward, although torch.func asks for a graph of every backward."""
    case = make_case(cell, requires_grad=False, **options)
    every = tuple(range(len(case.inputs)))
    with count_calls() as calls:
        grads = grad(loss_of(case.fused), argnums=every)(*case.inputs)
    assert calls == FUSED
    assert_close(grads, grad(loss_of(case.composite), argnums=every)(*case.inputs))
    results, pull = vjp(case.fused, *case.inputs)
    expected, pull_expected = vjp(case.composite, *case.inputs)
    assert_close(results, expected)
    assert_close(pull(results), pull_expected(expected))


@variants("plain", "lengths", "everything", "projection-everything")
def test_jvp(cell: str, options: dict):
    """[r03c] torch.func.jvp."""
    case = make_case(cell, requires_grad=False, **options)
    tangents = tuple(torch.randn_like(x) for x in case.inputs)
    with count_calls() as calls:
        actual = jvp(case.fused, case.inputs, tangents)
    assert calls == {"forward jvp": 1}
    assert_close(actual, jvp(case.composite, case.inputs, tangents))
    assert any(t.any() for t in actual[1])


@variants("plain", "everything", "projection-everything")
def test_hessian(cell: str, options: dict):
    """[r03d] Forward over reverse, by every pair of arguments: all directions of an argument in one call."""
    case = make_case(cell, requires_grad=False, **(options | {"T": 2, "B": 1}))
    every = tuple(range(len(case.inputs)))
    with count_calls() as calls:
        actual = hessian(loss_of(case.fused), argnums=every)(*case.inputs)
    assert calls == {"forward jvp": 1, "backward jvp": 1}
    assert_close(actual, hessian(loss_of(case.composite), argnums=every)(*case.inputs))
    assert actual[0][0].any()


@variants("plain", "everything", "projection-everything")
def test_grad_of_grad(cell: str, options: dict):
    """Reverse over reverse, by every argument, and through the arguments of what was outside of torch.func."""
    case = make_case(cell, **options)
    every = tuple(range(len(case.inputs)))

    def first(run: Function) -> Function:
        return loss_of(grad(loss_of(run), argnums=every))

    constant = [x.detach() for x in case.inputs]
    with count_calls() as calls:
        actual = grad(first(case.fused), argnums=every)(*constant)
    assert set(calls) == {"forward", "backward", "forward jvp", "backward jvp"}
    assert_close(actual, grad(first(case.composite), argnums=every)(*constant))
    with count_calls() as calls:
        actual = torch.autograd.grad(first(case.fused)(*case.inputs), case.inputs)
    assert set(calls) == {"forward", "backward", "forward jvp", "backward jvp"}
    assert_close(actual, torch.autograd.grad(first(case.composite)(*case.inputs), case.inputs))


def test_third_order_of_grad():
    """grad of grad of grad, and forward over a pullback of a pullback that was made outside."""
    case = make_case("gru", T=2, B=1, requires_grad=False, resets="rows", reset_state=True)
    every = tuple(range(len(case.inputs)))

    def third(run: Function) -> tuple:
        function = loss_of(run)
        for _ in range(2):
            function = loss_of(grad(function, argnums=every))
        _, pull = vjp(grad(loss_of(run), argnums=every), *case.inputs)
        along = tuple(x.cos() for x in case.inputs)
        return grad(function, argnums=every)(*case.inputs), jvp(lambda *u: pull(u), along, along)

    assert_close(third(case.fused), third(case.composite))


@pytest.mark.parametrize("inner", [jacfwd, jacrev])
@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@variants("plain", "everything")
def test_compositions_of_forward_and_reverse(cell: str, options: dict, outer: Function, inner: Function):
    """[r03e] Reverse over forward, reverse over reverse, forward over forward and forward over reverse."""
    case = make_case(cell, requires_grad=False, **(options | {"T": 2, "B": 1}))
    actual = outer(inner(loss_of(case.fused)))(*case.inputs)
    assert_close(actual, outer(inner(loss_of(case.composite)))(*case.inputs))
    assert actual.any()


def test_third_order_compositions():
    case = make_case("lstm", T=2, B=1, h=1, reverse=(False,), requires_grad=False)
    expected = jacfwd(jacrev(jacfwd(loss_of(case.composite))))(*case.inputs)
    assert expected.any()
    for first, second, third in itertools.product((jacfwd, jacrev), repeat=3):
        assert_close(third(second(first(loss_of(case.fused))))(*case.inputs), expected)


# ---- vmap: always one call ----


def _check_vmap(case: Case, dims: dict[str, int], n: int = 3) -> None:
    """vmap over the arguments in `dims` is one call of the kernel, and equal to a loop over the reference."""
    generator = torch.Generator().manual_seed(3)
    mapped = {}
    for name, dim in dims.items():
        x = case.tensors[name]
        if name == "lengths":
            members = [(x + i) % (len(case.tensors["gates_ih"]) + 1) for i in range(n)]
        elif name == "resets":
            members = [torch.rand(x.shape, generator=generator) < 0.4 for _ in range(n)]
        else:
            members = [x + 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(n)]
        mapped[name] = torch.stack(members, dim)
    inputs = tuple((case.tensors | mapped).values())
    in_dims = tuple(dims.get(name) for name in case.tensors)
    with count_calls() as calls:
        actual = vmap(case.fused, in_dims=in_dims)(*inputs)
    assert calls == {"forward": 1}

    def member(i: int) -> tuple[Tensor, ...]:
        return tuple(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True))

    expected = [case.composite(*member(i)) for i in range(n)]
    assert_close(actual, tuple(map(torch.stack, zip(*expected, strict=True))))


@variants("both-directions", "lengths", "everything", "projection-everything")
@pytest.mark.parametrize("states", [True, False], ids=["batched-states", "shared-states"])
def test_vmap_over_inputs(cell: str, options: dict, states: bool):
    """[r04] Batched gates, with or without batched states: the batch grows."""
    case = make_case(cell, requires_grad=False, **options)
    dims = {"gates_ih": 1}
    if states:
        dims |= {name: 0 for name in case.tensors if name in ("h_0", "c_0", "reset_h", "reset_c")}
    _check_vmap(case, dims)


@variants("both-directions", "lengths", "everything", "projection-everything")
def test_vmap_over_weights(cell: str, options: dict):
    """[r04b] Batched weights, alone or with everything else: the groups grow."""
    case = make_case(cell, requires_grad=False, **options)
    _check_vmap(case, {"weight_hh": 1})
    _check_vmap(case, {"bias_hh": 0, "gates_ih": 2})
    _check_vmap(case, {"weight_hh": 1, "gates_ih": 2, "h_0": 1})
    _check_vmap(case, dict.fromkeys(case.names, 1))
    if "weight_hr" in case.names:
        _check_vmap(case, {"weight_hr": 2})


@every_cell
@pytest.mark.parametrize("masks", ["rows", "groups"])
def test_vmap_over_lengths_and_resets(cell: str, masks: str):
    """[r04g] Batched lengths and resets, each with and without batched gates and weights."""
    case = make_case(cell, requires_grad=False, lengths=masks, resets=masks, reset_state=True)
    for lengths, resets in ({"lengths": 0}, {}), ({}, {"resets": 1}), ({"lengths": 1}, {"resets": 0}):
        for others in ({}, {"gates_ih": 0}, {"weight_hh": 0}, {"gates_ih": 1, "weight_hh": 0, "reset_h": 0}):
            _check_vmap(case, lengths | resets | others)


@every_cell
def test_vmap_over_masks(cell: str):
    """What is drawn for every member of a vmap, or for all of them; with and without batched gates and weights."""
    case = make_case(cell, requires_grad=False, noise=True, lengths="rows")
    drawn = {name: 0 for name in case.tensors if name in ("mask_h", "keep_h", "keep_c")}
    for dims in (drawn, *({name: 1} for name in drawn)):
        for others in ({}, {"gates_ih": 1}, {"weight_hh": 0}):
            _check_vmap(case, dims | others)


def test_vmap_with_out_dims_and_chunks():
    case = make_case("lstm", requires_grad=False)
    gates = torch.stack([case.tensors["gates_ih"] + i for i in range(4)])
    outputs, h_n, c_n = vmap(case.fused, out_dims=(2, 1, 0), chunk_size=3)(gates, *_rest(case, 4))
    expected = vmap(case.composite)(gates, *_rest(case, 4))
    assert_close((outputs.movedim(2, 0), h_n.movedim(1, 0), c_n), expected)


def _rest(case: Case, n: int) -> list[Tensor]:
    return [x.expand(n, *x.shape) for x in case.inputs[1:]]


@every_cell
def test_nested_vmap(cell: str):
    """[r04c] Members with weights of their own on inputs of their own, still in one call."""
    case = make_case(cell, requires_grad=False, lengths="rows")
    gates, weight, *others = case.inputs
    weights = torch.stack([weight, -weight, weight / 2])
    many_gates = torch.stack([gates, gates.cos(), gates.sin(), -gates])

    def nested(run: Function) -> tuple[Tensor, ...]:
        return vmap(lambda w: vmap(lambda g: run(g, w, *others))(many_gates))(weights)

    with count_calls() as calls:
        actual = nested(case.fused)
    assert calls == {"forward": 1}
    assert_close(actual, nested(case.composite))


# ---- vmap of grad ----


@variants("both-directions", "everything", "projection-everything")
def test_vmap_of_grad(cell: str, options: dict):
    """Gradients of every argument, per member: by inputs, by weights, and by inputs, lengths and resets."""
    case = make_case(cell, requires_grad=False, **options)
    every = tuple(range(len(case.inputs)))
    masks = {"lengths", "resets"}
    for batched in (
        {"gates_ih", "h_0"},
        {"weight_hh"},
        {*case.names},
        {"gates_ih"} | masks,
        {"weight_hh"} | masks,
    ):
        in_dims = tuple(0 if name in batched else None for name in case.tensors)
        inputs = tuple(
            torch.stack([x, x.flip(0), x]) if d == 0 else x for x, d in zip(case.tensors.values(), in_dims, strict=True)
        )

        def run(function: Function, in_dims: Any = in_dims, inputs: Any = inputs) -> tuple[Tensor, ...]:
            return vmap(grad(loss_of(function), argnums=every), in_dims=in_dims)(*inputs)

        with count_calls() as calls:
            actual = run(case.fused)
        assert calls == FUSED
        assert_close(actual, run(case.composite))


@every_cell
def test_hessian_of_members_and_gradient_through_jvp(cell: str):
    """[r04f] vmap(hessian), and grad of a vmap of jvp."""
    case = make_case(cell, T=2, B=1, requires_grad=False, resets="rows", reset_state=True)
    gates, weight, *others = case.inputs
    many = torch.stack([gates, gates.cos(), -gates])

    def hessians(run: Function) -> Tensor:
        return vmap(hessian(lambda g: loss_of(run)(g, weight, *others)))(many)

    def through_jvp(run: Function) -> Tensor:
        def of_weight(w: Tensor) -> Tensor:
            def along(g: Tensor) -> Tensor:
                return jvp(lambda g: loss_of(run)(g, w, *others), (g,), (g.cos(),))[1]

            return vmap(along)(many).sum()

        return grad(of_weight)(weight)

    for transformed in (hessians, through_jvp):
        actual = transformed(case.fused)
        assert_close(actual, transformed(case.composite))
        assert actual.any()


@variants("many-rows", "projection-everything", cells=("lstm",))
def test_vectorized_jacobian(cell: str, options: dict):
    """Legacy vmap, which torch.autograd.functional uses, loops over the kernels but gives the same."""
    case = make_case(cell, **options)
    jacobian = torch.autograd.functional.jacobian
    assert_close(
        jacobian(case.fused, case.inputs, vectorize=True),
        jacobian(case.composite, case.inputs),
    )


# ---- products ----


def test_products_under_vmap_are_one_op():
    """What per-sample gradients and ensembles spend their time in: the micro-kernel, once for all of them."""
    module = fastrnn.LSTM(40, 50, dtype=torch.float64)
    parameters = {name: torch.randn_like(p) / 8 for name, p in module.named_parameters()}
    x = torch.randn(35, 6, 40, dtype=torch.float64)

    def run() -> dict[str, Tensor]:
        of_sample = grad(lambda p, x: _loss(module, p, x.unsqueeze(1)))
        return vmap(of_sample, in_dims=(None, 1))(parameters, x)

    names: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        actual = run()
    assert names.count("fastrnn.grouped_linear.default") == 1
    assert names.count("fastrnn.grouped_outer.default") == 2
    assert not {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"} & set(names)
    with modules_by_reference():
        assert_close(actual, run())


# ---- modules ----


def _loss(module: torch.nn.Module, parameters: dict[str, Tensor], x: Tensor, **keywords: Tensor) -> Tensor:
    return loss_of(lambda: functional_call(module, parameters, (x,), keywords))()


@every_module
def test_per_sample_gradients(kind: str):
    """[r04d] vmap(grad(functional_call)): one fused forward and backward a layer for all samples."""
    module = make_module(kind, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(3, 6, 8, dtype=torch.float64)

    def run() -> dict[str, Tensor]:
        def of_sample(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return _loss(module, parameters, x.unsqueeze(1))

        return vmap(grad(of_sample), in_dims=(None, 1))(parameters, x)

    with count_calls() as calls:
        actual = run()
    layers = calls_of(module)
    assert calls == {"forward": layers, "backward": layers}
    with modules_by_reference():
        assert_close(actual, run())


@every_module
def test_ensemble(kind: str):
    """[r04e] vmap over stacked parameters: its values, its gradients, and autograd through it."""
    modules = [make_module(kind, dtype=torch.float64) for _ in range(3)]
    for scale, member in enumerate(modules, 1):
        for p in member.parameters():
            p.data.mul_(scale)
    parameters, _ = stack_module_state(modules)
    x = torch.randn(3, 6, 8, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return _loss(modules[0], parameters, x)

    def run() -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        total = vmap(loss)(parameters).sum()
        return vmap(grad(loss))(parameters), torch.autograd.grad(total, list(parameters.values()))

    with count_calls() as calls:
        actual = run()
    layers = calls_of(modules[0])
    assert calls == {"forward": 2 * layers, "backward": 2 * layers}
    with modules_by_reference():
        assert_close(actual, run())


@every_module
def test_module_jvp_and_hessian(kind: str):
    """Forward mode and forward over reverse by a module's parameters, with lengths, resets and a state."""
    module = make_module(kind, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    masks = {"lengths": torch.tensor([3, 2]), "resets": torch.tensor([[0, 0], [1, 0], [1, 1]]).bool()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def run() -> tuple:
        def of_parameters(parameters: dict[str, Tensor]) -> Tensor:
            return _loss(module, parameters, x, **masks)

        def of_bias(bias: Tensor) -> Tensor:
            return of_parameters(parameters | {"weight_hh_l0": parameters["weight_hh_l0"] + bias})

        bias = torch.zeros(1, module.weight_hh_l0.shape[1], dtype=torch.float64)
        return jvp(of_parameters, (parameters,), (tangents,)), hessian(of_bias)(bias)

    with count_calls() as calls:
        actual = run()
    layers = calls_of(module)
    assert calls == {"forward jvp": 2 * layers, "backward jvp": layers}
    with modules_by_reference():
        assert_close(actual, run())
