"""Contestants for sequences as they come: ours without a part of what a case asks for, and TorchRL's modules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import embedding

from benchmarks.cases import PLAIN, Case
from benchmarks.data import Data, make_data
from benchmarks.peers.base import PackagePeer, Prepared, plain_layer
from benchmarks.peers.modules import ModulePeer, prepare_module

ANYTHING = 1e9  # as a tolerance: the results differ by design


class UnmaskedPeer(ModulePeer):
    """fastrnn on the same padded input as if every step were valid and no episode ended: what masks cost."""

    def supports(self, case: Case, mode: str) -> str | None:
        if not (case.shortest or case.resets):
            return "it leaves lengths and resets away, here are none"
        return super().supports(case, mode)

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        valid = "" if data.lengths is None else f"{data.lengths.sum() / (case.T * case.B):.1%} of the steps are valid"
        case = replace(case, shortest=0, padded=False, nested=False, resets=0)
        prepared = super().prepare(case, mode, replace(data, lengths=None, resets=None))
        kernel = prepared.kernel
        return replace(
            prepared, tolerance=ANYTHING, kernel=lambda: "; ".join(filter(None, (f"unmasked, {kernel()}", valid)))
        )


class PackedPeer(ModulePeer):
    """fastrnn on the same rows as a PackedSequence: what a nested tensor costs beside it."""

    def supports(self, case: Case, mode: str) -> str | None:
        return super().supports(case, mode) if case.nested else "it packs a nested input, here is none"

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        return super().prepare(replace(case, nested=False), mode, data)


class EverythingKeptPeer(ModulePeer):
    """fastrnn without recompute: training keeps the states and gates of all steps."""

    def supports(self, case: Case, mode: str) -> str | None:
        return super().supports(case, mode) if case.recompute else "it leaves recompute away, here is none"

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        return super().prepare(replace(case, recompute=0), mode, data)


class PlainCellPeer(ModulePeer):
    """fastrnn's layer without the option that makes it another; in place of a projection fewer units, H' of them, such
    that a step has as many multiply-adds."""

    def supports(self, case: Case, mode: str) -> str | None:
        other = case.variant or case.proj
        return super().supports(case, mode) if other else "there is nothing that it leaves away"

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        if case.proj:  # 4 H' (I + H') = 4 H (I + P) + H P
            work = case.H * (case.I + case.proj) + case.H * case.proj / 4
            H = round((math.sqrt(case.I**2 + 4 * work) - case.I) / 2)
            case = replace(case, H=H, proj=0)
        plain = replace(case, **PLAIN)
        prepared = super().prepare(plain, mode, make_data(plain).to(data.input.dtype))
        kernel = prepared.kernel
        return replace(prepared, another_layer=True, kernel=lambda: f"H = {plain.H}, {kernel()}")


class TokenColumnsPeer(ModulePeer):
    """fastrnn with weight_ih_l0 as torch.nn lays it out, where a token is a column."""

    by_token = False

    def supports(self, case: Case, mode: str) -> str | None:
        return super().supports(case, mode) if case.tokens else "tokens only"


class EmbeddingPeer:
    """An nn.Embedding as wide as the gates before our recurrence: what looking tokens up costs at least."""

    key, title = "embedding", "torch.nn.Embedding(I, G*H) before our recurrence"

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def supports(self, case: Case, mode: str) -> str | None:
        if not case.tokens:
            return "tokens only"
        return plain_layer(replace(case, tokens=False), mode, training=True)

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        from fastrnn.ops import CELLS
        from fastrnn.records import LayerStates

        cell = {"RNN": "rnn_tanh"}.get(case.cell, case.cell.lower())
        weights = {name: w.detach().requires_grad_(mode == "train") for name, w in data.weights.items()}
        table = torch.nn.Embedding(case.I, weights["weight_ih_l0"].shape[0])
        table.weight.data = data.weights["weight_ih_l0"].t().contiguous()
        zeros = data.weights["weight_hh_l0"].new_zeros(case.B, case.H)
        c_0 = zeros if CELLS[cell].states > 1 else None
        recurrence: Any = torch.ops.fastrnn.recurrent_forward

        def forward() -> tuple[Tensor, ...]:
            gates = embedding(data.input, table.weight) + weights["bias_ih_l0"]
            hh = (weights[name].unsqueeze(0) for name in ("weight_hh_l0", "bias_hh_l0"))
            rest = (None, None, *LayerStates(zeros, c_0))  # neither weight_hr nor params
            found: tuple[Tensor, ...] = recurrence(cell, gates, *hh, *rest, [False], mode == "train")
            return found

        def named(found: tuple[Tensor, ...]) -> dict[str, Tensor]:
            finals = dict(zip(("h_n", "c_n"), found[1 : 1 + CELLS[cell].states], strict=False))
            return {"output": found[0], **{name: x.unsqueeze(0) for name, x in finals.items()}}

        if mode == "fwd":

            def forward_results() -> dict[str, Tensor]:
                with torch.inference_mode():
                    return named(forward())

            return Prepared(forward, forward_results, torch.inference_mode, kernel=lambda: "ATen's look-up")
        leaves = {**weights, "weight_ih_l0": table.weight}

        def train() -> tuple[Tensor, ...]:
            for leaf in leaves.values():
                leaf.grad = None
            found = forward()
            found[0].backward(data.grad_outputs[0])
            increment_version(list(leaves.values()))
            return found

        def train_results() -> dict[str, Tensor]:
            results = named(train())
            for name, leaf in leaves.items():
                assert leaf.grad is not None
                results[f"grad_{name}"] = leaf.grad.t() if leaf is table.weight else leaf.grad
            return {name: x.detach().clone() for name, x in results.items()}

        return Prepared(train, train_results, kernel=lambda: "ATen's look-up and its dense gradient")


def torchrl_layer(case: Case, backend: str, weights: dict[str, Tensor], resets: Tensor) -> torch.nn.Module:
    """TorchRL's module for these resets [T, B], called like torch.nn's with batch_first, where they lie."""
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

    kind = LSTMModule if case.cell == "LSTM" else GRUModule
    outer = kind(case.I, case.H, in_key="x", out_key="y", recurrent_backend=backend, device=resets.device)
    inner: torch.nn.Module = outer.lstm if case.cell == "LSTM" else outer.gru
    inner.load_state_dict(weights)
    names = ("recurrent_state_h", "recurrent_state_c") if case.cell == "LSTM" else ("recurrent_state",)
    begins = resets.t().unsqueeze(-1).contiguous()  # [B, T, 1]
    zeros = next(iter(weights.values())).new_zeros(case.B, case.T, 1, case.H)
    states = {name: zeros.clone() for name in names}

    class TimeFirst(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, parameter in inner.named_parameters():
                self.register_parameter(name, parameter)

        def forward(self, input: Tensor) -> tuple[Tensor, Any]:
            call = TensorDict({"x": input, "is_init": begins, **states}, [case.B, case.T])
            with set_recurrent_mode(True):
                done = outer(call)
            finals = tuple(done["next", name][:, -1].transpose(0, 1) for name in names)
            return done["y"], finals if len(finals) > 1 else finals[0]

    return TimeFirst()


class TorchRLPeer(PackagePeer):
    """TorchRL's LSTMModule and GRUModule in recurrent mode, episodes told by `is_init`; its own batch-first layout."""

    packages = imports = ("torchrl", "hoptorch")

    def __init__(self, backend: str) -> None:
        self.key, self.title, self._backend = f"torchrl{backend}", f"TorchRL's modules, backend {backend!r}", backend

    def supports(self, case: Case, mode: str) -> str | None:
        reason = plain_layer(replace(case, resets=0), mode, training=True, cells=("LSTM", "GRU"))
        return reason or (None if case.resets and not case.stateful else "cases with resets and no given state only")

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        assert data.resets is not None
        layer = torchrl_layer(case, self._backend, data.weights, data.resets)
        case = replace(case, batch_first=True, resets=0)
        prepared = prepare_module(layer, case, mode, replace(data, resets=None))
        return replace(prepared, kernel=lambda: f"TorchRL, {self._backend}")
