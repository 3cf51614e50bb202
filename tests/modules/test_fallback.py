"""Devices, dtypes and layouts that no kernel of ours takes: a module computes there what torch.nn's computes, or raises
what torch.nn's raises, and what torch.nn lacks comes from the reference."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _C, fallback
from fastrnn.functional import LayerWeights
from tests.helpers import (
    CELL_KINDS,
    KINDS,
    assert_equal,
    build,
    evaluate,
    evaluate_cell,
    make_state,
    map_state,
    pair,
    randn,
    tensors,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
]
KIND = pytest.mark.parametrize("kind", KINDS)
EITHER = pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])
T, B, I, H = 4, 3, 3, 5  # noqa: E741


class OnlyTorchsOps(TorchDispatchMode):
    """Ours have no kernel, as on a device that they do not know."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # clamp_gradient is made of torch's ops, for every device
        if func.namespace == "fastrnn" and func is not torch.ops.fastrnn.clamp_gradient.default:
            raise NotImplementedError(f"Could not run '{func}' with arguments from this backend")
        return func(*(args or ()), **(kwargs or {}))


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as a device that no kernel of ours knows."""
    monkeypatch.delitem(fallback.KERNELS, "cpu")
    monkeypatch.setattr(_C, "module_forward", lambda *call: None)
    with OnlyTorchsOps():
        yield


def call(module: nn.Module, *args: Any, **options: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(module(*args, **options))


def outcome(function: Callable[[], Any]) -> Any:
    """The results, or the error's type and first line."""
    try:
        return function()
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0].split(" j")[0]  # a nested size has a number of its own


def with_gradients(module: nn.Module, x: Tensor, hx: Any = None, **options: Any) -> dict[str, Tensor]:
    """Results, and the gradients of input, states and parameters; of any dtype."""
    leaves = [y.detach().requires_grad_() for y in (x, *tensors(hx))]
    state = None if hx is None else leaves[1] if isinstance(hx, Tensor) else tuple(leaves[1:])
    results = call(module, leaves[0], state, **options)
    named = {**{f"given {i}": y for i, y in enumerate(leaves)}, **dict(module.named_parameters())}
    loss = sum((y * randn(*y.shape, seed=i)).sum().abs() for i, y in enumerate(results))
    grads = torch.autograd.grad(loss, list(named.values()))
    return {f"result {i}": y.detach() for i, y in enumerate(results)} | dict(zip(named, grads, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert list(found) == list(expected)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


# ---- a device without kernels ----


@pytest.mark.parametrize("variable", ["full", "sorted", "unsorted", "unbatched"])
@pytest.mark.parametrize(("layers", "dropout"), [(1, 0.0), (2, 0.0), (2, 1.0)], ids=["1", "2", "2-dropout"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("kind", [*KINDS, "LSTM-proj"])
def test_product(
    kind: str, bidirectional: bool, layers: int, dropout: float, variable: str, without_kernels: None
) -> None:
    kind, _, projected = kind.partition("-")
    proj = 2 if projected else 0
    for bias, batch_first, stateful in itertools.product([False, True], repeat=3):
        options: dict[str, Any] = {"proj_size": proj} if proj else {}
        options |= dict(bias=bias, dropout=dropout, bidirectional=bidirectional, batch_first=batch_first)
        modules = pair(kind, I, H, layers, dtype=torch.float64, **options)
        x: Any = randn(*((B, T) if batch_first else (T, B)), I)
        leading: tuple[int, ...] = (layers * (1 + bidirectional), B)
        if variable == "unbatched":
            x, leading = x.select(0 if batch_first else 1, 0), leading[:1]
        elif variable != "full":
            lengths = torch.tensor([4, 2, 1] if variable == "sorted" else [1, 4, 2])
            x = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=variable == "sorted")
        hx = make_state(kind, *leading, hidden=H, proj=proj) if stateful else None
        assert_equal(*(evaluate(module, x, hx) for module in modules), tolerance=1e-14)


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_cells(kind: str, stateful: bool, batched: bool, without_kernels: None) -> None:
    modules = pair(kind, I, H, dtype=torch.float64)
    leading = (B,) if batched else ()
    hx = make_state(kind, *leading, hidden=H) if stateful else None
    assert_equal(*(evaluate_cell(module, randn(*leading, I), hx) for module in modules), tolerance=1e-14)


OURS: dict[str, dict[str, Any]] = {
    "learn_initial_state": {},
    "state_batch_first": {},
    "return_all_states": {},
    "grad_clip": {},
    "recompute": {},
    "lengths": {"lengths": torch.tensor([2, 4, 0])},
    "resets": {"resets": torch.arange(T * B).reshape(T, B) % 3 == 1},
    "tokens": {},
}


@pytest.mark.parametrize("option", OURS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@KIND
def test_options(kind: str, bidirectional: bool, option: str, request: pytest.FixtureRequest) -> None:
    """What torch.nn lacks gives what it gives with kernels."""
    if option == "return_all_states" and kind != "LSTM":
        pytest.skip("an LSTM's option")
    value = {"grad_clip": 0.01, "recompute": 2}.get(option, True)
    made = {} if option in ("lengths", "resets") else {option: value}
    if option == "tokens":
        made = {"token_input": True}
    module = build(fastrnn, kind, I, H, 2, bidirectional=bidirectional, dtype=torch.float64, **made)
    if option == "learn_initial_state":
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(randn(*p.shape)) if "_0_" in name else None

    def run() -> dict[str, Tensor]:
        x = torch.arange(T * B).reshape(T, B) % I if option == "tokens" else randn(T, B, I).requires_grad_()
        results = call(module, x, **OURS[option])
        named = {**dict(module.named_parameters()), **({} if option == "tokens" else {"x": x})}
        loss = sum((y * randn(*y.shape, seed=i)).sum() for i, y in enumerate(results))
        grads = torch.autograd.grad(loss, list(named.values()))
        return {f"result {i}": y.detach() for i, y in enumerate(results)} | dict(zip(named, grads, strict=True))

    expected = run()
    request.getfixturevalue("without_kernels")
    assert_same(run(), expected, 1e-10)


@KIND
def test_packed_with_options(kind: str, request: pytest.FixtureRequest) -> None:
    module = build(
        fastrnn, kind, I, H, bidirectional=True, dtype=torch.float64, learn_initial_state=True, grad_clip=0.1
    )
    packed = pack_padded_sequence(randn(T, B, I), torch.tensor([1, 4, 2]), enforce_sorted=False)
    expected = evaluate(module, packed)
    request.getfixturevalue("without_kernels")
    assert_equal(evaluate(module, packed), expected, 1e-10)


@KIND
def test_step(kind: str, without_kernels: None) -> None:
    ours, theirs = pair(kind, I, H, 2, dtype=torch.float64)
    x, state = randn(B, I), make_state(kind, 2, B, hidden=H)
    output, after = ours.step(x, state)
    expected, expected_after = theirs(x[None], state)
    for a, b in zip((output, *tensors(after)), (expected[0], *tensors(expected_after)), strict=True):
        assert torch.equal(a, b)


def of_module(module: Any) -> list[list[LayerWeights]]:
    directions = 2 if module.bidirectional else 1
    found = [LayerWeights(*each) for each in module.all_weights]
    return [found[i : i + directions] for i in range(0, len(found), directions)]


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@KIND
def test_functions(kind: str, bidirectional: bool, stateful: bool, without_kernels: None) -> None:
    theirs = build(nn, kind, I, H, 2, bidirectional=bidirectional, dtype=torch.float64)
    x, hx = randn(T, B, I), make_state(kind, 2 * (1 + bidirectional), B, hidden=H) if stateful else None
    name, _, nonlinearity = kind.lower().partition("_")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    found = getattr(fastrnn.functional, name)(x, hx, of_module(theirs), **options)
    for a, b in zip((found[0], *tensors(found[1])), call(theirs, x, hx), strict=True):
        assert torch.equal(a, b)


@KIND
def test_functions_with_one_bias(kind: str, request: pytest.FixtureRequest) -> None:
    """torch's ops know both biases or none."""
    weights = [[w._replace(bias_hh=None)] for (w,) in of_module(build(nn, kind, I, H, 2, dtype=torch.float64))]
    name, _, nonlinearity = kind.lower().partition("_")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}

    def run() -> Tensor:
        return getattr(fastrnn.functional, name)(randn(T, B, I), None, weights, **options)[0]

    expected = run()
    request.getfixturevalue("without_kernels")
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_cell_functions(kind: str, without_kernels: None) -> None:
    theirs = build(nn, kind, I, H, dtype=torch.float64)
    weights = LayerWeights(theirs.weight_ih, theirs.weight_hh, theirs.bias_ih, theirs.bias_hh)
    x, hx = randn(B, I), make_state(kind, B, hidden=H)
    name, _, nonlinearity = kind.partition("_")
    options = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
    found = getattr(fastrnn.functional, name.lower().replace("cell", "_cell"))(x, hx, weights, **options)
    for a, b in zip(tensors(found), tensors(theirs(x, hx)), strict=True):
        assert torch.equal(a, b)


@EITHER
def test_double_backward(kind: str, without_kernels: None) -> None:
    def second(module: nn.Module) -> list[Tensor]:
        x = randn(*(() if "Cell" in kind else (T,)), B, I).requires_grad_()
        inputs = [x, *module.parameters()]
        loss = sum(y.sin().sum() for y in call(module, x))
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    for a, b in zip(*map(second, pair(kind, I, H, dtype=torch.float64)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@EITHER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind: str, dtype: torch.dtype, without_kernels: None) -> None:
    ours, theirs = pair(kind, I, H)
    x = randn(*(() if "Cell" in kind else (T,)), B, I, dtype=torch.float32)
    with torch.autocast("cpu", dtype):  # not every processor has an LSTM of float16
        found, expected = (outcome(lambda module=module: call(module, x)) for module in (ours, theirs))
    assert type(found) is type(expected)
    for a, b in zip(found, expected, strict=True):
        assert a == b if isinstance(a, str) else (a.dtype == b.dtype and torch.equal(a, b))


@EITHER
def test_parametrized_and_exchanged_weights(kind: str, without_kernels: None) -> None:
    ours, theirs = pair(kind, I, H, dtype=torch.float64)
    x = randn(*(() if "Cell" in kind else (T,)), B, I)
    name = "weight_hh" if "Cell" in kind else "weight_hh_l0"
    given = {n: randn(*p.shape, seed=9) for n, p in theirs.named_parameters()}
    for a, b in zip(*(torch.utils._pytree.tree_leaves(torch.func.functional_call(m, given, x)) for m in (ours, theirs)),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)
    for module in (ours, theirs):
        nn.utils.parametrizations.weight_norm(module, name)
    for a, b in zip(call(ours, x), call(theirs, x), strict=True):
        assert torch.equal(a, b)


def on_fake(module: nn.Module, device: str) -> nn.Module:
    """The module on a device that is not at hand, in a FakeTensorMode."""
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(torch.empty(p.shape, device=device)))
    return module


@pytest.mark.parametrize("device", ["mps", "xpu", "mtia", "cuda"])
@EITHER
def test_torchs_own_op_is_called(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without such a device at hand: of which device a tensor is, and which op is called."""
    monkeypatch.delitem(fallback.KERNELS, "cuda", raising=False)
    called = []

    class Record(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    cell = "Cell" in kind
    expected = kind.lower().replace("cell", "").split("_")
    op = "_".join(expected) + ("_cell" if cell else "")
    with FakeTensorMode(), torch.no_grad():
        module = on_fake(build(fastrnn, kind, I, H, device="meta"), device)
        x = torch.empty(*(() if cell else (T,)), B, I, device=device)
        with Record(), OnlyTorchsOps():
            found = outcome(lambda: call(module, x))
    assert called.count(op) == 1
    if device not in ("cuda", "xpu"):  # where torch's op asks for the device itself
        assert [y.device.type for y in found] == [device] * len(found)


def test_compiled(without_kernels: None) -> None:
    """What a compiler takes apart are torch's ops, too."""
    ours, theirs = pair("GRU", I, H, 2, bidirectional=True, dtype=torch.float64)
    x = randn(T, B, I)
    for a, b in zip(call(torch.compile(ours, backend="aot_eager"), x), call(theirs, x), strict=True):
        torch.testing.assert_close(a, b)


# ---- dtypes and layouts without kernels ----


def complex_of(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.to(torch.complex128)
        for p in module.parameters():
            p.add_(0.3j * randn(*p.shape, seed=4))
    return module


@EITHER
@pytest.mark.parametrize("stateful", [False, True])
def test_complex(kind: str, stateful: bool) -> None:
    """The module was ours before it became complex; torch.nn has no relu of complex numbers."""
    ours, theirs = (complex_of(module) for module in pair(kind, I, H))
    cell = "Cell" in kind
    x = torch.complex(randn(*(() if cell else (T,)), B, I), randn(*(() if cell else (T,)), B, I, seed=1))
    hx = None
    if stateful:
        hx = map_state(lambda s: s * (1 - 2j), make_state(kind, *(() if cell else (1,)), B, hidden=H))
    if kind.endswith("RELU"):
        for module in (ours, theirs):
            with pytest.raises(RuntimeError, match="clamp is not supported for complex types"):
                module(x, hx)
        return
    assert_same(with_gradients(ours, x, hx), with_gradients(theirs, x, hx))


@pytest.mark.parametrize(
    "option", ["lengths", "resets", "learn_initial_state", "state_batch_first", "return_all_states"]
)
def test_complex_with_options(option: str) -> None:
    """Complex numbers without an imaginary part are what real ones are."""
    made = {} if option in ("lengths", "resets") else {option: True}
    module = build(fastrnn, "LSTM", I, H, 2, bidirectional=True, dtype=torch.float64, **made)
    expected = call(module, randn(T, B, I), **OURS[option])
    found = call(module.to(torch.complex128), randn(T, B, I).to(torch.complex128), **OURS[option])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(torch.complex128))


@EITHER
def test_there_and_back(kind: str) -> None:
    ours, theirs = pair(kind, I, H)
    x = randn(*(() if "Cell" in kind else (T,)), B, I, dtype=torch.float32)
    expected = call(ours, x)
    model = fastrnn.convert(nn.Sequential(theirs))
    model.to(torch.complex64)
    if not kind.endswith("RELU"):
        for a, b in zip(call(model, x.to(torch.complex64)), expected, strict=True):
            torch.testing.assert_close(a.real, b)
    for a, b in zip(call(model.to(torch.float32), x), expected, strict=True):
        assert torch.equal(a, b)


GIVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
}


@pytest.mark.parametrize("layout", GIVEN)
@pytest.mark.parametrize("place", ["input", "weight_ih", "weight_hh"])
@EITHER
def test_layouts(kind: str, place: str, layout: str) -> None:
    """torch.nn takes some of these, and what it says of the others is what is said."""
    cell, change = "Cell" in kind, GIVEN[layout]
    x = randn(*(() if cell else (T,)), B, I, dtype=torch.float32)
    if layout == "csr" and place == "input" and not cell:
        x = x[:, 0]  # CSR has two dimensions: an unbatched sequence
    if layout in ("nested", "jagged") and not cell:
        pytest.skip("layers take the one and refuse the other in words: tests/sequences/test_nested.py")
    if layout in ("nested", "jagged") and place != "input":
        pytest.skip("no parameter is nested")
    modules = pair(kind, I, H)
    if place == "input":
        x = change(x)
    else:
        name = place if cell else f"{place}_l0"
        for module in modules:
            setattr(module, name, nn.Parameter(change(getattr(module, name).detach()), requires_grad=False))
    with torch.no_grad():
        found, expected = (outcome(lambda module=module: call(module, x)) for module in modules)
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, tuple):
        assert found == expected
    else:
        for a, b in zip(found, expected, strict=True):
            assert a.layout == b.layout
            for u, v in zip(*((y.unbind() if y.is_nested else [y]) for y in (a, b)), strict=True):
                torch.testing.assert_close(u, v, equal_nan=True)


# ---- what convert leaves alone ----


@EITHER
def test_convert_leaves_alone_what_has_no_kernels(kind: str) -> None:
    plain, complexes, sparse = (build(nn, kind, I, H) for _ in range(3))
    complexes.to(torch.complex64)
    name = "weight_hh" if "Cell" in kind else "weight_hh_l0"
    setattr(sparse, name, nn.Parameter(getattr(sparse, name).detach().to_sparse(), requires_grad=False))
    with FakeTensorMode():
        elsewhere = on_fake(build(nn, kind, I, H, device="meta"), "mps")
    model = nn.ModuleDict(dict(plain=plain, complexes=complexes, sparse=sparse, elsewhere=elsewhere))
    expected = {
        "complexes": "has parameters of torch.complex64 on cpu, for which there are no kernels",
        "sparse": f"has a {name} of layout torch.sparse_coo, for which there are no kernels",
        "elsewhere": "has parameters of torch.float32 on mps, for which there are no kernels",
    }
    assert fastrnn.unconverted(model) == expected
    with pytest.raises(TypeError, match=r"complexes has parameters of torch\.complex64 on cpu"):
        fastrnn.convert(model, strict=True)
    with pytest.warns(UserWarning, match=r"complexes has parameters of torch\.complex64 on cpu"):
        fastrnn.convert(model)
    assert {n: type(m).__module__.partition(".")[0] for n, m in model.items()} == {
        "plain": "fastrnn", "complexes": "torch", "sparse": "torch", "elsewhere": "torch",
    }  # fmt: skip


@EITHER
def test_convert_takes_modules_on_meta(kind: str) -> None:
    """They get their memory later."""
    module = fastrnn.convert(build(nn, kind, I, H, device="meta"), strict=True)
    assert type(module).__module__.startswith("fastrnn.")
    assert copy.deepcopy(module).to_empty(device="cpu").weight_hh_l0.is_cpu if "Cell" not in kind else True


@pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])
def test_kinds_are_checked_before_a_fall_back(kind):
    """What is no tensor is told by us, also where the other argument is one without kernels."""
    module = build(fastrnn, kind, 3, 4)
    sparse = torch.zeros(1, 2, 4)[0 if "Cell" in kind else slice(None)].to_sparse()
    with pytest.raises(TypeError, match=r"^(input|hx): expected"):
        module((torch.zeros(1),), (sparse, sparse) if kind.startswith("LSTM") else sparse)
