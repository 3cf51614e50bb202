"""Who said it? Nine speakers of Japanese, told apart by two vowels: 7 to 29 steps of 12 coefficients each.

    python examples/vowels.py

Data: JapaneseVowels (Kudo, Toyama and Shimbo 1999), as the package aeon ships it (BSD licence), with its own division
into 270 utterances to train on and 370 to test. What counts is the accuracy on these.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import fastrnn

SPEAKERS, COEFFICIENTS = 9, 12


class Classifier(nn.Module):
    def __init__(self, library: Any, hidden: int) -> None:
        super().__init__()
        self.lstm = library.LSTM(COEFFICIENTS, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(2 * hidden, SPEAKERS))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x [B, T, 12], of which row b has lengths[b] steps -> logits [B, 9]"""
        output, _ = common.over_rows(self.lstm, x, lengths)
        return self.head(fastrnn.pool(output, lengths, "mean", batch_first=True))


def utterances(part: str) -> list[tuple[Tensor, int]]:
    """Coefficients [T, 12] and the speaker, 0 to 8, of the TRAIN or TEST part.

    A line of a .ts file has the twelve series of an utterance, with colons between them, and the speaker's number.
    """
    path = common.package_file("aeon", "aeon", f"datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts")
    _, _, lines = path.read_text(encoding="utf-8").partition("@data\n")
    found = []
    for line in lines.splitlines():
        *series, speaker = line.split(":")
        found.append((torch.tensor([[float(x) for x in one.split(",")] for one in series]).t(), int(speaker) - 1))
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.options("vowels", __doc__, epochs=60, batch=30, hidden=64, lr=3e-3)
    args = common.start(parser, argv, epochs=8, batch=10, hidden=16, lr=1e-2)

    def logits_of(model: Classifier, batch: list[Any]) -> tuple[Tensor, Tensor]:
        x, lengths = common.pad([x for x, _ in batch])
        return model(x.to(args.device), lengths), torch.tensor([speaker for _, speaker in batch], device=args.device)

    train, test = utterances("TRAIN"), utterances("TEST")
    model = Classifier(args.library, args.hidden).to(args.device)
    common.fit(args, model, lambda m, batch: F.cross_entropy(*logits_of(m, batch)), train)
    with torch.no_grad():
        logits, speakers = logits_of(model, test)
    counts = torch.zeros(SPEAKERS, SPEAKERS, dtype=torch.int64)  # of a speaker's utterances, taken for another's
    counts.index_put_((speakers.cpu(), logits.argmax(1).cpu()), torch.tensor(1), accumulate=True)
    with common.plot(args) as axes:
        axes.imshow(counts.tolist(), cmap="Blues")
        axes.set(xlabel="taken for speaker", ylabel="speaker")
        for i, row in enumerate(counts.tolist()):
            for j, count in enumerate(row):
                axes.text(j, i, count or "", ha="center", va="center")
    return common.finish(args, {"accuracy": (counts.trace() / len(test)).item()})


if __name__ == "__main__":
    main()
