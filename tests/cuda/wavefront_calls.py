"""Networks by fastrnn/wavefront.py on the streams of pretend_streams.py, in a process of its own: JSON to stdout.

For every case: the faults of its order, how far results and gradients are from the layers' one after the other on the
CPU, and whether chunks were in fact made. Then the same with a fault planted in what orders the streams.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastrnn
from fastrnn import wavefront
from tests.cuda import pretend_cuda
from tests.cuda.calls import leaves, packed, put_module, same, state_of, worst
from tests.cuda.pretend_streams import Streams, Watch
from tests.helpers import build

T, B, I, H = 7, 3, 5, 6  # noqa: E741
LENGTHS = torch.tensor([2, 7, 5])
RESETS = torch.rand(T, B, generator=torch.Generator().manual_seed(2)) < 0.3


def inputs() -> Tensor:
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(1)).requires_grad_()


def tokens() -> Tensor:
    return torch.randint(I, (T, B), generator=torch.Generator().manual_seed(1))


# name -> (kind, options of the constructor, (module, put) -> results)
CASES: dict[str, tuple[str, dict[str, Any], Callable[..., Any]]] = {
    "LSTM": ("LSTM", {}, lambda m, p: m(p(inputs()))),
    "GRU": ("GRU", {}, lambda m, p: m(p(inputs()))),
    "RNN": ("RNN", {}, lambda m, p: m(p(inputs()))),
    "three layers": ("LSTM", {"num_layers": 3}, lambda m, p: m(p(inputs()), state_of("LSTM", p, 3))),
    "dropout": ("LSTM", {"num_layers": 3, "dropout": 0.5}, lambda m, p: m(p(inputs()))),
    "dropout of all": ("GRU", {"dropout": 1.0}, lambda m, p: m(p(inputs()))),
    "lengths": ("LSTM", {}, lambda m, p: m(p(inputs()), lengths=p(LENGTHS))),
    "lengths of the host": ("GRU", {}, lambda m, p: m(p(inputs()), lengths=LENGTHS)),
    "resets": (
        "LSTM",
        {"num_layers": 3},
        lambda m, p: m(p(inputs()), resets=p(RESETS), lengths=p(LENGTHS), reset_state=state_of("LSTM", p, 3)),
    ),
    "learned states": ("GRU", {"learn_initial_state": True}, lambda m, p: m(p(inputs()), resets=p(RESETS))),
    "proj_size": ("LSTM", {"proj_size": 2}, lambda m, p: m(p(inputs()))),
    "return_all_states": ("LSTM", {"return_all_states": True}, lambda m, p: m(p(inputs()))),
    "grad_clip": ("LSTM", {"grad_clip": 0.05}, lambda m, p: m(p(inputs()))),
    "peephole": ("LSTM", {"peephole": True}, lambda m, p: m(p(inputs()))),
    "tokens": ("GRU", {"token_input": True}, lambda m, p: m(p(tokens()))),
    "bfloat16": ("LSTM", {"dtype": torch.bfloat16}, lambda m, p: m(p(inputs().detach().bfloat16()))),
    "finals alone": ("LSTM", {}, lambda m, p: m(p(inputs()))[1]),
    "packed": ("LSTM", {}, lambda m, p: m(packed(p, inputs()[:4], False))),  # on CUDA it is padded
    # What goes the way of layers one after the other.
    "apart: two directions": ("GRU", {"bidirectional": True}, lambda m, p: m(p(inputs()))),
    "apart: residual": ("LSTM", {"num_layers": 3, "residual": True}, lambda m, p: m(p(inputs()))),
    "apart: recompute": ("LSTM", {"recompute": 3}, lambda m, p: m(p(inputs()))),
    "apart: one chunk": ("GRU", {}, lambda m, p: m(p(inputs()[:3]))),
}
TWICE = ("LSTM", "dropout", "resets")


def called(name: str, put: Any, train: bool, twice: bool = False) -> list[Tensor]:
    kind, options, call = CASES[name]
    torch.manual_seed(3)
    module = put_module(build(fastrnn, kind, I, H, **({"num_layers": 2} | options)), put)
    wanted = list(module.parameters())

    def putting(x: Any) -> Any:
        moved = put(x)
        if isinstance(moved, Tensor) and moved.requires_grad:
            wanted.append(moved)
        return moved

    torch.manual_seed(4)
    # The CPU's kernels stand in for CUDA's: by sums that do not depend on how many steps a chunk has.
    with fastrnn.streaming(), torch.set_grad_enabled(train):
        results = leaves(call(module, putting))
    if not train:
        return results
    loss = sum((x.float().square().sum() for x in results), torch.zeros(()))
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, create_graph=twice)
    if not twice:
        return [*results, *grads]
    again = sum((x.float().square().sum() for x in grads if x is not None), torch.zeros(()))
    return list(torch.autograd.grad(again, wanted, allow_unused=True))


# A part of Streams that does nothing: what has to be noticed then.
FAULTS: dict[str, Callable[[type[Streams]], dict[str, Any]]] = {
    "no wait for the layer below or above": lambda s: {"wait": lambda self, i, event: None},
    "no wait for the caller": lambda s: {"wait": lambda self, i, event: s.wait(self, i, event) if i == 0 else None},
    "no wait for the end": lambda s: {"wait": lambda self, i, event: s.wait(self, i, event) if i else None},
    "events before the work": lambda s: {"record": lambda self, i: {self.names[i]: 0}},
    "the allocator is not told": lambda s: {"use": lambda self, x, i: None},
    "the allocator is not told of results": lambda s: {"use": lambda self, x, i: s.use(self, x, i) if i else None},
}


def run(name: str, every: int, train: bool, streams: type[Streams] = Streams, twice: bool = False) -> dict[str, Any]:
    want = called(name, same, train, twice)
    record: dict[str, Any] = {"error": "", "faults": [], "off": 0.0, "streams": 0}
    os.environ["FASTRNN_CUDA_WAVEFRONT"] = str(every)
    with Watch() as watch:
        wavefront.make_streams = lambda device, count: streams(watch, count)
        try:
            got = called(name, pretend_cuda.to_device, train, twice)
            again = called(name, pretend_cuda.to_device, train, twice)
        except Exception:
            record["error"] = traceback.format_exc()
    del os.environ["FASTRNN_CUDA_WAVEFRONT"]
    if not record["error"]:
        pairs = [(pretend_cuda.host(a), pretend_cuda.host(b)) for a, b in zip(got, again, strict=True) if a is not None]
        record |= {
            "off": worst(got, want),
            "repeats": all(torch.equal(a, b) for a, b in pairs),
            "told": sorted(set(watch.told)),
            "ops": sorted(set(watch.ops)),
        }
    return record | {"faults": sorted(set(watch.faults)), "streams": watch.count}


def main() -> None:
    torch.autograd.set_multithreading_enabled(False)
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    for name in CASES:
        for every in (2, 3, 6) if name in ("LSTM", "resets") else (3,):
            for train in (True, False):
                told[f"{name}, {every} steps, {'training' if train else 'inference'}"] = run(name, every, train)
    for name in TWICE:
        told[f"{name}, 3 steps, twice"] = run(name, 3, True, twice=True)
    for fault, made in FAULTS.items():
        planted = type("Planted", (Streams,), made(Streams))
        told[f"fault: {fault}"] = run("resets", 3, True, planted)
    json.dump(told, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # the backend's own end is not ours


if __name__ == "__main__":
    main()
