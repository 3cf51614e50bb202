"""What is in the picture? A decoder spells it out, letter by letter: "four two".

    python examples/caption.py

The picture v reaches the decoder in two ways, which are tried alone and together: as its initial state tanh(W v), and
as a further term of the recurrence, the same in every step: h = tanh(W_x x + W_v v + W_h h), for which v stands beside
the letter in the input. Letters are said until the end token.

Data: the 1,797 digits of 8x8 pixels in the package scikit-learn (BSD licence; Alpaydin and Kaynak 1998), two of them
beside each other in a picture. A fifth of the digits is held out. What counts: captions that are exactly right.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
END = 0  # the decoder's first input and last output
ALPHABET = ["", *sorted(set("".join(NAMES) + " "))]


class Captioner(nn.Module):
    def __init__(self, library: Any, hidden: int, as_state: bool, as_term: bool) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Flatten(), nn.Linear(2 * 64, hidden), nn.ReLU())
        self.begin = nn.Linear(hidden, hidden) if as_state else None
        self.letters = nn.Embedding(len(ALPHABET), hidden)
        self.rnn = library.RNN(2 * hidden if as_term else hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, len(ALPHABET))
        self.as_term = as_term

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """pictures [B, 8, 16] -> v [B, H], and the first state"""
        v = self.look(pictures)
        return v, None if self.begin is None else self.begin(v).tanh()[None]

    def forward(self, letters: Tensor, state: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        """letters [B, T] -> logits of the ones after them [B, T, V], and the state"""
        x = self.letters(letters)
        if self.as_term:
            x = torch.cat([x, v[:, None].expand_as(x)], 2)
        output, state = self.rnn(x, state)
        return self.head(output), state


def pictures_of(digits: list[tuple[Tensor, int]], count: int) -> list[tuple[Tensor, str]]:
    """Two random digits beside each other [8, 16], and what they are."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(len(digits), (count, 2), generator=generator).tolist()
    return [
        (torch.cat([digits[i][0], digits[j][0]], 1), f"{NAMES[digits[i][1]]} {NAMES[digits[j][1]]}") for i, j in pairs
    ]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.options("caption", __doc__, pictures=10_000, epochs=8, batch=50, hidden=128, lr=2e-3)
    args = common.start(parser, argv, pictures=300, epochs=15, batch=20, hidden=32, lr=1e-2)
    train, test = (
        pictures_of(part, n) for part, n in zip(common.split(common.digits(), 0.2), (args.pictures, 500), strict=True)
    )

    def loss_of(model: Captioner, batch: list[Any]) -> Tensor:
        spelled = [[ALPHABET.index(letter) for letter in caption] for _, caption in batch]
        given, said = common.teacher_forcing(spelled, END)
        v, state = model.encode(torch.stack([picture for picture, _ in batch]).to(args.device))
        logits, _ = model(given.to(args.device), state, v)
        return F.cross_entropy(logits.flatten(0, 1), said.flatten().to(args.device))

    @torch.no_grad()
    def describe(model: Captioner, pictures: Tensor, temperature: float = 0.0) -> list[str]:
        v, state = model.encode(pictures)

        def step(letter: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            logits, state = model(letter[:, None], state, v)
            return logits[:, 0], state

        first = torch.full((len(pictures),), END, device=pictures.device)
        rows = common.generate(step, state, first, END, most=20, temperature=temperature)
        return ["".join(ALPHABET[i] for i in row) for row in rows]

    pictures, metrics = torch.stack([p for p, _ in test]).to(args.device), {}
    for name, ways in {"initial state": (True, False), "term": (False, True), "both": (True, True)}.items():
        common.seed(args)
        model = Captioner(args.library, args.hidden, *ways).to(args.device)
        common.fit(args, model, loss_of, train, name)
        said = describe(model, pictures)
        metrics[f"exact, {name}"] = sum(a == b for a, (_, b) in zip(said, test, strict=True)) / len(test)
    with common.plot(args, 2, 4, (10, 4)) as axes:
        for ax, picture, caption in zip(axes.flat, pictures, describe(model, pictures[:8], 0.5), strict=False):
            ax.imshow(picture.tolist(), cmap="gray_r")
            ax.set_title(caption)
            ax.set_axis_off()
    return common.finish(args, metrics)


if __name__ == "__main__":
    main()
