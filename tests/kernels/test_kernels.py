"""The ops' kernels against reference.py in float64: every result and every gradient, on fresh random inputs."""

import ctypes
import mmap
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import ops, reference
from tests.helpers import ISAS, as_c

ROOT = Path(__file__).resolve().parents[2]
SIZES = (1, 3, 17, 129)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
FORWARD_NAMES = ("output", "h_n", "c_n", "saved")
BACKWARD_NAMES = (
    "grad_gates_ih", "grad_gates_hh", "grad_projected", "grad_h_0", "grad_c_0", "grad_reset_h", "grad_reset_c",
    "grad_params",
)  # fmt: skip


CONSTANTS = ("mask_h", "keep_h", "keep_c")  # arguments that have no gradient


@dataclass(frozen=True)
class Case:
    cell: str
    T: int
    B: int
    P: int
    h: int
    projected: int = 0
    lengths: str = ""  # "", "rows" for [B], "groups" for [B, P]
    resets: str = ""  # "", "zeros", "state", "groups" ([T, B, P], with a state)
    reverse: str = "alternate"  # "none", "all", "alternate"
    dtype: torch.dtype = torch.float64
    noise: str = (
        ""  # "", "dropout" (mask_h), "zoneout" (keep_h, keep_c of 0 and 1), "all", "expected" (any keep, all steps')
    )

    @property
    def info(self) -> ops.CellInfo:
        return ops.CELLS[self.cell]

    def arguments(self, seed: int = 0) -> dict:
        """The forward op's arguments but ``save``, in its order."""
        generator = torch.Generator().manual_seed(seed)
        info = self.info
        noise = self.noise
        T, B, P, h, width = self.T, self.B, self.P, self.h, self.projected or self.h

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(0.5).to(self.dtype)

        def c() -> torch.Tensor:
            return as_c(self.cell, random(B, P * info.in_c * h), P)

        def weight(*shape: int) -> torch.Tensor:
            return random(*shape) * (2 / shape[-1] ** 0.5)

        second = info.states > 1
        stateful = self.resets in ("state", "groups")
        per_group = {"rows": (B,), "groups": (B, P)}
        masks = {"zeros": (T, B), "state": (T, B), "groups": (T, B, P)}

        def keep(n: int) -> torch.Tensor | None:
            if noise in ("", "dropout") or not info.zoneout:
                return None
            if noise == "expected":
                return torch.rand(P * n, generator=generator, dtype=torch.float64).to(self.dtype).expand(T, B, -1)
            return (torch.rand(T, B, P * n, generator=generator) < 0.4).to(self.dtype)

        given = {
            "cell": self.cell,
            "gates_ih": random(T, B, P * info.gates * h),
            "weight_hh": weight(P, info.gates * h, width),
            "bias_hh": random(P, info.gates * h),
            "weight_hr": weight(P, width, h) if self.projected else None,
            "params": random(P, info.params, h) if info.params else None,
            "h_0": random(B, P * width),
            "c_0": c() if second else None,
            "lengths": torch.randint(0, T + 1, per_group[self.lengths], generator=generator) if self.lengths else None,
            "resets": torch.rand(masks[self.resets], generator=generator) < 0.3 if self.resets else None,
            "reset_h": random(B, P * width) if stateful else None,
            "reset_c": c() if stateful and second else None,
        }
        dropped = torch.rand(B, P * width, generator=generator) < 0.4 if noise in ("dropout", "all") else None
        return given | {
            "mask_h": None if dropped is None else torch.where(dropped, 0, 1 / 0.6).to(self.dtype),
            "keep_h": keep(width),
            "keep_c": keep(h) if second else None,
            "reverse": [{"none": False, "all": True, "alternate": p % 2 == 1}[self.reverse] for p in range(P)],
        }


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_near(got, want, tolerance, names, case):
    for name, a, b in zip(names, got, want, strict=True):
        assert a.shape == b.shape, (case, name, a.shape, b.shape)
        if a.numel():
            error = ((a.double() - b).abs().max() / (1 + b.abs().max())).item()
            assert error <= tolerance, (case, name, error)


def backward_arguments(arguments, output, saved, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def like(x):
        noise = None if x is None else torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return None if noise is None else noise.to(x.dtype)

    rest = {k: v for k, v in arguments.items() if k not in ("cell", "gates_ih", "bias_hh")}
    return [
        arguments["cell"],
        like(output),
        like(arguments["h_0"]),
        like(arguments["c_0"]),
        *rest.values(),
        output,
        saved,
    ]


def check(case: Case, seed: int = 0) -> None:
    arguments = case.arguments(seed)
    got = ops.recurrent_forward(*arguments.values(), True)
    want = reference.forward(*map(double, arguments.values()))
    tolerance = TOLERANCE[case.dtype]
    assert_near(got, want, tolerance, FORWARD_NAMES, case)
    unsaved = ops.recurrent_forward(*arguments.values(), False)
    assert unsaved[3].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(got[:3], unsaved[:3], strict=True))
    pulled = backward_arguments(arguments, got[0], got[3], seed)
    wanted = backward_arguments({k: double(v) for k, v in arguments.items()}, want[0], want[3], seed)
    for i in (1, 2, 3):  # the gradients that came in must be the same numbers
        wanted[i] = double(pulled[i])
    if case.dtype.itemsize == 2:  # a value rounded over the kink of relu has another gradient: that of what was saved
        wanted = [double(x) for x in pulled]
    assert_near(ops.recurrent_backward(*pulled), reference.backward(*wanted), 10 * tolerance, BACKWARD_NAMES, case)


# On CUDA the per-step tier's alone: cells that look at whole rows, have two products in a step or more states than two.
PER_STEP = ("lstm_norm", "gru_norm", "gru_reset_before", "mgu", "slstm")


def cells_with_projection():
    return [(cell, 0) for cell in ops.CELLS] + [("lstm", 1), ("lstm", 5), ("lstm_peephole", 5), ("lstm_norm", 5)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_odd_sizes(cell, projected, dtype):
    for T, B, h in product((1, 5), SIZES, SIZES):
        if projected >= h:
            continue
        check(Case(cell, T, B, 1 + (B + h) % 3, h, projected, dtype=dtype), seed=T * B + h)


def test_projection_wider_than_the_hidden_units():
    """torch.nn's modules refuse it, the ops and functional.lstm do not."""
    for B, (h, width) in product((1, 3, 40), [(1, 1), (1, 70), (3, 129), (17, 200)]):
        for dtype in (torch.float64, torch.bfloat16):
            check(Case("lstm", 4, B, 2, h, width, "rows", "state", dtype=dtype), seed=B)


@pytest.mark.parametrize("reverse", ["none", "all", "alternate"])
@pytest.mark.parametrize("resets", ["", "zeros", "state", "groups"])
@pytest.mark.parametrize("lengths", ["", "rows", "groups"])
@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_lengths_and_resets(cell, projected, lengths, resets, reverse):
    for (T, B, P, h), dtype in product([(6, 3, 2, 17), (4, 17, 3, 7)], (torch.float64, torch.float32)):
        check(Case(cell, T, B, P, h, projected, lengths, resets, reverse, dtype), seed=T + B)


NOISES = ("dropout", "zoneout", "all", "expected")


def cells_with_noise():
    """(cell, projected, noise)"""
    known = product(cells_with_projection(), NOISES)
    return [(*cell, noise) for cell, noise in known if ops.CELLS[cell[0]].zoneout or noise == "dropout"]


@pytest.mark.parametrize(("cell", "projected", "noise"), cells_with_noise())
def test_recurrent_dropout_and_zoneout(cell, projected, noise):
    masks = [("", ""), ("rows", "state"), ("groups", "groups")]
    for i, (T, B, P, h, dtype) in enumerate(
        [*((5, 3, 2, 17, dtype) for dtype in TOLERANCE), (4, 17, 3, 7, torch.float64), (1, 1, 1, 9, torch.float32)]
    ):
        for lengths, resets in masks:
            check(Case(cell, T, B, P, h, projected, lengths, resets, dtype=dtype, noise=noise), seed=i)


@pytest.mark.parametrize("cell", [cell for cell, info in ops.CELLS.items() if info.zoneout])
def test_a_kept_state_is_kept_in_every_bit(cell):
    case = Case(cell, 4, 5, 2, 19, dtype=torch.float32, noise="zoneout")
    arguments = case.arguments()
    output = ops.recurrent_forward(*arguments.values(), False)[0]
    for p, backwards in enumerate(arguments["reverse"]):
        of_group = slice(p * 19, (p + 1) * 19)
        after, keep = (
            x[..., of_group].flip(0) if backwards else x[..., of_group] for x in (output, arguments["keep_h"])
        )
        before = torch.cat([arguments["h_0"][None, :, of_group], after[:-1]])
        assert torch.equal(after[keep == 1], before[keep == 1])
        assert not torch.equal(after[keep == 0], before[keep == 0])


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_threads(cell, projected, threads):
    torch.set_num_threads(threads)
    splits = set()
    # few rows and many units (units are split), many rows and few units (rows are), more and fewer groups
    for B, P, h in [(3, 1, 200), (96, 1, 48), (2, 4, 100), (40, 2, 65), (7, 3, 100)]:
        lengths = "rows" if B % 2 == 0 else ""
        check(Case(cell, 13, B, P, h, projected, lengths, "state"), seed=B)
        check(Case(cell, 13, B, P, h, projected, lengths, "state", noise="all"), seed=B)
        number = list(ops.CELLS).index(cell)
        plan = ops._C.cpu_plan(number, "float64", 13, B, P, h, projected or h, bool(projected), 0, threads, False)
        splits.add((plan["split"], plan["threads"] > 1))
    if threads == 2 and not projected:
        assert {("units", True), ("rows", True), ("none", True)} <= splits, "every way to split must have been taken"


@pytest.mark.parametrize("cell", ops.CELLS)
def test_bitwise_repeatable(cell):
    case = Case(cell, 9, 33, 2, 65, 0, "rows", "state", dtype=torch.float32)
    arguments = case.arguments()
    runs = []
    for _ in range(3):
        out = ops.recurrent_forward(*arguments.values(), True)
        runs.append((*out, *ops.recurrent_backward(*backward_arguments(arguments, out[0], out[3]))))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("cell", ops.CELLS)
def test_no_steps_and_no_rows(cell):
    for T, B in [(0, 3), (4, 0), (0, 0)]:
        check(Case(cell, T, B, 2, 5, 0, "rows", "state"))
        check(Case(cell, T, B, 2, 5))


@pytest.mark.parametrize("cell", ops.CELLS)
def test_absent_gradients_and_bias(cell):
    """Each incoming gradient may be missing, and so may the bias."""
    case = Case(cell, 4, 3, 2, 9)
    arguments = case.arguments() | {"bias_hh": None}
    out = ops.recurrent_forward(*arguments.values(), True)
    assert_near(out, reference.forward(*arguments.values()), 1e-12, FORWARD_NAMES, case)
    full = backward_arguments(arguments, out[0], out[3])
    for missing in product((False, True), repeat=3):
        some = list(full)
        for i, gone in enumerate(missing, start=1):
            some[i] = None if gone else some[i]
        assert_near(ops.recurrent_backward(*some), reference.backward(*some), 1e-11, BACKWARD_NAMES, (case, missing))


@pytest.mark.parametrize("cell", ops.CELLS)
def test_strided_arguments(cell):
    """Any layout gives the result of the contiguous one."""
    case = Case(cell, 4, 3, 2, 9, 0, "groups", "groups", noise="all")
    arguments = case.arguments()
    want = ops.recurrent_forward(*arguments.values(), True)

    def restrided(x):
        if not isinstance(x, torch.Tensor):
            return x
        wide = x.new_zeros(*[2 * n for n in x.shape])
        view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
        view.copy_(x)
        return view.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 and x.shape[0] > 3 else view

    moved = {k: restrided(v) for k, v in arguments.items()}
    got = ops.recurrent_forward(*moved.values(), True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    full = backward_arguments(arguments, want[0], want[3])
    want_back = ops.recurrent_backward(*full)
    got_back = ops.recurrent_backward(*map(restrided, full))
    assert all(torch.equal(a, b) for a, b in zip(got_back, want_back, strict=True))
    expanded = [full[0], torch.ones(1, 1, 1, dtype=torch.float64).expand_as(want[0]), *full[2:]]
    plain = [full[0], torch.ones_like(want[0]), *full[2:]]
    assert all(
        torch.equal(a, b)
        for a, b in zip(ops.recurrent_backward(*expanded), ops.recurrent_backward(*plain), strict=True)
    )


def test_arguments_are_not_written_to():
    case = Case("lstm", 4, 3, 2, 9, 5, "rows", "state", noise="all")
    arguments = case.arguments()
    out = ops.recurrent_forward(*arguments.values(), True)
    full = backward_arguments(arguments, out[0], out[3])
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in full]
    ops.recurrent_backward(*full)
    for a, b in zip(full, copies, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


def test_special_values_travel():
    """NaN and inf in one row stay in it; saturated gates give finite gradients."""
    case = Case("lstm", 5, 4, 1, 17, dtype=torch.float32)
    arguments = case.arguments()
    clean = ops.recurrent_forward(*arguments.values(), True)
    arguments["gates_ih"][2, 1, 3] = float("nan")
    got = ops.recurrent_forward(*arguments.values(), True)
    assert got[0][2, 1, 3].isnan() and not got[0][:2].isnan().any()
    others = [0, 2, 3]
    assert torch.equal(got[0][:, others], clean[0][:, others])
    arguments["gates_ih"][2, 1, 3] = float("inf")
    arguments["gates_ih"][3] = 1e30
    arguments["gates_ih"][4] = -1e30
    out = ops.recurrent_forward(*arguments.values(), True)
    assert out[0].isfinite().all()
    grads = ops.recurrent_backward(*backward_arguments(arguments, out[0], out[3]))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_against_numeric_gradients(cell):
    case = Case(cell, 3, 2, 2, 2, 0, "rows", "state", noise="all")
    arguments = case.arguments()
    names = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    names = [k for k in names if k not in CONSTANTS]

    def run(*values):
        return ops.recurrent_forward(*(arguments | dict(zip(names, values, strict=True))).values(), False)[
            : ops.CELLS[cell].states + 1
        ]

    torch.autograd.gradcheck(run, [arguments[k].requires_grad_() for k in names])


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    """A part of this file again, in a process that is held to one instruction set."""
    chosen = ISAS.index(ops._C.instruction_set())
    if ISAS.index(isa) < chosen:
        pytest.skip(f"this CPU has no {isa}")
    script = (
        "from tests.kernels.test_kernels import *\n"
        "from tests.kernels.test_layer import check_gradients\n"
        f"assert ops._C.instruction_set() == {isa!r}\n"
        "cases = product(cells_with_projection(), TOLERANCE, (1, 19), (7, 129))\n"
        "for (cell, projected), dtype, B, h in cases:\n"
        "    if projected < h:\n"
        "        check(Case(cell, 3, B, 2, h, projected, 'rows', 'state', dtype=dtype), seed=B + h)\n"
        "        check(Case(cell, 3, B, 2, h, projected, 'rows', 'state', dtype=dtype, noise='all'), seed=B + h)\n"
        "    if projected < h and dtype in (torch.float32, torch.float64):\n"
        "        check(Case(cell, 1, B, 2, h, projected, dtype=dtype), seed=B + h)\n"
        "    if projected < h and dtype == torch.float64:\n"
        "        check_gradients(Case(cell, 3, B, 2, h, projected, 'rows', 'state'), 5)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=os.environ | {"FASTRNN_ISA": isa})


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_of_rows_that_are_not_packed(isa):
    """Rows that meet stored weights as they lie: of no inputs there is nothing to pack, and streaming packs none."""
    if ISAS.index(isa) < ISAS.index(ops._C.instruction_set()):
        pytest.skip(f"this CPU has no {isa}")
    script = (
        "from itertools import product\n"
        "import fastrnn, torch\n"
        "from torch import nn\n"
        "from torch.testing import assert_close\n"
        "torch.manual_seed(0)\n"
        "torch.set_grad_enabled(False)\n"
        "for dtype, B in product((torch.float32, torch.float64), (9, 12, 16, 17, 33)):\n"
        "    for kind, I in product(('LSTMCell', 'GRUCell', 'RNNCell'), (0, 3)):\n"
        "        cell = getattr(nn, kind)(I, 7, dtype=dtype)\n"
        "        x = torch.randn(B, I, dtype=dtype)\n"
        "        assert_close(fastrnn.convert(cell)(x), cell(x))\n"
        "    for kind, T in product(('LSTM', 'GRU', 'RNN'), (1, 2)):\n"
        "        layer = getattr(nn, kind)(3, 7, dtype=dtype)\n"
        "        x = torch.randn(T, B, 3, dtype=dtype)\n"
        "        with fastrnn.streaming():\n"
        "            assert_close(fastrnn.convert(layer)(x), layer(x))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=os.environ | {"FASTRNN_ISA": isa})


MATRIX = pytest.mark.skipif(ops._C.instruction_set() != "amx", reason="this CPU has no matrix unit")


@MATRIX
def test_the_matrix_unit_is_used():
    """Its sums begin at the bias, and those of pairs end with it: a large one takes more from the first."""
    script = (
        "import torch, fastrnn\n"
        "torch.manual_seed(0)\n"
        "m, x = fastrnn.LSTM(64, 64, dtype=torch.bfloat16), torch.randn(9, 33, 64, dtype=torch.bfloat16)\n"
        "m.bias_ih_l0.data.fill_(2.0**17), m.bias_hh_l0.data.fill_(-(2.0**17))\n"
        "print(m(x)[0].float().abs().sum().item())\n"
    )
    amx, pairs = (
        subprocess.check_output(
            [sys.executable, "-c", script], text=True, cwd=ROOT, env=os.environ | {"FASTRNN_ISA": isa}
        )
        for isa in ("amx", "avx512bf16")
    )
    assert float(amx) == pytest.approx(float(pairs), rel=0.1) and amx != pairs


@MATRIX
@pytest.mark.parametrize("threads", [1, 2])
def test_the_matrix_unit_is_left(threads):
    """After a call the system has none of its registers to save for the caller's thread."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("b901000000 0f01d0 c3"))  # mov ecx, 1; xgetbv: what is in use; ret
    in_use = ctypes.CFUNCTYPE(ctypes.c_uint32)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    torch.set_num_threads(threads)
    module = fastrnn.LSTM(64, 96, num_layers=2, dtype=torch.bfloat16)
    x = torch.randn(5, 33, 64, dtype=torch.bfloat16, requires_grad=True)
    output = module(x)[0]
    assert in_use() >> 17 & 3 == 0
    output.float().sum().backward()
    assert in_use() >> 17 & 3 == 0
    with torch.no_grad():
        module(x[:1])
    assert in_use() >> 17 & 3 == 0


def test_fewer_threads_than_asked_for():
    """OpenMP may grant fewer threads than torch asks for; nobody may wait for the ones that never came."""
    script = (
        "from tests.kernels.test_kernels import *\n"
        "torch.set_num_threads(3)\n"
        "check(Case('lstm', 40, 3, 1, 129))\n"
        "check(Case('gru', 90, 3, 2, 65))\n"
    )
    for limit in ({"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "2"}):
        done = subprocess.run([sys.executable, "-c", script], env=os.environ | limit, timeout=120, cwd=ROOT)
        assert done.returncode == 0


def test_unknown_instruction_set_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import fastrnn; fastrnn.instruction_set()"],
        env=os.environ | {"FASTRNN_ISA": "mmx"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "FASTRNN_ISA: expected amx, avx512bf16, avx512, avx2 or baseline" in done.stderr


def test_long_sequence_offsets():
    """Offsets beyond 2^31 elements: the last steps of a long call equal those of a call on the tail alone."""
    case = Case("rnn_tanh", 3, 1, 1, 8, dtype=torch.float32)
    arguments = case.arguments()
    step = 1 << 15  # elements from row to row: 2^31 are passed, yet only one page a row is ever touched
    T = (1 << 31) // step + 5
    gates = torch.empty((T - 1) * step + 8).as_strided((T, 1, 8), (step, 8, 1)).zero_()
    gates[-3:] = arguments["gates_ih"]
    out = ops.recurrent_forward(*(arguments | {"gates_ih": gates}).values(), False)
    tail = ops.recurrent_forward(
        *(arguments | {"gates_ih": gates[-3:].contiguous(), "h_0": out[0][-4]}).values(), False
    )
    torch.testing.assert_close(out[0][-3:], tail[0], rtol=0, atol=1e-6)  # a short call sums in another order


def test_case_is_what_it_says():
    """The generator itself: a case with everything has every argument."""
    case = Case("lstm_peephole", 4, 3, 2, 9, 5, "groups", "groups", noise="all")
    assert all(v is not None for v in case.arguments().values())
    assert replace(case, projected=0).arguments()["weight_hr"] is None
