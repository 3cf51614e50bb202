"""A row made ready on a device: torch.nn's step and ours, on the same weights and inputs, eager or as a CUDA graph."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from benchmarks.cases import Case
from benchmarks.data import module_arguments
from benchmarks.gpu.rows import GpuRow
from benchmarks.peers.sequences import torchrl_layer

Step = Callable[[], tuple[Tensor, ...]]

# Two right answers differ by rounding, in another order each; tests/cuda/test_gpu.py judges sharply, against float64.
TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 1e-1, "float16": 2e-2}


@dataclass
class Contest:
    """Both sides of a row. Their steps return the output and, in training, the gradients named in `names`."""

    names: tuple[str, ...]
    ours: Step
    theirs: Step
    capturable: str = ""  # why no CUDA graph of it is tried; empty if one is


def one_step_at_a_time(module: nn.Module, input: Tensor, keep: Tensor) -> Tensor:
    """What torch.nn's user writes for states that start anew: a call per step. keep [T, B, 1]: 0 at resets."""
    state: Any = None
    outputs = []
    for x, kept in zip(input, keep, strict=True):
        if state is not None:
            state = tuple(s * kept for s in state) if isinstance(state, tuple) else state * kept
        y, state = module(x[None], state)
        outputs.append(y)
    return torch.cat(outputs)


@contextlib.contextmanager
def side_by_side(steps: int) -> Iterator[None]:
    """Our layers' calls inside go in chunks of so many steps; 0: one after the other."""
    if steps:
        os.environ["FASTRNN_CUDA_WAVEFRONT"] = str(steps)
    try:
        yield
    finally:
        os.environ.pop("FASTRNN_CUDA_WAVEFRONT", None)


def prepare(row: GpuRow, device: torch.device, seed: int = 0) -> Contest:
    case = row.case
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    theirs = getattr(nn, case.cell)(**module_arguments(case), device=device)
    ours = getattr(fastrnn, case.cell)(**module_arguments(case), device=device)
    ours.load_state_dict(theirs.state_dict())
    for module in (ours, theirs):
        module.train(row.mode == "train")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    width = (case.proj or case.H) * (2 if case.bidirectional else 1)
    input, grad = normal(case.T, case.B, case.I), normal(case.T, case.B, width)
    sequence: Tensor | PackedSequence = input
    options: dict[str, Any] = {}
    call = theirs.__call__
    if case.shortest:
        lengths = torch.randint(case.shortest, case.T + 1, (case.B,), generator=torch.Generator().manual_seed(seed))
        sequence = pack_padded_sequence(input, lengths, enforce_sorted=False)
        grad = pack_padded_sequence(grad, lengths, enforce_sorted=False).data
        input = sequence.data
    if row.resets:
        resets = torch.rand(case.T, case.B, generator=generator, device=device) < row.resets
        options["resets"] = resets
        keep = (~resets)[:, :, None].to(dtype)
        if row.peer == "torchrl":
            theirs = torchrl_layer(case, "triton", theirs.state_dict(), resets)

        def call(x: Any) -> Any:
            if row.peer == "torchrl":
                return theirs(x.transpose(0, 1))[0].transpose(0, 1), None
            return one_step_at_a_time(theirs, x, keep), None

    input = input.detach().requires_grad_(row.mode == "train")
    sequence = sequence._replace(data=input) if isinstance(sequence, PackedSequence) else input

    def step_of(module: nn.Module, run: Callable[[Any], Any]) -> Step:
        leaves = [input, *module.parameters()]

        def output() -> Tensor:
            with side_by_side(row.wavefront):
                result = run(sequence)[0]
            return result.data if isinstance(result, PackedSequence) else result

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (output(),)

        def train() -> tuple[Tensor, ...]:
            result = output()
            return (result.detach(), *torch.autograd.grad(result, leaves, grad))

        return train if row.mode == "train" else forward

    names = ["output"]
    if row.mode == "train":
        names += ["grad_input", *(f"grad_{name}" for name, _ in theirs.named_parameters())]
    why = "torch's packed path copies lengths from the host" if case.shortest else ""
    return Contest(tuple(names), step_of(ours, lambda x: ours(x, **options)), step_of(theirs, call), why)


def capture(step: Step) -> Callable[[], object]:
    """Replays the step as a CUDA graph; a call returns the tensors that replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def scaled_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest reference value; inf for a NaN or a wrong shape."""
    if value.shape != reference.shape:
        return math.inf
    difference = (value.float() - reference.float()).abs().max().item()
    scale = max(reference.float().abs().max().item(), 1e-30)
    return difference / scale if math.isfinite(difference) else math.inf


def worst_error(row: GpuRow, contest: Contest) -> tuple[str, float, float]:
    """(tensor, its error, what is allowed) where ours and theirs differ most."""
    allowed = TOLERANCE["tf32" if row.tf32 else row.case.dtype]
    errors = [scaled_error(a, b) for a, b in zip(contest.ours(), contest.theirs(), strict=True)]
    worst = max(range(len(errors)), key=errors.__getitem__)
    return contest.names[worst], errors[worst], allowed


def case_facts(case: Case) -> dict[str, Any]:
    keys = ("family", "cell", "T", "B", "I", "H", "layers", "bidirectional", "proj", "shortest", "dtype")
    return {key: getattr(case, key) for key in keys}
