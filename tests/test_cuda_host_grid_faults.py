"""Faults planted in the grid tier's own sources: each must be noticed, by a finding or by a wrong number.

A faulty copy is the tier's text with one place changed, in a namespace of its own and cut down to one cell and one
product, so that all of them fit one library.
"""

import re
import shutil

import pytest
import torch

from tests.test_cuda_host_grid import OUT, ROOT, TOLERANCE, Grid, Tile, build, problem
from tests.test_kernels import Case

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

BARRIER = "dev::sync_block();\n    if (o.units && o.row.running(k))"
# name: (pass, product, text, in its place, what one finding says; None: numbers tell)
FAULTS = {
    "clean_ffma": ("forward", "ffma", "", "", ""),
    "clean_half": ("forward", "half", "", "", ""),
    "clean_backward": ("backward", "ffma", "", "", ""),
    "no_barrier": ("forward", "ffma", BARRIER, BARRIER.replace("dev::sync_block();", ""), "race|uninitialised"),
    "one_sums_buffer": ("forward", "half", "k & 1 ? shared.sums_odd :", "", "race"),
    "one_word_buffer": ("forward", "half", "(place * 2 + (n & 1))", "(place * 2)", "deadlock"),
    "tag_ignored": ("forward", "half", "uint32_t(word[n] >> 32) == tag", "(look >> n & 1u) == 1u", None),
    "words_not_cleared": ("forward", "ffma", "workspace[i] = 0;", ";", "uninitialised"),
    "no_warp_barrier_after_stage": (
        "forward", "ffma", "dev::sync_warp();\n      const float4* w", "const float4* w", "race|uninitialised"),
    "no_warp_barrier_before_stage": (
        "forward", "ffma", "dev::sync_warp();  // before the stage", "// before", "race"),
    "published_to_wrong_buffer": ("forward", "half", "publish(k + 1, h);", "publish(k, h);", "deadlock"),
    "row_not_published": (
        "forward", "half", "if (o.row.running(k + 1)) publish", "if (o.position) publish", "deadlock"),
    "rows_not_sorted": ("forward", "half", "if (p.lengths) {", "if (false) {", None),
    "new_rows_awaited": ("backward", "ffma", "uint32_t(k) + 2, before, sums", "uint32_t(k) + 2, running, sums",
                         "deadlock"),
    "padding_awaited": ("forward", "half", "unit_of(range.begin + t, i) < s.hidden", "true", "deadlock"),
    "tag_of_last_step": ("backward", "ffma", "uint32_t(k) + 2, before", "uint32_t(k) + 1, before", "deadlock"),
}  # fmt: skip

LAUNCHER = """
extern "C" __attribute__((visibility("default"))) int grid_fault_NAME(
    const fastrnn::BackwardParams* p, bool, int units, int rows, int threads, bool, void* workspace) {
  fastrnn::cuda::Choice choice{};
  choice.units = units, choice.rows = rows, choice.threads = threads;
  return fastrnn::cuda::NAME::grid_PASS(*p, choice, workspace, nullptr);
}
"""
ONLY_LSTM = """
namespace fastrnn::cuda::NAME {
template <class F> int with_cell(int32_t, F f) { return f(Type<LSTMCell>{}); }
template <class F> int with_half(DType, F f) { return f(Type<dev::bf16>{}); }
}
"""


def faulty_source(name):
    which, kind, text, instead, _ = FAULTS[name]
    folder = ROOT / "csrc/cuda"
    whole = "\n".join(
        (folder / file).read_text() for file in ("grid.cuh", "grid_product.cuh", "grid_prepare.cu", f"grid_{which}.cu")
    )
    if text:
        assert whole.count(text) == 1, f"{name}: {whole.count(text)} places for {text!r}"
        whole = whole.replace(text, instead)
    whole = re.sub(r"^(#pragma once|#include .*)$", "", whole, flags=re.MULTILINE)
    # keep one product
    half = whole.index("      if (s.half)\n        return with_half(call.dtype")
    mma = whole.index("      if (s.mma)\n", half)
    ffma = whole.index("\n      return launch_grid(", mma) + 1
    if kind == "ffma":
        whole = whole[:half] + whole[ffma:]
    else:
        whole = whole[:half] + whole[half:mma].replace("if (s.half)", "") + whole[whole.index(";\n", ffma) + 2 :]
    whole = whole.replace("namespace fastrnn::cuda {", f"namespace fastrnn::cuda::{name} {{")
    includes = "".join(f'#include "cuda/{x}"\n' for x in ("common.cuh", "grid_tiles.h", "tiles.h"))
    launcher = LAUNCHER.replace("NAME", name).replace("PASS", which)
    return includes + ONLY_LSTM.replace("NAME", name) + whole + launcher


class Faulty(Grid):
    def __init__(self, path):
        super().__init__(path)
        self.run_clean = self.library.grid_test_run

    def choose(self, name):
        self.library.grid_test_run = getattr(self.library, f"grid_fault_{name}")
        self.library.grid_test_run.argtypes = self.run_clean.argtypes


@pytest.fixture(scope="module")
def faulty():
    folder = OUT / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for name in FAULTS:
        source = folder / f"{name}.cu"
        text = faulty_source(name)
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        sources.append(source)
    real = [ROOT / f"csrc/cuda/grid_{x}.cu" for x in ("prepare", "forward", "backward")]
    return Faulty(build([*real, *sources, ROOT / "tests/hostbuild/grid_launchers.cpp"], OUT / "libgridfaults.so"))


def far(got, want, tolerance):
    return got is None or any(
        not (a.double() - b).abs().max() <= tolerance * (1 + b.abs().max()) for a, b in zip(got, want, strict=True)
        if b.numel()
    )  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(faulty, name):
    which, kind, _, _, says = FAULTS[name]
    case = Case("lstm", 4, 10, 1, 9, 0, "rows", "state", dtype=torch.float32 if kind == "ffma" else torch.bfloat16)
    tile, tolerance = Tile(4, 10), 3 * TOLERANCE["float32" if kind == "ffma" else "bfloat16"]
    faulty.choose(name)
    found, wrong = [], 0
    for i in faulty.schedules(seed=5, count=8):
        faulty.reset()
        (arguments, results), (call, gradients) = problem(case, i % 2)
        try:
            got = faulty.forward(arguments, tile) if which == "forward" else faulty.backward(call, tile)
            wrong += far(got, results if which == "forward" else gradients, tolerance)
        except AssertionError:  # something was left unwritten
            wrong += 1
        found.append(" ".join(faulty.findings()))
    if says == "":
        assert not any(found) and not wrong
    elif says is None:
        assert wrong >= 4, (wrong, found)
    else:
        assert sum(bool(re.search(says, x)) for x in found) >= (1 if says == "deadlock" else 4), found[:2]


def test_every_place_is_there():
    """A fault whose text is gone from the sources would be no fault."""
    for name in FAULTS:
        faulty_source(name)
