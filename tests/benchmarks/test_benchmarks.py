"""The benchmark suite itself: statistics, refusals, files. Nothing here asserts how long anything took."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind everything else: an installed fastrnn stays the one that is imported

pytest.importorskip("rich")
pytest.importorskip("psutil")
pytest.importorskip("cpuinfo")
pytest.importorskip("numpy")

from benchmarks import (  # noqa: E402
    cases,
    command_line,
    commands,
    drift,
    machine,
    measure,
    report,
    results,
    roofline,
    runner,
    schema,
    stats,
    suites,
)
from benchmarks.accuracy import run_accuracy  # noqa: E402
from benchmarks.cases import Case, Row, Suite, entries  # noqa: E402
from benchmarks.data import Data, make_data  # noqa: E402
from benchmarks.drift import run_drift  # noqa: E402
from benchmarks.peers import PEERS, ModulePeer, Prepared, prepare_module  # noqa: E402

FAST = results.Settings(ours="torch", rounds=2, budget_s=0.0, min_sample_s=1e-5, warmup_s=0.0)
FAST_OPTIONS = ["--rounds", "2", "--budget", "0.001", "--min-sample", "0.01"]
TINY = (
    *entries("lstm", "LSTM", (4, 2, 3, 5)),
    *entries("gru", "GRU", (4, 2, 3, 5)),
    *entries("cell", "RNNCell", (1, 2, 3, 5), stateful=True),
)
TORCH = PEERS["torch"]
ROOFLINE: dict[str, Any] = {
    "threads": 1,
    "gemm_flops": {"float32": 1e11, "float64": 5e10},
    "bandwidth": {"L2": 1e11, "L3": 3e10, "DRAM": 1e10},
    "cache_bytes": {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20},
}


class Planted(ModulePeer):
    """torch.nn with one class replaced, under a key of its own."""

    def __init__(self, key: str, **classes: type[torch.nn.Module]) -> None:
        super().__init__(key, key, "torch.nn")
        self.replaced = classes

    @property
    def namespace(self) -> Any:
        return SimpleNamespace(**vars(torch.nn) | self.replaced)

    def version(self) -> str:
        return "planted"


class OneWrongElement(torch.nn.LSTM):
    def forward(self, *arguments: Any) -> Any:  # type: ignore[override]
        output, states = super().forward(*arguments)
        nudge = torch.zeros_like(output)
        nudge[-1, -1, -1] = 2e-4
        return output + nudge, states


class WrongGradient(torch.nn.LSTM):
    """Right outputs; the gradient of bias_hh is 1% too large."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.bias_hh_l0.register_hook(lambda grad: grad * 1.01)


class NoGradient(torch.nn.LSTM):
    """Detaches a weight: no gradient reaches it."""

    def forward(self, input: Any, state: Any = None) -> Any:  # type: ignore[override]
        weights = {name: weight.detach() for name, weight in self.named_parameters()}
        return torch.func.functional_call(torch.nn.LSTM(3, 5), weights, (input, state))


class NotANumber(torch.nn.LSTM):
    def forward(self, *arguments: Any) -> Any:  # type: ignore[override]
        output, states = super().forward(*arguments)
        return output * float("nan"), states


class Raises(torch.nn.LSTM):
    def forward(self, *arguments: Any) -> Any:  # type: ignore[override]
        raise RuntimeError("planted failure\nwith more lines")


@pytest.fixture(autouse=True, scope="module")
def quickly() -> Iterator[None]:
    """One thread, and collections (one before each timing) that look at new objects only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def tiny_row(cell: str = "LSTM", mode: str = "train", peer: str = "torch", **options: Any) -> Row:
    ((case, _),) = entries("tiny", cell, (4, 2, 3, 5), modes=(mode,), **options)
    return Row("timing", case, mode, peer)


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "SUITES", {"tiny": Suite("for tests", TINY)})
    monkeypatch.setattr(roofline, "measure", lambda threads, caches, dtypes: ROOFLINE | {"threads": threads})
    monkeypatch.setattr(machine.cpuinfo, "get_cpu_info", lambda: {"brand_raw": "a processor"})


# ---- statistics


def test_ratio_is_theirs_over_ours() -> None:
    assert stats.pair_ratios([1.0, 2.0], [2.0, 1.0]) == [2.0, 0.5]
    with pytest.raises(ValueError):
        stats.pair_ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("n", "low", "high", "coverage"),
    # ranks and coverages of the sign test's interval, as in published tables
    [(5, 1, 5, 0.9375), (6, 1, 6, 0.96875), (9, 2, 8, 0.9609), (16, 4, 13, 0.9787), (20, 6, 15, 0.9586)],
)
def test_interval_by_order_statistics(n: int, low: int, high: int, coverage: float) -> None:
    values = [float(value) for value in range(n, 0, -1)]  # value = rank
    interval = stats.median_interval(values)
    assert (interval.low, interval.high, interval.count) == (low, high, n)
    assert interval.median == (n + 1) / 2
    assert interval.coverage == pytest.approx(coverage, abs=1e-4)


def test_interval_covers_as_often_as_it_says() -> None:
    draws = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    intervals = [stats.median_interval(row) for row in draws.tolist()]
    covered = sum(interval.low <= 1 <= interval.high for interval in intervals) / len(intervals)
    assert covered == pytest.approx(intervals[0].coverage, abs=0.01)


def test_interval_of_one_and_of_none() -> None:
    one = stats.median_interval([3.0])
    assert (one.low, one.median, one.high, one.coverage) == (3.0, 3.0, 3.0, 0.0)
    with pytest.raises(ValueError, match="no values"):
        stats.median_interval([])


@pytest.mark.parametrize(
    ("median", "low", "high", "expected"),
    [
        (1.5, 1.4, 1.6, "win"),
        (0.5, 0.4, 0.6, "loss"),
        (1.5, 0.9, 2.0, "tie"),  # the interval holds 1
        (1.19, 1.18, 1.2, "tie"),  # clear, but under the threshold
        (1.21, 1.2, 1.22, "win"),
        (0.84, 0.83, 0.85, "tie"),  # 1 / 0.84 = 1.19: as small a gap as 1.19 the other way
        (0.83, 0.82, 0.84, "loss"),
        (float("nan"), 1.0, 1.0, "tie"),
    ],
)
def test_verdict(median: float, low: float, high: float, expected: str) -> None:
    assert stats.verdict(stats.Interval(median, low, high, 0.97, 16), tie=0.2) == expected


def test_noisy() -> None:
    assert not stats.is_noisy(stats.Interval(2.0, 1.9, 2.1, 0.97, 16), noisy=0.2)
    assert stats.is_noisy(stats.Interval(2.0, 1.7, 2.2, 0.97, 16), noisy=0.2)
    assert stats.is_noisy(stats.Interval(2.0, 2.0, 2.0, 0.5, 2), noisy=0.2), "two pairs make no interval"


def test_spread_and_geometric_mean() -> None:
    assert stats.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == stats.Spread(3.0, 2.0, 4.0)
    assert stats.spread([7.0]) == stats.Spread(7.0, 7.0, 7.0)
    assert stats.geometric_mean([0.5, 2.0, 4.0]) == pytest.approx(4 ** (1 / 3))
    assert stats.geometric_mean([]) is None


# ---- measuring


def test_order_is_flipped_every_round_and_rounds_are_even() -> None:
    a, b = (Prepared(lambda: None, dict) for _ in range(2))
    log: list[str] = []

    def take(prepared: Prepared, repeats: int) -> float:
        log.append("a" if prepared is a else "b")
        return float(repeats)

    times = measure.time_pairs(a, b, (3, 5), replace(FAST, rounds=5, budget_s=100.0), take)
    assert "".join(log) == "abba" * 3
    assert times == ([3.0] * 6, [5.0] * 6)


def test_budget_ends_a_row_but_leaves_an_interval() -> None:
    a, b = (Prepared(lambda: None, dict) for _ in range(2))
    ours, theirs = measure.time_pairs(a, b, (1, 1), replace(FAST, rounds=1000, budget_s=0.0))
    assert len(ours) == len(theirs) == measure.MIN_PAIRS
    assert stats.median_interval(ours).coverage >= 0.95


def test_a_sample_lasts_as_long_as_asked() -> None:
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1

    prepared = Prepared(step, dict)
    repeats = measure.warm_up(prepared, replace(FAST, min_sample_s=1e-3))
    assert calls > repeats >= 1
    calls = 0
    measure.sample(prepared, repeats)
    assert calls == repeats


def test_garbage_collection_is_off_while_timing_and_back_after_an_error() -> None:
    gc.enable()  # conftest.py has it off in tests
    with pytest.raises(KeyError), measure.no_garbage_collection():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


ALL_OPTIONS: list[dict[str, Any]] = [
    {},
    {"layers": 2, "bidirectional": True},
    {"shortest": 1},
    {"shortest": 2, "bidirectional": True, "dtype": "float64"},
    {"stateful": True, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
def test_torch_against_itself(cell: str, mode: str, options: dict[str, Any]) -> None:
    result = measure.run_timing(tiny_row(cell, mode, **options), TORCH, TORCH, FAST)
    assert result.status == "ok", result.message
    assert result.timing is not None
    assert result.timing.check.error == 0
    assert len(result.timing.ours.samples_s) == len(result.timing.theirs.samples_s) == 2


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell", "LSTM"])
def test_cells_and_projection(cell: str, mode: str) -> None:
    options = {"proj": 2} if cell == "LSTM" else {"stateful": True}
    result = measure.run_timing(tiny_row(cell, mode, **options), TORCH, TORCH, FAST)
    assert result.status == "ok", result.message


@pytest.mark.parametrize("peer", ["torch", "loop"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_gradient_penalties(cell: str, peer: str) -> None:
    """Against each peer of the suite, what its kernel is called included."""
    result = measure.run_timing(tiny_row(cell, "penalty"), PEERS["fastrnn"], PEERS[peer], FAST)
    assert result.status == "ok", result.message


WAYS = {
    "autocast": ("fwd", "train"), "checkpoint": ("train",), "compiled": ("fwd", "train"),
    "loop": ("fwd", "train"), "step": ("fwd",),
}  # fmt: skip


@pytest.mark.parametrize("way", cases.WAYS)
def test_ways_of_a_call(way: str) -> None:
    cell, options = ("LSTMCell" if way == "loop" else "GRU"), {"stateful": way in ("loop", "step")}
    for mode in WAYS[way]:
        row = tiny_row(cell, f"{mode}-{way}", **options)
        if way == "step":
            row = replace(row, case=replace(row.case, T=1))
        result = measure.run_timing(row, PEERS["fastrnn"], TORCH, FAST)
        assert result.status == "ok", result.message


@pytest.mark.parametrize("mode", cases.MODES)
def test_unbatched_input(mode: str) -> None:
    row = tiny_row("LSTM", mode, unbatched=True, stateful=True)
    row = replace(row, case=replace(row.case, B=1))
    result = measure.run_timing(row, PEERS["fastrnn"], TORCH, FAST)
    assert result.status == "ok", result.message


@pytest.mark.parametrize("mode", cases.FORWARD_MODE)
def test_forward_mode(mode: str) -> None:
    """Against each peer; a row of torch.nn's LSTM says that it has none."""
    for cell, peer in (("GRU", "torch"), ("RNN", "torch"), ("LSTM", "loop")):
        result = measure.run_timing(tiny_row(cell, mode), PEERS["fastrnn"], PEERS[peer], FAST)
        assert result.status == "ok", result.message
    assert PEERS["torch"].supports(tiny_row("LSTM", mode).case, mode) == "its LSTM has no forward-mode AD"


def test_everything_that_training_makes_is_compared() -> None:
    def names(row: Row) -> set[str]:
        return set(measure.prepare(TORCH, row, make_data(row.case))[1])

    parameters = {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}
    expected = {"output", "h_n", "c_n", "grad_input"} | {f"grad_{name}" for name in parameters}
    assert names(tiny_row()) == names(tiny_row(shortest=2)) == expected
    assert names(tiny_row(proj=2)) == expected | {"grad_weight_hr_l0"}
    assert names(tiny_row("GRUCell", stateful=True)) >= {"h", "grad_h_0", "grad_input", "grad_weight_hh"}
    assert names(tiny_row(mode="fwd")) == {"output", "h_n", "c_n"}


def test_training_makes_weights_look_changed() -> None:
    row = tiny_row()
    module = torch.nn.LSTM(3, 5)
    prepared = prepare_module(module, row.case, "train", make_data(row.case))
    before = [weight._version for weight in module.parameters()]
    prepared.step()
    assert all(weight._version > old for weight, old in zip(module.parameters(), before, strict=True))


def test_data_is_equal_for_all_and_shared_by_none() -> None:
    case = tiny_row(shortest=1, stateful=True).case
    state = torch.get_rng_state()
    first, second = make_data(case), make_data(case)
    assert torch.equal(state, torch.get_rng_state())
    copy = first.to(torch.float32)
    for name in ("input", "lengths"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).data_ptr() != getattr(copy, name).data_ptr()
    assert first.lengths is not None
    assert first.lengths.max() == case.T
    beyond = torch.arange(case.T)[:, None] >= first.lengths
    assert not first.input[beyond].any()


@pytest.mark.parametrize(
    ("wrong", "mode", "status", "text"),
    [
        (OneWrongElement, "fwd", "mismatch", "output: differs by"),
        (WrongGradient, "train", "mismatch", "grad_bias_hh_l0: differs by"),
        (NotANumber, "fwd", "mismatch", "output: differs by inf"),
        (NoGradient, "train", "error", "planted: "),
        (Raises, "fwd", "error", "planted: RuntimeError: planted failure (test_benchmarks.py:"),
    ],
)
@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_wrong_implementations_are_reported(
    wrong: type[torch.nn.Module], mode: str, status: str, text: str, side: str
) -> None:
    planted = Planted("planted", LSTM=wrong)
    sides = (planted, TORCH) if side == "ours" else (TORCH, planted)
    result = measure.run_timing(tiny_row(mode=mode), *sides, FAST)
    assert (result.status, result.timing) == (status, None)
    assert text in result.message or (wrong is NotANumber and "output: differs by" in result.message)
    assert str(ROOT) not in result.message


def test_comparison_sees_missing_names_shapes_and_dtypes() -> None:
    a, b = {"output": torch.ones(2, 3), "h_n": torch.ones(3)}, {"output": torch.ones(2, 3)}
    assert "h_n: only ours" in measure.compare(a, b)[1]
    assert "h_n: only theirs" in measure.compare(b, a)[1]
    assert "[3, 2]" in measure.compare({"output": torch.ones(3, 2)}, b)[1]
    assert "float64" in measure.compare({"output": torch.ones(2, 3).double()}, b)[1]
    assert measure.compare({"output": torch.ones(2, 3)}, b)[1] == ""


def test_accuracy_row() -> None:
    row = replace(tiny_row(dtype="bfloat16"), kind="accuracy")
    result = run_accuracy(row, TORCH, TORCH, FAST)
    assert result.status == "ok"
    assert result.accuracy is not None
    assert result.accuracy.ours == result.accuracy.theirs
    assert 0 < result.accuracy.ours.outputs < 0.05

    result = run_accuracy(row, Planted("planted", LSTM=WrongGradient), TORCH, FAST)
    assert result.status == "ok", "1% is within bfloat16's own error"
    row = replace(tiny_row(), kind="accuracy")
    result = run_accuracy(row, Planted("planted", LSTM=WrongGradient), TORCH, FAST)
    assert result.status == "mismatch"
    assert "grad_bias_hh_l0" in result.message
    assert "not finite" in run_accuracy(row, Planted("planted", LSTM=NotANumber), TORCH, FAST).message
    result = run_accuracy(row, TORCH, Planted("planted", LSTM=Raises), FAST)
    assert result.status == "ok", "a peer that cannot is told, and does not fail us"
    assert result.accuracy is not None
    assert result.accuracy.theirs is None
    assert "planted failure" in (result.accuracy.theirs_missing or "")


def test_drift_row() -> None:
    ((case, _),) = entries("tiny", "LSTM", (100, 2, 3, 5), modes=("fwd",))
    row = Row("drift", case, "fwd", "ourbf16")
    exact, narrow = (run_drift(row, PEERS[key], FAST).drift for key in ("fastrnn", "ourbf16"))
    assert exact is not None and narrow is not None
    assert exact.steps == narrow.steps == [1, 10, 100]
    for small, large in zip(exact.rms + exact.largest, narrow.rms + narrow.largest, strict=True):
        assert 0 < 100 * small < large < 0.1
    result = run_drift(row, Planted("planted", LSTM=Raises), FAST)
    assert result.status == "error" and "planted failure" in result.message
    assert "not finite" in run_drift(row, Planted("planted", LSTM=NotANumber), FAST).message
    for gain in (1.0, 4.0):
        weights = make_data(replace(case, gain=gain)).weights
        assert torch.equal(weights["weight_hh_l0"], make_data(case).weights["weight_hh_l0"] * gain)
        assert torch.equal(weights["weight_ih_l0"], make_data(case).weights["weight_ih_l0"])


def test_drift_of_a_trained_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is short here, and it is trained for two steps."""
    monkeypatch.setattr(drift, "TRAINING_STEPS", 2)
    drift.trained.cache_clear()
    ((case, _),) = entries("tiny", "GRU", (10, 2, 4, 8), modes=("fwd",), trained=True)
    data = drift.drift_data(case, 0)
    drift.trained.cache_clear()
    assert data.input.shape == (10, 2, 4) and data.weights["weight_hh_l0"].shape == (24, 8)
    assert not torch.equal(
        data.weights["weight_hh_l0"], make_data(replace(case, trained=False)).weights["weight_hh_l0"]
    )


# ---- the table


def test_ids_are_unique_and_each_selects_exactly_its_row() -> None:
    rows = list(suites.select(list(suites.SUITES), None))
    ids = [row.id for row in rows]
    assert len(set(ids)) == len(ids)
    for row in rows:
        assert re.fullmatch(r"[a-z0-9-]+", row.id)
        assert list(suites.select(None, f"^{row.id}$")) == [row]


def test_default_is_quick_and_a_filter_looks_everywhere() -> None:
    assert set(suites.select(None, None)) == set(suites.SUITES["quick"].rows())
    assert {row.kind for row in suites.select(None, "lstm")} == {"timing", "accuracy", "memory", "drift"}
    assert {row.case.shortest > 0 for row in suites.select(["packed"], "lstm")} == {True}
    assert not suites.select(["packed"], "cell")


# ---- documents and reports


def document(*made: results.Result, planned: int | None = None) -> dict[str, Any]:
    facts = machine.machine_facts(threads=1) | {"roofline": [ROOFLINE]}
    return results.Document.build(
        made, FAST, facts, "python -m benchmarks", len(made) if planned is None else planned
    ).data


def timed(family: str, ratio: float, half_width: float = 0.01, status: str = "ok") -> results.Result:
    """A result with a ratio of our choosing; the arguments make its id."""
    case = Case(family=family, cell="LSTM", T=1, B=ord(family), I=len(status), H=round(ratio * 100))
    row = Row("timing", case, "fwd", "torch")
    if status != "ok":
        return results.Result(row, status, "said why")
    interval = stats.Interval(ratio, ratio - half_width, ratio + half_width, 0.97, 16)
    side = results.Side(stats.Spread(1.0, 0.9, 1.1), 1, [1.0])
    check = results.Check("output", 0.0, 1e-4)
    word, noisy = stats.verdict(interval, FAST.tie), stats.is_noisy(interval, FAST.noisy)
    timing = results.Timing(interval, word, noisy, 0.0, side, side, check)
    return results.Result(row, "ok", timing=timing, command="again")


@pytest.fixture
def mixed(tiny_suite: None) -> dict[str, Any]:
    return document(
        timed("b", 3.0), timed("a", 0.7), timed("c", 1.0, status="skipped"), timed("a", 1.1), timed("b", 0.4),
        timed("a", 2.0, half_width=0.5), timed("a", 1.0, status="mismatch"), timed("c", 1.0, status="error"),
    )  # fmt: skip


def test_losses_come_first_behind_failures_and_nothing_is_dropped(mixed: dict[str, Any]) -> None:
    words = [report.row_verdict(row) for row in mixed["rows"]]
    assert sorted(words[:2]) == ["error", "mismatch"]
    assert words[2:] == ["loss", "loss", "tie", "win", "win", "skipped"]
    ratios = [row["timing"]["ratio"]["median"] for row in mixed["rows"] if row["timing"]]
    assert ratios == [0.4, 0.7, 1.1, 2.0, 3.0]
    assert report.rerun_commands(mixed).count("again") == 2
    text = report.markdown(mixed)
    for row in mixed["rows"]:
        assert text.count(f"| {row['id']} |") == 1
    assert "| win? | 2.00 |" in text
    assert "noisy: interval 50% wide" in text
    assert "said why" in text
    assert text.index("0.40") < text.index("0.70")


def test_family_means_count_what_they_leave_out(mixed: dict[str, Any]) -> None:
    means = {mean["family"]: mean for mean in mixed["summary"]["families"]}
    assert means["a"]["ratio"] == pytest.approx((0.7 * 1.1 * 2.0) ** (1 / 3))
    assert (means["a"]["rows"], means["a"]["left_out"]) == (3, 1)
    assert [means["a"][name] for name in ("loss", "tie", "win", "noisy")] == [1, 1, 1, 1]
    assert (means["c"]["ratio"], means["c"]["left_out"]) == (None, 2)


def test_document_survives_a_round_trip(mixed: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    results.Document(mixed).save(file)
    assert results.Document.load(file).data == json.loads(json.dumps(mixed))
    rows = [line for line in file.read_text().splitlines() if line.startswith('{"id": ')]
    assert [json.loads(line.rstrip(","))["id"] for line in rows] == [row["id"] for row in mixed["rows"]]


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda data: data.update(schema_version=99), "schema_version: expected 2, got 99"),
        (lambda data: data.update(schema="other"), "schema: expected"),
        (lambda data: data.pop("machine"), "machine is missing"),
        (lambda data: data["machine"].pop("cpu"), "cpu is missing"),
        (lambda data: data["rows"][3].pop("command"), r"rows\[3\]: command is missing"),
        (lambda data: data["rows"][0].update(status="fine"), "status is 'fine'"),
        (lambda data: data["rows"][2].update(timing=None), "not exactly one of"),
        (lambda data: data["rows"].append(7), "expected an object, got int"),
    ],
)
def test_invalid_documents_are_refused(
    mixed: dict[str, Any], tmp_path: Path, break_it: Callable[[dict[str, Any]], object], problem: str
) -> None:
    assert schema.schema_problems(mixed) == []
    break_it(mixed)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(mixed))
    with pytest.raises(ValueError, match=problem):
        results.Document.load(file)


def test_machine_facts_hold_no_paths() -> None:
    environment = {"OMP_PLACES": "threads", "HOME": "/home/x", "LD_PRELOAD": "/opt/lib/liballoc.so:/b/c.so"}
    assert machine.environment_facts(environment) == {
        "LD_PRELOAD": "liballoc.so c.so",
        "OMP_PLACES": "threads",
    }
    facts = machine.machine_facts(threads=3)
    assert schema.schema_problems({"machine": facts}) != []
    assert facts["threads"] == 3
    assert facts["software"]["torch"] == torch.__version__
    assert facts["cpu"]["model"]
    json.dumps(facts)


def test_other_work_is_what_the_cores_did_beyond_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 50.0, 7.0), (110.0, 66.0, 15.0), (110.1, 90.0, 9.0)])  # wall, busy, ours
    monkeypatch.setattr(machine.OtherWork, "_read", staticmethod(lambda: next(readings)))
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 4)
    other_work = machine.OtherWork()
    assert other_work.share() == pytest.approx((16 - 8) / (10 * 4))
    other_work._start = (110.0, 66.0, 15.0)
    assert other_work.share() == 0, "a tenth of a second is too short to tell"


def test_other_work_makes_a_row_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.OtherWork, "share", lambda self: 0.4)
    quiet = replace(FAST, rounds=6, noisy=1e9)
    timing = measure.run_timing(tiny_row(), TORCH, TORCH, quiet).timing
    assert timing is not None
    assert (timing.noisy, timing.other_work) == (True, 0.4)
    timing = measure.run_timing(tiny_row(), TORCH, TORCH, replace(quiet, busy=0.5)).timing
    assert timing is not None
    assert not timing.noisy


@pytest.mark.parametrize("described", [{"isa": "avx2"}, "text", None])
def test_build_info(described: Any) -> None:
    assert machine.build_info(SimpleNamespace()) is None
    assert machine.build_info(SimpleNamespace(build_info=lambda: described)) in (described, str(described))
    assert "ZeroDivisionError" in machine.build_info(SimpleNamespace(build_info=lambda: 1 / 0))


def test_pinning_is_added_only_where_the_user_chose_none() -> None:
    both = {"OMP_PROC_BIND": "true", "OMP_PLACES": "threads"}
    assert machine.missing_pinning({}, None) == both
    assert machine.missing_pinning(both, None) == {}
    assert machine.missing_pinning({"OMP_PROC_BIND": "false"}, None) == {"OMP_PLACES": "threads"}
    assert machine.missing_pinning({"GOMP_CPU_AFFINITY": "0"}, None) == {}
    assert machine.missing_pinning(both, 2) == {"OMP_NUM_THREADS": "2"}
    assert machine.missing_pinning({**both, "OMP_NUM_THREADS": "2"}, 2) == {}


# ---- the command line


def run_tiny(tmp_path: Path, *options: str, peers: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "run.json"
    argv = [*FAST_OPTIONS, "--suite", "tiny", "--json", str(file), *options]
    status = commands.run(argv, peers=peers or {"fastrnn": TORCH, "torch": TORCH})
    return status, results.Document.load(file).data


def test_a_clean_run(tiny_suite: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    markdown = tmp_path / "run.md"
    status, data = run_tiny(tmp_path, "--markdown", str(markdown))
    assert status == command_line.OK
    assert data["complete"]
    assert {row["id"] for row in data["rows"]} == {row.id for row in suites.SUITES["tiny"].rows()}
    assert "6 rows" in capsys.readouterr().out
    assert "| lstm-4x2x3x5-fwd-vs-torch |" in markdown.read_text()


@pytest.mark.parametrize("wrong", [OneWrongElement, WrongGradient, Raises])
def test_a_wrong_row_fails_the_run_and_stays_in_it(
    tiny_suite: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: type[torch.nn.Module]
) -> None:
    planted = Planted("fastrnn", LSTM=wrong)
    status, data = run_tiny(tmp_path, peers={"fastrnn": planted, "torch": TORCH})
    assert status == command_line.FAILURES
    failed = [row for row in data["rows"] if row["status"] in results.FAILED]
    assert len(data["rows"]) == len(TINY)
    assert failed == data["rows"][: len(failed)]
    assert {row["case"]["cell"] for row in failed} == {"LSTM"}
    assert failed[0]["id"] in capsys.readouterr().out


def test_a_missing_peer_makes_skipped_rows(tiny_suite: None, tmp_path: Path) -> None:
    absent = ModulePeer("absent", "absent", "no_such_module_anywhere")
    peers = {"fastrnn": TORCH, "torch": TORCH, "absent": absent}
    status, data = run_tiny(tmp_path, "--peer", "torch", "absent", peers=peers)
    skipped = [row for row in data["rows"] if row["status"] == "skipped"]
    assert status == command_line.OK
    assert len(data["rows"]) == 2 * len(skipped) == 2 * len(TINY)
    assert all("cannot be imported" in row["message"] for row in skipped)


def test_an_interrupted_run_keeps_what_it_has(tiny_suite: None, tmp_path: Path) -> None:
    class Interrupts(ModulePeer):
        def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
            if case.cell == "GRU":
                raise KeyboardInterrupt
            return super().prepare(case, mode, data)

    interrupts = Interrupts("fastrnn", "fastrnn", "torch.nn")
    status, data = run_tiny(tmp_path, peers={"fastrnn": interrupts, "torch": TORCH})
    assert status == command_line.INTERRUPTED
    assert not data["complete"]
    assert len(data["rows"]) == 2
    assert "INCOMPLETE: 2 of 6" in report.markdown(data)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--filter", "no such row"], "no row's id matches"),
        (["--filter", "("], "is no regular expression"),
        (["--suite", "nothing"], "invalid choice"),
        (["--rounds", "0"], "expected a number above 0"),
        (["--ours", "nobody"], "unknown contestant 'nobody'"),
        (["--ours", "absent"], "cannot be imported"),
    ],
)
def test_wrong_command_lines(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    absent = ModulePeer("absent", "absent", "no_such_module_anywhere")
    with pytest.raises(SystemExit) as exit:
        commands.run(argv, peers={"torch": TORCH, "absent": absent})
    assert exit.value.code == command_line.USAGE
    assert text in capsys.readouterr().err


def python_m_benchmarks(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_rerun_command_says_what_was_not_default() -> None:
    row = suites.SUITES["quick"].rows()[0]
    assert runner.rerun_command(row, results.Settings(threads=2)).endswith(f"'^{row.id}$' --threads 2 --rounds 16")
    settings = results.Settings(ours="torch", threads=1, rounds=8, budget_s=3, min_sample_s=2e-3, tie=0.1, seed=5)
    end = "--threads 1 --rounds 8 --budget 3 --min-sample 2 --tie 0.1 --seed 5 --ours torch"
    assert runner.rerun_command(row, settings).endswith(end)


def test_list_from_the_shell() -> None:
    done = python_m_benchmarks("run", "--list", "--suite", "quick")
    assert done.returncode == 0
    assert done.stdout.split() == [row.id for row in suites.SUITES["quick"].rows()]
    assert done.stderr == ""


def test_a_printed_command_reruns_its_row(tmp_path: Path) -> None:
    row = next(row for row in suites.SUITES["quick"].rows() if row.case.cell == "GRUCell" and row.mode == "train")
    command = runner.rerun_command(row, results.Settings(ours="torch", threads=1))
    file = tmp_path / "run.json"
    done = python_m_benchmarks(*shlex.split(command)[3:], *FAST_OPTIONS, "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "restarting with OMP_PROC_BIND=true OMP_PLACES=threads OMP_NUM_THREADS=1" in done.stderr
    data = results.Document.load(file).data
    assert [found["id"] for found in data["rows"]] == [row.id]
    assert data["settings"]["threads"] == 1
    assert data["machine"]["environment"]["OMP_PROC_BIND"] == "true"


@pytest.mark.parametrize("row", suites.SUITES["quick"].rows(), ids=lambda row: row.id)
def test_fastrnn_agrees_on_the_quick_suites_kinds(row: Row) -> None:
    """Every quick row, its sizes cut down: none of them is a mismatch or an error."""
    if PEERS["fastrnn"].missing():
        pytest.skip("fastrnn is not built here")
    case = replace(row.case, T=min(row.case.T, 6), B=min(row.case.B, 3), I=7, H=9)
    case = replace(case, proj=case.proj and 4, shortest=case.shortest and 2)
    result = measure.run_timing(replace(row, case=case), PEERS["fastrnn"], TORCH, FAST)
    assert result.status == "ok", result.message
