"""Calls of many kinds, over and over, after which as much memory is in use as before: `make soak`.

    python -m tests.fuzz.soak --calls 100000

What is counted is exact: the bytes that malloc has given out, and Python's own blocks. So one object that every call of
one kind left behind would show.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

T, B, I, H = 5, 3, 4, 6  # noqa: E741
WARM = 60  # calls after which every cache is full


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_size_t)
            for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks"]
        ),
        *((name, ctypes.c_size_t) for name in ("fordblks", "keepcost")),
    ]


def in_use() -> tuple[int, int]:
    """Bytes of malloc's, and blocks of Python's own allocator."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd, sys.getallocatedblocks()


def train(module: torch.nn.Module, x: Tensor, **options: object) -> None:
    output, _ = module(x, **options)
    output.square().sum().backward()
    module.zero_grad()


def kinds() -> dict[str, Callable[[], object]]:
    """Calls by name."""
    x, rows = torch.randn(T, B, I), torch.randn(T, B, I, requires_grad=True)
    lengths, resets = torch.tensor([5, 2, 3]), torch.rand(T, B) < 0.3
    lstm, gru, rnn = fastrnn.LSTM(I, H, 2, bidirectional=True), fastrnn.GRU(I, H), fastrnn.RNN(I, H, 2)
    projected = fastrnn.LSTM(I, H, proj_size=2, peephole=True, return_all_states=True)
    half, quantized, cell = fastrnn.GRU(I, H, dtype=torch.bfloat16), fastrnn.quantize(gru), fastrnn.LSTMCell(I, H)
    noisy = fastrnn.LSTM(I, H, 2, recurrent_dropout=0.2, zoneout=0.1, grad_clip=1.0, recompute=2)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)

    def without_grad() -> None:
        with torch.no_grad():
            lstm(x)
            rnn(x)
            gru.step(x[0])

    def penalty() -> None:
        (grad,) = torch.autograd.grad(gru(rows)[0].square().sum(), rows, create_graph=True)
        grad.square().sum().backward()
        gru.zero_grad()
        rows.grad = None

    def all_states() -> None:
        projected(x)[2].sum().backward()
        projected.zero_grad()

    def refused() -> None:
        for wrong in ((x[..., :-1],), (x, torch.zeros(2, 2, 2)), (x.double(),), ("text",)):
            try:
                gru(*wrong)
            except (RuntimeError, ValueError, TypeError):
                continue
            raise AssertionError(wrong)

    return {
        "training": lambda: train(lstm, x),
        "training with lengths and resets": lambda: train(lstm, x, lengths=lengths, resets=resets),
        "training, one direction": lambda: train(gru, x),
        "training with masks, by segments": lambda: train(noisy, x),
        "training in bfloat16": lambda: train(half, x.bfloat16()),
        "every state": all_states,
        "packed": lambda: lstm(packed)[0].data.sum().backward() or lstm.zero_grad(),
        "without gradients": without_grad,
        "a cell": lambda: cell(x[0])[0].sum().backward() or cell.zero_grad(),
        "quantized": lambda: quantized(x),
        "second derivatives": penalty,
        "errors": refused,
        "new modules": lambda: fastrnn.LSTM(I, H, 2, layer_norm=True)(x),
    }


def growth(call: Callable[[], object], calls: int) -> tuple[int, int]:
    """Of memory, over so many calls."""
    for _ in range(WARM):
        call()
    before = in_use()
    for _ in range(calls):
        call()
    after = in_use()
    return after[0] - before[0], after[1] - before[1]


def leaks(calls: int) -> list[str]:
    """What grows, of so many calls of all kinds together or more: by more than a small object in every second call."""
    all_kinds, found = kinds(), []
    each = calls // len(all_kinds)
    for name, call in all_kinds.items():
        for _ in range(3):  # a cache that is not full yet grows once; a leak each time
            memory, blocks = growth(call, each)
            if memory <= 8 * each and blocks <= each // 2:
                break
        else:
            found.append(f"{name}: {memory} bytes and {blocks} blocks of Python more after {each} calls")
    return found


def large() -> None:
    """An output of more than 2^31 elements (8.6 GB): its last rows are what a call of them alone gives."""
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) << 10
    if free < 12 << 30:
        raise SystemExit(f"large: expected 12 GB of free memory, got {free >> 30}")
    module, x = fastrnn.RNN(1, 8), torch.randn(2**12, 1)
    steps, batch = 2**15 + 1, 2**13
    with torch.no_grad():
        output, _ = module(x.repeat(2, 1).expand(steps, batch, 1))
        few, _ = module(x[-5:].expand(steps, 5, 1))
    assert output.numel() > 2**31
    torch.testing.assert_close(output[-2:, -5:], few[-2:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--large", action="store_true", help="besides, a result of 2^31 elements")
    given = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.time()
    found = leaks(given.calls)
    print("\n".join(found) or f"no memory left behind by {given.calls} calls; {time.time() - begin:.0f} s", flush=True)
    if given.large:
        begin = time.time()
        large()
        print(f"results of more than 2^31 elements are right; {time.time() - begin:.0f} s")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
