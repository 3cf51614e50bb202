"""The numbers of a case: weights, inputs, states and upstream gradients, equal for every contestant."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case


@dataclass
class Data:
    """All in torch.nn's names and layouts. O = (proj or H) * directions."""

    weights: dict[str, Tensor]  # state_dict of the torch.nn module
    input: Tensor  # [T, B, I], cells [B, I]; zero past a row's length; tokens int64 [T, B]
    lengths: Tensor | None  # [B] int64
    state: tuple[Tensor, ...] | None  # h_0 (and c_0) [layers * directions, B, H], cells [B, H]
    grad_outputs: tuple[Tensor, ...]  # of output [T, B, O] (0 past the lengths); of a cell's h (and c) [B, H]
    resets: Tensor | None = None  # [T, B] bool: the state is zeroed before step t

    def to(self, dtype: torch.dtype) -> Data:
        """A converted copy that shares no memory with this one; lengths stay as they are."""

        def convert(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.detach().to(dtype if value.is_floating_point() else value.dtype, copy=True)
            if isinstance(value, dict):
                return {key: convert(item) for key, item in value.items()}
            return tuple(convert(item) for item in value) if isinstance(value, tuple) else value

        return Data(**{field.name: convert(getattr(self, field.name)) for field in fields(self)})


def module_arguments(case: Case) -> dict[str, Any]:
    """Constructor arguments of the case's torch.nn class."""
    arguments: dict[str, Any] = {"input_size": case.I, "hidden_size": case.H}
    if not case.is_cell:
        arguments |= {"num_layers": case.layers, "bidirectional": case.bidirectional}
        if case.proj:
            arguments["proj_size"] = case.proj
    if case.nonlinearity:
        arguments["nonlinearity"] = case.nonlinearity
    if not case.bias:
        arguments["bias"] = False
    if case.batch_first:
        arguments["batch_first"] = True
    return arguments | {"dtype": getattr(torch, case.dtype)}


def make_data(case: Case, seed: int = 0) -> Data:
    """Drawn in float64, then rounded to the case's dtype. Leaves the global random state alone.

    Weights are torch.nn's own initialisation, recurrent ones times the case's gain; inputs and gradients are normal,
    states uniform in [-1, 1].
    """
    wide = torch.float64
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=wide)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = getattr(torch.nn, case.cell)(**module_arguments(case) | {"dtype": wide})
    weights = {
        name: weight.detach() * (case.gain if name.startswith("weight_hh") else 1)
        for name, weight in module.state_dict().items()
    }

    if case.peephole:
        weights["weight_ch_l0"] = (2 * torch.rand(3, case.H, generator=generator, dtype=wide) - 1) * case.H**-0.5
    if case.layer_norm:  # biases near 0, gains near 1; those of W_hh h lower, or rounding errors grow at each step
        weights = {name: x for name, x in weights.items() if not name.startswith("bias")}
        params = 0.1 * normal(18 if case.cell == "LSTM" else 12, case.H)
        gates = weights["weight_hh_l0"].shape[0] // case.H
        params[:gates] += 1
        params[gates : 2 * gates] += 0.2
        params[4 * gates : 4 * gates + 1] += 1
        weights["weight_ln_l0"] = params
    if case.num_heads > 1:  # one block a head: the dense matrix's first h columns
        rows = weights["weight_hh_l0"].shape[0] // case.num_heads
        columns = weights["weight_hh_l0"][:, : case.H // case.num_heads]
        weights["weight_hh_l0"] = columns.reshape(case.num_heads, rows, -1)
    directions = 2 if case.bidirectional else 1
    leading = (case.B,) if case.is_cell else (case.T, case.B)
    lengths = valid = None
    if case.shortest:
        lengths = torch.randint(case.shortest, case.T + 1, (case.B,), generator=generator)
        lengths[case.B // 2] = case.T
        valid = (torch.arange(case.T)[:, None] < lengths)[:, :, None]  # [T, B, 1]

    def sequence(size: int) -> Tensor:
        values = normal(*leading, size)
        return values if valid is None else values * valid

    state = None
    if case.stateful:
        rows = (case.B,) if case.is_cell else (case.layers * directions, case.B)
        sizes = [case.proj or case.H, case.H] if case.cell.startswith("LSTM") else [case.H]
        state = tuple(2 * torch.rand(*rows, size, generator=generator, dtype=wide) - 1 for size in sizes)
    count = 2 if case.cell == "LSTMCell" else 1  # a cell's h and c are both used further on
    grad_outputs = tuple(sequence((case.proj or case.H) * directions) for _ in range(count))
    input = torch.randint(case.I, leading, generator=generator) if case.tokens else sequence(case.I)
    resets = torch.rand(case.T, case.B, generator=generator) < 1 / case.resets if case.resets else None
    data = Data(weights, input, lengths, state, grad_outputs, resets)
    return data.to(getattr(torch, case.dtype))
