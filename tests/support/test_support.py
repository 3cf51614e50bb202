"""docs/support.md, case by case: what it says works does, and what it says fails fails as it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._functorch.config
import torch._inductor.config

from fastrnn import info
from tests.support.cases import CASES, FAILURES, MEASURED_WITH, Case, outcome, torch_version
from tests.support.page import MORE, PAGE, page

HAS_CUDA = torch.cuda.is_available() and info.has_cuda_kernels()
needs_gpu = pytest.mark.skipif(not HAS_CUDA, reason="torch sees no GPU, or the build has no CUDA kernels")

CASES_OF_CUDA = [case for case in CASES if case.library == "fastrnn"]


@pytest.fixture(autouse=True)
def _no_cached_graphs() -> Iterator[None]:
    # Graphs are cached on disk by what dynamo sees, which does not include the sources of this project.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("device", "case"),
    [
        *(pytest.param("cpu", case, id=f"cpu-{case.id}") for case in CASES),
        *(pytest.param("cuda", case, id=f"cuda-{case.id}", marks=needs_gpu) for case in CASES_OF_CUDA),
    ],
)
def test_support(device: str, case: Case) -> None:
    if case.library != "fastrnn" and torch_version() != MEASURED_WITH:
        pytest.skip(f"torch.nn was measured with torch {MEASURED_WITH}")
    found, expected = outcome(case, device), FAILURES.get(case.id, "")
    # The beginning of an error's text: what follows may hold addresses and sizes.
    assert found[:40] == expected[:40], f"{case.id}: got {found or 'no error'!r}, expected {expected or 'no error'!r}"


def test_the_record_names_cases_there_are() -> None:
    assert FAILURES.keys() <= {case.id for case in CASES}


def test_the_page_is_what_the_cases_say() -> None:
    assert PAGE.read_text() == page(MEASURED_WITH), "python -m tests.support --write"


def test_the_tests_that_the_page_names_exist() -> None:
    for where in MORE.values():
        file, _, name = where.partition("::")
        text = (Path(__file__).resolve().parents[1] / file).read_text()
        assert re.search(rf"^def {name}\(", text, re.M) if name else text, where
