"""``_flat_weights``: what code for torch.nn's layers puts there is what ours compute with, and as long as theirs do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastrnn
from fastrnn import _C
from tests.helpers import KINDS, assert_equal, build, pair, randn, weighted

KIND = pytest.mark.parametrize("kind", KINDS)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False, "batch_first": True, "num_layers": 2},
}


def scaled(module: nn.Module, factor: float = 2.0) -> list[Tensor]:
    """Of the parameters, with a history."""
    return [factor * getattr(module, name) for name in module._flat_weights_names]


def write_one(module: nn.Module) -> None:
    module._flat_weights[1] = 2 * module.weight_hh_l0


def write_all(module: nn.Module) -> None:
    module._flat_weights = scaled(module)


def write_slice(module: nn.Module) -> None:
    module._flat_weights[:2] = scaled(module)[:2]


def fill(module: nn.Module) -> None:
    weights = scaled(module)
    module._flat_weights = []
    for weight in weights[:2]:
        module._flat_weights.append(weight)
    module._flat_weights += weights[2:]


def write_into_a_list_of_ones_own(module: nn.Module) -> None:
    weights = scaled(module)
    module._flat_weights = weights
    weights[0] = 3 * module.weight_ih_l0


def write_instead_of_parameters(module: nn.Module) -> None:
    """Generated weights: the names are gone, the originals live elsewhere."""
    weights = scaled(module)
    for name in module._flat_weights_names:
        delattr(module, name)
    module._flat_weights = weights


# What comes after a write, and counts from then on, for every weight.


def then_set_by_name(module: nn.Module) -> None:
    write_all(module)
    module.weight_hh_l0 = nn.Parameter(3 * module.weight_hh_l0.detach())


def then_set_in_the_dictionary(module: nn.Module) -> None:
    write_all(module)
    module._parameters["weight_ih_l0"] = nn.Parameter(3 * module.weight_ih_l0.detach())


def then_reset(module: nn.Module) -> None:
    write_all(module)
    module._init_flat_weights()


def then_moved(module: nn.Module) -> None:
    write_all(module)
    module.double()


def then_put_back(module: nn.Module) -> None:
    before = module._flat_weights
    write_all(module)
    module._flat_weights = before


def then_loaded_in_place(module: nn.Module) -> None:
    """The parameters stay, so what was written does."""
    write_all(module)
    module.load_state_dict({name: 5 * x for name, x in module.state_dict().items()})


def by_both_ways(module: nn.Module) -> None:
    """As AWD-LSTMs of several libraries do."""
    module._parameters["weight_hh_l0"] = 2 * module.weight_hh_l0
    module._flat_weights[1] = module._parameters["weight_hh_l0"]


WRITES = [
    write_one, write_all, write_slice, fill, write_into_a_list_of_ones_own, write_instead_of_parameters,
    then_set_by_name, then_set_in_the_dictionary, then_reset, then_moved, then_put_back, then_loaded_in_place,
    by_both_ways,
]  # fmt: skip


def results(module: nn.Module, leaves: list[Tensor], training: bool) -> dict[str, Tensor]:
    x = randn(5, 3, 4)
    with torch.set_grad_enabled(training):
        output, finals = module(x)
    finals = finals if isinstance(finals, tuple) else (finals,)
    found = dict(zip(("output", "h_n", "c_n"), (output, *finals), strict=False))
    if training:
        grads = torch.autograd.grad(weighted(list(found.values())), leaves, allow_unused=True, retain_graph=True)
        found |= {f"grad {i}": torch.zeros(()) if g is None else g for i, g in enumerate(grads)}
    return {name: x.detach() for name, x in found.items()}


@KIND
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_what_is_written_counts(kind: str, options: str, write: Callable[[nn.Module], None]) -> None:
    """The same results and gradients as of torch.nn's layer treated so; twice, for a call may forget what it finds."""
    for training in (False, True):
        found = []
        for module in pair(kind, 4, 6, dtype=torch.float64, **OPTIONS[options]):
            leaves = list(module.parameters())
            write(module)
            leaves += [p for p in module.parameters() if all(p is not x for x in leaves)]
            found.append([results(module, leaves, training) for _ in range(2)])
        for ours, theirs in zip(*found, strict=True):
            assert_equal(ours, theirs)
        plain = build(fastrnn, kind, 4, 6, dtype=torch.float64, **OPTIONS[options])
        assert not torch.equal(found[0][0]["output"], results(plain, [], False)["output"])


@KIND
def test_for_one_call(kind: str) -> None:
    """functional_call's tensors count, and what was written before is forgotten."""
    found = []
    for module in pair(kind, 4, 6, dtype=torch.float64):
        write_all(module)
        other = {name: 3 * x for name, x in module.named_parameters()}
        called = torch.func.functional_call(module, other, (randn(5, 3, 4),))[0]
        found.append({"called": called.detach(), **results(module, list(module.parameters()), True)})
    assert_equal(*found)


@KIND
def test_subclass_that_drops_weights(kind: str) -> None:
    """A DropConnect layer derived from torch.nn's, made where that name is ours."""

    def derived(base: type[nn.Module]) -> type[nn.Module]:
        class Dropped(base):  # type: ignore[misc,valid-type]
            def forward(self, *args: Any) -> Any:
                kept = self._flat_weights
                self._flat_weights = [
                    F.dropout(w, 0.5, self.training) if "weight_hh" in name else w
                    for name, w in zip(self._flat_weights_names, kept, strict=True)
                ]
                self.flatten_parameters()
                found = super().forward(*args)
                self._flat_weights = kept
                return found

        return Dropped

    name, _, nonlinearity = kind.partition("_")
    options = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
    with fastrnn.patch():
        ours = derived(getattr(nn, name))(4, 6, dtype=torch.float64, **options)
    theirs = derived(getattr(nn, name))(4, 6, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, getattr(fastrnn, name))
    for train in (True, False):
        found = []
        for module in (ours, theirs):
            torch.manual_seed(3)
            found.append(results(module.train(train), list(module.parameters()), True))
        assert_equal(*found)


@KIND
def test_calls_made_by_cpp_take_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, module_forward = [], _C.module_forward
    monkeypatch.setattr(_C, "module_forward", lambda *args: taken.append(module_forward(*args)) or taken[-1])
    module = build(fastrnn, kind, 4, 6)
    write_all(module)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            module(randn(5, 3, 4).float())
    assert [type(x) for x in taken] == [tuple, tuple]


@KIND
def test_copies_and_swaps_keep_them(kind: str) -> None:
    x = randn(5, 3, 4).float()
    for make in (fastrnn, nn):
        module = build(make, kind, 4, 6)
        module._flat_weights[1] = 2 * module.weight_hh_l0.detach()
        expected = module(x)[0]
        twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))] if make is fastrnn else []
        twins += [fastrnn.convert(module) if make is nn else fastrnn.to_torch(module)]
        for twin in twins:
            torch.testing.assert_close(twin(x)[0], expected)
            assert list(twin.state_dict()) == list(module.state_dict())


@KIND
def test_other_ways_of_a_call(kind: str) -> None:
    """Compiled, half, quantized, with an option of ours, and a parametrized module, which counts by name."""
    module, x = build(fastrnn, kind, 4, 6), randn(5, 3, 4).float()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight_hh_l0.mul_(2)
    module._flat_weights[1] = 2 * module.weight_hh_l0.detach()
    lengths = torch.tensor([5, 2, 3])
    calls: list[Callable[[nn.Module], Tensor]] = [
        lambda m: m(x, lengths=lengths)[0],
        lambda m: torch.compile(m, backend="eager", fullgraph=True)(x)[0],
        lambda m: fastrnn.quantize(m)(x)[0],
        lambda m: torch.export.export(m, (x,)).module()(x)[0],
    ]
    for call in calls:
        assert torch.equal(call(module), call(twin))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x)[0], twin(x)[0])
    expected = twin(x)[0]
    parametrizations.orthogonal(module, "weight_ih_l0")
    assert not torch.equal(module(x)[0], expected)
    assert module._flat_weights[1] is module.weight_hh_l0


@KIND
def test_bad_lists(kind: str) -> None:
    module, x = build(fastrnn, kind, 4, 6), randn(5, 3, 4).float()
    module._flat_weights.pop()
    with pytest.raises(RuntimeError, match=r"^_flat_weights: expected 4 tensors \(weight_ih_l0, .*\), got 3$"):
        module(x)
    module._flat_weights = [*module._flat_weights, None]
    with pytest.raises(TypeError, match=r"^_flat_weights\[3\] \(bias_hh_l0\): expected a tensor, got NoneType$"):
        module(x)
    module._init_flat_weights()
    quantized = fastrnn.quantize(module)
    with pytest.raises(RuntimeError, match=r"^_flat_weights: expected none \(quantized weights are buffers\), got 4$"):
        quantized._flat_weights = scaled(module)


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_that_is_held_sees_other_writes(kind):
    """A write into it leaves what was written through another one, as there is but one of torch.nn's."""
    ours, theirs = pair(kind, 3, 4)
    for module in (ours, theirs):
        held = module._flat_weights
        module._flat_weights[0] = 0 * module.weight_ih_l0
        held[1] = 0 * module.weight_hh_l0
    x = randn(4, 2, 3, dtype=torch.float32)
    assert torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-6)
    assert not any(w.any() for w in ours._flat_weights[:2])
