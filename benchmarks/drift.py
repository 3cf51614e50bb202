"""Error of a layer's output after 1, 10, 100, .. steps, against a float64 run of torch.nn on the same numbers.

For contestants that compute something else by design, as fastrnn.quantize does: not whether they are right, but how far
off they are, and how that grows with the length of a sequence.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Row
from benchmarks.data import Data, make_data
from benchmarks.measure import ContestantError, prepare
from benchmarks.peers import PEERS
from benchmarks.peers.base import NoResult, Peer
from benchmarks.results import Drift, Result, Settings

if TYPE_CHECKING:
    import char_lm

STEPS = (1, 10, 100, 1000, 10_000)
TRAINING_STEPS = 400  # of 32 x 128 characters: about a minute on one thread at H = 256


def steps_of(T: int) -> list[int]:
    return [steps for steps in STEPS if steps <= T]


def error_by_steps(output: Tensor, expected: Tensor) -> tuple[list[float], list[float]]:
    """Root mean square and largest difference of the first 1, 10, .. steps of output [T, B, O], over the root mean
    square of what was expected of these steps."""
    rms, largest = [], []
    for steps in steps_of(len(expected)):
        want = expected[:steps]
        size, difference = want.square().mean().sqrt(), output[:steps].double() - want
        rms.append((difference.square().mean().sqrt() / size).item())
        largest.append((difference.abs().max() / size).item())
    return rms, largest


@functools.lru_cache(maxsize=1)  # of the rows of one case, which follow one another
def expected_output(case: Case, seed: int) -> Tensor:
    """[T, B, O] in float64."""
    wide = replace(case, dtype="float64")
    return prepare(PEERS["torch"], Row("drift", wide, "fwd", "torch"), drift_data(case, seed).to(torch.float64))[1][
        "output"
    ]


def drift_data(case: Case, seed: int) -> Data:
    return trained_data(case, seed) if case.trained else make_data(case, seed)


def run_drift(row: Row, peer: Peer, settings: Settings) -> Result:
    try:
        expected = expected_output(row.case, settings.seed)
        output = prepare(peer, row, drift_data(row.case, settings.seed))[1]["output"]
    except (ContestantError, NoResult) as error:
        return Result(row, "error", str(error))
    except Exception as error:
        return Result(row, "error", f"{type(error).__name__}: {error}")
    rms, largest = error_by_steps(output, expected)
    if not all(map(math.isfinite, (*rms, *largest))):
        return Result(row, "mismatch", f"{peer.key}: output is not finite")
    return Result(row, "ok", drift=Drift(steps_of(row.case.T), rms, largest))


# ---- a trained network


@functools.lru_cache(maxsize=1)
def trained(cell: str, size: int, hidden: int, seed: int) -> char_lm.Trainer:
    """The character model of examples/char_lm.py with one layer, on the source of Python's standard library."""
    folder = str(Path(__file__).resolve().parents[1] / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    import char_lm

    given = {"cell": cell.lower(), "embed": size, "hidden": hidden, "layers": 1, "seed": seed}
    options = char_lm.parse_options([f"--{name}={value}" for name, value in given.items()])
    corpus = char_lm.make_corpus(char_lm.read_text(None, options.max_chars), options)
    with torch.random.fork_rng(devices=[]):
        trainer = char_lm.Trainer("fastrnn", options, corpus, torch.device("cpu"))
        trainer.run(TRAINING_STEPS)
    return trainer


def trained_data(case: Case, seed: int) -> Data:
    """The trained layer's weights, and as input B streams of T characters of the text that was held out, embedded."""
    trainer: Any = trained(case.cell, case.I, case.H, seed)
    text = trainer.corpus.valid[: case.T * case.B].view(case.B, case.T).t()
    with torch.no_grad():
        input = trainer.model.embedding(text)
    weights = {name: weight.detach() for name, weight in trainer.model.rnn.state_dict().items()}
    nothing = torch.zeros(case.T, case.B, case.H)
    return Data(weights, input, None, None, (nothing,)).to(getattr(torch, case.dtype))
