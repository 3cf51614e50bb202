"""A layer as one op: the op against reference.py, its node of autograd against the composed form, and which calls take
which road."""

import collections
import math
import re
from itertools import product

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import _C, composed, functional, layer, modules, ops, reference
from fastrnn.ops import CELLS
from fastrnn.records import GRADIENTS, LayerCall, LayerStates, LayerWeights, layer_states
from tests.helpers import KINDS, as_c, assert_equal, build, evaluate, randn
from tests.kernels.test_kernels import (
    CONSTANTS,
    FORWARD_NAMES,
    SIZES,
    TOLERANCE,
    Case,
    assert_near,
    cells_with_noise,
    cells_with_projection,
    double,
)

HALVES = (torch.bfloat16, torch.float16)
layer_forward = torch.ops.fastrnn.layer_forward.default
FIELDS = LayerWeights._fields


def arguments_of(case: Case, size: int, seed: int, biased: bool = True) -> dict:
    """A layer's arguments by name, with weights [P, ...] and states [B, P*n] as reference.py takes them."""
    rest = case.arguments(seed)
    cell, gates_ih, weight_hh, bias_hh = (rest.pop(k) for k in ("cell", "gates_ih", "weight_hh", "bias_hh"))
    generator = torch.Generator().manual_seed(seed + 1000)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    P, rows, _ = weight_hh.shape
    return {
        "cell": cell,
        "input": random(*gates_ih.shape[:2], size),
        "weight_ih": random(P, rows, size) / max(size, 1) ** 0.5,
        "bias_ih": random(P, rows) if biased else None,
        "weight_hh": weight_hh,
        "bias_hh": bias_hh if biased else None,
        **rest,
    }


def unfolded(x: torch.Tensor | None, P: int) -> torch.Tensor | None:
    return None if x is None else composed.unfold(x, P)


def call_of(given: dict, **options) -> LayerCall:
    """The same as the records that fastrnn calls a layer with."""
    P = len(given["reverse"])
    weights = [LayerWeights(*(None if given[k] is None else given[k][p] for k in FIELDS)) for p in range(P)]
    as_they_are = ("lengths", "resets", "keep_h", "keep_c")
    states = {k: given[k] if k in as_they_are else unfolded(given[k], P) for k in LayerStates._fields}
    return LayerCall(
        given["cell"], given["input"], weights, LayerStates(**states), reverse=tuple(given["reverse"]), **options
    )


def arguments_of_op(given: dict, save: bool, batch_sizes: torch.Tensor | None = None) -> tuple:
    call = call_of(given, batch_sizes=batch_sizes)
    return (call.cell, call.input, *call.by_field(), *call.states, batch_sizes, call.directions, save)


def by_op(given: dict, save: bool) -> tuple[torch.Tensor, ...]:
    """output, h_n, c_n and saved, states [B, P*n]."""
    output, h_n, c_n, cells, saved = layer_forward(*arguments_of_op(given, save))
    assert cells.numel() == 0
    return output, composed.fold(h_n), composed.fold(c_n) if c_n.dim() == 3 else c_n, saved


def by_reference(cell, input, weight_ih, bias_ih, *rest):
    gates_ih = input @ weight_ih.flatten(0, 1).t()
    return reference.forward(cell, gates_ih if bias_ih is None else gates_ih + bias_ih.flatten(), *rest)


@pytest.fixture
def by_products():
    """Layers as CUDA's are: the recurrence's kernel with products around it (csrc/torch/layer.cpp)."""
    before = _C.set_layers_by_products(True)
    yield
    _C.set_layers_by_products(before)


def check(case: Case, size: int, seed: int = 0, biased: bool = True) -> None:
    arguments = arguments_of(case, size, seed, biased)
    got = by_op(arguments, True)
    want = by_reference(*map(double, arguments.values()))
    assert_near(got, want, TOLERANCE[case.dtype], FORWARD_NAMES, case)
    unsaved = by_op(arguments, False)
    assert unsaved[3].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(got[:3], unsaved[:3], strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_odd_sizes(cell, projected, dtype):
    for size, B, h in product(SIZES, SIZES, SIZES):
        if projected < h:
            case = Case(cell, 1 + size % 4, B, 1 + (B + h) % 3, h, projected, dtype=dtype)
            check(case, size, seed=B + h, biased=size != 3)


def test_projection_wider_than_the_hidden_units():
    for B, (h, width) in product((1, 40), [(1, 70), (17, 200)]):
        check(Case("lstm", 4, B, 2, h, width, "rows", "state"), 7, seed=B)


def test_threads_without_units():
    """16 hidden units may be a single vector: of two threads one has a part of the projection to make, and no cell."""
    torch.set_num_threads(2)
    for T in (1, 2):
        check(Case("lstm", T, 15, 1, 16, 512, dtype=torch.float32), 64)


@pytest.mark.parametrize(("cell", "projected", "noise"), cells_with_noise())
def test_recurrent_dropout_and_zoneout(cell, projected, noise):
    for dtype, (T, B, P, h) in product(TOLERANCE, [(5, 3, 2, 17), (70, 4, 1, 33)]):
        if T == 5 or dtype == torch.float64:
            check(Case(cell, T, B, P, h, projected, "rows", "state", dtype=dtype, noise=noise), 7, seed=B)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lengths", ["", "rows", "groups"])
@pytest.mark.parametrize("cell", ops.CELLS)
def test_chunks(cell, lengths, threads):
    """Steps in one chunk and in several, the last one shorter; rows split, units split; both directions."""
    torch.set_num_threads(threads)
    for T, B, P, h, size in [(99, 3, 2, 17, 5), (203, 7, 1, 33, 129), (31, 40, 1, 65, 17), (150, 1, 1, 200, 64)]:
        resets = "" if T == 31 else "groups"
        check(Case(cell, T, B, P, h, 0, lengths, resets, dtype=torch.float64), size, seed=T)


def test_no_rows_steps_or_features():
    for T, B, size in [(0, 3, 4), (3, 0, 4), (3, 2, 0), (40, 2, 0)]:
        check(Case("lstm", T, B, 2, 5), size)


def test_bitwise_repeatable():
    torch.set_num_threads(3)
    arguments = arguments_of(Case("gru", 130, 9, 2, 65, 0, "rows", "state", dtype=torch.float32), 33, 1)
    runs = [by_op(arguments, True) for _ in range(3)]
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_reads_any_layout():
    arguments = arguments_of(Case("lstm", 30, 4, 2, 9), 6, 2)
    want = by_op(arguments, True)
    batch_major = arguments["input"].transpose(0, 1).contiguous().transpose(0, 1)
    apart = arguments["input"].new_zeros(30, 4, 12)[:, :, ::2].copy_(arguments["input"])
    for x in (batch_major, apart):
        got = by_op(arguments | {"input": x}, True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_refuses_a_call_without_weights_of_the_input():
    arguments = list(arguments_of_op(arguments_of(Case("lstm", 4, 3, 2, 5, dtype=torch.float32), 6, 0), False))
    arguments[2] = []
    with pytest.raises(RuntimeError, match=r"layer_forward: weight_ih: expected 2 tensors \(groups\), got 0"):
        layer_forward(*arguments)


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_input_gradients_of_many_groups_by_products(heads, dtype, by_products):
    """Their sum is rounded once, or with two directions twice: no error grows with the number of groups."""
    torch.manual_seed(heads)
    module, x = fastrnn.LSTM(64, 128, num_heads=heads, bidirectional=True), torch.randn(8, 16, 64)

    def gradient(module, x):
        x = x.detach().requires_grad_()
        module(x)[0].sum().backward()
        return x.grad.double()

    by_product = gradient(module.to(dtype), x.to(dtype))
    want = gradient(module.double(), x.to(dtype).double())
    _C.set_layers_by_products(False)
    by_kernel = gradient(module.to(dtype), x.to(dtype))

    def error(got):
        return (got - want).square().mean().sqrt().item()

    assert error(by_product) < 1.15 * error(by_kernel)


@pytest.mark.parametrize(("options", "training"), [({"bidirectional": True}, True), ({"num_heads": 3}, False)], ids=str)
def test_weights_of_groups_are_not_copied(options, training):
    """Not stacked, that is: it would be as much to write as a step has to read. (Heads' rows of weight_ih are put in
    order before, and autograd puts their gradients together.)
    """
    module, x = fastrnn.LSTM(5, 12, **options), torch.randn(4, 3, 5, requires_grad=True)
    with torch.profiler.profile() as profile:
        total = module(x)[0].square().sum()
        if training:
            total.backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::sum" in names and not names & {"aten::stack", "aten::cat"}


@pytest.mark.parametrize("P", [2, 3])
@pytest.mark.parametrize("place", ["apart", "misaligned"])
def test_weights_of_groups_are_read_where_they_are(place, P):
    """In any memory, also of unequal distances, or at an address that is no multiple of a number's size."""
    arguments = arguments_of(Case("lstm", 6, 4, P, 5, dtype=torch.float32), 7, 0)
    want = by_op(arguments, True)
    moved = {name: [x.clone() for x in arguments[name]] for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")}
    if place == "misaligned":
        memory = bytearray(4 * moved["weight_hh"][1].numel() + 2)
        odd = torch.frombuffer(memory, dtype=torch.float32, offset=2).view(20, 5)
        assert odd.data_ptr() % 4
        moved["weight_hh"][1] = odd.copy_(moved["weight_hh"][1])
    got = by_op(arguments | moved, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input", torch.ones(3, 4), "layer_forward: input: expected 3 dimensions, got [3, 4]"),
        ("weight_ih", torch.ones(1, 20, 7), "weight_ih: expected [20, 6], got [20, 7]"),
        ("weight_ih", torch.ones(1, 20, 6).double(), "weight_ih: expected dtype Float (that of input), got Double"),
        ("bias_ih", torch.ones(1, 19), "bias_ih: expected [20], got [19]"),
        ("h_0", torch.ones(2, 5), "h_0: expected [1, 3, 5], got [1, 2, 5]"),
    ],
)
def test_refuses(name, value, message):
    arguments = arguments_of(Case("lstm", 4, 3, 1, 5, dtype=torch.float32), 6, 0)
    with pytest.raises(RuntimeError) as caught:
        by_op(arguments | {name: value}, True)
    assert message in str(caught.value)


@pytest.mark.parametrize("cell", ops.CELLS)
def test_opcheck(cell):
    for case in (Case(cell, 3, 2, 1, 5), Case(cell, 3, 2, 2, 5, 0, "rows", "state", noise="all")):
        for save in (False, True):
            torch.library.opcheck(layer_forward, arguments_of_op(arguments_of(case, 4, 0), save))


# ---- the node ----


@pytest.fixture
def by_composition(monkeypatch):
    """A function that runs another without layer ops."""

    def run(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            for module in (layer, modules):
                patch.setattr(module, "road", lambda has_kernels, *tensors: "composed")
            patch.setattr(_C, "module_forward", lambda *call: None)
            return function(*args, **kwargs)

    return run


@pytest.fixture
def roads(monkeypatch):
    """The roads that layers take, past C++'s own calls of modules."""
    taken, road = [], layer.road

    def spy(has_kernels, *tensors):
        taken.append(road(has_kernels, *tensors))
        return taken[-1]

    monkeypatch.setattr(layer, "road", spy)
    monkeypatch.setattr(_C, "module_forward", lambda *call: None)
    return taken


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "proj"), [*((kind, 0) for kind in KINDS), ("LSTM", 5)])
def test_gradients_are_those_of_the_composed_form(kind, proj, bias, batch_first, masked, by_composition, roads):
    options = {"proj_size": proj} if proj else {}
    module = build(
        fastrnn, kind, 6, 9, num_layers=2, bidirectional=True, bias=bias, batch_first=batch_first,
        dtype=torch.float64, **options,
    )  # fmt: skip
    T, B = 20, 5
    extra = {"lengths": torch.tensor([20, 3, 0, 7, 20]), "resets": torch.rand(T, B) < 0.2} if masked else {}
    if masked and batch_first:
        extra["resets"] = extra["resets"].t()
    x = randn(*((B, T) if batch_first else (T, B)), 6)
    got = evaluate(module, x, **extra)
    assert roads == ["fused"] * 2
    module.zero_grad()
    assert_equal(got, by_composition(evaluate, module, x, **extra), 1e-12)
    assert len(roads) == 2


@pytest.mark.parametrize("cell", ops.CELLS)
def test_gradcheck(cell, roads):
    """Both orders, with respect to everything, through the layer's own node."""
    info = ops.CELLS[cell]
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    states = [torch.randn(1, 2, n, dtype=torch.float64) for n in info.widths(5, 5)]
    states[1:] = [as_c(cell, c) for c in states[1:]]
    shapes = ((info.gates * 5, 3), (info.gates * 5, 5), (info.gates * 5,), (info.gates * 5,))
    weights = [torch.randn(*shape, dtype=torch.float64) * 0.5 for shape in shapes]
    weights += [torch.randn(info.params, 5, dtype=torch.float64)] if info.params else []

    def run(x, *rest):
        *four, params = rest[info.tensors :] if info.params else (*rest[info.tensors :], None)
        call = LayerCall(cell, x, [LayerWeights(*four, params=params)], layer_states(rest[: info.tensors]))
        return layer.layer(call)[: 1 + info.tensors]

    leaves = [t.requires_grad_() for t in (x, *states, *weights)]
    torch.autograd.gradcheck(run, leaves)
    torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    assert set(roads) == {"fused"}


def check_gradients(case: Case, size: int) -> None:
    """Every argument's, the states' and the reset states' included, against reference.py in float64."""
    P = case.P
    given = arguments_of(case, size, seed=case.B + case.h)
    names = [k for k, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    names = [k for k in names if k not in CONSTANTS]
    exact = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in given.items()}
    for k in names:
        given[k].requires_grad_(), exact[k].requires_grad_()
    second = case.info.states > 1
    output, h_n, c_n, cells, _ = layer.layer(call_of(given, all_states=second))
    got = [output, composed.fold(h_n), composed.fold(c_n) if second else c_n, cells]
    *want, saved = by_reference(*exact.values())
    if second:
        want.append(composed.every_c(case.cell, saved, P, exact["keep_c"]))
    which = [i for i, x in enumerate(want) if x.numel()]
    grads = [torch.randn_like(got[i]) for i in which]
    found, expected = (
        torch.autograd.grad(
            [results[i] for i in which], [of[k] for k in names], [g.to(of["input"].dtype) for g in grads],
            retain_graph=True,
        )
        for results, of in ((got, given), (want, exact))
    )  # fmt: skip
    # Without an upper bound rounding grows: 4e-11 over forty steps of a LiGRU, with the baseline's instructions.
    wide = 1e-10 if case.cell == "ligru" else 1e-11
    tolerance = 10 * TOLERANCE[case.dtype] if case.dtype in HALVES else wide
    for name, a, b in zip(names, found, expected, strict=True):
        error = (a - b).abs().max() / (1 + b.abs().max())
        assert error <= tolerance, (case, size, name, error)


@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
@pytest.mark.parametrize("masks", [("", ""), ("rows", "state"), ("groups", "groups")], ids=str)
def test_gradients_at_odd_sizes(cell, projected, masks, roads):
    """One direction, past the dispatcher, and two."""
    for (B, h, size), P in product([(1, 3, 17), (17, 1, 3), (3, 17, 129), (129, 3, 1), (3, 129, 17)], (1, 2)):
        if projected < h:
            check_gradients(Case(cell, 4, B, P, h, projected, *masks), size)
    assert set(roads) == {"fused"}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_gradients_of_one_step(cell, projected, threads, roads):
    """Weights are packed a panel at a time, or multiplied with as they are stored."""
    torch.set_num_threads(threads)
    for (B, h, size), P in product([(1, 3, 17), (17, 33, 16), (40, 64, 48), (129, 17, 3), (13, 17, 1100)], (1, 2)):
        if projected < h:
            check_gradients(Case(cell, 1, B, P, h, projected), size)
    check_gradients(Case(cell, 1, 17, 1, 33, projected, "rows", "state"), 16)
    for T, B in ((1, 20), (1, 64), (1, 70), (2, 20)):  # rows as a panel; several steps of it; more rows than that
        check(Case(cell, T, B, 1, 256, projected, dtype=torch.float32), 192)
    assert set(roads) == {"fused"}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cell", ops.CELLS)
def test_gradients_of_few_rows_and_large_weights(cell, threads, roads):
    """More than the second-level cache holds, multiplied with as they are stored: a part at a time."""
    torch.set_num_threads(threads)
    gates = ops.CELLS[cell].gates
    h = -(-math.isqrt((1 << 20) // 8 // gates) // 8) * 8 + 8  # float64
    assert gates * h * h * 8 > 1 << 20
    for T, B in ((1, 13), (1, 17), (1, 40), (2, 31)):
        check_gradients(Case(cell, T, B, 1, h, 0), h + 8)
        check(Case(cell, T, B, 1, h, 0), h + 8)
    assert set(roads) == {"fused"}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("cell", "projected", "noise"), cells_with_noise())
def test_gradients_of_half_types(cell, projected, noise, dtype, roads):
    """Rows of odd lengths and odd numbers of them, which kernels that multiply pairs fill up; one chunk and two."""
    if cell in ("rnn_relu", "ligru", "slstm"):
        pytest.skip("rounding may move a value over the kink of relu, or of a maximum; test_accuracy.py keeps off it")
    for T, B, h, size in [(3, 1, 3, 17), (2, 17, 129, 1), (4, 3, 17, 129), (41, 17, 7, 5)]:
        for masks in (("", ""), ("rows", "state")):
            if projected < h:
                check_gradients(Case(cell, T, B, 2, h, projected, *masks, dtype=dtype, noise=noise), size)
    assert set(roads) == {"fused"}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_bfloat16_at_the_sizes_of_a_matrix_unit(cell, projected, threads, roads):
    """Its registers have 16 rows and are 32 products deep: as many rows and inputs, fewer and more."""
    torch.set_num_threads(threads)
    sizes = [(40, 1, 32, 64), (3, 16, 64, 31), (2, 33, 33, 96), (3, 17, 40, 100), (9, 47, 96, 32), (1, 70, 64, 65)]
    for T, B, h, size in sizes:
        for masks in (("", ""), ("rows", "state")):
            case = Case(cell, T, B, 1, h, projected, *masks, dtype=torch.bfloat16)
            check(case, size)
            if cell not in ("rnn_relu", "ligru", "slstm"):  # as above
                check_gradients(case, size)
    assert set(roads) <= {"fused"}


def test_gradients_of_bfloat16_in_deep_products(roads):
    """Of more gate gradients than are multiplied at once: three parts, of which a third is an odd number."""
    assert 4 * round_up(772, 16) // 1024 == 3 and 4 * round_up(772, 16) // 3 % 2 == 1
    check_gradients(Case("lstm", 3, 18, 1, 772, dtype=torch.bfloat16), 33)
    assert set(roads) == {"fused"}


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@pytest.mark.parametrize("masks", [("", ""), ("rows", "state"), ("short", ""), ("none", "")], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_half_types_are_rounded_once(dtype, masks):
    """Sums of whole numbers, which float32 holds and half types do not. Weights of zero hand gradients on as they are.

    Few rows and many; one product and several, of parts, of chunks, of threads' rows; chunks that no row has a step of.
    """
    lengths, resets = masks
    for (T, B), P, threads in product([(1, 1), (5, 1), (3, 17), (4, 33), (1, 600), (40, 30), (600, 1)], (1, 2), (1, 2)):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(T)
        most = 100 if T * B < 6 else 9
        drawn = "rows" if lengths else ""
        given = arguments_of(Case("rnn_relu", T, B, P, 17, 0, drawn, resets, "alternate", dtype), 33, seed=T + B)
        if drawn:
            given["lengths"].clamp_(max={"rows": T, "short": 3, "none": 0}[lengths])
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for name in ("input", "h_0", "reset_h", *names):
            if given[name] is not None:
                low, high = (0, 1) if name.startswith("weight") else (1, most + 1)
                given[name] = torch.randint(low, high, given[name].shape, generator=generator).to(dtype)
        exact = {k: double(x) for k, x in given.items()}
        grad = torch.randint(0, most + 1, (T, B, P * 17), generator=generator)
        leaves, exact_leaves = ([of[name].requires_grad_() for name in names] for of in (given, exact))
        found = torch.autograd.grad(layer.layer(call_of(given))[0], leaves, grad.to(dtype))
        want = torch.autograd.grad(by_reference(*exact.values())[0], exact_leaves, grad.double())
        for name, a, b in zip(names, found, want, strict=True):
            assert torch.equal(a, b.to(dtype)), (T, B, P, threads, name)


@pytest.mark.parametrize("T", [2, 300])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_half_types_are_no_tensors_of_float32(dtype, T):
    """Those of weights and biases: the kernel rounds them, of one product and of several."""
    module = fastrnn.LSTM(9, 17, proj_size=5, dtype=dtype)
    output = module(randn(T, 3, 9, dtype=dtype))[0].sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(output, list(module.parameters()))
    names = {event.name for event in profile.events()}
    assert "fastrnn::layer_backward" in names and "aten::_to_copy" not in names


@pytest.mark.parametrize(("cell", "projected", "noise"), cells_with_noise())
def test_gradients_by_products(cell, projected, noise, by_products):
    """What CUDA's layers are, on the CPU's kernels."""
    for (T, B, h, size), P in product([(4, 1, 9, 3), (5, 17, 3, 7)], (1, 2)):
        for masks in (("", ""), ("rows", "state"), ("groups", "groups")):
            if projected < h:
                check_gradients(Case(cell, T, B, P, h, projected, *masks, noise=noise), size)


@pytest.mark.parametrize(("cell", "projected", "noise"), cells_with_noise())
@pytest.mark.parametrize("masks", [("", ""), ("rows", ""), ("groups", "groups")], ids=str)
def test_gradients_under_recurrent_dropout_and_zoneout(noise, masks, cell, projected, roads):
    """Few rows and many, one chunk of steps and several."""
    for (T, B, h, size), P in product([(4, 1, 9, 3), (5, 17, 3, 7), (40, 30, 17, 5)], (1, 2)):
        if projected < h:
            check_gradients(Case(cell, T, B, P, h, projected, *masks, noise=noise), size)
    assert set(roads) == {"fused"}


@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_gradients_under_masks_on_several_threads(cell, projected):
    """Rows split, units split."""
    torch.set_num_threads(2)
    for B, h in ((40, 33), (3, 200)):
        check_gradients(Case(cell, 12, B, 1, h, projected and h // 2, "rows", "state", noise="all"), 5)


@pytest.mark.parametrize("B", [3, 40])
def test_gradients_of_a_wide_projection(B):
    """Wider than the hidden units; a row of every kind of product is padded otherwise than those of the others."""
    for threads, (h, width) in product((1, 2), [(1, 70), (17, 129), (129, 33)]):
        torch.set_num_threads(threads)
        check_gradients(Case("lstm", 30, B, 2, h, width, "rows", "state"), 7)


@pytest.mark.parametrize("B", [3, 100])
@pytest.mark.parametrize(("cell", "h"), [("lstm", 1030), ("gru", 1370)])
def test_gradients_of_deep_products(cell, h, B):
    """More gate gradients of a row than a product takes at once, with any instruction set; rows of several blocks."""
    torch.set_num_threads(2)
    check_gradients(Case(cell, 2, B, 1, h, 0, "rows"), 5)


@pytest.mark.parametrize("which", range(6))
def test_only_what_is_asked_for(which, by_composition):
    """One leaf at a time requires grad; the others get none."""
    tensors = [randn(5, 3, 4), randn(3, 6), randn(12, 4)[:, :].repeat(2, 1)[:24], randn(24, 6), randn(24), randn(24)]
    x, h, weight_ih, weight_hh, bias_ih, bias_hh = (t.clone().requires_grad_(i == which) for i, t in enumerate(tensors))
    c = torch.zeros_like(h)
    weights = [functional.LayerWeights(weight_ih, weight_hh, bias_ih, bias_hh)]

    def pulled():
        output, _ = functional.lstm(x, (h[None], c[None]), [weights])
        leaf = (x, h, weight_ih, weight_hh, bias_ih, bias_hh)[which]
        return torch.autograd.grad(output.square().sum(), leaf)[0]

    torch.testing.assert_close(pulled(), by_composition(pulled), rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["weights", "input"])
def test_keeps_only_what_backward_reads(frozen, by_composition):
    """What no gradient needs may be changed afterwards, as around torch's own products."""
    lstm = fastrnn.LSTM(4, 6, bidirectional=True, dtype=torch.float64)
    x, states = randn(40, 3, 4), (randn(2, 3, 6), randn(2, 3, 6))
    leaf = states[0].requires_grad_() if frozen == "weights" else lstm.weight_hh_l0
    lstm.requires_grad_(frozen == "input")

    def pulled():
        given = x.clone()
        loss = lstm(given, states)[0].square().sum()
        with torch.no_grad():
            changed = given if frozen == "weights" else lstm.bias_ih_l0
            kept = changed.clone()
            changed.zero_()
            if frozen == "input":
                lstm.weight_ih_l0.mul_(1)
        (grad,) = torch.autograd.grad(loss, leaf)
        with torch.no_grad():
            changed.copy_(kept)
        return grad

    torch.testing.assert_close(pulled(), by_composition(pulled), rtol=0, atol=1e-12)


def test_which_road(roads):
    """Graphs and half types are fused; what differentiates or batches a call itself is composed."""
    lstm = fastrnn.LSTM(4, 6)
    x = torch.randn(7, 2, 4)

    class Subclass(torch.Tensor):
        pass

    def under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            lstm(x)

    def with_a_tangent():
        with torch.autograd.forward_ad.dual_level():
            lstm(torch.autograd.forward_ad.make_dual(x, x))

    calls = {
        "fused": [
            lambda: lstm(x),
            lambda: fastrnn.LSTMCell(4, 6)(x[0]),
            lambda: fastrnn.LSTM(4, 6, dtype=torch.bfloat16)(x.bfloat16()),
            lambda: fastrnn.LSTM(4, 6, device="meta")(x.to("meta")),
            lambda: fastrnn.LSTM(4, 6, token_input=True)(torch.tensor([[1], [3]])),
            lambda: lstm(x.as_subclass(Subclass)),
            under_autocast,
        ],
        "composed": [
            lambda: torch.func.vmap(lambda x: lstm(x)[0])(x.expand(3, 7, 2, 4)),
            lambda: torch.func.grad(lambda x: lstm(x)[0].sum())(x),
            lambda: torch.func.jvp(lambda x: lstm(x)[0], (x,), (x,)),
            lambda: make_fx(lambda x: lstm(x)[0])(x),
            with_a_tangent,
        ],
        "reference": [lambda: fastrnn.LSTM(4, 6, dtype=torch.complex64, return_all_states=True)(x.to(torch.complex64))],
    }
    for road, functions in calls.items():
        for function in functions:
            roads.clear()
            function()
            assert roads == [road], function


@pytest.mark.parametrize("grad", [False, True])
def test_graphs_hold_the_layer_as_one_op(grad):
    graphs = []

    def look(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return make_boxed_func(graph.forward)

    lstm = fastrnn.LSTM(4, 6, bidirectional=True).requires_grad_(grad)
    compiled = torch.compile(lstm, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    output = compiled(torch.randn(7, 2, 4))[0]
    assert "fastrnn.layer_forward.default" in graphs[0]
    if grad:
        output.sum().backward()
        assert "fastrnn.layer_backward.default" in graphs[1]
    assert not any("recurrent" in op or "mm" in op for graph in graphs for op in graph)


@pytest.mark.parametrize("trained", [False, True])
def test_a_recorded_graph_has_derivatives(trained):
    """make_fx on real tensors records ops, and its graph may be differentiated whatever was when it was made."""
    lstm = fastrnn.LSTM(4, 6, bidirectional=True).requires_grad_(trained)
    x = torch.randn(40, 2, 4)
    graph = make_fx(lambda x: lstm(x)[0])(x)
    x.requires_grad_()
    (got,) = torch.autograd.grad(graph(x).square().sum(), x)
    (want,) = torch.autograd.grad(lstm(x)[0].square().sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_few_calls_around_a_recurrence(kind, given, by_products):
    """What a device without a kernel of whole layers does for a training step: 7 launches beside the recurrence's two.

    On CUDA a bias is one launch more, where the product cannot add it; the grid tier has one before each recurrence.
    """
    module = build(fastrnn, kind, 16, 16, dtype=torch.bfloat16)
    x, state = torch.randn(8, 4, 16).bfloat16().requires_grad_(), torch.randn(1, 4, 16).bfloat16()
    hx = ((state, state) if kind == "LSTM" else state) if given else None
    weights, ones = [x, *module.parameters()], torch.ones(8, 4, 16).bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(module(x, hx)[0], weights, ones)
    counts = collections.Counter(event.name.removeprefix("aten::") for event in profile.events())
    works = {"add", "add_", "addmm", "addmm_", "bmm", "cat", "clone", "mm", "mul", "stack", "sum", "where", "zero_"}
    sums = {"sum": 2} if kind == "GRU" else {"sum": 1, "clone": 1}
    made = {"addmm": 1, "mm": 3} | sums | ({"addmm_": 1} if given else {})
    assert {name: n for name, n in counts.items() if name in works} == made
    assert counts["fastrnn::layer_forward"] == counts["fastrnn::layer_backward"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_products_into_a_part_of_what_is_saved(kind, dtype, by_products):
    """Of layers without a bias, whose gates are made where they will be saved: rows of those lie apart."""
    module = build(fastrnn, kind, 17, 33, bias=False, dtype=torch.float64)
    exact = randn(2, 64, 17, dtype=torch.float64)
    output = module.to(dtype)(exact.to(dtype))[0]
    _C.set_layers_by_products(False)
    near = TOLERANCE[dtype]
    torch.testing.assert_close(output, module(exact.to(dtype))[0], rtol=near, atol=near)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_sequences_are_read_as_they_are(dtype):
    module = build(fastrnn, "LSTM", 4, 5, bidirectional=True, dtype=dtype)
    x = pack_padded_sequence(randn(6, 3, 4, dtype=dtype), [6, 4, 1])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x)[0].data.sum().backward()
    assert not any("pad" in event.name for event in profile.events())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_of_results_that_do_not_apply(cell, dtype):
    """Of size 0, as whoever fills in zeros for all results gives them: none."""
    given = arguments_of(Case(cell, 4, 3, 1, 5, dtype=dtype), 6, 0)
    call = call_of(given)
    call = call._replace(input=call.input.requires_grad_())
    output, h_n, c_n, cells, _ = layer.fused(call)
    absent = [x for x in (c_n, cells) if not x.numel()]
    (want,) = torch.autograd.grad(output.sum() + h_n.sum(), call.input, retain_graph=True)
    (got,) = torch.autograd.grad(output.sum() + h_n.sum() + sum(x.sum() for x in absent), call.input)
    assert absent and torch.equal(got, want)


@pytest.mark.parametrize("kind", ["plain", "projected", "bfloat16", "tokens"])
@pytest.mark.parametrize("cell", ops.CELLS)
def test_results_share_no_memory(cell, kind):
    """With each other, or with an argument, as the schemas promise."""
    if kind == "projected" and ops.CELLS[cell].states != 2:
        return
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    given = arguments_of(Case(cell, 4, 3, 2, 5, 3 if kind == "projected" else 0, "", "state", dtype=dtype), 6, 0)
    if kind == "tokens":
        given["input"] = torch.randint(6, (4, 3))
    call = call_of(given)
    made = layer.fused(call, save=True)
    rest = (call.input, *call.by_field(), *call.states, None, call.directions, made.output, made.saved)
    grads = [torch.ones_like(x) if x.numel() else None for x in made[:3]]
    needed = [name != "input" or kind != "tokens" for name in GRADIENTS]
    found = ops.layer_backward(call.cell, *grads, None, *rest, needed)
    for results in (made, found):
        places = [x.untyped_storage().data_ptr() for x in (*results, *given.values()) if is_there(x)]
        assert len(set(places)) == len(places)


def is_there(x) -> bool:
    return isinstance(x, torch.Tensor) and x.numel() > 0


def test_no_result_without_a_history():
    """The ops without a derivative refuse a call that would need one."""
    given = arguments_of(Case("lstm", 4, 3, 1, 5), 6, 0)
    call = call_of(given)
    made = layer.fused(call, save=True)
    flags = [name not in ("reset_h", "reset_c") for name in GRADIENTS]
    call = call._replace(input=given["input"].requires_grad_())
    rest = (call.input, *call.by_field(), *call.states, None, call.directions, made.output, made.saved, flags)
    with pytest.raises(NotImplementedError, match="fastrnn::layer_backward: it has no derivative"):
        ops.layer_backward(call.cell, torch.ones_like(made.output), None, None, None, *rest)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward derivative"):
        x = given["input"].detach()
        layer.fused(call._replace(input=torch.autograd.forward_ad.make_dual(x, x)))
    a = torch.ones(3, 3)
    with pytest.raises(NotImplementedError, match="fastrnn::gemm: it has no derivative"):
        torch.ops.fastrnn.gemm(a, a.clone().requires_grad_(), None, False, False)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no derivative"):
        torch.ops.fastrnn.gemm(torch.autograd.forward_ad.make_dual(a, a), a, None, False, False)
    with pytest.raises(NotImplementedError, match="no derivative"):
        torch.func.grad(lambda a: torch.ops.fastrnn.gemm(a, a, None, False, False).sum())(a)


@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_packed_is_read_as_it_is(cell, projected):
    """A packed sequence against the same one padded, every gradient; two directions, rows of one step, odd sizes."""
    for (T, B, h, size), threads in product([(5, 7, 3, 17), (40, 17, 33, 1), (9, 33, 129, 5), (3, 1, 17, 3)], (1, 3)):
        torch.set_num_threads(threads)
        given = arguments_of(Case(cell, T, B, 2, h, projected if projected < h else 0), size, seed=T)
        leaves = [x.requires_grad_() for x in given.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        lengths = torch.randint(1, T + 1, (B,)).sort(descending=True).values
        lengths[0] = T
        data, batch_sizes, *_ = pack_padded_sequence(given["input"], lengths)
        padded = layer.layer(call_of(given | {"lengths": lengths}))[:3]
        want = (pack_padded_sequence(padded[0], lengths).data, *padded[1:])
        got = layer.layer(call_of(given, batch_sizes=batch_sizes)._replace(input=data))[:3]
        which = [i for i, x in enumerate(want) if x.numel()]
        grads = [torch.randn_like(want[i]) for i in which]
        found = torch.autograd.grad([got[i] for i in which], leaves, grads, retain_graph=True)
        expected = torch.autograd.grad([want[i] for i in which], leaves, grads)
        assert_equal(dict(enumerate([*got, *found])), dict(enumerate([*want, *expected])))


@pytest.mark.parametrize("made_by", ["one kernel", "products"])
@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_rows_one_behind_the_other(cell, projected, made_by, request):
    """By offsets against the same padded, every gradient: rows of any lengths in any order, some of none, zoneout."""
    if made_by == "products":
        request.getfixturevalue("by_products")
    for (T, B, h, size), threads in product([(5, 7, 3, 17), (40, 17, 33, 1), (9, 33, 129, 5), (3, 1, 17, 3)], (1, 3)):
        torch.set_num_threads(threads)
        given = arguments_of(Case(cell, T, B, 2, h, projected if projected < h else 0), size, seed=T)
        leaves = [x.requires_grad_() for x in given.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        lengths = torch.randint(T + 1, (B,))
        lengths[B // 2] = T
        offsets = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0)]).int()

        def rows(x, lengths=lengths):
            return torch.cat([x[:n, b] for b, n in enumerate(lengths)])

        if CELLS[cell].zoneout:
            given["keep_h"] = torch.rand(T, B, 2 * given["weight_hh"].shape[2]) < 0.3
        padded = layer.layer(call_of(given | {"lengths": lengths}))[:3]
        want = (rows(padded[0]), *padded[1:])
        keep_h = None if given["keep_h"] is None else rows(given["keep_h"])
        call = call_of(given | {"keep_h": keep_h}, offsets=offsets)
        got = layer.layer(call._replace(input=rows(given["input"])))[:3]
        which = [i for i, x in enumerate(want) if x.numel()]
        grads = [torch.randn_like(want[i]) for i in which]
        found = torch.autograd.grad([got[i] for i in which], leaves, grads, retain_graph=True)
        expected = torch.autograd.grad([want[i] for i in which], leaves, grads)
        assert_equal(dict(enumerate([*got, *found])), dict(enumerate([*want, *expected])))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_masks_of_bytes(cell, projected, dtype):
    """Bit for bit what the same numbers in the call's own dtype give; one of them beside such numbers, too."""
    if not CELLS[cell].zoneout:
        pytest.skip("takes no zoneout")
    second = CELLS[cell].states > 1
    for T, B, h in [(3, 1, 17), (5, 7, 3), (4, 9, 129), (2, 33, 32)]:
        given = arguments_of(Case(cell, T, B, 2, h, projected if projected < h else 0, dtype=dtype), 5, seed=T)
        leaves = [x.requires_grad_() for x in given.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        keep_h = torch.rand(T, B, 2 * given["weight_hh"].shape[2]) < 0.3
        keep_c = torch.rand(T, B, 2 * h) < 0.3 if second else None
        wide_h, wide_c = keep_h.to(dtype), None if keep_c is None else keep_c.to(dtype)

        def run(keep_h, keep_c, given=given, leaves=leaves):
            results = layer.layer(call_of(given | {"keep_h": keep_h, "keep_c": keep_c}))[:3]
            results = [x for x in results if x.numel()]
            return [*results, *torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])]

        want = run(wide_h, wide_c)
        for masks in [(keep_h, keep_c), (keep_h, wide_c), (wide_h, keep_c)]:
            assert all(torch.equal(a, b) for a, b in zip(run(*masks), want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gradgradcheck_of_a_packed_sequence(kind):
    module = build(fastrnn, kind, 2, 3, bidirectional=True, dtype=torch.float64)
    packed = pack_padded_sequence(randn(3, 3, 2).double(), torch.tensor([2, 3, 1]), enforce_sorted=False)

    def run(data, *parameters):
        output, state = torch.func.functional_call(
            module, dict(zip(dict(module.named_parameters()), parameters, strict=True)), (packed._replace(data=data),)
        )
        return output.data, *(state if isinstance(state, tuple) else (state,))

    leaves = [packed.data.requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters())]
    assert torch.autograd.gradcheck(run, leaves) and torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([2, 3], "do not grow"),
        ([3, 1], "expected a sum of 5 (rows of data), got 4"),
        ([6, -1], "do not grow, got -1 at index 1"),
        ([], "expected a contiguous vector of int64"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_refuses_batch_sizes(sizes, message, dtype):
    given = arguments_of(Case("gru", 5, 1, 1, 3, dtype=dtype), 2, 0)
    given["input"] = given["input"][:, 0]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        layer_forward(*arguments_of_op(given, False, torch.tensor(sizes, dtype=torch.int64)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], "offsets: expected them from 0 to 5 (rows of data), got 1 to 5"),
        ([0, 2, 4], "offsets: expected them from 0 to 5 (rows of data), got 0 to 4"),
        ([0, 4, 2, 5], "offsets: expected them to rise, got 2 behind 4"),
        ([0, 2**62, 5], f"offsets: expected them to rise, got {2**62} behind 0"),
        ([0], "offsets: expected [B + 1] of an integer dtype on the CPU, got Long [1]"),
        ([[0, 5]], "offsets: expected [B + 1] of an integer dtype on the CPU, got Long [1, 2]"),
        ([0.0, 5.0], "offsets: expected [B + 1] of an integer dtype on the CPU, got Float [2]"),
    ],
)
def test_refuses_offsets(offsets, message):
    given = arguments_of(Case("gru", 5, 1, 1, 3, dtype=torch.float64), 2, 0)
    given["input"] = given["input"][:, 0]
    with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
        layer_forward(*arguments_of_op(given, False), 0.0, False, torch.tensor(offsets))


def test_refuses_two_ways_to_stand_in_rows():
    given = arguments_of(Case("gru", 5, 1, 1, 3, dtype=torch.float64), 2, 0)
    given["input"] = given["input"][:, 0]
    args = arguments_of_op(given, False, torch.ones(5, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="offsets: expected none with batch_sizes, got a tensor"):
        layer_forward(*args, 0.0, False, torch.tensor([0, 5]))
    args = arguments_of_op(given | {"lengths": torch.tensor([5])}, False)
    with pytest.raises(RuntimeError, match="lengths: expected none with offsets, got a tensor"):
        layer_forward(*args, 0.0, False, torch.tensor([0, 5]))
