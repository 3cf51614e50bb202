"""What is particular about cells with parameters of a unit, about those that look at a whole row, and about those with
a second product inside a step. The kernel of "norm", which the package does not have, is made of tests/more_cells.h,
its equations are in tests/more_cells.py.
"""

import ctypes
import shutil
from itertools import product

import pytest
import torch

from fastrnn import reference
from tests.cuda import test_host as host
from tests.kernels.test_kernels import Case
from tests.more_cells import MORE_CELLS

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def more_equations(monkeypatch):
    for name, cell in MORE_CELLS.items():
        monkeypatch.setitem(reference.CELLS, name, cell)


cuda = host.cuda


@pytest.fixture(autouse=True)
def cells_of_the_library(cuda):
    CellCase.cells = cuda.cells


class CellCase(Case):
    cells = None

    @property
    def info(self):
        return self.cells[self.cell]


each_tier = pytest.mark.parametrize(("tier", "cell", "projected"), [
    pytest.param(host.TIERS[tier], cell, projected, id=f"{tier}-{cell}{projected or ''}")
    for tier, cell, projected in [
        ("step", "lstm_peephole", 0), ("step", "lstm_peephole", 5), ("step", "norm", 0),
        ("step", "lstm_norm", 5), ("step", "gru_norm", 0), ("step", "gru_reset_before", 0),
        ("resident", "lstm_peephole", 0), ("grid", "lstm_peephole", 0), ("cluster", "lstm_peephole", 0),
    ]
])  # fmt: skip
STEP = host.TIERS["step"]


@host.each_dtype
def test_odd_sizes(cuda, dtype):
    for i, (B, h) in enumerate([*product((1, 3, 17), (1, 3, 17)), (3, 129), (129, 3)]):
        masks = host.LENGTHS[i % 3], host.RESETS[i % 4], "alternate" if i % 2 else host.REVERSE[i // 3 % 3]
        cuda.schedule(i % 8, seed=i, races=h < 100)
        assert host.Problem(CellCase("norm", 3, B, 2, h, 0, *masks, dtype), i).check(cuda, STEP)


@pytest.mark.parametrize("reverse", host.REVERSE)
@pytest.mark.parametrize("resets", host.RESETS)
@pytest.mark.parametrize("lengths", host.LENGTHS)
def test_lengths_and_resets(cuda, lengths, resets, reverse):
    for seed, dtype in enumerate((F32, BF16)):
        cuda.schedule(seed + 2, seed=9)
        case = CellCase("norm", 4, 3, 2, 7, 0, lengths, resets, reverse, dtype)
        assert host.Problem(case, seed).check(cuda, STEP)


@pytest.mark.parametrize("cell", ["norm", "lstm_norm", "gru_norm"])
def test_more_units_than_threads(cuda, cell):
    """A row's sums over several warps, and over several units of a thread."""
    cuda.schedule(6, 1, races=False)
    for h in (70, 300):
        assert host.Problem(CellCase(cell, 2, 2, 1, h, dtype=F32), h).check(cuda, STEP)


@each_tier
def test_every_schedule_gives_the_same_bits(cuda, tier, cell, projected):
    case = CellCase(cell, 3, 3, 2, 40, projected, "groups", "groups", "alternate", F32)
    problem = host.Problem(case)
    for backward in (False, True):
        tile, *_ = tier.tiles(case, backward)
        runs = [problem.run(cuda, tier, tile, backward) for _ in cuda.schedules(seed=1, count=8)]
        assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(other, runs[0], strict=True))


@each_tier
def test_absent_arguments(cuda, tier, cell, projected):
    """No initial state, and a parameters' gradient that is not wanted."""
    cuda.schedule(2, 1)
    case = CellCase(cell, 4, 3, 2, 9, projected, "rows", "state", dtype=F32)

    def zero(a):
        a.update({name: None if a[name] is None else torch.zeros_like(a[name]) for name in ("h_0", "c_0")})

    problem = host.Problem(case, edit=zero)
    stateless = list(problem.back)
    for place in host.BACKWARD_STATES.values():
        stateless[place] = None
    for tile in tier.tiles(case, False):
        want = problem.run(cuda, tier, tile, False)
        got = host.run_forward(cuda, tier, tile, problem.arguments | {"h_0": None, "c_0": None})
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for tile in tier.tiles(case, True):
        want = problem.run(cuda, tier, tile, True)
        got = host.run_backward(cuda, tier, tile, stateless)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        if not case.info.params:
            continue
        cuda.reset()
        call = host.backward_call(cuda, *problem.back)
        call.places["grad_params"], call.results["grad_params"] = None, torch.empty(0)
        call.written.remove("grad_params")
        tier.run(call, True, tile)
        assert all(torch.equal(a, b) for a, b in zip(call.finish()[:-1], want[:-1], strict=True))


@pytest.mark.parametrize("cell", ["norm", "lstm_norm", "gru_norm", "gru_reset_before", "mgu"])
def test_a_cell_with_a_row_or_two_products_has_the_per_step_tier_alone(cuda, cell):
    """Also where another tier is asked for by name, or by its tile."""
    alone, whole = (CellCase(name, 2, 3, 1, 16, dtype=F32) for name in ("lstm_peephole", cell))
    cuda.reset()
    calls = [host.forward_call(cuda, case.arguments()) for case in (alone, whole)]
    for backward in (False, True):
        assert [cuda.choose(call, backward)[1][0] for call in calls] == [host.RESIDENT, host.STEP]
        for tier, call in product(host.TIERS, calls):
            choice = (ctypes.c_int64 * 8)()
            taken = cuda.library.cuda_choose_from(
                call.sizes, call.addresses, tier.encode(), backward, 132, 90, ctypes.c_int64(232448), 0, choice
            )
            assert bool(taken) == (tier == "step" or call is calls[0])
    call = calls[1]
    for tile in [(host.RESIDENT, 4, *[0] * 6), host.TIERS["grid"].tiles(alone, False)[0]]:
        choice = (ctypes.c_int64 * 8)(*tile)
        assert cuda.library.cuda_forward(call.sizes, call.addresses, choice, None) == 1
        assert cuda.library.cuda_backward(call.sizes, call.addresses, choice, None) == 1
    assert cuda.unwritten(call.places["output"], call.results["output"].nbytes) == call.results["output"].nbytes
