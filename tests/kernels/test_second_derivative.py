"""A layer's second derivatives by its own kernels on dual numbers, against reference.py, which torch differentiates."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import _C, composed, layer, ops
from tests.helpers import KINDS, build, pair, randn
from tests.kernels.test_kernels import (
    CONSTANTS,
    ISAS,
    ROOT,
    SIZES,
    TOLERANCE,
    Case,
    cells_with_noise,
    cells_with_projection,
    double,
)
from tests.kernels.test_layer import HALVES, arguments_of, by_reference, call_of
from tests.transform_cases import loss_of

CELLS = tuple(ops.CELLS)


@pytest.fixture
def fused():
    """Within a test that has it, a second derivative that is not a kernel's fails."""

    def refuse(*args):
        raise AssertionError("the second derivative took the composed road")

    _C.set_composed(refuse, refuse)
    yield
    _C.set_composed(composed.layer_backward, composed.second_derivative)


def second_gradients(results, leaves):
    """Of a function of the first gradients, in which all of them have a part, and of the results themselves."""
    loss = loss_of(lambda: results)()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(loss + loss_of(lambda: first)(), leaves)


def linear_gradients(results, leaves):
    """Of a weighted sum of the first gradients, whose own rounding does not matter then."""
    generator = torch.Generator().manual_seed(3)

    def weights(xs):
        return [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in xs]

    first = torch.autograd.grad(results, leaves, weights(results), create_graph=True)
    return torch.autograd.grad(first, leaves, weights(first))


def leaves_of(given):
    leaves = {k: x for k, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return {k: x.requires_grad_() for k, x in leaves.items() if k not in CONSTANTS}


def check(
    case: Case, size: int, seed: int = 0, tolerance: float = 1e-10, biased: bool = True, gradients=second_gradients
) -> None:
    given = arguments_of(case, size, seed, biased)
    leaves, second = leaves_of(given), case.info.states > 1
    output, h_n, c_n, cells, _ = layer.layer(call_of(given, all_states=second))
    got = [output, composed.fold(h_n), *((composed.fold(c_n), cells) if second else ())]
    found = gradients(got, list(leaves.values()))

    exact = {name: double(x.detach() if name in leaves else x) for name, x in given.items()}
    exact_leaves = leaves_of(exact)
    *want, saved = by_reference(*exact.values())
    want = [x for x in want if x.numel()]
    if second:
        want.append(composed.every_c(case.cell, saved, case.P, exact["keep_c"]))
    expected = gradients(want, list(exact_leaves.values()))
    for name, a, b in zip(leaves, found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == case.dtype, (case, name)
        error = (a.double() - b).abs().max() / (1 + b.abs().max()) if a.numel() else 0
        assert error <= tolerance, (case, size, name, error)


MASKS = [("", ""), ("rows", "state"), ("groups", "groups")]


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_odd_sizes(cell, projected, masks, fused):
    """One direction, past the dispatcher, and two."""
    for (B, h, size), P in product([(1, 3, 17), (17, 1, 3), (3, 17, 129), (129, 3, 1), (3, 129, 17)], (1, 2)):
        if projected < h:
            check(Case(cell, 4, B, P, h, projected, *masks), size, seed=B, biased=size != 3)


@pytest.mark.parametrize(
    ("cell", "projected", "noise"),
    [case for case in cells_with_noise() if case[2] in ("all", "expected") or not ops.CELLS[case[0]].zoneout],
)
def test_recurrent_dropout_and_zoneout(cell, projected, noise, fused):
    for (T, B, h, size), P in product([(4, 1, 9, 3), (40, 30, 17, 5)], (1, 2)):
        check(Case(cell, T, B, P, h, projected, "rows", "state", noise=noise), size)


@pytest.mark.parametrize("cell", CELLS)
def test_float32_is_as_near_as_first_derivatives_are(cell, fused):
    for B, h in ((3, 17), (40, 64)):
        check(Case(cell, 12, B, 1, h, 0, "rows", dtype=torch.float32), 9, tolerance=50 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in ("rnn_relu", "ligru", "slstm")])
def test_half_types(cell, dtype, fused):
    """In float32 but for what comes in and goes out. (Cells with a kink: rounding may move a value over it.)"""
    for B, h in ((3, 17), (17, 5)):
        for masks in MASKS[:2]:
            case = Case(cell, 4, B, 2, h, 0, *masks, dtype=dtype)
            check(case, 9, tolerance=TOLERANCE[dtype], gradients=linear_gradients)


@pytest.mark.parametrize("cell", CELLS)
def test_several_threads(cell, fused):
    """Rows split, units split; more panels than one."""
    torch.set_num_threads(2)
    for B, h in ((40, 33), (3, 200)):
        check(Case(cell, 12, B, 1, h, 0, "rows", "state", noise="all"), 5)


def check_instruction_set() -> None:
    for cell in CELLS:
        check(Case(cell, 5, 7, 2, SIZES[2], 0, "rows", "state"), 5)
        check(Case(cell, 13, 8, 1, 35), 5)  # as many rows as weights are packed for


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    if ISAS.index(isa) < ISAS.index(_C.instruction_set()):
        pytest.skip(f"this machine has no {isa}")
    code = "from tests.kernels.test_second_derivative import check_instruction_set as run; run()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"FASTRNN_ISA": isa})


# ---- modules, against torch.nn ----


def penalty(module, x, *rest):
    """The gradients of a gradient penalty (Gulrajani et al. 2017) by input and parameters."""
    output, _ = module(x, *rest) if not isinstance(x, tuple) else module(pack_padded_sequence(*x), *rest)
    data = output.data if hasattr(output, "batch_sizes") else output
    leaf = x[0] if isinstance(x, tuple) else x
    (first,) = torch.autograd.grad(data.square().sum(), leaf, create_graph=True)
    norm = first.square().sum(-1).add(1e-3).sqrt()
    return torch.autograd.grad((norm - 1).square().mean() + data.sin().mean(), [leaf, *module.parameters()])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_penalty(kind, packed, fused):
    theirs, ours = pair(kind, 6, 9, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = randn(7, 4, 6).requires_grad_()
    given = (x, torch.tensor([7, 5, 5, 1])) if packed else x
    for a, b in zip(penalty(ours, given), penalty(theirs, given), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True])
def test_third_order(packed):
    """What lies behind the second derivative is the composed form's."""
    theirs, ours = pair("LSTM", 3, 4, bidirectional=True, dtype=torch.float64)
    x = randn(4, 2, 3).requires_grad_()

    def third(module):
        leaves = [x, *module.parameters()]
        output = module(pack_padded_sequence(x, torch.tensor([4, 2])) if packed else x)[0]
        y = loss_of(lambda: output.data if packed else output)()
        for _ in range(2):
            first = torch.autograd.grad(y, leaves, create_graph=True)
            y = loss_of(lambda: first)()
        return torch.autograd.grad(y, leaves)

    for a, b in zip(third(ours), third(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_directions(kind):
    """A whole Hessian at once."""
    theirs, ours = pair(kind, 2, 3, dtype=torch.float64)
    x = randn(4, 2, 2)
    found, expected = (
        torch.autograd.functional.hessian(lambda x, m=m: m(x)[0].square().sum(), x, vectorize=m is ours)
        for m in (ours, theirs)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("which", ["input", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
def test_only_what_is_asked_for(which):
    """One leaf alone requires a gradient; what the first derivative does not keep is found or gone around."""
    theirs, ours = pair("GRU", 5, 7, dtype=torch.float64)

    def hessian_product(module):
        x = randn(6, 3, 5)
        for name, p in module.named_parameters():
            p.requires_grad_(name == which)
        leaf = x.requires_grad_() if which == "input" else module.get_parameter(which)
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), leaf)[0]

    torch.testing.assert_close(hessian_product(ours), hessian_product(theirs), rtol=0, atol=1e-11)


def test_biases_written_to_before_backward():
    """They are not saved for backward; the second derivative is that of the call as it was."""
    lstm = build(fastrnn, "LSTM", 5, 7, dtype=torch.float64)
    x = randn(6, 3, 5).requires_grad_()

    def run(write):
        output, _ = lstm(x)
        if write:
            with torch.no_grad():
                lstm.bias_ih_l0.add_(1)
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), x)[0]

    torch.testing.assert_close(run(False), run(True), rtol=0, atol=1e-11)


def test_inputs_written_to_between_the_derivatives_are_refused():
    lstm = build(fastrnn, "LSTM", 5, 7, dtype=torch.float64)
    x = randn(6, 3, 5).requires_grad_()
    (first,) = torch.autograd.grad(lstm(x)[0].square().sum(), x, create_graph=True)
    with torch.no_grad():
        lstm.bias_ih_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first.sin().sum(), x)
