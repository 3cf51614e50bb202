"""What surrounds the modules' results: constructors, parameters, repr, pickling, conversion, parametrizations."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import typing
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn
from fastrnn import functional
from fastrnn.functional import LayerWeights
from tests.helpers import (
    CELL_KINDS,
    KINDS,
    assert_equal,
    build,
    evaluate,
    evaluate_cell,
    leaf,
    make_state,
    map_state,
    pair,
    randn,
    tensors,
    weighted,
)

KIND = pytest.mark.parametrize("kind", KINDS)
CELL_KIND = pytest.mark.parametrize("kind", CELL_KINDS)
ANY_KIND = pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])
CLASSES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
CLASS = pytest.mark.parametrize("name", CLASSES)

# Constructor arguments that differ in every attribute at least once.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    *((kind, {"num_layers": 3, "bidirectional": True}) for kind in KINDS),
    *((kind, {"bias": False, "batch_first": True}) for kind in KINDS),
    *((kind, {"num_layers": 2, "dropout": 0.1, "dtype": torch.float64}) for kind in KINDS),
    ("LSTM", {"proj_size": 2}),
    (
        "LSTM",
        {
            "proj_size": 2,
            "num_layers": 3,
            "bias": False,
            "batch_first": True,
            "dropout": 0.1,
            "bidirectional": True,
        },
    ),
    *((kind, {}) for kind in CELL_KINDS),
    *((kind, {"bias": False}) for kind in CELL_KINDS),
]
OPTION = pytest.mark.parametrize(
    ("kind", "options"), OPTIONS, ids=[f"{k}-{'-'.join(o) or 'plain'}" for k, o in OPTIONS]
)


def run(module: nn.Module, input: Tensor | None = None) -> dict[str, Tensor]:
    """Results and gradients of a module or cell with 4 features."""
    dtype = next(module.parameters()).dtype
    if isinstance(module, nn.RNNBase):
        return evaluate(module, randn(5, 3, 4, dtype=dtype) if input is None else input)
    return evaluate_cell(module, randn(3, 4, dtype=dtype) if input is None else input)


def stored(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# ---- classes and constructors ----


@CLASS
def test_classes(name: str) -> None:
    ours, theirs = getattr(fastrnn, name), getattr(nn, name)
    assert issubclass(ours, theirs.__mro__[1])  # RNNBase or RNNCellBase
    assert not issubclass(ours, theirs)  # torch.compile refuses torch.nn's own by class
    assert ours.__name__ == name
    assert "Cell" in name or ours.__constants__ == theirs.__constants__
    assert set(dir(theirs)) <= set(dir(ours))


@CLASS
def test_signatures(name: str) -> None:
    """Torch's arguments, in its order and with its defaults; what is added is keyword-only."""

    def shape(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        declared, *_ = typing.get_overloads(function) or [function]
        return [(p.name, p.kind, p.default) for p in inspect.signature(declared).parameters.values()]

    ours, theirs = getattr(fastrnn, name), getattr(nn, name)
    for method in ("__init__", "forward"):
        expected = shape(getattr(theirs, method))
        actual = [(p.name, p.kind, p.default) for p in inspect.signature(getattr(ours, method)).parameters.values()]
        added = [p for p in actual if p not in expected]
        assert [p for p in actual if p in expected] == expected
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in added)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LSTM", (4, 6, 2, False, True, 0.25, True, 3, "cpu", torch.float64)),
        ("GRU", (4, 6, 2, False, True, 0.25, True, 0, "cpu", torch.float64)),
        ("RNN", (4, 6, 2, "relu", False, True, 0.25, True, 0, "cpu", torch.float64)),
        ("LSTMCell", (4, 6, False, "cpu", torch.float64)),
        ("GRUCell", (4, 6, False, "cpu", torch.float64)),
        ("RNNCell", (4, 6, False, "relu", "cpu", torch.float64)),
    ],
)
def test_positional_arguments(name: str, arguments: tuple[Any, ...]) -> None:
    for count in range(2, len(arguments) + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours, theirs = getattr(fastrnn, name)(*arguments[:count]), getattr(nn, name)(*arguments[:count])
        assert public(ours) == public(theirs)
        assert [x.shape for x in ours.parameters()] == [x.shape for x in theirs.parameters()]
        assert {x.dtype for x in ours.parameters()} == {x.dtype for x in theirs.parameters()}


def public(module: nn.Module) -> dict[str, Any]:
    """Plain attributes as torch.nn's users read them."""
    return {k: v for k, v in vars(module).items() if not k.startswith("_") or k in ("_all_weights",)}


@OPTION
def test_attributes_and_repr(kind: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(kind, 4, 6, **options)
    assert public(ours) == public(theirs)
    assert {k: type(v) for k, v in public(ours).items()} == {k: type(v) for k, v in public(theirs).items()}
    assert repr(ours) == repr(theirs)
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(theirs))


def test_repr_of_cells_names_the_nonlinearity() -> None:
    assert repr(fastrnn.RNNCell(4, 6, nonlinearity="relu")) == "RNNCell(4, 6, nonlinearity=relu)"


@KIND
def test_helper_methods(kind: str) -> None:
    """Those that subclasses of torch.nn's modules call."""
    ours, theirs = pair(kind, 4, 6, 2, bidirectional=True, **({"proj_size": 2} if kind == "LSTM" else {}))
    input, sizes = randn(5, 3, 4, dtype=torch.float32), torch.tensor([3, 2])
    hx = make_state(kind, 4, 3, hidden=6, proj=2 if kind == "LSTM" else 0)
    order = torch.tensor([2, 0, 1])
    for batch_sizes in (None, sizes):
        assert ours.get_expected_hidden_size(input, batch_sizes) == theirs.get_expected_hidden_size(input, batch_sizes)
        if kind == "LSTM":
            assert ours.get_expected_cell_size(input, batch_sizes) == theirs.get_expected_cell_size(input, batch_sizes)
    for module in (ours, theirs):
        assert module.check_input(input, None) is None
        assert module.check_forward_args(input, hx, None) is None
    for permutation in (None, order):
        for a, b in zip(
            tensors(ours.permute_hidden(hx, permutation)),
            tensors(theirs.permute_hidden(hx, permutation)),
            strict=True,
        ):
            assert torch.equal(a, b)


# ---- parameters ----


@OPTION
def test_state_dict_both_ways(kind: str, options: dict[str, Any]) -> None:
    ours, theirs = build(fastrnn, kind, 4, 6, **options), build(nn, kind, 4, 6, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == []
    for source, target in ((ours, theirs), (theirs, ours)):
        nn.init.normal_(next(iter(source.parameters())))
        assert target.load_state_dict(source.state_dict(), strict=True) == ([], [])
        for a, b in zip(source.parameters(), target.parameters(), strict=True):
            assert torch.equal(a, b)


@ANY_KIND
def test_wrong_state_dict(kind: str) -> None:
    errors = []
    for module in pair(kind, 4, 6):
        state = {f"{k}_x" if k.startswith("bias_hh") else k: v[:-1] for k, v in module.state_dict().items()}
        with pytest.raises(RuntimeError) as info:
            module.load_state_dict(state)
        errors.append(str(info.value))
    assert errors[0] == errors[1]


@OPTION
def test_initialisation(kind: str, options: dict[str, Any]) -> None:
    states = []
    for space in (fastrnn, nn):
        torch.manual_seed(11)
        module = build(space, kind, 4, 6, **options)
        states.append({f"first {k}": v.clone() for k, v in module.state_dict().items()})
        module.reset_parameters()
        states[-1].update(module.state_dict())
    assert_equal(states[0], states[1], tolerance=0.0)


@KIND
@pytest.mark.parametrize("bidirectional", [False, True])
def test_weight_lists(kind: str, bidirectional: bool) -> None:
    ours, theirs = pair(kind, 4, 6, 2, bidirectional=bidirectional)
    assert ours._all_weights == theirs._all_weights
    assert ours._flat_weights_names == theirs._flat_weights_names
    named = dict(ours.named_parameters())
    assert [[id(named[n]) for n in names] for names in ours._all_weights] == [
        [id(p) for p in weights] for weights in ours.all_weights
    ]
    assert [id(p) for p in ours._flat_weights] == [id(named[n]) for n in ours._flat_weights_names]


@KIND
def test_flatten_parameters_does_nothing(kind: str) -> None:
    module = build(fastrnn, kind, 4, 6, 2)
    before = {n: (id(p), p.data_ptr(), p._version) for n, p in module.named_parameters()}
    assert module.flatten_parameters() is None
    assert before == {n: (id(p), p.data_ptr(), p._version) for n, p in module.named_parameters()}


# ---- copies ----

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "oldest pickle": lambda module: pickle.loads(pickle.dumps(module, protocol=2)),
    "save and load": stored,
}


@OPTION
@pytest.mark.parametrize("how", COPIES)
def test_copies(kind: str, options: dict[str, Any], how: str) -> None:
    module = build(fastrnn, kind, 4, 6, **options).eval()
    expected = run(module)
    twin = COPIES[how](module)
    assert type(twin) is type(module)
    assert public(twin) == public(module)
    assert not {x.data_ptr() for x in twin.parameters()} & {x.data_ptr() for x in module.parameters()}
    assert_equal(run(twin), expected, tolerance=0.0)
    with torch.no_grad():  # the twin reads its own parameters
        for parameter in twin.parameters():
            parameter.zero_()
    assert_equal(run(module), expected, tolerance=0.0)
    assert not next(iter(run(twin).values())).any()


@KIND
def test_copies_after_a_parameter_was_replaced(kind: str) -> None:
    module = build(fastrnn, kind, 4, 6)
    module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), stored(module)):
        assert_equal(run(twin), run(module), tolerance=0.0)
        assert twin._flat_weights[1] is twin.weight_hh_l0


@pytest.mark.parametrize("missing", ["proj_size", "names", "both"])
@pytest.mark.parametrize("bias", [True, False])
@KIND
def test_old_pickles(kind: str, bias: bool, missing: str) -> None:
    """Before 1.8 there was no proj_size; before 0.4 the lists held parameters, not names."""
    results = []
    for module in pair(kind, 4, 6, 2, bias=bias, bidirectional=True):
        state = dict(module.__getstate__())
        if missing != "names":
            del state["proj_size"]
        if missing != "proj_size":
            state["_all_weights"] = module.all_weights
        old = type(module).__new__(type(module))
        old.__setstate__(state)
        assert old.proj_size == 0
        assert old._all_weights == module._all_weights
        assert old._flat_weights_names == module._flat_weights_names
        results.append(run(old))
    assert_equal(*results)


@KIND
def test_replicas_share_no_lists(kind: str) -> None:
    """What torch.nn.DataParallel does to a module."""
    module = build(fastrnn, kind, 4, 6)
    expected = run(module)
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters():
        setattr(replica, name, parameter.detach() * 2)
    assert replica._flat_weights is not module._flat_weights
    assert_equal(run(module), expected, tolerance=0.0)
    output, _ = replica(randn(5, 3, 4, dtype=torch.float32))
    doubled = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    assert torch.equal(output, run(doubled)["output"])


@ANY_KIND
def test_share_memory(kind: str) -> None:
    module = build(fastrnn, kind, 4, 6)
    expected = run(module)
    module.share_memory()
    assert all(x.is_shared() for x in module.parameters())
    assert_equal(run(module), expected, tolerance=0.0)


# ---- other devices and dtypes ----


def flat(results: Any) -> list[Tensor]:
    return [x for each in tensors(results) for x in tensors(each)]


@OPTION
def test_meta_device(kind: str, options: dict[str, Any]) -> None:
    """Shapes without data; then memory, then parameters."""
    real = build(fastrnn, kind, 4, 6, **options).eval()
    module = build(fastrnn, kind, 4, 6, device="meta", **options).eval()
    assert all(x.is_meta for x in module.parameters())
    leading = (3,) if "Cell" in kind else (5, 3)
    input = randn(*leading, 4, dtype=options.get("dtype", torch.float32))
    for actual, expected in zip(flat(module(input.to("meta"))), flat(real(input)), strict=True):
        assert actual.is_meta
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    filled = copy.deepcopy(module).to_empty(device="cpu")
    filled.load_state_dict(real.state_dict())
    assert_equal(run(filled), run(real), tolerance=0.0)
    module.load_state_dict(real.state_dict(), assign=True)
    assert_equal(run(module), run(real), tolerance=0.0)


@ANY_KIND
def test_meta_gradients(kind: str) -> None:
    module = build(fastrnn, kind, 4, 6, device="meta")
    input = torch.empty((3, 4) if "Cell" in kind else (5, 3, 4), device="meta", requires_grad=True)
    first, *_ = tensors(module(input))
    first.sum().backward()
    for x in (input, *module.parameters()):
        assert x.grad is not None
        assert x.grad.is_meta
        assert x.grad.shape == x.shape


@ANY_KIND
@pytest.mark.parametrize("how", ["double", "to", "to tensor", "type"])
def test_conversion_to_double(kind: str, how: str) -> None:
    conversions: dict[str, Callable[[nn.Module], nn.Module]] = {
        "double": lambda m: m.double(),
        "to": lambda m: m.to(torch.float64),
        "to tensor": lambda m: m.to(torch.empty(0, dtype=torch.float64)),
        "type": lambda m: m.type(torch.float64),
    }
    ours, theirs = (conversions[how](m) for m in pair(kind, 4, 6))
    assert {x.dtype for x in ours.parameters()} == {torch.float64}
    assert_equal(run(ours), run(theirs))


@ANY_KIND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_to_half(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = (m.to(dtype) for m in pair(kind, 4, 6))
    # Four units in the last place of values near 1, as each rounds in its own places. Bounds: kernels/test_accuracy.py.
    assert_equal(run(ours), run(theirs), tolerance=4 * torch.finfo(dtype).eps)


@KIND
def test_applied_functions_reach_the_parameters(kind: str) -> None:
    module = build(fastrnn, kind, 4, 6)
    module.apply(lambda m: [nn.init.constant_(x, 0.1) for x in m.parameters()])
    assert run(module)["output"].unique().numel() > 1
    module.to(torch.float64)
    assert [id(x) for x in module._flat_weights] == [id(x) for x in module.parameters()]


# ---- what is changed after construction ----


@KIND
def test_dropout_may_be_reassigned(kind: str) -> None:
    results = []
    for module in pair(kind, 4, 6, 2, dtype=torch.float64):
        found = [run(module)]
        for dropout in (1.0, 0.0, 0.5):
            module.dropout = dropout
            torch.manual_seed(3)
            found.append(run(module))
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours, theirs)
    plain, dropped, again, half = results[0]
    assert_equal(again, plain, tolerance=0.0)
    assert not torch.equal(dropped["output"], plain["output"])
    assert not torch.equal(half["output"], plain["output"])


@KIND
def test_parameter_deleted_and_reassigned(kind: str) -> None:
    """A parameter, a plain tensor with a history of its own, and a parameter again."""
    results = []
    for module in pair(kind, 4, 6, dtype=torch.float64):
        weight = module.weight_hh_l0
        del module.weight_hh_l0
        scale = leaf(torch.full((), 0.5, dtype=torch.float64))
        module.weight_hh_l0 = weight * scale
        output, _ = module(randn(5, 3, 4))
        weighted([output]).backward()
        found = {"output": output.detach(), "scale": scale.grad, "weight": weight.grad}
        assert module._flat_weights[1] is module.weight_hh_l0
        del module.weight_hh_l0
        module.weight_hh_l0 = nn.Parameter(weight.detach() * 0.25)
        found.update({f"again {k}": v for k, v in sorted(run(module).items())})
        results.append(found)
    assert_equal(*results)


@KIND
def test_missing_parameter(kind: str) -> None:
    module = build(fastrnn, kind, 4, 6)
    del module.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        module(torch.zeros(5, 3, 4))


@KIND
def test_tied_parameters(kind: str) -> None:
    results = []
    for module in pair(kind, 6, 6, 2, dtype=torch.float64):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_ih_l0
        results.append(run(module, randn(5, 3, 6)))
    assert_equal(*results)


@KIND
def test_old_weight_norm(kind: str) -> None:
    results = []
    for module in pair(kind, 4, 6, 2, dtype=torch.float64):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for name in ("weight_hh_l0", "weight_ih_l1"):
                nn.utils.weight_norm(module, name)
        found = run(module)
        with torch.no_grad():
            module.weight_hh_l0_g.mul_(0.5)  # used by the next forward
        found.update({f"scaled {k}": v for k, v in run(module).items()})
        for name in ("weight_hh_l0", "weight_ih_l1"):
            nn.utils.remove_weight_norm(module, name)
        found.update({f"removed {k}": v for k, v in sorted(run(module).items())})
        results.append(found)
    assert_equal(*results)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@ANY_KIND
@pytest.mark.parametrize("cached", [False, True])
def test_parametrizations(kind: str, cached: bool) -> None:
    suffix = "" if "Cell" in kind else "_l0"
    results = []
    for module in pair(kind, 4, 6, dtype=torch.float64):
        parametrizations.weight_norm(module, f"weight_hh{suffix}")
        parametrize.register_parametrization(module, f"weight_ih{suffix}", Halved())
        parametrize.register_parametrization(module, f"bias_hh{suffix}", Halved())
        if cached:
            with parametrize.cached():
                found = run(module)
        else:
            found = run(module)
        if type(module).__module__.startswith("fastrnn"):  # torch's cannot be copied any more after a forward
            assert_equal(run(copy.deepcopy(module)), found, tolerance=0.0)
        for name in ("weight_hh", "weight_ih", "bias_hh"):
            parametrize.remove_parametrizations(module, f"{name}{suffix}")
        found.update({f"removed {k}": v for k, v in sorted(run(module).items())})
        results.append(found)
    assert_equal(*results)


@KIND
def test_pruning(kind: str) -> None:
    results = []
    for module in pair(kind, 4, 6, dtype=torch.float64):
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
        results.append(run(module))
    assert_equal(*results)


@KIND
def test_in_place_updates_are_seen(kind: str) -> None:
    """No copy of the weights is kept past a call."""
    ours, theirs = pair(kind, 4, 6, dtype=torch.float64)
    for change in (lambda x: x.mul_(0.5), lambda x: x.data.mul_(0.5), lambda x: x.detach().add_(0.1)):
        for module in (ours, theirs):
            run(module)
            with torch.no_grad():
                for parameter in module.parameters():
                    change(parameter)
        assert_equal(run(ours), run(theirs))


@KIND
def test_training_step_equals_torchs(kind: str) -> None:
    results = []
    for module in pair(kind, 4, 6, 2, bidirectional=True, dtype=torch.float64):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for step in range(5):
            optimizer.zero_grad()
            weighted([module(randn(5, 3, 4, seed=step))[0]]).backward()
            optimizer.step()
        results.append({name: x.detach() for name, x in module.named_parameters()})
    assert_equal(*results)


def test_subclasses() -> None:
    class Mine(fastrnn.LSTM):
        def __init__(self, size: int) -> None:
            super().__init__(size, size, batch_first=True)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)[0] * self.scale

    module = Mine(4)
    assert module(torch.zeros(2, 3, 4)).shape == (2, 3, 4)
    assert list(module.state_dict())[-1] == "scale"


@ANY_KIND
def test_hooks(kind: str) -> None:
    seen: list[str] = []
    module = build(fastrnn, kind, 4, 6)
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    run(module)
    assert seen == ["before", "after", "backward"]


# ---- the functional forms ----


def layer_weights(module: nn.Module) -> list[list[LayerWeights]]:
    def of(layer: int, suffix: str) -> LayerWeights:
        names = {name: f"{name}_l{layer}{suffix}" for name in LayerWeights._fields}
        return LayerWeights(**{name: getattr(module, full, None) for name, full in names.items()})

    suffixes = ("", "_reverse") if module.bidirectional else ("",)
    return [[of(layer, suffix) for suffix in suffixes] for layer in range(module.num_layers)]


def call(kind: str, *args: Any, **options: Any) -> Any:
    name, _, nonlinearity = kind.partition("_")
    if nonlinearity:
        options["nonlinearity"] = nonlinearity.lower()
    return getattr(functional, name.lower())(*args, **options)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "LSTM-proj"])
def test_functional(kind: str, stateful: bool, bidirectional: bool, sequences: bool, training: bool) -> None:
    kind, _, projected = kind.partition("-")
    proj = 2 if projected else 0
    options = {"proj_size": proj} if proj else {}
    module = build(fastrnn, kind, 4, 6, 2, dropout=0.5, bidirectional=bidirectional, dtype=torch.float64, **options)
    input = randn(5, 3, 4)
    hx = make_state(kind, 2 * (1 + bidirectional), 3, hidden=6, proj=proj) if stateful else None
    extra: dict[str, Any] = {}
    if sequences:
        extra["lengths"] = torch.tensor([5, 2, 4])
        extra["resets"] = randn(5, 3, seed=4) > 0.5
        extra["reset_state"] = map_state(lambda x: x * 2, hx)
    torch.manual_seed(2)
    expected = module.train(training)(input, hx, **extra)
    torch.manual_seed(2)
    actual = call(kind, input, hx, layer_weights(module), dropout=0.5, training=training, **extra)
    for a, b in zip((actual[0], *tensors(actual[1])), (expected[0], *tensors(expected[1])), strict=True):
        assert torch.equal(a, b)


@CELL_KIND
def test_functional_cells(kind: str) -> None:
    cell = build(fastrnn, kind, 4, 6, dtype=torch.float64)
    input, hx = randn(3, 4), make_state(kind, 3, hidden=6)
    weights = LayerWeights(cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    name, _, nonlinearity = kind.partition("_")
    extra = (nonlinearity.lower(),) if nonlinearity else ()
    function = getattr(functional, f"{name.removesuffix('Cell').lower()}_cell")
    for a, b in zip(tensors(function(input, hx, weights, *extra)), tensors(cell(input, hx)), strict=True):
        assert torch.equal(a, b)
