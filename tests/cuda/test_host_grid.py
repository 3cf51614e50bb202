"""What the grid tier of the CUDA recurrence has to itself, run by the host build: its exchange, its workspace, its
tiles. What it shares with other tiers is tested in test_host.py.
"""

import ctypes
import shutil
from dataclasses import replace

import pytest
import torch

from fastrnn import ops, reference
from tests.accuracy import assert_as_exact, plain_backward, plain_forward
from tests.hostbuild.build import HERE, OUT, ROOT, build
from tests.hostbuild.host import Emulator
from tests.kernels.test_kernels import BACKWARD_NAMES, FORWARD_NAMES, PER_STEP, Case, backward_arguments, double

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

SOURCES = [
    *(ROOT / f"csrc/cuda/grid_{name}.cu" for name in ("prepare", "forward", "backward")),
    HERE / "grid_launchers.cpp",
]  # fmt: skip
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
INVALID_VALUE, TOO_LARGE = 1, 720

KINDS = {
    "float32": (torch.float32, False), "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False), "float16": (torch.float16, False),
}  # fmt: skip

POINTER, I64 = ctypes.c_void_p, ctypes.c_int64


class Params(ctypes.Structure):
    """BackwardParams of csrc/params.h, which begins with ForwardParams."""

    _fields_ = [
        *[(name, I64) for name in ("steps", "batch", "groups", "hidden", "width")],
        ("cell", ctypes.c_int32), ("dtype", ctypes.c_int32), ("constant_weights", ctypes.c_bool),
        ("gates_ih", POINTER), *[(f"gates_ih_stride_{x}", I64) for x in "tbp"],
        *[(name, POINTER) for name in ("weight_hh", "bias_hh", "weight_hr", "params")],
        ("gaps", 6 * I64),
        *[(name, POINTER) for name in ("h_0", "c_0", "lengths")],
        ("lengths_stride_b", I64), ("lengths_stride_p", I64),
        ("resets", POINTER),
        *[(f"resets_stride_{x}", I64) for x in "tbp"],
        ("reset_h", POINTER), ("reset_c", POINTER), ("mask_h", POINTER),
        ("keep_h", POINTER), ("keep_h_stride_t", I64), ("keep_h_stride_b", I64),
        ("keep_c", POINTER), ("keep_c_stride_t", I64), ("keep_c_stride_b", I64), ("keep_is_bool", ctypes.c_bool),
        *[(name, POINTER) for name in ("reverse", "step_rows", "row_starts", "output", "h_n", "c_n", "saved")],
        ("grad_output", POINTER), ("grad_output_stride_t", I64), ("grad_output_stride_b", I64),
        *[(name, POINTER) for name in ("grad_h_n", "grad_c_n", "grad_cells")],
        ("grad_cells_stride_t", I64), ("grad_cells_stride_b", I64),
        ("grad_gates_ih", POINTER), ("grad_gates_stride", I64),
        *[(name, POINTER) for name in (
            "grad_gates_hh", "grad_projected", "grad_h_0", "grad_c_0", "grad_reset_h", "grad_reset_c", "grad_params",
            "kept_h")],
        ("grad_clip", ctypes.c_double),
    ]  # fmt: skip


class Tile:
    """units of a block, rows of a tile, threads of a block; TF32 or not; results beside flags or words with tags."""

    def __init__(self, units, rows, threads=64, tf32=False, flags=False):
        self.units, self.rows, self.threads, self.tf32, self.flags = units, rows, threads, tf32, flags

    def __repr__(self):
        return f"units {self.units} rows {self.rows} threads {self.threads} tf32 {self.tf32} flags {self.flags}"

    def __iter__(self):
        return iter((self.units, self.rows, self.threads, self.tf32, self.flags))


class Grid(Emulator):
    """Runs both passes; memory is kept until reset()."""

    def __init__(self, path):
        super().__init__(path)
        self.library.grid_test_params_bytes.restype = I64
        assert self.library.grid_test_params_bytes() == ctypes.sizeof(Params), "csrc/params.h has changed"
        tile = [ctypes.c_bool, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_bool, ctypes.c_bool]
        self.library.grid_test_workspace.restype = I64
        self.library.grid_test_workspace.argtypes = [POINTER, *tile]
        self.library.grid_test_run.argtypes = [POINTER, *tile, POINTER]
        self.library.grid_test_choice.argtypes = [POINTER, ctypes.c_bool, ctypes.c_int, ctypes.c_bool, POINTER]
        self.error = 0

    def params(self, arguments, dtype):
        """The inputs both passes share; weight_hh says the sizes."""
        P, Gh, h = arguments["weight_hh"].shape
        info = ops.CELLS[arguments["cell"]]
        p = Params(groups=P, hidden=h, width=h, cell=list(ops.CELLS).index(arguments["cell"]), dtype=DTYPES[dtype])
        assert Gh == info.gates * h
        lengths, resets = arguments["lengths"], arguments["resets"]
        for name in ("weight_hh", "bias_hh", "params", "h_0", "c_0", "lengths", "resets", "reset_h", "reset_c"):
            if arguments.get(name) is not None:
                setattr(p, name, self.upload(arguments[name].contiguous(), name))
        if lengths is not None:
            p.lengths_stride_b, p.lengths_stride_p = (P, 1) if lengths.dim() == 2 else (1, 0)
        if resets is not None:
            B = resets.shape[1]
            strides = (B * P, P, 1) if resets.dim() == 3 else (B, 1, 0)
            p.resets_stride_t, p.resets_stride_b, p.resets_stride_p = strides
        self.reverse = (ctypes.c_uint8 * P)(*arguments["reverse"])
        p.reverse = ctypes.addressof(self.reverse)
        return p, info

    def result(self, p, name, shape, dtype):
        x = torch.empty(shape, dtype=dtype)
        address = self.empty(x.nbytes, name)
        setattr(p, name, address)
        return name, address, x

    def finish(self, p, backward, tile, workspace, results):
        if workspace is None:  # as an earlier call left it: anything
            workspace = self.workspace(p, backward, tile)
        self.error = self.library.grid_test_run(ctypes.byref(p), backward, *tile, workspace)
        if self.error:
            return None
        for name, address, x in results:
            assert self.unwritten(address, x.nbytes) == 0, name
            self.download(address, x)
        return [x for _, _, x in results]

    def workspace(self, p, backward, tile, factor=1):
        nbytes = factor * self.library.grid_test_workspace(ctypes.byref(p), backward, *tile)
        address = self.empty(nbytes, "workspace")
        return address

    def forward(self, arguments, tile, save=True, workspace=None):
        x = arguments["gates_ih"]
        p, info = self.params(arguments, x.dtype)
        T, B, _ = x.shape
        P, h = p.groups, p.hidden
        p.steps, p.batch = T, B
        p.gates_ih, p.gates_ih_stride_t, p.gates_ih_stride_b = self.upload(x, "gates_ih"), x.stride(0), x.stride(1)
        p.gates_ih_stride_p = info.gates * h
        results = [
            self.result(p, "output", (T, B, P * h), x.dtype),
            self.result(p, "h_n", (B, P * h), x.dtype),
            self.result(p, "c_n", (B, P * h) if info.states > 1 else (0,), x.dtype),
            self.result(p, "saved", (T, B, P * info.saved * h) if save else (0,), x.dtype),
        ]
        if not save:
            p.saved = None
        return self.finish(p, False, tile, workspace, results)

    def backward(self, call, tile, workspace=None):
        (cell, grad_output, grad_h_n, grad_c_n, weight_hh, weight_hr, params, h_0, c_0, lengths, resets, reset_h,
         reset_c, mask_h, keep_h, keep_c, reverse, output, saved) = call  # fmt: skip
        assert weight_hr is mask_h is keep_h is keep_c is None
        p, info = self.params(
            {"cell": cell, "weight_hh": weight_hh, "params": params, "h_0": h_0, "c_0": c_0, "lengths": lengths,
             "resets": resets, "reset_h": reset_h, "reset_c": reset_c, "reverse": reverse}, output.dtype)  # fmt: skip
        T, B, _ = output.shape
        P, h, second = p.groups, p.hidden, info.states > 1
        p.steps, p.batch = T, B
        for name, x in (("output", output), ("saved", saved), ("grad_output", grad_output), ("grad_h_n", grad_h_n),
                        ("grad_c_n", grad_c_n)):  # fmt: skip
            if x is not None:
                setattr(p, name, self.upload(x, name))
        if grad_output is not None:
            p.grad_output_stride_t, p.grad_output_stride_b = grad_output.stride()[:2]
        dtype, absent, gates = output.dtype, (0,), (T, B, P * info.gates * h)
        p.grad_gates_stride = info.gates * h
        results = [
            self.result(p, "grad_gates_ih", gates, dtype),
            self.result(p, "grad_gates_hh", gates if cell == "gru" else absent, dtype),
            self.result(p, "grad_projected", absent, dtype),
            self.result(p, "grad_h_0", (B, P * h), dtype),
            self.result(p, "grad_c_0", (B, P * h) if second else absent, dtype),
            self.result(p, "grad_reset_h", (B, P * h) if reset_h is not None else absent, torch.float32),
            self.result(p, "grad_reset_c", (B, P * h) if reset_c is not None else absent, torch.float32),
            self.result(p, "grad_params", (B, P * info.params * h) if params is not None else absent, torch.float32),
        ]
        for name, _, x in results:
            if not x.numel():
                setattr(p, name, None)
        return self.finish(p, True, tile, workspace, results)

    def check(self, case, tile, seed=0):
        """Both passes on fresh inputs; the kernels' findings are the caller's to look at."""
        self.check_forward(case, tile, seed)
        self.check_backward(case, tile, seed)

    def check_forward(self, case, tile, seed=0, workspace=None):
        (arguments, want), _ = problem(case, seed)
        got = self.forward(arguments, tile, workspace=workspace)
        assert got is not None, (case, tile, self.error)
        plain = plain_forward(arguments.values(), tile.tf32)
        assert_as_exact(got, want, plain, case.dtype, FORWARD_NAMES, (case, tile))

    def check_backward(self, case, tile, seed=0, workspace=None):
        _, (call, want) = problem(case, seed)
        got = self.backward(call, tile, workspace=workspace)
        assert got is not None, (case, tile, self.error)
        assert_as_exact(got, want, plain_backward(call, tile.tf32), case.dtype, BACKWARD_NAMES, (case, tile))


PROBLEMS = {}


def problem(case, seed):
    """(arguments, results) of forward and of backward; backward's inputs are forward's exact results, rounded."""
    if (case, seed) not in PROBLEMS:
        arguments = case.arguments(seed)
        want = reference.forward(*map(double, arguments.values()))
        call = backward_arguments(arguments, want[0].to(case.dtype), want[3].to(case.dtype), seed)
        PROBLEMS[case, seed] = (arguments, want), (call, reference.backward(*map(double, call)))
    return PROBLEMS[case, seed]


@pytest.fixture(scope="module")
def grid():
    return Grid(build(SOURCES, OUT / "libgrid.so"))


def tile_for(case, kind, blocks=3, tiles=2, threads=64, flags=False):
    """Units and rows that give about so many blocks and tiles of rows."""
    dtype, tf32 = KINDS[kind]
    gates, even = ops.CELLS[case.cell].gates, 2 if dtype.itemsize == 2 else 1
    most = 16 if tf32 or even == 2 else min(8, 32 // gates)
    units = min(most, -(-case.h // (blocks * even)) * even)
    rows = -(-case.B // tiles)
    while rows * -(-units // even) > threads:
        rows, threads = (rows, threads * 2) if threads < 256 else (rows - 1, threads)
    return Tile(units, rows, threads, tf32, flags)


by_words_and_by_flags = pytest.mark.parametrize("flags", [False, True], ids=["words", "flags"])


@by_words_and_by_flags
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", [cell for cell in ops.CELLS if cell not in PER_STEP])
def test_every_schedule(grid, cell, kind, flags):
    """Three blocks of two warps: whoever starves, the numbers stay, and they stay the same."""
    case = Case(cell, 4, 3, 1, 5, 0, "rows", "state", dtype=KINDS[kind][0])
    tile = tile_for(case, kind, tiles=1, flags=flags)
    results = []

    def run(schedule):
        grid.reset()
        forward, backward = problem(case, 0)
        got = [*grid.forward(forward[0], tile), *grid.backward(backward[0], tile)]
        assert grid.findings() == [], schedule
        results.append(got)

    grid.schedule(0, seed=1)
    grid.reset()
    grid.check(case, tile)
    for i in grid.schedules(seed=2, count=8):
        run(i)
    for i in grid.starve_each(seed=3, blocks=3, warps=6):
        run(i)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@by_words_and_by_flags
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["lstm", "rnn_relu"])
def test_many_k_tiles(grid, cell, kind, flags):
    """One warp a block: weights beyond those in registers, more than one stage, tiles of the full width."""
    h = {"float32": 161, "tf32": 70 if cell == "lstm" else 240, "bfloat16": 129 if cell == "lstm" else 465,
         "float16": 120 if cell == "lstm" else 450}[kind]  # fmt: skip
    case = Case(cell, 2, 3, 1, h, dtype=KINDS[kind][0])
    units = 8 if kind == "float32" else 16
    grid.schedule(5, seed=1, races=False)
    grid.reset()
    grid.check(case, Tile(units, 2 if kind == "tf32" else 3, 32, KINDS[kind][1], flags))
    assert grid.findings() == []


@by_words_and_by_flags
@pytest.mark.parametrize("kind", KINDS)
def test_full_tile(grid, kind, flags):
    """256 threads that each own a word."""
    dtype, tf32 = KINDS[kind]
    for cell, B, h in [("lstm", 32, 33), ("gru", 24, 20)]:
        units = (8 if cell == "lstm" else 10 if kind == "float32" else 8) if tf32 or kind == "float32" else 16
        if kind == "float32" and cell == "gru":  # 10 units forward, 8 backward
            units = 8
        case = Case(cell, 2, B, 1, h, 0, "rows", "zeros", dtype=dtype)
        grid.schedule(2, seed=1, races=False)
        grid.reset()
        grid.check(case, Tile(units, B, 256, tf32, flags))
        assert grid.findings() == []


@by_words_and_by_flags
@pytest.mark.parametrize("kind", KINDS)
def test_uncleared_workspace(grid, kind, flags):
    """Call after call over one workspace, with other inputs, other T and either pass: no old word is taken."""
    base = Case("gru", 3, 3, 2, 5, dtype=KINDS[kind][0])
    tile = tile_for(base, kind, tiles=1, flags=flags)
    for schedule in (2, 3, 7):
        grid.schedule(schedule, seed=schedule)
        grid.reset()
        workspace = None
        for seed, T in enumerate([3, 3, 2, 1, 2, 5, 3]):
            case = replace(base, T=T)
            if workspace is None:
                p, _ = grid.params(problem(case, seed)[0][0], case.dtype)
                p.batch = case.B
                workspace = grid.workspace(p, True, tile)  # backward's is the larger
            grid.check_forward(case, tile, seed, workspace)
            grid.check_backward(case, tile, seed, workspace)
        assert grid.findings() == []


def test_residency(grid):
    """Fewer multiprocessors than blocks: an error, not a deadlock."""
    case = Case("lstm", 3, 3, 2, 5, dtype=torch.float32)
    tile = Tile(2, 2)  # 3 blocks x 2 tiles x 2 groups
    (arguments, _), (call, _) = problem(case, 0)
    grid.schedule(0, seed=1)
    try:
        for blocks, error in [(11, TOO_LARGE), (12, 0)]:
            grid.device(coresident_blocks=blocks)
            grid.reset()
            assert (grid.forward(arguments, tile) is None) == bool(error) and grid.error == error
            assert (grid.backward(call, tile) is None) == bool(error) and grid.error == error
            assert grid.findings() == []
    finally:
        grid.device()


@pytest.mark.parametrize("change", [
    {"units": 0}, {"units": 9}, {"rows": 0}, {"rows": 33}, {"threads": 0}, {"threads": 48},
    {"threads": 288}, {"units": 3, "dtype": torch.bfloat16}, {"units": 18, "dtype": torch.float16},
    {"units": 17, "tf32": True},
])  # fmt: skip
def test_refused_tiles(grid, change):
    dtype = change.pop("dtype", torch.float32)
    arguments = Case("lstm", 2, 40, 1, 20, dtype=dtype).arguments()
    tile = Tile(**dict({"units": 8, "rows": 8, "threads": 64}, **change))
    p, _ = grid.params(arguments, dtype)
    p.steps, p.batch = 2, 40
    for backward in (False, True):
        assert grid.library.grid_test_run(ctypes.byref(p), backward, *tile, None) == INVALID_VALUE
    grid.reset()


# (cell, kind, B, h, P, multiprocessors) -> units, rows, blocks, by flags; forward and backward; None: not for this tier
CHOICES = [
    (("lstm", "bfloat16", 1, 256, 1, 132), (16, 8, 16, 0), (16, 8, 16, 0)),
    (("lstm", "bfloat16", 16, 512, 1, 132), (16, 8, 64, 0), (16, 8, 64, 1)),
    (("lstm", "bfloat16", 64, 512, 1, 132), (16, 16, 128, 1), (16, 16, 128, 1)),
    (("lstm", "bfloat16", 16, 1024, 1, 132), (16, 8, 128, 1), (16, 8, 128, 1)),
    (("lstm", "bfloat16", 16, 2048, 1, 132), (16, 16, 128, 1), (16, 16, 128, 1)),
    (("lstm", "bfloat16", 32, 1536, 1, 132), (16, 32, 96, 1), None),
    (("lstm", "bfloat16", 2, 2048, 1, 132), (16, 8, 128, 0), (16, 8, 128, 1)),
    (("lstm", "bfloat16", 8, 2176, 1, 132), None, None),
    (("gru", "float16", 32, 768, 2, 132), (16, 32, 96, 1), (16, 32, 96, 1)),
    (("lstm", "float32", 16, 1024, 1, 132), (8, 16, 128, 1), (8, 16, 128, 1)),
    (("lstm", "float32", 4, 1056, 1, 132), (8, 4, 132, 1), (8, 4, 132, 1)),
    (("lstm", "float32", 1, 1056, 1, 132), (8, 4, 132, 0), (8, 4, 132, 1)),
    (("lstm", "float32", 4, 1057, 1, 132), None, None),
    (("gru", "float32", 4, 1320, 1, 132), (10, 4, 132, 1), None),
    (("rnn_tanh", "float32", 16, 1024, 1, 132), (32, 4, 128, 1), (8, 16, 128, 1)),
    (("lstm", "tf32", 16, 1024, 1, 132), (16, 8, 128, 1), (16, 8, 128, 1)),
    (("lstm", "bfloat16", 16, 1024, 1, 16), None, None),
]


@pytest.mark.parametrize("call,forward,backward", CHOICES)
def test_choice(grid, call, forward, backward):
    cell, kind, B, h, P, multiprocessors = call
    dtype, tf32 = KINDS[kind]
    index = list(ops.CELLS).index(cell)
    p = Params(steps=8, batch=B, groups=P, hidden=h, width=h, cell=index, dtype=DTYPES[dtype])
    for backward_pass, want in ((False, forward), (True, backward)):
        numbers = (ctypes.c_int64 * 6)()
        taken = grid.library.grid_test_choice(ctypes.byref(p), backward_pass, multiprocessors, tf32, numbers)
        units, rows, threads, blocks, shared, flags = numbers
        assert (taken and (units, rows, blocks, flags)) == (want or 0), (backward_pass, list(numbers))
        assert shared <= 232448 and (not taken or threads == 256)
