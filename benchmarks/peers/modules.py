"""Contestants that are modules with torch.nn's parameters: fastrnn and torch.nn themselves, and loops over time."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.func import functional_call, grad, jvp
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

from benchmarks.cases import FORWARD_MODE, Case, is_training, way_of
from benchmarks.data import Data, module_arguments
from benchmarks.peers.base import Prepared
from benchmarks.peers.per_sample import prepare_vmap, supports_per_sample
from benchmarks.peers.ways import WAYS

TOLERANCE_OF_AUTOCAST = 6e-2  # as measure.TOLERANCE's of bfloat16, for gradients in float32 too


class ModulePeer:
    """Anything with torch.nn's classes under torch.nn's names."""

    by_token = True  # weight_ih_l0 is stored by token where the input is tokens

    def __init__(
        self,
        key: str,
        title: str,
        import_name: str,
        version_of: str | None = None,
        kernel: Callable[[Case, str], str] = lambda case, mode: "",
        options: bool = False,
        per_sample: bool = False,
        only_reverse: tuple[str, ...] = (),
    ) -> None:
        """`kernel` says what a call runs; `options`: it has Case.beyond_torch, too; `per_sample`: vmap goes through;
        `only_reverse`: cells that have no forward-mode AD."""
        self.key, self.title = key, title
        self._import_name, self._version_of = import_name, version_of or import_name
        self._kernel, self._options = kernel, options
        self.per_sample, self._only_reverse = per_sample, only_reverse

    @property
    def namespace(self) -> ModuleType:
        return importlib.import_module(self._import_name)

    def missing(self) -> str | None:
        try:
            has_layers = hasattr(self.namespace, "LSTM")
        except Exception as error:  # a broken build raises more than ImportError
            return f"{self._import_name} cannot be imported: {error}"
        return None if has_layers else f"{self._import_name} has no LSTM: not built or not installed"

    def version(self) -> str:
        return str(getattr(importlib.import_module(self._version_of), "__version__", "unknown"))

    def supports(self, case: Case, mode: str) -> str | None:
        if mode == "persample":
            return supports_per_sample(case, mode)
        if mode in FORWARD_MODE and case.cell in self._only_reverse:
            return f"its {case.cell} has no forward-mode AD"
        return f"it has no {', '.join(case.beyond_torch)}" if case.beyond_torch and not self._options else None

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        options: dict[str, Any] = {"recompute": case.recompute} if case.recompute else {}
        if case.tokens:
            options["token_input"] = True
        module = getattr(self.namespace, case.cell)(**module_arguments(case), **case.variant, **options)
        module.load_state_dict(data.weights)
        if case.tokens and self.by_token:
            module.store_by_token()
        if mode == "persample":
            return prepare_vmap(module, data)
        prepared = prepare_module(module, case, mode, data)
        return replace(prepared, kernel=lambda: self._kernel(case, mode))


def prepare_module(module: torch.nn.Module, case: Case, mode: str, data: Data) -> Prepared:
    """Steps of a module called like torch.nn's. Packing and transposing is done here, outside the timed step."""
    training, way = is_training(mode), way_of(mode)
    module.train(training)
    call = WAYS[way](module)
    tolerance = TOLERANCE_OF_AUTOCAST if way == "autocast" else None
    grad_outputs = list(data.grad_outputs)
    if case.unbatched:
        data.input = data.input[:, 0]
        data.state = data.state and tuple(x[:, 0] for x in data.state)
        grad_outputs = [grad[:, 0] for grad in grad_outputs]
    if case.batch_first:
        data.input = data.input.transpose(0, 1).contiguous()
        grad_outputs = [grad.transpose(0, 1).contiguous() for grad in grad_outputs]
    sequence: Any = data.input  # [T, B, I], or [B, T, I] with batch_first
    options: dict[str, Any] = {} if data.resets is None else {"resets": data.resets}
    if case.padded:
        options["lengths"], leaf = data.lengths, data.input
    elif case.nested:
        assert data.lengths is not None
        leaf, *grad_outputs = (nested_rows(x, data.lengths) for x in (data.input, *grad_outputs))
        grad_outputs, sequence = [grad.values() for grad in grad_outputs], leaf
    elif data.lengths is not None:
        packed = pack_padded_sequence(data.input, data.lengths, enforce_sorted=False)
        grads = [pack_padded_sequence(grad, data.lengths, enforce_sorted=False) for grad in grad_outputs]
        leaf = packed.data.detach()  # [sum(lengths), I]
        sequence = repack(packed, leaf)
        grad_outputs = [grad.data for grad in grads]
    else:
        leaf = data.input
    state: Any = None
    if data.state is not None:
        state = data.state if case.cell.startswith("LSTM") else data.state[0]
    arguments = (sequence,) if state is None else (sequence, state)
    weights = list(module.parameters())

    def named(result: Any) -> dict[str, Tensor]:
        """Under autocast in one dtype: torch.nn's layers return now its own, now the state's."""
        results = named_results(case, result)
        return {name: x.float() for name, x in results.items()} if way == "autocast" else results

    if not training:

        def forward() -> Any:
            return call(*arguments, **options)

        def forward_results() -> dict[str, Tensor]:
            with torch.inference_mode():
                return named(forward())

        return Prepared(forward, forward_results, context=torch.inference_mode, tolerance=tolerance)

    if mode in FORWARD_MODE:
        return prepare_forward_mode(module, mode, leaf, grad_outputs[0])

    parameters = dict(module.named_parameters())
    has_gradient = leaf.is_floating_point() and not case.frozen
    states = dict(zip(("h_0", "c_0"), data.state or (), strict=False)) if case.is_cell else {}
    for tensor in states.values():
        tensor.requires_grad_()
    leaves = {**({"input": leaf.requires_grad_()} if has_gradient else {}), **states, **parameters}

    def train() -> Any:
        for tensor in leaves.values():
            tensor.grad = None
        result = call(*arguments, **options)
        targets = gradient_targets(case, result)
        torch.autograd.backward(targets, [g.to(x.dtype) for g, x in zip(grad_outputs, targets, strict=True)])
        increment_version(weights)  # as an optimizer's update: what was derived from old weights is stale
        return result

    def penalty() -> Any:
        for tensor in leaves.values():
            tensor.grad = None
        result = call(*arguments, **options)
        (first,) = torch.autograd.grad(gradient_targets(case, result), leaf, grad_outputs, create_graph=True)
        first.square().sum().backward()
        increment_version(weights)
        return result

    step = penalty if mode == "penalty" else train

    def train_results() -> dict[str, Tensor]:
        torch.manual_seed(0)  # so that both sides draw the same
        results = named(step())
        for name, tensor in leaves.items():
            if tensor.grad is None:
                raise AssertionError(f"no gradient reached {name}")
            results[f"grad_{name}"] = tensor.grad
        if isinstance(sequence, PackedSequence) and has_gradient:
            results["grad_input"] = unpack(repack(sequence, results["grad_input"]))
        if case.nested and has_gradient:
            results["grad_input"] = padded_rows(results["grad_input"])
        if case.batch_first and has_gradient:
            results["grad_input"] = results["grad_input"].transpose(0, 1)
        return {name: tensor.detach().clone() for name, tensor in results.items()}

    return Prepared(step, train_results, tolerance=tolerance)


def prepare_forward_mode(module: torch.nn.Module, mode: str, input: Tensor, grad_output: Tensor) -> Prepared:
    """The derivative of a layer's output in one direction of input and parameters ("jvp"), or that of the gradients of
    its product with grad_output by all of these, forward over reverse ("hvp")."""
    primals = ({name: p.detach() for name, p in module.named_parameters()}, input)
    along = tree_map(lambda x: (37 * x).sin(), primals)  # any

    def output(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(module, weights, (x,))[0]
        return found

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return (output(weights, x) * grad_output).sum()

    function = output if mode == "jvp" else grad(loss, (0, 1))

    def step() -> Any:
        return jvp(function, primals, along)

    def results() -> dict[str, Tensor]:
        if mode == "jvp":
            return dict(zip(("output", "tangent"), step(), strict=True))
        named: dict[str, Tensor] = {}
        for kind, (of_weights, of_input) in zip(("grad", "product"), step(), strict=True):
            named |= {f"{kind}_{name}": x for name, x in {"input": of_input, **of_weights}.items()}
        return named

    return Prepared(step, results)


def gradient_targets(case: Case, result: Any) -> list[Tensor]:
    """What backward starts from: a layer's output (its final states get no gradient), a cell's h (and c)."""
    if case.is_cell:
        return list(result) if isinstance(result, tuple) else [result]
    output = result[0]
    if case.nested:
        return [output.values()]
    return [output.data if isinstance(output, PackedSequence) else output]


def named_results(case: Case, result: Any) -> dict[str, Tensor]:
    """output [T, B, O] (padded with zeros), h_n, c_n; for a cell h, c. Gradients are added as grad_<name>."""
    if case.is_cell:
        states = result if isinstance(result, tuple) else (result,)
        return dict(zip(("h", "c"), states, strict=False))
    output, states = result
    states = states if isinstance(states, tuple) else (states,)
    if isinstance(output, PackedSequence):
        output = unpack(output)
    elif case.nested:
        output = padded_rows(output)
    elif case.batch_first:
        output = output.transpose(0, 1)
    elif case.shortest and not case.padded:
        raise AssertionError("a PackedSequence came in but none came out")
    return {"output": output, **dict(zip(("h_n", "c_n"), states, strict=False))}


def nested_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """[T, B, n] as a nested tensor [B, j, n]."""
    rows = [x[:n, b] for b, n in enumerate(lengths.tolist())]
    nested: Tensor = torch.nested.nested_tensor(rows, layout=torch.jagged)
    return nested


def padded_rows(nested: Tensor) -> Tensor:
    """The way back, zeros behind each row's end."""
    return torch.nested.to_padded_tensor(nested, 0.0).transpose(0, 1)


def repack(packed: PackedSequence, values: Tensor) -> PackedSequence:
    """`values` [sum(lengths), ...] under the lengths and order of `packed`."""
    return PackedSequence(values, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def unpack(packed: PackedSequence) -> Tensor:
    return pad_packed_sequence(packed)[0]
