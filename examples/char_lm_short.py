"""A character language model in few lines: an LSTM learns what comes next in a text, and then writes some itself.

    python examples/char_lm_short.py                      # learns Python from the standard library's source
    python examples/char_lm_short.py --shakespeare        # his plays, of the package shakespeare (public domain)
    python examples/char_lm_short.py --text FILE          # or any text

What counts: bits per character, the cross-entropy of the next character, on the last 5% of the text. char_lm.py is the
same with checkpoints, both backends compared, and every number an option.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import common
import fastrnn
from char_lm import read_text


class CharLM(nn.Module):
    def __init__(self, library: Any, symbols: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden)
        self.lstm = library.LSTM(hidden, hidden)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """characters [T, B] -> logits of the ones after them [T, B, V], and the state"""
        output, state = self.lstm(self.embedding(ids), state)
        return self.head(output), state


def shakespeare() -> str:
    """All of his plays and sonnets."""
    folder = common.package_file("shakespeare", "shksprdata", "texts")
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*_gut.txt")))


def bits(model: CharLM, piece: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Per character, over all steps of a piece [T+1, B], of which each character is to be told from those before."""
    logits, state = model(piece[:-1], state)
    return F.cross_entropy(logits.flatten(0, 1), piece[1:].flatten()) / math.log(2), state


def write(args: Any, model: CharLM, alphabet: list[str], temperature: float) -> str:
    """200 characters behind --prime, drawn at the temperature, at 0 the likeliest ones."""

    def step(last: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = model(last[None], state)
        return logits[0], state

    prime = torch.tensor([alphabet.index(c) for c in args.prime], device=args.device)[:, None]
    with torch.no_grad():
        _, state = model(prime[:-1], None) if len(prime) > 1 else (None, None)
        (written,) = common.generate(step, state, prime[-1], end=-1, most=200, temperature=temperature)
    return f"temperature {temperature:g}: {args.prime}{''.join(alphabet[i] for i in written)}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.options(
        "char_lm_short", __doc__, chars=2_000_000, steps=600, batch=32, seq_len=64, hidden=192, lr=4e-3
    )
    parser.add_argument("--text", type=Path, help="a UTF-8 text (default: Python's own library)")
    parser.add_argument("--shakespeare", action="store_true", help="his plays")
    parser.add_argument("--prime", default="def ", help="what is written on (default: %(default)r)")
    args = common.start(parser, argv, steps=150, batch=8, seq_len=16, hidden=32, lr=1e-2)
    text = shakespeare()[: args.chars] if args.shakespeare else read_text(args.text, args.chars)
    alphabet = sorted(set(text + args.prime))
    number = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([number[character] for character in text], device=args.device)
    cut = int(len(ids) * 0.95)
    train, test = common.streams(ids[:cut], args.batch), ids[cut:, None]
    model = CharLM(args.library, len(alphabet), args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    state, position, begin = None, 0, time.perf_counter()
    for _ in tqdm(range(args.steps), unit="piece", disable=None):
        if position + args.seq_len >= len(train):  # the text begins again
            position, state = 0, None
        piece = train[position : position + args.seq_len + 1]
        loss, state = bits(model, piece, fastrnn.detach(state))  # the state goes on, its history does not
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        args.losses.append(loss.item())
        position += args.seq_len
    args.seconds = time.perf_counter() - begin
    with torch.no_grad():
        metrics = {"bits per character": bits(model, test, None)[0].item()}
    samples = "\n\n".join(write(args, model, alphabet, temperature) for temperature in (0, 0.7))
    return common.finish(args, metrics, samples)


if __name__ == "__main__":
    main()
