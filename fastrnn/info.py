"""``python -m fastrnn``: versions, how the extension was built, and which kernel a call takes::

    python -m fastrnn
    python -m fastrnn --cell gru --steps 100 --batch 32 --hidden 512 --dtype bfloat16 --device cuda --gpu h100

A call is named by its sizes; nothing is computed. What CUDA would choose is answered without a GPU too, by a build with
CUDA kernels, for the GPU that ``--gpu`` names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

import fastrnn

from . import _C
from .fallback import KERNELS
from .layer import road
from .ops import CELLS


class Gpu(NamedTuple):
    """What the choice of a kernel asks of a device."""

    multiprocessors: int
    compute_capability: int  # 90 for 9.0
    shared_per_block: int  # bytes a block may opt in to


# SMs of the usual board; shared memory from the CUDA programming guide's table of compute capabilities.
GPUS = {
    "a100": Gpu(108, 80, 163 << 10),
    "rtx3090": Gpu(82, 86, 99 << 10),
    "l40s": Gpu(142, 89, 99 << 10),
    "rtx4090": Gpu(128, 89, 99 << 10),
    "h100": Gpu(132, 90, 227 << 10),  # SXM; the H200 has the same numbers
    "b200": Gpu(148, 100, 227 << 10),
    "rtx5090": Gpu(170, 120, 99 << 10),
}


class Sizes(NamedTuple):
    """Those of one layer's call: T steps, B batch, P groups (directions), h hidden units, R width of state 0."""

    cell: str
    dtype: str
    T: int
    B: int
    P: int
    h: int
    R: int
    lengths: bool = False
    resets: bool = False

    def sizes(self) -> tuple[int, str, int, int, int, int, int, bool]:
        """The leading arguments of the extension's planners."""
        cell = list(CELLS).index(self.cell)
        return cell, self.dtype, self.T, self.B, self.P, self.h, self.R, self.h != self.R


def has_cuda_kernels() -> bool:
    return fastrnn.build_info()["cuda_archs"] is not None


def present_gpu(index: int | None = None) -> Gpu | None:
    """The given or current CUDA device; None where there is none."""
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    shared: int = facts.shared_memory_per_block_optin  # type: ignore[attr-defined]  # missing in torch's stub
    return Gpu(facts.multi_processor_count, 10 * facts.major + facts.minor, shared)


def environment() -> dict[str, Any]:
    """Versions, build and devices, as JSON can hold them."""
    built = fastrnn.build_info()
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpus.append({"name": torch.cuda.get_device_name(index), **(present_gpu(index) or Gpu(0, 0, 0))._asdict()})
    return {
        "fastrnn": fastrnn.__version__,
        "torch": torch.__version__,
        "built_with_torch": built["torch"],
        "compiler": built["compiler"],
        "instruction_set": fastrnn.instruction_set(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processors": _C.usable_processors(),
        "cuda_archs": built["cuda_archs"],
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "gpus": gpus,
        "cells": list(CELLS),
    }


def road_of(call: Sizes, device: str) -> str:
    """The road of an eager call (fastrnn/layer.py)."""
    return road(getattr(torch, call.dtype) in KERNELS.get(device, ()))


def cpu_choice(call: Sizes, features: int, threads: int) -> dict[str, Any]:
    """How a CPU call is shared out over threads, for a layer of so many input features run eagerly.

    A call with lengths splits its rows by them, the rest is equal. ``steps_at_a_time``: of which the kernel of a whole
    layer holds gates or their gradients.
    """
    return {
        "road": road_of(call, "cpu"),
        "instruction_set": fastrnn.instruction_set(),
        "forward": _C.cpu_plan(*call.sizes(), features, threads, False),
        "backward": _C.cpu_plan(*call.sizes(), features, threads, True),
    }


def cuda_choice(call: Sizes, gpu: Gpu, backward: bool, tf32: bool, tier: str = "") -> dict[str, Any]:
    """The tier and tile that the CUDA dispatch table gives, or the tile of the tier that is named.

    Raises:
        RuntimeError: the extension was built without CUDA kernels.
        ValueError: there is no such tier, or it cannot run the call.
    """
    if not has_cuda_kernels():
        raise RuntimeError("this build has no CUDA kernels (build_info()['cuda_archs'] is None)")
    return _C.cuda_plan(*call.sizes(), call.lengths, call.resets, backward, tf32, *gpu, tier)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn", description="Versions, build, and which kernel a call takes."
    )
    call = parser.add_argument_group("the call (any of these asks for it)")
    call.add_argument("--cell", choices=list(CELLS), help="default: lstm")
    for name, default in (("steps", 100), ("batch", 32), ("hidden", 256)):
        call.add_argument(f"--{name}", type=int, metavar="N", help=f"default: {default}")
    call.add_argument("--features", type=int, metavar="N", help="of the input; default: as many as hidden units")
    call.add_argument("--proj", type=int, metavar="N", help="projected size of an LSTM's output")
    call.add_argument("--bidirectional", action="store_true")
    call.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], help="default: float32")
    call.add_argument("--device", choices=["cpu", "cuda"], help="default: both, as far as built")
    call.add_argument("--lengths", action="store_true", help="rows of different lengths")
    call.add_argument("--resets", action="store_true", help="resets inside the sequence")
    call.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    call.add_argument("--gpu", choices=list(GPUS), help="default: the GPU of this machine, else h100")
    call.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help="may float32 products be rounded to TF32? (default: what torch.backends.cudnn.rnn.fp32_precision says)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def describe(options: argparse.Namespace) -> dict[str, Any] | None:
    """What the asked call takes on each device; None if no option names a call."""
    asked = {name: value for name, value in vars(options).items() if name != "json"}
    if asked["tf32"] is None and all(value is None or value is False for value in asked.values()):
        return None
    for name in ("steps", "batch", "hidden", "features", "proj", "threads"):
        if asked[name] is not None and asked[name] < 1:
            raise ValueError(f"--{name}: expected 1 or more, got {asked[name]}")
    hidden = options.hidden or 256
    call = Sizes(
        options.cell or "lstm",
        options.dtype or "float32",
        options.steps or 100,
        options.batch or 32,
        2 if options.bidirectional else 1,
        hidden,
        options.proj or hidden,
        options.lengths,
        options.resets,
    )
    if options.proj and (call.cell != "lstm" or not options.proj < hidden):
        raise ValueError("--proj: expected with --cell lstm and below --hidden")
    told: dict[str, Any] = {"call": call._asdict()}
    if options.device != "cuda":
        threads = options.threads or min(torch.get_num_threads(), _C.usable_processors())
        told["cpu"] = cpu_choice(call, options.features or hidden, threads)
    if options.device == "cuda" or (options.device is None and has_cuda_kernels()):
        gpu = GPUS[options.gpu] if options.gpu else present_gpu() or GPUS["h100"]
        tier = os.environ.get("FASTRNN_CUDA_TIER", "")
        assumed = options.gpu or (None if present_gpu() else "h100")
        tf32 = _C.allow_tf32(call.T) if options.tf32 is None else options.tf32
        told["cuda"] = {
            "road": road_of(call, "cuda"),
            "gpu": {"assumed": assumed, **gpu._asdict()},
            "forward": cuda_choice(call, gpu, False, tf32, tier),
            "backward": cuda_choice(call, gpu, True, tf32, tier),
        }
    return told


def lines(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    out = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            out += [f"{indent}{name}", *lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for item in value:
                out += [f"{indent}{name}", *lines(item, indent + "  ")]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            out.append(f"{indent}{name:<18} {'none' if shown in (None, '') else shown}")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        call = describe(options)
    except (RuntimeError, ValueError) as error:
        print(f"fastrnn: {error}", file=sys.stderr)
        return 2
    facts = environment() | (call or {})
    print(json.dumps(facts, indent=1) if options.json else "\n".join(lines(facts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
