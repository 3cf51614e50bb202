"""Every contestant that is installed agrees with torch.nn; the others say what is missing."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import measure, runner
from benchmarks.cases import MODES, PER_SAMPLE, Case, Row, entries
from benchmarks.data import make_data
from benchmarks.peers import PEERS, NoResult, base, keras_layers, loops, onnx_model
from benchmarks.peers.kernels import torch_kernel
from benchmarks.suites import SUITES
from tests.benchmarks.documents import SETTINGS

OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"stateful": True}, {"resets": 3}, {"shortest": 2}, {"layers": 2, "bidirectional": True}, {"bias": False},
    {"batch_first": True}, {"shortest": 2, "padded": True}, {"shortest": 2, "nested": True},
    {"tokens": True}, {"recompute": 2}, {"frozen": True},
    {"peephole": True}, {"layer_norm": True}, {"num_heads": 3}, {"reset_after": False}, {"recurrent_dropout": 0.25},
    {"zoneout": 0.1}, {"proj": 4},
)  # fmt: skip
RUN_HERE = [key for key in PEERS if not PEERS[key].missing()]


@pytest.fixture(autouse=True, scope="module")
def quickly() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


def tiny(cell: str, mode: str = "train", **options: Any) -> Case:
    ((case, _),) = entries("tiny", cell, (6, 3, 7, 9), modes=(mode,), **options)
    return case


def disagreement(key: str, case: Case, mode: str) -> str:
    """Of one contestant's results with fastrnn's (torch.nn's, where that is not built), in words."""
    reference = "torch" if PEERS["fastrnn"].missing() else "fastrnn"
    row, data = Row("timing", case, mode, key), make_data(case)
    theirs, their_results = measure.prepare(PEERS[key], row, data)
    _, our_results = measure.prepare(PEERS[reference], row, data)
    if theirs.another_layer:
        return "" if all(x.isfinite().all() for x in their_results.values()) else "not finite"
    return measure.compare(our_results, their_results, theirs.tolerance)[1]


CONTESTS = [
    pytest.param(key, case, mode, id=f"{key}-{case.name}-{mode}")
    for key in RUN_HERE
    for cell in ("LSTM", "GRU", "RNN")
    for options in OPTIONS
    if cell == "LSTM" or not options.keys() & {"peephole", "proj"}
    if cell == "GRU" or "reset_after" not in options
    if cell != "RNN" or "layer_norm" not in options
    for mode in MODES + PER_SAMPLE
    if mode in MODES or getattr(PEERS[key], "per_sample", False)
    if not PEERS[key].supports(case := tiny(cell, mode, **options), mode) and key not in ("compiled", "fastrnn")
]


@pytest.mark.parametrize(("key", "case", "mode"), CONTESTS)
def test_every_peer_computes_what_fastrnn_does(key: str, case: Case, mode: str) -> None:
    assert disagreement(key, case, mode) == ""


@pytest.mark.parametrize("key", RUN_HERE)
def test_relu_where_it_is_claimed(key: str) -> None:
    case = tiny("RNN", "fwd", nonlinearity="relu")
    if not PEERS[key].supports(case, "fwd") and key != "compiled":
        assert disagreement(key, case, "fwd") == ""


def test_who_has_resets_and_who_trains() -> None:
    resets, plain = tiny("LSTM", resets=3), tiny("LSTM")
    have = {key for key, peer in PEERS.items() if not peer.supports(resets, "train")}
    assert have == {"fastrnn", "loop", "cellloop", "perstep", "compiled", "unmasked", "torchrlpad", "torchrlscan"}
    assert {key for key, peer in PEERS.items() if not peer.supports(tiny("LSTM", tokens=True), "train")} == {
        "fastrnn", "columns", "embedding",
    }  # fmt: skip
    inference_only = {key for key, peer in PEERS.items() if peer.supports(plain, "train")}
    needs_more = {"unmasked", "everykept", "packed", "plaincell", "columns", "embedding", "torchrlpad", "torchrlscan"}
    for mode in MODES:
        assert all(PEERS[key].supports(plain, mode) for key in needs_more)
    inference_only -= needs_more
    per_sample_only = {"sampleloop", "oursampleloop", "opacus"}
    assert inference_only == {"int8", "onnxruntime", "openvino", "ourint8", "ourbf16"} | per_sample_only
    assert {PEERS[key].supports(plain, "train") for key in per_sample_only} == {"per-sample gradients only"}
    inference_only -= per_sample_only
    assert all("inference only" in (PEERS[key].supports(plain, "train") or "") for key in inference_only)


def test_rows_of_per_sample_gradients_need_both_sides() -> None:
    case = tiny("LSTM", "persample")
    for ours, theirs, said in (("fastrnn", "loop", "loop: no"), ("torch", "sampleloop", "torch: no")):
        settings = replace(SETTINGS, ours=ours)
        row, suite = Row("timing", case, "persample", theirs), SUITES["persample"]
        result = runner.run_row(row, suite, PEERS, settings, None)
        assert (result.status, result.message) == ("skipped", f"{said} per-sample gradients")
    assert "not with PackedSequence" in (PEERS["fastrnn"].supports(tiny("LSTM", shortest=2), "persample") or "")


def test_a_peer_names_itself_and_what_runs_inside() -> None:
    for key in RUN_HERE:
        peer, case = PEERS[key], tiny("LSTM")
        assert peer.key == key
        assert peer.title
        assert any(digit in peer.version() for digit in "0123456789")
        if key != "compiled" and not peer.supports(case, "fwd"):
            assert peer.prepare(case, "fwd", make_data(case)).kernel()


def test_torch_tells_onednn_from_its_own_loop() -> None:
    onednn = torch.backends.mkldnn.is_available()
    assert ("oneDNN" in torch_kernel(tiny("LSTM"), "fwd")) == onednn
    assert "ATen" in torch_kernel(tiny("GRU"), "train")
    assert "ATen" in torch_kernel(tiny("LSTM", dtype="float64"), "train")
    aten = PEERS["aten"].prepare(tiny("LSTM"), "train", make_data(tiny("LSTM")))
    assert "ATen" in aten.kernel()
    assert torch.backends.mkldnn.enabled, "switched off only while it runs"


def test_int8_is_checked_with_a_tolerance_that_is_told() -> None:
    row = Row("timing", tiny("LSTM"), "fwd", "int8")
    settings = replace(SETTINGS, rounds=2, budget_s=0.0, min_sample_s=1e-5, warmup_s=0.0)
    result = measure.run_timing(row, PEERS["torch"], PEERS["int8"], settings)
    assert result.status == "ok"
    assert result.timing is not None
    assert 1e-4 < result.timing.check.error < result.timing.check.tolerance == 0.2
    assert "by design" in result.message
    assert result.timing.kernels["theirs"].startswith("int8 weights")


# ---- without the packages


def test_a_package_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    for key in ("onnxruntime", "openvino", "jax", "keras", "opacus"):
        reason = PEERS[key].missing()
        assert reason is not None
        assert reason.startswith("not installed: ")
        assert "make bench-peers" in reason


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_gate_orders_are_permutations_that_put_the_gates_right(cell: str) -> None:
    names = {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h"}[cell]
    rows = np.array([[ord(name)] * 2 for name in names for _ in range(3)])  # [G * 3, 2]
    onnx = "".join(chr(value) for value in onnx_model.reordered(rows, cell)[::3, 0])
    assert onnx == {"LSTM": "iofg", "GRU": "zrn", "RNN": "h"}[cell], "ONNX calls LSTM's g c, and GRU's n h"
    keras = keras_layers.transposed(rows, cell)
    assert keras.shape == (2, len(rows))
    assert "".join(chr(value) for value in keras[0, ::3]) == {"LSTM": "ifgo", "GRU": "zrn", "RNN": "h"}[cell]
    assert (rows == keras_layers.transposed(keras.T, cell).T).all(), "its own inverse"


def test_a_pool_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("jax", "keras"):
        monkeypatch.setattr(PEERS[key], "_threads", 7)
        assert "7 threads" in (PEERS[key].supports(tiny("LSTM"), "fwd") or "")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_affinity_is_widened_and_put_back() -> None:
    before = os.sched_getaffinity(0)
    narrow = {min(before)}
    os.sched_setaffinity(0, narrow)
    try:
        with pytest.raises(KeyError), base.all_cores():
            assert os.sched_getaffinity(0) >= before
            raise KeyError
        assert os.sched_getaffinity(0) == narrow
    finally:
        os.sched_setaffinity(0, before)


# ---- torch.compile is bounded


def test_the_compiled_loop_is_not_tried_where_it_cannot_end() -> None:
    ((case, _),) = entries("x", "LSTM", (33, 1, 3, 4), modes=("fwd",))
    assert "unrolls" in (PEERS["compiled"].supports(case, "fwd") or "")


def test_a_time_limit_becomes_a_skipped_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(function: Any, **options: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            try:
                time.sleep(30)
            except Exception:  # what a compiler does with an exception that it does not know
                return function(*arguments, **keywords)

        return run

    monkeypatch.setattr(torch, "compile", slow)
    monkeypatch.setattr(loops.CompiledLoopPeer, "limit_s", 0.05)
    row = Row("timing", tiny("LSTM"), "fwd", "compiled")
    result = measure.run_timing(row, PEERS["torch"], PEERS["compiled"], SETTINGS)
    assert (result.status, result.message) == ("skipped", "no result from torch.compile within 0.05 s")


def test_a_time_limit_that_is_kept_leaves_no_alarm() -> None:
    with loops.time_limit(30, "nothing"):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(NoResult, match=r"within 0\.01 s"), loops.time_limit(0.01, "sleep"):
        time.sleep(5)


def test_resets_of_the_data_are_drawn_last() -> None:
    plain, with_resets = make_data(tiny("LSTM")), make_data(tiny("LSTM", resets=2))
    assert torch.equal(plain.input, with_resets.input), "a case with resets has the other's numbers"
    assert with_resets.resets is not None
    assert with_resets.resets.dtype == torch.bool
    assert 0 < with_resets.resets.float().mean() < 1
