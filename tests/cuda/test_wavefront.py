"""Layers side by side on streams (fastrnn/wavefront.py), without a GPU: results, and the order of what streams do.

pretend_streams.py has the streams and says what a fault is; wavefront_calls.py has the calls.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import wavefront

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def calls():
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.wavefront_calls"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 50
    return found


def sound(calls):
    return {name: record for name, record in calls.items() if not name.startswith("fault")}


def test_results_are_those_of_layers_one_after_the_other(calls):
    for name, record in sound(calls).items():
        assert not record["error"], f"{name}:\n{record['error']}"
        half = "bfloat16" in name
        assert record["off"] <= (1e-2 if half else 0 if "inference" in name else 1e-6), (
            f"{name}: off by {record['off']}"
        )
        assert record["repeats"], name


def test_streams_wait_for_each_other_and_keep_what_they_use(calls):
    for name, record in sound(calls).items():
        if name.startswith("apart") and not ("recompute" in name and "inference" in name):
            assert record["streams"] == 0, name
        else:
            assert record["streams"] == (2 if "inference" in name else 4), name  # of two calls
        assert not record["faults"], f"{name}: {record['faults']}"


def test_all_can_be_captured(calls):
    """Nothing waits for the device or looks at it."""
    for name, record in sound(calls).items():
        assert all("lengths of the host" in name and "waits" not in told for told in record["told"]), name


def test_chunks_are_fused(calls):
    for name, record in sound(calls).items():
        if "twice" not in name:
            assert "fastrnn.layer_forward.default" in record["ops"], name
            assert ("fastrnn.layer_backward.default" in record["ops"]) is ("training" in name), name


def test_the_watch_finds_what_is_left_out(calls):
    expected = {
        "no wait for the layer below or above": "may not have written yet",
        "no wait for the caller": "may not have written yet",
        "no wait for the end": "on main: reads what stream",
        "events before the work": "may not have written yet",
        "the allocator is not told": "on stream 1",
        "the allocator is not told of results": "on main: uses memory of stream",
    }
    assert {name.removeprefix("fault: ") for name in calls if name.startswith("fault")} == set(expected)
    for name, what in expected.items():
        record = calls[f"fault: {name}"]
        assert any(what in fault for fault in record["faults"]), (name, record)


def test_writing_what_is_still_read_is_a_fault():
    """No call does this, so the watch is asked by itself."""
    done = subprocess.run([sys.executable, "-c", WRITES], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


WRITES = """
import os
import torch
from tests.cuda.pretend_cuda import to_device
from tests.cuda.pretend_streams import Streams, Watch

for waits in (False, True):
    with Watch() as watch:
        streams, x = Streams(watch, 2), to_device(torch.ones(3))
        streams.wait(1, streams.record(0))
        streams.use(x, 1)
        with streams.on(1):
            x + 1
        if waits:
            streams.wait(0, streams.record(1))
        x.add_(1)
    assert bool(watch.faults) is not waits, watch.faults
    assert waits or "writes what stream 1 of call 1 may still read" in watch.faults[0]
os._exit(0)
"""


def test_off_unless_asked_for(monkeypatch):
    class OnCuda:
        is_cuda, shape = True, (10, 3, 4)

    steps = lambda layers=2, directions=1: wavefront.chunk_steps(OnCuda(), layers, directions)  # noqa: E731
    monkeypatch.delenv("FASTRNN_CUDA_WAVEFRONT", raising=False)
    assert steps() == 0
    monkeypatch.setenv("FASTRNN_CUDA_WAVEFRONT", "4")
    assert steps() == 4
    assert steps(layers=1) == steps(directions=2) == 0
    assert wavefront.chunk_steps(torch.zeros(10, 3, 4), 2, 1) == 0
    monkeypatch.setenv("FASTRNN_CUDA_WAVEFRONT", "10")
    assert steps() == 0  # one chunk
    monkeypatch.setenv("FASTRNN_CUDA_WAVEFRONT", "yes")
    with pytest.raises(ValueError, match="FASTRNN_CUDA_WAVEFRONT: expected a number of steps, got 'yes'"):
        steps()
    output, _ = fastrnn.LSTM(4, 5, num_layers=2)(torch.zeros(10, 3, 4))  # nobody asks on a CPU
    assert output.shape == (10, 3, 5)


def test_streams_of_a_thread(monkeypatch):
    """Each thread has side streams of its own, always the same; the first is the caller's."""
    made = []

    class Stream:
        def __init__(self, device):
            made.append(device)

    current = object()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(wavefront.CudaStreams, "_of_thread", threading.local())
    device = torch.device("cuda", 0)

    def streams(count, device=device):
        return wavefront.CudaStreams(device, count)._streams

    two, three = streams(2), streams(3)
    assert two[0] is three[0] is current and two[1] is three[1] and len(made) == 2
    assert streams(2, torch.device("cuda", 1))[1] is not two[1]
    other = []
    thread = threading.Thread(target=lambda: other.extend(streams(2)))
    thread.start()
    thread.join()
    assert other[1] not in two and other[0] is current
