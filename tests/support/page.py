"""docs/support.md, written from the cases and from the record of those that fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.support import versions
from tests.support.cases import CASES, COMBINED, FAILURES, Case, applies
from tests.support.checks import CHECKS, TITLES
from tests.support.subjects import CELLS, LAYERS, LIBRARIES, OPTIONS, PLAIN

PAGE = Path(__file__).resolve().parents[2] / "docs/support.md"

# Tests that have no column: what they show, and where they stand.
MORE = {
    "`opcheck` (schema, fake tensor, autograd registration, AOT dispatch with symbolic sizes) of every op in "
    "`torch.ops.fastrnn`": "transforms/test_export.py::test_every_op_is_checked",
    "AOTInductor package with dynamic T and B, run in a fresh Python process": (
        "transforms/test_export.py::test_aot_inductor_package_in_a_fresh_process"
    ),
    "the same package run from C++, without Python": "transforms/test_export.py::test_aot_inductor_package_from_cpp",
    "`torch.export` program loaded in a fresh process": "transforms/test_export.py::test_program_in_a_fresh_process",
    "one compilation for 20 sizes (T, B), forward and backward": "transforms/test_compile.py::test_twenty_sizes",
    "compiled module given a PackedSequence, one compilation for all lengths": (
        "transforms/test_compile.py::test_packed_sequence"
    ),
    "compiled graph with one node a layer": "transforms/test_compile.py::test_train",
    "compiled graph of equal size at T = 64 and T = 4096": "transforms/test_compile.py::test_graph_of_long_sequences",
    "one kernel call for an ensemble, for per-sample gradients, for nested `vmap`": (
        "transforms/test_functorch.py::test_ensemble"
    ),
    "any subset of arguments that require grad": (
        "transforms/test_autograd.py::test_any_subset_of_inputs_may_require_grad"
    ),
    "derivatives of the op with lengths, resets and projections, per group": "transforms/test_autograd.py",
}
INTRODUCTION = """\
# What works on the modules

Written by `python -m tests.support --write` from the lists that `tests/support/test_support.py` runs; a test fails
while this page and those differ. **yes** means that a test passes: for a row `check` and a column `kind` it is
`tests/support/test_support.py::test_support[cpu-fastrnn-KIND-CHECK]`, and for torch's column the same test with
`torch.nn` in place of `fastrnn`. **no** means that the very same test must fail, with the error that stands below; if
it passes one day, the test fails and so says that this page is out of date. Results are compared with
`fastrnn/reference.py` on equal parameters, in float32 unless said.

torch's column is measured with torch {torch} on a CPU. **CUDA**: the tests are the same with `cuda` in place of `cpu`;
they are skipped without a GPU and **have not been run on one**, so nothing is claimed there. What has run on one is
`tests/cuda/test_gpu.py` ([gpu.md](gpu.md)). cuDNN was not measured.
"""
VERSIONS = """\
`make test-versions` (`tools/test_versions.sh`): the tests of modules, sequences, transforms, `torch.compile`,
`torch.export`, weights and this page, each pair in an environment of its own, on a CPU. Those of torch.nn in this page
are skipped under another torch than theirs.
"""


def cell_text(cases: Sequence[Case]) -> str:
    failing = [case.kind for case in cases if case.id in FAILURES]
    if not failing:
        return "yes"
    return "**no**" if len(failing) == len(cases) else f"**no**: {', '.join(failing)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def page(measured_with: str) -> str:
    """`measured_with`: the torch that torch.nn's column was measured with."""
    by_key = {(case.library, case.kind, case.option, case.check): case for case in CASES}

    def found(library: str, kinds: Sequence[str], option: str, name: str) -> str:
        cases = [by_key[key] for kind in kinds if (key := (library, kind, option, name)) in by_key]
        return cell_text(cases) if cases else "-"

    columns = [(kind,) for kind in LAYERS] + [CELLS]
    names = [*LAYERS, "cells"]
    lines = [INTRODUCTION.format(torch=measured_with), "## Transforms", ""]
    lines += table(
        ["", "check", *(f"{library} {name}" for library in LIBRARIES for name in names), "fastrnn on CUDA"],
        [
            [
                TITLES[name],
                f"`{name}`",
                *(found(library, kinds, PLAIN, name) for library in LIBRARIES for kinds in columns),
                "not run",
            ]
            for name in CHECKS
        ],
    )
    for library in LIBRARIES:
        lines += ["", f"## Options of {library}", ""]
        lines += ["The three layers, each with the option and the check; for those that compile, LSTM alone.", ""]
        options = [option for option in OPTIONS if applies(library, "LSTM", option)]
        rows = [[f"`{o}`", *(found(library, LAYERS, o, name) for name in COMBINED)] for o in options]
        lines += table(["", *(f"`{name}`" for name in COMBINED)], rows)
    lines += [
        "",
        "## More tests",
        "",
        *table(["", "test"], [[what, f"`tests/{where}`"] for what, where in MORE.items()]),
        "",
        "## Versions",
        "",
        *VERSIONS.splitlines(),
        "",
        *(table(versions.HEADER, versions.rows()) if versions.rows() else ["No run is on record yet."]),
    ]
    for library in LIBRARIES:
        lines += ["", f"## What fails in {library}, by name", ""]
        by_error: dict[str, list[str]] = {}
        for case in CASES:
            if case.library == library and case.id in FAILURES:
                by_error.setdefault(FAILURES[case.id], []).append(f"`{case.id}`")
        if not by_error:
            lines.append("Nothing.")
        for error, ids in by_error.items():
            lines += [f"- `{error.replace('`', chr(39))}`", f"  {', '.join(ids)}"]
    return "\n".join(lines) + "\n"
