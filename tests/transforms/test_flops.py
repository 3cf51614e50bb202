"""torch.utils.flop_counter.FlopCounterMode: every call's matrix products, as torch.nn's are counted."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastrnn
from fastrnn import reference
from fastrnn.flops import FORMULAS
from tests.helpers import CELL_KINDS, KINDS, build, generator, leaf, make_state, map_state, pair, randn, tensors

T, B, I, H = 5, 3, 4, 6  # noqa: E741
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
KIND = pytest.mark.parametrize("kind", KINDS)
LENGTHS = torch.tensor([5, 2, 4])


def counted(call: Callable[[], Any], backward: bool = True) -> tuple[int, int]:
    """Of the call, and of the backward pass from its first result."""
    # oneDNN's LSTM is one op, for which torch counts nothing
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        first = call()
        while not isinstance(first, Tensor):
            first = first[0]
        forward = counter.get_total_flops()
        if backward:
            first.sum().backward()
    return forward, counter.get_total_flops() - forward


def test_every_op_has_a_formula() -> None:
    ops = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
           if name.startswith("fastrnn::")}  # fmt: skip
    assert ops - {"clamp_gradient", "bernoulli", "cell_names", "cell_info"} == set(FORMULAS)  # those multiply nothing
    assert all(getattr(torch.ops.fastrnn, op) in flop_registry for op in FORMULAS)


def test_by_hand() -> None:
    """Two for each multiply-add: W_ih x, W_hh h, and backward through both and of both weights."""
    module, x = fastrnn.GRU(I, H), randn(T, B, I, dtype=torch.float32)
    gates, steps = 3 * H, T * B
    forward = 2 * steps * gates * (I + H)
    weights = 2 * steps * gates * (I + H)
    states = 2 * (steps - B) * gates * H  # the first step's state is given
    assert counted(lambda: module(x)) == (forward, weights + states)
    assert counted(lambda: module(leaf(x))) == (forward, weights + states + 2 * steps * gates * I)
    assert counted(lambda: module(x, leaf(torch.zeros(1, B, H))))[1] == weights + 2 * steps * gates * H
    module.requires_grad_(False)
    assert counted(lambda: module(leaf(x)))[1] == states + 2 * steps * gates * I
    with torch.no_grad():
        assert counted(lambda: module(x), False) == (forward, 0)


@KIND
@pytest.mark.parametrize(
    "options",
    [
        {}, {"num_layers": 3}, {"bidirectional": True, "num_layers": 2}, {"bias": False}, {"batch_first": True},
        {"dropout": 0.5, "num_layers": 2}, {"proj_size": 2}, {"proj_size": 2, "bidirectional": True, "num_layers": 2},
    ],
    ids=str,
)  # fmt: skip
def test_as_of_torch(kind: str, options: dict[str, Any]) -> None:
    if "proj_size" in options and kind != "LSTM":
        options = {"dtype": torch.float64}
    ours, theirs = pair(kind, I, H, **options)
    dtype = options.get("dtype", torch.float32)
    x = randn(T, B, I, dtype=dtype)
    count = ours.num_layers * (1 + ours.bidirectional)
    batch = T if ours.batch_first else B
    state = make_state(kind, count, batch, hidden=H, proj=ours.proj_size, dtype=dtype)
    for input in (x, leaf(x)):
        for hx in (None, state, map_state(leaf, state)):
            for requires in (True, False):
                ours.requires_grad_(requires), theirs.requires_grad_(requires)
                backward = requires or input.requires_grad or (hx is not None and tensors(hx)[0].requires_grad)
                calls = (lambda module=m: module(input, hx) for m in (ours, theirs))
                found, expected = (counted(call, backward) for call in calls)
                assert found == expected and found[0] > 0 and (found[1] > 0) == backward


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_cells_as_of_torch(kind: str) -> None:
    for options in ({}, {"bias": False}):
        ours, theirs = pair(kind, I, H, **options)
        x = randn(B, I, dtype=torch.float32)
        hx = make_state(kind, B, hidden=H, dtype=torch.float32)
        for input, state in ((x, None), (leaf(x), hx), (x[0], None), (leaf(x), map_state(leaf, hx))):
            assert counted(lambda: ours(input, state)) == counted(lambda: theirs(input, state)) > (0, 0)


@KIND
@pytest.mark.parametrize("bidirectional", [False, True])
def test_only_rows_that_are_there(kind: str, bidirectional: bool) -> None:
    """Of packed sequences as torch.nn's, and of lengths= as of the same sequences packed."""
    ours, theirs = pair(kind, I, H, num_layers=2, bidirectional=bidirectional)
    x = randn(T, B, I, dtype=torch.float32)
    for given in (x, leaf(x)):

        def packed() -> PackedSequence:
            return pack_padded_sequence(given, LENGTHS, enforce_sorted=False)

        expected = counted(lambda: theirs(packed()))
        assert counted(lambda: ours(packed())) == expected
        assert counted(lambda: ours(given, lengths=LENGTHS)) == expected
        assert expected[0] * T * B == counted(lambda: ours(given))[0] * int(LENGTHS.sum())


def test_lengths_of_a_projected_layer() -> None:
    """The padding is not counted."""
    ours, theirs = pair("LSTM", I, H, proj_size=2)
    x = randn(T, B, I, dtype=torch.float32)
    expected = counted(lambda: theirs(pack_padded_sequence(x, LENGTHS, enforce_sorted=False)))
    found = counted(lambda: ours(x, lengths=LENGTHS))
    assert found == expected


def test_lengths_without_data_count_as_full_ones() -> None:
    module, x = build(fastrnn, "GRU", I, H, device="meta"), torch.empty(T, B, I, device="meta")
    full = counted(lambda: fastrnn.GRU(I, H)(torch.zeros(T, B, I)))
    assert counted(lambda: module(x)) == counted(lambda: module(x, lengths=LENGTHS.to("meta"))) == full


@KIND
def test_as_of_a_loop_of_steps(kind: str) -> None:
    """The composite of ops that torch knows, where lengths and resets are on: it computes every row."""
    module, x = build(fastrnn, kind, I, H), leaf(randn(T, B, I, dtype=torch.float32))
    hx = map_state(leaf, make_state(kind, 1, B, hidden=H, dtype=torch.float32))
    resets = torch.rand(T, B, generator=generator()) < 0.3
    weights = module._weights()[0][0]

    def loop() -> Tensor:
        states = [s[0] for s in tensors(hx)] + [None]
        gates = torch.nn.functional.linear(x, weights.weight_ih, weights.bias_ih)
        return reference.forward(
            kind.lower(), gates, weights.weight_hh[None], weights.bias_hh[None], None, None, *states[:2],
            None, resets, None, None, None, None, None, [False],
        )[0]  # fmt: skip

    assert counted(lambda: module(x, hx, resets=resets)) == counted(loop) > (0, 0)


def test_every_road_counts_the_same() -> None:
    """The fused ops, the composed form, and what torch.func and torch.compile make of it."""
    module, x = fastrnn.LSTM(I, H, num_layers=2), randn(T, B, I, dtype=torch.float32)
    forward, backward = counted(lambda: module(x))
    assert (forward, backward) == counted(lambda: module.bfloat16()(x.bfloat16()))
    module.float()
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))[0].sum()

    assert counted(lambda: grad(loss)(parameters, x)["weight_ih_l0"], False)[0] == forward + backward
    samples = vmap(grad(loss), in_dims=(None, 1))
    assert counted(lambda: samples(parameters, x)["weight_ih_l0"], False)[0] == forward + backward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it compiles nothing where a mode is on
        compiled = torch.compile(module, backend="aot_eager")
        compiled(x)[0].sum().backward()
        for _ in range(2):
            assert counted(lambda: compiled(x)) == (forward, backward)
    exported = torch.export.export(module, (x,)).module()
    assert counted(lambda: exported(x)) == (forward, backward)


def test_forward_mode() -> None:
    """A product is two where one factor has a slope, and three where both have."""
    module, x = fastrnn.LSTM(I, H, num_layers=2, proj_size=2), randn(T, B, I, dtype=torch.float32)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    forward, backward = counted(lambda: module(x))

    def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, weights, (x,))[0].sum()

    everything = (weights, x)
    of_inputs = 2 * T * B * 4 * H * (I + 2)  # torch's linear multiplies with slopes that are zero, too
    assert counted(lambda: jvp(lambda x: run(weights, x), (x,), (x,)), False)[0] == 2 * forward + of_inputs
    assert counted(lambda: jvp(run, everything, everything), False)[0] == 3 * forward
    found = counted(lambda: jvp(grad(run), everything, everything)[1]["weight_ih_l0"], False)[0]
    assert found == 3 * (forward + backward)


def test_an_ensemble_counts_its_members() -> None:
    members, x = [fastrnn.GRU(I, H) for _ in range(4)], randn(T, B, I, dtype=torch.float32)
    weights, _ = stack_module_state(members)
    together = vmap(lambda w: functional_call(members[0], w, (x,))[0])
    forward, backward = counted(lambda: members[0](x))
    assert counted(lambda: together(weights)) == (4 * forward, 4 * backward)


@KIND
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_quantized(kind: str, dtype: torch.dtype) -> None:
    x, options = randn(T, B, I, dtype=torch.float32), {"num_layers": 2, "bidirectional": True}
    for extra in ({}, {"proj_size": 2}) if kind == "LSTM" else ({},):
        module = build(fastrnn, kind, I, H, **options, **extra)
        narrow = fastrnn.quantize(module, dtype)
        for given in ({}, {"lengths": LENGTHS}):
            expected = counted(lambda: module(x, **given), False)
            assert counted(lambda: narrow(x, **given), False) == expected > (0, 0)


def test_by_module_and_recomputed() -> None:
    class Model(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.rnn, self.head = fastrnn.GRU(I, H, **options), nn.Linear(H, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    x = randn(T, B, I, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        Model()(x)
    assert sum(counter.get_flop_counts()["Model.rnn"].values()) == 2 * T * B * 3 * H * (I + H)
    forward, backward = counted(lambda: Model()(x))
    again = counted(lambda: Model(recompute=2)(x))
    assert again[0] == forward and again[1] > backward + forward - 2 * T * B * H * 2  # the GRU's forward once more


def test_nothing_is_imported_for_it() -> None:
    """Whether fastrnn is imported before the counter or after."""
    code = """
import sys, torch
{first}
{second}
from torch.utils.flop_counter import flop_registry
assert torch.ops.fastrnn.layer_forward in flop_registry
"""
    ours, theirs = "import fastrnn", "import torch.utils.flop_counter"
    absent = 'assert "torch.utils.flop_counter" not in sys.modules'
    for first, second in ((f"{ours}; {absent}", theirs), (theirs, ours)):
        subprocess.run([sys.executable, "-c", code.format(first=first, second=second)], check=True)
