"""What a contestant is: a small interface, and what it hands back for one case."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from benchmarks.cases import FORWARD_MODE, PENALTY, Case, way_of
from benchmarks.data import Data


class NoResult(Exception):
    """A contestant has none for this case, for a reason that is no fault: the row is skipped, and says why."""


@dataclass
class Prepared:
    """A case made ready by one contestant: nothing but `step` is timed, and `results` runs that same step."""

    step: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]  # torch.nn's names and layouts, see modules.named_results
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered once around many steps
    synchronize: Callable[[], None] = lambda: None  # waits for the device; ends every sample
    kernel: Callable[[], str] = lambda: ""  # what runs inside, in words; asked once, outside of any timing
    tolerance: float | None = None  # of the check, where the contestant rounds its weights by design
    another_layer: bool = False  # by design: its results are not compared


class Peer(Protocol):
    key: str  # in row ids and options: letters and digits
    title: str
    # An attribute `per_sample` that is true: it has mode `persample`, and may have no other.

    def missing(self) -> str | None:
        """Why it cannot be used here, None if it can. Never raises, and is quick: it may only look for a package."""

    def version(self) -> str: ...

    def supports(self, case: Case, mode: str) -> str | None:
        """Why it has no such case, None if it has. A reason given here makes a skipped row, not an error."""

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        """Converts weights and inputs to its own form (untimed). `data` is a private copy.

        Threads: as many as torch.get_num_threads() says. Raises NoResult where it turns out to have none.
        """


class PackagePeer:
    """A peer that lives in packages of its own; `packages` are their names at the index, `imports` in Python."""

    key: str
    title: str
    packages: tuple[str, ...]
    imports: tuple[str, ...]

    def missing(self) -> str | None:
        absent = [name for name in self.imports if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)} (see `make bench-peers`)" if absent else None

    def version(self) -> str:
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.packages)


def plain_layer(
    case: Case, mode: str, *, training: bool, cells: tuple[str, ...] = ("LSTM", "GRU", "RNN")
) -> str | None:
    """Why a peer has no such case that only has plain float32 layers: one layer, one direction, padded input."""
    if mode in PENALTY + FORWARD_MODE:
        return "no gradient penalties, no forward-mode AD"
    if way_of(mode):
        return f"called as it stands alone, not by {way_of(mode)}"
    if mode == "train" and not training:
        return "inference only"
    if case.cell not in cells:
        return f"no {case.cell}: it has {', '.join(cells)}"
    options = {
        "PackedSequence": case.shortest,
        **dict.fromkeys(case.beyond_torch, True),
        "a frozen input": case.frozen,
        "proj_size": case.proj,
        "a single layer only": case.layers > 1,
        "one direction only": case.bidirectional,
        "float32 only": case.dtype != "float32",
        "relu": case.nonlinearity == "relu",
        "bias=False": not case.bias,
        "batch_first": case.batch_first,
        "unbatched input": case.unbatched,
    }
    refused = [name if name.endswith("only") else f"not with {name}" for name, there in options.items() if there]
    return "; ".join(refused) or None


@contextmanager
def all_cores() -> Iterator[None]:
    """Widens the calling thread's affinity, so that a thread pool made inside is not born on one core.

    With OMP_PROC_BIND set, libgomp binds the main thread to its first place, and new threads inherit that.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
