"""Every tier, cell and dtype once at small sizes, forward and backward: what compute-sanitizer runs.

python -m benchmarks.gpu.small [--device cuda]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import product

import torch

from fastrnn import ops
from fastrnn.records import LayerStates

TIERS = ("step", "resident", "grid", "cluster")
# (T, B, P, h): one tile and less, several tiles and groups, more units than one multiprocessor holds, odd sizes
SIZES = ((3, 1, 1, 5), (4, 9, 2, 33), (3, 5, 1, 200), (2, 33, 1, 130))


def run(device: torch.device, cell: str, dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    T, B, P, h = size
    gates, states, in_c = ops.CELLS[cell].gates, ops.CELLS[cell].states, ops.CELLS[cell].in_c

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).mul(0.3).to(dtype)

    lengths = torch.randint(0, T + 1, (B,)).to(device)
    resets = (torch.rand(T, B) < 0.3).to(device)
    h_0, c_0 = normal(B, P * h), normal(B, P * in_c * h).abs() + 0.1 if states > 1 else None  # an sLSTM's n is above 0
    weight_hh = normal(P, gates * h, h)
    params = normal(P, ops.CELLS[cell].params, h) if ops.CELLS[cell].params else None
    shared = (None, params, *LayerStates(h_0, c_0, lengths, resets), [p % 2 == 1 for p in range(P)])
    output, h_n, c_n, saved = ops.recurrent_forward(
        cell, normal(T, B, P * gates * h), weight_hh, normal(P, gates * h), *shared, True
    )
    grad_c_n = torch.ones_like(c_n) if states > 1 else None
    grads = ops.recurrent_backward(
        cell, torch.ones_like(output), torch.ones_like(h_n), grad_c_n, weight_hh, *shared, output, saved
    )
    assert all(x.isfinite().all() for x in (output, h_n, c_n, *grads))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    torch.manual_seed(0)
    calls: Counter[str] = Counter()
    tiers: tuple[str, ...] = TIERS
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        tiers = tuple(tier for tier in TIERS if tier != "cluster")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for i, (tier, cell, dtype) in enumerate(product(tiers, ops.CELLS, dtypes)):
        os.environ["FASTRNN_CUDA_TIER"] = tier
        for k in (i, i + 1):  # every size meets every tier; checkers are slow
            size = SIZES[k % len(SIZES)]
            try:
                run(device, cell, dtype, size)
            except NotImplementedError:  # the tier has no such call
                continue
            calls[tier] += 1
    del os.environ["FASTRNN_CUDA_TIER"]
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("small sizes:", ", ".join(f"{calls[tier]} calls of {tier}" for tier in tiers))
    return 0 if all(calls[tier] for tier in tiers) else 1


if __name__ == "__main__":
    sys.exit(main())
