"""Hand-written loops over time in PyTorch: what one writes where torch.nn's layers do not fit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, layer_norm, linear

from benchmarks.cases import Case, is_training
from benchmarks.data import Data, module_arguments
from benchmarks.peers.base import NoResult, Prepared
from benchmarks.peers.modules import prepare_module


def next_states(
    cell: str,
    gates_ih: Tensor,
    gates_hh: Tensor,
    states: tuple[Tensor, ...],
    relu: bool,
    peepholes: Tensor | None = None,
    of_c: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One step: both gates [B, G*H], states [B, H] each, peepholes [3, H] of i, f and o, of_c [2, H]: gain and bias of
    c's normalization."""
    if cell == "LSTM":
        i, f, g, o = (gates_ih + gates_hh).chunk(4, 1)
        if peepholes is not None:
            i, f = i + peepholes[0] * states[1], f + peepholes[1] * states[1]
        c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        if peepholes is not None:
            o = o + peepholes[2] * c
        return torch.sigmoid(o) * torch.tanh(c if of_c is None else layer_norm(c, of_c.shape[1:], *of_c)), c
    if cell == "GRU":
        (r_ih, z_ih, n_ih), (r_hh, z_hh, n_hh) = gates_ih.chunk(3, 1), gates_hh.chunk(3, 1)
        z = torch.sigmoid(z_ih + z_hh)
        n = torch.tanh(n_ih + torch.sigmoid(r_ih + r_hh) * n_hh)
        return (n + z * (states[0] - n),)
    return (torch.relu(gates_ih + gates_hh) if relu else torch.tanh(gates_ih + gates_hh),)


class HandLoop(torch.nn.Module):
    """One layer on torch.nn's parameters. Input [T, B, I]; the input GEMM of all steps is hoisted before the loop."""

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor | None
    bias_hh_l0: Tensor | None

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        for name, weight in getattr(torch.nn, case.cell)(**module_arguments(case)).named_parameters():
            self.register_parameter(name, torch.nn.Parameter(weight.detach()))
        if case.peephole:
            self.weight_ch_l0 = torch.nn.Parameter(self.weight_hh_l0.new_empty(3, case.H))
        if case.layer_norm:
            self.bias_ih_l0 = self.bias_hh_l0 = None
            rows = 18 if case.cell == "LSTM" else 12
            self.weight_ln_l0 = torch.nn.Parameter(self.weight_hh_l0.new_empty(rows, case.H))
        if case.num_heads > 1:
            h = case.H // case.num_heads
            rows = self.weight_hh_l0.shape[0] // case.num_heads
            self.weight_hh_l0 = torch.nn.Parameter(self.weight_hh_l0.new_empty(case.num_heads, rows, h))

    def start(self, input: Tensor, state: Any) -> tuple[Tensor, ...]:
        if state is None:
            zeros = input.new_zeros(input.shape[1], self.case.H)
            return (zeros, zeros) if self.case.cell == "LSTM" else (zeros,)
        return tuple(s[0] for s in (state if isinstance(state, tuple) else (state,)))

    def finish(self, outputs: list[Tensor], states: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        finals = tuple(s.unsqueeze(0) for s in states)
        return torch.stack(outputs), finals if self.case.cell == "LSTM" else finals[0]

    def normalised(self, gates: Tensor, side: int) -> Tensor:
        """gates [.., G*H] of W_ih x (side 0) or W_hh h (1), each gate by itself, where the case asks for it."""
        if not self.case.layer_norm:
            return gates
        count = gates.shape[-1] // self.case.H
        gains, biases = self.weight_ln_l0[: 4 * count].unflatten(0, (2, 2, count))[:, side]
        by_gate = layer_norm(gates.unflatten(-1, (count, -1)), (self.case.H,))
        return (by_gate * gains + biases).flatten(-2)

    def forward(self, input: Tensor, state: Any = None, resets: Tensor | None = None) -> tuple[Tensor, Any]:
        states, outputs = self.start(input, state), []
        relu = self.case.nonlinearity == "relu"
        gates_ih = self.normalised(linear(input, self.weight_ih_l0, self.bias_ih_l0), 0)  # [T, B, G*H]
        keep = None if resets is None else (~resets).to(input.dtype).unsqueeze(2)  # [T, B, 1]
        peepholes = self.weight_ch_l0 if self.case.peephole else None
        of_c = self.weight_ln_l0[16:] if self.case.layer_norm and self.case.cell == "LSTM" else None
        mask, keeps = self.draw(input, len(states))
        for t, gates in enumerate(gates_ih.unbind(0)):
            if keep is not None:
                states = tuple(s * keep[t] for s in states)
            multiplied = states[0] if mask is None else states[0] * mask
            if self.case.reset_after:
                gates_hh = self.normalised(self.product(multiplied), 1)
                made = next_states(self.case.cell, gates, gates_hh, states, relu, peepholes, of_c)
            else:
                made = self.reset_before(gates, states[0])
            states = (
                tuple(x[t] * s + (1 - x[t]) * m for x, s, m in zip(keeps, states, made, strict=True)) if keeps else made
            )
            outputs.append(states[0])
        return self.finish(outputs, states)

    def product(self, h: Tensor) -> Tensor:
        """W_hh h + b_hh, [B, G*H]; of heads every block [G*H/N, H/N] with its own part of h."""
        N = self.case.num_heads
        if N == 1:
            return linear(h, self.weight_hh_l0, self.bias_hh_l0)
        by_head = torch.einsum("bnk,nrk->bnr", h.unflatten(1, (N, -1)), self.weight_hh_l0)
        gates = by_head.unflatten(2, (-1, self.case.H // N)).transpose(1, 2).flatten(1)
        return gates if self.bias_hh_l0 is None else gates + self.bias_hh_l0

    def reset_before(self, gates_ih: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """A step of Cho's GRU: the candidate's product is with r h."""
        cut = [2 * self.case.H, self.case.H]
        weights, biases = self.weight_hh_l0.split(cut), (None, None)
        if self.bias_hh_l0 is not None:
            biases = self.bias_hh_l0.split(cut)
        early, late = gates_ih.split(cut, 1)
        r, z = torch.sigmoid(early + linear(h, weights[0], biases[0])).chunk(2, 1)
        n = torch.tanh(late + linear(r * h, weights[1], biases[1]))
        return (n + z * (h - n),)

    def draw(self, input: Tensor, count: int) -> tuple[Tensor | None, list[Tensor]]:
        """Recurrent dropout's mask of h [B, H], the one that fastrnn draws, and zoneout's of each state [T, B, H],
        which fastrnn does not let torch's generator draw one by one."""
        (T, B, _), H, p = input.shape, self.case.H, self.case.zoneout
        mask = None
        if self.training and self.case.recurrent_dropout:
            mask = dropout(input.new_ones(B, H), self.case.recurrent_dropout)
        if not p:
            return mask, []
        if not self.training:
            return mask, [input.new_full((T, 1, 1), p)] * count
        return mask, [torch.bernoulli(input.new_empty(T, B, H), p) for _ in range(count)]


class CellLoop(HandLoop):
    """torch.nn's cell in a loop, the state multiplied by a mask: the usual way with resets."""

    cell: Any

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        options = {"nonlinearity": case.nonlinearity} if case.nonlinearity else {}
        cell = getattr(torch.nn, f"{case.cell}Cell")(case.I, case.H, dtype=getattr(torch, case.dtype), **options)
        for name, _ in list(cell.named_parameters()):
            setattr(cell, name, getattr(self, f"{name}_l0"))  # the same parameters, under the cell's names
        object.__setattr__(self, "cell", cell)  # not registered: the names of the parameters stay torch.nn.LSTM's

    def forward(self, input: Tensor, state: Any = None, resets: Tensor | None = None) -> tuple[Tensor, Any]:
        states, outputs = self.start(input, state), []
        keep = None if resets is None else (~resets).to(input.dtype).unsqueeze(2)
        for t, x in enumerate(input.unbind(0)):
            if keep is not None:
                states = tuple(s * keep[t] for s in states)
            result = self.cell(x, states if len(states) > 1 else states[0])
            states = result if isinstance(result, tuple) else (result,)
            outputs.append(states[0])
        return self.finish(outputs, states)


class LayerPerStep(HandLoop):
    """torch.nn's layer called for one step at a time, the state multiplied by a mask between the calls."""

    layer: Any

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        layer = getattr(torch.nn, case.cell)(**module_arguments(case))
        for name in list(layer._parameters):
            setattr(layer, name, getattr(self, name))
        object.__setattr__(self, "layer", layer)

    def train(self, mode: bool = True) -> LayerPerStep:
        self.layer.train(mode)
        return super().train(mode)

    def forward(self, input: Tensor, state: Any = None, resets: Tensor | None = None) -> tuple[Tensor, Any]:
        states = tuple(s.unsqueeze(0) for s in self.start(input, state))
        keep = None if resets is None else (~resets).to(input.dtype).unsqueeze(2)
        outputs = []
        for t, x in enumerate(input.split(1)):
            if keep is not None:
                states = tuple(s * keep[t] for s in states)
            output, result = self.layer(x, states if len(states) > 1 else states[0])
            states = result if isinstance(result, tuple) else (result,)
            outputs.append(output[0])
        return self.finish(outputs, tuple(s[0] for s in states))


class LoopPeer:
    """A module of this file as a contestant. One layer, one direction, padded input, any dtype."""

    def __init__(self, key: str, title: str, module: Callable[[Case], torch.nn.Module], kernel: str) -> None:
        self.key, self.title = key, title
        self._module, self._kernel = module, kernel

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def supports(self, case: Case, mode: str) -> str | None:
        options = {
            "cells": case.is_cell, "PackedSequence": case.shortest, "proj_size": case.proj, "layers": case.layers > 1,
            "directions": case.bidirectional, "bias=False": not case.bias, "batch_first": case.batch_first,
            "unbatched input": case.unbatched, "tokens": case.tokens, "recompute": case.recompute,
        }  # fmt: skip
        refused = [name for name, there in options.items() if there]
        if self._module is not HandLoop:
            refused += case.variant
        return f"the loop is written without {', '.join(refused)}" if refused else None

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        module = self._module(case)
        module.load_state_dict(data.weights)
        prepared = prepare_module(module, case, mode, data)
        draws = is_training(mode) and case.zoneout > 0  # other masks than ours
        return replace(prepared, another_layer=draws, kernel=lambda: self._kernel)


class OutOfTime(BaseException):
    """Raised by the alarm; no `except Exception` inside a compiler swallows it."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """NoResult if the block takes longer. Only the main thread can be stopped; in another one there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except OutOfTime:
        raise NoResult(f"no result from {what} within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class CompiledLoopPeer(LoopPeer):
    """The hand loop under torch.compile, which unrolls it: compile time grows with T, so both are bounded."""

    _draws = False  # inductor's random numbers are not eager torch's
    longest = 32  # steps
    limit_s = 60.0  # for compiling and running the first step

    def __init__(self) -> None:
        super().__init__(
            "compiled", "hand loop under torch.compile", HandLoop, "torch.compile(fullgraph=True), inductor"
        )

    def supports(self, case: Case, mode: str) -> str | None:
        if self.longest < case.T:
            return f"torch.compile unrolls the loop: not tried above T = {self.longest}"
        return super().supports(case, mode)

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        torch._dynamo.reset()
        module = self._module(case)
        module.load_state_dict(data.weights)
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
        prepared = prepare_module(module, case, mode, data)
        with time_limit(self.limit_s, "torch.compile"), prepared.context():
            prepared.step()
        return replace(prepared, kernel=lambda: self._kernel)
