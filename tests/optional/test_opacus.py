"""Opacus on models with our modules: per-sample gradients in each of its modes, ghost clipping, a private training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

import fastrnn

from ..helpers import CELL_KINDS, KINDS, build, gradient, make_state, pair, randn, tensors, weighted
from .packages import needs

opacus = needs("opacus")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Opacus' own
T, B, I, H = 6, 4, 3, 5  # noqa: E741
MODES = ["hooks", "functorch", "ew"]


class Model(nn.Module):
    """Layers below and above; the loss sees every output and the final states."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.below, self.rnn = nn.Linear(I, I), rnn
        self.head = nn.Linear(rnn.hidden_size * (1 + getattr(rnn, "bidirectional", False)), 2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, I] -> [B, n]."""
        x = self.below(x)
        if isinstance(self.rnn, torch.nn.modules.rnn.RNNCellBase):
            state = None
            for each in x.unbind(1):
                state = self.rnn(each, state)
            return self.head(tensors(state)[0])
        output, finals = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))
        output = output if self.rnn.batch_first else output.transpose(0, 1)
        states = [s.transpose(0, 1).flatten(1) for s in tensors(finals)]
        return torch.cat([self.head(output).flatten(1), *states], 1)


def models(kind: str, **options: Any) -> tuple[Model, Model]:
    ours, theirs = (Model(m) for m in pair(kind, I, H, dtype=torch.float64, **options))
    for a, b in zip(ours.children(), theirs.children(), strict=True):
        a.double().load_state_dict(b.double().state_dict())
    return ours, theirs


def loss_of(results: Tensor) -> Tensor:
    return torch.stack([weighted([x]) for x in results]).sum()


def looped(module: nn.Module, loss_of_sample: Callable[[int], Tensor]) -> dict[str, Tensor]:
    each = []
    for b in range(B):
        module.zero_grad()
        loss_of_sample(b).backward()
        each.append({name: gradient(p).clone() for name, p in module.named_parameters()})
    return {name: torch.stack([g[name] for g in each]) for name in each[0]}


def assert_samples(module: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[name], rtol=1e-9, atol=1e-9, msg=name)


LAYERS: list[dict[str, Any]] = [
    {"batch_first": True},
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bias": False},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "options"), [*((k, o) for k in KINDS for o in LAYERS), *((k, {}) for k in CELL_KINDS)], ids=str
)
def test_gradients_of_samples(kind: str, options: dict[str, Any], mode: str) -> None:
    """What a loop over samples on torch.nn gives, final states included."""
    ours, theirs = models(kind, **options)
    x = randn(B, T, I)
    expected = looped(theirs, lambda b: loss_of(theirs(x[b : b + 1])))
    for reduction, scale in (("sum", 1), ("mean", B)):
        wrapped = opacus.grad_sample.wrap_model(copy.deepcopy(ours), mode, loss_reduction=reduction)
        for _ in range(2):  # the second like the first
            (loss_of(wrapped(x)) / scale).backward()
            assert_samples(wrapped._module, expected)
            wrapped.zero_grad()


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_alone(kind: str, mode: str) -> None:
    """Opacus' hooks take no states, no keywords and no packed sequences; nothing of that is lost here."""
    ours, theirs = pair(kind, I, H, dtype=torch.float64)
    x, hx, lengths = randn(T, B, I), make_state(kind, 1, B, hidden=H), torch.tensor([6, 2, 5, 1])

    def one(b: int) -> Tensor:
        state = tuple(s[:, b : b + 1] for s in tensors(hx))
        output, _ = theirs(x[: lengths[b], b : b + 1], state if len(state) > 1 else state[0])
        return output.square().sum()

    expected = looped(theirs, one)
    wrapped = opacus.grad_sample.wrap_model(ours, mode, batch_first=False, loss_reduction="sum")
    for call in (
        lambda: wrapped(x, hx, lengths=lengths)[0],
        lambda: wrapped(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)[0].data,
    ):
        call().square().sum().backward()
        assert_samples(ours, expected)
        wrapped.zero_grad()
    # twice before a step: both are there, as of Opacus' own layers
    for _ in range(2):
        wrapped(x)[0].sum().backward()
    assert all(len(p.grad_sample) == 2 for p in ours.parameters())
    wrapped.forbid_grad_accumulation()
    with pytest.raises(ValueError, match="not compatible with grad accumulation"):
        wrapped(x)[0].sum().backward()
    module = wrapped.to_standard_module()
    assert "_opacus" not in vars(module) and not any(hasattr(p, "grad_sample") for p in module.parameters())
    assert type(module(x)[0].grad_fn) is type(build(fastrnn, kind, I, H).double()(x)[0].grad_fn)


def test_other_hooks_stay_hooks() -> None:
    module, seen = fastrnn.GRU(I, H), []
    module.register_forward_hook(lambda *args: seen.append("forward"))
    module.register_full_backward_hook(lambda *args: seen.append("backward"))
    module(torch.randn(T, B, I))[0].sum().backward()
    assert seen == ["forward", "backward"]


@pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])
def test_ghost_clipping(kind: str) -> None:
    """The norms, and in the second backward pass the sum of the clipped gradients."""
    ours, theirs = models(kind)
    x = randn(B, T, I)
    expected = looped(theirs, lambda b: loss_of(theirs(x[b : b + 1])))
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in expected.values()]).norm(dim=0)
    wrapped = opacus.grad_sample.wrap_model(ours, "ghost", loss_reduction="sum", max_grad_norm=0.5)
    losses = torch.stack([weighted([y]) for y in wrapped(x)])
    losses.sum().backward(retain_graph=True)
    torch.testing.assert_close(wrapped.get_norm_sample(), norms)
    scale = wrapped.get_clipping_coef()
    wrapped.disable_hooks()
    ours.zero_grad()
    (scale * losses).sum().backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, torch.einsum("b,b...->...", scale, expected[name]))


@pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])
def test_the_validator(kind: str) -> None:
    ours, _ = models(kind)
    from opacus.validators import ModuleValidator

    assert ModuleValidator.validate(ours, strict=True) == [] and ModuleValidator.is_valid(ours)
    assert type(ModuleValidator.fix(ours).rnn) is type(ours.rnn)


@pytest.mark.parametrize("mode", [*MODES, "ghost"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "GRUCell"])
def test_private_training(kind: str, mode: str) -> None:
    """Some steps with noise of 0 and no clipping that bites: those of plain SGD on torch.nn."""
    ours, theirs = models(kind, **({} if kind.endswith("Cell") else {"batch_first": True}))
    x = randn(8, T, I)
    y = torch.arange(8) % theirs(x).shape[1]
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    criterion = nn.CrossEntropyLoss()
    engine = opacus.PrivacyEngine()
    found = engine.make_private(
        module=ours, optimizer=torch.optim.SGD(ours.parameters(), 0.1), data_loader=loader, criterion=criterion,
        noise_multiplier=0.0, max_grad_norm=1e9, poisson_sampling=False, grad_sample_mode=mode,
    )  # fmt: skip
    wrapped, optimizer, *ghost, batches = found
    private_criterion = ghost[0] if mode == "ghost" else criterion
    plain = torch.optim.SGD(theirs.parameters(), 0.1)
    for (a, b), (c, d) in zip(batches, loader, strict=True):
        optimizer.zero_grad()
        private_criterion(wrapped(a), b).backward()
        optimizer.step()
        plain.zero_grad()
        criterion(theirs(c), d).backward()
        plain.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9, msg=name)


def test_a_batch_of_none() -> None:
    """Poisson sampling draws one now and then."""
    ours, _ = models("LSTM", batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = opacus.grad_sample.wrap_model(ours, "hooks")
    wrapped(randn(0, T, I)).sum().backward()
    assert all(p.grad_sample.shape == (0, *p.shape) for p in ours.rnn.parameters())


def test_converted_models() -> None:
    """A model of torch.nn's, converted, is one that Opacus takes."""
    _, theirs = models("LSTM", num_layers=2, batch_first=True)
    from opacus.validators import ModuleValidator

    x = randn(B, T, I)
    assert not ModuleValidator.is_valid(theirs)
    expected = looped(theirs, lambda b: loss_of(theirs(x[b : b + 1])))
    converted = fastrnn.convert(copy.deepcopy(theirs))
    assert ModuleValidator.is_valid(converted)
    wrapped = opacus.GradSampleModule(converted, loss_reduction="sum")
    loss_of(wrapped(x)).backward()
    assert_samples(converted, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_weights(kind: str) -> None:
    """A call's mask on weight_hh is shared by the samples, and so is in each one's gradient."""
    module = build(fastrnn, kind, I, H, 2, batch_first=True, weight_dropout=0.5, dtype=torch.float64)
    plain, x = copy.deepcopy(module), randn(B, T, I)
    torch.manual_seed(3)
    of_samples = plain(x)[0].square().sum((1, 2))
    expected = [torch.autograd.grad(loss, list(plain.parameters()), retain_graph=True) for loss in of_samples]
    torch.manual_seed(3)
    opacus.GradSampleModule(module, batch_first=True, loss_reduction="sum")(x)[0].square().sum().backward()
    for p, each in zip(module.parameters(), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(p.grad_sample, torch.stack(each))
        torch.testing.assert_close(p.grad, torch.stack(each).sum(0))
