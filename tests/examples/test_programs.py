"""The programs of docs/examples.md, short, on tiny data: they learn, and both backends find the same."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import common
import fastrnn
import table

from . import small_data

# program and options -> what its metrics must reach on the tiny data: (name, low, high)
PROGRAMS: dict[str, list[tuple[str, float, float]]] = {
    "sentiment": [(f"accuracy, {how}", 0.9, 1.0) for how in ("final states", "mean", "maximum")],
    "g2p": [("phoneme error", 0.0, 0.1), ("word error", 0.0, 0.2)],
    "g2p --attention": [("phoneme error", 0.0, 0.1), ("word error", 0.0, 0.2)],
    "caption": [("exact, initial state", 0.04, 1.0), ("exact, term", 0.7, 1.0), ("exact, both", 0.7, 1.0)],
    "long_memory": [
        ("adding, squared error, tanh", 0.0, 0.2),
        *((f"adding, squared error, {kind}", 0.0, 0.08) for kind in ("IRNN", "LSTM", "GRU")),
        ("digits, accuracy, tanh", 0.0, 1.0),
        *((f"digits, accuracy, {kind}", 0.3, 1.0) for kind in ("IRNN", "LSTM", "GRU")),
    ],
    "forecast": [
        ("degrees, 1 h ahead, LSTM", 0.0, 0.6),
        ("degrees, 1 h ahead, naive", 1.1, 1.2),
        ("degrees, 1 h ahead, seasonal", 3.0, 3.5),
        ("degrees, 12 h ahead, LSTM", 0.0, 3.0),
        ("degrees, 12 h ahead, naive", 7.0, 9.0),
        ("degrees, 12 h ahead, seasonal", 3.0, 3.5),
        ("degrees, first 3 hours, zero state", 0.0, 8.0),
        ("degrees, first 3 hours, learned state", 0.0, 8.0),
    ],
    "vowels": [("accuracy", 0.9, 1.0)],
    "char_lm_short --shakespeare --prime or": [("bits per character", 0.5, 1.0)],
    "stress": [
        *((f"{what} right, LSTM", 0.9, 1.0) for what in ("vowels", "words")),
        *((f"{what} right, baseline", 0.3, 0.7) for what in ("vowels", "words")),
    ],
    "recurrent_ppo": [  # who forgets the first observation gets 5.5 in the mean
        ("return, least of the seeds", 9.0, 10.0),
        ("thousand steps until then, mean", 1.0, 14.9),
        *((f"steps a second, {what}", 1.0, math.inf) for what in ("acting", "learning")),
    ],
}


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("packages")
    small_data.install(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    sys.modules.pop("gymnasium", None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(program: str, backend: str, out: Path) -> dict[str, Any]:
    name, *options = program.split()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = importlib.import_module(name).main(
            ["--short", "--threads", "1", "--backend", backend, "--out", str(out), *options]
        )
    (path,) = out.glob(f"*-{backend}.json")
    assert json.loads(path.read_text())["metrics"] == found["metrics"]
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_learns_the_same_on_both_backends(program: str, tmp_path: Path) -> None:
    ours, theirs = (run(program, backend, tmp_path) for backend in ("fastrnn", "torch"))
    for found in (ours, theirs):
        assert found["metrics"].keys() == {name for name, _, _ in PROGRAMS[program]}
        for name, low, high in PROGRAMS[program]:
            assert low <= found["metrics"][name] <= high, name
    stops_early = program == "recurrent_ppo"  # once it has learned enough, for which draws count
    assert len(ours["losses"]) == len(theirs["losses"]) > 10 or (stops_early and found["losses"][10:])
    assert ours["losses"][:10] == pytest.approx(theirs["losses"][:10], rel=1e-4, abs=1e-5)
    assert min(found["seconds"] for found in (ours, theirs)) > 0
    for picture in tmp_path.glob("*.png"):
        assert picture.stat().st_size > 5_000


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_missing_package_is_named(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = program.split()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--short", "--out", str(tmp_path), *options])
    said = r"\S+: error: expected the package (\S+), which is not installed: pip install (?:--no-deps )?(\1==\S+)\n"
    found = re.fullmatch(said, capsys.readouterr().err)
    assert found and found[2] in common.REQUIREMENTS.read_text().splitlines()


def test_the_table(tmp_path: Path) -> None:
    """A line a metric, the program and its times in its first; the page has what the records say."""
    for backend, seconds, busy in (("torch", 30.0, True), ("fastrnn", 10.0, False)):
        record = {
            "metrics": {"word error": seconds / 100, "phoneme error": 0.12345}, "seconds": seconds,
            "date": "2026-01-02", "busy": busy,
            "machine": {"cpu": "a CPU", "device": "cpu", "threads": 1, "torch": "2.13.0"},
        }  # fmt: skip
        (tmp_path / f"g2p-{backend}.json").write_text(json.dumps(record))
    first, second, *conditions = table.table(tmp_path).splitlines()[2:]
    assert first == "| `g2p.py`: 20,000 words of cmudict | word error | 0.3 | 0.1 |  | 30.0 | 10.0 | 3.00 |"
    assert second == "|  | phoneme error | 0.123 | 0.123 |  |  |  |  |"
    where = "a CPU, 1 thread, torch 2.13.0, 2026-01-02"
    assert conditions == ["", f"{where}, while other work ran on the machine: the times say little.", f"{where}."]
    assert table.table(table.RECORDS) in table.PAGE.read_text()
    assert {run.command.split()[0] for run in table.RUNS.values()} == {f"{p.split()[0]}.py" for p in PROGRAMS}


def test_devices_and_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = common.options("name", "doc", size=3)
    with pytest.raises(SystemExit):
        common.start(parser, ["--device", "cuda:99"])
    assert "--device: expected an available device, got cuda:99" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        common.start(parser, ["--size", "0"])
    assert "argument --size: expected int > 0, got '0'" in capsys.readouterr().err
    out = ["--out", str(tmp_path)]
    assert common.start(parser, out, size=2).size == 3
    assert common.start(common.options("name", "doc", size=3), [*out, "--short"], size=2).size == 2
    assert common.start(common.options("name", "doc", size=3), [*out, "--short", "--size", "5"], size=2).size == 5
    drawn = torch.rand(3)
    common.start(parser, [*out, "--seed", "0"])
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("backend", ["fastrnn", "torch"])
def test_over_rows_ignores_the_padding(backend: str) -> None:
    """Every row as if it were alone."""
    rnn = common.library_of(backend).GRU(3, 4, batch_first=True, bidirectional=True)
    rows = [torch.randn(n, 3) for n in (5, 1, 7)]
    x, lengths = common.pad(rows)
    output, state = common.over_rows(rnn, x + 7 * (x == 0), lengths)
    assert lengths.tolist() == [5, 1, 7] and output.shape == (3, 7, 8)
    for row, got, final in zip(rows, output, state.transpose(0, 1), strict=True):
        want, want_final = rnn(row[None])
        torch.testing.assert_close(got[: len(row)], want[0])
        torch.testing.assert_close(final, want_final[:, 0])
        assert not got[len(row) :].any()


def test_generate_stops_every_row_by_itself() -> None:
    """The likeliest next token is the sum so far; 6 ends a row. The second row goes on to the limit."""

    def step(token: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = (total + token) % 8
        return torch.nn.functional.one_hot(total, 8).float() * 50, total

    first = torch.tensor([3, 4, 6])
    for temperature in (0.0, 1.0):
        rows = common.generate(step, torch.zeros(3, dtype=torch.int64), first, end=6, most=4, temperature=temperature)
        assert rows == [[3], [4, 0, 0, 0], []]


def test_split_is_the_same_and_complete() -> None:
    train, test = common.split(list(range(50)), 0.1)
    assert len(test) == 5 and sorted(train + test) == list(range(50)) and train != list(range(45))
    assert common.split(list(range(50)), 0.1) == (train, test)


def test_every_loss_is_kept_in_order(tmp_path: Path) -> None:
    """However they are read."""
    args = common.start(common.options("name", "doc", epochs=6, batch=2, lr=0.1), ["--out", str(tmp_path)])
    made: list[torch.Tensor] = []

    def loss_of(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        made.append((model(torch.stack(batch)) - 3).square().mean())
        return made[-1]

    model = torch.nn.Linear(1, 1)
    for again in (1, 2):
        found = common.fit(args, model, loss_of, list(torch.rand(7, 1)))
        assert len(made) == again * 6 * 4 and args.losses == [loss.item() for loss in made] and len(found) == 6 * 4
    assert found == args.losses[24:] and found[-1] < args.losses[0] / 4 and not model.training


def test_edits() -> None:
    from g2p import edits

    assert edits(list("kitten"), list("sitting")) == 3
    assert edits([], list("abc")) == edits(list("abc"), []) == 3
    assert edits(list("abc"), list("abc")) == 0


@pytest.mark.parametrize("backend", ["fastrnn", "torch"])
def test_gradient_norms(backend: str) -> None:
    """Without an input and with positive states, relu and 1.5 I hand on 1.5 times the gradient, clamped where asked."""
    from long_memory import Reader, adding, gradient_norms

    model = Reader(common.library_of(backend), "IRNN", 2, 3, 1)
    with torch.no_grad():
        model.rnn.weight_ih_l0.zero_()
        model.rnn.bias_ih_l0.fill_(1.0)
        model.rnn.weight_hh_l0.mul_(1.5)
        model.head.weight.fill_(0.01)
    x, target = (torch.stack(part) for part in zip(*adding(4, 6), strict=True))
    norms = gradient_norms(model, x, target)
    assert len(norms) == 6 and norms[1:] == pytest.approx([1.5 * norm for norm in norms[:-1]])
    h = model.rnn(x)[1][0]
    want = torch.autograd.grad(torch.nn.functional.mse_loss(model.head(h), target), h)[0].norm().item()
    assert norms[0] == pytest.approx(want)
    assert max(gradient_norms(model, x, target, clip=1e-3)) <= 1e-3 * (4 * 3) ** 0.5 * 1.0001
    assert gradient_norms(model, x, target, clip=1e9) == pytest.approx(norms)


def test_the_learned_state_by_hand_is_the_option() -> None:
    from forecast import LSTMFromLearnedState

    theirs, ours = LSTMFromLearnedState(2, 3), fastrnn.LSTM(2, 3, batch_first=True, learn_initial_state=True)
    names = {"h_0": "h_0_l0", "c_0": "c_0_l0"}
    with torch.no_grad():
        theirs.h_0.normal_()
        theirs.c_0.normal_()
    ours.load_state_dict({names.get(name, name): value for name, value in theirs.state_dict().items()})
    x = torch.randn(4, 5, 2)
    for rnn in (theirs, ours):
        rnn(x)[0].square().sum().backward()
    torch.testing.assert_close(theirs(x)[0], ours(x)[0])
    torch.testing.assert_close(theirs.h_0.grad, ours.h_0_l0.grad)
    torch.testing.assert_close(theirs.c_0.grad, ours.c_0_l0.grad)


def test_resets_by_hand_are_the_option() -> None:
    from recurrent_ppo import LSTMByStep

    theirs, ours = LSTMByStep(2, 3), fastrnn.LSTM(2, 3)
    ours.load_state_dict({f"{name}_l0": value for name, value in theirs.state_dict().items()})
    x, resets, state = torch.randn(6, 4, 2), torch.rand(6, 4) < 0.4, (torch.randn(1, 4, 3), torch.randn(1, 4, 3))
    assert resets[0].any() and not resets.all()
    found = [rnn(x, state, resets=resets) for rnn in (theirs, ours)]
    for output, _ in found:
        output.square().sum().backward()
    torch.testing.assert_close(*found)
    torch.testing.assert_close(theirs.weight_hh.grad, ours.weight_hh_l0.grad)
    torch.testing.assert_close(*(rnn.step(x[0], state, resets=resets[0]) for rnn in (theirs, ours)))


def test_what_was_acted_is_what_is_learned_from(tmp_path: Path) -> None:
    """The second of two rollouts, read in one call: the same policy, an episode with each first observation."""
    import recurrent_ppo

    parser = common.options("name", "doc", envs=12, rollout=9, hidden=8)
    args = common.start(parser, ["--out", str(tmp_path)])
    model = recurrent_ppo.ActorCritic(fastrnn, args.hidden)
    actor = recurrent_ppo.Actor(args, model, 0)
    actor.rollout()
    rollout = actor.rollout()
    policy, values, _ = model(rollout.x, rollout.begins, rollout.state)
    torch.testing.assert_close(policy.log_prob(rollout.actions), rollout.likelihood)
    torch.testing.assert_close(values, rollout.returns - rollout.advantages)
    assert torch.equal(rollout.begins, rollout.x[..., 0] != 0)
    assert torch.equal(rollout.begins[1:], ~rollout.counts[:-1])
    assert len(actor.lasted) > 10 and min(actor.lasted) >= 1 and max(actor.lasted) <= 10


def test_advantages() -> None:
    """Each is the sum of the surprises to its episode's end; of two that end in the middle one was only cut off."""
    from recurrent_ppo import DISCOUNT, TRACE, advantages

    rewards, values = torch.rand(5, 2), torch.rand(6, 2)
    ended = torch.tensor([[0, 0], [0, 0], [1, 1], [0, 0], [0, 0]]).bool()
    terminated = ended & torch.tensor([True, False])
    found = advantages(rewards, values, terminated, ended)
    for row in range(2):
        for t in range(5):
            last = 2 if t <= 2 else 4
            want = 0.0
            for i in range(t, last + 1):
                following = 0.0 if terminated[i, row] else values[i + 1, row]
                want += (DISCOUNT * TRACE) ** (i - t) * (rewards[i, row] + DISCOUNT * following - values[i, row])
            torch.testing.assert_close(found[t, row], torch.as_tensor(want))


def test_teacher_forcing() -> None:
    given, said = common.teacher_forcing([[3, 4], [], [5]], end=7)
    assert given.tolist() == [[7, 3, 4], [7, 0, 0], [7, 5, 0]]
    assert said.tolist() == [[3, 4, 7], [7, -100, -100], [5, 7, -100]]


@pytest.mark.parametrize("attention", [False, True])
def test_a_word_is_spelled_as_if_alone(attention: bool) -> None:
    """Neither the encoder nor the attention sees the padding behind a short word."""
    from g2p import Speller

    model = Speller(common.library_of("fastrnn"), phonemes=5, embed=4, hidden=6, attention=attention)
    words, lengths = common.pad([torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2])])
    said = torch.tensor([[0, 1, 2], [0, 4, 3]])
    memory, state = model.encode(words, lengths)
    together, _, weights = model.decode(said, state, memory, words)
    memory, state = model.encode(words[1:, :2], lengths[1:])
    alone, _, _ = model.decode(said[1:], state, memory, words[1:, :2])
    torch.testing.assert_close(together[1:], alone)
    if attention:
        torch.testing.assert_close(weights.sum(2), torch.ones(2, 3))
        assert not weights[1, :, 2:].any()


def test_the_adding_problem() -> None:
    from long_memory import adding

    for x, total in adding(50, 10):
        numbers, marks = x.unbind(1)
        assert marks[:5].sum() == marks[5:].sum() == 1 and set(marks.tolist()) == {0.0, 1.0}
        torch.testing.assert_close(numbers[marks == 1].sum(0, keepdim=True), total)
