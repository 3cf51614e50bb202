"""A few shapes under pytest-benchmark, both implementations of a case in one group.

Not part of the test suite: `python -m pytest benchmarks --benchmark-only`, with `--benchmark-autosave` and
`--benchmark-compare` to follow one machine over time. Pin the threads as README.md says. Unlike `python -m
benchmarks` it times the two one after the other, so trust its ratios less.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import Row, Suite, entries
from benchmarks.data import make_data
from benchmarks.measure import compare, prepare
from benchmarks.peers import PEERS

ROWS = Suite(
    "a sample of every kind of row",
    (
        *entries("lstm", "LSTM", (128, 8, 128, 128), (100, 1, 256, 256)),
        *entries("gru", "GRU", (128, 8, 128, 128)),
        *entries("rnn", "RNN", (128, 8, 128, 128)),
        *entries("packed", "LSTM", (64, 16, 128, 128), shortest=8),
        *entries("decode", "LSTM", (1, 1, 512, 512), modes=("fwd",), stateful=True),
        *entries("cell", "GRUCell", (1, 32, 256, 256), stateful=True),
    ),
).rows()


@pytest.mark.parametrize("key", ["fastrnn", "torch"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_speed(benchmark: Any, row: Row, key: str) -> None:
    if reason := PEERS[key].missing():
        pytest.skip(reason)
    data = make_data(row.case)
    prepared, results = prepare(PEERS[key], row, data)
    check, problems = compare(results, prepare(PEERS["torch"], row, data)[1])
    assert not problems
    benchmark.group = f"{row.case.name}-{row.mode}"
    benchmark.extra_info |= {
        "key": key,
        "version": PEERS[key].version(),
        "kernel": prepared.kernel(),
        "threads": torch.get_num_threads(),
        "includes_input_gemm": True,
        "checked_error": check.error,
    }
    with prepared.context():
        benchmark(prepared.step)
