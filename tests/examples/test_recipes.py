"""Every snippet of docs/recipes.md runs, on its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
TEXT = PAGE.read_text()
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TITLES = (
    "Truncated backpropagation through time",
    "Sentiment: one vector for a sentence",
    "Reinforcement learning: episodes that end inside a sequence",
    "Encoder and decoder: the state handed over",
    "Streaming",
    "Every sequence stops by itself",
    "A learned initial state",
    "A regularised language model",
    "Nested tensors",
    "What a model costs",
    "The gradient of every sample, private training",
)


@pytest.mark.parametrize(
    "snippet", list(SNIPPET.finditer(TEXT)), ids=lambda m: f"line-{TEXT.count(chr(10), 0, m.start()) + 1}"
)
def test_snippet(snippet: re.Match[str]) -> None:
    lines_before = TEXT.count("\n", 0, snippet.start(1))
    code = compile("\n" * lines_before + snippet[1], str(PAGE), "exec")  # errors name the page's own line
    exec(code, {})


def test_every_recipe_has_a_snippet() -> None:
    parts = HEADING.split(TEXT)[1:]
    assert tuple(parts[::2]) == TITLES
    assert all(SNIPPET.search(part) for part in parts[1::2])
    assert TEXT.count("```") == 2 * len(SNIPPET.findall(TEXT))  # no block of another kind, which nothing would run
