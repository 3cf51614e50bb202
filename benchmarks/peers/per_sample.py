"""Per-sample gradients: for every sample of a batch the gradients of its own loss by all parameters, [B, ...] each.

A sample's loss is the sum of its output times a fixed gradient, as in a training step.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.cases import Case
from benchmarks.data import Data, module_arguments
from benchmarks.peers.base import PackagePeer, Prepared, plain_layer

Gradients = dict[str, Tensor]


def supports_per_sample(case: Case, mode: str) -> str | None:
    """Why a per-sample contestant has no such case."""
    if mode != "persample":
        return "per-sample gradients only"
    if case.is_cell or case.stateful:
        return "per-sample gradients of whole layers without a given state only"
    return plain_layer(case, mode, training=True)


def _prepared(step: Callable[[], Gradients], kernel: str) -> Prepared:
    def results() -> Gradients:
        return {f"grad_{name}": g.detach().clone() for name, g in step().items()}

    return Prepared(step, results, kernel=lambda: kernel)


def prepare_vmap(module: torch.nn.Module, data: Data) -> Prepared:
    """vmap over the gradient of one sample's loss."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    (grad_output,) = data.grad_outputs

    def loss(parameters: Gradients, x: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = functional_call(module, parameters, (x.unsqueeze(1),))[0]
        return (output.squeeze(1) * weight).sum()

    of_samples: Any = vmap(grad(loss), in_dims=(None, 1, 1))
    return _prepared(lambda: of_samples(parameters, data.input, grad_output), "vmap(grad(functional_call))")


class SampleLoop:
    """A backward pass for each sample in turn, the gradients stacked at the end."""

    per_sample = True

    def __init__(self, key: str, import_name: str) -> None:
        self.key, self.title, self._import_name = key, f"{import_name}, a backward pass a sample", import_name

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def supports(self, case: Case, mode: str) -> str | None:
        return supports_per_sample(case, mode)

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        module = getattr(importlib.import_module(self._import_name), case.cell)(**module_arguments(case))
        module.load_state_dict(data.weights)
        names, parameters = zip(*module.named_parameters(), strict=True)
        (grad_output,) = data.grad_outputs

        def step() -> Gradients:
            each = []
            for b in range(case.B):
                output = module(data.input[:, b : b + 1])[0]
                each.append(torch.autograd.grad(output, parameters, grad_output[:, b : b + 1]))
            return {name: torch.stack(grads) for name, grads in zip(names, zip(*each, strict=True), strict=True)}

        return _prepared(step, "one batch row at a time")


class OpacusPeer(PackagePeer):
    """Opacus' layers under its GradSampleModule: linear layers with hooks that keep per-sample gradients."""

    key, title = "opacus", "Opacus' DPLSTM, DPGRU, DPRNN"
    packages = imports = ("opacus",)
    per_sample = True

    def supports(self, case: Case, mode: str) -> str | None:
        return supports_per_sample(case, mode)

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        from opacus import GradSampleModule, layers

        module = getattr(layers, f"DP{case.cell}")(case.I, case.H)
        module.load_state_dict(data.weights)
        wrapped = GradSampleModule(module, batch_first=False, loss_reduction="sum")
        parameters = {name.removeprefix("_module."): p for name, p in wrapped.named_parameters()}
        (grad_output,) = data.grad_outputs
        # the input is no leaf of ours: its hooks say so at every call
        warnings.filterwarnings("ignore", message="Full backward hook is firing")

        def step() -> Gradients:
            for p in parameters.values():
                p.grad = p.grad_sample = None
            wrapped(data.input)[0].backward(grad_output)
            return {name: p.grad_sample for name, p in parameters.items()}

        return _prepared(step, "GradSampleModule")
