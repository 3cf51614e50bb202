"""``init=`` and ``forget_bias=``: what each parameter is filled with, at first and by reset_parameters()."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastrnn
from tests.helpers import KINDS, build

I, H = 40, 64  # noqa: E741
KIND = pytest.mark.parametrize("kind", KINDS)
GATES = {"LSTM": 4, "GRU": 3}
DEEP: dict[str, Any] = {"num_layers": 2, "bidirectional": True}


def make(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(fastrnn, kind, I, H, **options)


def named(module: nn.Module, stem: str) -> list[Tensor]:
    return [x.detach() for name, x in module.named_parameters() if name.startswith(stem)]


def is_uniform(x: Tensor, low: float, high: float) -> bool:
    """Within the bounds, near them somewhere, and of a uniform's deviation."""
    width = high - low
    inside = low <= x.min() <= low + 0.05 * width and high - 0.05 * width <= x.max() <= high
    return bool(inside and abs(x.std() / (width / math.sqrt(12)) - 1) < 0.1)


def check_orthogonal(module: nn.Module, gates: int) -> None:
    for w in named(module, "weight_hh"):
        for block in w.double().chunk(gates):
            torch.testing.assert_close(block.T @ block, torch.eye(block.shape[1]).double(), rtol=0, atol=1e-5)
        assert gates == 1 or not torch.equal(*w.chunk(gates)[:2])
    for w in named(module, "weight_ih"):
        for block in w.chunk(gates):
            bound = math.sqrt(6 / (block.shape[1] + H))
            assert is_uniform(block, -bound, bound)
    assert all((b == 0).all() for b in named(module, "bias"))


@KIND
def test_orthogonal(kind: str) -> None:
    gates = GATES.get(kind, 1)
    module = make(kind, init="orthogonal", **DEEP)
    check_orthogonal(module, gates)
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for w in module.parameters():
            w.fill_(7)
    module.reset_parameters()
    check_orthogonal(module, gates)
    assert not torch.equal(before["weight_hh_l0"], module.weight_hh_l0)
    check_orthogonal(make(kind, init="orthogonal", bias=False), gates)


def test_orthogonal_with_other_parameters() -> None:
    module = make("LSTM", init="orthogonal", proj_size=24, peephole=True, learn_initial_state=True)
    (hr,) = named(module, "weight_hr")
    torch.testing.assert_close(hr @ hr.T, torch.eye(24), rtol=0, atol=1e-5)
    for block in module.weight_hh_l0.detach().chunk(4):  # [H, 24]: columns of length 1
        torch.testing.assert_close(block.T @ block, torch.eye(24), rtol=0, atol=1e-5)
    assert is_uniform(module.weight_ch_l0.detach(), -(H**-0.5), H**-0.5) and (module.h_0_l0 == 0).all()


def test_identity() -> None:
    module = make("RNN_RELU", init="identity", **DEEP)
    assert len(named(module, "weight_hh")) == 4
    for again in range(2):
        assert all(torch.equal(w, torch.eye(H)) for w in named(module, "weight_hh")), again
        assert all((b == 0).all() for b in named(module, "bias"))
        assert all(is_uniform(w, -(H**-0.5), H**-0.5) for w in named(module, "weight_ih"))
        with torch.no_grad():
            module.weight_hh_l1.fill_(7)
        module.reset_parameters()
    x = torch.rand(50, 2, I)  # the state is kept: h_T is the sum of what came in
    module = make("RNN_RELU", init="identity")
    with torch.no_grad():
        module.weight_ih_l0.abs_()
    torch.testing.assert_close(module(x)[1][0], (x @ module.weight_ih_l0.T).sum(0))


@pytest.mark.parametrize("init", ["torch", "orthogonal"])
@pytest.mark.parametrize("value", [1.0, 0.0, -2])
def test_forget_bias(value: float, init: str) -> None:
    """The sum of both biases' part of f; everything else as without."""
    module, plain = make("LSTM", init=init, forget_bias=value, **DEEP), make("LSTM", init=init, **DEEP)
    for again in range(2):
        for ih, hh in zip(named(module, "bias_ih"), named(module, "bias_hh"), strict=True):
            assert ((ih + hh)[H : 2 * H] == value).all() and (hh[H : 2 * H] == 0).all(), again
        for (name, a), b in zip(module.named_parameters(), plain.parameters(), strict=True):
            if name.startswith("bias"):
                others = torch.arange(4 * H) // H != 1
                assert torch.equal(a[others], b[others])
            else:
                assert torch.equal(a, b)
        for m in (module, plain):
            torch.manual_seed(9)
            m.reset_parameters()


# By kind, how many gates there are, and of each whose bias is set the sign of log(u).
CHRONO = {"LSTM": (4, {1: 1, 0: -1}), "GRU": (3, {1: 1}), "LiGRU": (2, {0: 1}), "MGU": (2, {0: -1})}


@pytest.mark.parametrize("kind", CHRONO)
@pytest.mark.parametrize("longest", [784, 50.5])
def test_chrono(kind: str, longest: float) -> None:
    module = make(kind, init=("chrono", longest), **DEEP)
    plain = make(kind, **DEEP)
    gates, signs = CHRONO[kind]
    for _ in range(2):
        drawn = []
        for ih, hh in zip(named(module, "bias_ih"), named(module, "bias_hh"), strict=True):
            of_both = (ih + hh).unflatten(0, (gates, H))
            first, *others = (sign * of_both[gate] for gate, sign in signs.items())
            drawn.append(first.exp())
            assert all(torch.equal(x, first) for x in others)
            assert (hh.unflatten(0, (gates, H))[list(signs)] == 0).all()
        assert is_uniform(torch.cat(drawn), 1, longest - 1)
        assert not torch.equal(drawn[0], drawn[1])
        with torch.no_grad():
            for b in module.parameters():
                b.zero_()
        module.reset_parameters()
    free = [gate for gate in range(gates) if gate not in signs]
    for name, a in make(kind, init=("chrono", longest), **DEEP).named_parameters():
        a, b = (x.unflatten(0, (gates, -1)) for x in (a, getattr(plain, name)))
        assert torch.equal(a[free], b[free]) if name.startswith("bias") else torch.equal(a, b)


def test_chrono_remembers() -> None:
    """A unit's state decays over about u steps of input 0: f = u / (1 + u)."""
    module = make("LSTM", init=("chrono", 100))
    with torch.no_grad():
        for w in (*named(module, "weight"),):
            w.zero_()
        u = module.bias_ih_l0[H : 2 * H].exp()
        module.bias_ih_l0[2 * H : 3 * H] = module.bias_hh_l0[2 * H : 3 * H] = 0  # g is 0
        _, (_, c) = module(torch.zeros(10, 1, I), (torch.zeros(1, 1, H), torch.ones(1, 1, H)))
    torch.testing.assert_close(c[0, 0], (u / (1 + u)) ** 10)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "orthogonal": ("GRU", {"init": "orthogonal"}),
    "identity": ("RNN_RELU", {"init": "identity"}),
    "forget_bias": ("LSTM", {"init": "orthogonal", "forget_bias": 1.0}),
    "chrono": ("LSTM", {"init": ("chrono", 60)}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_meta_and_dtypes(case: str, dtype: torch.dtype) -> None:
    """From a meta module through to_empty and reset_parameters; half types are drawn as float32 and rounded."""
    kind, options = CASES[case]
    module = build(fastrnn, kind, I, H, device="meta", dtype=dtype, **options)
    assert all(x.is_meta and x.dtype == dtype for x in module.parameters())
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    module.reset_parameters()
    torch.manual_seed(0)
    wide = build(fastrnn, kind, I, H, dtype=torch.float32, **options)
    torch.manual_seed(0)
    wide.reset_parameters()
    filled = ("bias_ih_l0",) if case == "chrono" else ("bias_ih_l0", "weight_hh_l0")
    limit = {torch.float64: 5.0, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]  # float64 draws other numbers
    for x, y in ((getattr(module, name)[:H].double(), getattr(wide, name)[:H]) for name in filled):
        assert (x - y).abs().max() <= limit * (1 + y.abs().max())
    assert {x.dtype for x in module.parameters()} == {dtype}
    assert not any(x.isnan().any() for x in module.parameters())
    if case == "forget_bias":
        assert (module.bias_ih_l0[H : 2 * H] == 1).all()
    if case == "identity":
        assert torch.equal(module.weight_hh_l0, torch.eye(H, dtype=dtype))


def test_parametrized() -> None:
    """Through the parametrization's right inverse, where it has one."""
    module = make("LSTM", init="orthogonal", forget_bias=1.0)
    parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original1.fill_(7)
    module.reset_parameters()
    for block in module.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(block.T @ block, torch.eye(H), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_copies_repr_and_conversion(case: str) -> None:
    """Kept by copies, for their reset_parameters(). A call is torch.nn's, so that the way back is free."""
    kind, options = CASES[case]
    module = make(kind, **options)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        found = []
        for m in (module, again):
            torch.manual_seed(2)
            m.reset_parameters()
            found.append(torch.cat([x.detach().flatten() for x in m.parameters()]))
        assert torch.equal(*found)
    assert all(f"{name}={value!r}" in repr(module) for name, value in options.items())
    assert not {"init", "forget_bias"} & set(vars(make(kind, init="torch")))
    x = torch.randn(5, 2, I)
    want = module(x)[0]
    theirs = fastrnn.to_torch(module)
    assert type(theirs).__module__.startswith("torch.nn")
    torch.testing.assert_close(theirs(x)[0], want)


@pytest.mark.parametrize(
    ("kind", "options", "error", "text"),
    [
        ("LSTM", {"init": "xavier"}, ValueError, r"init should be 'torch', .* or \('chrono', T_max\), got 'xavier'"),
        ("LSTM", {"init": "chrono"}, ValueError, r"init should be .*\('chrono', T_max\), got 'chrono'"),
        ("LSTM", {"init": ("chrono",)}, ValueError, r"init should be .*, got \('chrono',\)"),
        ("LSTM", {"init": ("torch", 3)}, ValueError, r"init should be .*, got \('torch', 3\)"),
        ("LSTM", {"init": 3}, TypeError, "init should be .*, got: int"),
        ("LSTM", {"init": ("chrono", 1)}, ValueError, r"T_max of .* should be a number of steps, 2 or more, got 1"),
        ("LSTM", {"init": ("chrono", "9")}, ValueError, "T_max of .*, got '9'"),
        ("LSTM", {"init": ("chrono", math.nan)}, ValueError, "T_max of .*, got nan"),
        ("RNN_TANH", {"init": ("chrono", 9)}, ValueError, "only supported for LSTM, GRU, LiGRU, MGU"),
        ("RNN_TANH", {"init": "identity"}, ValueError, "only supported for RNN with .*'relu'.*, got RNN with 'tanh'"),
        ("GRU", {"init": "identity"}, ValueError, "only supported for RNN with .*'relu'.*, got GRU"),
        ("GRU", {"forget_bias": 1.0}, ValueError, "forget_bias argument is only supported for LSTM"),
        ("RNN_TANH", {"forget_bias": 0.0}, ValueError, "forget_bias argument is only supported for LSTM"),
        ("LSTM", {"forget_bias": "1"}, TypeError, "forget_bias should be of type float or None, got: str"),
        ("LSTM", {"forget_bias": True}, TypeError, "forget_bias should be of type float or None, got: bool"),
        ("LSTM", {"forget_bias": math.inf}, ValueError, "forget_bias should be a finite number, got inf"),
        ("LSTM", {"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias needs biases to set, got bias=False"),
        ("GRU", {"init": ("chrono", 9), "bias": False}, ValueError, "chrono.* needs biases to set, got bias=False"),
        ("LSTM", {"init": ("chrono", 9), "forget_bias": 1.0}, ValueError, "forget_bias should be None with init="),
    ],
)
def test_errors(kind: str, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make(kind, **options)
