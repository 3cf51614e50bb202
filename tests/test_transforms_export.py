"""torch.export, and what it rests on: opcheck, fake and meta tensors, make_fx."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fastrnn
from fastrnn.ops import recurrent_backward, recurrent_forward

from .transform_cases import (
    FUSED,
    assert_close,
    backward_arguments,
    calls_in,
    calls_of,
    every_cell,
    every_module,
    gradients,
    loss_of,
    make_case,
    make_module,
    modules_by_reference,
    variants,
)

# ---- export ----


def _saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def _check_export(kind: str, strict: bool) -> None:
    """T and B stay symbols, each layer stays one op, and other sizes give the reference's results."""
    module = make_module(kind)
    sizes = {0: Dim("T", min=2, max=100), 1: Dim("B", min=2, max=100)}
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            program = export(module, (torch.randn(4, 3, 8),), dynamic_shapes={"input": sizes}, strict=strict)
            lowered = program.run_decompositions()
            for each in (program, lowered, _saved_and_loaded(lowered)):
                assert calls_in(each.graph) == {"forward": calls_of(module)}
                x = torch.randn(6, 5, 8)
                with modules_by_reference():
                    expected = module(x)
                assert_close(each.module()(x), expected, 1e-5)


@every_module
def test_export(kind: str):
    """[r06a] Not strict, which is the default."""
    _check_export(kind, strict=False)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_strict_export(kind: str):
    """[r06b] Strict: through dynamo."""
    _check_export(kind, strict=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_every_argument(strict: bool):
    """[r06a, r06b] State, lengths, resets and the state after a reset are inputs of the exported program."""
    module = fastrnn.LSTM(8, 12, proj_size=7, bidirectional=True)
    T, B = Dim("T", min=2, max=100), Dim("B", min=2, max=100)

    def inputs(T: int, B: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state, fresh = ((torch.randn(2, B, 7), torch.randn(2, B, 12)) for _ in range(2))
        masks = {"lengths": torch.arange(B) % T, "resets": torch.rand(T, B) < 0.4}
        return (torch.randn(T, B, 8), state), masks | {"reset_state": fresh}

    args, keywords = inputs(4, 3)
    shapes = {
        "input": {0: T, 1: B},
        "hx": ({1: B}, {1: B}),
        "lengths": {0: B},
        "resets": {0: T, 1: B},
        "reset_state": ({1: B}, {1: B}),
    }
    program = _saved_and_loaded(export(module, args, keywords, dynamic_shapes=shapes, strict=strict))
    assert calls_in(program.graph) == {"forward": 1}
    args, keywords = inputs(6, 5)
    actual = program.module()(*args, **keywords)
    with modules_by_reference():
        assert_close(actual, module(*args, **keywords), 1e-5)


@every_module
def test_exported_module_trains(kind: str):
    """[r06c] Gradients of an exported program's parameters."""
    module, x = make_module(kind), torch.randn(4, 3, 8)
    exported = export(module, (x,)).module()
    loss_of(exported)(x).backward()
    expected = torch.autograd.grad(loss_of(module)(x), list(module.parameters()))
    actual = dict(exported.named_parameters())
    assert_close(tuple(actual[name].grad for name, _ in module.named_parameters()), expected, 1e-6)


# ---- opcheck ----


# opcheck looks at the schema, the registration for autograd, the fake kernel and AOT dispatch with symbolic sizes.
# With inputs that require grad it traces the composites, since its loss takes in `saved`: two steps are enough.


@variants("plain", "lengths", "resets", "everything", "projection", "projection-everything")
def test_opcheck_forward(cell: str, options: dict):
    """[r07] With `save` on and off."""
    case = make_case(cell, requires_grad=False, **options)
    for save in (False, True):
        opcheck(recurrent_forward, (*case.arguments(), save))


@variants("everything", "projection-everything")
def test_opcheck_forward_with_grad(cell: str, options: dict):
    """[r07] Inputs that require grad; `save` off, for autograd turns it on."""
    case = make_case(cell, **(options | {"T": 2}))
    opcheck(recurrent_forward, (*case.arguments(), False))


@variants("everything", "projection-everything")
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no-grad"])
def test_opcheck_backward(cell: str, options: dict, requires_grad: bool):
    """[r07b] recurrent_backward, which is differentiable in its turn."""
    case = make_case(cell, **(options | {"T": 2}))
    opcheck(recurrent_backward, tuple(backward_arguments(case, requires_grad=requires_grad)))


@every_cell
@pytest.mark.parametrize("given", [(False, False, False), (True, False, False), (False, False, True)])
def test_opcheck_backward_without_some_gradients(cell: str, given: tuple[bool, bool, bool]):
    """[r07c] Gradients that are None, and those of the initial state not asked for."""
    case = make_case(cell, lengths="rows")
    for initial in (True, False):
        opcheck(recurrent_backward, tuple(backward_arguments(case, given=given, initial=initial)))


# ---- tracing and tensors without data ----


@variants("both-directions", "everything", "projection-everything")
def test_make_fx(cell: str, options: dict):
    """[r10] A symbolic trace of a gradient holds one call of each op and no composite, and serves other sizes."""
    # Sizes that no other dimension has: equal ones are traced as one symbol.
    case = make_case(cell, T=11, B=13, **options)
    inputs = tuple(case.tensors.values())

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(case.fused)(*inputs), inputs[: len(case.inputs)])

    graph = make_fx(function, tracing_mode="symbolic")(*inputs)
    assert calls_in(graph.graph) == FUSED
    other = make_case(cell, T=6, B=5, **options)
    assert_close(graph(*other.tensors.values()), gradients(other.composite, other.inputs))


@variants()
def test_meta_tensors(cell: str, options: dict):
    """[r10] Shapes, dtypes and strides of the results, forward and backward, are those of the kernels."""
    case = make_case(cell, **options)
    meta = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in case.tensors.values()]
    real = list(case.tensors.values())
    for save in (False, True):
        results = [recurrent_forward(*case.arguments(*inputs), save) for inputs in (meta, real)]
        for of_meta, of_real in zip(*results, strict=True):
            assert of_meta.is_meta
            assert (of_meta.shape, of_meta.dtype) == (of_real.shape, of_real.dtype)
            assert of_meta.stride() == of_real.stride()
    count = len(case.inputs)
    losses = [loss_of(case.fused)(*inputs) for inputs in (meta, real)]
    grads = [torch.autograd.grad(y, x[:count]) for y, x in zip(losses, (meta, real), strict=True)]
    assert [g.shape for g in grads[0]] == [g.shape for g in grads[1]]


@every_module
def test_module_on_meta_device(kind: str):
    """[r10] Modules may be made and run without data."""
    module = make_module(kind, device="meta")
    output, _ = module(torch.empty(4, 3, 8, device="meta"))
    assert output.is_meta
    assert output.shape == make_module(kind)(torch.randn(4, 3, 8))[0].shape
    output.sum().backward()
    assert all(p.grad.shape == p.shape for p in module.parameters())
