"""The op and the modules under torch.compile: whole graphs, one call of a kernel a layer, symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from tests.transform_cases import (
    Function,
    assert_close,
    calls_in,
    calls_of,
    every_cell,
    every_module,
    loss_of,
    make_case,
    make_module,
    modules_by_reference,
    results_and_gradients,
)


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Compiled graphs are cached on disk by what dynamo sees, which does not include the source of autograd.py.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()


class Recorder:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.Graph] = []
        self.backward: list[torch.fx.Graph] = []
        self.backend = aot_autograd(
            fw_compiler=self._keep(self.forward),
            bw_compiler=self._keep(self.backward),
            inference_compiler=self._keep(self.forward),
        )

    def _keep(self, graphs: list[torch.fx.Graph]) -> Callable[..., Any]:
        def compile_nothing(module: torch.fx.GraphModule, example: object) -> Any:
            graphs.append(module.graph)
            return make_boxed_func(module.forward)

        return compile_nothing


def _graphs() -> int:
    """How many graphs dynamo has made; more than one means that it compiled again."""
    return counters["stats"]["unique_graphs"]


_SIZES = ((5, 3), (9, 6), (11, 10))  # T, B; no size of a module or its state


def _check_module(kind: str, mode: str, backend: Any) -> None:
    """The same results and gradients as by the reference, at three sizes with one graph."""
    module = make_module(kind)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    parameters = list(module.parameters())
    for T, B in _SIZES:
        x = torch.randn(T, B, 8)
        if mode == "train":
            actual = results_and_gradients(compiled, parameters, x)
            with modules_by_reference():
                assert_close(actual, results_and_gradients(module, parameters, x), 1e-4)
        else:
            with {"no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
                actual = compiled(x)
                with modules_by_reference():
                    assert_close(actual, module(x), 1e-5)
    assert _graphs() == 1


@every_module
def test_train(kind: str):
    """[r05a] Forward and backward graphs with one call of a kernel a layer each, for all T and B."""
    recorder = Recorder()
    _check_module(kind, "train", recorder.backend)
    assert (len(recorder.forward), len(recorder.backward)) == (1, 1)
    layers = calls_of(make_module(kind))
    assert calls_in(*recorder.forward) == {"forward": layers}
    assert calls_in(*recorder.backward) == {"backward": layers}


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_without_grad(kind: str, mode: str):
    """[r05b] under no_grad and [r05c] inference_mode."""
    recorder = Recorder()
    _check_module(kind, mode, recorder.backend)
    assert len(recorder.forward) == 1
    assert calls_in(*recorder.forward) == {"forward": calls_of(make_module(kind))}


def test_inductor_train():
    """[r05d] With torch's own code generator."""
    _check_module("gru", "train", "inductor")


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_inductor_without_grad(mode: str):
    """[r05e] With torch's own code generator."""
    _check_module("lstm-projected", mode, "inductor")


@pytest.mark.parametrize("kind", ["lstm-projected", "gru", "rnn_tanh"])
def test_automatic_dynamic_sizes(kind: str):
    """[r05f] Without dynamic=True, one graph for the first sizes and one for all others."""
    module = make_module(kind)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for T, B in (*_SIZES, (3, 2)):
        x = torch.randn(T, B, 8, requires_grad=True)
        inputs = (x, *module.parameters())
        actual, expected = (results_and_gradients(f, inputs, x) for f in (compiled, module))
        assert_close(actual, expected, 1e-5)
    assert _graphs() <= 2


def test_twenty_sizes():
    """One compilation serves 20 pairs of T and B, forward and backward, with torch's own code generator."""
    module = make_module("lstm")
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    sizes = [(2 + 3 * i, 3 + (7 * i) % 23) for i in range(20)]
    assert len(set(sizes)) == 20
    for i, (T, B) in enumerate(sizes):
        x = torch.randn(T, B, 8)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            actual = results_and_gradients(compiled, list(module.parameters()), x)
        assert_close(actual, results_and_gradients(module, list(module.parameters()), x), 1e-4)
    assert _graphs() == 1


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_packed_sequence(kind: str):
    """As an argument of a compiled module: one graph for all lengths, forward and backward."""
    module = make_module(kind)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, lengths in ((5, [3, 5, 2]), (9, [2, 9, 4, 2, 1, 7]), (11, [11, 11])):
        data = pack_padded_sequence(torch.randn(T, len(lengths), 8), torch.tensor(lengths), enforce_sorted=False)

        def run(function: Function) -> Any:
            output, state = function(data)
            results = (output.data, state)
            return results, torch.autograd.grad(loss_of(lambda: results)(), list(module.parameters()))

        assert_close(run(compiled), run(module), 1e-4)
    assert _graphs() == 1


@every_module
def test_graph_of_long_sequences(kind: str):
    """Graphs are as large for T = 4096 as for T = 64, so compiling takes as long; tools/compile_time.py times it."""
    counts = []
    for T in (64, 4096):
        torch._dynamo.reset()
        recorder = Recorder()
        compiled = torch.compile(make_module(kind), fullgraph=True, dynamic=False, backend=recorder.backend)
        loss_of(compiled)(torch.randn(T, 2, 8)).backward()
        counts.append([len(graph.nodes) for graph in (*recorder.forward, *recorder.backward)])
    assert counts[0] == counts[1]


# ---- transforms inside of compiled functions ----


def _check_inside(function: Function, *inputs: Any, calls: dict[str, int] | None = None) -> None:
    """Compiled equals eager, which other tests compare with the reference."""
    recorder = Recorder()
    actual = torch.compile(function, fullgraph=True, backend=recorder.backend)(*inputs)
    assert_close(actual, function(*inputs))
    if calls is not None:
        assert calls_in(*recorder.forward) == calls


def _module_loss(kind: str) -> tuple[Function, dict[str, Tensor]]:
    module = make_module(kind, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))[0].sin().sum()

    return loss, parameters


@every_module
def test_grad_inside(kind: str):
    """[r05g] torch.func.grad of functional_call."""
    loss, parameters = _module_loss(kind)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    layers = calls_of(make_module(kind))
    _check_inside(grad(loss), parameters, x, calls={"forward": layers, "backward": layers})


@every_cell
def test_vmap_inside(cell: str):
    """[r05h] vmap over gates, and over weights with lengths."""
    case = make_case(cell, requires_grad=False, lengths="rows", resets="groups", reset_state=True)
    gates, weight, *others, lengths, resets = case.tensors.values()
    many_gates, many_weights = torch.stack([gates, gates.cos()]), torch.stack([weight, -weight])
    many_lengths = torch.stack([lengths, lengths.flip(0)])
    _check_inside(lambda g: vmap(lambda g: case.fused(g, weight))(g), many_gates, calls={"forward": 1})
    _check_inside(
        lambda w, n: vmap(lambda w, n: case.fused(gates, w, *others, n, resets))(w, n),
        many_weights,
        many_lengths,
        calls={"forward": 1},
    )


@pytest.mark.parametrize("kind", ["lstm-projected", "gru", "rnn_relu"])
def test_vmap_of_grad_inside(kind: str):
    """[r05i] Per-sample gradients."""
    loss, parameters = _module_loss(kind)

    def of_sample(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(parameters, x.unsqueeze(1))

    x = torch.randn(3, 4, 8, dtype=torch.float64)
    layers = calls_of(make_module(kind))
    calls = {"forward": layers, "backward": layers}
    _check_inside(vmap(grad(of_sample), in_dims=(None, 1)), parameters, x, calls=calls)


@every_cell
def test_jvp_inside(cell: str):
    """[r05j] Tangents are there, and right."""
    case = make_case(cell, T=2, requires_grad=False)
    others = case.inputs[1:]
    gates, tangent = case.inputs[0], torch.randn_like(case.inputs[0])

    def along(gates: Tensor, tangent: Tensor) -> tuple:
        return jvp(lambda g: case.fused(g, *others), (gates,), (tangent,))

    assert any(t.any() for t in along(gates, tangent)[1])
    _check_inside(along, gates, tangent)


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
def test_hessian_inside(cell: str):
    """[r05k] Forward over reverse."""
    case = make_case(cell, T=2, B=1, h=1, reverse=(False,), requires_grad=False)
    others = case.inputs[1:]
    of_gates = hessian(lambda g: loss_of(case.fused)(g, *others))
    assert of_gates(case.inputs[0]).any()
    _check_inside(of_gates, case.inputs[0])


# ---- arguments, autocast, compiled autograd ----


@every_cell
def test_every_argument(cell: str):
    """[r05l] Lengths, resets and states, with gradients of every argument."""
    options = {"projection": 3} if cell == "lstm" else {}
    case = make_case(cell, lengths="groups", resets="groups", reset_state=True, **options)
    recorder = Recorder()
    compiled = torch.compile(case.fused, fullgraph=True, backend=recorder.backend)
    inputs = tuple(case.tensors.values())

    def run(function: Function) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(function)(*inputs), case.inputs)

    assert_close(run(compiled), run(case.composite))
    assert calls_in(*recorder.forward, *recorder.backward) == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("kind", ["lstm-projected", "gru", "rnn_relu"])
def test_module_with_every_argument(kind: str):
    """[r05l] A module with a state, lengths, resets and the state after a reset, at sizes that change."""
    module = make_module(kind)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in _SIZES:
        x = torch.randn(T, B, 8, requires_grad=True)
        _, state = module(x)
        state, fresh = (torch.utils._pytree.tree_map(f, state) for f in (torch.rand_like, torch.randn_like))
        leaves = [x, *(s.requires_grad_() for s in torch.utils._pytree.tree_leaves((state, fresh)))]
        keywords = {
            "lengths": torch.arange(B) % (T + 1),
            "resets": torch.rand(T, B) < 0.3,
            "reset_state": fresh,
        }
        inputs = [*leaves, *module.parameters()]
        actual = results_and_gradients(compiled, inputs, x, state, **keywords)
        with modules_by_reference():
            assert_close(actual, results_and_gradients(module, inputs, x, state, **keywords), 1e-4)
    assert _graphs() == 1


@pytest.mark.parametrize("kind", ["lstm-projected", "gru", "rnn_tanh"])
def test_autocast(kind: str):
    """[r08] The compiled module under autocast, forward and backward."""
    module, x = make_module(kind), torch.randn(4, 3, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def run(function: Function) -> tuple:
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = function(x)
        assert output.dtype == torch.bfloat16
        return output, torch.autograd.grad(output.float().sin().sum(), list(module.parameters()))

    actual, expected = run(compiled), run(module)
    assert {g.dtype for g in actual[1]} == {torch.float32}
    assert_close(actual, expected, 0.02)


@pytest.mark.parametrize("kind", ["lstm-projected", "gru"])
def test_compiled_autograd(kind: str):
    """[r05m] The backward pass of an eager forward, compiled as one graph."""
    module, x = make_module(kind), torch.randn(11, 3, 8)
    parameters = list(module.parameters())
    expected = torch.autograd.grad(loss_of(module)(x), parameters)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss_of(module)(x).backward()
    assert counters["compiled_autograd"]["captures"] == 1
    assert_close(tuple(p.grad for p in parameters), expected, 1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_inductor_without_implicit_fallbacks(kind: str) -> None:
    """Where it may call only kernels that it was told of; forward and backward."""
    module, x = getattr(fastrnn, kind)(4, 6, grad_clip=0.1), torch.randn(5, 3, 4, requires_grad=True)
    with torch._inductor.config.patch(implicit_fallbacks=False):
        output, _ = torch.compile(module, fullgraph=True)(x)
        (found,) = torch.autograd.grad(output.sin().sum(), x)
    (wanted,) = torch.autograd.grad(module(x)[0].sin().sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("make", ["RNN(4, 6)", "RNN(4, 6, 1, 'relu')", "GRU(4, 6)", "LSTM(4, 6)", "LSTMCell(4, 6)"])
def test_made_in_a_compiled_function(make: str) -> None:
    """Dynamo cannot trace the making of parameters, torch.nn's own neither; what is around them it may."""

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        module = eval(f"fastrnn.{make}")
        return module(x[0] if "Cell" in make else x)[0]

    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(torch.compile(call, backend="eager")(x), call(x))


def test_inside_of_a_dual_level() -> None:
    """A whole graph, of tensors with a tangent and without. (What AOT autograd makes takes none.)"""
    module, x = fastrnn.LSTM(4, 6, 2, dtype=torch.float64), torch.randn(7, 2, 4, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.autograd.forward_ad.dual_level():
        assert_close(compiled(x)[0], module(x)[0])
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        found, want = (torch.autograd.forward_ad.unpack_dual(f(dual)[0]) for f in (compiled, module))
        assert want.tangent is not None
        assert_close(tuple(found), tuple(want))
