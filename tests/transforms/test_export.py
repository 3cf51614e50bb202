"""torch.export, and what it rests on: opcheck, fake and meta tensors, make_fx."""

from __future__ import annotations

import io
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension
from torch import Tensor
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._pytree import tree_map

import fastrnn
from fastrnn.ops import names_of, recurrent_backward, recurrent_backward_jvp, recurrent_forward, recurrent_forward_jvp
from tests.helpers import KINDS_OF_CELLS
from tests.transform_cases import (
    CELL_NAMES,
    FUSED,
    assert_close,
    backward_arguments,
    calls_in,
    calls_of,
    every_cell,
    every_module,
    gradients,
    loss_of,
    make_case,
    make_module,
    modules_by_reference,
    variants,
)

ROOT = Path(__file__).resolve().parents[2]

# ---- export ----


def _saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def _check_export(kind: str, strict: bool) -> None:
    """T and B stay symbols, each layer stays one op, and other sizes give the reference's results."""
    module = make_module(kind)
    sizes = {0: Dim("T", min=2, max=100), 1: Dim("B", min=2, max=100)}
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            program = export(module, (torch.randn(4, 3, 8),), dynamic_shapes={"input": sizes}, strict=strict)
            lowered = program.run_decompositions()
            for each in (program, lowered, _saved_and_loaded(lowered)):
                assert calls_in(each.graph) == {"forward": calls_of(module)}
                x = torch.randn(6, 5, 8)
                with modules_by_reference():
                    expected = module(x)
                assert_close(each.module()(x), expected, 1e-5)


@every_module
def test_export(kind: str):
    """[r06a] Not strict, which is the default."""
    _check_export(kind, strict=False)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_strict_export(kind: str):
    """[r06b] Strict: through dynamo."""
    _check_export(kind, strict=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_every_argument(strict: bool):
    """[r06a, r06b] State, lengths, resets and the state after a reset are inputs of the exported program."""
    module = fastrnn.LSTM(8, 12, proj_size=7, bidirectional=True)
    T, B = Dim("T", min=2, max=100), Dim("B", min=2, max=100)

    def inputs(T: int, B: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state, fresh = ((torch.randn(2, B, 7), torch.randn(2, B, 12)) for _ in range(2))
        masks = {"lengths": torch.arange(B) % T, "resets": torch.rand(T, B) < 0.4}
        return (torch.randn(T, B, 8), state), masks | {"reset_state": fresh}

    args, keywords = inputs(4, 3)
    shapes = {
        "input": {0: T, 1: B},
        "hx": ({1: B}, {1: B}),
        "lengths": {0: B},
        "resets": {0: T, 1: B},
        "reset_state": ({1: B}, {1: B}),
    }
    program = _saved_and_loaded(export(module, args, keywords, dynamic_shapes=shapes, strict=strict))
    assert calls_in(program.graph) == {"forward": 1}
    args, keywords = inputs(6, 5)
    actual = program.module()(*args, **keywords)
    with modules_by_reference():
        assert_close(actual, module(*args, **keywords), 1e-5)


@every_module
def test_exported_module_trains(kind: str):
    """[r06c] Gradients of an exported program's parameters."""
    module, x = make_module(kind), torch.randn(4, 3, 8)
    exported = export(module, (x,)).module()
    loss_of(exported)(x).backward()
    expected = torch.autograd.grad(loss_of(module)(x), list(module.parameters()))
    actual = dict(exported.named_parameters())
    assert_close(tuple(actual[name].grad for name, _ in module.named_parameters()), expected, 1e-6)


# ---- opcheck ----

GIVEN = [(False, False, False), (True, False, False), (False, False, True)]


# opcheck looks at the schema, the registration for autograd, the fake kernel and AOT dispatch with symbolic sizes.
# With inputs that require grad it traces the composites, since its loss takes in `saved`: two steps are enough, and a
# cell of each kind of state, gates and parameters, for a trace takes seconds.
TRACED = (*KINDS_OF_CELLS, "lstm_peephole", "gru_norm")


@variants("plain", "lengths", "resets", "everything", "projection", "projection-everything")
def test_opcheck_forward(cell: str, options: dict):
    """[r07] With `save` on or off: both with each cell, and both with each variant."""
    case = make_case(cell, requires_grad=False, **options)
    save = (CELL_NAMES.index(cell) + len(options)) % 2 == 0
    opcheck(recurrent_forward, (*case.arguments(), save))


@variants("everything", "projection-everything", cells=TRACED)
def test_opcheck_forward_with_grad(cell: str, options: dict):
    """[r07] Inputs that require grad; `save` off, for autograd turns it on."""
    case = make_case(cell, **(options | {"T": 2}))
    opcheck(recurrent_forward, (*case.arguments(), False))


@variants("everything", "projection-everything")
def test_opcheck_backward(cell: str, options: dict):
    """[r07b] recurrent_backward."""
    case = make_case(cell, **(options | {"T": 2}))
    opcheck(recurrent_backward, tuple(backward_arguments(case, requires_grad=False)))


@variants("everything", "projection-everything", cells=TRACED)
def test_opcheck_backward_with_grad(cell: str, options: dict):
    """[r07b] The same, which is differentiable in its turn."""
    case = make_case(cell, **(options | {"T": 2}))
    opcheck(recurrent_backward, tuple(backward_arguments(case, requires_grad=True)))


@every_cell
@pytest.mark.parametrize("given", GIVEN)
def test_opcheck_backward_without_some_gradients(cell: str, given: tuple[bool, bool, bool]):
    """[r07c] Gradients that are None, and those of the initial state not asked for: both for every other cell, so that
    each cell and each choice of gradients has it both ways.
    """
    case = make_case(cell, lengths="rows")
    initial = (CELL_NAMES.index(cell) + GIVEN.index(given)) % 2 == 0
    opcheck(recurrent_backward, tuple(backward_arguments(case, given=given, initial=initial)))


def _samples() -> dict[str, tuple[Any, ...]]:
    """Arguments for every op that takes tensors."""
    case = make_case("lstm", requires_grad=False)
    zeros = (torch.zeros(3, 4), torch.zeros(3, 4))
    module = fastrnn.quantize(fastrnn.LSTM(3, 4), torch.bfloat16)
    narrow = (module.weight_ih_l0, None, None, module.bias_ih_l0, module.weight_hh_l0, None, None, module.bias_hh_l0)
    rest = (None, None, *zeros, *[None] * 7, [False])
    weights = ([torch.randn(16, 3)], [torch.randn(16, 4)], [], [torch.randn(16)], [], [])
    states = (torch.zeros(1, 3, 4), *[None] * 9, [False])  # then batch_sizes and reverse
    x = torch.randn(5, 3, 3)
    output, _, _, _, saved = torch.ops.fastrnn.layer_forward.default("lstm", x, *weights, *states, True)
    grads, needed = (
        (output.cos(), None, None, None),
        [True] * 3 + [False] + [True] + [False] * 2 + [True] * 2 + [False] * 2,
    )
    groups = torch.randn(70, 2, 40)

    def with_tangents(op: Any, jvp: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        named = dict(zip(names_of(op), given, strict=False)) | {"grad_clip": 0.0}
        tangents = {f"tangent_{name}": x.cos() for name, x in named.items() if isinstance(x, torch.Tensor)}
        return tuple((named | tangents).get(name) for name in names_of(jvp))

    return {
        "recurrent_forward": (*case.arguments(), True),
        "recurrent_backward": tuple(backward_arguments(case)),
        "recurrent_forward_jvp": with_tangents(recurrent_forward, recurrent_forward_jvp, (*case.arguments(), True)),
        "recurrent_backward_jvp": with_tangents(
            recurrent_backward, recurrent_backward_jvp, tuple(backward_arguments(case))
        ),
        "layer_forward": ("lstm", x, *weights, *states, True, 0.0, True),
        "layer_backward": ("lstm", *grads, x, *weights, *states, output, saved, needed),
        "quantized_forward": ("lstm", torch.randn(5, 3, 3), *narrow, *rest),
        "gemm": (torch.randn(40, 6), torch.randn(40, 5), None, True, False),
        "clamp_gradient": (torch.randn(3, 4, requires_grad=True), 0.5),
        "grouped_linear": (groups, torch.randn(2, 30, 40), torch.randn(2, 30)),
        "grouped_outer": (groups, groups[..., :30]),
        "bernoulli": (torch.tensor([5, 6]), (3, 5), 0.3, torch.float32),
    }


def test_every_op_is_checked():
    """Whatever is registered under torch.ops.fastrnn, so that no new op is forgotten."""
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastrnn::")}
    ops = {name.partition(".")[0]: getattr(torch.ops.fastrnn, name).default for name in names}
    samples = _samples()
    of_tensors = {name for name, op in ops.items() if any("Tensor" in str(a.type) for a in op._schema.arguments)}
    assert of_tensors == samples.keys()
    for name, arguments in samples.items():
        opcheck(ops[name], arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_op_refuses_none_for_a_tensor(device: str):
    """torch's parser lets it through: by each kernel, and without data, with the argument's name."""
    samples = _samples()
    del samples["bernoulli"]  # of one tensor: without it torch knows no kernel to ask
    for name, given in samples.items():
        op = getattr(torch.ops.fastrnn, name).default
        there = tree_map(lambda x: x.detach().to(device) if isinstance(x, Tensor) else x, list(given))
        required = [i for i, a in enumerate(op._schema.arguments) if isinstance(a.type, torch.TensorType)]
        assert required, name
        for i in required:
            argument = op._schema.arguments[i].name
            with pytest.raises(TypeError, match=f"{name}: {argument}: expected a tensor, got None"):
                op(*there[:i], None, *there[i + 1 :])


@pytest.mark.parametrize("name", ["grouped_linear", "grouped_outer"])
def test_opcheck_grouped_products_with_grad(name: str):
    arguments = [x.requires_grad_() for x in _samples()[name]]
    opcheck(getattr(torch.ops.fastrnn, name).default, tuple(x.detach().requires_grad_() for x in arguments))


# ---- other processes ----


class Network(torch.nn.Module):
    """Every kind of layer and cell."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fastrnn.LSTM(8, 12, num_layers=2, bidirectional=True, proj_size=7)
        self.gru, self.rnn = fastrnn.GRU(14, 9), fastrnn.RNN(9, 10, nonlinearity="relu")
        self.cells = torch.nn.ModuleList([fastrnn.LSTMCell(10, 6), fastrnn.GRUCell(6, 5), fastrnn.RNNCell(5, 4)])

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y = self.rnn(self.gru(self.lstm(x, lengths=lengths)[0])[0])[0]
        lstm, gru, rnn = self.cells
        return y, rnn(gru(lstm(y[-1])[0]))


def _example(T: int, B: int) -> tuple[Tensor, Tensor]:
    """The same numbers in any process, and in the C++ program."""
    return torch.arange(T * B * 8, dtype=torch.float32).reshape(T, B, 8).sin(), torch.arange(B) % T + 1


@pytest.fixture(scope="module")
def exported() -> tuple[ExportedProgram, tuple[Tensor, Tensor]]:
    """A program of every module with dynamic T and B, and its results for T, B = 7, 5."""
    torch.manual_seed(5)
    network = Network()
    T, B = Dim("T", min=2, max=100), Dim("B", min=2, max=100)
    with torch.no_grad():
        program = export(network, _example(4, 3), dynamic_shapes=({0: T, 1: B}, {0: B}))
        return program, network(*_example(7, 5))


@pytest.fixture(scope="module")
def package(exported: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AOTInductor's package of it."""
    file = tmp_path_factory.mktemp("aoti") / "network.pt2"
    torch._inductor.aoti_compile_and_package(exported[0], package_path=str(file))
    return file


def _in_a_fresh_process(code: str, *arguments: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


_LOAD = """
import sys, torch, fastrnn
results = {loaded}(*torch.load(sys.argv[2]))
torch.testing.assert_close(results, torch.load(sys.argv[3]), rtol=1e-5, atol=1e-6)
"""


def _files(folder: Path, results: tuple[Tensor, Tensor]) -> tuple[Path, Path]:
    torch.save(_example(7, 5), folder / "inputs.pt")
    torch.save(tuple(results), folder / "results.pt")
    return folder / "inputs.pt", folder / "results.pt"


def test_program_in_a_fresh_process(exported: tuple, tmp_path: Path):
    torch.export.save(exported[0], tmp_path / "program.pt2")
    code = _LOAD.format(loaded="torch.export.load(sys.argv[1]).module()")
    _in_a_fresh_process(code, tmp_path / "program.pt2", *_files(tmp_path, exported[1]))


def test_aot_inductor_package_in_a_fresh_process(exported: tuple, package: Path, tmp_path: Path):
    code = _LOAD.format(loaded="torch._inductor.aoti_load_package(sys.argv[1])")
    _in_a_fresh_process(code, package, *_files(tmp_path, exported[1]))


def test_aot_inductor_package_from_cpp(exported: tuple, package: Path, tmp_path: Path):
    """A program without an interpreter: torch's loader, and our extension module for its ops alone.

    The module refers to Python's symbols, so the shared libpython is loaded first, which is not everywhere. torch's own
    library for Python is, too: a search path that Python's flags give the module takes the place of the program's.
    """
    python = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
    if not python.name.startswith("libpython") or ".so" not in python.name or not python.exists():
        pytest.skip("this Python has no shared library")
    torch_lib, program = Path(torch.__file__).parent / "lib", tmp_path / "run_package"
    includes = [f"-I{path}" for path in torch.utils.cpp_extension.include_paths()]
    libraries = [f"-L{torch_lib}", f"-Wl,-rpath,{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    source = ROOT / "tests/cpp/run_package.cpp"
    subprocess.run(["g++", "-std=c++20", "-O0", str(source), "-o", str(program), *includes, *libraries], check=True)
    first = [python, torch_lib / "libtorch_python.so", fastrnn._C.__file__]
    done = subprocess.run([str(program), str(package), *map(str, first)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    sums = torch.tensor([float(word) for word in done.stdout.split()])
    torch.testing.assert_close(sums, torch.stack([y.abs().sum() for y in exported[1]]), rtol=1e-4, atol=1e-5)


# ---- tracing and tensors without data ----


@variants("everything", "projection-everything")
def test_make_fx(cell: str, options: dict):
    """[r10] A symbolic trace of a gradient holds one call of each op and no composite, and serves other sizes.

    Of calls without masks, resets and noise, see make_fx_traces in tests/support.
    """
    # Sizes that no other dimension has: equal ones are traced as one symbol.
    case = make_case(cell, T=11, B=13, **options)
    inputs = tuple(case.tensors.values())

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(case.fused)(*inputs), inputs[: len(case.inputs)])

    graph = make_fx(function, tracing_mode="symbolic")(*inputs)
    assert calls_in(graph.graph) == FUSED
    other = make_case(cell, T=6, B=5, **options)
    assert_close(graph(*other.tensors.values()), gradients(other.composite, other.inputs))


@variants()
def test_meta_tensors(cell: str, options: dict):
    """[r10] Shapes, dtypes and strides of the results, forward and backward, are those of the kernels."""
    case = make_case(cell, **options)
    meta = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in case.tensors.values()]
    real = list(case.tensors.values())
    for save in (False, True):
        results = [recurrent_forward(*case.arguments(*inputs), save) for inputs in (meta, real)]
        for of_meta, of_real in zip(*results, strict=True):
            assert of_meta.is_meta
            assert (of_meta.shape, of_meta.dtype) == (of_real.shape, of_real.dtype)
            assert of_meta.stride() == of_real.stride()
    count = len(case.inputs)
    losses = [loss_of(case.fused)(*inputs) for inputs in (meta, real)]
    grads = [torch.autograd.grad(y, x[:count]) for y, x in zip(losses, (meta, real), strict=True)]
    assert [g.shape for g in grads[0]] == [g.shape for g in grads[1]]


@every_module
def test_module_on_meta_device(kind: str):
    """[r10] Modules may be made and run without data."""
    module = make_module(kind, device="meta")
    output, _ = module(torch.empty(4, 3, 8, device="meta"))
    assert output.is_meta
    assert output.shape == make_module(kind)(torch.randn(4, 3, 8))[0].shape
    output.sum().backward()
    assert all(p.grad.shape == p.shape for p in module.parameters())


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "quantized"])
def test_draft_export(kind: str) -> None:
    """It runs each op on real tensors, too, and calls one wrong that seems to write to its arguments."""
    module = fastrnn.quantize(fastrnn.LSTM(4, 6)) if kind == "quantized" else getattr(fastrnn, kind)(4, 6)
    x = torch.randn(3, 4) if "Cell" in kind else torch.randn(5, 3, 4)
    program = torch.export.draft_export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))
    assert any("fastrnn" in str(node.target) for node in program.graph.nodes)
