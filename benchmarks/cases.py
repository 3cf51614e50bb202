"""What a row is: a problem, what is done with it, and against whom. Plain data, no torch, so that --list is instant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MODES = ("fwd", "train")  # fwd: inference_mode; train: forward + backward to input and all parameters
PER_SAMPLE = ("persample",)  # the gradients of each sample's own loss by all parameters
# A mode may say in what way the call is made, behind a dash: peers/ways.py.
WAYS = ("autocast", "checkpoint", "compiled", "loop", "step")
PENALTY = ("penalty",)  # the square of the gradient of the input, and its gradients by the input and all parameters
FORWARD_MODE = ("jvp", "hvp")  # the derivative of output, or of the gradients, in a direction of input and parameters


def is_training(mode: str) -> bool:
    return mode.partition("-")[0] not in ("fwd", "jvp")


def way_of(mode: str) -> str:
    """One of WAYS, or nothing: called as it stands."""
    return mode.partition("-")[2]


DTYPE_SUFFIX = {"float32": "", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}

PLAIN: dict[str, Any] = {  # options of Case as torch.nn's layers are
    "peephole": False, "layer_norm": False, "num_heads": 1, "reset_after": True,
    "recurrent_dropout": 0.0, "zoneout": 0.0,
}  # fmt: skip


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
    padded: bool = False  # with shortest: padded input and lengths= in place of a PackedSequence
    nested: bool = False  # with shortest: a nested tensor (torch.jagged) in place of it
    stateful: bool = False  # an initial state is passed in (always so for cells)
    resets: int = 0  # > 0: episodes of this mean length begin inside the sequences, the state is zeroed there
    nonlinearity: str = ""  # RNN only: "relu", or tanh
    bias: bool = True
    batch_first: bool = False
    unbatched: bool = False  # B = 1, and the call's tensors have no such dimension
    dtype: str = "float32"
    tokens: bool = False  # the input is integers [T, B] in [0, I), stored by token where a layer knows how
    recompute: int = 0  # > 0: training keeps the states of every such step and makes the rest again
    peephole: bool = False
    layer_norm: bool = False
    num_heads: int = 1
    reset_after: bool = True
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0  # of h and of c
    frozen: bool = False  # training asks for no gradient of the input
    gain: float = 1.0  # the recurrent matrices are torch.nn's initial ones times this
    trained: bool = False  # weights and input are those of a trained character model (drift.py), T and B of its text

    @property
    def beyond_torch(self) -> list[str]:
        """What torch.nn's layers have not got."""
        options = {
            "resets": self.resets, "lengths=": self.padded, "nested tensors": self.nested, "tokens": self.tokens,
            "recompute": self.recompute,
        }  # fmt: skip
        return [name for name, there in options.items() if there] + list(self.variant)

    @property
    def variant(self) -> dict[str, Any]:
        """The options that make it another layer than any of torch.nn's, as fastrnn's constructors take them."""
        return {name: getattr(self, name) for name, plain in PLAIN.items() if getattr(self, name) != plain}

    @property
    def lengths_as(self) -> str:
        """How rows of different lengths are passed in."""
        return "lengths" if self.padded else "nested" if self.nested else "packed"

    @property
    def is_cell(self) -> bool:
        return self.cell.endswith("Cell")

    @property
    def name(self) -> str:
        """Unique among cases; letters, digits and dashes only, so that it is its own regular expression."""
        options = [
            f"{self.lengths_as}{self.shortest}" if self.shortest else "",
            f"layers{self.layers}" if self.layers > 1 else "",
            "bi" if self.bidirectional else "",
            f"proj{self.proj}" if self.proj else "",
            "state" if self.stateful and not self.is_cell else "",
            f"resets{self.resets}" if self.resets else "",
            self.nonlinearity,
            "" if self.bias else "nobias",
            "batchfirst" if self.batch_first else "",
            "unbatched" if self.unbatched else "",
            DTYPE_SUFFIX[self.dtype],
            "tokens" if self.tokens else "",
            f"recompute{self.recompute}" if self.recompute else "",
            "peephole" if self.peephole else "",
            f"heads{self.num_heads}" if self.num_heads > 1 else "",
            "" if self.reset_after else "resetbefore",
            f"recurrentdropout{self.recurrent_dropout:.0%}".rstrip("%") if self.recurrent_dropout else "",
            f"zoneout{self.zoneout:.0%}".rstrip("%") if self.zoneout else "",
            "layernorm" if self.layer_norm else "",
            "frozen" if self.frozen else "",
            f"gain{self.gain:g}" if self.gain != 1 else "",
            "trained" if self.trained else "",
        ]
        return "-".join([self.cell.lower(), f"{self.T}x{self.B}x{self.I}x{self.H}", *filter(None, options)])


@dataclass(frozen=True)
class Row:
    """One line of a report: a case, what is done with it, and who it is compared with."""

    kind: str  # what runs it: "timing", "accuracy", "memory" or "drift", see runner.run_row
    case: Case
    mode: str
    peer: str  # a key of peers.PEERS
    threads: int = 0  # of this row; 0: of the run
    busy: int = 0  # other processes that compute meanwhile

    @property
    def id(self) -> str:
        subject = f"accuracy-{self.case.name}" if self.kind == "accuracy" else f"{self.case.name}-{self.mode}"
        if self.kind in ("memory", "drift"):
            subject = f"{self.kind}-{subject}"
        threads = f"-threads{self.threads}" if self.threads else ""
        busy = f"-busy{self.busy}" if self.busy else ""
        return f"{subject}{threads}{busy}-vs-{self.peer}"


@dataclass(frozen=True)
class Suite:
    """A named list of rows."""

    description: str
    entries: tuple[tuple[Case, str], ...]
    kind: str = "timing"
    peers: tuple[str, ...] = ("torch",)
    budget_s: float = 5.0  # of the timed part of one row
    longest_s: float | None = None  # rows whose single call cannot be shorter than this are skipped, and say so
    threads: tuple[int, ...] = (0,)  # one row for each; 0: the run's
    busy_threads: tuple[int, ...] = ()  # one row more for each, beside `busy` other processes that compute
    busy: int = 0

    def has(self, row: Row) -> bool:
        """Among the rows with the suite's own peers."""
        ours = row.kind == self.kind and row.peer in self.peers and (row.threads, row.busy) in self.conditions
        return ours and (row.case, row.mode) in self.entries

    @property
    def conditions(self) -> list[tuple[int, int]]:
        """Threads and busy processes of the rows of one case."""
        return [*((threads, 0) for threads in self.threads), *((threads, self.busy) for threads in self.busy_threads)]

    def rows(self, peers: Sequence[str] | None = None) -> list[Row]:
        return [
            Row(self.kind, case, mode, peer, threads, busy)
            for case, mode in self.entries
            for threads, busy in self.conditions
            for peer in peers or self.peers
        ]


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
