"""Balancing a pole without seeing how fast it falls: recurrent PPO (Schulman et al. 2017) on CartPole, no velocities.

    python examples/recurrent_ppo.py

CartPole (Barto, Sutton and Anderson 1983) is the package gymnasium's (MIT licence). The network sees the cart's place
and the pole's angle alone; how fast they move it has to remember. Acting takes one step at a time, learning whole
rollouts, in which episodes end and begin: there fastrnn's LSTM zeroes the state (resets=), and torch.nn's has to be
called step by step. What counts: how many steps, of all environments together, it takes until the last 100 episodes
have lasted 475 of at most 500 in the mean, gymnasium's threshold; and how many a second are acted and learned from.
"""

from __future__ import annotations

import collections
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from tqdm import tqdm

import common
import fastrnn

PLACE, ANGLE = 0, 2  # of an observation of four
LIMITS = (2.4, 0.21)  # of both, beyond which an episode is over
DISCOUNT, TRACE, CLIP, ENTROPY = 0.99, 0.95, 0.2, 0.01  # the papers' gamma, lambda, epsilon and c_2
EPISODES = 100


class LSTMByStep(nn.LSTMCell):
    """What step() and resets= are, of torch.nn: a loop over its cell, whose state is zeroed where an episode begins."""

    def step(self, x: Tensor, state: Any, *, resets: Tensor) -> Any:
        h, c = super().forward(x, tuple(s[0] * ~resets[:, None] for s in state))
        return h, (h[None], c[None])

    def forward(self, x: Tensor, state: Any, *, resets: Tensor) -> Any:  # type: ignore[override]
        outputs = []
        for one, reset in zip(x, resets, strict=True):
            output, state = self.step(one, state, resets=reset)
            outputs.append(output)
        return torch.stack(outputs), state


class ActorCritic(nn.Module):
    def __init__(self, library: Any, hidden: int) -> None:
        super().__init__()
        self.lstm: Any = (fastrnn.LSTM if library is fastrnn else LSTMByStep)(2, hidden)
        self.actor, self.critic = nn.Linear(hidden, 2), nn.Linear(hidden, 1)

    def forward(self, x: Tensor, begins: Tensor, state: Any) -> tuple[Categorical, Tensor, Any]:
        """A rollout x [T, N, 2], begins [T, N], or one step [N, 2], [N] -> policy, values [T, N] or [N], the state"""
        run = self.lstm if x.dim() == 3 else self.lstm.step
        output, state = run(x, state, resets=begins)
        return Categorical(logits=self.actor(output)), self.critic(output).squeeze(-1), state


class Rollout(NamedTuple):
    """T steps of N environments, each [T, N], and the state before them."""

    x: Tensor  # [T, N, 2]
    begins: Tensor  # an episode, with this step
    counts: Tensor  # False after an episode's last step, where gymnasium begins the next one whatever is done
    actions: Tensor
    likelihood: Tensor  # of these actions, its logarithm
    advantages: Tensor
    returns: Tensor
    state: tuple[Tensor, ...]


class Actor:
    """The environments, and where they stand."""

    def __init__(self, args: Any, model: ActorCritic, seed: int) -> None:
        self.envs = common.imported("gymnasium").make_vec("CartPole-v1", args.envs)
        self.model, self.steps, self.device = model, args.rollout, args.device
        self.x = self.seen(self.envs.reset(seed=seed)[0])
        self.begins, self.ended = torch.ones(args.envs, device=self.device).bool(), torch.zeros(args.envs).bool()
        self.state = tuple(torch.zeros(1, args.envs, args.hidden, device=self.device) for _ in range(2))
        self.running, self.lasted = torch.zeros(args.envs), collections.deque[float](maxlen=EPISODES)

    def seen(self, observation: Any) -> Tensor:
        x = torch.as_tensor(observation)[:, [PLACE, ANGLE]] / torch.tensor(LIMITS)
        return x.to(self.device)

    @torch.no_grad()
    def rollout(self) -> Rollout:
        start, steps, values, rewards = self.state, [], [], []
        for _ in range(self.steps):
            policy, value, self.state = self.model(self.x, self.begins, self.state)
            action = policy.sample()
            steps.append((self.x, self.begins, ~self.ended.to(self.device), action, policy.log_prob(action)))
            observation, *outcome, _ = self.envs.step(action.cpu().numpy())
            reward, terminated, truncated = map(torch.as_tensor, outcome)
            self.x, self.begins = self.seen(observation), self.ended.to(self.device)
            self.ended = terminated | truncated
            self.running += reward
            self.lasted.extend(self.running[self.ended].tolist())
            self.running[self.ended] = 0
            values.append(value)
            rewards.append((reward * (1 - DISCOUNT), terminated, self.ended))  # so that values are from 0 to 1
        values.append(self.model(self.x, self.begins, self.state)[1])
        x, begins, counts, actions, likelihood = map(torch.stack, zip(*steps, strict=True))
        value = torch.stack(values)
        paid, terminated, ended = (torch.stack(part).to(self.device) for part in zip(*rewards, strict=True))
        gains = advantages(paid, value, terminated, ended)
        return Rollout(x, begins, counts, actions, likelihood, gains, gains + value[:-1], start)


def advantages(rewards: Tensor, values: Tensor, terminated: Tensor, ended: Tensor) -> Tensor:
    """Generalised advantage estimates [T, N] (Schulman et al. 2016) of rewards [T, N] and values [T+1, N].

    Nothing comes after a step that terminated. One that ended without, for its time was over, has the value of where it
    stood, which is what gymnasium shows next.
    """
    surprise = rewards + DISCOUNT * values[1:] * ~terminated - values[:-1]
    after, found = torch.zeros_like(surprise[0]), []
    for now, end in zip(surprise.flip(0), ended.flip(0), strict=True):
        after = now + DISCOUNT * TRACE * after * ~end
        found.append(after)
    return torch.stack(found).flip(0)


def loss_of(model: ActorCritic, rollout: Rollout, rows: Tensor) -> Tensor:
    """PPO's clipped objective, the error of values, and the policy's entropy, of some of the environments."""
    *parts, state = rollout
    x, begins, counts, actions, likelihood, gains, returns = (part[:, rows] for part in parts)
    policy, values, _ = model(x, begins, tuple(s[:, rows] for s in state))
    gains = (gains - gains[counts].mean()) / (gains[counts].std() + 1e-8)
    ratio = (policy.log_prob(actions) - likelihood).exp()
    gain = torch.minimum(ratio * gains, ratio.clamp(1 - CLIP, 1 + CLIP) * gains)
    return ((values - returns).square() - gain - ENTROPY * policy.entropy())[counts].mean()


def improve(args: Any, model: ActorCritic, optimizer: torch.optim.Optimizer, rollout: Rollout) -> list[float]:
    """Learns from a rollout several times, each time in parts: whole sequences of some environments."""
    losses = []
    for _ in range(args.epochs):
        for rows in torch.randperm(args.envs).chunk(args.parts):
            losses.append(loss_of(model, rollout, rows))
            optimizer.zero_grad()
            losses[-1].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    return torch.stack(losses).tolist()


def learn(args: Any, seed: int) -> dict[str, Any]:
    """One network: the mean of its last episodes after every rollout, its steps, the seconds of acting and learning."""
    torch.manual_seed(seed)
    model = ActorCritic(args.library, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, eps=1e-5, fused=True)
    actor, each = Actor(args, model, seed), args.envs * args.rollout
    steps, curve, acting, learning = 0, [0.0], 0.0, 0.0
    with tqdm(total=args.steps, desc=f"seed {seed}", unit="step", disable=None) as bar:
        while steps < args.steps and curve[-1] < actor.envs.spec.reward_threshold:
            optimizer.param_groups[0]["lr"] = args.lr * (1 - steps / args.steps)
            begin = time.perf_counter()
            rollout = actor.rollout()
            acted = time.perf_counter()
            args.losses += improve(args, model, optimizer, rollout)
            acting, learning = acting + acted - begin, learning + time.perf_counter() - acted
            steps += each
            curve.append(sum(actor.lasted) / EPISODES)  # too low until there are as many
            bar.set_postfix({"return": f"{curve[-1]:.1f}"}, refresh=False)
            bar.update(each)
    return {"curve": curve, "steps": steps, "acting": acting, "learning": learning}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.options(
        "recurrent_ppo", __doc__, steps=300_000, seeds=2, envs=32, rollout=64, epochs=8, parts=4, hidden=64, lr=4e-3
    )
    args = common.start(parser, argv, steps=15_000, seeds=1, envs=16, rollout=16, parts=2, hidden=16, lr=2e-2)
    runs = [learn(args, args.seed + i) for i in range(args.seeds)]
    steps, acting, learning = (sum(run[name] for run in runs) for name in ("steps", "acting", "learning"))
    args.seconds = acting + learning
    with common.plot(args) as axes:
        for i, run in enumerate(runs):
            axes.plot(range(0, run["steps"] + 1, args.envs * args.rollout), run["curve"], label=f"seed {args.seed + i}")
        axes.set(xlabel="steps", ylabel=f"steps of an episode, mean of the last {EPISODES}")
        axes.legend()
    return common.finish(
        args,
        {
            "return, least of the seeds": min(run["curve"][-1] for run in runs),
            "thousand steps until then, mean": steps / len(runs) / 1000,
            "steps a second, acting": steps / acting,
            "steps a second, learning": steps / learning,
        },
    )


if __name__ == "__main__":
    main()
