"""How long training steps of packages' models take as they are and converted: `python -m tests.optional.time_models`.

Both sides start from the same weights and take turns, one block each, in pairs; what is told is the median of the
pairs' ratios (torch.nn's time / fastrnn's) with its interval.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from benchmarks.stats import median_interval

Model = tuple[nn.Module, Callable[[Any], Tensor]]  # and the loss of a step


def recurrent_ppo(share: float = 0.0) -> Model:
    """sb3-contrib's MlpLstmPolicy (2 LSTMs of 256): evaluate_actions on 8 sequences of 64 observations."""
    import sb3_contrib
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    policy = sb3_contrib.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu").policy
    zeros = torch.zeros(1, 8, 256)
    states = RNNStates((zeros, zeros), (zeros, zeros))
    observed, actions = torch.randn(512, 4), torch.arange(512).remainder(2)
    starts = (torch.rand(512, generator=torch.Generator().manual_seed(0)) < share).float()

    def loss(model: Any) -> Tensor:
        values, likelihood, _ = model.evaluate_actions(observed, actions, states, starts)
        return (values.square() - likelihood[:, None]).mean()

    return policy, loss


def recurrent_ppo_episodes() -> Model:
    """The same with episodes that begin at one step in twenty: sb3-contrib calls its LSTMs step by step."""
    return recurrent_ppo(0.05)


def torchrl_gru() -> Model:
    """torchrl's GRUModule, 2 layers of 128, on 16 trajectories of 100 steps."""
    import torchrl.modules
    from tensordict import TensorDict

    module = torchrl.modules.GRUModule(
        input_size=64, hidden_size=128, num_layers=2, in_keys=["x", "h"], out_keys=["y", ("next", "h")]
    )
    data = TensorDict({"x": torch.randn(16, 100, 64), "h": torch.zeros(16, 100, 2, 128)}, [16, 100])
    data["is_init"] = torch.zeros(16, 100, 1, dtype=torch.bool)

    def loss(model: Any) -> Tensor:
        with torchrl.modules.set_recurrent_mode(True):
            return model(data.clone())["y"].square().mean()

    return module, loss


def demucs() -> Model:
    """demucs' Demucs, small (16 channels, depth 4, bidirectional LSTMs inside), on 8,000 samples of sound."""
    from demucs.demucs import Demucs

    model = Demucs(["speech", "noise"], audio_channels=1, channels=16, depth=4, lstm_layers=2, dconv_lstm=2)
    x = torch.randn(1, 1, 8000)
    return model, lambda m: m(x).square().mean()


MODELS = (recurrent_ppo, recurrent_ppo_episodes, torchrl_gru, demucs)


def block(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Any], Tensor], steps: int) -> float:
    begin = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return (time.perf_counter() - begin) / steps


def paired(sides: Sequence[Callable[[], float]], pairs: int) -> list[tuple[float, float]]:
    """What both give, time after time, each the first in every second pair."""
    times = []
    for i in range(pairs):
        order = (0, 1) if i % 2 else (1, 0)
        found = {k: sides[k]() for k in order}
        times.append((found[0], found[1]))
    return times


def medians(times: Sequence[tuple[float, float]]) -> list[float]:
    """Of either side, seconds in and milliseconds out."""
    return [sorted(t[k] for t in times)[len(times) // 2] * 1e3 for k in (0, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.4, help="of a block, about")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="*", default=[f.__name__ for f in MODELS])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    for make in MODELS:
        if make.__name__ not in args.models:
            continue
        torch.manual_seed(0)
        theirs, loss = make()
        ours = fastrnn.convert(copy.deepcopy(theirs), strict=True)
        sides = [(m, torch.optim.Adam(m.parameters(), 1e-4)) for m in (theirs, ours)]
        steps = [max(1, round(args.seconds / min(block(m, o, loss, 2) for _ in range(2)))) for m, o in sides]
        times = paired([lambda side=side: block(*side, loss, min(steps)) for side in sides], args.pairs)
        ratio, (torch_ms, ours_ms) = median_interval([a / b for a, b in times]), medians(times)
        print(
            f"{make.__name__:24} torch.nn {torch_ms:8.2f} ms/step   fastrnn {ours_ms:8.2f} ms/step   "
            f"ratio {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}, {ratio.count} pairs)"
        )


if __name__ == "__main__":
    main()
