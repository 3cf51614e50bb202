"""The table: which shapes, in which families and suites. Plain data, no torch, so that --list is instant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MODES = ("fwd", "train")  # fwd: inference_mode; train: forward + backward to input and all parameters
DTYPE_SUFFIX = {"float32": "", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. Layers take [T, B, I]; cells take [B, I] and have T = 1."""

    family: str  # rows of one family share a geometric mean
    cell: str  # class name in torch.nn: LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell
    T: int
    B: int
    I: int  # noqa: E741 (the dimension's name everywhere in this project)
    H: int
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    shortest: int = 0  # > 0: a PackedSequence, lengths uniform in shortest..T
    stateful: bool = False  # an initial state is passed in (always so for cells)
    dtype: str = "float32"

    @property
    def is_cell(self) -> bool:
        return self.cell.endswith("Cell")

    @property
    def name(self) -> str:
        """Unique among cases; letters, digits and dashes only, so that it is its own regular expression."""
        options = [
            f"packed{self.shortest}" if self.shortest else "",
            f"layers{self.layers}" if self.layers > 1 else "",
            "bi" if self.bidirectional else "",
            f"proj{self.proj}" if self.proj else "",
            "state" if self.stateful and not self.is_cell else "",
            DTYPE_SUFFIX[self.dtype],
        ]
        return "-".join([self.cell.lower(), f"{self.T}x{self.B}x{self.I}x{self.H}", *filter(None, options)])


@dataclass(frozen=True)
class Row:
    """One line of a report: a case, what is done with it, and who it is compared with."""

    kind: str  # what runs it: "timing" or "accuracy", see cli.run_rows
    case: Case
    mode: str
    peer: str  # a key of peers.PEERS

    @property
    def id(self) -> str:
        subject = f"accuracy-{self.case.name}" if self.kind == "accuracy" else f"{self.case.name}-{self.mode}"
        return f"{subject}-vs-{self.peer}"


@dataclass(frozen=True)
class Suite:
    """A named list of rows. `budget_s` bounds the timed part of one row, in seconds."""

    description: str
    entries: tuple[tuple[Case, str], ...]
    kind: str = "timing"
    peers: tuple[str, ...] = ("torch",)
    budget_s: float = 5.0

    def rows(self, peers: Sequence[str] | None = None) -> list[Row]:
        names = peers or self.peers
        return [Row(self.kind, case, mode, peer) for case, mode in self.entries for peer in names]


Size = tuple[int, int, int, int]  # T, B, I, H


def entries(
    family: str, cell: str, *sizes: Size, modes: Iterable[str] = MODES, **options: object
) -> list[tuple[Case, str]]:
    """One (case, mode) for every size and mode; `options` are the other fields of Case."""
    modes = tuple(modes)
    return [
        (Case(family=family, cell=cell, T=T, B=B, I=I, H=H, **options), mode)  # type: ignore[arg-type]
        for T, B, I, H in sizes  # noqa: E741
        for mode in modes
    ]


FORWARD, TRAIN = ("fwd",), ("train",)

DECODE = [  # one step on a state that is passed in, and the three cells
    *entries("decode", "LSTM", (1, 1, 512, 512), stateful=True),
    *entries("decode", "LSTM", (1, 1, 256, 256), (1, 1, 1024, 1024), modes=FORWARD, stateful=True),
    *entries("decode", "LSTM", (1, 8, 512, 512), modes=FORWARD, stateful=True),
    *entries("decode", "GRU", (1, 1, 512, 512), stateful=True),
    *entries("decode", "GRU", (1, 8, 512, 512), modes=FORWARD, stateful=True),
    *entries("decode", "RNN", (1, 1, 512, 512), modes=FORWARD, stateful=True),
    *entries("cell", "LSTMCell", (1, 1, 512, 512), (1, 32, 256, 256), (1, 256, 128, 128), stateful=True),
    *entries("cell", "GRUCell", (1, 1, 512, 512), (1, 32, 256, 256), (1, 256, 128, 128), stateful=True),
    *entries("cell", "RNNCell", (1, 1, 512, 512), (1, 32, 256, 256), stateful=True),
]

PACKED = [
    *entries("packed", "LSTM", (64, 16, 128, 128), shortest=8),
    *entries("packed", "LSTM", (128, 32, 256, 256), shortest=16),
    *entries("packed", "LSTM", (128, 32, 256, 256), shortest=16, bidirectional=True),
    *entries("packed", "GRU", (64, 16, 128, 128), shortest=8),
    *entries("packed", "GRU", (128, 32, 256, 256), shortest=16),
    *entries("packed", "RNN", (128, 32, 256, 256), shortest=16),
]

QUICK = [
    *entries("lstm", "LSTM", (100, 1, 256, 256), (128, 8, 128, 128), (1024, 4, 64, 64)),
    *entries("lstm", "LSTM", (100, 1, 512, 512), (512, 16, 128, 128), (128, 32, 256, 256)),
    *entries("gru", "GRU", (100, 1, 256, 256), (128, 8, 128, 128), (128, 32, 256, 256)),
    *entries("rnn", "RNN", (100, 1, 256, 256), (128, 8, 128, 128), (128, 32, 256, 256)),
    *entries("packed", "LSTM", (64, 16, 128, 128), shortest=8),
    *entries("packed", "GRU", (64, 16, 128, 128), shortest=8),
    *entries("proj", "LSTM", (64, 8, 128, 128), proj=64),
    *entries("bidir", "LSTM", (64, 8, 128, 128), layers=2, bidirectional=True),
    *entries("decode", "LSTM", (1, 1, 512, 512), modes=FORWARD, stateful=True),
    *entries("decode", "GRU", (1, 1, 512, 512), modes=FORWARD, stateful=True),
    *entries("cell", "LSTMCell", (1, 1, 512, 512), (1, 32, 256, 256), modes=FORWARD, stateful=True),
    *entries("cell", "GRUCell", (1, 32, 256, 256), stateful=True),
    *entries("cell", "RNNCell", (1, 32, 256, 256), modes=FORWARD, stateful=True),
    *entries("float64", "LSTM", (64, 8, 128, 128), dtype="float64"),
    *entries("float64", "GRU", (64, 8, 128, 128), modes=FORWARD, dtype="float64"),
]

DENSE_SIZES: tuple[Size, ...] = (
    (1, 1, 512, 512), (100, 1, 256, 256), (100, 1, 512, 512), (100, 1, 1024, 1024), (128, 8, 128, 128),
    (128, 32, 256, 256), (128, 32, 512, 512), (64, 64, 512, 512), (512, 16, 128, 128), (1024, 4, 64, 64),
)  # fmt: skip

FULL = [  # minutes to an hour
    *entries("lstm", "LSTM", *DENSE_SIZES, (64, 64, 1024, 1024), (25, 16, 1760, 1760)),
    *entries("gru", "GRU", *DENSE_SIZES),
    *entries("rnn", "RNN", *DENSE_SIZES),
    *PACKED,
    *entries("proj", "LSTM", (64, 8, 128, 128), proj=64),
    *entries("proj", "LSTM", (128, 16, 512, 512), proj=256),
    *entries("bidir", "LSTM", (64, 8, 128, 128), (128, 16, 256, 256), layers=2, bidirectional=True),
    *entries("bidir", "GRU", (128, 16, 256, 256), layers=2, bidirectional=True),
    *DECODE,
    *entries("float64", "LSTM", (64, 8, 128, 128), (128, 32, 256, 256), dtype="float64"),
    *entries("float64", "GRU", (64, 8, 128, 128), (128, 32, 256, 256), dtype="float64"),
]

ACCURACY = [
    entry
    for dtype in ("float32", "bfloat16", "float16")
    for entry in [
        *entries("lstm", "LSTM", (32, 8, 64, 64), (256, 4, 128, 128), modes=TRAIN, dtype=dtype),
        *entries("gru", "GRU", (32, 8, 64, 64), (256, 4, 128, 128), modes=TRAIN, dtype=dtype),
        *entries("rnn", "RNN", (32, 8, 64, 64), (256, 4, 128, 128), modes=TRAIN, dtype=dtype),
        *entries("packed", "LSTM", (32, 8, 64, 64), modes=TRAIN, shortest=4, dtype=dtype),
        *entries("proj", "LSTM", (32, 8, 64, 64), modes=TRAIN, proj=32, dtype=dtype),
        *entries("bidir", "LSTM", (32, 8, 64, 64), modes=TRAIN, layers=2, bidirectional=True, dtype=dtype),
        *entries("cell", "LSTMCell", (1, 8, 64, 64), modes=TRAIN, stateful=True, dtype=dtype),
        *entries("cell", "GRUCell", (1, 8, 64, 64), modes=TRAIN, stateful=True, dtype=dtype),
        *entries("cell", "RNNCell", (1, 8, 64, 64), modes=TRAIN, stateful=True, dtype=dtype),
    ]
]

SUITES: dict[str, Suite] = {
    "quick": Suite("every family at its smaller sizes, about two minutes", tuple(QUICK), budget_s=1.5),
    "decode": Suite("one step: layers at T = 1 with a state, and the cells", tuple(DECODE), budget_s=2.0),
    "packed": Suite("PackedSequence, lengths uniform, forward and training", tuple(PACKED)),
    "full": Suite("every family at all sizes, long", tuple(FULL)),
    "accuracy": Suite("error against a float64 run of torch.nn, by dtype", tuple(ACCURACY), kind="accuracy"),
}


def select(suites: Sequence[str] | None, pattern: str | None, peers: Sequence[str] | None = None) -> dict[Row, Suite]:
    """Rows to run, each once, with the suite it was first found in.

    No suite named: `quick`, or every suite when there is a pattern, so that an id needs no suite to be found.
    """
    names = suites or (list(SUITES) if pattern else ["quick"])
    chosen: dict[Row, Suite] = {}
    for name in names:
        for row in SUITES[name].rows(peers):
            if pattern is None or re.search(pattern, row.id):
                chosen.setdefault(row, SUITES[name])
    return chosen
