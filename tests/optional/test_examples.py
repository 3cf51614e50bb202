"""Examples on packages that the other tests have a small stand-in for."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from .packages import needs

needs("gymnasium")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


def test_recurrent_ppo_in_gymnasium(tmp_path: Path) -> None:
    """Episodes begin where the pole stands upright, and last; what was acted is what is learned from."""
    import common
    import fastrnn
    import recurrent_ppo

    args = common.start(
        common.options("name", "doc", envs=8, rollout=200, hidden=8), ["--out", str(tmp_path), "--threads", "1"]
    )
    model = recurrent_ppo.ActorCritic(fastrnn, args.hidden)
    actor = recurrent_ppo.Actor(args, model, 0)
    rollout = actor.rollout()
    policy, _, _ = model(rollout.x, rollout.begins, rollout.state)
    torch.testing.assert_close(policy.log_prob(rollout.actions), rollout.likelihood)
    upright, last = (rollout.x * torch.tensor(recurrent_ppo.LIMITS)).abs(), ~rollout.counts
    assert upright[rollout.begins].max() <= 0.05
    assert (rollout.x[last].abs().amax(1) > 0.99).all()  # shown once more, out of the limits
    assert torch.equal(rollout.begins[1:], last[:-1]) and last.any(0).all()
    assert min(actor.lasted) > 5 and sum(actor.lasted) <= rollout.counts.sum()
