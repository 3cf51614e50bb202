"""What is timed on a GPU, the most important first: a run that reaches the end of its time leaves out the last rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from benchmarks.cases import Case

FORWARD, TRAIN, BOTH = ("fwd",), ("train",), ("fwd", "train")
BF16, FP16, FP32 = "bfloat16", "float16", "float32"


@dataclass(frozen=True, kw_only=True)
class GpuRow:
    """A case, what is done with it, and whether float32 products may be rounded to TF32."""

    case: Case
    mode: str  # "fwd": inference; "train": forward, and backward to input and all parameters
    tf32: bool = False
    # Share of (step, row) pairs where the state starts anew; torch.nn is then called a step at a time.
    resets: float = 0.0
    peer: str = "torch"  # or "torchrl": its modules with their Triton kernels
    wavefront: int = 0  # layers side by side, in chunks of so many steps (fastrnn/wavefront.py)

    @property
    def id(self) -> str:
        options = ["tf32" if self.tf32 else "", f"resets{self.resets:g}" if self.resets else ""]
        options += [f"wavefront{self.wavefront}" if self.wavefront else ""]
        peer = "" if self.peer == "torch" else f"vs-{self.peer}"
        return "-".join(filter(None, [self.case.name, *options, self.mode, peer]))


def rows(
    family: str,
    cell: str,
    *sizes: tuple[int, int, int],
    dtypes: Iterable[str] = (BF16, FP32),
    modes: Iterable[str] = BOTH,
    tf32: bool = False,
    resets: float = 0.0,
    peer: str = "torch",
    wavefront: int = 0,
    **options: Any,
) -> Iterator[GpuRow]:
    """sizes: (T, B, H), with as many input features as hidden units."""
    dtypes, modes = tuple(dtypes), tuple(modes)
    for (T, B, H), dtype, mode in product(sizes, dtypes, modes):
        case = Case(family=family, cell=cell, T=T, B=B, I=H, H=H, dtype=dtype, **options)
        yield GpuRow(case=case, mode=mode, tf32=tf32, resets=resets, peer=peer, wavefront=wavefront)


TABLE: tuple[GpuRow, ...] = (
    # where cuDNN takes a product per step
    *rows("lstm", "LSTM", (128, 16, 512), (128, 64, 512), (128, 1, 512)),
    *rows("gru", "GRU", (128, 16, 512), (128, 64, 512)),
    *rows("lstm", "LSTM", (128, 16, 1024), (128, 16, 256)),
    *rows("packed", "LSTM", (128, 32, 256), shortest=16),
    *rows("gru", "GRU", (128, 16, 1024), (128, 16, 256), (128, 1, 512)),
    *rows("resets", "GRU", (64, 64, 256), dtypes=(FP32,), resets=0.01),
    *rows("packed", "GRU", (128, 64, 512), dtypes=(BF16,), shortest=16),
    # where torch.nn leaves one algorithm for another, in a long sequence; many short ones
    *rows("cliff", "LSTM", (2000, 16, 128), (2000, 16, 129), (2000, 16, 192), (2000, 16, 256), dtypes=(FP32,)),
    *rows("lstm", "LSTM", (24, 256, 128)),
    # its persistent kernels: fp16, and H up to 192
    *rows("lstm-fp16", "LSTM", (128, 16, 512), (128, 64, 512), (128, 16, 1024), dtypes=(FP16,)),
    *rows("small", "LSTM", (128, 32, 128), (128, 8, 64)),
    *rows("small", "GRU", (128, 32, 128)),
    *rows("tf32", "LSTM", (128, 16, 512), (128, 64, 512), dtypes=(FP32,), tf32=True),
    *rows("tf32", "GRU", (128, 16, 512), dtypes=(FP32,), tf32=True),
    # several directions and layers
    *rows("bidirectional", "LSTM", (128, 32, 256), bidirectional=True),
    *rows("bidirectional", "GRU", (128, 32, 256), dtypes=(BF16,), bidirectional=True),
    *rows("layers", "LSTM", (128, 64, 512), dtypes=(BF16,), layers=2),
    *rows("pyannote", "LSTM", (589, 32, 128), dtypes=(FP32,), layers=4, bidirectional=True),
    *rows("packed", "LSTM", (128, 32, 256), dtypes=(BF16,), shortest=16, bidirectional=True),
    # DeepBench: training, then inference
    *rows("deepbench", "LSTM", (25, 16, 512), (25, 64, 1024), (25, 32, 2048), dtypes=(BF16, FP16)),
    *rows("deepbench", "GRU", (187, 32, 1536), dtypes=(BF16, FP16)),
    *rows("deepbench", "RNN", (50, 16, 1760), (50, 64, 1760), dtypes=(BF16, FP16)),
    *rows("deepbench", "LSTM", (25, 1, 512), (25, 4, 1024), (50, 1, 1536), (150, 1, 256), modes=FORWARD),
    *rows("deepbench", "GRU", (187, 1, 1536), (1500, 1, 1024), dtypes=(FP16,), modes=FORWARD),
    *rows("deepbench", "LSTM", (150, 64, 256), (50, 32, 1536), (25, 128, 512), dtypes=(BF16,), modes=TRAIN),
    # MLPerf: GNMT's encoder and decoder layers, RNN-T's encoder and prediction net
    *rows("mlperf", "LSTM", (50, 128, 1024), dtypes=(FP16,), modes=TRAIN, layers=4),
    *rows("mlperf", "LSTM", (200, 32, 1024), dtypes=(BF16,), modes=TRAIN, layers=5),
    *rows("mlperf", "LSTM", (40, 32, 512), dtypes=(BF16,), modes=TRAIN, layers=2),
    # several layers again, side by side
    *rows("wavefront", "LSTM", (128, 64, 512), dtypes=(BF16,), layers=2, wavefront=32),
    *rows("wavefront", "LSTM", (200, 32, 1024), dtypes=(BF16,), modes=TRAIN, layers=5, wavefront=25),
    *rows("wavefront", "LSTM", (1600, 64, 384), dtypes=(FP16,), modes=FORWARD, layers=5, wavefront=100),
    # nanopore base callers, reinforcement learning
    *rows("basecaller", "LSTM", (1600, 64, 384), dtypes=(FP16,), modes=FORWARD, layers=5),
    *rows("resets", "LSTM", (128, 16, 512), (32, 256, 128), dtypes=(FP32,), resets=0.01),
    *rows("resets", "LSTM", (128, 16, 512), (32, 256, 128), dtypes=(FP32,), resets=0.01, peer="torchrl"),
    *rows("resets", "GRU", (64, 64, 256), dtypes=(FP32,), resets=0.01, peer="torchrl"),
    *rows("rnn", "RNN", (128, 16, 512), (128, 64, 256)),
    *rows("lstm", "LSTM", (128, 128, 512), (128, 20, 512), (512, 16, 768), dtypes=(BF16, FP16)),
    *rows("lstm", "LSTM", (128, 64, 1024), (128, 16, 2048), dtypes=(BF16,)),
    *rows("gru", "GRU", (128, 64, 1024), (750, 32, 1024), dtypes=(BF16,)),
)


def tiny(row: GpuRow) -> GpuRow:
    """The same row at a size that any machine runs in milliseconds."""
    case = row.case
    small = replace(case, T=min(case.T, 5), B=min(case.B, 3), I=8, H=8, shortest=min(case.shortest, 2))
    return replace(row, case=small, resets=0.3 if row.resets else 0.0, wavefront=min(row.wavefront, 2))
