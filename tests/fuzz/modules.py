"""Calls of modules with random options, sizes, dtypes, layouts, strides and masks, against reference.py in float64."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import reference
from fastrnn.ops import CELLS
from fastrnn.records import LayerWeights, joined
from tests.helpers import build, tensors, threads

LAYERS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU", "SLSTM", "LiGRU", "MGU")
CELL_CLASSES = ("LSTMCell", "GRUCell", "RNNCell_TANH", "RNNCell_RELU")
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
STEPS = (1, 2, 3, 4, 5, 7, 8, 13, 17, 33)
DTYPES = ("float64", "float32", "bfloat16", "float16")
# Of the larger of 1 and the largest expected value. Half types round between layers and steps, too.
TOLERANCE = {"float64": 1e-9, "float32": 3e-4, "bfloat16": 0.2, "float16": 0.03}
WORK = 3_000_000  # multiply-adds of a call, about: larger ones get fewer steps and rows


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


# What a case is made of, in JSON's types: written down, it runs again. `arranged` makes what goes together of it. The
# first value of each is what a failing case shrinks to.
CASES = st.fixed_dictionaries(
    {
        "kind": one_of(*LAYERS, *CELL_CLASSES),
        "dtype": one_of(*DTYPES, "float64", "float32", "float32"),
        "T": one_of(*STEPS),
        "B": one_of(*SIZES[:18], 0),
        "input_size": one_of(*SIZES),
        "hidden_size": one_of(*SIZES),
        "num_layers": one_of(1, 1, 2, 3),
        "bias": one_of(True, False),
        "batch_first": one_of(False, True),
        "bidirectional": one_of(False, True),
        "proj_size": one_of(0, 0, 0, *SIZES),
        "learn_initial_state": one_of(False, False, True),
        "state_batch_first": one_of(False, False, True),
        "return_all_states": one_of(False, False, True),
        "token_input": one_of(False, False, True),
        "peephole": one_of(False, False, True),
        "layer_norm": one_of(False, False, False, True),
        "reset_after": one_of(True, True, False),
        "residual": one_of(False, False, True),
        "return_all_layers": one_of(False, False, True),
        "num_heads": one_of(1, 1, 1, 2, 3, 4),
        "grad_clip": one_of(None, None, 0.05),
        "recompute": one_of(0, 0, 1, 2, 5),
        "recurrent_dropout": one_of(0.0, 0.0, 0.3),
        "zoneout": one_of(0.0, 0.0, 0.2, [0.1, 0.3], [0.0, 0.4]),
        "training": one_of(False, True),
        "layout": one_of("padded", "padded", "padded", "packed", "unbatched"),
        "strides": one_of("contiguous", "transposed", "gaps", "offset", "repeated"),
        "state": one_of(False, True),
        "lengths": one_of(None, None, "int64", "int32", "uint8"),
        "resets": one_of(False, False, True),
        "reset_state": one_of(False, True),
        "scale": one_of(1.0, 1.0, 0.0, 30.0),
        "mode": one_of("grad", "grad", "grad", "no_grad", "inference"),
        "without_grad": st.integers(0, 2**20 - 1),  # bit i: leaf i requires none
        "threads": one_of(1, 1, 1, 2, 3),
        "seed": st.integers(0, 2**31 - 1),
    }
)

_OF_CALLS = ("kind", "dtype", "T", "B", "training", "layout", "strides", "state", "lengths", "resets", "reset_state")
_OF_CALLS += ("scale", "mode", "without_grad", "threads", "seed")


def arranged(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The call and the module's options of a case, without what a class lacks or another option does not go with."""
    case = dict(case)
    name = case["kind"].partition("_")[0]
    is_cell = name.endswith("Cell")
    if is_cell and case["layout"] == "packed":
        case["layout"] = "padded"
    if case["layer_norm"]:
        case.update(bias=True, peephole=False, reset_after=True, num_heads=1)
    if case["num_heads"] > 1:
        case["proj_size"] = 0
        case["hidden_size"] = -(-case["hidden_size"] // case["num_heads"]) * case["num_heads"]
    if case["proj_size"] >= case["hidden_size"]:
        case["proj_size"] = 0
    if isinstance(case["zoneout"], list):
        case["zoneout"] = tuple(case["zoneout"]) if case["kind"] == "LSTM" else case["zoneout"][1]
    if case["layout"] != "padded":
        case["lengths"] = None
    if case["layout"] == "packed":
        case.update(resets=False, B=max(case["B"], 1))
    if case["layout"] == "unbatched":
        case["B"] = 1
    known = inspect.signature(getattr(fastrnn, name)).parameters
    call = {k: case.pop(k) for k in _OF_CALLS}
    options = {k: v for k, v in case.items() if k in known}
    if is_cell:
        call.update(T=1, lengths=None, resets=False)
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    a_row = 8 * layers * (options["input_size"] + options["hidden_size"]) * options["hidden_size"]
    while call["T"] * call["B"] * a_row > WORK and max(call["T"], call["B"]) > 1:
        longer = "T" if call["T"] >= call["B"] else "B"
        call[longer] //= 2
    return call, options


def laid_out(x: Tensor, strides: str) -> Tensor:
    """x with other strides, in memory of its exact extent."""
    if strides == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if strides == "gaps":
        return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]
    if strides == "offset":
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    if strides == "repeated":  # every row of a dimension is its first
        return x.narrow(0, 0, 1).expand(x.shape) if len(x) else x
    return x


class _Call:
    """A case as tensors: leaves by name, and what else a call is given."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.call, self.options = arranged(case)
        call, self.dtype = self.call, getattr(torch, self.call["dtype"])
        generator = torch.Generator().manual_seed(call["seed"])
        torch.manual_seed(call["seed"])
        self.module: Any = build(fastrnn, call["kind"], **self.options, dtype=self.dtype)
        self.is_cell = call["kind"].partition("_")[0].endswith("Cell")
        self.module.train(call["training"])
        name, _, kind = call["kind"].partition("_")
        self.cell = (
            self.module._cell
            if not self.is_cell
            else name.removesuffix("Cell").lower() + f"_{kind.lower()}" * bool(kind)
        )
        T, B, I = call["T"], call["B"], self.options["input_size"]  # noqa: E741
        H, D, L = (
            self.options["hidden_size"],
            1 + self.options.get("bidirectional", False),
            self.options.get("num_layers", 1),
        )
        R = self.options.get("proj_size", 0) or H
        self.D, self.L = D, L

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype) * call["scale"]

        tokens = self.options.get("token_input", False)
        input = torch.randint(I, (T, B), generator=generator) if tokens else random(T, B, I)
        ends = torch.randint(1 if call["layout"] == "packed" else 0, T + 1, (B,), generator=generator)
        self.lengths = None if call["lengths"] is None else ends.to(getattr(torch, call["lengths"]))
        self.valid = torch.arange(T)[:, None] < (ends if self.lengths is not None else T)
        if self.lengths is not None and not tokens:
            input = input.masked_fill(~self.valid[..., None], torch.nan)  # nothing may look at it
        self.resets = torch.rand(T, B, generator=generator) < 0.3 if call["resets"] else None
        widths = [R, *[H] * CELLS[self.cell].in_c]

        def states() -> list[Tensor]:
            made = [random(L * D, B, n) for n in widths]
            if len(made) == 4:
                made[2] = made[2].abs() + 0.5  # n
            return [laid_out(x, call["strides"]) for x in made]

        self.leaves: dict[str, Tensor] = {}
        if call["layout"] == "packed":
            self.packed = pack_padded_sequence(input, ends, enforce_sorted=False)
            input = self.packed.data
        self.input = laid_out(input, call["strides"])
        if not tokens:
            self.leaves["input"] = self.input
        names = ("h", "c", "n", "m")[: len(widths)]
        if call["state"]:
            self.leaves |= {f"{x}_0": s for x, s in zip(names, states(), strict=True)}
        if self.resets is not None and call["reset_state"]:
            self.leaves |= {f"reset_{x}": s for x, s in zip(names, states(), strict=True)}
        self.names = names
        self.leaves |= dict(self.module.named_parameters())
        for i, x in enumerate(self.leaves.values()):
            x.requires_grad_(not call["without_grad"] >> (i % 20) & 1)

    def given(self, prefix: str, suffix: str) -> tuple[Tensor, ...] | None:
        found = tuple(self.leaves[f"{prefix}{x}{suffix}"] for x in self.names if f"{prefix}{x}{suffix}" in self.leaves)
        return found or None

    def actual(self) -> list[Any]:
        """The module's results: output, states and every c, tensors or PackedSequences, one behind the other."""
        torch.manual_seed(self.call["seed"])
        batched = self.call["layout"] != "unbatched"

        def for_user(states: tuple[Tensor, ...] | None) -> Any:
            if states is None:
                return None
            if not batched:
                states = tuple(x.squeeze(1) for x in states)
            elif self.options.get("state_batch_first"):
                states = tuple(x.transpose(0, 1) for x in states)
            return states if len(states) > 1 else states[0]

        input: Any = self.input
        hx = for_user(self.given("", "_0"))
        if self.is_cell:
            x = input[0] if batched else input[0, 0]
            hx = None if hx is None else tuple(s[0] for s in tensors(hx)) if len(self.names) > 1 else hx[0]
            return list(tensors(self.module(x, hx)))
        if self.call["layout"] == "packed":
            return self.flat(self.module(self.packed._replace(data=input), hx))
        if not batched:
            input = input.squeeze(1)
        elif self.options.get("batch_first"):
            input = input.transpose(0, 1)
        masks: dict[str, Any] = {}
        if self.lengths is not None:
            masks["lengths"] = self.lengths
        if self.resets is not None:
            resets = self.resets if batched else self.resets[:, 0]
            masks["resets"] = resets.t() if batched and self.options.get("batch_first") else resets
            masks["reset_state"] = for_user(self.given("reset_", ""))
        return self.flat(self.module(input, hx, **masks))

    @staticmethod
    def flat(results: Any) -> list[Tensor]:
        found: list[Tensor] = []
        for x in results if type(results) is tuple else (results,):
            if isinstance(x, PackedSequence):
                found.append(x.data)
            elif type(x) is tuple:
                found += _Call.flat(x)
            else:
                found.append(x)
        return found

    def expected(self, exact: dict[str, Tensor]) -> list[Tensor]:
        """The same of the reference, from the leaves in float64."""
        options, D = self.options, self.D
        B, clip = self.call["B"], options.get("grad_clip") or 0.0
        by_id = {id(p): exact[name] for name, p in self.module.named_parameters()}
        of_module = [[self.module._weights()]] if self.is_cell else self.module._weights()
        weights = [
            [LayerWeights(*(None if x is None else by_id[id(x)] for x in w)) for w in layer] for layer in of_module
        ]

        def states(prefix: str, suffix: str, wanted: bool) -> tuple[Tensor, ...] | None:
            found = tuple(exact[n] for x in self.names if (n := f"{prefix}{x}{suffix}") in exact)
            if not found and wanted and options.get("learn_initial_state"):
                rows = [[exact[name] for name in each] for each in self.module._initial_names()]
                found = self.module._with_fixed(tuple(torch.stack(each)[:, None].expand(-1, B, -1) for each in rows))
            return found or None

        start, fresh = states("", "_0", True), states("reset_", "", self.resets is not None)
        lengths, order = self.lengths, None
        x = (
            exact["input"]
            if "input" in exact
            else torch.nn.functional.one_hot(self.input, options["input_size"]).double()
        )
        if self.call["layout"] == "packed":
            x, lengths = pad_packed_sequence(self.packed._replace(data=x, sorted_indices=None, unsorted_indices=None))
            order = self.packed.sorted_indices
            start = None if start is None else tuple(s.index_select(1, order) for s in start)
        elif lengths is not None:
            x = torch.where(self.valid[..., None], x, 0)
        torch.manual_seed(self.call["seed"])
        outputs, finals = [], []
        for i, layer in enumerate(weights):

            def of_layer(each: tuple[Tensor, ...] | None) -> list[Tensor | None]:
                if each is None:
                    return [None, None]
                parts = [_folded(s[i * D : (i + 1) * D]) for s in (each if len(each) < 3 else joined(each))]
                return [*parts, None][:2]

            found, *rest = self.layer(x, layer, of_layer(start), of_layer(fresh), lengths, clip)
            x = found + x if i > 0 and options.get("residual") else found
            outputs.append(x)
            finals.append([_unfolded(s, D) for s in rest[: min(len(self.names), 2)]])
        if self.is_cell:
            return [
                s[0] if self.call["layout"] != "unbatched" else s[0, 0]
                for s in map(torch.cat, zip(*finals, strict=True))
            ]
        h, *c = map(torch.cat, zip(*finals, strict=True))
        all_finals = [h, *(c if len(self.names) < 3 else c[0].chunk(3, -1))]
        if order is not None:
            all_finals = [s.index_select(1, self.packed.unsorted_indices) for s in all_finals]
        cells = []
        if options.get("return_all_states"):
            count = rest[2].shape[-1] // (D * options["hidden_size"])
            values = rest[2].view(x.size(0), B, D, count, options["hidden_size"])  # of fewer steps than T, if packed
            C = CELLS[self.cell].in_c
            cells = [values[:, :, :, values.shape[3] - C + k].flatten(2) for k in range(C)]

        def sequence(x: Tensor) -> Tensor:
            if self.call["layout"] == "packed":
                return pack_padded_sequence(x, lengths).data
            if self.call["layout"] == "unbatched":
                return x.squeeze(1)
            return x.transpose(0, 1) if options.get("batch_first") else x

        def state(x: Tensor) -> Tensor:
            if self.call["layout"] == "unbatched":
                return x.squeeze(1)
            return x.transpose(0, 1) if options.get("state_batch_first") else x

        shown = outputs if options.get("return_all_layers") else outputs[-1:]
        return [*map(sequence, shown), *map(state, all_finals), *map(sequence, cells)]

    def layer(self, x: Tensor, weights: list[LayerWeights], start: Any, fresh: Any, lengths: Any, clip: float) -> Any:
        """output, h_n, c_n and saved of a layer on x [T, B, I], states [B, D*n]."""
        gates = torch.cat(
            [x @ w.weight_ih.t() if w.bias_ih is None else x @ w.weight_ih.t() + w.bias_ih for w in weights], -1
        )
        stacked = [
            None if weights[0][k] is None else torch.stack([w[k] for w in weights])
            for k in map(LayerWeights._fields.index, ("bias_hh", "weight_hr", "params"))
        ]
        heads, G = self.options.get("num_heads", 1), CELLS[self.cell].gates
        weight_hh = torch.stack([_dense(w.weight_hh, G) if heads > 1 else w.weight_hh for w in weights])
        R = weight_hh.shape[2]
        widths = (R, weight_hh.shape[1] // G * CELLS[self.cell].in_c)
        h_0, c_0 = (
            s if s is not None or n == 0 else x.new_zeros(x.shape[1], len(weights) * n)
            for s, n in zip(start, widths, strict=True)
        )
        masks = [None] * 3 if self.is_cell else self.masks(len(weights), x.shape[:2], widths, lengths)
        return reference.forward(
            self.cell, gates, weight_hh, *stacked, h_0, c_0, lengths, self.resets,
            *fresh, *masks, [False, True][: len(weights)], clip,
        )  # fmt: skip

    def masks(self, D: int, steps: Any, widths: tuple[int, int], lengths: Any) -> list[Tensor | None]:
        """As the module draws them, which has to have the same generator."""
        noise = self.module._noise
        # Tokens are padded first, and noise is drawn for the padding, too.
        packed = self.call["layout"] == "packed" and self.module._takes_packed(self.packed.data)
        shown = (len(self.input),) if packed else tuple(steps)
        drawn = noise.masks(torch.empty(0, dtype=self.dtype), D, shown, steps[1], widths[: CELLS[self.cell].tensors])
        found = [None if x is None else x.double() for x in drawn]
        if found[0] is not None:
            found[0] = _folded(found[0])
        if packed:
            as_packed = [
                None if x is None else self.packed._replace(data=x, sorted_indices=None, unsorted_indices=None)
                for x in found[1:]
            ]
            found[1:] = [None if x is None else pad_packed_sequence(x)[0] for x in as_packed]
        return found


def _folded(state: Tensor) -> Tensor:
    """[D, B, n] -> [B, D*n]"""
    return state.transpose(0, 1).flatten(1)


def _unfolded(state: Tensor, D: int) -> Tensor:
    return state.unflatten(1, (D, state.shape[1] // D)).transpose(0, 1)


def _dense(weight: Tensor, G: int) -> Tensor:
    """[G*H, H] of heads' [N, G*H/N, H/N]."""
    return torch.cat([torch.block_diag(*(head.chunk(G)[g] for head in weight)) for g in range(G)])


@contextlib.contextmanager
def _mode(name: str) -> Iterator[None]:
    with (
        torch.no_grad()
        if name == "no_grad"
        else torch.inference_mode()
        if name == "inference"
        else contextlib.nullcontext()
    ):
        yield


def _near(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape, f"{name}: {list(got.shape)}, expected {list(want.shape)}"
    if want.numel():
        error = (got.double() - want).abs().max().item()
        bound = tolerance * max(1.0, want.abs().max().item())
        assert error <= bound, f"{name}: error {error:.3g} is above {bound:.3g}"  # so NaN fails


def _backward(results: list[Tensor]) -> None:
    """With gradients that are the same numbers for both."""
    pulled = [
        (x, torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).bfloat16().to(x.dtype))
        for i, x in enumerate(results)
        if x.requires_grad
    ]
    torch.autograd.backward(*map(list, zip(*pulled, strict=True)))


def run(case: dict[str, Any]) -> None:
    """Fails where a result or a gradient is not the reference's."""
    made = _Call(case)
    call, leaves = made.call, made.leaves
    with threads(call["threads"]), _mode(call["mode"]):
        got = made.actual()
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in leaves.items()}
    if "input" in exact and made.lengths is not None:  # NaN times 0, in the reference's product
        clean = exact["input"].detach().masked_fill(~made.valid[..., None], 0)
        exact["input"] = clean.requires_grad_(exact["input"].requires_grad)
    want = made.expected(exact)
    dtype, tolerance = call["dtype"], TOLERANCE[call["dtype"]]
    assert len(got) == len(want), f"{len(got)} results, expected {len(want)}"
    # A relu's or a maximum's gradient jumps where rounding switches a unit; a normalised row of few units magnifies it.
    kinks = made.cell in ("rnn_relu", "ligru", "slstm")
    rough = made.cell.endswith("_norm") and dtype != "float64"
    if not rough:
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            _near(f"result {i}", a.detach(), b.detach(), tolerance)
    if call["mode"] != "grad" or not any(x.requires_grad for x in want):
        assert not any(x.requires_grad for x in got)
        return
    _backward(got)
    _backward(want)
    for name, x in leaves.items():
        assert x.requires_grad or x.grad is None, f"{name} has a gradient that nobody asked for"
        if dtype == "float64" or (dtype == "float32" and not kinks and not rough):
            a, b = (torch.zeros_like(exact[name]) if leaf.grad is None else leaf.grad for leaf in (x, exact[name]))
            _near(f"grad of {name}", a, b, 30 * tolerance)
