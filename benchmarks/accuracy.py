"""Error of one row against a float64 run of torch.nn on the same, already rounded, numbers: both sides'."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import Row
from benchmarks.data import make_data
from benchmarks.measure import TOLERANCE, ContestantError, prepare, scaled_error
from benchmarks.peers import PEERS
from benchmarks.peers.base import NoResult, Peer
from benchmarks.results import Accuracy, Errors, Result, Settings


def tensor_errors(results: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Per named tensor; inf for one that is missing, of a wrong shape, or not finite."""
    return {
        name: scaled_error(results[name], expected) if name in results else math.inf
        for name, expected in reference.items()
    }


def summarise(errors: dict[str, float]) -> Errors:
    return Errors(
        outputs=max(error for name, error in errors.items() if not name.startswith("grad_")),
        gradients=max(error for name, error in errors.items() if name.startswith("grad_")),
    )


def run_accuracy(row: Row, ours: Peer, theirs: Peer, settings: Settings) -> Result:
    """Allowed for each tensor: twice the peer's own error plus one rounding unit of the dtype.

    Where the peer has no such dtype, the tolerance of the timing rows is allowed instead.
    """
    dtype = getattr(torch, row.case.dtype)
    try:
        data = make_data(row.case, settings.seed)
        wide = replace(row, case=replace(row.case, dtype="float64"))
        _, reference = prepare(PEERS["torch"], wide, data.to(torch.float64))
        our_errors = tensor_errors(prepare(ours, row, data)[1], reference)
    except Exception as error:
        text = str(error) if isinstance(error, ContestantError) else f"{type(error).__name__}: {error}"
        return Result(row, "error", text)
    if broken := [name for name, error in our_errors.items() if not math.isfinite(error)]:
        text = f"{ours.key}: missing, of a wrong shape or not finite: {', '.join(broken)}"
        return Result(row, "mismatch", text)
    their_errors, missing = None, None
    try:
        their_errors = tensor_errors(prepare(theirs, row, data)[1], reference)
        if not all(map(math.isfinite, their_errors.values())):
            their_errors, missing = None, f"{theirs.key}: not finite"
    except (ContestantError, NoResult) as error:
        missing = str(error)

    def allowed(name: str) -> float:
        return TOLERANCE[dtype] if their_errors is None else 2 * their_errors[name] + torch.finfo(dtype).eps

    worst = max(our_errors, key=lambda name: our_errors[name] / allowed(name))
    accuracy = Accuracy(
        ours=summarise(our_errors),
        theirs=None if their_errors is None else summarise(their_errors),
        theirs_missing=missing,
        worst=worst,
        worst_error=our_errors[worst],
        worst_allowed=allowed(worst),
    )
    over = [name for name in our_errors if not our_errors[name] <= allowed(name)]
    message = "; ".join(f"{name}: error {our_errors[name]:.1e}, allowed {allowed(name):.1e}" for name in over)
    return Result(row, "mismatch" if over else "ok", message, accuracy=accuracy)
