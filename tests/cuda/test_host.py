"""The CUDA kernels, run by the host build (tests/hostbuild) against reference.py in float64.

Every tier is one entry of TIERS: it says which cases it takes and with which tiles, and runs one forward or
backward call on an emulator's memory. The tests below know no tier.
"""

import ctypes
import shutil
import struct
from functools import cache
from itertools import product
from random import Random
from typing import NamedTuple

import pytest
import torch

from fastrnn import composed, ops, reference
from tests.accuracy import assert_as_exact, magnified, plain_backward, plain_forward
from tests.hostbuild.build import HERE, OUT, ROOT, build
from tests.hostbuild.host import Emulator
from tests.kernels.test_kernels import (
    BACKWARD_NAMES,
    FORWARD_NAMES,
    NOISES,
    PER_STEP,
    Case,
    backward_arguments,
    double,
)

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of params.h
HALF = (torch.bfloat16, torch.float16)
CELLS = list(ops.CELLS)
ADDRESSES = (
    "gates_ih", "weight_hh", "bias_hh", "weight_hr", "params", "h_0", "c_0", "lengths", "resets", "reset_h", "reset_c",
    "reverse", "mask_h", "keep_h", "keep_c", "output", "h_n", "c_n", "saved", "grad_output", "grad_h_n", "grad_c_n",
    "grad_gates_ih", "grad_gates_hh", "grad_projected", "grad_h_0", "grad_c_0", "grad_reset_h", "grad_reset_c",
    "grad_params", "kept_h", "grad_cells",
)  # fmt: skip
SIZES = 25  # numbers of a call: launchers.h


class CellInfo(NamedTuple):  # csrc/cells/registry.h
    gates: int
    states: int
    params: int
    saved: int
    separate_gates_hh: bool
    late_gates: int
    whole_rows: bool
    forward_work: int
    backward_work: int
    keeps_made: int

    @property
    def zoneout(self):
        return self.states <= 2

    @property
    def in_c(self):
        return self.states - 1

    def saved_values(self, keep_h, keep_c):
        return self.saved + (self.keeps_made and (keep_c if self.states > 1 else keep_h) is not None)


class Cuda(Emulator):
    """The launchers of csrc/cuda on the emulator's memory; launchers.cpp has the order of sizes and addresses."""

    cells: dict[str, CellInfo]  # of this library, in the order of their numbers

    def __init__(self, path):
        super().__init__(path)
        self.library.cuda_choose.restype = ctypes.c_char_p
        self.library.cuda_choose.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
            ctypes.c_int, ctypes.c_void_p]  # fmt: skip
        self.library.cuda_workspace.restype = ctypes.c_int64
        self.library.cuda_cell.restype = ctypes.c_char_p
        numbers, self.cells = (ctypes.c_int * 10)(), {}
        while name := self.library.cuda_cell(len(self.cells), numbers):
            self.cells[name.decode()] = CellInfo(*numbers)

    def choose(self, call, backward, multiprocessors=132, capability=80, shared=232448, tf32=False):
        """On a device whose tiers were not measured."""
        choice = (ctypes.c_int64 * 8)()
        text = self.library.cuda_choose(
            call.sizes, call.addresses, backward, multiprocessors, capability, shared, tf32, choice
        )
        return text.decode(), list(choice)


@pytest.fixture(scope="module")
def cuda():
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "launchers.cpp"]
    return Cuda(build(sources, OUT / "libcuda_kernels.so"))


class Call:
    """One call of a recurrence: its sizes, its arguments in the emulator's memory, its results."""

    def __init__(self, cuda, cell, weight_hh, weight_hr, params, h_0, c_0, lengths, resets, reset_h, reset_c, mask_h,
                 keep_h, keep_c, reverse, B, T):  # fmt: skip
        self.cuda, self.cell, self.info = cuda, cell, cuda.cells[cell]
        self.T, self.B, self.P, self.R = T, B, weight_hh.shape[0], weight_hh.shape[2]
        self.h = weight_hh.shape[1] // self.info.gates
        self.dtype = weight_hh.dtype
        self.weight_hh, self.weight_hr = weight_hh, weight_hr
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.results, self.written = {}, []
        self.reverse = (ctypes.c_uint8 * self.P)(*reverse)
        self.numbers = [T, B, self.P, self.h, self.R, list(cuda.cells).index(cell), DTYPES.index(self.dtype)]
        self.numbers += [0] * (SIZES - 9) + [self.info.gates * self.h] * 2  # strides and grad_clip
        self.places = dict.fromkeys(ADDRESSES)
        self.places["reverse"] = ctypes.addressof(self.reverse)
        for name, x in (("weight_hh", weight_hh), ("weight_hr", weight_hr), ("params", params), ("h_0", h_0),
                        ("c_0", c_0), ("reset_h", reset_h), ("reset_c", reset_c), ("mask_h", mask_h)):  # fmt: skip
            self.read(name, x)
        self.read("keep_h", keep_h, 17)
        self.read("keep_c", keep_c, 19)
        self.saved_values = self.info.saved_values(keep_h, keep_c)
        self.read("lengths", lengths, 9)  # [B] or [B, P]
        self.read("resets", resets, 11)  # [T, B] or [T, B, P]

    @property
    def sizes(self):
        return (ctypes.c_int64 * SIZES)(*self.numbers)

    @property
    def addresses(self):
        return (ctypes.c_void_p * len(ADDRESSES))(*self.places.values())

    def read(self, name, x, strides_at=None):
        """An argument. With strides_at it keeps its layout, and its strides go to that place of the sizes."""
        if x is None:
            return
        if strides_at is None or x.numel() == 0:
            x = x.contiguous()
        else:
            extent = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
            strides = x.stride() if name in ("lengths", "resets") else x.stride()[:2]
            self.numbers[strides_at : strides_at + len(strides)] = strides
            x = x.as_strided((extent,), (1,))
        self.places[name] = self.cuda.upload(x, name).value

    def in_place(self, backward, saved):
        """`saved` [T, B, P*S*h], of which each group's first values are its gates or, in backward, will be their
        gradients. Forward finds nothing else there, and backward may not write to what stands behind them."""
        address = self.cuda.empty(saved.nbytes, "saved").value
        self.places["saved"] = self.places["grad_gates_ih" if backward else "gates_ih"] = address
        self.numbers[23] = self.numbers[24] = self.saved_values * self.h
        self.numbers[7:9] = saved.stride()[:2]
        ctypes.memmove(address, saved.data_ptr(), saved.nbytes)
        group, gates = (n * self.h * saved.itemsize for n in (self.saved_values, self.info.gates))
        for at in range(address, address + saved.nbytes, group):
            self.cuda.library.emu_define(at, gates)
            if backward:
                self.cuda.library.emu_seal(at + gates, group - gates)
        self.results["grad_gates_ih" if backward else "saved"] = torch.empty_like(saved)
        if not backward:
            self.written.append("saved")

    def gates_in(self, saved):
        """[T, B, P, G, h]: where in_place() has them."""
        return saved.view(self.T, self.B, self.P, self.saved_values, self.h)[:, :, :, : self.info.gates]

    def result(self, name, shape, there=True, zero=False, dtype=None):
        """A result: memory that nobody has written, its bytes those of NaN, or zeros where the caller clears it."""
        x = torch.empty(shape if there else 0, dtype=dtype or self.dtype)
        self.results[name] = x
        if x.numel():
            address = (self.cuda.zeros if zero else self.cuda.empty)(x.nbytes, name)
            self.places[name] = address.value
            if not zero:
                self.written.append(name)

    def finish(self):
        assert self.cuda.findings() == []
        for name in self.written:
            assert self.cuda.unwritten(self.places[name], self.results[name].nbytes) == 0, name
        for name, x in self.results.items():
            if x.numel():
                self.cuda.download(self.places[name], x)
        if self.places["saved"] and self.places["grad_gates_ih"] == self.places["saved"]:
            self.results["grad_gates_ih"] = self.gates_in(self.results["grad_gates_ih"]).flatten(2)
        return tuple(self.results.values())

    def buffer(self, *shape, dtype=None):
        """Scratch of the per-step tier: (a tensor of the host, its address)."""
        x = torch.empty(shape, dtype=dtype or self.dtype)
        return x, self.cuda.empty(x.nbytes, "buffer")


def forward_call(cuda, arguments, save=True, in_place=False):
    a = dict(arguments)
    gates_ih, bias_hh = a.pop("gates_ih"), a.pop("bias_hh")
    T, B = gates_ih.shape[:2]
    call = Call(cuda, **a, T=T, B=B)
    call.read("bias_hh", bias_hh)
    P, h, R, second = call.P, call.h, call.R, call.info.states > 1
    call.result("output", (T, B, P * R))
    call.result("h_n", (B, P * R))
    call.result("c_n", (B, P * call.info.in_c * h), second)
    of_saved = (T, B, P * call.saved_values * h)
    if in_place:
        saved = torch.full(of_saved, torch.nan, dtype=call.dtype)
        call.gates_in(saved).copy_(gates_ih.view(T, B, P, -1, h))
        call.in_place(False, saved)
    else:
        call.read("gates_ih", gates_ih, 7)
        call.result("saved", of_saved, save)
    return call


def backward_call(cuda, cell, grad_output, grad_h_n, grad_c_n, weight_hh, weight_hr, params, h_0, c_0, lengths, resets,
                  reset_h, reset_c, mask_h, keep_h, keep_c, reverse, output, saved, initial=True,
                  grad_clip=0.0, grad_cells=None, in_place=False):  # fmt: skip
    T, B = output.shape[:2]
    call = Call(cuda, cell, weight_hh, weight_hr, params, h_0, c_0, lengths, resets, reset_h, reset_c, mask_h, keep_h,
                keep_c, reverse, B, T)  # fmt: skip
    call.read("grad_output", grad_output, 14)
    call.read("grad_cells", grad_cells, 21)
    call.numbers[16] = struct.unpack("q", struct.pack("d", grad_clip))[0]
    for name, x in (("grad_h_n", grad_h_n), ("grad_c_n", grad_c_n), ("output", output)):
        call.read(name, x)
    P, h, R, second = call.P, call.h, call.R, call.info.states > 1
    if keep_h is not None:
        call.places["kept_h"] = call.buffer(B, P * R, dtype=call.wide)[1].value
    gates = (T, B, P * call.info.gates * h)
    if in_place:
        call.in_place(True, saved)
    else:
        call.read("saved", saved)
        call.result("grad_gates_ih", gates)
    call.result("grad_gates_hh", gates, call.info.separate_gates_hh)
    call.result("grad_projected", (T, B, P * R), weight_hr is not None)
    call.result("grad_h_0", (B, P * R), initial)
    of_c = (B, P * call.info.in_c * h)
    call.result("grad_c_0", of_c, initial and second)
    call.result("grad_reset_h", (B, P * R), reset_h is not None, T == 0, call.wide)
    call.result("grad_reset_c", of_c, reset_c is not None, T == 0, call.wide)
    call.result("grad_params", (B, P * call.info.params * h), params is not None, T == 0, call.wide)
    return call


class Step:
    """Per-step tier: the products between the launches are torch's. It leaves out what ops_cuda.cpp leaves out."""

    START, FORWARD, PROJECT, FORWARD_LATE, BACK_PROJECT, BACKWARD, BACKWARD_LATE, FINISH = range(8)

    def tiles(self, case, backward):
        return [None]

    def full_sizes(self, dtype):
        return (257,)

    def run(self, call, backward, tile):
        P, B, h, R, K = call.P, call.B, call.h, call.R, call.info.late_gates
        G = call.info.gates - K  # of the product with h
        early, late = call.weight_hh.split([G * h, K * h], 1)
        wide, projected = call.wide, call.weight_hr is not None
        carried = max(1, call.info.in_c)
        work = call.info.states + call.info.backward_work if backward else call.info.forward_work
        b = {
            "h": call.buffer(P, B, R), "gates_hh": call.buffer(P, B, G * h, dtype=wide),
            "hidden": call.buffer(P, B, h), "projected": call.buffer(P, B, R, dtype=wide),
            "carried": call.buffer(P, B, carried * h, dtype=wide), "grad_gates": call.buffer(P, B, G * h),
            "recurrent": call.buffer(P, B, R, dtype=wide), "grad_h": call.buffer(P, B, R),
            "grad_hidden": call.buffer(P, B, h, dtype=wide), "work": call.buffer(P, B, work * h, dtype=wide),
            "late": call.buffer(P, B, K * h if backward else h),
            "late_product": call.buffer(P, B, h if backward else K * h, dtype=wide),
        }  # fmt: skip
        addresses = (ctypes.c_void_p * len(b))(*(address.value for _, address in b.values()))

        def launch(which, k=0):
            error = call.cuda.library.cuda_step(call.sizes, call.addresses, addresses, which, ctypes.c_int64(k))
            assert error == 0, error

        def product(to, source, weight):
            x, address = b[source]
            call.cuda.download(address, x)
            y, address = b[to]
            torch.bmm(x.to(wide), weight.to(wide), out=y)
            ctypes.memmove(address, y.data_ptr(), y.nbytes)
            call.cuda.library.emu_define(address, y.nbytes)

        finish = backward and (call.places["grad_h_0"] or call.places["resets"])
        if not backward:
            launch(self.START)
        for k in range(call.T):
            if not backward:
                product("gates_hh", "h", early.transpose(1, 2))
                if K:
                    launch(self.FORWARD_LATE, k)
                    product("late_product", "late", late.transpose(1, 2))
                launch(self.FORWARD, k)
                if projected:
                    product("projected", "hidden", call.weight_hr.transpose(1, 2))
                    launch(self.PROJECT, k)
            else:
                if projected:
                    launch(self.BACK_PROJECT, call.T - 1 - k)
                    product("grad_hidden", "grad_h", call.weight_hr)
                if K:
                    launch(self.BACKWARD_LATE, call.T - 1 - k)
                    product("late_product", "late", late)
                launch(self.BACKWARD, call.T - 1 - k)
                if finish or k < call.T - 1:
                    product("recurrent", "grad_gates", early)
        if finish:
            launch(self.FINISH)


class Whole:
    """A tier that runs all steps in one launch.

    tiles(case, backward) lists the choices, as launchers.cpp has them, to run a case with, none where it does not
    take the case; full_sizes(dtype) the hidden sizes that fill its tiles.
    """

    def run(self, call, backward, tile, workspace=None):
        library, choice = call.cuda.library, (ctypes.c_int64 * 8)(*tile)
        if workspace is None:  # as whoever had the memory left it
            workspace = self.workspace(call, backward, tile)
        launch = library.cuda_backward if backward else library.cuda_forward
        error = launch(call.sizes, call.addresses, choice, workspace)
        assert error == 0, error

    def workspace(self, call, backward, tile):
        choice = (ctypes.c_int64 * 8)(*tile)
        size = call.cuda.library.cuda_workspace(call.sizes, call.addresses, backward, choice)
        return call.cuda.empty(size, "workspace") if size else ctypes.c_void_p()


def per_step_alone(case):
    """Is it a call of the per-step tier's alone?"""
    return bool(case.projected or case.noise or case.cell in ("norm", *PER_STEP))


class Resident(Whole):
    def full_sizes(self, dtype):
        return (129, 176, 192) if dtype in HALF else (97, 128)

    def tiles(self, case, backward):
        most = {torch.float32: 128, torch.float64: 0}.get(case.dtype, 192)
        if backward and most == 192:  # shared memory holds no more, beside the gradients of 4 gates
            most = {"lstm": 176, "lstm_peephole": 160}.get(case.cell, most)
        if per_step_alone(case) or case.h > most:
            return []
        return [(1, rows, *[0] * 6) for rows in ((8,) if case.dtype in HALF else (1, 4))]


class Grid(Whole):
    """Some three blocks for a group's units and two tiles of rows; float32 exact and as TF32. What else is its own
    stands in test_host_grid.py."""

    def full_sizes(self, dtype):
        return (129,)

    def tiles(self, case, backward):
        if per_step_alone(case) or case.dtype == torch.float64 or not case.B:
            return []
        half, gates, tiles = case.dtype in HALF, case.info.gates, []
        for tf32 in (False,) if half else (False, True):
            values, most = 2 if half else 1, 16 if half or tf32 else 8 if backward else 32 // gates
            units = min(most, -(-case.h // (3 * values)) * values)
            words = -(-units // values)
            rows = min(-(-case.B // 2), 256 // words)
            threads = max(64, -(-rows * words // 32) * 32)
            if -(-case.h // units) * -(-case.B // rows) * case.P <= 60:  # what the emulator holds at once
                tiles.append((2, rows, units, 0, tf32, 0, threads, 0))
        return tiles


class Cluster(Whole):
    """Clusters of some three blocks, and two tiles of rows. What else is its own stands in test_host_cluster.py."""

    def full_sizes(self, dtype):
        return (129,)

    def tiles(self, case, backward):
        if per_step_alone(case) or case.dtype == torch.float64 or not case.B:
            return []
        if case.P > 100:  # the launch that packs so many groups' weights is too large for the emulator
            return []
        half, tiles = case.dtype in HALF, []
        for tf32 in (False,) if half else (False, True):
            step = 16 if half or tf32 else 4
            units = -(-case.h // (3 * step)) * step
            tiles.append(cluster_tile(case, backward, units, -(-case.B // 2), tf32))
        return tiles


def cluster_tile(case, backward, units, rows, tf32=False, most=256):
    """The choice of that many units a block and, if so many threads can have them, rows a tile."""
    mma = tf32 or case.dtype in HALF
    width = 16 if mma else 8 if backward else 32 // case.info.gates // 4 * 4
    unit_tiles, words = -(-units // width), units // (2 if case.dtype in HALF else 1)
    warps = max(most // 32 // unit_tiles, 1) * unit_tiles
    rows = max(1, min(rows, 32, warps * 32 // words))
    warps = max(warps, -(-rows * words // 32 // unit_tiles) * unit_tiles)
    while warps > unit_tiles and (warps - unit_tiles) * 32 >= max(64, rows * words):
        warps -= unit_tiles
    return (3, rows, units, 0, tf32, 0, warps * 32, 0)


TIERS = {"step": Step(), "resident": Resident(), "grid": Grid(), "cluster": Cluster()}


def run_forward(cuda, tier, tile, arguments, save=True, in_place=False):
    cuda.reset()
    call = forward_call(cuda, arguments, save, in_place)
    tier.run(call, False, tile)
    return call.finish()


def run_backward(cuda, tier, tile, arguments, **options):
    cuda.reset()
    call = backward_call(cuda, *arguments, **options)
    tier.run(call, True, tile)
    return call.finish()


class Problem:
    """A case's arguments for both passes, and what the reference makes of them."""

    def __init__(self, case, seed=0, edit=None):
        self.case, self.arguments = case, case.arguments(seed)
        if edit:
            edit(self.arguments)
        self.want = reference.forward(*map(double, self.arguments.values()))
        output, saved = (self.want[i].to(case.dtype) for i in (0, 3))
        self.back = backward_arguments(self.arguments, output, saved, seed)
        self.plain = cache(lambda tf32: plain_forward(self.arguments.values(), tf32))
        self.want_back = cache(lambda: reference.backward(*map(double, self.back)))
        self.plain_back = cache(lambda tf32: plain_backward(self.back, tf32))

    def run(self, cuda, tier, tile, backward, in_place=False):
        if backward:
            return run_backward(cuda, tier, tile, self.back, in_place=in_place)
        return run_forward(cuda, tier, tile, self.arguments, in_place=in_place)

    def check(self, cuda, tier):
        """Both passes with every tile that the tier has for the case; how many runs that were."""
        forward, backward = tier.tiles(self.case, False), tier.tiles(self.case, True)
        more = magnified(self.case.cell)
        for tile in forward:
            got = self.run(cuda, tier, tile, False)
            plain = self.plain(is_tf32(tile))
            assert_as_exact(got, self.want, plain, self.case.dtype, FORWARD_NAMES, (self.case, tile), more)
        for tile in backward:
            got = self.run(cuda, tier, tile, True)
            plain = self.plain_back(is_tf32(tile))
            assert_as_exact(got, self.want_back(), plain, self.case.dtype, BACKWARD_NAMES, (self.case, tile), more)
        return len(forward) + len(backward)


same_problem = cache(Problem)  # for all tiers


def is_tf32(tile):
    return bool(tile and tile[4])


def check_backward(got, back, tile, case):
    want = reference.backward(*map(double, back))
    plain, more = plain_backward(back, is_tf32(tile)), magnified(case.cell)
    assert_as_exact(got, want, plain, case.dtype, BACKWARD_NAMES, (case, tile), more)


each_tier = pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
each_cell = pytest.mark.parametrize(
    ("cell", "projected"), [(c, 0) for c in CELLS] + [("lstm", 5), ("lstm_peephole", 5), ("lstm_norm", 5)]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BACKWARD_STATES = {"h_0": 7, "c_0": 8}  # places in recurrent_backward's arguments
NOISES = ("", *NOISES)
LENGTHS, RESETS, REVERSE = ("", "rows", "groups"), ("", "zeros", "state", "groups"), ("none", "all", "alternate")


def half_of(sizes, cell, dtype):
    """Half of the sizes, with their numbers: one half for two of a cell's dtypes, the other for its other two, and for
    the next cell the other way around. So every tier has every cell with every dtype, and every size with each of both;
    every combination of three would take twice as long.
    """
    other = CELLS.index(cell) + DTYPES.index(dtype)
    return [(i, size) for i, size in enumerate(sizes) if (i + i // 4 + other) % 2 == 0]


@each_tier
@each_dtype
@each_cell
def test_odd_sizes(cuda, tier, cell, projected, dtype):
    for i, (B, h) in half_of([*product((1, 3, 17), (1, 3, 17, 33)), (129, 3), (1, 129)], cell, dtype):
        masks = LENGTHS[i % 3], RESETS[i % 4], REVERSE[i // 3 % 3]
        noise = NOISES[i % 5] if tier is TIERS["step"] else ""
        case = Case(cell, 3, B, 1 + i % 3, h, projected, *masks, dtype, noise)
        cuda.schedule(i % 8, seed=i, races=h < 33)
        same_problem(case, i).check(cuda, tier)


@pytest.mark.parametrize("seed", range(50))
def test_random_calls(cuda, seed):
    """Any sizes, masks and schedule; for the grid and cluster tiers any tile, also ones that no table holds."""
    random = Random(seed)
    tier = random.choice(list(TIERS))
    cell, dtype = random.choice(CELLS), random.choice(DTYPES)
    projected = 5 if tier == "step" and cell == "lstm" and random.random() < 0.5 else 0
    T, B, P = random.choice((0, 1, 2, 3, 5, 7)), random.choice((1, 2, 5, 8, 9, 16, 31)), random.choice((1, 2, 3))
    h = random.choice((1, 2, 5, 8, 9, 15, 16, 31, 32, 47))
    masks = random.choice(LENGTHS), random.choice(RESETS), random.choice(REVERSE)
    noise = random.choice(NOISES) if tier == "step" else ""
    case = Case(cell, T, B, P, h, projected, *masks, dtype, noise)
    cuda.schedule(random.randrange(8), seed, races=B * h < 300)
    any_tile = {"grid": AnyTile, "cluster": AnyClusterTile}.get(tier)
    Problem(case, seed).check(cuda, any_tile(random) if any_tile else TIERS[tier])


class AnyTile(Grid):
    def __init__(self, random):
        self.random = random

    def tiles(self, case, backward):
        random, tiles = self.random, []
        for _, _, _, _, tf32, *_ in super().tiles(case, backward):
            values, most = 2 if case.dtype in HALF else 1, 16 if tf32 or case.dtype in HALF else 8
            threads, rows = random.choice((32, 64, 96, 160, 256)), random.randint(1, 32)
            units = random.randrange(values, most + 1, values)
            rows = min(rows, threads // -(-units // values))
            blocks = -(-case.h // units) * -(-case.B // rows) * case.P
            if blocks <= 60 and blocks * threads <= 40 * 64:  # as above
                tiles.append((2, rows, units, 0, tf32, 0, threads, 0))
        return tiles


class AnyClusterTile(Whole):
    def __init__(self, random):
        self.random = random

    def tiles(self, case, backward):
        random, tiles = self.random, []
        for _, _, _, _, tf32, *_ in Cluster().tiles(case, backward):
            units = random.choice((16, 32, 48) if tf32 or case.dtype in HALF else (4, 8, 12, 20, 36))
            tile = cluster_tile(case, backward, units, random.randint(1, 32), tf32, random.choice((32, 64, 192, 256)))
            blocks = -(-case.h // units)
            if blocks <= 16 and blocks * -(-case.B // tile[1]) * case.P <= 60:
                tiles.append(tile)
        return tiles


@each_tier
@each_dtype
@each_cell
def test_gates_in_the_memory_of_saved(cuda, tier, cell, projected, dtype):
    """Forward finds the gates where it is going to save, and backward leaves their gradients where that was: with the
    bits that memory of their own gives, whoever runs first, and nobody reads what another thread writes."""
    info = cuda.cells[cell]
    if info.gates > info.saved - info.in_c:
        pytest.skip("no room for gates")
    for i, (B, h) in half_of([(1, 1), (3, 3), (1, 17), (17, 1), (3, 17), (17, 3), (3, 129), (33, 3)], cell, dtype):
        masks = LENGTHS[i % 3], RESETS[i % 4], REVERSE[i // 3 % 3]
        noise = NOISES[i % 5] if tier is TIERS["step"] else ""
        problem = Problem(Case(cell, 4, B, 1 + i % 3, h, projected, *masks, dtype, noise), i)
        cuda.schedule(i % 8, seed=i, races=h < 100)
        for backward in (False, True):
            for tile in tier.tiles(problem.case, backward):
                want = problem.run(cuda, tier, tile, backward)
                got = problem.run(cuda, tier, tile, backward, in_place=True)
                for name, a, b in zip(BACKWARD_NAMES if backward else FORWARD_NAMES, got, want, strict=True):
                    assert torch.equal(a, b), (problem.case, tile, name)


@each_tier
@each_dtype
@pytest.mark.parametrize("cell", CELLS)
def test_full_tiles(cuda, tier, cell, dtype):
    """Sizes at which weights are in registers and in shared memory, up to the tier's limit."""
    cuda.schedule(3, seed=5, races=False)
    for h in tier.full_sizes(dtype):
        same_problem(Case(cell, 3, 2, 1, h, 0, "", "state", "none", dtype), h).check(cuda, tier)


@each_tier
@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("lengths", LENGTHS)
@each_cell
def test_lengths_and_resets(cuda, tier, cell, projected, lengths, resets):
    reverse = REVERSE[(CELLS.index(cell) + LENGTHS.index(lengths) + RESETS.index(resets)) % 3]
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        cuda.schedule(seed + 2, seed=9)
        same_problem(Case(cell, 4, 5, 2, 7, projected, lengths, resets, reverse, dtype), seed).check(cuda, tier)


@each_tier
@each_dtype
@pytest.mark.parametrize("cell", CELLS)
def test_every_schedule_gives_the_same_bits(cuda, tier, cell, dtype):
    case = Case(cell, 3, 5, 2, 9, 0, "groups", "groups", "alternate", dtype)
    problem = Problem(case, seed=3)
    for backward in (False, True):
        for tile in tier.tiles(case, backward):
            cuda.schedule(0, 1)
            first = problem.run(cuda, tier, tile, backward)
            for _ in cuda.schedules(seed=1, count=8):
                again = problem.run(cuda, tier, tile, backward)
                assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@each_tier
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_starvation(cuda, tier, cell, dtype):
    problem = Problem(Case(cell, 3, 2, 2, 17, 0, "rows", "state", dtype=dtype))
    for _ in cuda.starve_each(1, blocks=2, warps=6):
        problem.check(cuda, tier)


@each_tier
@pytest.mark.parametrize("cell", CELLS)
def test_no_steps_and_no_rows(cuda, tier, cell):
    cuda.schedule(0, 1)
    for T, B in [(0, 3), (4, 0), (0, 0)]:
        Problem(Case(cell, T, B, 2, 5, 0, "rows", "state", dtype=torch.float32)).check(cuda, tier)
        Problem(Case(cell, T, B, 2, 5, dtype=torch.float32)).check(cuda, tier)


@each_tier
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_cell
def test_absent_arguments(cuda, tier, cell, projected, dtype):
    """No bias, nothing saved, each incoming gradient missing, the initial state's gradient not wanted."""
    cuda.schedule(5, 1)
    for resets in ("", "state"):
        case = Case(cell, 4, 3, 2, 9, projected, "rows", resets, dtype=dtype)
        problem = Problem(case, edit=lambda a: a.update(bias_hh=None))
        runs = problem.check(cuda, tier)
        for tile in tier.tiles(case, False):
            saving, unsaved = (run_forward(cuda, tier, tile, problem.arguments, save) for save in (True, False))
            assert unsaved[3].numel() == 0
            assert all(torch.equal(a, b) for a, b in zip(saving[:3], unsaved[:3], strict=True))
        for i, tile in product(range(5), tier.tiles(case, True)):
            back = [*problem.back, i != 4]
            if i < 4:  # 0: none is missing
                back[1:4] = [None if i == k else x for k, x in enumerate(back[1:4], start=1)]
            check_backward(run_backward(cuda, tier, tile, back), back, tile, case)
        assert runs or not tier.tiles(case, False)


@each_tier
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_cell
def test_no_initial_state(cuda, tier, cell, projected, dtype):
    """Null h_0 and c_0, together or one alone, are zeros bit by bit: forward, backward and in rows without steps."""
    cuda.schedule(3, 1)
    lengths = torch.tensor([[4, 0], [1, 4], [0, 2], [3, 3], [4, 1]])
    for resets in ("", "state"):
        case = Case(cell, 4, 5, 2, 9, projected, "groups", resets, "alternate", dtype)

        def edit(a):
            a.update({"lengths": lengths, "h_0": torch.zeros_like(a["h_0"])})
            if a["c_0"] is not None:
                a["c_0"] = torch.zeros_like(a["c_0"])

        problem = Problem(case, edit=edit)
        problem.check(cuda, tier)
        names = [name for name in ("h_0", "c_0") if problem.arguments[name] is not None]
        for absent in [names, *([n] for n in names if len(names) > 1)]:
            there = problem.arguments | dict.fromkeys(absent)
            back = list(problem.back)
            for name in absent:
                back[BACKWARD_STATES[name]] = None
            for tile in tier.tiles(case, False):
                got, want = run_forward(cuda, tier, tile, there), problem.run(cuda, tier, tile, False)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), absent
            for tile in tier.tiles(case, True):
                got, want = run_backward(cuda, tier, tile, back), problem.run(cuda, tier, tile, True)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), absent


@each_tier
@each_cell
def test_grad_clip(cuda, tier, cell, projected):
    case = Case(cell, 4, 5, 2, 7, projected, "rows", "state", "alternate", torch.float32)
    problem = Problem(case)
    for tile in tier.tiles(case, True):
        back = [*problem.back, True, 0.02]
        got = run_backward(cuda, tier, tile, back)
        check_backward(got, back, tile, case)
        assert not torch.allclose(got[3], run_backward(cuda, tier, tile, problem.back)[3])


@each_tier
@pytest.mark.parametrize("cell", [cell for cell in CELLS if ops.CELLS[cell].states > 1])
def test_gradient_of_every_c(cuda, tier, cell):
    """What a loss that looks at c after every step asks of backward, as torch differentiates the reference."""
    C = ops.CELLS[cell].in_c
    for dtype, noise in ((torch.float32, ""), (torch.bfloat16, ""), (torch.float32, "zoneout")):
        case = Case(cell, 4, 5, 2, 7, 0, "rows", "state", "alternate", dtype, noise if ops.CELLS[cell].zoneout else "")
        tiles = tier.tiles(case, True)
        if not tiles:
            continue
        problem = Problem(case)
        arguments = {name: double(x) for name, x in problem.arguments.items()}
        wanted = [arguments[name].requires_grad_() for name in ("gates_ih", "h_0", "c_0")]
        output, h_n, c_n, saved = reference.forward(*arguments.values())
        every = composed.every_c(cell, saved, 2, arguments["keep_c"])
        of_c = torch.randn(5, 4, 2 * C * 7).transpose(0, 1).to(dtype)  # strides of its own
        of_c[torch.arange(4)[:, None] >= arguments["lengths"]] = 0
        grads = [*map(double, problem.back[1:4]), double(of_c)]
        want = torch.autograd.grad([output, h_n, c_n, every], wanted, grads)
        for tile in tiles:
            cuda.reset()
            got = run_backward(cuda, tier, tile, [*problem.back, True, 0.0, of_c])
            allowed = 1e-5 if dtype == torch.float32 and not is_tf32(tile) else 0.05
            for x, y in zip((got[0], got[3], got[4]), want, strict=True):
                assert (x.double() - y).abs().max() <= allowed * (1 + y.abs().max()), (case, tile)


@pytest.mark.parametrize("tier", ["resident", "grid", "cluster"])
def test_the_last_product_is_saved(cuda, tier):
    """Where nobody wants the initial state's gradient, backward ends with step 0 (params.h)."""
    case, tier = Case("lstm", 2, 3, 1, 33, dtype=torch.float32), TIERS[tier]
    problem, (tile, *_) = Problem(case), tier.tiles(case, True)
    cuda.schedule(0, 1)
    accesses = []
    for initial in (True, False):
        run_backward(cuda, tier, tile, [*problem.back, initial])
        accesses.append(sum(cuda.stats()[1:]))
    assert accesses[1] < 0.95 * accesses[0], accesses  # most of them are not the product's


@each_tier
def test_strided_arguments(cuda, tier):
    """gates_ih and grad_output keep their strides of time and batch; masks keep all of theirs."""
    cuda.schedule(2, 1)
    for cell, dtype in product(("lstm", "gru"), (torch.float32, torch.float16)):
        case = Case(cell, 4, 3, 2, 9, 0, "groups", "groups", dtype=dtype)

        def edit(a):
            a["gates_ih"] = a["gates_ih"].transpose(0, 1).contiguous().transpose(0, 1)
            a["resets"] = a["resets"].permute(2, 1, 0).contiguous().permute(2, 1, 0)

        problem = Problem(case, edit=edit)
        assert not problem.arguments["gates_ih"].is_contiguous()
        problem.back[1] = torch.ones(1, 1, problem.back[1].shape[2], dtype=dtype).expand_as(problem.back[1])
        problem.check(cuda, tier)


@each_tier
def test_more_groups_than_a_launch_takes(cuda, tier):
    cuda.schedule(1, 1, races=False)
    Problem(Case("lstm", 2, 1, 1027, 1, 0, "groups", "groups", dtype=torch.float32)).check(cuda, tier)


@each_tier
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_lengths_outside_the_sequence_are_clamped(cuda, tier, cell):
    cuda.schedule(4, 1)
    case = Case(cell, 4, 5, 2, 9, 0, "groups", "state", dtype=torch.float32)
    wild = torch.tensor([[-3, 9], [4, -1], [2**40, 3], [0, -(2**40)], [5, 1]])
    for tile in tier.tiles(case, False):
        runs = []
        for lengths in (wild, wild.clamp(0, 4)):
            problem = Problem(case, edit=lambda a, lengths=lengths: a.update(lengths=lengths.clamp(0, 4)))
            problem.arguments["lengths"] = lengths
            problem.back[9] = lengths
            runs.append([*problem.run(cuda, tier, tile, False), *problem.run(cuda, tier, tile, True)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_tier
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_and_other_rows_do_not_leak(cuda, tier, dtype):
    """NaN behind a row's end reaches nothing, NaN in one row reaches no other."""
    cuda.schedule(6, 1)
    case = Case("lstm", 5, 6, 1, 17, 0, "rows", "state", dtype=dtype)
    lengths = torch.tensor([5, 0, 3, 1, 4, 5])
    clean = Problem(case, edit=lambda a: a.update(lengths=lengths))
    past = torch.arange(5)[:, None] >= lengths
    for tile in tier.tiles(case, False):
        want = clean.run(cuda, tier, tile, False)
        dirty = dict(clean.arguments)
        dirty["gates_ih"] = torch.where(past[..., None], torch.nan, dirty["gates_ih"].float()).to(dtype)
        got = run_forward(cuda, tier, tile, dirty)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        dirty["gates_ih"][2, 4, 3] = torch.nan
        got = run_forward(cuda, tier, tile, dirty)
        assert got[0][2:4, 4].isnan().any()
        others = [0, 1, 2, 3, 5]
        assert all(torch.equal(a[..., others, :], b[..., others, :]) for a, b in zip(got, want, strict=True))
    for tile in tier.tiles(case, True):
        want = clean.run(cuda, tier, tile, True)
        back = list(clean.back)
        back[1] = torch.where(past[..., None], torch.nan, back[1].float()).to(dtype)
        got = run_backward(cuda, tier, tile, back)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- the choice ----

STEP, RESIDENT, GRID = range(3)


def choose(cuda, case, backward=False, **device):
    cuda.reset()
    return cuda.choose(forward_call(cuda, case.arguments()), backward, **device)


@pytest.mark.parametrize("backward", [False, True])
def test_choice(cuda, backward):
    def chosen(case, **device):
        return choose(cuda, case, backward, **device)[1][:2]

    for cell in CELLS:
        if per_step_alone(Case(cell, 2, 3, 1, 64)):
            continue
        assert chosen(Case(cell, 2, 3, 1, 64, dtype=torch.float32)) == [RESIDENT, 1]
        assert chosen(Case(cell, 2, 67, 2, 64, dtype=torch.float32)) == [RESIDENT, 4]
        assert chosen(Case(cell, 2, 9, 1, 128, dtype=torch.float32), multiprocessors=4) == [RESIDENT, 4]
        for dtype in HALF:
            assert chosen(Case(cell, 2, 3, 1, 128, dtype=dtype)) == [RESIDENT, 8]
        assert chosen(Case(cell, 2, 3, 1, 64, dtype=torch.float64))[0] == STEP
        assert chosen(Case(cell, 2, 3, 1, 40), capability=75)[0] == STEP
        assert chosen(Case(cell, 0, 3, 1, 40, dtype=torch.float32))[0] == STEP
    assert chosen(Case("lstm", 2, 3, 1, 64, 5, dtype=torch.float32))[0] == STEP
    for noise in ("dropout", "zoneout"):
        for h in (64, 512):
            assert chosen(Case("lstm", 2, 3, 1, h, dtype=torch.float32, noise=noise))[0] == STEP
    # 163 KB of an A100 do not hold 4 rows beside LSTM's weights, 99 KB of an Ada hold none of them
    big = Case("lstm", 2, 500, 1, 128, dtype=torch.float32)
    assert chosen(big) == [RESIDENT, 4]
    assert chosen(big, capability=80, shared=166912) == [RESIDENT, 1]
    assert chosen(big, capability=89, shared=101376)[0] != RESIDENT


F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize(("tier", "forward", "backward", "case"), [
    ("step", True, True, Case("lstm", 2, 3, 1, 8, 5, dtype=F64)),
    ("step", True, True, Case("gru", 0, 3, 2, 300, dtype=BF16)),
    ("step", False, False, Case("gru", 2, 0, 1, 8, dtype=F32)),
    ("resident", True, True, Case("lstm", 0, 500, 2, 128, dtype=F32)),
    ("resident", False, False, Case("lstm", 2, 3, 1, 129, dtype=F32)),
    ("resident", True, False, Case("lstm", 2, 3, 1, 192, dtype=BF16)),
    ("resident", True, True, Case("gru", 2, 3, 1, 192, dtype=BF16)),
    ("resident", False, False, Case("gru", 2, 3, 1, 193, dtype=BF16)),
    ("resident", False, False, Case("gru", 2, 3, 1, 8, dtype=F64)),
    ("resident", False, False, Case("lstm", 2, 3, 1, 8, 5, dtype=F32)),
    ("resident", False, False, Case("lstm", 2, 3, 1, 8, dtype=F32, noise="dropout")),
    ("grid", True, True, Case("lstm", 1, 3, 2, 1, dtype=F32)),
    ("grid", True, True, Case("rnn_relu", 0, 129, 1, 17, dtype=BF16)),
    ("grid", True, True, Case("gru", 8, 32, 1, 1056, dtype=BF16)),  # the table says: too much to exchange
    ("grid", False, False, Case("gru", 2, 3, 1, 2200, dtype=BF16)),
    ("grid", False, False, Case("lstm", 2, 3, 1, 8, dtype=F64)),
    ("grid", False, False, Case("lstm", 2, 3, 1, 8, 5, dtype=F32)),
    ("grid", False, False, Case("lstm", 2, 3, 1, 8, dtype=F32, noise="zoneout")),
    ("cluster", True, True, Case("lstm", 1, 3, 2, 1, dtype=F32)),
    ("cluster", True, True, Case("gru", 0, 600, 3, 768, dtype=BF16)),
    ("cluster", True, False, Case("lstm", 2, 3, 1, 640, dtype=BF16)),  # gate gradients of all units are 4 times h
    ("cluster", False, False, Case("lstm", 2, 3, 1, 1024, dtype=BF16)),
    ("cluster", False, False, Case("gru", 2, 3, 1, 2048, dtype=BF16)),
    ("cluster", False, False, Case("lstm", 2, 3, 1, 8, dtype=F64)),
    ("cluster", False, False, Case("lstm", 2, 3, 1, 8, 5, dtype=F32)),
    ("cluster", False, False, Case("lstm", 2, 3, 1, 8, dtype=F32, noise="zoneout")),
    ("no such tier", False, False, Case("lstm", 2, 3, 1, 8, dtype=F32)),
], ids=str)  # fmt: skip
def test_a_tier_by_name(cuda, tier, forward, backward, case):
    """What FASTRNN_CUDA_TIER asks: what it can run it runs, worth it or not; what it cannot is refused."""
    cuda.reset()
    T, B, P, h, R = case.T, case.B, case.P, case.h, case.projected or case.h
    numbers = [T, B, P, h, R, CELLS.index(case.cell), DTYPES.index(case.dtype), *[0] * 10]
    places = dict.fromkeys(ADDRESSES) | {"weight_hr": 1 if case.projected else None}  # looked at, never behind
    places |= {"mask_h": 1 if case.noise == "dropout" else None, "keep_h": 1 if case.noise == "zoneout" else None}
    for back, want in ((False, forward), (True, backward)):
        choice = (ctypes.c_int64 * 8)()
        taken = cuda.library.cuda_choose_from(
            (ctypes.c_int64 * SIZES)(*numbers), (ctypes.c_void_p * len(ADDRESSES))(*places.values()), tier.encode(),
            back, 132, 90, ctypes.c_int64(232448), 0, choice)  # fmt: skip
        assert bool(taken) == want, back
        assert not taken or (choice[0] == list(TIERS).index(tier) and choice[7] <= 232448)


def test_choice_says_what_it_is(cuda):
    text, (tier, rows, units, variant, tf32, blocks, threads, shared) = choose(
        cuda, Case("lstm", 2, 20, 2, 100, dtype=torch.bfloat16)
    )
    assert text.startswith("resident, mma") and (tier, rows, blocks, threads) == (RESIDENT, 8, 6, 224)
    assert (units, variant, tf32) == (0, 0, 0) and 0 < shared < 232448


@pytest.mark.parametrize(("case", "tile"), [
    (Case("lstm", 2, 3, 1, 129, dtype=torch.float32), (RESIDENT, 4, 0, 0, 0)),
    (Case("lstm", 2, 3, 1, 16, dtype=torch.float32), (RESIDENT, 8, 0, 0, 0)),
    (Case("lstm", 2, 3, 1, 193, dtype=torch.bfloat16), (RESIDENT, 8, 0, 0, 0)),
    (Case("lstm", 2, 3, 1, 16, dtype=torch.float64), (RESIDENT, 4, 0, 0, 0)),
    (Case("lstm", 2, 3, 1, 16, 5, dtype=torch.float32), (RESIDENT, 4, 0, 0, 0)),
    (Case("lstm", 2, 3, 1, 16, dtype=torch.float32, noise="zoneout"), (RESIDENT, 4, 0, 0, 0)),
    (Case("lstm", 2, 3, 1, 16, dtype=torch.bfloat16, noise="dropout"), (RESIDENT, 8, 0, 0, 0)),
    (Case("lstm", 2, 3, 1, 16, dtype=torch.float32, noise="dropout"), (GRID, 4, 4, 0, 0, 0, 64)),
    (Case("lstm", 2, 3, 1, 16, dtype=torch.float32), (STEP, 0, 0, 0, 0)),
])  # fmt: skip
def test_a_choice_that_cannot_run_is_refused(cuda, case, tile):
    """An error and nothing written, never another kernel than the one chosen."""
    cuda.reset()
    call = forward_call(cuda, case.arguments())
    choice = (ctypes.c_int64 * 8)(*tile)
    assert cuda.library.cuda_forward(call.sizes, call.addresses, choice, None) == 1
    assert cuda.library.cuda_backward(call.sizes, call.addresses, choice, None) == 1
    assert cuda.unwritten(call.places["output"], call.results["output"].nbytes) == call.results["output"].nbytes
