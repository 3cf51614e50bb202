"""A cell that the package does not have (tests/more_cells.h), for it looks at whole rows, in the CPU's kernels, against
its equations in tests/more_cells.py, run by reference.py in float64: every result and every gradient. And the
equations of cells with parameters against autograd.
"""

import ctypes
import itertools
import subprocess
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import reference
from fastrnn.ops import CellInfo
from tests.kernels.test_kernels import (
    BACKWARD_NAMES,
    CONSTANTS,
    FORWARD_NAMES,
    SIZES,
    TOLERANCE,
    Case,
    assert_near,
    double,
)
from tests.more_cells import AROUND_KERNELS, MORE_CELLS, QUICKLY, WITH_MORE_CELLS, only

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of params.h


@pytest.fixture(autouse=True)
def more_equations(monkeypatch):
    for name, cell in MORE_CELLS.items():
        monkeypatch.setitem(reference.CELLS, name, cell)


class Library:
    """The CPU's kernels compiled with the cells of more_cells.h alone."""

    def __init__(self, path: Path, isa: str) -> None:
        isas = ["avx512bf16", "avx512"] if isa in ("amx", "avx512bf16") else [isa]
        names = [*AROUND_KERNELS, *(f"isa_{name}" for name in isas)]
        sources = [ROOT / "csrc/cpu" / f"{name}.cpp" for name in names] + [ROOT / "tests/cpp/cpu_api.cpp"]
        command = ["g++", "-std=c++20", *QUICKLY, "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
        command += ["-Werror", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
        command += [WITH_MORE_CELLS, only(), *(f"-DTEST_{name}" for name in isas)]
        objects = [path / f"{source.stem}.o" for source in sources]
        running = [
            subprocess.Popen([*command, "-c", str(s), "-o", str(o)]) for s, o in zip(sources, objects, strict=True)
        ]
        assert not any(p.wait() for p in running)
        # OpenMP is the one that torch has loaded, as in the extension.
        subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(path / "kernels.so")], check=True)
        self.lib = lib = ctypes.CDLL(str(path / "kernels.so"))
        lib.cell_info.restype = lib.instruction_set.restype = ctypes.c_char_p
        lib.call_new.restype = ctypes.c_void_p
        lib.call_delete.argtypes = [ctypes.c_void_p]
        lib.call_point.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        lib.call_sizes.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        lib.call_run.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
        assert lib.instruction_set() == isa.encode()
        self.cells: dict[str, CellInfo] = {}
        numbers = (ctypes.c_int64 * 7)()
        while name := lib.cell_info(len(self.cells), numbers):
            *sizes, separate, keeps_made, zoneout = numbers
            self.cells[name.decode()] = CellInfo(*sizes, bool(separate), bool(keeps_made), bool(zoneout))

    def run(self, what: str, case: "CellCase", tensors: dict[str, torch.Tensor | None], threads: int, size: int = 0):
        call = self.lib.call_new()
        try:
            lengths, resets = tensors.get("lengths"), tensors.get("resets")
            sizes = [case.T, case.B, case.P, case.h, case.projected or case.h, list(self.cells).index(case.cell)]
            sizes += [DTYPES.index(case.dtype), size]
            sizes += [0, 0] if lengths is None else [*lengths.stride(), 0][:2]
            sizes += [0, 0, 0] if resets is None else [*resets.stride(), 0][:3]
            self.lib.call_sizes(call, (ctypes.c_int64 * len(sizes))(*sizes))
            for name, x in tensors.items():
                assert x is None or name in ("lengths", "resets") or x.is_contiguous(), name
                if x is not None and x.numel():
                    assert self.lib.call_point(call, name.encode(), x.data_ptr()), name
            assert self.lib.call_run(call, what.encode(), threads)
        finally:
            self.lib.call_delete(call)


@pytest.fixture(scope="module", params=["chosen", "baseline"])
def library(request, tmp_path_factory):
    isa = fastrnn.instruction_set() if request.param == "chosen" else request.param
    return Library(tmp_path_factory.mktemp(isa), isa)


class CellCase(Case):
    @property
    def info(self) -> CellInfo:
        cell = MORE_CELLS[self.cell]
        saved = cell.saved + cell.states - 1
        keeps_made = cell.reads_state and cell.remake is None
        return CellInfo(cell.gates, cell.states, saved, cell.params, cell.separate_gates_hh, keeps_made, True)

    def given(self, seed: int) -> dict:
        """The arguments of the forward pass but the cell."""
        arguments = self.arguments(seed)
        del arguments["cell"]
        return arguments


def random_like(seed: int, *like: torch.Tensor | None) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return [None if x is None else torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
            for x in like]  # fmt: skip


def forward(library: Library, case: CellCase, arguments: dict, threads: int):
    T, B, P, h = case.T, case.B, case.P, case.h
    reverse = torch.tensor(arguments["reverse"], dtype=torch.uint8)
    new = torch.zeros if case.lengths else torch.empty
    results = {
        "output": new(T, B, P * h, dtype=case.dtype),
        "h_n": torch.empty(B, P * h, dtype=case.dtype),
        "c_n": torch.empty(B, P * h, dtype=case.dtype) if case.info.states > 1 else torch.empty(0),
        "saved": new(T, B, P * case.info.saved_values(arguments["keep_h"], arguments["keep_c"]) * h, dtype=case.dtype),
    }
    given = arguments | {"reverse": reverse}
    library.run("recurrent_forward", case, given | results, threads)
    return given, results


def check(library: Library, case: CellCase, seed: int, threads: int) -> None:
    torch.manual_seed(seed)
    arguments = {k: x.contiguous() if isinstance(x, torch.Tensor) else x for k, x in case.given(seed).items()}
    T, B, P, h = case.T, case.B, case.P, case.h
    tolerance = TOLERANCE[case.dtype]
    given, results = forward(library, case, arguments, threads)
    exact = {k: double(v) for k, v in arguments.items()}
    want = reference.forward(case.cell, *exact.values())
    assert_near(results.values(), want, tolerance, FORWARD_NAMES, case)

    grads = dict(zip(("grad_output", "grad_h_n", "grad_c_n"),
                     random_like(seed, *[results[k] for k in ("output", "h_n", "c_n")]), strict=True))  # fmt: skip
    if case.info.states == 1:
        grads["grad_c_n"] = None
    new = torch.zeros if case.lengths else torch.empty
    wide = torch.promote_types(case.dtype, torch.float32)
    gates, second = P * case.info.gates * h, case.info.states > 1
    stateful, absent = arguments["reset_h"] is not None, torch.empty(0)
    pulled = {
        "grad_gates_ih": new(T, B, gates, dtype=case.dtype),
        "grad_gates_hh": new(T, B, gates, dtype=case.dtype) if case.info.separate_gates_hh else absent,
        "grad_projected": absent,
        "grad_h_0": torch.empty(B, P * h, dtype=case.dtype),
        "grad_c_0": torch.empty(B, P * h, dtype=case.dtype) if second else absent,
        "grad_reset_h": torch.zeros(B, P * h, dtype=wide) if stateful else absent,
        "grad_reset_c": torch.zeros(B, P * h, dtype=wide) if stateful and second else absent,
        "grad_params": torch.zeros(B, P * case.info.params * h, dtype=wide),
    }
    library.run("recurrent_backward", case, given | results | grads | pulled, threads)
    rest = [v for k, v in exact.items() if k not in ("gates_ih", "bias_hh")]
    wanted = reference.backward(case.cell, *map(double, grads.values()), *rest, want[0], want[3])
    assert_near(pulled.values(), wanted, 10 * tolerance, BACKWARD_NAMES, case)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cell", MORE_CELLS)
def test_odd_sizes(library, cell, dtype):
    for T, B, h in itertools.product((1, 5), SIZES, SIZES):
        check(library, CellCase(cell, T, B, 1 + (B + h) % 3, h, dtype=dtype), T * B + h, 1 + h % 2)


@pytest.mark.parametrize("lengths", ["", "rows", "groups"])
@pytest.mark.parametrize("resets", ["", "zeros", "state", "groups"])
@pytest.mark.parametrize("cell", MORE_CELLS)
def test_lengths_and_resets(library, cell, resets, lengths):
    for (T, B, P, h), dtype in itertools.product([(6, 3, 2, 17), (4, 17, 3, 7)], (torch.float64, torch.float32)):
        check(library, CellCase(cell, T, B, P, h, 0, lengths, resets, "alternate", dtype), T + B, 2)


@pytest.mark.parametrize("noise", ["dropout", "all", "expected"])
@pytest.mark.parametrize("cell", MORE_CELLS)
def test_recurrent_dropout_and_zoneout(library, cell, noise):
    for (T, B, P, h), dtype in itertools.product([(6, 3, 2, 17), (4, 17, 3, 7)], (torch.float64, torch.bfloat16)):
        check(library, CellCase(cell, T, B, P, h, 0, "groups", "groups", dtype=dtype, noise=noise), T + B, 2)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("cell", MORE_CELLS)
def test_threads(library, cell, threads):
    """Units are split, rows are, and groups."""
    for B, P, h in [(3, 1, 200), (96, 1, 48), (2, 4, 100), (40, 2, 65)]:
        case = CellCase(cell, 30, B, P, h, 0, "rows" if B % 2 == 0 else "", "state")
        check(library, case, B, threads)


@pytest.mark.parametrize("cell", MORE_CELLS)
def test_sums_over_a_row_do_not_depend_on_the_run(library, cell):
    """Bitwise the same again; test_cpu.cpp compares threads side by side with one that takes the members in turn."""
    case = CellCase(cell, 9, 33, 2, 65, 0, "rows", "state", dtype=torch.float32)
    arguments = case.given(3)
    runs = [forward(library, case, arguments, 2)[1] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cell", MORE_CELLS)
def test_a_layer(library, cell, dtype, threads):
    """The input's projection and all gradients in the kernels, against autograd of the equations."""
    for T, B, P, h, size in [(7, 5, 2, 17, 3), (5, 40, 1, 129, 33), (30, 3, 1, 200, 20)]:
        case = CellCase(cell, T, B, P, h, 0, "rows", "", dtype=dtype)
        arguments = case.given(T + h)
        info, second = case.info, case.info.states > 1
        generator = torch.Generator().manual_seed(h)

        def random(*shape, generator=generator):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        x, bias_ih = random(T, B, size), random(P, info.gates * h)
        weight_ih = random(P, info.gates * h, size) / size**0.5
        exact = {k: double(v) for k, v in arguments.items()}
        names = ["params", "weight_hh", "bias_hh", "h_0"] + ["c_0"] * second
        leaves = [x.double(), weight_ih.double(), bias_ih.double(), *[exact[k] for k in names]]
        for leaf in leaves:
            leaf.requires_grad_()
        exact["gates_ih"] = torch.nn.functional.linear(leaves[0], leaves[1].flatten(0, 1), leaves[2].flatten())
        want = reference.forward(cell, *exact.values())[: 1 + info.states]
        grads = random_like(h, *[w.to(dtype) for w in want])
        wanted = torch.autograd.grad(want, leaves, [g.double() for g in grads])

        results = {
            "output": torch.zeros(T, B, P * h, dtype=dtype), "h_n": torch.empty(B, P * h, dtype=dtype),
            "c_n": torch.empty(B, P * h, dtype=dtype) if second else None,
            "saved": torch.zeros(T, B, P * info.saved * h, dtype=dtype),
        }  # fmt: skip
        reverse = torch.tensor(arguments["reverse"], dtype=torch.uint8)
        given = arguments | {"gates_ih": None, "reverse": reverse}
        given |= {"input": x, "weight": weight_ih, "bias": bias_ih}
        library.run("layer_forward", case, given | results, threads, size)
        names = FORWARD_NAMES[: 1 + info.states]
        assert_near([results[k] for k in names], want, TOLERANCE[dtype], names, case)

        wide = torch.promote_types(dtype, torch.float32)
        pulled = {
            "grad_input": torch.zeros(P, T, B, size, dtype=dtype),
            "grad_weight_ih": torch.empty_like(weight_ih),
            "grad_bias_ih": torch.empty_like(bias_ih),
            "grad_params": torch.zeros(B, P, info.params, h, dtype=wide),
            "grad_weight_hh": torch.empty_like(arguments["weight_hh"]),
            "grad_bias_hh": torch.empty_like(arguments["bias_hh"]),
            "grad_h_0": torch.empty(B, P * h, dtype=dtype),
            "grad_c_0": torch.empty(B, P * h, dtype=dtype) if second else torch.empty(0),
        }  # fmt: skip
        incoming = dict(zip(("grad_output", "grad_h_n", "grad_c_n"), grads, strict=False))
        library.run("layer_backward", case, given | results | incoming | pulled, threads, size)
        pulled["grad_input"], pulled["grad_params"] = pulled["grad_input"].sum(0), pulled["grad_params"].sum(0)
        got = list(pulled.values())[: len(wanted)]
        loose = 100 if wide is dtype else 10
        assert_near(got, wanted, loose * TOLERANCE[dtype], list(pulled)[: len(wanted)], case)


@pytest.mark.parametrize("noise", ["", "all", "expected"])
@pytest.mark.parametrize(
    ("cell", "projected"), [*((cell, 0) for cell in (*MORE_CELLS, *reference.CELLS)), ("lstm", 2), ("lstm_peephole", 2)]
)
def test_equations_against_autograd(cell, projected, noise):
    """reference.backward, whose derivatives are written out, against autograd of reference.forward; and that against
    finite differences along random directions (along every axis they take a second a cell)."""
    case = (CellCase if cell in MORE_CELLS else Case)(cell, 3, 2, 2, 3, projected, "groups", "state", noise=noise)
    arguments = case.arguments(1)
    names = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    names = [k for k in names if k not in CONSTANTS]
    leaves = [arguments[k].requires_grad_() for k in names]

    def run(*values):
        given = arguments | dict(zip(names, values, strict=True))
        return reference.forward(*given.values())

    assert torch.autograd.gradcheck(lambda *x: [y for y in run(*x) if y.numel()], leaves, fast_mode=True)
    output, h_n, c_n, saved = run(*leaves)
    second = case.info.states > 1
    grads = random_like(5, output, h_n, c_n if second else None, saved)
    results = [x for x, g in zip((output, h_n, c_n, saved), grads, strict=True) if g is not None]
    asked = ["gates_ih", "h_0", "reset_h", *["c_0", "reset_c"] * second, *["params"] * (case.info.params > 0)]
    want = torch.autograd.grad(results, [arguments[k] for k in asked], [g for g in grads if g is not None])
    rest = [v for k, v in arguments.items() if k not in ("cell", "gates_ih", "bias_hh")]
    pulled = reference.backward(cell, *grads[:3], *rest, output, saved, grad_saved=grads[3])
    got = dict(zip(BACKWARD_NAMES, pulled, strict=True))
    if case.info.params:
        got["grad_params"] = got["grad_params"].view(case.B, *arguments["params"].shape).sum(0)
    for name, w in zip(asked, want, strict=True):
        torch.testing.assert_close(got[f"grad_{name}"], w, msg=name)
