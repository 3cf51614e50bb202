"""The host build itself: clean kernels give no finding under any schedule, every kind of fault is found."""

import ctypes
import math
import re
import shutil
import struct
import subprocess

import pytest
import torch

from tests.hostbuild.build import HERE, OUT, ROOT, build
from tests.hostbuild.host import Emulator

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

FAULTS = {name: i for i, name in enumerate(re.findall(r"^  k(\w+),", (HERE / "mutants.h").read_text(), re.MULTILINE))}
SOURCES = [HERE / "mutants.cu", HERE / "mutants_driver.cpp"]


class Mutants(Emulator):
    def run(self, kernel, fault="Clean", T=5, B=3, H=33, U=16, groups=1, extra_blocks=0, launches=1, same_epoch=False):
        """The largest error; above TOLERANCE the numbers are wrong."""
        return self.library.mutants_run(
            kernel[0].encode(), FAULTS[fault], T, B, H, U, groups, extra_blocks, launches, same_epoch
        )


def load(path):
    mutants = Mutants(path)
    mutants.library.mutants_run.restype = ctypes.c_double
    mutants.library.mutants_run.argtypes = [ctypes.c_char] + [ctypes.c_int] * 9
    mutants.library.mutants_from_f16.restype = ctypes.c_float
    mutants.library.mutants_to_f16.argtypes = mutants.library.mutants_to_bf16.argtypes = [ctypes.c_float]
    return mutants


@pytest.fixture(scope="module")
def mutants():
    return load(build(SOURCES, OUT / "libmutants.so", optimise=True))


# of values in (-1, 1), float32 against float64; mma's 16-bit inputs are rounded in both, but an h may round
# the other way
TOLERANCE, BF16_TOLERANCE = 1e-5, 1e-2

CLEAN = [
    ("words", dict()),
    ("words", dict(B=1, H=5, U=2)),
    ("words", dict(B=4, H=48, U=16, launches=3)),
    ("flags", dict()),
    ("flags", dict(B=1, H=5)),
    ("flags", dict(B=9, H=70, launches=3)),
    ("cluster", dict()),
    ("cluster", dict(B=1, H=5, U=2, groups=4)),
    ("cluster", dict(T=4, B=2, groups=3, launches=2)),
    ("operations", dict()),
    ("tile", dict(groups=5)),
    ("spins", dict(groups=5)),
]


def is_wrong(kernel, error):
    return not error <= (BF16_TOLERANCE if kernel == "flags" else TOLERANCE)


@pytest.mark.parametrize("kernel,shape", CLEAN)
def test_clean_kernels_give_no_finding(mutants, kernel, shape):
    for i in mutants.schedules(seed=1, count=24):
        error = mutants.run(kernel, **shape)
        assert mutants.findings() == [], f"schedule {i}"
        assert not is_wrong(kernel, error), f"schedule {i}: {error}"


@pytest.mark.parametrize(
    "kernel,shape", [("words", dict(B=1, H=5, U=2)), ("flags", dict(B=1, H=40)), ("cluster", dict(B=1, H=5, U=2))]
)
def test_clean_kernels_bear_starvation(mutants, kernel, shape):
    for seed in (1, 2):
        for i in mutants.starve_each(seed, blocks=3, warps=6):
            error = mutants.run(kernel, **shape)
            assert mutants.findings() == [] and not is_wrong(kernel, error), f"schedule {i}"


# kernel, fault, shape, in how many of 16 schedules (at least) the emulator speaks and the numbers are wrong,
# and what one of the findings says. Rows with no findings are pure word protocols or wrong arithmetic: no
# access is wrong in itself.
WIDE = dict(groups=2)
TINY = dict(B=1, H=5, U=2)
FAULTY = [
    ("words", "NoBarrierAfterLoad", {}, 16, 12, "uninitialised"),
    ("words", "OneSharedBuffer", {}, 16, 12, "race"),
    ("words", "WrongParity", {}, 16, 12, "deadlock"),
    ("words", "OneExchangeBuffer", {}, 6, 6, "deadlock"),
    ("words", "NoFlagWait", {}, 0, 12, None),
    ("words", "TwoWords", {}, 0, 6, None),
    ("words", "OneTagForPair", {}, 0, 6, None),
    ("words", "MisalignedPair", {}, 16, 0, "misaligned load of two words"),
    ("words", "WritePastEnd", {}, 16, 0, "out of bounds: write"),
    ("words", "NoTailGuard", {}, 16, 0, "out of bounds: read"),
    ("words", "DivergentShuffle", TINY, 16, 12, "deadlock.*warp_sum"),
    ("words", "DivergentBarrier", {}, 16, 12, "race"),
    ("words", "Clean", dict(extra_blocks=1), 3, 0, "deadlock"),
    ("words", "Clean", dict(T=3, launches=2, same_epoch=True), 0, 12, None),
    ("flags", "RelaxedLoad", {}, 16, 0, "race"),
    ("flags", "RelaxedStore", {}, 16, 0, "race"),
    ("flags", "NoBarrierBeforeRelease", {}, 16, 8, "race"),
    ("flags", "NoBarrierAfterAcquire", {}, 16, 12, "race"),
    ("flags", "OnePayloadBuffer", {}, 12, 6, "race"),
    ("flags", "PaddingNotCleared", {}, 16, 0, "uninitialised"),
    ("flags", "HalvesSwapped", {}, 0, 12, None),
    ("flags", "RowsSwapped", {}, 0, 12, None),
    ("flags", "Clean", dict(launches=2, same_epoch=True), 12, 8, "race"),
    ("cluster", "WrongPhase", WIDE, 16, 12, "race"),
    ("cluster", "CountTooLarge", WIDE, 16, 12, "deadlock.*mbarrier_wait"),
    ("cluster", "CountTooSmall", WIDE, 16, 12, "deadlock.*mbarrier_wait"),
    ("cluster", "PushOnLastStep", WIDE, 16, 0, "which has ended|beyond its count"),
    ("cluster", "BlockBarrierAfterInit", WIDE, 16, 4, "before its mbarrier's init|without mbarrier_init_fence"),
    ("cluster", "NoInitFence", WIDE, 16, 0, "without mbarrier_init_fence"),
    ("cluster", "OneClusterBuffer", WIDE, 16, 12, "race"),
    ("cluster", "NoPushWait", WIDE, 16, 12, "race"),
    ("cluster", "NoSyncBeforePush", WIDE, 16, 0, "race"),
    ("cluster", "IdleWarpUnheld", dict(TINY, groups=2), 1, 0, "deadlock"),
    ("cluster", "PushTwice", WIDE, 16, 8, "race"),
    ("operations", "HalvesSwapped", {}, 0, 12, None),
    ("operations", "WrongMask", {}, 16, 0, "outside its mask"),
    ("operations", "SourceOutsideMask", {}, 16, 0, "a shuffle reads a lane outside"),
    ("operations", "EndedLane", {}, 16, 0, "a lane that has ended"),
    ("tile", "NoTileBarrier", WIDE, 16, 0, "race"),
    ("tile", "NoCopyWait", WIDE, 16, 0, "asynchronous copies it has not waited for"),
    ("tile", "CopyBarrierBeforeWait", WIDE, 16, 0, "asynchronous copy still writes|race"),
    ("tile", "MisalignedCopy", WIDE, 16, 0, "misaligned"),
    ("tile", "MisalignedVector", WIDE, 16, 0, "misaligned"),
    ("tile", "StructCopyPastEnd", WIDE, 16, 0, "out of bounds"),
    ("tile", "WriteInput", WIDE, 16, 0, "read-only memory: write"),
    ("tile", "NeighbourBlock", WIDE, 16, 0, "race .write, then write"),
    ("tile", "RegisterOverrun", WIDE, 16, 0, "index outside an array"),
    ("tile", "NullPointer", WIDE, 16, 0, "null pointer"),
    ("tile", "DeepStack", WIDE, 16, 0, "overrun stack"),
    ("tile", "HostPointer", WIDE, 16, 0, "host memory"),
    ("spins", "PlainSpin", dict(groups=4), 16, 0, "race"),
    ("spins", "PlainStore", dict(groups=4), 16, 0, "race"),
    ("spins", "SpinWithoutPause", dict(groups=4), 0, 0, None),
    ("spins", "HiddenWait", dict(groups=4), 4, 0, "deadlock.*not started"),
]


@pytest.mark.parametrize("kernel,fault,shape,found_at_least,wrong_at_least,says", FAULTY)
def test_faults_are_found(mutants, kernel, fault, shape, found_at_least, wrong_at_least, says):
    found = wrong = 0
    texts = []
    for _ in mutants.schedules(seed=1, count=16):
        wrong += is_wrong(kernel, mutants.run(kernel, fault, **shape))
        findings = mutants.findings()
        found += bool(findings)
        texts += findings
    assert found >= found_at_least and wrong >= wrong_at_least, f"found {found}, wrong {wrong} of 16"
    if says:
        assert any(re.search(says, text) for text in texts), texts[:3]
        assert any(re.search(r"mutants\.cu:\d+|ends with|still in flight", text) for text in texts), texts[:3]
    else:
        assert found == 0, texts[:3]


@pytest.mark.parametrize("fault,says", [("EndlessLoop", "loops without end"), ("PlainSpinForever", "over and over")])
def test_endless_loops_end(mutants, fault, says):
    mutants.schedule(0, seed=1)
    mutants.run("spins", fault, groups=2)
    assert any(re.search(says, text) for text in mutants.findings())


@pytest.mark.parametrize(
    "kernel,fault,shape",
    [
        ("words", "Clean", dict(TINY, extra_blocks=1)),
        ("words", "Clean", dict(extra_blocks=1)),
        ("cluster", "IdleWarpUnheld", TINY),
    ],
)
def test_starvation_finds_what_order_decides(mutants, kernel, fault, shape):
    blocks = 3 + shape.get("extra_blocks", 0)
    found = 0
    for _ in mutants.starve_each(1, blocks=blocks, warps=2 * blocks):
        mutants.run(kernel, fault, **shape)
        found += bool(mutants.findings())
    assert found


def test_races_can_be_switched_off(mutants):
    for _ in mutants.schedules(seed=3, count=8, races=False):
        assert not is_wrong("words", mutants.run("words", H=70, U=20)) and not mutants.findings()
        assert not is_wrong("cluster", mutants.run("cluster")) and not mutants.findings()
        mutants.run("flags", "RelaxedLoad")
        assert not mutants.findings()


def test_same_seed_same_run(mutants):
    def run(seed):
        mutants.schedule(4, seed)
        return mutants.run("words", "TwoWords"), mutants.findings(), mutants.stats()

    assert run(5) == run(5)
    assert run(5)[2] != run(6)[2]


def test_coresident_launch_is_refused_where_it_does_not_fit(mutants):
    mutants.schedule(0, 1)
    try:
        mutants.device(coresident_blocks=2)
        assert mutants.run("words") == math.inf and mutants.findings() == []
        mutants.device(coresident_blocks=3)
        assert mutants.run("words") <= TOLERANCE
    finally:
        mutants.device()
    assert mutants.library.emu_error_string(720).decode() == "too many blocks in cooperative launch"


def test_memory_from_python(mutants):
    x = torch.randn(64, 4)
    for _ in mutants.schedules(seed=1, count=8):
        mutants.reset()
        address, y_address = mutants.upload(x, "x"), mutants.empty(2 * 64 * 4, "y")
        assert mutants.unwritten(y_address, 2 * 64 * 4) == 2 * 64 * 4
        assert mutants.library.mutants_tile(address, y_address, 2) == 0
        y = mutants.download(y_address, torch.empty(2, 64))
        assert mutants.findings() == [] and mutants.unwritten(y_address, 2 * 64 * 4) == 0
        torch.testing.assert_close(y, (x.roll(-1, 0).sum(1) + torch.arange(64)).expand(2, 64))


def test_number_formats(mutants):
    library = mutants.library
    edges = [0x7F800000, 0x7F7FFFFF, 0x477FEFFF, 0x477FF000, 0x38800000, 0x387FFFFF, 0x33000000, 0x33000001, 1, 0]
    bits = torch.cat(
        [torch.tensor(edges), torch.randint(0, 0x7F800000, (2000,)), torch.randint(0x32000000, 0x48000000, (4000,))]
    ).to(torch.int32)
    values = bits.view(torch.float32)
    values = torch.cat([values, -values])
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        expected = (values.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF).tolist()
        convert = getattr(library, f"mutants_to_{name}")
        assert [convert(v) for v in values.tolist()] == expected
        nan = (convert(math.nan) << 16 if name == "bf16" else convert(math.nan)).to_bytes(4, "little")
        assert math.isnan(struct.unpack("<f" if name == "bf16" else "<e2x", nan)[0])
    halves = torch.arange(0x10000, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    back = torch.tensor([library.mutants_from_f16(i) for i in range(0x10000)])
    torch.testing.assert_close(back, halves, rtol=0, atol=0, equal_nan=True)


def test_portable_fibers():
    """ucontext instead of the x86-64 switch."""
    mutants = load(build(SOURCES, OUT / "libmutants_ucontext.so", ["FASTRNN_EMU_UCONTEXT"], optimise=True))
    for _ in mutants.schedules(seed=1, count=8):
        assert mutants.run("words") <= TOLERANCE and mutants.findings() == []
        mutants.run("cluster", "NoSyncBeforePush")
        assert any("race" in text for text in mutants.findings())


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_same_source_compiles_for_cuda(arch, tmp_path):
    command = [
        "nvcc",
        "-std=c++20",
        "-O3",
        f"-arch={arch}",
        "-c",
        f"-I{ROOT / 'csrc'}",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
        str(HERE / "mutants.cu"),
        "-o",
        str(tmp_path / "mutants.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert frames and set(frames) == {("0", "0")}, done.stderr
