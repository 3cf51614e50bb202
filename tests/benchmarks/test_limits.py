"""Floors, peaks, peak memory, fits and the table of suites. Clocks and processes are stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import floor, memory, report, roofline, runner, scaling, suites
from benchmarks.cases import Case, Row, Suite, entries
from benchmarks.peers import PEERS
from tests.benchmarks.documents import ROOFLINE, SETTINGS, document, timed


def case(**fields: Any) -> Case:
    return Case(**{"family": "x", "cell": "LSTM", "T": 10, "B": 4, "I": 64, "H": 64} | fields)


# ---- floors


def test_the_floor_of_a_layer_by_hand() -> None:
    found = floor.floor(case(), "fwd", ROOFLINE)
    assert found.flops == 2 * 10 * 4 * 4 * 64 * (64 + 64)
    assert found.weight_bytes == 10 * 4 * 64 * 64 * 4
    assert found.level == "L2", "32 KiB a thread are more than 0.8 of L1"
    input_s = 2 * 10 * 4 * 4 * 64 * 64 / 1e11
    assert found.seconds == pytest.approx(input_s + max(input_s, found.weight_bytes / 1e11))
    assert found.bound == "flops"


def test_training_does_three_times_the_products_and_reads_weights_twice() -> None:
    forward, training = (floor.floor(case(), mode, ROOFLINE) for mode in ("fwd", "train"))
    assert training.flops == 3 * forward.flops
    assert training.weight_bytes == 2 * forward.weight_bytes


def test_one_step_of_one_row_is_bound_by_both_weights() -> None:
    found = floor.floor(case(T=1, B=1, H=1024, I=1024), "fwd", ROOFLINE)
    assert found.weight_bytes == 2 * 4 * 1024 * 1024 * 4
    assert (found.level, found.bound) == ("DRAM", "weights"), "33.5 MB do not fit in 32 MiB of L3"
    assert found.seconds == found.weight_bytes / ROOFLINE["bandwidth"]["DRAM"]


@pytest.mark.parametrize(
    ("share", "threads", "level"),
    [(10 << 10, 2, "L1"), (40 << 10, 2, "L2"), (900 << 10, 2, "L3"), (20 << 20, 1, "L3"), (20 << 20, 2, "DRAM")],
)
def test_the_level_that_weights_fit_in(share: int, threads: int, level: str) -> None:
    assert floor.weight_level(share, ROOFLINE["cache_bytes"], threads) == level
    assert floor.weight_level(share, {}, threads) == "DRAM"


def test_half_types_may_compute_in_float32() -> None:
    slow = ROOFLINE | {"gemm_flops": {"float32": 1e11, "float16": 1e9}}
    assert floor.floor(case(dtype="float16", T=1), "fwd", slow).seconds < 1e-4
    wide = floor.floor(case(dtype="float64", B=64), "fwd", ROOFLINE)
    assert wide.seconds == pytest.approx(2 * floor.floor(case(B=64), "fwd", ROOFLINE).seconds), "its own, lower peak"


def test_lengths_count_only_what_is_there() -> None:
    full, packed = floor.floor(case(T=20), "fwd", ROOFLINE), floor.floor(case(T=20, shortest=4), "fwd", ROOFLINE)
    assert packed.flops == pytest.approx(full.flops * 12 / 20)
    assert packed.weight_bytes == full.weight_bytes


sizes = st.integers(1, 300)


@given(sizes, sizes, sizes, st.sampled_from(["LSTM", "GRU", "RNN"]), st.sampled_from(["fwd", "train"]))
def test_floors_grow_with_every_size_and_never_undercut_the_arithmetic(
    T: int, B: int, H: int, cell: str, mode: str
) -> None:
    base = case(cell=cell, T=T + 1, B=B, I=H, H=H)
    found = floor.floor(base, mode, ROOFLINE)
    assert math.isfinite(found.seconds)
    assert found.seconds >= found.flops / 1e11 * (1 - 1e-9)
    for bigger in (replace(base, T=2 * base.T), replace(base, B=2 * B), replace(base, layers=2)):
        assert floor.floor(bigger, mode, ROOFLINE).seconds >= found.seconds
    both = floor.floor(replace(base, bidirectional=True), mode, ROOFLINE)
    assert both.flops == pytest.approx(2 * found.flops)


# ---- peaks, with a stand-in for the clock


def test_peaks_from_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SIZE", 8)
    monkeypatch.setattr(roofline, "HALF_SIZE", 4)
    monkeypatch.setattr(roofline, "DRAM_BYTES", 1 << 16)
    calls: list[int] = []

    def shortest(call: Callable[[], object]) -> float:
        call()
        calls.append(torch.get_num_threads())
        return 2e-6

    caches = [
        {"level": 1, "type": "Data", "size": "1K", "shared_by": 1},
        {"level": 1, "type": "Instruction", "size": "9K", "shared_by": 1},
        {"level": 2, "type": "Unified", "size": "4K", "shared_by": 1},
    ]
    before = torch.get_num_threads()
    found = roofline.measure(2, caches, ["bfloat16"], shortest)
    assert torch.get_num_threads() == before
    assert found["threads"] == 2
    assert found["gemm_flops"] == {"float32": 2 * 8**3 / 2e-6, "bfloat16": 2 * 4**3 / 2e-6}
    assert found["bandwidth"].keys() == {"L2", "DRAM"}
    assert found["bandwidth"]["L2"] >= found["bandwidth"]["DRAM"]
    assert found["cache_bytes"] == {"L1": 1024, "L2": 4096}
    assert calls[-1] == 1, "a core's own cache is read by one thread"


def test_a_read_is_timed_less_an_empty_call() -> None:
    times = iter([5e-6, 1e-6, 9e-6, 1e-6])
    assert roofline.read_bandwidth(4096, lambda call: next(times)) == pytest.approx(4096 / 4e-6)


def test_the_better_of_two_measurements_counts() -> None:
    slower = ROOFLINE | {"gemm_flops": {"float32": 1e10, "float64": 6e10}, "bandwidth": {"L2": 2e11, "DRAM": 1e9}}
    best = roofline.best_of(ROOFLINE, slower)
    assert best["gemm_flops"] == {"float32": 1e11, "float64": 6e10}
    assert best["bandwidth"] == {"L2": 2e11, "L3": 3e10, "DRAM": 1e10}


def test_the_real_measurement_gives_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SPENT_S", 1e-3)
    monkeypatch.setattr(roofline, "SIZE", 32)
    monkeypatch.setattr(roofline, "DRAM_BYTES", 1 << 20)
    found = roofline.measure(1, [], ["float64"])
    assert all(value > 0 for key in ("gemm_flops", "bandwidth") for value in found[key].values())


# ---- rows that would take too long


def test_rows_above_the_longest_are_skipped_and_say_so() -> None:
    ((tiny, mode),) = entries("x", "LSTM", (2, 1, 3, 4), modes=("fwd",))
    row = Row("timing", tiny, mode, "torch")
    settings = replace(SETTINGS, ours="torch", rounds=2, budget_s=0.0, min_sample_s=1e-5, warmup_s=0.0, threads=1)
    slow = ROOFLINE | {"threads": 1, "gemm_flops": {"float32": 100.0}}

    def run(longest_s: float | None, of_suite: float | None) -> Any:
        suite = Suite("x", ((tiny, mode),), longest_s=of_suite)
        (result,) = runner.run_rows({row: suite}, PEERS, replace(settings, longest_s=longest_s), rooflines=[slow])
        return result

    result = run(None, 1.0)
    assert result.status == "skipped"
    assert "at least 4.5 s here (its floor), more than 1 (--longest)" in result.message
    assert run(0.5, None).status == "skipped"
    assert run(10.0, 1.0).status == "ok", "the command line's word counts"
    assert "--longest 10" in run(10.0, 1.0).command
    assert run(None, None).timing.floor.seconds == pytest.approx(4.48)


def test_a_row_with_threads_of_its_own_gets_them_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ((tiny, mode),) = entries("x", "LSTM", (2, 1, 3, 4), modes=("fwd",))
    seen: list[int] = []

    def run_row(row: Row, *rest: Any) -> Any:
        seen.append(torch.get_num_threads())
        return replace(timed(1.0), row=row)

    monkeypatch.setattr(runner, "run_row", run_row)
    suite = Suite("x", ((tiny, mode),), threads=(2, 1, 0))
    chosen = dict.fromkeys(suite.rows(), suite)
    before = torch.get_num_threads()
    made = runner.run_rows(chosen, PEERS, replace(SETTINGS, threads=1))
    assert seen == [2, 1, 1]
    assert torch.get_num_threads() == before
    assert "--threads 2" in made[0].command
    assert "threads2-vs-torch" in made[0].row.id


# ---- memory


def test_memory_rows_compare_medians() -> None:
    row = Row("memory", case(cell="GRU"), "train", "torch")
    asked: list[str] = []

    def launch(side: str, launched: Row, settings: Any) -> int:
        assert launched is row
        asked.append(side)
        return {"fastrnn": 100, "torch": 300}[side] + len(asked)

    result = memory.run_memory(row, "fastrnn", "torch", SETTINGS, launch=launch)
    assert result.memory is not None
    assert asked == ["fastrnn"] * 3 + ["torch"] * 3
    assert result.memory.ours == [101, 102, 103]
    assert result.memory.ratio == pytest.approx(305 / 102)
    assert (result.memory.verdict, result.memory.unit_bytes) == ("win", 10 * 4 * 64 * 4)


def test_a_failing_process_makes_an_error_row() -> None:
    row = Row("memory", case(), "train", "torch")

    def launch(side: str, row: Row, settings: Any) -> int:
        raise RuntimeError(f"{side}: MemoryError: no more")

    result = memory.run_memory(row, "fastrnn", "torch", SETTINGS, launch=launch)
    assert (result.status, result.message) == ("error", "fastrnn: MemoryError: no more")


needs_proc = pytest.mark.skipif(not memory.CLEAR.exists(), reason="reads /proc")


@needs_proc
def test_peak_sees_what_is_freed_before_the_end() -> None:
    size = 64 << 20

    def step() -> None:
        torch.ones(size // 4)

    assert 0.9 * size < memory.peak_of(step) < 1.5 * size
    assert memory.peak_of(lambda: None) < 8 << 20


@needs_proc
def test_a_fresh_process_measures_a_row_of_the_suite() -> None:
    row = min(suites.SUITES["memory"].rows(), key=lambda row: row.case.T * row.case.B * row.case.H)
    peak = memory.launch("torch", row, replace(SETTINGS, threads=1))
    output = row.case.T * row.case.B * row.case.H * 4
    assert output < peak < 100 * output
    with pytest.raises(RuntimeError, match="nobody"):
        memory.launch("nobody", row, SETTINGS)


def test_the_small_step_is_of_the_same_kind() -> None:
    for row in suites.SUITES["memory"].rows():
        tiny = memory.small(row.case)
        assert (tiny.cell, tiny.layers, tiny.bidirectional) == (row.case.cell, row.case.layers, row.case.bidirectional)
        assert bool(tiny.shortest) == bool(row.case.shortest)
        assert tiny.T * tiny.B * tiny.H < 100


# ---- fits


@given(st.floats(0.2, 3), st.floats(1e-6, 1), st.lists(st.integers(1, 4096), min_size=2, max_size=6, unique=True))
def test_the_exponent_of_a_power_law_is_found(power: float, factor: float, sizes: list[int]) -> None:
    assert scaling.exponent(sizes, [factor * size**power for size in sizes]) == pytest.approx(power, abs=1e-6)


def test_fits_take_rows_that_differ_in_one_size_only() -> None:
    by_H = [timed(2.0, I=H, H=H, ours_s=1e-6 * H**2) for H in (16, 32, 64)]
    by_T = [timed(2.0, T=T, ours_s=1e-5 * T) for T in (16, 32, 64)]
    others = [timed(2.0, T=100, mode="train"), timed(2.0, T=100, peer="jax"), timed(2.0, T=100, threads=4)]
    data = document(*by_H, *by_T, *others)
    found = {fit["axis"]: fit for fit in data["summary"]["fits"]}
    assert found.keys() == {"H", "T"}
    assert found["H"]["ours"] == pytest.approx(2)
    assert found["H"]["theirs"] == pytest.approx(2)
    assert found["H"]["sizes"] == [16, 32, 64]
    assert found["T"]["fixed"] == {"B": 2, "H": 16}
    assert "16, 32, 64" in report.markdown(data)


def test_speedups_are_against_the_fewest_threads() -> None:
    rows = [timed(2.0, threads=count, ours_s=time) for count, time in ((4, 1.0), (1, 3.0), (2, 2.0))]
    (entry,) = document(*rows)["summary"]["thread_speedups"]
    assert entry["threads"] == [1, 2, 4]
    assert entry["ours"] == pytest.approx([1.0, 1.5, 3.0])


# ---- the suites


def test_the_suites_of_the_readme_are_there() -> None:
    promised = {
        "quick", "deepbench", "mlperf", "decode", "sweep", "variants", "rl", "packed", "memory", "scaling", "accuracy",
    }  # fmt: skip
    assert promised <= suites.SUITES.keys()
    text = (Path(suites.__file__).parent / "README.md").read_text()
    for name in suites.SUITES:
        assert f"`{name}`" in text, name


def test_every_rows_command_selects_exactly_it() -> None:
    for name, suite in suites.SUITES.items():
        for row in suite.rows()[::7]:
            command = runner.rerun_command(row, SETTINGS).split("'")
            options = command[2].split()
            peers = [options[options.index("--peer") + 1]] if "--peer" in options else None
            assert [found.id for found in suites.select(None, command[1], peers)] == [row.id], name
    row = replace(suites.SUITES["packed"].rows()[0], peer="jax")
    assert "--peer jax" in runner.rerun_command(row, SETTINGS)


def test_thread_counts() -> None:
    assert suites.thread_counts(1) == (1,)
    assert suites.thread_counts(2) == (1, 2)
    assert suites.thread_counts(6) == (1, 2, 4, 6)
    assert suites.thread_counts(16) == (1, 2, 4, 8, 16)


def test_deepbench_has_its_sizes() -> None:
    rows = suites.SUITES["deepbench"].rows()
    training = {(row.case.cell, row.case.H, row.case.B, row.case.T) for row in rows if row.mode == "train"}
    server = {(row.case.cell, row.case.H, row.case.B, row.case.T) for row in rows if row.mode == "fwd"}
    assert {("RNN", 1760, 16, 50), ("LSTM", 4096, 128, 25), ("LSTM", 256, 64, 150), ("GRU", 2816, 32, 1500)} <= training
    assert {("LSTM", 1536, 4, 50), ("GRU", 512, 1, 1)} <= server
    assert (len(training), len(server)) == (41, 33)
    assert all(row.case.I == row.case.H for row in rows)
