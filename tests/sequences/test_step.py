"""step(): one call for each step of a sequence is the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastrnn
from tests.helpers import (
    assert_equal,
    build,
    collect,
    make_state,
    map_state,
    pair,
    randn,
    tensors,
)
from tests.sequences.cases import DEEP, KIND, SIZES, enlarged, random_tokens, results


@pytest.mark.parametrize("batch_first", [False, True])
@KIND
def test_steps_are_the_sequence(kind: str, batch_first: bool) -> None:
    """T steps, results and gradients, equal one call; of a bidirectional network one step equals its T = 1."""
    for hidden in SIZES:
        ours, theirs = pair(kind, 3, hidden, num_layers=2, batch_first=batch_first, dtype=torch.float64)
        x, state = randn(4, 3, 3), None
        outputs = []
        for step in x:
            output, state = ours.step(step, state)
            outputs.append(output)
        got = collect(torch.stack(outputs, 1 if batch_first else 0), state, dict(ours.named_parameters()))
        assert_equal(got, results(theirs, x.transpose(0, 1) if batch_first else x))


@pytest.mark.parametrize("batch_first", [False, True])
@KIND
def test_one_step_is_forward(kind: str, batch_first: bool) -> None:
    options: dict[str, Any] = {
        "batch_first": batch_first,
        "state_batch_first": batch_first,
        "learn_initial_state": True,
        "token_input": True,
    }
    module = enlarged(build(fastrnn, kind, 7, 5, dtype=torch.float64, **DEEP, **options))
    x, hx = randn(3, 7), make_state(kind, *((3, 4) if batch_first else (4, 3)), hidden=5)
    time = 1 if batch_first else 0
    resets = torch.tensor([True, False, True])
    masks = {"resets": resets, "reset_state": map_state(torch.sin, hx)}
    for input in (x, random_tokens(3, vocabulary=7)):
        for state in (None, hx):
            for mask in ({}, {"resets": resets}, masks):
                output, finals = module.step(input, state, **mask)
                whole = {k: v.unsqueeze(time) if k == "resets" else v for k, v in mask.items()}
                expected, after = module(input.unsqueeze(time), state, **whole)
                assert torch.equal(output, expected.squeeze(time))
                assert all(map(torch.equal, tensors(finals), tensors(after)))
        alone = map_state(lambda s: s[0] if batch_first else s[:, 0], hx)
        output, finals = module.step(input[0], alone, resets=resets[0])
        expected, after = module(input[:1], alone, resets=resets[:1])
        assert output.shape == (10,) and torch.equal(output, expected[0])
        assert all(map(torch.equal, tensors(finals), tensors(after)))


def test_step_without_a_cell_state_of_every_step() -> None:
    """return_all_states: the state holds the only c there is."""
    module = fastrnn.LSTM(3, 5, return_all_states=True)
    output, (h, c) = module.step(torch.randn(2, 3))
    assert output.shape == (2, 5) and h.shape == c.shape == (1, 2, 5)


def test_step_runs_hooks() -> None:
    """So torch's older weight_norm, which makes the weight in a hook, is in force."""
    module = fastrnn.GRU(3, 5)
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    module.step(torch.randn(2, 3))
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.step(randn(1, 2, 3)), ValueError, r"x: expected \[batch, input_size\].*got \[1, 2, 3\]"),
        (lambda m: m.step(torch.tensor([[1]])), RuntimeError, r"x: expected 3 features \(input_size\), got 1"),
        (lambda m: m.step([1.0]), TypeError, "x: expected a tensor, got list"),
        (lambda m: m.step(torch.randn(2, 4)), RuntimeError, r"x: expected 3 features \(input_size\), got 4"),
        (lambda m: m.step(torch.randn(2, 3), torch.zeros(1, 3, 5)), RuntimeError, r"state: expected \[1, 2, 5\]"),
        (lambda m: m.step(torch.randn(2, 3), resets=torch.ones(2)), TypeError, "resets: expected dtype torch.bool"),
        (
            lambda m: m.step(torch.randn(2, 3), resets=[True]),
            TypeError,
            r"resets: expected a bool tensor \[2\], got list",
        ),
        (
            lambda m: m.step(torch.randn(2, 3), resets=torch.ones((), dtype=torch.bool)),
            RuntimeError,
            r"resets: expected \[2\], got \[\]",
        ),
        (
            lambda m: m.step(torch.randn(2, 3), reset_state=torch.zeros(1, 2, 5)),
            ValueError,
            "reset_state: expected None",
        ),
    ],
)
def test_step_bad_input(call: Any, error: type[Exception], message: str) -> None:
    for batch_first in (False, True):
        with pytest.raises(error, match=message):
            call(fastrnn.GRU(3, 5, batch_first=batch_first))
