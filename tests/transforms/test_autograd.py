"""The op under torch.autograd: gradients of any order, forward mode, and what autograd keeps and checks."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import reference
from fastrnn.ops import CELLS, recurrent_backward, recurrent_forward
from tests.helpers import randn
from tests.transform_cases import (
    FUSED,
    Case,
    Function,
    assert_close,
    backward_arguments,
    count_calls,
    every_cell,
    gradients,
    loss_of,
    make_case,
    variants,
)


def test_private_names_that_autograd_py_needs_exist():
    """torch may rename these in any release: each must be looked at before a new version is allowed."""
    for owner, names in {
        torch._C: "_AutoDispatchBelowAutograd _ExcludeDispatchKeyGuard _after_autograd_keyset DispatchKeySet "
        "_any_requires_grad _are_functorch_transforms_active DispatchKey _get_dispatch_mode _TorchDispatchModeKey",
        torch._C._functorch: "peek_interpreter_stack get_interpreter_stack TransformType unwrap_if_dead get_unwrapped "
        "is_gradtrackingtensor",
        torch._functorch.utils: "enable_single_level_autograd_function",
        torch.autograd.function: "_SingleLevelFunction",
        forward_ad: "_current_level _set_fwd_grad_enabled",
    }.items():
        missing = [name for name in names.split() if not hasattr(owner, name)]
        assert not missing, f"{owner.__name__} has no {', '.join(missing)} in torch {torch.__version__}"


# ---- reverse mode ----


@variants()
def test_backward_is_fused_and_right(cell: str, options: dict):
    """[r01] One kernel forward, one backward; the gradients of the reference and of finite differences."""
    case = make_case(cell, **options)
    with count_calls() as calls:
        actual = gradients(case.fused, case.inputs)
    assert calls == FUSED
    assert_close(actual, gradients(case.composite, case.inputs))
    assert gradcheck(case.fused, case.inputs)


_SMALL = {"T": 2, "h": 1}


@variants("plain", "both-directions", "resets-to-state", "everything", "projection-everything")
def test_gradgradcheck(cell: str, options: dict):
    """[r02] Double backward against finite differences of backward."""
    case = make_case(cell, **(options | _SMALL))
    assert gradgradcheck(case.fused, case.inputs, fast_mode=True)


@variants("plain", "everything", "projection-everything")
def test_third_order(cell: str, options: dict):
    """[r02b] The gradient of the gradient of the gradient."""
    case = make_case(cell, **(options | {"T": 2, "B": 1}))

    def third(function: Function) -> tuple[Tensor, ...]:
        y = loss_of(function)(*case.inputs)
        for _ in range(2):
            y = loss_of(lambda y=y: torch.autograd.grad(y, case.inputs, create_graph=True))()
        return torch.autograd.grad(y, case.inputs)

    assert_close(third(case.fused), third(case.composite))


@every_cell
def test_double_backward_where_arguments_depend_on_each_other(cell: str):
    """[r02c] Partial derivatives, not total ones: all arguments are functions of the same two tensors."""
    case = make_case(cell, reverse=(False,), resets="rows", reset_state=True)
    gates, weight = case.inputs[:2]
    h, c = (case.tensors.get(name, weight).shape[1] for name in ("h_0", "c_0"))

    def chained(run: Function) -> tuple[Tensor, ...]:
        def function(gates: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            tied = {
                "gates_ih": gates.sin(),
                "weight_hh": weight * gates.tanh().mean(),
                "h_0": gates[0, :, :h].tanh(),
                "c_0": (gates[1, :, :c] * weight.sum()).exp(),  # above 0, as the n of an sLSTM is
                "reset_h": gates[2, :, :h].cos(),
                "reset_c": (gates[0, :, :c] * weight.mean()).exp(),
            }
            return run(*(tied.get(name, x) for name, x in case.tensors.items()))

        first = torch.autograd.grad(loss_of(function)(gates, weight), (gates, weight), create_graph=True)
        return torch.autograd.grad(loss_of(lambda: first)(), (gates, weight))

    assert_close(chained(case.fused), chained(case.composite))


@every_cell
def test_gradient_of_saved(cell: str):
    """`saved` is an ordinary result: its gradient, which double backward meets, is right by itself."""
    case = make_case(cell, lengths="groups", resets="groups", reset_state=True)

    def all_results(*inputs: Tensor) -> tuple[Tensor, ...]:
        return recurrent_forward(*case.arguments(*inputs), True)

    def all_of_reference(*inputs: Tensor) -> tuple[Tensor, ...]:
        return reference.forward(*case.arguments(*inputs))

    assert_close(gradients(all_results, case.inputs), gradients(all_of_reference, case.inputs))
    assert gradgradcheck(lambda *inputs: all_results(*inputs)[-1].sum(), case.inputs, fast_mode=True)


# ---- forward mode ----


@variants("plain", "lengths", "everything", "projection-everything")
def test_dual_numbers(cell: str, options: dict):
    """[r03] Tangents in a plain dual level."""
    case = make_case(cell, requires_grad=False, **options)
    tangents = [torch.randn_like(x) for x in case.inputs]

    def run(function: Function) -> list[tuple[Tensor, Tensor]]:
        with forward_ad.dual_level():
            results = function(*map(forward_ad.make_dual, case.inputs, tangents))
            return [tuple(forward_ad.unpack_dual(y)) for y in results]

    with count_calls() as calls:
        actual = run(case.fused)
    assert calls == {"forward jvp": 1}
    assert_close(actual, run(case.composite))
    assert_close([primal for primal, _ in actual], list(case.fused(*case.inputs)))


@pytest.mark.parametrize("name", make_case("lstm", projection=1, resets="rows", reset_state=True).names)
def test_one_tangent_is_enough(name: str):
    """A tangent on any single argument is seen, and the arguments may require grad at the same time."""
    case = make_case("lstm", projection=1, resets="rows", reset_state=True)
    position = case.names.index(name)
    tangent = torch.randn_like(case.inputs[position])

    def run(function: Function) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        with forward_ad.dual_level():
            inputs = list(case.inputs)
            inputs[position] = forward_ad.make_dual(inputs[position], tangent)
            tangents = [forward_ad.unpack_dual(y).tangent for y in function(*inputs)]
            loss = loss_of(lambda: tangents)()
            return tangents, torch.autograd.grad(loss, case.inputs, materialize_grads=True)

    tangents, grads = run(case.fused)
    assert any(t.any() for t in tangents)
    assert_close((tangents, grads), run(case.composite))


@variants("plain", "everything", "projection-everything")
def test_gradcheck_of_forward_and_batched_modes(cell: str, options: dict):
    """[r03b] Tangents against finite differences; vmap over tangents and, by legacy vmap, over gradients."""
    case = make_case(cell, **(options | {"T": 2, "B": 1}))
    assert gradcheck(
        case.fused,
        case.inputs,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        check_batched_grad=True,
    )


@variants("plain", "everything", "projection-everything")
def test_gradgradcheck_of_forward_over_reverse(cell: str, options: dict):
    """[r03f] Forward over reverse and reverse over reverse against finite differences."""
    case = make_case(cell, **(options | _SMALL))
    assert gradgradcheck(case.fused, case.inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


# ---- which inputs, which results ----


def test_any_subset_of_inputs_may_require_grad():
    """[r09a] First and second derivatives for all 255 subsets of an LSTM's arguments."""
    case = make_case("lstm", T=2, projection=1, resets="groups", reset_state=True)
    count = len(case.inputs)
    assert count == 8
    first = torch.autograd.grad(loss_of(case.composite)(*case.inputs), case.inputs, create_graph=True)
    # second[j][i]: the part of argument j's first gradient in the second derivative by argument i
    squares = [(g**2).sum() for g in first]
    second = [torch.autograd.grad(y, case.inputs, retain_graph=True, materialize_grads=True) for y in squares]
    for subset in itertools.product((False, True), repeat=count):
        if not any(subset):
            continue
        inputs = [x.detach().requires_grad_(need) for x, need in zip(case.inputs, subset, strict=True)]
        wanted = [x for x in inputs if x.requires_grad]
        chosen = [i for i in range(count) if subset[i]]
        grads = torch.autograd.grad(loss_of(case.fused)(*inputs), wanted, create_graph=True)
        assert_close(grads, tuple(first[i] for i in chosen))
        again = torch.autograd.grad(sum((g**2).sum() for g in grads), wanted)
        assert_close(again, tuple(sum(second[j][i] for j in chosen) for i in chosen))


@variants("many-rows", "everything", "projection")
def test_gradient_of_one_result_alone(cell: str, options: dict):
    """[r09b] A loss of any single result, at first and second order."""
    case = make_case(cell, **options)

    def orders(function: Function, result: int) -> list[tuple[Tensor, ...]]:
        y = function(*case.inputs)[result].sin().sum()
        first = torch.autograd.grad(y, case.inputs, create_graph=True, materialize_grads=True)
        squares = sum((g**2).sum() for g in first)
        return [first, torch.autograd.grad(squares, case.inputs, materialize_grads=True)]

    for result in range(1 + CELLS[cell].tensors):
        assert_close(orders(case.fused, result), orders(case.composite, result))


def _kept(case: Case) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        case.fused(*case.inputs)
    return kept


@every_cell
def test_what_a_node_keeps(cell: str):
    """gates_ih, bias_hh, h_n and c_n are not kept for backward; double backward does without them too."""
    case = make_case(cell, T=5, B=3, h=2, reverse=(False,))
    results = {"output": (5, 3, 2), "saved": (5, 3, CELLS[cell].saved * 2)}
    arguments = [tuple(x.shape) for name, x in case.tensors.items() if name in ("weight_hh", "params", "h_0", "c_0")]
    assert sorted(tuple(x.shape) for x in _kept(case)) == sorted([*arguments, *results.values()])


# ---- modes, lifetimes, in-place writes ----


@every_cell
def test_without_grad(cell: str):
    """[r09e] no_grad and inference_mode: one call, no node, nothing saved."""
    case = make_case(cell, lengths="rows", resets="groups", reset_state=True)
    expected = [y.detach() for y in case.composite(*case.inputs)]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, count_calls() as calls:
            *results, saved = recurrent_forward(*case.arguments(), False)
            assert not any(y.requires_grad for y in results)
            assert results[0].is_inference() == torch.is_inference_mode_enabled()
        assert calls == {"forward": 1}
        assert saved.numel() == 0
        assert_close(list(results[: len(expected)]), expected)


@every_cell
def test_h_n_and_c_n_may_be_overwritten(cell: str):
    """[r09f] Backward does not read the final states: an in-place change of them is the user's business."""
    case = make_case(cell)

    def overwritten(*inputs: Tensor) -> tuple[Tensor, ...]:
        output, *states = case.fused(*inputs)
        return output, *(state.mul_(2).add_(1) for state in states)

    def replaced(*inputs: Tensor) -> tuple[Tensor, ...]:
        output, *states = case.composite(*inputs)
        return output, *(state * 2 + 1 for state in states)

    assert_close(gradients(overwritten, case.inputs), gradients(replaced, case.inputs))


def test_graph_is_freed():
    """[r09d] No cycle keeps a node alive."""
    case = make_case("lstm", lengths="rows", resets="rows", reset_state=True)
    for create_graph in (False, True):
        output = case.fused(*case.inputs)[0]
        grads = torch.autograd.grad(output.sum(), case.inputs, create_graph=create_graph)
        node = weakref.ref(output.grad_fn)
        del output, grads
        assert node() is None


@pytest.mark.parametrize(
    "name", ["weight_hh", "weight_hr", "h_0", "c_0", "reset_h", "reset_c", "mask_h", "keep_h", "keep_c", "output"]
)
def test_in_place_change_is_detected(name: str):
    """[r09d] Backward refuses tensors that changed since the forward pass."""
    case = make_case("lstm", projection=1, resets="rows", reset_state=True, noise=True)
    output = case.fused(*case.inputs)[0]
    loss = output.sin().sum()
    with torch.no_grad():
        (output if name == "output" else case.tensors[name]).mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_cell
@pytest.mark.parametrize("initial", [True, False])
def test_backward_op_called_directly(cell: str, initial: bool):
    """recurrent_backward is an op like any other, differentiable, whichever gradients it gets and gives."""
    case = make_case(cell, resets="groups", reset_state=True)
    for given in itertools.product((False, True), repeat=3):
        args = backward_arguments(case, given=given, initial=initial, requires_grad=True)
        wanted = [x for x in args if isinstance(x, Tensor) and x.requires_grad]

        def run(function: Function, args: list = args, wanted: list = wanted) -> tuple[Tensor, ...]:
            results = [y for y in function(*args) if y.numel()]
            first = torch.autograd.grad(loss_of(lambda: results)(), wanted, materialize_grads=True)
            return (*results, *first)

        assert_close(run(recurrent_backward), run(reference.backward))


@every_cell
@pytest.mark.parametrize("masked", [False, True])
def test_no_steps(cell: str, masked: bool):
    """Zero steps: the final states are the first ones, and weights get zeros."""
    case = make_case(cell, T=0, **({"resets": "rows", "reset_state": True} if masked else {}))
    assert_close(
        torch.autograd.grad(loss_of(case.fused)(*case.inputs), case.inputs, materialize_grads=True),
        torch.autograd.grad(loss_of(case.composite)(*case.inputs), case.inputs, materialize_grads=True),
    )


@pytest.mark.parametrize("options", [{}, {"recompute": 3}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("given", ["plain", "lengths", "packed"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_tangents_that_come_with_the_gradient(kind: str, given: str, options: dict[str, Any]) -> None:
    """Forward over reverse where nothing that the call reads has a tangent: a gradient is linear in its output's."""
    module = getattr(fastrnn, kind)(4, 6, 2, dtype=torch.float64, **options)
    x, lengths = randn(9, 3, 4).requires_grad_(), torch.tensor([9, 5, 2])

    def output() -> Tensor:
        if given == "packed":
            return module(pack_padded_sequence(x, lengths))[0].data
        return module(x, **({"lengths": lengths} if given == "lengths" else {}))[0]

    leaves = [x, *module.parameters()]
    y = output()
    along, at = randn(*y.shape, seed=1), randn(*y.shape, seed=2)
    want = torch.autograd.grad(y, leaves, along)
    with forward_ad.dual_level():
        found = torch.autograd.grad(output(), leaves, forward_ad.make_dual(at, along))
        for grad, tangent in zip(found, want, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(grad).tangent, tangent)
