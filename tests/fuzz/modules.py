"""Calls of modules with random options, sizes, dtypes, layouts, strides and masks, against reference.py in float64."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.nn.utils.stateless import _reparametrize_module

import fastrnn
from fastrnn import reference
from fastrnn.ops import CELLS
from fastrnn.records import LayerWeights, joined
from fastrnn.regularizers import with_weight_dropout
from tests.helpers import build, tensors, threads

LAYERS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU", "SLSTM", "LiGRU", "MGU")
CELL_CLASSES = ("LSTMCell", "GRUCell", "RNNCell_TANH", "RNNCell_RELU")
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
STEPS = (1, 2, 3, 4, 5, 7, 8, 13, 17, 33)
DTYPES = ("float64", "float32", "bfloat16", "float16")
# Of the larger of 1 and the largest expected value. Half types round between layers and steps, too.
TOLERANCE = {"float64": 1e-9, "float32": 3e-4, "bfloat16": 0.2, "float16": 0.03}
NARROW = ("int8", "bfloat16")  # ways that quantize the module
WITHOUT_GRAD = ("no_grad", "inference")  # modes
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
        "input_size": one_of(*SIZES, 0),
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
        "dropout": one_of(0.0, 0.0, 0.3),
        "locked_dropout": one_of(0.0, 0.0, 0.3),
        "weight_dropout": one_of(0.0, 0.0, 0.0, 0.3),
        "training": one_of(False, True),
        "layout": one_of("padded", "padded", "padded", "packed", "nested", "unbatched"),
        "way": one_of("forward", "forward", "forward", "step", "functional", *NARROW),
        "strides": one_of("contiguous", "transposed", "gaps", "offset", "repeated"),
        "state": one_of(False, True),
        "lengths": one_of(None, None, "int64", "int32", "uint8"),
        "resets": one_of(False, False, True),
        "reset_state": one_of(False, True),
        "scale": one_of(1.0, 1.0, 0.0, 30.0),
        "mode": one_of("grad", "grad", "grad", "grad", "no_grad", "inference", "jvp", "twice"),
        "without_grad": st.integers(0, 2**20 - 1),  # bit i: leaf i requires none
        "threads": one_of(1, 1, 1, 2, 3),
        "seed": st.integers(0, 2**31 - 1),
    }
)

_OF_CALLS = ("kind", "dtype", "T", "B", "training", "layout", "strides", "state", "lengths", "resets", "reset_state")
_OF_CALLS += ("scale", "mode", "without_grad", "threads", "seed", "way")
# What functions take, too: the module of such a case only holds the weights.
_OF_FUNCTIONS = ("input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size", "token_input")
_OF_FUNCTIONS += ("peephole", "layer_norm", "reset_after", "num_heads", "dropout")


def arranged(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The call and the module's options of a case, without what a class lacks or another option does not go with."""
    case = dict(case)
    name = case["kind"].partition("_")[0]
    is_cell = name.endswith("Cell")
    _fit_way(case, is_cell)
    if is_cell and case["layout"] in ("packed", "nested"):
        case["layout"] = "padded"
    if not is_cell:  # a layer refuses to have no features
        case["input_size"] = max(case["input_size"], 1)
    if case["training"]:  # of a probability of 1 it is known what is dropped, whoever draws
        case.update({p: float(case[p] > 0) for p in ("dropout", "locked_dropout")})
    if case["num_layers"] == 1:
        case.update(dropout=0.0, locked_dropout=0.0)
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
    if case["layout"] in ("packed", "nested"):
        case.update(resets=False, B=max(case["B"], 1))
    if case["layout"] == "unbatched":
        case["B"] = 1
    known = inspect.signature(getattr(fastrnn, name)).parameters
    call = {k: case.pop(k) for k in _OF_CALLS}
    options = {k: v for k, v in case.items() if k in known and (call["way"] != "functional" or k in _OF_FUNCTIONS)}
    if is_cell:
        call.update(T=1, lengths=None, resets=False)
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    a_row = 8 * layers * (options["input_size"] + options["hidden_size"]) * options["hidden_size"]
    while call["T"] * call["B"] * a_row > WORK and max(call["T"], call["B"]) > 1:
        longer = "T" if call["T"] >= call["B"] else "B"
        call[longer] //= 2
    return call, options


def _fit_way(case: dict[str, Any], is_cell: bool) -> None:
    """Without what the way of the call, or of its derivative, does not go with."""
    if (is_cell and case["way"] != "functional") or (case["way"] in NARROW and case["kind"] == "SLSTM"):
        case["way"] = "forward"
    if case["way"] == "step":
        case.update(lengths=None, return_all_states=False)
        case["layout"] = "unbatched" if case["layout"] == "unbatched" else "padded"
        if case["bidirectional"]:  # a step of it is a sequence
            case["T"] = 1
        if case["training"]:  # every call draws for itself
            case.update(recurrent_dropout=0.0, zoneout=0.0, weight_dropout=0.0)
    if case["way"] == "functional":
        case["layout"] = "padded"
        case["state"] |= is_cell
    if case["way"] in NARROW:
        case.update(dtype="float32", training=False, token_input=False, return_all_states=False)
        case["mode"] = "inference" if case["mode"] == "inference" else "no_grad"
        if case["way"] == "int8":  # what 8 bits leave out of an input of 30 is enough to switch a gate
            case["scale"] = min(case["scale"], 1.0)
    if case["mode"] in ("jvp", "twice") and case["layout"] == "nested":  # torch has no such derivatives of them
        case["layout"] = "packed"
    if case["mode"] == "jvp" and case["strides"] == "repeated":  # nor tangents of a tensor that overlaps itself
        case["strides"] = "gaps"
    if case["mode"] in ("jvp", "twice"):  # the reference takes long over them
        case["T"] = min(case["T"], 8)
    if case["mode"] == "twice" and case["token_input"]:  # torch has no second derivative of an embedding of no tokens
        case["B"] = max(case["B"], 1)
    if case["mode"] == "twice":  # the second pass clamps, too, and where it does is not the same in the reference
        case["grad_clip"] = None


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
        self.called, self.rounded = self.module, dict[str, Tensor]()
        if call["way"] in NARROW:
            narrow = getattr(torch, call["way"])
            self.called = fastrnn.quantize(self.module, narrow)
            same = fastrnn.fake_quantize(copy.deepcopy(self.module), narrow)
            self.rounded = {name: getattr(same, name).detach() for name, _ in self.module.named_parameters()}
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
        if call["layout"] == "nested":
            ends[0] = T  # so that there are steps
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
        self.is_ragged = call["layout"] in ("packed", "nested")
        if self.is_ragged:
            self.ends, self.order = ends, torch.arange(B)
            if call["layout"] == "packed":
                self.packed = pack_padded_sequence(input, ends, enforce_sorted=False)
                self.order = self.packed.sorted_indices
            self.offsets = torch.cat([ends.new_zeros(1), ends.cumsum(0)])
            self.valid = torch.arange(int(ends.max()))[:, None] < ends[self.order]
            input = self.values_of(input[: len(self.valid), self.order])
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

    def values_of(self, padded: Tensor) -> Tensor:
        """[N, ..] of [T, B, ..] with rows in order: step by step as packed ones have them, or row by row as nested."""
        if self.call["layout"] == "packed":
            return padded[self.valid]
        return padded.transpose(0, 1)[self.valid.t()]

    def padded(self, values: Tensor) -> Tensor:
        """The way back."""
        packed = self.call["layout"] == "packed"
        mask = self.valid if packed else self.valid.t()
        made = values.new_zeros(*mask.shape, *values.shape[1:]).index_put((mask,), values)
        return made if packed else made.transpose(0, 1)

    def weights(self, named: dict[str, Tensor]) -> list[list[LayerWeights]]:
        """[layer][direction], as the module names them, of these tensors."""
        by_id = {id(p): named[name] for name, p in self.module.named_parameters()}
        of_module = [[self.module._weights()]] if self.is_cell else self.module._weights()
        return [[LayerWeights(*(None if x is None else by_id[id(x)] for x in w)) for w in layer] for layer in of_module]

    def given(self, leaves: dict[str, Tensor], prefix: str, suffix: str) -> tuple[Tensor, ...] | None:
        return tuple(leaves[n] for x in self.names if (n := f"{prefix}{x}{suffix}") in leaves) or None

    def actual(self, leaves: dict[str, Tensor]) -> list[Tensor]:
        """Results with these leaves: output, states and every c, one behind the other."""
        torch.manual_seed(self.call["seed"])
        with _reparametrize_module(self.module, {name: leaves[name] for name, _ in self.module.named_parameters()}):
            return self.of_module(leaves)

    def of_module(self, leaves: dict[str, Tensor]) -> list[Tensor]:
        if self.call["way"] == "functional":
            return self.by_function(leaves)
        batched = self.call["layout"] != "unbatched"

        def for_user(states: tuple[Tensor, ...] | None) -> Any:
            if states is None:
                return None
            if not batched:
                states = tuple(x.squeeze(1) for x in states)
            elif self.options.get("state_batch_first"):
                states = tuple(x.transpose(0, 1) for x in states)
            return states if len(states) > 1 else states[0]

        input: Any = leaves.get("input", self.input)
        hx = for_user(self.given(leaves, "", "_0"))
        if self.is_cell:
            x = input[0] if batched else input[0, 0]
            hx = None if hx is None else tuple(s[0] for s in tensors(hx)) if len(self.names) > 1 else hx[0]
            return list(tensors(self.called(x, hx)))
        if self.call["layout"] == "packed":
            return self.flat(self.called(self.packed._replace(data=input), hx))
        if self.call["layout"] == "nested":
            with torch.inference_mode(False):  # in which torch cannot view an ordinary tensor as a nested one
                nested = torch.nested.nested_tensor_from_jagged(input, self.offsets)
            return self.flat(self.called(nested, hx))
        if not batched:
            input = input.squeeze(1)
        batch_first = batched and self.options.get("batch_first")
        masks: dict[str, Any] = {}
        if self.lengths is not None:
            masks["lengths"] = self.lengths
        if self.resets is not None:
            masks["resets"] = self.resets if batched else self.resets[:, 0]
            masks["reset_state"] = for_user(self.given(leaves, "reset_", ""))
        if self.call["way"] == "step":
            outputs = []
            for t, x in enumerate(input):
                now = {k: x[t] if k == "resets" else x for k, x in masks.items()}
                output, hx = self.called.step(x, hx, **now)
                outputs.append(self.flat((output,)))
            sequences = [torch.stack(each, 1 if batch_first else 0) for each in zip(*outputs, strict=True)]
            return [*sequences, *tensors(hx)]
        if batch_first:
            input = input.transpose(0, 1)
            masks |= {k: x.t() for k, x in masks.items() if k == "resets"}
        return self.flat(self.called(input, hx, **masks))

    def by_function(self, leaves: dict[str, Tensor]) -> list[Tensor]:
        """The same of fastrnn.functional."""
        name, options = self.call["kind"].partition("_")[0], self.options
        weights, input = self.weights(leaves), leaves.get("input", self.input)
        given: dict[str, Any] = {}
        if name.startswith("RNN"):
            given["nonlinearity"] = self.cell.removeprefix("rnn_")
        elif name == "GRU":
            given["reset_after"] = options.get("reset_after", True)
        state, fresh = (
            None if x is None else x if len(x) > 1 else x[0]
            for x in (self.given(leaves, "", "_0"), self.given(leaves, "reset_", ""))
        )
        if self.is_cell:
            function = getattr(fastrnn.functional, name.removesuffix("Cell").lower() + "_cell")
            state = tuple(x[0] for x in state) if len(self.names) > 1 else state[0]
            return list(tensors(function(input[0], state, weights[0][0], **given)))
        given |= {"lengths": self.lengths, "resets": self.resets, "reset_state": fresh}
        given |= {"dropout": options["dropout"], "training": self.call["training"]}
        given |= {"token_input": options["token_input"]}
        return self.flat(getattr(fastrnn.functional, name.lower())(input, state, weights, **given))

    @staticmethod
    def flat(results: Any) -> list[Tensor]:
        found: list[Tensor] = []
        for x in results if type(results) is tuple else (results,):
            if isinstance(x, PackedSequence):
                found.append(x.data)
            elif isinstance(x, Tensor) and x.is_nested:
                found.append(x.values())
            elif type(x) is tuple:
                found += _Call.flat(x)
            else:
                found.append(x)
        return found

    def expected(self, exact: dict[str, Tensor]) -> list[Tensor]:
        """The same of the reference, from the leaves in float64."""
        options, D = self.options, self.D
        B, clip = self.call["B"], options.get("grad_clip") or 0.0
        weights = self.weights(exact)

        def states(prefix: str, suffix: str, wanted: bool) -> tuple[Tensor, ...] | None:
            found = self.given(exact, prefix, suffix)
            if found is None and wanted and options.get("learn_initial_state"):
                rows = [[exact[name] for name in each] for each in self.module._initial_names()]
                found = self.module._with_fixed(tuple(torch.stack(each)[:, None].expand(-1, B, -1) for each in rows))
            return found

        start, fresh = states("", "_0", True), states("reset_", "", self.resets is not None)
        lengths = self.lengths
        x = (
            exact["input"]
            if "input" in exact
            else torch.nn.functional.one_hot(self.input, options["input_size"]).double()
        )
        if self.is_ragged:
            x, lengths = self.padded(x), self.ends[self.order]
            start = None if start is None else tuple(s.index_select(1, self.order) for s in start)
        elif lengths is not None:
            x = torch.where(self.valid[..., None], x, 0)
        torch.manual_seed(self.call["seed"])
        training, dropped = self.call["training"], options.get("dropout") or options.get("locked_dropout")
        if training and options.get("weight_dropout"):
            weights = [[with_weight_dropout(w, options["weight_dropout"]) for w in layer] for layer in weights]
        outputs, finals = [], []
        for i, layer in enumerate(weights):

            def of_layer(each: tuple[Tensor, ...] | None) -> list[Tensor | None]:
                if each is None:
                    return [None, None]
                parts = [_folded(s[i * D : (i + 1) * D]) for s in (each if len(each) < 3 else joined(each))]
                return [*parts, None][:2]

            below = x * 0 if i > 0 and training and dropped else x
            found, *rest = self.layer(below, layer, of_layer(start), of_layer(fresh), lengths, clip)
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
        if self.is_ragged:
            all_finals = [s.index_select(1, self.order.argsort()) for s in all_finals]
        cells = []
        if options.get("return_all_states"):
            count = rest[2].shape[-1] // (D * options["hidden_size"])
            values = rest[2].view(x.size(0), B, D, count, options["hidden_size"])  # of fewer steps than T, if packed
            C = CELLS[self.cell].in_c
            cells = [values[:, :, :, values.shape[3] - C + k].flatten(2) for k in range(C)]

        def sequence(x: Tensor) -> Tensor:
            if self.is_ragged:
                return self.values_of(x)
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
        # Where a module pads first, noise is drawn for the padding, too.
        as_it_is = self.is_ragged and self.call["mode"] != "jvp" and self.module._takes_packed(self.input, None)
        if self.call["layout"] == "nested" and self.options.get("recompute"):
            as_it_is = False
        shown = (len(self.input),) if as_it_is else tuple(steps)
        drawn = noise.masks(torch.empty(0, dtype=self.dtype), D, shown, steps[1], widths[: CELLS[self.cell].tensors])
        found = [None if x is None else x.double() for x in drawn]
        if found[0] is not None:
            found[0] = _folded(found[0])
        if as_it_is:
            found[1:] = [None if x is None else self.padded(x) for x in found[1:]]
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


def _near_in_mean(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """By root mean squares: rounding is a matter of chance, and one number of thousands may have bad luck."""
    assert got.shape == want.shape, f"{name}: {list(got.shape)}, expected {list(want.shape)}"
    if want.numel():
        error = (got.double() - want).square().mean().sqrt().item()
        bound = tolerance * max(1.0, want.square().mean().sqrt().item())
        assert error <= bound, f"{name}: error {error:.3g} is above {bound:.3g} in the mean"


def _numbers(x: Tensor, seed: int) -> Tensor:
    """Random ones that are the same for the call and, in float64, for the reference."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(x.dtype)


def _backward(results: list[Tensor], leaves: dict[str, Tensor], twice: bool) -> None:
    """twice: of the gradients in their turn."""
    pulled = [(x, _numbers(x, i)) for i, x in enumerate(results) if x.requires_grad]
    if not pulled:  # a gradient that is the same for all values of the leaves
        return
    of, given = map(list, zip(*pulled, strict=True))
    if twice:
        wanted = [x for x in leaves.values() if x.requires_grad]
        grads = torch.autograd.grad(of, wanted, given, create_graph=True, materialize_grads=True)
        _backward(list(grads), leaves, twice=False)
    else:
        torch.autograd.backward(of, given)


Results = dict[str, Tensor]


def _evaluated(
    function: Callable[[dict[str, Tensor]], list[Tensor]], leaves: dict[str, Tensor], mode: str
) -> tuple[Results, Results]:
    """Results and derivatives by name: gradients of the leaves, or of "jvp" the results' slopes in one direction."""
    if mode == "jvp":
        moved = {name: x.detach() for name, x in leaves.items() if x.requires_grad}
        tangents = tuple(_numbers(x, i) for i, x in enumerate(moved.values()))
        leaves = {name: x.detach() for name, x in leaves.items()}

        def of_moved(*values: Tensor) -> tuple[Tensor, ...]:
            return tuple(function(leaves | dict(zip(moved, values, strict=True))))

        found, slopes = torch.func.jvp(of_moved, tuple(moved.values()), tangents) if moved else (of_moved(), ())
        derivatives = {f"slope of result {i}": x for i, x in enumerate(slopes)}
    else:
        found, derivatives = function(leaves), {}
        if any(x.requires_grad for x in found):
            _backward(found, leaves, mode == "twice")
            for name, x in leaves.items():
                assert x.requires_grad or x.grad is None, f"{name} has a gradient that nobody asked for"
                derivatives[f"grad of {name}"] = torch.zeros_like(x) if x.grad is None else x.grad
    return {f"result {i}": x.detach() for i, x in enumerate(found)}, derivatives


def run(case: dict[str, Any]) -> None:
    """Fails where a result or a derivative is not the reference's."""
    made = _Call(case)
    call, leaves, mode, dtype = made.call, made.leaves, made.call["mode"], made.call["dtype"]
    exact = {
        name: made.rounded.get(name, x).detach().double().requires_grad_(x.requires_grad and mode not in WITHOUT_GRAD)
        for name, x in leaves.items()
    }
    if "input" in exact and made.lengths is not None:  # NaN times 0, in the reference's product
        clean = exact["input"].detach().masked_fill(~made.valid[..., None], 0)
        exact["input"] = clean.requires_grad_(exact["input"].requires_grad)
    with threads(call["threads"]), _mode(mode):
        got, got_slopes = _evaluated(made.actual, leaves, mode)
    want, want_slopes = _evaluated(made.expected, exact, mode)
    for kind, a, b in (("results", got, want), ("derivatives", got_slopes, want_slopes)):
        assert [*a] == [*b], f"{kind}: {[*a]}, expected {[*b]}"
    tolerance = TOLERANCE[dtype]
    if call["way"] == "int8":  # rounds rows to 8 bits, as many as bfloat16 has
        tolerance = TOLERANCE["bfloat16"]
    if made.cell.endswith("_norm") and dtype != "float64":  # a normalised row of few units magnifies rounding
        return
    for name, x in want.items():
        _near(name, got[name], x, tolerance)
    # A relu's or a maximum's derivative jumps where rounding switches a unit.
    if made.cell in ("rnn_relu", "ligru", "slstm") and dtype != "float64":
        return
    for name, x in want_slopes.items():
        if dtype in ("float64", "float32"):
            _near(name, got_slopes[name], x, 30 * tolerance)
        elif call["scale"] <= 1:  # the slope 1 - n^2 of a saturated unit is what rounding has left of it
            # A gradient is rounded a few times (4), and so was each of the T * L steps before it, up or down by chance:
            # such errors add up as the root of their number. The largest of 12,000 gradients was a third of this.
            roundings = 4 + (call["T"] * made.L) ** 0.5
            _near_in_mean(name, got_slopes[name], x, roundings * torch.finfo(made.dtype).eps)
