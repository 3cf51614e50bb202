"""What a call costs beside its kernels: `python -m benchmarks.gpu.calls --out calls.json --budget 30`.

Of both sides of a few rows and of a language model's whole step: microseconds of host time until the call returns, and
from one call's end to the next one's where they follow one another; launches (kernels, copies and fills, as the
profiler counts them); and the memory that was allocated at most, above what stood before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastrnn
from benchmarks.gpu.rows import BF16, FP16, FP32, GpuRow, rows, tiny
from benchmarks.gpu.steps import prepare

Call = Callable[[], object]
SAMPLES, QUEUED = 5, 8  # of host time: calls one behind the other, few enough that no queue fills up
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchCooperativeKernel",
    "cuLaunchKernel",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaGraphLaunch",
)

ROWS: tuple[GpuRow, ...] = (
    *rows("calls", "LSTM", (8, 4, 64), (25, 16, 512), dtypes=(BF16,)),
    *rows("calls", "GRU", (8, 4, 64), dtypes=(FP32,)),
    *rows("calls", "LSTM", (128, 64, 512), dtypes=(BF16, FP32), modes=("train",)),
    *rows("calls", "GRU", (128, 64, 512), dtypes=(BF16,), modes=("train",)),
    *rows("calls", "LSTM", (128, 32, 256), dtypes=(BF16,), modes=("train",), bidirectional=True),
    *rows("calls", "LSTM", (200, 32, 1024), dtypes=(FP16,), modes=("train",), layers=5),
)


class LanguageModel(nn.Module):
    """Embedding, a recurrent network of two layers, logits."""

    def __init__(self, kind: Any, tokens: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, hidden)
        self.rnn = kind(hidden, hidden, num_layers=2)
        self.logits = nn.Linear(hidden, tokens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.logits(self.rnn(self.embedding(x))[0])
        return logits


def language_model(library: Any, sizes: tuple[int, int, int, int], device: torch.device) -> Call:
    """A whole step under bfloat16 autocast: forward, loss, backward, AdamW. sizes: T, B, H, tokens."""
    T, B, H, tokens = sizes
    torch.manual_seed(0)
    model = LanguageModel(library.LSTM, tokens, H).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    text = torch.randint(tokens, (T + 1, B), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> object:
        with torch.autocast(device.type, torch.bfloat16):
            loss = cross_entropy(model(text[:-1]).flatten(0, 1), text[1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def contests(small: bool) -> Iterator[tuple[str, Callable[[torch.device], tuple[Call, Call]]]]:
    """(name, what makes both sides)."""
    for T, B, H, tokens in ((128, 64, 512, 10_000), (64, 256, 512, 10_000)):
        sizes = (3, 2, 8, 11) if small else (T, B, H, tokens)

        def models(device: torch.device, sizes: tuple[int, int, int, int] = sizes) -> tuple[Call, Call]:
            return language_model(fastrnn, sizes, device), language_model(nn, sizes, device)

        yield f"language-model-{T}x{B}x{H}", models
    for row in ROWS:
        made = tiny(row) if small else row

        def both(device: torch.device, made: GpuRow = made) -> tuple[Call, Call]:
            contest = prepare(made, device)
            return contest.ours, contest.theirs

        yield row.id, both


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def launches(call: Call, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize(device)
    return sum(event.count for event in profile.key_averages() if event.key.startswith(LAUNCHES))


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Allocated at most during the call, above what was before it."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def cost(call: Call, device: torch.device) -> dict[str, Any]:
    for _ in range(3):
        call()
    host, whole = [], []
    for _ in range(SAMPLES):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(QUEUED):
            call()
        returned = time.perf_counter()
        synchronize(device)
        host.append(1e6 * (returned - begin) / QUEUED)
        whole.append(1e6 * (time.perf_counter() - begin) / QUEUED)
    return {
        "host_us": round(statistics.median(host), 1),
        "us": round(statistics.median(whole), 1),
        "launches": launches(call, device),
        "peak_bytes": peak_bytes(call, device),
    }


def run(device: torch.device, budget_s: float, small: bool) -> Iterator[dict[str, Any]]:
    begin = time.perf_counter()
    for name, make in contests(small):
        if time.perf_counter() - begin > budget_s:
            return
        record: dict[str, Any] = {"id": name, "message": ""}
        try:
            ours, theirs = make(device)
            record |= {"ours": cost(ours, device), "theirs": cost(theirs, device)}
        except Exception as error:
            record["message"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield record


def line(record: dict[str, Any]) -> str:
    """Of each side host time, time, launches and MiB at most."""
    if record["message"]:
        return f"{record['id']:<44} {record['message'][:100]}"

    def side(found: dict[str, Any]) -> str:
        mib = None if found["peak_bytes"] is None else round(found["peak_bytes"] / 2**20, 1)
        return f"{found['host_us']:>9.0f} {found['us']:>9.0f} {found['launches'] or '-':>6} {mib or '-':>8}"

    return f"{record['id']:<44} {side(record['ours'])} |{side(record['theirs'])}"


HEADER = f"{'ours | torch.nn':<44} {'host us':>9} {'us':>9} {'calls':>6} {'MiB':>8} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Host time, launches and memory of calls.")
    parser.add_argument("--out", type=Path, required=True, help="where to write JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=30, help="seconds in all")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at tiny sizes")
    options = parser.parse_args(argv)
    print(HEADER)
    records = []
    for record in run(torch.device(options.device), options.budget, options.tiny):
        records.append(record)
        options.out.write_text(json.dumps(records, indent=1) + "\n")
        print(line(record), flush=True)
    return 1 if not records or any(record["message"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
