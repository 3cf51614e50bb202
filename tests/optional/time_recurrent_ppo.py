"""Environment steps a second of recurrent PPO, acting and learning: `python -m tests.optional.time_recurrent_ppo`.

examples/recurrent_ppo.py on both backends beside sb3-contrib's RecurrentPPO, as it is and with its policy converted:
the same masked CartPole, environments, rollouts, epochs, sizes of batches, and one LSTM of as many units. sb3-contrib
calls torch.nn's LSTM once where no episode begins inside a batch, and step by step elsewhere. Its environments are
Python's, one after another, ours gymnasium's vectorised ones, which counts in acting alone. All sides take turns; told
is the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import sb3_contrib
import torch
from stable_baselines3.common.env_util import make_vec_env

import fastrnn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import recurrent_ppo

ENVS, ROLLOUT, EPOCHS, PARTS, HIDDEN = 32, 64, 8, 4, 64
Side = Callable[[], tuple[float, float]]  # one rollout and what is learned from it -> the seconds of both


def masked() -> gymnasium.Env:
    """CartPole without velocities."""
    env = gymnasium.make("CartPole-v1")
    low, high = (limit[[0, 2]] for limit in (env.observation_space.low, env.observation_space.high))
    return gymnasium.wrappers.TransformObservation(env, lambda x: x[[0, 2]], gymnasium.spaces.Box(low, high))


def sb3(converted: bool) -> Side:
    kwargs = dict(lstm_hidden_size=HIDDEN, shared_lstm=True, enable_critic_lstm=False, net_arch=[])
    model = sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy", make_vec_env(masked, ENVS), n_steps=ROLLOUT, batch_size=ENVS * ROLLOUT // PARTS, seed=0,
        n_epochs=EPOCHS, learning_rate=4e-3, ent_coef=0.01, policy_kwargs=kwargs, device="cpu",
    )  # fmt: skip
    if converted:
        fastrnn.convert(model.policy, strict=True)
    total, callback = model._setup_learn(1_000_000)

    def once() -> tuple[float, float]:
        begin = time.perf_counter()
        model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=ROLLOUT)
        acted = time.perf_counter()
        model._update_current_progress_remaining(model.num_timesteps, total)
        model.train()
        return acted - begin, time.perf_counter() - acted

    return once


def ours(library: Any) -> Side:
    args = argparse.Namespace(
        library=library,
        device=torch.device("cpu"),
        envs=ENVS,
        rollout=ROLLOUT,
        epochs=EPOCHS,
        parts=PARTS,
        hidden=HIDDEN,
    )
    model = recurrent_ppo.ActorCritic(library, HIDDEN)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3, eps=1e-5, fused=True)
    actor = recurrent_ppo.Actor(args, model, 0)

    def once() -> tuple[float, float]:
        begin = time.perf_counter()
        rollout = actor.rollout()
        acted = time.perf_counter()
        recurrent_ppo.improve(args, model, optimizer, rollout)
        return acted - begin, time.perf_counter() - acted

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sides = {
        "recurrent_ppo.py, fastrnn": ours(fastrnn), "recurrent_ppo.py, torch": ours(torch.nn),
        "sb3-contrib": sb3(False), "sb3-contrib, converted": sb3(True),
    }  # fmt: skip
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, once in sides.items():
            found[name].append(once())
    print(
        f"{'steps a second':28s} {'acting':>8s} {'learning':>8s}   (torch {torch.__version__}, {args.threads} threads)"
    )
    for name, seconds in found.items():
        acting, learning = (ENVS * ROLLOUT / statistics.median(part) for part in zip(*seconds, strict=True))
        print(f"{name:28s} {acting:8.0f} {learning:8.0f}")


if __name__ == "__main__":
    main()
