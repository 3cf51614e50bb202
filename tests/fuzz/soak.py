"""Calls of many kinds, over and over, after which as much memory is in use as before: `make soak`.

    python -m tests.fuzz.soak --calls 100000 --minutes 60 --threads 16 --large

Calls on one thread (`--calls`) are counted to the byte: what malloc has given out, and Python's own blocks. So one
object that every call of one kind left behind would show. Many threads at once (`--minutes`) are looked at as a
server's owner would, by the memory that the process holds. `--large` makes results of more elements than 32 bits count.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

T, B, I, H = 5, 3, 4, 6  # noqa: E741
WARM = 200  # calls after which every cache is full
MAY_GROW = 4.0  # MiB of resident memory; in twelve minutes that of sixteen threads grew by 0.6


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
    """Calls by name, on modules that no other call of this has."""
    x, rows = torch.randn(T, B, I), torch.randn(T, B, I, requires_grad=True)
    lengths, resets = torch.tensor([5, 2, 3]), torch.rand(T, B) < 0.3
    lstm, gru, rnn = fastrnn.LSTM(I, H, 2, bidirectional=True), fastrnn.GRU(I, H), fastrnn.RNN(I, H, 2)
    projected = fastrnn.LSTM(I, H, proj_size=2, peephole=True, return_all_states=True)
    half, quantized, cell = fastrnn.GRU(I, H, dtype=torch.bfloat16), fastrnn.quantize(gru), fastrnn.LSTMCell(I, H)
    noisy = fastrnn.LSTM(I, H, 2, recurrent_dropout=0.2, zoneout=0.1, grad_clip=1.0, recompute=2)
    slstm, ligru, mgu = fastrnn.SLSTM(I, H, num_heads=2), fastrnn.LiGRU(I, H), fastrnn.MGU(I, H, 2)
    words, tokens = fastrnn.LSTM(I, H, token_input=True), torch.randint(I, (T, B))
    rounded = fastrnn.fake_quantize(fastrnn.GRU(I, H))
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    weights = dict(gru.named_parameters())

    def without_grad() -> None:
        with torch.no_grad():
            lstm(x)
            rnn(x)
            gru.step(x[0])

    def in_chunks() -> None:
        with torch.no_grad(), fastrnn.streaming():
            state = None
            for chunk in x.split(2):
                _, state = gru(chunk, state)

    def nested() -> None:
        rows = torch.nested.nested_tensor([x[:n, 0] for n in (5, 2, 3)], layout=torch.jagged)
        lstm(rows)[0].values().sum().backward()
        lstm.zero_grad()

    def penalty() -> None:
        (by_rows,) = torch.autograd.grad(gru(rows)[0].square().sum(), rows, create_graph=True)
        by_rows.square().sum().backward()
        gru.zero_grad()
        rows.grad = None

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(gru, weights, row)[0].square().sum()

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
        "training with rounded weights": lambda: train(rounded, x),
        "training on tokens": lambda: train(words, tokens),
        "SLSTM": lambda: train(slstm, x),
        "LiGRU": lambda: train(ligru, x),
        "MGU": lambda: train(mgu, x),
        "every state": all_states,
        "packed": lambda: lstm(packed)[0].data.sum().backward() or lstm.zero_grad(),
        "nested": nested,
        "without gradients": without_grad,
        "streaming": in_chunks,
        "a cell": lambda: cell(x[0])[0].sum().backward() or cell.zero_grad(),
        "quantized": lambda: quantized(x),
        "second derivatives": penalty,
        "jvp": lambda: jvp(lambda x: gru(x)[0], (x,), (x,)),
        "vmap of gradients": lambda: vmap(grad(loss), in_dims=(None, 1))(weights, x),
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


def resident() -> float:
    """MiB of memory that the process holds, whether malloc has given it out or keeps it."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def side_by_side(minutes: float, threads: int) -> list[str]:
    """What is wrong after minutes of calls, in which each thread goes through all kinds on modules of its own.

    Of its own, as training adds up gradients in a module. The first tenth of the time fills the caches of every thread
    and of malloc. From then on the memory goes up and down with what the threads are at, by less than MAY_GROW. What
    calls leave behind adds up to more: there are millions of them in an hour.
    """
    counts, raised, end = [0] * threads, list[str](), threading.Event()

    def go(k: int) -> None:
        try:
            torch.set_num_threads(1)  # a thread's own number
            # torch's forward mode is on or off for the whole process: two threads in it end each other's calls.
            calls = [call for name, call in kinds().items() if name != "jvp"]
            while not end.is_set():
                calls[(k + counts[k]) % len(calls)]()
                counts[k] += 1
        except BaseException:
            raised.append(f"a thread ended by {traceback.format_exc()}")
            end.set()

    workers = [threading.Thread(target=go, args=(k,)) for k in range(threads)]
    begin, held = time.monotonic(), list[float]()
    for worker in workers:
        worker.start()
    try:
        for minute in sorted({minutes / 10, *range(1, int(minutes) + 1), minutes}):
            if end.wait(max(0.0, begin + 60 * minute - time.monotonic())):
                break
            held.append(resident())
            print(f"minute {minute:g}: {sum(counts)} calls, {held[-1]:.1f} MiB", flush=True)
    finally:  # after Ctrl-C, too
        end.set()
        for worker in workers:
            worker.join()
    if not raised and held[-1] - held[0] > MAY_GROW:
        return [f"{threads} threads: {held[-1] - held[0]:.1f} MiB more than after the first tenth of the time"]
    return raised


def large(elements: int) -> list[str]:
    """What is wrong with training steps whose output has more elements than that.

    The last rows of the batch give what a call of them alone gives. Of float32 the loss looks at h_n, of bfloat16 at
    the output: so each step takes 4 bytes an element, for the output or for that and its gradient.
    """
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) / 1e6
    if free < 5e-9 * elements:
        return [f"large results are left out: expected {5e-9 * elements:.1f} GB of free memory, got {free:.1f}"]
    batch, size, last = 2**13, 8, 5
    steps = elements // (batch * size) + 1
    for dtype in (torch.float32, torch.bfloat16):
        module, x = fastrnn.RNN(1, size, dtype=dtype), torch.randn(batch, 1, dtype=dtype)

        def step(x: Tensor) -> list[Tensor]:
            output, h_n = module(x.expand(steps, *x.shape))
            looked_at = h_n[0] if dtype == torch.float32 else output[-1]
            grads = torch.autograd.grad(looked_at[-last:].square().sum(), list(module.parameters()))
            return [output[-2:, -last:].detach().clone(), *grads]

        try:
            torch.testing.assert_close(step(x), step(x[-last:]))
        except AssertionError as error:
            return [f"an output of {steps * batch * size} elements of {dtype}: {error}"]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000, help="on one thread")
    parser.add_argument("--minutes", type=float, default=0.0, help="besides, calls of many threads for so long")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--large", type=int, nargs="?", const=2**31, metavar="ELEMENTS", help="besides, large results")
    given = parser.parse_args()
    calls, minutes, threads, elements = given.calls, given.minutes, given.threads, given.large
    torch.set_num_threads(1)
    parts = {
        f"no memory left behind by {calls} calls": calls and partial(leaks, calls),
        f"flat memory, {threads} threads, {minutes:g} minutes": minutes and partial(side_by_side, minutes, threads),
        f"results of more than {elements} elements are right": elements and partial(large, elements),
    }
    wrong = False
    for right, part in parts.items():
        if part:
            begin = time.monotonic()
            found = part()
            print("\n".join(found) or f"{right}; {time.monotonic() - begin:.0f} s", flush=True)
            wrong |= bool(found)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
