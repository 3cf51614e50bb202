"""Models that installed packages define with torch.nn's recurrent layers: converted, they compute the same."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrnn

from ..helpers import assert_equal, weighted
from .packages import needs

torchrl = needs("torchrl")
needs("torchrl.modules")
tensordict = needs("tensordict")
gymnasium = needs("gymnasium")
sb3_contrib = needs("sb3_contrib")
needs("pytorch_lightning")
darts = needs("darts")
demucs = needs("demucs")

pytestmark = pytest.mark.filterwarnings("ignore")
Run = Callable[[nn.Module], Tensor]


def results(model: nn.Module, run: Run) -> dict[str, Tensor]:
    """Output and gradients of all parameters that have one."""
    model.zero_grad()
    output = run(model)
    weighted([output]).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **grads}


def count(model: nn.Module, package: str) -> int:
    kinds = (nn.RNNBase, nn.modules.rnn.RNNCellBase)
    return sum(isinstance(m, kinds) and type(m).__module__.startswith(package) for m in model.modules())


def check(model: nn.Module, run: Run, dtype: torch.dtype = torch.float64) -> None:
    """The same outputs and gradients converted, and to the bit when converted back."""
    model, tolerance = model.to(dtype), {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    expected, recurrent = results(model, run), count(model, "torch.nn")
    assert recurrent > 0
    assert any("weight_hh" in name for name in expected)
    fastrnn.convert(model, strict=True)
    assert (count(model, "torch.nn"), count(model, "fastrnn")) == (0, recurrent)
    assert_equal(results(model, run), expected, tolerance)
    assert_equal(results(fastrnn.to_torch(model), run), expected, tolerance=0.0)


# ---- torchrl ----


def torchrl_module(kind: str) -> tuple[nn.Module, Run]:
    states = ["h", "c"] if kind == "LSTM" else ["h"]
    module = getattr(torchrl.modules, f"{kind}Module")(
        input_size=5,
        hidden_size=6,
        num_layers=2,
        in_keys=["x", *states],
        out_keys=["y", *(("next", s) for s in states)],
    )
    data = tensordict.TensorDict({"x": torch.randn(3, 7, 5, dtype=torch.float64)}, [3, 7])
    data["is_init"] = torch.zeros(3, 7, 1, dtype=torch.bool)
    data["is_init"][:, 0] = True
    for state in states:
        data[state] = torch.zeros(3, 7, 2, 6, dtype=torch.float64)

    def run(model: nn.Module) -> Tensor:
        with torchrl.modules.set_recurrent_mode(True):
            return model(data.clone())["y"]

    run.data = data  # type: ignore[attr-defined]
    return module, run


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl_modules(kind: str) -> None:
    check(*torchrl_module(kind))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl_modules_with_episodes(kind: str) -> None:
    """Episodes that begin inside: torchrl asks isinstance(self.lstm, nn.LSTM) then, and patch() answers yes."""
    module, run = torchrl_module(kind)
    run.data["is_init"][1, 3] = run.data["is_init"][2, 5] = True  # type: ignore[attr-defined]
    expected = results(module.double(), run)
    fastrnn.convert(module)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        run(module)
    with fastrnn.patch():
        assert_equal(results(module, run), expected, 1e-9)


def test_torchrl_impala() -> None:
    from torchrl.modules.models.recipes.impala import ImpalaNet

    x, reward = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    done = torch.zeros(2, 4, 1, dtype=torch.bool)
    done[1, 2] = True
    state = [torch.zeros(1, 2, 12, dtype=torch.float64) for _ in range(2)]

    def run(model: nn.Module) -> Tensor:
        (_, logits, baseline), _ = model(x, reward, done, [s.clone() for s in state])
        return torch.cat([logits.flatten(), baseline.flatten()])

    torch.manual_seed(0)
    model = ImpalaNet(3, channels=(4, 4, 4), out_features=12, use_lstm=True).double()
    with torch.no_grad():
        run(model)  # lazy layers
    check(model, run)


# ---- sb3-contrib ----


def recurrent_ppo(**options: Any) -> Any:
    return sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu", n_steps=64, batch_size=32, n_epochs=2, **options
    )


@pytest.mark.parametrize("episodes", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_recurrent_ppo_policy(episodes: bool, shared: bool) -> None:
    options = {"shared_lstm": shared, "enable_critic_lstm": not shared, "lstm_hidden_size": 16, "n_lstm_layers": 2}
    policy = recurrent_ppo(policy_kwargs=options).policy
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    zeros = torch.zeros(2, 3, 16)
    states = RNNStates((zeros, zeros), (zeros, zeros))
    observed, actions, starts = torch.randn(3 * 5, 4), torch.arange(15).remainder(2), torch.zeros(15)
    if episodes:
        starts[[3, 7, 8]] = 1

    def run(model: Any) -> Tensor:
        return torch.cat([x.flatten() for x in model.evaluate_actions(observed, actions, states, starts)])

    check(policy, run, torch.float32)  # its observations are


def test_recurrent_ppo_trains() -> None:
    """The optimizer was made with the policy, before it is converted; the run's parameters agree."""
    found = []
    for change in (lambda model: None, lambda model: fastrnn.convert(model.policy, strict=True)):
        model = recurrent_ppo(policy_kwargs={"lstm_hidden_size": 16})
        change(model)
        model.learn(128)
        found.append(dict(model.policy.state_dict()))
    assert_equal(found[1], found[0], 1e-3)
    assert count(model.policy, "fastrnn") == 2


# ---- darts ----


def darts_model(kind: str, block: bool) -> Any:
    from darts.models import BlockRNNModel, RNNModel

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    trainer = {
        "accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_checkpointing": False,
        "enable_model_summary": False,
    }  # fmt: skip
    options = dict(model=kind, input_chunk_length=12, hidden_dim=8, n_rnn_layers=2, dropout=0.0, random_state=1)
    options |= dict(n_epochs=1, batch_size=8, pl_trainer_kwargs=trainer)
    if block:
        return BlockRNNModel(output_chunk_length=3, **options)
    return RNNModel(training_length=16, **options)


def darts_series() -> Any:
    return darts.TimeSeries.from_values(np.sin(np.arange(80) / 5)[:, None])


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_darts(kind: str, block: bool) -> None:
    """Built with ours under patch() and trained by Lightning, a forecaster gives the same; so does a converted one."""
    series = darts_series()
    plain, patched = darts_model(kind, block), darts_model(kind, block)
    plain.fit(series)
    with fastrnn.patch():
        patched.fit(series)
    assert count(plain.model, "torch.nn") == count(patched.model, "fastrnn") == 1
    expected = plain.predict(6).values()
    np.testing.assert_allclose(patched.predict(6).values(), expected, atol=1e-5)
    fastrnn.convert(plain.model, strict=True)
    np.testing.assert_allclose(plain.predict(6).values(), expected, atol=1e-10)


# ---- demucs (music and speech separation) ----


def test_demucs() -> None:
    from demucs.demucs import Demucs

    torch.manual_seed(0)
    model = Demucs(
        ["speech", "noise"], audio_channels=1, channels=8, depth=3, lstm_layers=2, dconv_lstm=2, resample=False
    )
    x = torch.randn(1, 1, 2000, dtype=torch.float64)
    assert count(model, "torch.nn") > 1
    check(model.eval(), lambda m: m(x))


# ---- what patch() does while a package builds its model ----


def test_pickles_of_patched_models() -> None:
    module, run = torchrl_module("GRU")
    with fastrnn.patch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other, _ = torchrl_module("GRU")
        other.load_state_dict(module.state_dict())
        twin = copy.deepcopy(other)
    assert count(twin, "fastrnn") == 1
    assert_equal(results(twin.double(), run), results(module.double(), run), 1e-9)
