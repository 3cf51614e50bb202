"""Every snippet of Python on the pages runs, on its own, with what its page takes for given."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import fastrnn
from tests.weights.test_weights import keras_arrays, keras_layer, onnx_case

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(page for folder in (".", "docs", "benchmarks") for page in (ROOT / folder).glob("*.md"))
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = {"docs/architecture.md"}  # test_architecture.py
RECIPES = (ROOT / "docs/recipes.md").read_text()
TITLES = (
    "Truncated backpropagation through time",
    "Sentiment: one vector for a sentence",
    "Reinforcement learning: episodes that end inside a sequence",
    "Encoder and decoder: the state handed over",
    "Streaming",
    "Every sequence stops by itself",
    "A learned initial state",
    "A regularised language model",
    "Training for narrow weights",
    "Nested tensors",
    "What a model costs",
    "The gradient of every sample, private training",
    "Threads and processes",
)


def snippets() -> list[Any]:
    """(page, text from its beginning on, number of the snippet) of each."""
    found = []
    for page in PAGES:
        name, text = str(page.relative_to(ROOT)), page.read_text()
        for number, snippet in enumerate(SNIPPET.finditer(text) if name not in ELSEWHERE else ()):
            lines_before = text.count("\n", 0, snippet.start(1))  # errors name the page's own line
            found.append(pytest.param(name, number, "\n" * lines_before + snippet[1], id=f"{name}-{lines_before}"))
    return found


def a_model(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    class SomePackage:
        def build(self) -> torch.nn.Module:
            return torch.nn.LSTM(4, 8)

    return dict(torch=torch, copy=copy, fastrnn=fastrnn, model=torch.nn.LSTM(4, 8), SomePackage=SomePackage)


def weights_of_others(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A layer of Keras and a model of ONNX, as far as they are read; tests/optional has the packages themselves."""
    layer = keras_layer("LSTM", keras_arrays("LSTM", 4))
    layer.set_weights = mock.Mock()
    node, arrays = onnx_case("LSTM")
    initializers = [SimpleNamespace(name=name, raw_data=array) for name, array in arrays.items()]
    onnx = mock.MagicMock()
    onnx.numpy_helper.to_array = lambda x: x.raw_data
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    return dict(
        fastrnn=fastrnn,
        keras_model=SimpleNamespace(layers=[None, layer]),
        layer=layer,
        node=node,
        model=SimpleNamespace(graph=SimpleNamespace(initializer=initializers)),
        onnx=onnx,
    )


GIVEN = {("docs/existing-models.md", 0): a_model, ("docs/existing-models.md", 1): weights_of_others}


@pytest.mark.parametrize(("page", "number", "code"), snippets())
def test_snippet(page: str, number: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = GIVEN.get((page, number))
    exec(compile(code, str(ROOT / page), "exec"), given(monkeypatch) if given else {})


def test_no_snippet_is_overlooked() -> None:
    """Python is marked as what it is, in one way; recipes are nothing else."""
    marks = {mark for page in PAGES for mark in re.findall(r"^ *(?:```|~~~)(.*)", page.read_text(), re.MULTILINE)}
    assert marks == {"", "python", "cpp"}
    assert RECIPES.count("```") == 2 * len(SNIPPET.findall(RECIPES))


def test_every_recipe_has_a_snippet() -> None:
    parts = re.split(r"^## (.+)$", RECIPES, flags=re.MULTILINE)[1:]
    assert tuple(parts[::2]) == TITLES
    assert all(SNIPPET.search(part) for part in parts[1::2])
