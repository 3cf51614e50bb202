"""The ops and modules on a GPU: against reference.py and torch.nn in float64 on the CPU, and what only a GPU can show
(graphs, streams, blocks that wait for each other). Skipped where torch sees no GPU or the build has no CUDA kernels.

FASTRNN_TEST_DEVICE=cpu runs the same tests on the CPU's kernels, as a check of the tests themselves.
"""

import copy
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from benchmarks.gpu.calls import peak_bytes
from benchmarks.gpu.steps import capture
from fastrnn import info, ops, packing, reference, wavefront
from tests.accuracy import assert_as_exact, magnified, plain_backward, plain_forward
from tests.helpers import allow_cudnn_tf32
from tests.kernels.test_kernels import (
    BACKWARD_NAMES,
    FORWARD_NAMES,
    PER_STEP,
    TOLERANCE,
    Case,
    assert_near,
    backward_arguments,
    cells_with_projection,
    double,
)

DEVICE = torch.device(os.environ.get("FASTRNN_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)
if ON_GPU and not info.has_cuda_kernels():
    pytest.skip("built without CUDA kernels", allow_module_level=True)

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
HALVES = (torch.bfloat16, torch.float16)
CELLS = tuple(ops.CELLS)
# Per cell and dtype, on any GPU of 8.0 or newer: (T, B, P, h) that fit one multiprocessor, that spread over many, and
# that take a product per step.
SIZES = {
    "resident": ((5, 3, 1, 32), (4, 17, 2, 96), (3, 1, 1, 128), (2, 64, 1, 64)),
    "grid": ((5, 4, 1, 256), (4, 17, 1, 512), (3, 2, 2, 200), (3, 32, 1, 384)),
    "cluster": ((5, 4, 1, 256), (4, 17, 2, 64), (3, 2, 1, 130), (3, 32, 1, 384)),
    "step": ((3, 2, 1, 2500), (2, 600, 3, 40), (2, 1, 1, 3072)),
}


@pytest.fixture(autouse=True)
def exact_products():
    """float32 means float32 here, for torch.nn and for us."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    allow_cudnn_tf32(False)
    yield
    torch.backends.cuda.matmul.allow_tf32 = before[0]
    allow_cudnn_tf32(before[1])


def moved(x, device=DEVICE):
    return x.to(device) if isinstance(x, torch.Tensor) else x


def plan(case, backward=False, tf32=False, tier=""):
    """The choice of the dispatch table for this GPU, or of one tier; ValueError if that cannot run the case."""
    call = info.Sizes(
        case.cell, str(case.dtype).removeprefix("torch."), case.T, case.B, case.P, case.h, case.projected or case.h,
        bool(case.lengths), bool(case.resets),
    )  # fmt: skip
    return info.cuda_choice(call, info.present_gpu(), backward, tf32, tier)


def can_run(case, tier):
    """Can this tier run both passes on this GPU?"""
    if not ON_GPU or not tier:
        return True
    try:
        return bool(plan(case, False, tier=tier) and plan(case, True, tier=tier))
    except ValueError:
        return False


@pytest.fixture(params=SIZES)
def tier(request, monkeypatch):
    """Every call of the test runs on this tier, or fails. (On a CPU there are none: the variable means nothing.)"""
    if request.param == "cluster" and ON_GPU and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("the cluster tier is for compute capability 9.0 and 10.x")
    monkeypatch.setenv("FASTRNN_CUDA_TIER", request.param)
    return request.param


def run(case, seed=0, device=DEVICE):
    """(results of forward, results of backward, what backward was called with), on the device."""
    arguments = {k: moved(v, device) for k, v in case.arguments(seed).items()}
    out = ops.recurrent_forward(*arguments.values(), True)
    cpu_results = [moved(x, "cpu") for x in (out[0], out[3])]
    pulled = backward_arguments(case.arguments(seed), *cpu_results, seed)
    grads = ops.recurrent_backward(*(moved(x, device) for x in pulled))
    return out, grads, pulled


def check(case, seed=0):
    """Both passes against reference.py in float64 on the CPU."""
    out, grads, pulled = run(case, seed)
    assert all(x.device.type == DEVICE.type for x in (*out, *grads))
    arguments = case.arguments(seed).values()
    near([x.cpu() for x in out], reference.forward, plain_forward, arguments, FORWARD_NAMES, case)
    near([x.cpu() for x in grads], reference.backward, plain_backward, pulled, BACKWARD_NAMES, case)


def near(got, exact, plain, arguments, names, case):
    """Within twice the error of plain torch code in the same dtype, on the CPU. In float64, which has no truth beyond
    it, within a fixed number."""
    want = exact(*map(double, arguments))
    if case.dtype == torch.float64:
        assert_near(got, want, TOLERANCE[case.dtype], names, case)
    else:
        assert_as_exact(got, want, plain(arguments), case.dtype, names, case, magnified(case.cell))


# ---- against the reference ----


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_odd_sizes(cell, projected, dtype):
    for T, B, h in product((1, 5), (1, 3, 17), (1, 3, 17, 129)):
        if projected < h:
            check(Case(cell, T, B, 1 + (B + h) % 3, h, projected, dtype=dtype), seed=T * B + h)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("cell", "projected"), [*((cell, 0) for cell in CELLS), ("lstm", 5)])
def test_odd_sizes_on_every_tier(cell, projected, dtype, tier):
    """Also where the table would take another, with lengths and resets."""
    ran = 0
    for i, (B, h) in enumerate(product((1, 3, 17, 129), (1, 3, 17, 129))):
        masks = ("", "rows", "groups")[i % 3], ("", "zeros", "state", "groups")[i % 4]
        reverse = ("none", "all", "alternate")[i // 3 % 3]
        case = Case(cell, (1, 5)[i // 2 % 2], B, 1 + i % 2, h, projected, *masks, reverse, dtype)
        if can_run(case, tier):
            check(case, seed=i)
            ran += 1
    wide = dtype == torch.float64 or projected or cell in PER_STEP
    assert ran == 16 or (tier != "step" and wide and not ran) or (tier != "step" and not wide and ran >= 10), ran


@pytest.mark.parametrize("cell", CELLS)
def test_no_steps_and_no_rows_on_every_tier(cell, tier):
    """Without rows no tier is asked, so there every cell runs on each of them."""
    for T, B in [(0, 3), (4, 0), (0, 0)]:
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(cell, T, B, 2, 5, 0, "rows", "state", dtype=dtype)
            if B == 0 or can_run(case, tier):
                check(case)


@needs_gpu
def test_a_tier_that_cannot_run_the_call_is_an_error(monkeypatch):
    for tier, case in [
        ("resident", Case("lstm", 3, 2, 1, 200, dtype=torch.float32)),
        ("resident", Case("gru", 3, 2, 1, 16, dtype=torch.float64)),
        ("grid", Case("lstm", 3, 2, 1, 16, 5, dtype=torch.float32)),
        ("cluster", Case("lstm", 3, 2, 1, 2048, dtype=torch.float32)),
    ]:
        monkeypatch.setenv("FASTRNN_CUDA_TIER", tier)
        with pytest.raises(NotImplementedError, match=f"FASTRNN_CUDA_TIER={tier} cannot run cell '{case.cell}'"):
            run(case)
    monkeypatch.setenv("FASTRNN_CUDA_TIER", "fast")
    with pytest.raises(ValueError, match="expected step, resident, grid or cluster, got 'fast'"):
        run(case)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_every_size(cell, dtype, sizes):
    for i, (T, B, P, h) in enumerate(SIZES[sizes]):
        if not ON_GPU:
            h = min(h, 40)
        check(Case(cell, T, B, P, h, dtype=dtype), seed=i)


@needs_gpu
def test_every_tier_is_reached():
    """By the sizes above, in both passes, on a GPU that has the room."""
    reached = Counter()
    for cell, dtype, sizes in product(CELLS, (torch.float32, *HALVES), SIZES.values()):
        for T, B, P, h in sizes:
            for backward in (False, True):
                reached[plan(Case(cell, T, B, P, h, dtype=dtype), backward)["tier"], backward] += 1
    if info.present_gpu().multiprocessors < 100:
        pytest.skip(f"a small GPU: its table reaches {dict(reached)}")
    for tier, backward in product(SIZES.keys() - {"cluster"}, (False, True)):  # nothing takes that one by itself yet
        assert reached[tier, backward], (tier, backward, reached)


@pytest.mark.parametrize("resets", ["", "zeros", "state", "groups"])
@pytest.mark.parametrize("lengths", ["", "rows", "groups"])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets_on_every_tier(cell, lengths, resets, tier):
    for reverse, dtype in product(("none", "all", "alternate"), (torch.float32, *HALVES)):
        case = Case(cell, 5, 9, 2, 33, 0, lengths, resets, reverse, dtype)
        if can_run(case, tier):
            check(case, seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gradient_of_every_c(dtype, tier):
    """A loss that looks at c after every step, with rows of different lengths, and at the final states."""
    if not can_run(Case("lstm", 5, 9, 1, 33, 0, "rows", dtype=dtype), tier):
        pytest.skip("another tier's")
    torch.manual_seed(0)
    exact = fastrnn.LSTM(7, 33, return_all_states=True, dtype=torch.float64)
    ours = copy.deepcopy(exact).to(DEVICE, dtype)
    lengths = torch.tensor([5, 0, 3, 1, 4, 5, 2, 5, 5])
    x, of_c = torch.randn(5, 9, 7, dtype=torch.float64), torch.randn(9, 5, 33, dtype=torch.float64).transpose(0, 1)
    grads = []
    for module in (exact, ours):
        like = module.weight_ih_l0
        given = x.to(like, copy=True).requires_grad_()
        output, (h_n, c_n), every_c = module(given, lengths=lengths.to(like.device))
        loss = (every_c * of_c.to(like)).sum() + output.sum() + h_n.sum() + c_n.sum()
        grads.append(torch.autograd.grad(loss, [given, *module.parameters()]))
    for want, got in zip(*grads, strict=True):
        allowed = 1e-4 if dtype == torch.float32 else 0.05
        assert (got.cpu().double() - want).abs().max() <= allowed * (1 + want.abs().max())


@pytest.mark.parametrize("reverse", ["none", "all", "alternate"])
@pytest.mark.parametrize("resets", ["", "zeros", "state", "groups"])
@pytest.mark.parametrize("lengths", ["", "rows", "groups"])
@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_lengths_and_resets(cell, projected, lengths, resets, reverse):
    sizes = [(6, 3, 2, 17), (4, 9, 1, 256), (3, 17, 2, 100)] if ON_GPU else [(6, 3, 2, 17)]
    for (T, B, P, h), dtype in product(sizes, (torch.float32, torch.bfloat16)):
        check(Case(cell, T, B, P, h, projected, lengths, resets, reverse, dtype), seed=T + B)


@pytest.mark.parametrize("cell", CELLS)
def test_no_steps_and_no_rows(cell):
    for T, B in [(0, 3), (4, 0), (0, 0)]:
        for dtype in (torch.float32, torch.bfloat16):
            check(Case(cell, T, B, 2, 5, 0, "rows", "state", dtype=dtype))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_absent_gradients_and_strides(cell):
    case = Case(cell, 4, 3, 2, 33, dtype=torch.float32)
    arguments = {k: moved(v) for k, v in case.arguments().items()} | {"bias_hh": None}
    out = ops.recurrent_forward(*arguments.values(), True)
    wide = torch.zeros(4, 3, 2 * out[0].shape[2], device=DEVICE)[:, :, ::2]  # not even the last is contiguous
    full = [moved(x) for x in backward_arguments(case.arguments(), out[0].cpu(), out[3].cpu())]
    full[1] = wide.copy_(full[1])
    want = ops.recurrent_backward(full[0], full[1].contiguous(), *full[2:])
    assert all(map(torch.equal, ops.recurrent_backward(*full), want))
    for missing in product((False, True), repeat=3):
        some = list(full)
        for i, gone in enumerate(missing, start=1):
            some[i] = None if gone else some[i]
        grads = ops.recurrent_backward(*some)
        expected = reference.backward(*(double(moved(x, "cpu")) for x in some))
        assert_near([g.cpu() for g in grads], expected, 4e-5, BACKWARD_NAMES, (case, missing))


@pytest.mark.parametrize("lengths", ["", "rows"])
@pytest.mark.parametrize("resets", ["", "state"])
def test_gradients_of_the_initial_state_may_be_left_out(lengths, resets):
    for h, dtype in product((33, 256), (torch.float32, torch.bfloat16)):
        _, want, pulled = run(Case("lstm", 4, 5, 2, h, 0, lengths, resets, dtype=dtype))
        got = ops.recurrent_backward(*map(moved, pulled), False)
        for name, a, b in zip(BACKWARD_NAMES, got, want, strict=True):
            assert a.numel() == 0 if name in ("grad_h_0", "grad_c_0") else torch.equal(a, b), name


@needs_gpu
def test_lengths_out_of_range_are_clamped():
    """A look at their values would wait for the device."""
    arguments = {k: moved(v) for k, v in Case("gru", 4, 3, 1, 33, 0, "rows", dtype=torch.float32).arguments().items()}
    wild = ops.recurrent_forward(*(arguments | {"lengths": torch.tensor([-2, 9, 3], device=DEVICE)}).values(), True)
    tame = ops.recurrent_forward(*(arguments | {"lengths": torch.tensor([0, 4, 3], device=DEVICE)}).values(), True)
    assert all(map(torch.equal, wild, tame))


@pytest.fixture
def allow_tf32():
    """Sets the two switches: of torch.nn's recurrent networks, and of matrix products."""

    def set_both(rnn, matmul):
        allow_cudnn_tf32(rnn)
        torch.backends.cuda.matmul.allow_tf32 = matmul

    return set_both  # exact_products puts back what was


@needs_gpu
@pytest.mark.parametrize("matmul", [False, True])
def test_tf32_only_where_torch_allows_it(allow_tf32, tier, matmul):
    """To torch.nn's recurrent networks, that is, whatever it allows of other products."""
    case = Case("lstm", 4, 16, 1, {"resident": 100, "cluster": 256}.get(tier, 512), dtype=torch.float32)
    want = reference.forward(*map(double, case.arguments().values()))[0]

    def error():
        return (run(case)[0][0].double().cpu() - want).abs().max().item()

    allow_tf32(rnn=False, matmul=matmul)
    assert error() < 4e-6
    allow_tf32(rnn=True, matmul=matmul)
    assert error() < 5e-3
    if tier == "step":
        assert error() > 4e-6


@needs_gpu
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_layers_products_obey_the_switch_of_torch_nn(allow_tf32, kind):
    """All of them: each result is as near to the truth as torch.nn's in either setting."""
    net = Net(kind, 16, 16, 256, 256, (("bidirectional", True),))
    torch.manual_seed(0)
    exact = net.module(nn, torch.float64, "cpu")
    truth = net.results(exact, torch.float64, "cpu")
    module = net.module(fastrnn, torch.float32, DEVICE)
    module.load_state_dict(exact.state_dict())

    def errors():
        found = net.results(module, torch.float32, DEVICE)
        return {name: (found[name] - want).abs().max() / want.abs().max() for name, want in truth.items()}

    for matmul in (False, True):
        allow_tf32(rnn=False, matmul=matmul)
        assert all(error < 2e-5 for error in errors().values()), errors()
        allow_tf32(rnn=True, matmul=matmul)
        assert all(error < 2e-2 for error in errors().values()), errors()
        rounded = [name for name, error in errors().items() if error > 2e-5]
        assert {"grad weight_ih_l0", "grad weight_hh_l0", "grad input"} <= set(rounded)


@needs_gpu
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cell_is_exact_where_torch_nns_is(allow_tf32, kind):
    torch.manual_seed(0)
    cell = getattr(fastrnn, kind)(512, 512, device=DEVICE)
    input = torch.randn(16, 512, device=DEVICE)

    def results():
        found = cell(input)
        h = found[0] if kind == "LSTMCell" else found
        return [x.detach() for x in (h, *torch.autograd.grad(h.square().sum(), list(cell.parameters())))]

    allow_tf32(rnn=False, matmul=False)
    want = results()
    allow_tf32(rnn=True, matmul=False)  # torch's default
    assert same(results(), want)


def test_offsets_beyond_31_bits():
    """The last steps of a long call equal those of a call on the tail alone."""
    case = Case("rnn_tanh", 3, 1, 1, 8, dtype=torch.float32)
    arguments = {k: moved(v) for k, v in case.arguments().items()}
    step = 1 << 16  # elements from step to step
    T = (1 << 31) // step + 5
    if ON_GPU and torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of GPU memory")
    if not ON_GPU:
        T = 50
    gates = torch.empty((T - 1) * step + 8, device=DEVICE).as_strided((T, 1, 8), (step, 8, 1)).zero_()
    gates[-3:] = arguments["gates_ih"]
    out = ops.recurrent_forward(*(arguments | {"gates_ih": gates}).values(), False)
    tail = arguments | {"gates_ih": gates[-3:].contiguous(), "h_0": out[0][-4]}
    assert (out[0][-3:] - ops.recurrent_forward(*tail.values(), False)[0]).abs().max().item() < 1e-6


# ---- against torch.nn ----


@dataclass(frozen=True)
class Net:
    kind: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    options: tuple = ()  # of the constructor
    packed: bool = False

    def module(self, namespace, dtype, device):
        return getattr(namespace, self.kind)(self.I, self.H, dtype=dtype, device=device, **dict(self.options))

    def results(self, module, dtype, device):
        """Outputs and every gradient, from the same random numbers whatever the dtype and device."""
        generator = torch.Generator().manual_seed(1)
        input = torch.randn(self.T, self.B, self.I, generator=generator).to(self.rounding).to(device, dtype)
        lengths = torch.randint(1, self.T + 1, (self.B,), generator=generator)
        input.requires_grad_()
        output, state = module(pack_padded_sequence(input, lengths, enforce_sorted=False) if self.packed else input)
        output = output.data if self.packed else output
        finals = state if isinstance(state, tuple) else (state,)
        total = 0.0
        for x in (output, *finals):
            weight = torch.randn(x.shape, generator=generator).to(self.rounding).to(device, dtype)
            total = total + (x * weight).sum()
        module.zero_grad()
        total.backward()
        named = {"output": output, **{f"final {i}": x for i, x in enumerate(finals)}, "grad input": input.grad}
        named |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
        return {name: x.detach().double().cpu() for name, x in named.items()}

    rounding = torch.bfloat16  # weights and inputs every dtype has


NETS = [
    Net("LSTM", 12, 5, 24, 64),
    Net("LSTM", 10, 16, 128, 256),
    Net("LSTM", 8, 64, 128, 512),
    Net("LSTM", 8, 6, 40, 72, (("bidirectional", True), ("num_layers", 2))),
    Net("LSTM", 8, 6, 40, 300, (("bidirectional", True),)),
    Net("LSTM", 9, 8, 32, 96, packed=True),
    Net("LSTM", 6, 4, 24, 64, (("proj_size", 16),)),
    Net("GRU", 12, 5, 24, 64),
    Net("GRU", 10, 16, 128, 512),
    Net("GRU", 8, 6, 40, 256, (("bidirectional", True), ("num_layers", 2))),
    Net("GRU", 9, 8, 32, 256, packed=True),
    Net("RNN", 12, 5, 24, 128),
    Net("RNN", 10, 16, 64, 512, (("nonlinearity", "relu"),)),
    Net("RNN", 9, 8, 32, 96, (("bidirectional", True),), packed=True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("net", NETS, ids=str)
def test_as_exact_as_torch_nn(net, dtype):
    """Our error against float64 is at most twice torch.nn's own on the same device, plus rounding.

    Rounding: 4 units of a half type, 32 of the wide ones, whose sums over T * B rows show.
    """
    if not ON_GPU:
        net = replace(net, H=min(net.H, 32), I=8, options=tuple((k, v) for k, v in net.options if k != "proj_size"))
    torch.manual_seed(0)
    exact = net.module(nn, torch.float64, "cpu")
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.to(net.rounding))
    truth = net.results(exact, torch.float64, "cpu")
    found = {}
    for namespace in (fastrnn, nn):
        module = net.module(namespace, dtype, DEVICE)
        module.load_state_dict(exact.state_dict())
        found[namespace] = net.results(module, dtype, DEVICE)
    rounding = torch.finfo(dtype).eps * (4 if dtype in HALVES else 32)
    for name, want in truth.items():
        scale = max(want.abs().max().item(), 1e-3)
        ours, theirs = ((found[n][name] - want).abs().max().item() / scale for n in (fastrnn, nn))
        assert ours <= 2 * theirs + rounding, f"{name}: {ours:.2e}, torch.nn {theirs:.2e}"


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_gradcheck(cell):
    arguments = {k: moved(v) for k, v in Case(cell, 3, 2, 2, 3, 0, "rows", "state").arguments().items()}
    names = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]

    def call(*values):
        given = arguments | dict(zip(names, values, strict=True))
        return ops.recurrent_forward(*given.values(), False)[: ops.CELLS[cell].tensors + 1]

    assert torch.autograd.gradcheck(call, [arguments[k].requires_grad_() for k in names])


def test_autocast():
    torch.manual_seed(0)
    module = fastrnn.LSTM(32, 128, device=DEVICE)
    input = torch.randn(6, 5, 32, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        output, _ = module(input)
    assert output.dtype == torch.bfloat16
    assert (output.float() - module(input)[0]).abs().max().item() < 3e-2
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


# ---- repeats, graphs, streams ----

REPEATED = [
    Case("lstm", 9, 33, 2, 65, 0, "rows", "state", dtype=torch.float32),
    Case("gru", 30, 16, 1, 512, dtype=torch.bfloat16),
    Case("lstm", 30, 8, 2, 256, 0, "rows", dtype=torch.float16),
    Case("rnn_tanh", 12, 5, 1, 384, dtype=torch.float32),
    Case("gru", 5, 4, 1, 40, 0, "", "zeros", dtype=torch.float64),
]


def ready(case, seed=0):
    """Forward and backward as one call on arguments that stay where they are."""
    arguments = {k: moved(v) for k, v in case.arguments(seed).items()}
    out = ops.recurrent_forward(*arguments.values(), True)
    pulled = [moved(x) for x in backward_arguments(case.arguments(seed), out[0].cpu(), out[3].cpu(), seed)]

    def call():
        out = ops.recurrent_forward(*arguments.values(), True)
        return (*out, *ops.recurrent_backward(*pulled[:-2], out[0], out[3]))

    return arguments, call


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_bitwise_repeatable(case):
    _, call = ready(case)
    first = call()
    for _ in range(20 if ON_GPU else 2):
        assert same(first, call())


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_many_launches(case):
    """Launches follow each other without a pause, on fresh inputs: nothing of one is seen by the next."""
    calls = [ready(case, seed)[1] for seed in range(4)]
    first = [call() for call in calls]
    rounds = 50 if ON_GPU else 2
    later = [[call() for call in calls] for _ in range(rounds)]
    for results in later:
        assert all(same(a, b) for a, b in zip(first, results, strict=True))


def test_launches_keep_no_memory():
    if not ON_GPU:
        pytest.skip("needs a GPU")
    _, call = ready(REPEATED[1])
    call()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        call()
    assert torch.cuda.memory_allocated() == before


@needs_gpu
@pytest.mark.parametrize(("kind", "options", "saved", "gates"), [
    ("LSTM", {}, 5, 4), ("LSTM", {"bidirectional": True}, 10, 8), ("GRU", {"bias": False}, 4, 3),
])  # fmt: skip
def test_memory_of_a_training_step(kind, options, saved, gates, tier):
    """At most what docs/gpu.md counts, in sizes of one direction's output: no tensor of the gates beside what is saved,
    none of their gradients. (A GRU has as many gradients again, which are in memory of their own.)"""
    T, B, H = 128, 64, 256
    if not can_run(Case(kind.lower(), T, B, 1 + ("bidirectional" in options), H, dtype=torch.bfloat16), tier):
        pytest.skip("another tier's size")
    module = getattr(fastrnn, kind)(H, H, dtype=torch.bfloat16, device=DEVICE, **options)
    x = torch.randn(T, B, H, dtype=torch.bfloat16, device=DEVICE)
    grad = torch.ones_like(module(x)[0])
    module(x)[0].backward(grad)  # the weights' gradients are there, and what cuBLAS keeps
    made, unit, separate = [], T * B * H * 2, gates if kind == "GRU" else 0
    forward = peak_bytes(lambda: made.append(module(x)[0]), DEVICE) / unit
    kept = torch.cuda.memory_allocated()
    again, last = (
        peak_bytes(lambda: made[0].backward(grad, retain_graph=retain), DEVICE) / unit for retain in (True, False)
    )
    assert torch.cuda.memory_allocated() <= kept - (saved - 0.25) * unit
    assert forward < saved + grad.numel() * 2 / unit + 0.75 * gates
    assert last < separate + 0.75 * gates and again - last > 0.75 * gates


@needs_gpu
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_graph_replays_with_new_inputs(case):
    arguments, call = ready(case)
    replay = capture(call)
    results = replay()
    for seed in (1, 2, 3):
        fresh = case.arguments(seed)
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor) and name not in ("lengths",):
                x.copy_(fresh[name])
        for x in results:
            x.fill_(torch.nan)
        assert same(replay(), call())


def training_step(kind, sequence):
    """A training step, and the input that it reads: a tensor, or the data of a packed sequence."""
    torch.manual_seed(0)
    T, B = 20, 8
    module = getattr(fastrnn, kind)(64, 96, num_layers=2, bidirectional=True, device=DEVICE)
    lengths = torch.randint(1, T + 1, (B,))
    options = {}
    if "resets" in sequence:
        options["resets"] = (torch.rand(T, B) < 0.2).to(DEVICE)
    if "lengths" in sequence:
        options["lengths"] = lengths if "host" in sequence else lengths.to(DEVICE)
    input = torch.randn(T, B, 64, device=DEVICE)
    packed = pack_padded_sequence(input, lengths, enforce_sorted=False) if "packed" in sequence else None
    input = input if packed is None else packed.data

    def step():
        output, _ = module(input if packed is None else packed._replace(data=input), **options)
        output = output if packed is None else output.data
        return (output, *torch.autograd.grad(output.square().sum(), list(module.parameters())))

    return step, input


@needs_gpu
@pytest.mark.parametrize("sequence", ["plain", "resets", "lengths", "resets and lengths", "packed"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_training_step_as_a_graph(kind, sequence):
    step, input = training_step(kind, sequence)
    replay = capture(step)
    input.copy_(torch.randn_like(input))
    assert same(replay(), step())


class OneStream(wavefront.CudaStreams):
    def __init__(self, device, count):
        self._streams = [torch.cuda.current_stream(device)] * count


@needs_gpu
@pytest.mark.parametrize("sequence", ["plain", "resets and lengths", "dropout"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_layers_side_by_side(kind, sequence, monkeypatch):
    """Bit for bit the same chunks one after the other, again and again, and as a graph; near to layers as a whole."""
    torch.manual_seed(0)
    T, B = 40, 8
    dropout = 0.3 if sequence == "dropout" else 0.0
    module = getattr(fastrnn, kind)(64, 256, num_layers=3, dropout=dropout, device=DEVICE)
    options = {}
    if "resets" in sequence:
        options["resets"] = (torch.rand(T, B) < 0.1).to(DEVICE)
        options["lengths"] = torch.randint(1, T + 1, (B,)).to(DEVICE)
    input, grad = torch.randn(2, T, B, 64, device=DEVICE)[0], torch.randn(T, B, 256, device=DEVICE)
    weights = list(module.parameters())

    def step():
        torch.manual_seed(1)
        return side_step()

    def side_step():
        output = module(input, **options)[0]
        return (output.detach(), *torch.autograd.grad(output, weights, grad))

    whole = step()
    monkeypatch.setenv("FASTRNN_CUDA_WAVEFRONT", "7")
    first = step()
    for _ in range(20):
        assert same(step(), first)
    for a, b in zip(first, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if not dropout:  # a graph's own random numbers go on from replay to replay
        assert same(capture(side_step)(), first)
    monkeypatch.setattr(wavefront, "make_streams", OneStream)
    assert same(step(), first)


@needs_gpu
@pytest.mark.parametrize("sequence", ["plain", "resets", "resets and lengths", "lengths of the host", "packed"])
def test_nothing_waits_for_the_device(sequence):
    step, _ = training_step("LSTM", sequence)
    want = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(got, want)


@needs_gpu
def test_lengths_of_a_packed_sequence_are_on_the_device():
    """More that differ than one launch takes."""
    lengths = torch.arange(700, 0, -1)
    assert torch.equal(packing.on_device(lengths, DEVICE).cpu(), lengths)


@needs_gpu
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_runs_on_the_current_stream(case):
    """Behind what the stream still has to do: were it on another, it would read the old input."""
    arguments, call = ready(case)
    arguments["gates_ih"].mul_(0.5)
    want = call()
    arguments["gates_ih"].mul_(2)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        arguments["gates_ih"].mul_(0.5)
        got = call()
    side.synchronize()
    assert same(got, want)


@needs_gpu
def test_two_streams_at_once():
    """Blocks that wait for each other must find room beside another launch's, or wait for it: never half of each."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    calls = [ready(case)[1] for case in (REPEATED[1], REPEATED[2], REPEATED[3])]
    want = [call() for call in calls]
    torch.cuda.synchronize()
    got = []
    for _ in range(30):
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                got.append(call())
    torch.cuda.synchronize()
    assert all(same(x, want[i % 3]) for i, x in enumerate(got))


@needs_gpu
def test_two_threads_at_once():
    """One kernel at two sizes: neither may take the other's shared memory away between its setting and its launch."""
    cases = [Case("lstm", 3, 40, 1, h, dtype=torch.float32) for h in (112, 128)]
    calls = [ready(case)[1] for case in cases]
    want = [call() for call in calls]
    torch.cuda.synchronize()

    def many(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            got = [calls[i]() for _ in range(200)]
            torch.cuda.current_stream().synchronize()
        return all(same(x, want[i]) for x in got)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(many, range(2)))


@needs_gpu
def test_another_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    for case in REPEATED:
        here, there = (run(case, device=torch.device("cuda", i)) for i in (0, 1))
        assert torch.cuda.current_device() == 0
        assert all(x.device.index == 1 for x in (*there[0], *there[1]))
        assert same([x.cpu() for x in (*here[0], *here[1])], [x.cpu() for x in (*there[0], *there[1])])


@needs_gpu
def test_arguments_of_two_devices_are_refused():
    arguments = Case("lstm", 3, 2, 1, 16, dtype=torch.float32).arguments()
    mixed = {k: moved(v) for k, v in arguments.items()} | {"weight_hh": arguments["weight_hh"]}
    with pytest.raises(RuntimeError, match="weight_hh: expected device cuda:0"):
        ops.recurrent_forward(*mixed.values(), True)
    check(Case("lstm", 3, 2, 1, 16, dtype=torch.float32))


@needs_gpu
def test_moves_with_the_module():
    """A module made on the CPU gives there and on the GPU the same, but for rounding."""
    torch.manual_seed(0)
    module = fastrnn.GRU(12, 100, num_layers=2, bidirectional=True)
    input = torch.randn(7, 4, 12)
    want, _ = module(input)
    got, _ = module.to(DEVICE)(input.to(DEVICE))
    assert (got.cpu() - want).abs().max().item() < 1e-5


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles(dtype):
    module = fastrnn.LSTM(16, 96, device=DEVICE, dtype=dtype)
    input = torch.randn(5, 3, 16, device=DEVICE, dtype=dtype)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(input)[0], module(input)[0])
