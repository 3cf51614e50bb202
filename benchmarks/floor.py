"""The shortest time a row could take on this machine: its arithmetic at peak GEMM speed, its weights at cache speed."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Case, is_training
from benchmarks.results import Floor

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# How often a mode does the products of one forward pass and reads its recurrent weights, where it is not as others do.
TIMES = {"penalty": (6, 4), "train-checkpoint": (4, 3), "jvp": (3, 2), "hvp": (9, 4)}
MARGIN = 0.8  # of a cache that weights may fill before they are held to live one level further out


def steps(case: Case) -> float:
    """Time steps of all rows together: T * B, or the expected sum of lengths."""
    return case.B * ((case.T + case.shortest) / 2 if case.shortest else case.T)


def weight_level(share: float, cache_bytes: dict[str, int], threads: int) -> str:
    """The innermost level that holds every thread's `share` of the weights, in bytes. L3 is shared by the threads."""
    for level, count in (("L1", 1), ("L2", 1), ("L3", threads)):
        if level in cache_bytes and share * count <= MARGIN * cache_bytes[level]:
            return level
    return "DRAM"


def floor(case: Case, mode: str, roofline: dict[str, Any]) -> Floor:
    """max(flops / peak, weight bytes / bandwidth) of the recurrent part plus the flops of the input GEMM.

    Layer by layer. Training does three times the products of inference and reads the recurrent weights twice a step;
    with a checkpoint it does the forward pass again. A gradient penalty does six times: forward, backward as far as the
    input, the derivative of each in the direction of that gradient, and two of every weight; and reads them four times.
    In forward mode a product with slopes on both sides is three: the output's derivative does it three times, a
    Hessian-vector product nine times, with twice as many reads.
    Weights that a thread keeps in its first level cache cost nothing here. Activations, cells, barriers and what is
    saved for backward are left out, so the true floor is higher; peak GEMM is what one reached, it can be beaten.
    """
    gates, size = GATES[case.cell.removesuffix("Cell")], BYTES[case.dtype]
    directions = 2 if case.bidirectional else 1
    R, training = case.proj or case.H, is_training(mode)
    of_products, of_reads = TIMES.get(mode, (3, 2) if training else (1, 1))
    peaks, threads = roofline["gemm_flops"], roofline["threads"]
    peak = max(peaks.get(case.dtype, 0.0), 0.0 if case.dtype == "float64" else peaks["float32"])
    total = Floor(0.0, 0.0, 0.0, "L1", "flops")
    order = ("L1", "L2", "L3", "DRAM")
    spent = {"flops": 0.0, "weights": 0.0}
    for layer in range(case.layers):
        below = 0 if case.tokens else case.I  # a look-up multiplies nothing
        I = below if layer == 0 else R * directions  # noqa: E741 (the dimension's name)
        recurrent = gates * case.H * R + (R * case.H if case.proj else 0)  # elements read at every step
        products = of_products * 2 * steps(case) * directions
        no_gradient = mode == "persample" or (case.frozen and layer == 0)  # of the input
        input_products = products * 2 // 3 if training and no_gradient else products
        input_flops, recurrent_flops = input_products * gates * case.H * I, products * recurrent
        reads = case.T * of_reads
        streamed = reads * directions * recurrent * size
        resident = directions * recurrent * size
        if case.T == 1:  # the input weights are read as often
            streamed += reads * directions * gates * case.H * I * size
            resident += directions * gates * case.H * I * size
        level = weight_level(resident / threads, roofline["cache_bytes"], threads)
        bandwidth = roofline["bandwidth"]
        speed = bandwidth.get(level, bandwidth["DRAM"])
        by_weights = 0.0 if level == "L1" else streamed / speed
        if case.T == 1:
            by_flops, rest = (input_flops + recurrent_flops) / peak, 0.0
        else:
            by_flops, rest = recurrent_flops / peak, input_flops / peak
        spent["weights" if by_weights > by_flops else "flops"] += max(by_flops, by_weights)
        spent["flops"] += rest
        total.seconds += max(by_flops, by_weights) + rest
        total.flops += input_flops + recurrent_flops
        total.weight_bytes += streamed
        total.level = max(total.level, level, key=order.index)
    total.bound = max(spent, key=lambda name: spent[name])
    return total
