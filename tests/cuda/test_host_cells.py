"""Cells that the package does not have (tests/more_cells.h), in every CUDA tier that takes them: one with parameters
beside its weights, one that looks at a whole row. The truth is a loop over single rows in float64 and its autograd,
which knows neither the walk of reference.py nor a derivative; an error is held against that of the same loop in the
case's dtype.
"""

import ctypes
import shutil
from itertools import product

import pytest
import torch

from tests.accuracy import assert_as_exact
from tests.cuda.test_host import (
    DTYPES,
    HERE,
    LENGTHS,
    RESETS,
    REVERSE,
    STEP,
    TIERS,
    Cuda,
    backward_call,
    forward_call,
    run_backward,
    run_forward,
)  # fmt: skip
from tests.hostbuild.build import MORE_CELLS, OUT, ROOT, build
from tests.kernels.test_kernels import Case

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

FORWARD = ("output", "h_n", "c_n")
BACKWARD = (
    "grad_gates_ih", "grad_gates_hh", "grad_projected", "grad_h_0", "grad_c_0", "grad_reset_h", "grad_reset_c",
    "grad_params",
)  # fmt: skip


def peephole(x, a, h, c, w):
    """Gates of x and of the product [4, h], states [h], parameters [3, h]; the states after the step."""
    z = x + a
    i, f = torch.sigmoid(z[0] + w[0] * c), torch.sigmoid(z[1] + w[1] * c)
    c = f * c + i * torch.tanh(z[2])
    return torch.sigmoid(z[3] + w[2] * c) * torch.tanh(c), c


def norm(x, a, h, c, w):
    normal = (a - a.mean()) / ((a * a).mean() - a.mean() * a.mean() + 1e-2).sqrt()
    return torch.tanh(x + w * normal)[0], c


EQUATIONS = {"peephole": peephole, "norm": norm}


@pytest.fixture(scope="module")
def cuda():
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "launchers.cpp"]
    library = Cuda(build(sources, OUT / "libcuda_more_cells.so", [f'FASTRNN_MORE_CELLS="{MORE_CELLS}"']))
    CellCase.cells = library.cells
    return library


class CellCase(Case):
    cells = None

    @property
    def info(self):
        return self.cells[self.cell]


class Problem:
    """A case's arguments, what the equation makes of them, and its gradients for random gradients of the results."""

    def __init__(self, case, seed=0, **edits):
        self.case, self.a = case, case.arguments(seed) | edits
        generator = torch.Generator().manual_seed(seed + 1)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

        T, B, P, h, info = case.T, case.B, case.P, case.h, case.info
        R = case.projected or h
        self.params = random(P, info.params, h)
        self.grads = [random(T, B, P * R), random(B, P * R), random(B, P * h) if info.states > 1 else None]
        self.want, self.want_back = self.evaluate(torch.float64)
        self.plain, self.plain_back = self.evaluate(case.dtype)

    def evaluate(self, dtype):
        """Results and gradients of the equation, every operation rounded to a dtype."""
        equation, case = EQUATIONS[self.case.cell], self.case
        a = {k: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in self.a.items()}
        T, B, P, h, G = case.T, case.B, case.P, case.h, case.info.gates
        R, second = case.projected or h, case.info.states > 1
        zeros = lambda *shape: torch.zeros(shape, dtype=dtype)  # noqa: E731
        # added where their gradient is asked for: to each row's params, to the products
        params = self.params.to(dtype).expand(B, *self.params.shape).clone()
        leaves = [a["gates_ih"], zeros(T, B, P * G * h), zeros(T, B, P * R), a["h_0"], a["c_0"], a["reset_h"],
                  a["reset_c"], params]  # fmt: skip
        leaves = [x if x is None else x.clone().requires_grad_() for x in leaves]
        gates_ih, gates_hh, projected, *states, params = leaves
        h_0, c_0, reset_h, reset_c = (x if x is None else x.view(B, P, -1) for x in states)
        lengths, resets = (x if x is None else x.view(*shape, -1) for x, shape in
                           ((a["lengths"], (B,)), (a["resets"], (T, B))))  # fmt: skip
        outputs = {(t, b, p): zeros(R) for t, b, p in product(range(T), range(B), range(P))}
        h_n, c_n = {}, {}
        for b, p in product(range(B), range(P)):
            length = T if lengths is None else int(lengths.expand(B, P)[b, p])
            state = zeros(R) if h_0 is None else h_0[b, p]
            cell = c_0[b, p] if c_0 is not None else zeros(h)
            times = reversed(range(length)) if a["reverse"][p] else range(length)
            for k, t in enumerate(times):
                boundary = None if a["reverse"][p] and k == 0 else t + 1 if a["reverse"][p] else t
                if resets is not None and boundary is not None and resets.expand(T, B, P)[boundary, b, p]:
                    state = zeros(R) if reset_h is None else reset_h[b, p]
                    cell = zeros(h) if reset_c is None else reset_c[b, p]
                product_hh = a["weight_hh"][p] @ state + a["bias_hh"][p] + gates_hh[t, b].view(P, -1)[p]
                x = gates_ih[t, b].view(P, G, h)[p]
                state, cell = equation(x, product_hh.view(G, h), state, cell, params[b, p])
                if a["weight_hr"] is not None:
                    state = a["weight_hr"][p] @ state + projected[t, b].view(P, R)[p]
                outputs[t, b, p] = state
            h_n[b, p], c_n[b, p] = state, cell
        stack = lambda x, *shape: torch.stack([*x.values()]).view(*shape, -1)  # noqa: E731
        results = [stack(outputs, T, B), stack(h_n, B), stack(c_n, B) if second else zeros(0)]
        loss = sum((x * g.to(dtype)).sum() for x, g in zip(results, self.grads, strict=True) if g is not None)
        there = [x for x in leaves if x is not None]
        grads = dict(zip(map(id, there), torch.autograd.grad(loss, there, allow_unused=True), strict=True))
        full = []
        for x in leaves:
            grad = grads.get(id(x))
            full.append(zeros(0) if x is None else torch.zeros_like(x) if grad is None else grad)
        full[1] = full[1] if case.info.separate_gates_hh else zeros(0)
        full[2] = full[2] if case.projected else zeros(0)
        full[-1] = full[-1].reshape(B, -1)
        return [x.detach() for x in results], full

    def back(self, forward):
        """The arguments of backward, from what forward gave."""
        rest = {k: v for k, v in self.a.items() if k not in ("cell", "gates_ih", "bias_hh")}
        return [self.case.cell, *self.grads, *rest.values(), forward[0], forward[3]]

    def check(self, cuda, tier):
        case, runs = self.case, 0
        for tile, tile_back in zip(tier.tiles(case, False), tier.tiles(case, True), strict=False):
            if tile and tile[4]:
                continue  # TF32
            forward = run_forward(cuda, tier, tile, self.a, params=self.params)
            assert_as_exact(forward[:3], self.want, self.plain, case.dtype, FORWARD, (case, tile))
            backward = run_backward(cuda, tier, tile_back, self.back(forward), params=self.params)
            assert_as_exact(backward, self.want_back, self.plain_back, case.dtype, BACKWARD, (case, tile_back))
            runs += 1
        return runs


TAKES = [
    ("step", "peephole", 0), ("step", "peephole", 5), ("step", "norm", 0), ("resident", "peephole", 0),
    ("grid", "peephole", 0),
]  # fmt: skip
each_tier = pytest.mark.parametrize(("tier", "cell", "projected"), TAKES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@each_tier
def test_odd_sizes(cuda, tier, cell, projected, dtype):
    runs = 0
    for i, (B, h) in enumerate([*product((1, 3, 17), (1, 3, 17)), (3, 129), (129, 3)]):
        masks = LENGTHS[i % 3], RESETS[i % 4], "alternate" if i % 2 else REVERSE[i // 3 % 3]
        case = CellCase(cell, 3, B, 2 if B < 129 else 1, h, projected, *masks, dtype)
        cuda.schedule(i % 8, seed=i, races=h < 100)
        runs += Problem(case, i).check(cuda, TIERS[tier])
        assert cuda.findings() == []
    assert (runs > 0) == (tier == "step" or dtype != torch.float64)


@pytest.mark.parametrize("reverse", REVERSE)
@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("lengths", LENGTHS)
@each_tier
def test_lengths_and_resets(cuda, tier, cell, projected, lengths, resets, reverse):
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        cuda.schedule(seed + 2, seed=9)
        case = CellCase(cell, 4, 3, 2, 7, projected, lengths, resets, reverse, dtype)
        assert Problem(case, seed).check(cuda, TIERS[tier])


@each_tier
def test_more_units_than_threads(cuda, tier, cell, projected):
    """A row's sums over several warps, and over several units of a thread."""
    cuda.schedule(6, 1, races=False)
    for h in (70, 300) if tier == "step" else (70,):
        assert Problem(CellCase(cell, 2, 2, 1, h, projected, dtype=torch.float32), h).check(cuda, TIERS[tier])


@each_tier
def test_every_schedule_gives_the_same_bits(cuda, tier, cell, projected):
    case = CellCase(cell, 3, 3, 2, 65, projected, "groups", "groups", "alternate", torch.float32)
    problem, tier = Problem(case), TIERS[tier]
    tile, tile_back = tier.tiles(case, False)[0], tier.tiles(case, True)[0]
    runs = []
    for _ in cuda.schedules(seed=1, count=8):
        forward = run_forward(cuda, tier, tile, problem.a, params=problem.params)
        runs.append([*forward, *run_backward(cuda, tier, tile_back, problem.back(forward), params=problem.params)])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(other, runs[0], strict=True))


@each_tier
def test_absent_arguments(cuda, tier, cell, projected):
    """No initial state, and a parameters' gradient that is not wanted."""
    cuda.schedule(2, 1)
    case, tier = CellCase(cell, 4, 3, 2, 9, projected, "rows", "state", dtype=torch.float32), TIERS[tier]
    problem = Problem(case)
    h_0, c_0 = (x if x is None else torch.zeros_like(x) for x in (problem.a["h_0"], problem.a["c_0"]))
    zeros, absent = Problem(case, h_0=h_0, c_0=c_0), Problem(case, h_0=None, c_0=None)
    for tile, tile_back in zip(tier.tiles(case, False), tier.tiles(case, True), strict=True):
        forwards = [run_forward(cuda, tier, tile, x.a, params=x.params) for x in (zeros, absent)]
        assert all(torch.equal(a, b) for a, b in zip(*forwards, strict=True))
        backwards = [run_backward(cuda, tier, tile_back, x.back(forwards[0]), params=x.params) for x in (zeros, absent)]
        assert all(torch.equal(a, b) for a, b in zip(*backwards, strict=True))
        cuda.reset()
        call = backward_call(cuda, *zeros.back(forwards[0]), params=zeros.params)
        call.places["grad_params"], call.results["grad_params"] = None, torch.empty(0)
        tier.run(call, True, tile_back)
        assert all(torch.equal(a, b) for a, b in zip(call.finish()[:-1], backwards[0][:-1], strict=True))


def test_a_cell_with_a_row_has_the_per_step_tier_alone(cuda):
    """Even where another is asked for by name or by its tile."""
    case = CellCase("norm", 2, 3, 1, 16, dtype=torch.float32)
    pointwise = CellCase("peephole", 2, 3, 1, 16, dtype=torch.float32)
    for backward in (False, True):
        cuda.reset()
        call = forward_call(cuda, Problem(case).a, params=Problem(case).params)
        assert cuda.choose(call, backward)[1][0] == STEP
        assert cuda.choose(forward_call(cuda, Problem(pointwise).a), backward)[1][0] != STEP
        choice = (ctypes.c_int64 * 8)()
        for tier in ("step", "resident", "grid"):
            taken = cuda.library.cuda_choose_from(
                call.sizes, call.addresses, tier.encode(), backward, 132, 90, ctypes.c_int64(232448), choice
            )
            assert bool(taken) == (tier == "step")
    for tile in [(1, 4, *[0] * 6), TIERS["grid"].tiles(pointwise, False)[0]]:
        choice = (ctypes.c_int64 * 8)(*tile)
        assert cuda.library.cuda_forward(call.sizes, call.addresses, choice, None) == 1
        assert cuda.library.cuda_backward(call.sizes, call.addresses, choice, None) == 1
    assert cuda.unwritten(call.places["output"], call.results["output"].nbytes) == call.results["output"].nbytes
