"""Which of cuDNN's algorithms torch.nn takes for a call.

A restatement of get_algo, use_rnn_persist_small_h and use_persist_{common,device}_heuristics in torch's
aten/src/ATen/native/cudnn/RNN.cpp (torch 2.11 to 2.14) for compute capability 8.0 and newer.

STANDARD is a product per step; PERSIST_STATIC keeps weights on chip; SMALL_H is PERSIST_STATIC_SMALL_H.
"""

from __future__ import annotations

from benchmarks.cases import Case

STANDARD, PERSIST_STATIC, SMALL_H = "STANDARD", "PERSIST_STATIC", "SMALL_H"
SMALL_HIDDEN = ((128, 192), (256, 384))  # largest H of SMALL_H: (LSTM and GRU, RNN), each (backward, forward)


def algorithm(case: Case, forward: bool, capability: tuple[int, int], multiprocessors: int) -> str:
    """Of the forward or the backward pass: a training step asks for each by itself."""
    if case.proj or case.shortest or case.dtype == "float64":
        return STANDARD
    largest = SMALL_HIDDEN[case.cell.startswith("RNN")][forward]
    if largest >= case.H:
        return SMALL_H
    if case.dtype == "float16" and fits_persistent(case) and likes_persistent(case, capability, multiprocessors):
        return PERSIST_STATIC
    return STANDARD


def fits_persistent(case: Case) -> bool:
    return case.layers == 1 and not case.bidirectional and case.H <= 1024 and case.H % 128 == 0 and case.I % 128 == 0


def likes_persistent(case: Case, capability: tuple[int, int], multiprocessors: int) -> bool:
    if capability[0] < 8 or capability[1] == 6 or multiprocessors < 98 or case.cell.startswith("GRU"):
        return False
    if case.B % 8 or case.B > 128:
        return False
    return case.cell.startswith("LSTM") or case.B < 96 or case.H < 896


def algorithms(case: Case, mode: str, capability: tuple[int, int], multiprocessors: int) -> str:
    """For a report: one name, or forward/backward where they differ."""
    names = [algorithm(case, True, capability, multiprocessors)]
    if mode == "train":
        names.append(algorithm(case, False, capability, multiprocessors))
    return "/".join(dict.fromkeys(names))
