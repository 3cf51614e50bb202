"""A character language model in few lines: an LSTM learns what comes next in a text, and then writes some itself.

    python examples/char_lm_short.py                      # learns Python from the standard library's source
    python examples/char_lm_short.py --shakespeare        # his plays, of the package shakespeare (public domain)
    python examples/char_lm_short.py --text FILE          # or any text

What counts: bits per character, the cross-entropy of the next one, on the last 5% of the text.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def bits(model: CharLM, piece: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Per character, over a piece [T+1, B], of which each character is to be told from those before; and the state."""
    logits, state = model(piece[:-1], state)
    return F.cross_entropy(logits.flatten(0, 1), piece[1:].flatten()) / math.log(2), state


def losses(args: Any, model: CharLM, text: Tensor) -> Iterator[Tensor]:
    """Of one piece of the text [.., B] after another: the state goes on, its history does not."""
    state, pieces = None, len(text) // args.seq_len or 1
    for step in range(args.steps):
        start = step % pieces * args.seq_len
        state = fastrnn.detach(state) if start else None
        loss, state = bits(model, text[start : start + args.seq_len + 1], state)
        yield loss


@torch.no_grad()
def write(args: Any, model: CharLM, alphabet: list[str], temperature: float) -> str:
    """Goes on from --prime: each character is drawn, more boldly at a higher temperature, and is read as the next."""
    text, state, ids = args.prime, None, torch.tensor([[alphabet.index(c)] for c in args.prime], device=args.device)
    for _ in range(200):
        logits, state = model(ids, state)
        ids = (logits[-1] / temperature).softmax(-1).multinomial(1)
        text += alphabet[int(ids)]
    return f"temperature {temperature:g}: {text}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    numbers = dict(chars=2_000_000, steps=600, batch=32, seq_len=64, hidden=192, lr=4e-3)
    parser = common.options("char_lm_short", __doc__, **numbers)
    parser.add_argument("--text", type=Path, help="a UTF-8 text (default: Python's own library)")
    parser.add_argument("--shakespeare", action="store_true", help="his plays")
    parser.add_argument("--prime", default="def ", help="what is written on (default: %(default)r)")
    args = common.start(parser, argv, steps=150, batch=8, seq_len=16, hidden=32, lr=1e-2)
    text = common.shakespeare()[: args.chars] if args.shakespeare else read_text(args.text, args.chars)
    alphabet = sorted(set(text + args.prime))
    number = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([number[character] for character in text], device=args.device)
    cut = int(len(ids) * 0.95)
    model = CharLM(args.library, len(alphabet), args.hidden).to(args.device)
    common.descend(args, model, losses(args, model, common.streams(ids[:cut], args.batch)), args.steps)
    with torch.no_grad():
        metrics = {"bits per character": bits(model, ids[cut:, None], None)[0].item()}
    return common.finish(args, metrics, "\n\n".join(write(args, model, alphabet, t) for t in (0.3, 0.7)))


if __name__ == "__main__":
    main()
