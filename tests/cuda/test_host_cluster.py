"""What the cluster tier of the CUDA recurrence has to itself, run by the host build: pushes between shared memories,
tiles of units, its choice. What it shares with other tiers is tested in test_host.py.
"""

import ctypes
import re
import shutil

import pytest
import torch

from tests.cuda.test_host import (
    ADDRESSES,
    CELLS,
    DTYPES,
    SIZES,
    TIERS,
    Cuda,
    Problem,
    cluster_tile,
    forward_call,
    run_backward,
    run_forward,
)
from tests.hostbuild.build import HERE, OUT, ROOT, build
from tests.kernels.test_kernels import Case

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = {"float32": (F32, False), "tf32": (F32, True), "bfloat16": (BF16, False), "float16": (F16, False)}
CLUSTER, GRID = map(list(TIERS).index, ("cluster", "grid"))


@pytest.fixture(scope="module")
def cuda():
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "launchers.cpp"]
    return Cuda(build(sources, OUT / "libcuda_kernels.so"))


class Tiles:
    """The cluster tier with these tiles alone: (units, rows, tf32, threads at most), the same in both passes."""

    def __init__(self, *tiles):
        self.mine = tiles

    def tiles(self, case, backward):
        return [cluster_tile(case, backward, *tile) for tile in self.mine]

    run, workspace = TIERS["cluster"].run, TIERS["cluster"].workspace


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_every_schedule(cuda, cell, kind):
    """Two clusters of three blocks, pushes prompt and late: whoever starves, the numbers stay, and stay the same."""
    dtype, tf32 = KINDS[kind]
    mma = kind != "float32"
    case = Case(cell, 5, 3, 1, 35 if mma else 9, 0, "rows", "state", dtype=dtype)
    tier, problem = Tiles((16 if mma else 4, 2, tf32, 64)), Problem(case)
    cuda.schedule(0, seed=1)
    problem.check(cuda, tier)
    for backward in (False, True):
        (tile,), results = tier.tiles(case, backward), []
        for _ in cuda.schedules(seed=2, count=8):
            results.append(problem.run(cuda, tier, tile, backward))
        for _ in cuda.starve_each(seed=3, blocks=6, warps=12):
            results.append(problem.run(cuda, tier, tile, backward))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 2, 5, 16])
def test_cluster_sizes(cuda, blocks, kind):
    """Every number of blocks for each of the four that a lane pushes to, up to the largest cluster."""
    dtype, tf32 = KINDS[kind]
    step = 4 if kind == "float32" else 16
    case = Case("gru", 3, 5, 2 if blocks < 16 else 1, step * blocks - 3, 0, "groups", "groups", "alternate", dtype)
    cuda.schedule(blocks % 8, seed=blocks, races=blocks < 16)
    Problem(case, blocks).check(cuda, Tiles((step, 3, tf32, 64)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_tiles_of_units(cuda, cell, kind):
    """Warps that share K and others that share units, the last of whose tiles may be narrower or hold none."""
    dtype, tf32 = KINDS[kind]
    cuda.schedule(3, seed=7, races=False)
    for units in (20, 36) if kind == "float32" else (32, 48):
        case = Case(cell, 3, 5, 1, 2 * units - 5, 0, "rows", "zeros", dtype=dtype)
        Problem(case, units).check(cuda, Tiles((units, 3, tf32, 256)))
    case = Case(cell, 3, 5, 1, 33, 0, "", "", dtype=dtype)
    Problem(case).check(cuda, Tiles((32, 3, tf32, 256)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["lstm", "rnn_relu"])
def test_weights_beyond_registers(cuda, cell, kind):
    """One warp for all of K: some of its weights are in shared memory."""
    dtype, tf32 = KINDS[kind]
    h = {"float32": 133, "tf32": 70 if cell == "lstm" else 240, "bfloat16": 129 if cell == "lstm" else 465,
         "float16": 120 if cell == "lstm" else 450}[kind]  # fmt: skip
    units = {"float32": 32 if cell != "lstm" else 36}.get(kind, 16 if cell == "lstm" else 32)
    case = Case(cell, 2, 3, 1, h, dtype=dtype)
    cuda.schedule(5, seed=1, races=False)
    Problem(case).check(cuda, Tiles((units, 2, tf32, 32)))


@pytest.mark.parametrize("kind", KINDS)
def test_full_tile(cuda, kind):
    """256 threads that each own a word, more than 8 rows."""
    dtype, tf32 = KINDS[kind]
    units, rows = {"float32": (16, 16), "tf32": (16, 16)}.get(kind, (32, 16))
    case = Case("lstm", 2, rows, 1, 2 * units + 1, 0, "rows", "zeros", dtype=dtype)
    cuda.schedule(2, seed=1, races=False)
    Problem(case).check(cuda, Tiles((units, rows, tf32, 256)))


@pytest.mark.parametrize("kind", KINDS)
def test_without_masks_is_the_same(cuda, kind):
    """Kernels for calls that have neither lengths nor resets give what the others give where nothing is masked."""
    dtype, tf32 = KINDS[kind]
    case = Case("lstm", 4, 5, 2, 19, 0, "", "", "alternate", dtype)
    problem, tier = Problem(case), Tiles((16, 3, tf32, 64))
    cuda.schedule(4, seed=3)
    (tile,), (back,) = tier.tiles(case, False), tier.tiles(case, True)
    masked = problem.arguments | {"lengths": torch.full((5,), 4)}
    plain = run_forward(cuda, tier, tile, problem.arguments)
    assert all(torch.equal(a, b) for a, b in zip(plain, run_forward(cuda, tier, tile, masked), strict=True))
    plain = run_backward(cuda, tier, back, problem.back)
    masked = [*problem.back]
    masked[9] = torch.full((5,), 4)
    assert all(torch.equal(a, b) for a, b in zip(plain, run_backward(cuda, tier, back, masked), strict=True))


@pytest.mark.parametrize("change", [
    {"units": 0}, {"units": 6}, {"units": 8, "dtype": BF16}, {"units": 24, "tf32": True}, {"rows": 0}, {"rows": 33},
    {"threads": 0}, {"threads": 48}, {"threads": 288}, {"h": 65}, {"units": 48, "threads": 64, "h": 48, "dtype": BF16},
    {"units": 256, "threads": 256, "rows": 1, "h": 256, "dtype": BF16},
], ids=str)  # fmt: skip
def test_refused_tiles(cuda, change):
    """No more than 16 blocks, whole groups of words, a warp for each tile of units, a thread for each word."""
    tile = {"units": 4, "rows": 8, "threads": 64, "tf32": False, "dtype": F32, "h": 20} | change
    cuda.reset()
    call = forward_call(cuda, Case("lstm", 2, 40, 1, tile["h"], dtype=tile["dtype"]).arguments())
    numbers = (CLUSTER, tile["rows"], tile["units"], 0, tile["tf32"], 0, tile["threads"], 0)
    choice = (ctypes.c_int64 * 8)(*numbers)
    assert cuda.library.cuda_forward(call.sizes, call.addresses, choice, None) == 1
    assert cuda.library.cuda_backward(call.sizes, call.addresses, choice, None) == 1


def choice_of(cuda, cell, kind, B, h, P, backward, multiprocessors=132, capability=90):
    """units, rows, threads, blocks; None: not for this tier."""
    dtype, tf32 = KINDS[kind]
    cuda.reset()
    numbers = [8, B, P, h, h, CELLS.index(cell), DTYPES.index(dtype), *[0] * 10]
    choice = (ctypes.c_int64 * 8)()
    taken = cuda.library.cuda_choose_from(
        (ctypes.c_int64 * SIZES)(*numbers), (ctypes.c_void_p * len(ADDRESSES))(), b"cluster", backward, multiprocessors,
        capability, ctypes.c_int64(232448), tf32, choice)  # fmt: skip
    tier, rows, units, variant, said_tf32, blocks, threads, shared = choice
    if not taken:
        return None
    assert (tier, said_tf32) == (CLUSTER, tf32) and shared <= 232448 and variant == 0
    return units, rows, threads, blocks


# (cell, kind, B, h, P) -> choice_of, forward and backward
CHOICES = [
    (("lstm", "bfloat16", 16, 256, 1), (64, 8, 256, 8), (64, 8, 256, 8)),  # fills registers: 8 tiles of 4 gates, 32
    (("lstm", "bfloat16", 16, 512, 1), (32, 8, 256, 32), (32, 8, 256, 32)),
    (("lstm", "bfloat16", 128, 512, 1), (32, 16, 256, 128), (32, 16, 256, 128)),
    (("gru", "float16", 16, 768, 1), (48, 8, 192, 32), (48, 8, 192, 32)),
    (("lstm", "float32", 16, 64, 1), (64, 1, 256, 16), (64, 1, 256, 16)),
    (("lstm", "float32", 32, 128, 1), (32, 2, 256, 64), (32, 2, 256, 64)),
    (("gru", "float32", 16, 128, 1), (32, 1, 256, 64), (64, 1, 256, 32)),
    (("lstm", "float32", 16, 256, 1), (16, 4, 256, 64), (16, 4, 256, 64)),
    (("rnn_tanh", "float32", 1, 33, 2), (36, 1, 256, 2), (36, 1, 160, 2)),
    (("lstm", "float32", 4, 2048, 1), None, None),
]


@pytest.mark.parametrize(("call", "forward", "backward"), CHOICES)
def test_choice(cuda, call, forward, backward):
    assert choice_of(cuda, *call, False) == forward
    assert choice_of(cuda, *call, True) == backward


def test_choice_is_for_devices_with_clusters(cuda):
    for capability, taken in [(80, False), (89, False), (90, True), (100, True), (103, True), (120, False)]:
        assert bool(choice_of(cuda, "lstm", "bfloat16", 8, 256, 1, False, capability=capability)) == taken


def test_every_choice_can_run(cuda):
    """What the choice says of shared memory is what the kernel lays out, and the launcher takes it."""
    for i, (cell, h, B) in enumerate([("lstm", 40, 17), ("gru", 70, 3), ("rnn_tanh", 130, 1), ("lstm", 33, 29)]):
        for kind in ("float32", "bfloat16"):
            case = Case(cell, 1, B, 1, h, dtype=KINDS[kind][0])
            tier = Tiles()
            tier.tiles = lambda case, backward, kind=kind: [
                (CLUSTER, rows, units, 0, 0, 0, threads, 0)
                for units, rows, threads, _ in [choice_of(cuda, case.cell, kind, case.B, case.h, 1, backward)]
            ]
            cuda.schedule(i, seed=i, races=False)
            Problem(case, i).check(cuda, tier)


def test_groups_that_the_grid_tier_cannot_hold_have_clusters(cuda):
    """Where the entry for as many rows of one group says grid, and not a product per step."""
    for P, tier in ((1, GRID), (8, CLUSTER)):
        cuda.reset()
        case = Case("lstm", 8, 128 // P, P, 512, dtype=BF16)
        assert cuda.choose(forward_call(cuda, case.arguments()), False, capability=90)[1][0] == tier


def test_every_measured_tier_can_run(cuda):
    """Of the entries that choose() follows, each at its largest size on the GPU that has measured it."""
    cells, kinds = {4: "lstm", 3: "gru", 1: "rnn_tanh"}, {"kHalf": "bfloat16", "kTF32": "tf32", "kFloat32": "float32"}
    lines = (ROOT / "csrc/cuda/measured_tiers.inc").read_text().splitlines()
    entry = re.compile(r"\{(\d), Arithmetic::(\w+), (\w+), (\d+), (\d+), Tier::k(\w+)\},")
    entries = [found.groups() for found in map(entry.match, lines) if found]
    assert len(entries) > 100
    for gates, arithmetic, backward, B, h, tier in entries:
        dtype, tf32 = KINDS[kinds[arithmetic]]
        cell = CELLS.index(cells[int(gates)])
        numbers = [8, int(B), 1, int(h), int(h), cell, DTYPES.index(dtype), *[0] * 10]
        choice = (ctypes.c_int64 * 8)()
        taken = cuda.library.cuda_choose_from(
            (ctypes.c_int64 * SIZES)(*numbers), (ctypes.c_void_p * len(ADDRESSES))(), tier.lower().encode(),
            backward == "true", 132, 90, ctypes.c_int64(232448), tf32, choice)  # fmt: skip
        assert taken, (gates, arithmetic, backward, B, h, tier)
