"""Times torch.compile of a layer, forward and backward, at several lengths: the graph has one node a layer, whatever T.

Each compilation runs in a process of its own with empty caches. Printed are the seconds of the first training step less
those of a second one, median and range of the rounds.

    python tools/compile_time.py [--cell LSTM] [--layers 2] [--lengths 64 1024 4096] [--rounds 5] [--library torch.nn]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHILD = """
import importlib, sys, time
import torch
import torch._dynamo
library, cell, layers, T = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch._dynamo.config.allow_rnn = True
torch.compile(lambda x: x.sin().cos(), fullgraph=True)(torch.randn(8, requires_grad=True)).sum().backward()
torch._dynamo.reset()
module = getattr(importlib.import_module(library), cell)(32, 64, num_layers=layers)
compiled = torch.compile(module, fullgraph=True)
x = torch.randn(T, 2, 32)
seconds = []
for _ in range(2):
    start = time.perf_counter()
    compiled(x)[0].sum().backward()
    seconds.append(time.perf_counter() - start)
print(seconds[0] - seconds[1])
"""


def compile_seconds(library: str, cell: str, layers: int, T: int) -> float:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, library, cell, str(layers), str(T)],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="torch.compile's time by sequence length")
    parser.add_argument("--library", default="fastrnn", choices=("fastrnn", "torch.nn"))
    parser.add_argument("--cell", default="LSTM", choices=("LSTM", "GRU", "RNN"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    times: dict[int, list[float]] = {T: [] for T in options.lengths}
    for _ in range(options.rounds):
        for T in options.lengths:
            times[T].append(compile_seconds(options.library, options.cell, options.layers, T))
    for T, seconds in times.items():
        median = statistics.median(seconds)
        print(f"T = {T:5}: {median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} rounds)")


if __name__ == "__main__":
    main()
