"""How far back does a network remember? Elman networks (tanh; relu that begin as the identity, IRNN), LSTM and GRU.

    python examples/long_memory.py

Two tasks of Le, Jaitly and Hinton (2015). In the adding problem the two numbers that are marked in a long sequence are
to be added; who always answers 1 has a squared error of 1/6. Or a digit is read pixel by pixel. What counts: that
error, and the accuracy on held-out digits.

The plot shows the norm of the gradient of a loss at the last step, by the state at a distance from it, before training:
it vanishes with tanh, and explodes with relu and recurrent weights a little above the identity, where clipping it in
every step (fastrnn's grad_clip, here by hand on both backends) bounds it. The IRNN keeps it. So does an LSTM as far as
its forget gate is open, for which that gate's bias is to be high; a GRU's update gate is half open at first.

Data: random numbers, and the 1,797 digits of 8x8 pixels in the package scikit-learn (BSD licence; Alpaydin and Kaynak
1998).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

KINDS = ("tanh", "IRNN", "LSTM", "GRU")
# Of the plot: name -> kind, factor of the recurrent weights, an LSTM's forget bias, clipping of the state's gradient.
SHOWN: dict[str, tuple[str, float, float, float | None]] = {
    "tanh": ("tanh", 1, 1, None),
    "relu, 1.1 I": ("IRNN", 1.1, 1, None),
    "relu, 1.1 I, clipped": ("IRNN", 1.1, 1, 0.01),
    "relu, I: IRNN": ("IRNN", 1, 1, None),
    "LSTM, forget bias 1": ("LSTM", 1, 1, None),
    "LSTM, forget bias 5": ("LSTM", 1, 5, None),
    "GRU": ("GRU", 1, 1, None),
}


class Reader(nn.Module):
    """A recurrent network that answers behind the last step."""

    def __init__(self, library: Any, kind: str, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        if kind in ("LSTM", "GRU"):
            self.rnn = getattr(library, kind)(inputs, hidden, batch_first=True)
        else:
            nonlinearity = "tanh" if kind == "tanh" else "relu"
            self.rnn = library.RNN(inputs, hidden, nonlinearity=nonlinearity, batch_first=True)
        if kind == "LSTM":  # fastrnn: forget_bias=1.0
            nn.init.ones_(self.rnn.bias_ih_l0[hidden : 2 * hidden])
        if kind == "IRNN":  # fastrnn: init="identity"
            nn.init.eye_(self.rnn.weight_hh_l0)
            nn.init.zeros_(self.rnn.bias_ih_l0)
            nn.init.zeros_(self.rnn.bias_hh_l0)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, I] -> [B, outputs]"""
        return self.head(self.rnn(x)[0][:, -1])


def adding(count: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Numbers from 0 to 1 and marks at two of them, one in either half, [T, 2]; their sum [1]."""
    generator = torch.Generator().manual_seed(0)
    numbers, half = torch.rand(count, steps, generator=generator), steps // 2
    first = torch.randint(half, (count,), generator=generator)
    second = torch.randint(half, steps, (count,), generator=generator)
    marks = F.one_hot(first, steps) + F.one_hot(second, steps)
    return list(zip(torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True), strict=True))


def gradient_norms(model: Reader, x: Tensor, target: Tensor, clip: float | None = None) -> list[float]:
    """Of the squared error behind x [B, T, I], by the state after each step, from the last step to the first.

    `clip` clamps the gradient of each state, which goes on to the state before it. An LSTM's state is h and c.
    """

    def handed_on(part: Tensor) -> Tensor:
        passed = part * 1
        if clip is not None:
            passed.register_hook(lambda grad: grad.clamp(-clip, clip))
        return passed

    state, states = None, []
    for step in x.split(1, 1):
        _, state = model.rnn(step, state)
        parts = state if isinstance(state, tuple) else (state,)
        passed = tuple(handed_on(part) for part in parts)
        state = passed if isinstance(state, tuple) else passed[0]
        states.append(parts)
    loss = F.mse_loss(model.head(passed[0][0]), target)
    grads = torch.autograd.grad(loss, [part for parts in states for part in parts], materialize_grads=True)
    squares = torch.stack([grad.square().sum() for grad in grads]).view(len(states), -1).sum(1)
    return squares.sqrt().flip(0).tolist()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.options("long_memory", __doc__, steps=40, count=40_000, epochs=2, batch=100, hidden=64, lr=5e-3)
    parser.add_argument("--digit-epochs", type=common.number(int, 1), default=30, help="(default: %(default)s)")
    args = common.start(parser, argv, steps=8, count=1_000, epochs=8, digit_epochs=10, batch=20, hidden=24, lr=1e-2)
    sums = adding(args.count + 1000, args.steps)
    digits = [(picture.view(-1, 1), torch.tensor(digit)) for picture, digit in common.digits()]

    def batch_of(samples: list[Any]) -> tuple[Tensor, Tensor]:
        x, target = zip(*samples, strict=True)
        return torch.stack(x).to(args.device), torch.stack(target).to(args.device)

    def error(model: Reader, samples: list[Any]) -> Tensor:
        x, target = batch_of(samples)
        return F.mse_loss(model(x), target)

    def cross_entropy(model: Reader, samples: list[Any]) -> Tensor:
        x, target = batch_of(samples)
        return F.cross_entropy(model(x), target)

    metrics, curves = {}, {}
    for kind in KINDS:
        common.seed(args)
        model = Reader(args.library, kind, 2, args.hidden, 1).to(args.device)
        curves[kind] = common.fit(args, model, error, sums[:-1000], f"adding, {kind}")
        with torch.no_grad():
            metrics[f"adding, squared error, {kind}"] = error(model, sums[-1000:]).item()
    train, test = common.split(digits, 0.2)
    for kind in KINDS:
        common.seed(args)
        model = Reader(args.library, kind, 1, args.hidden, 10).to(args.device)
        common.fit(args, model, cross_entropy, train, f"digits, {kind}", epochs=args.digit_epochs)
        with torch.no_grad():
            x, digit = batch_of(test)
            metrics[f"digits, accuracy, {kind}"] = (model(x).argmax(1) == digit).float().mean().item()

    with common.plot(args, 1, 2, (11, 4)) as (left, right):
        for kind, curve in curves.items():
            left.plot(curve, label=kind, linewidth=0.8)
        left.axhline(1 / 6, color="gray", linestyle=":", label="always 1")
        left.set(xlabel="batch", ylabel="squared error", yscale="log", title=f"adding problem, {args.steps} steps")
        x, target = batch_of(adding(100, 100))
        for name, (kind, factor, forget_bias, clip) in SHOWN.items():
            common.seed(args)
            model = Reader(args.library, kind, 2, args.hidden, 1)
            with torch.no_grad():
                model.rnn.weight_hh_l0.mul_(factor)
                if kind == "LSTM":
                    model.rnn.bias_ih_l0[args.hidden : 2 * args.hidden] = forget_bias
            right.plot(gradient_norms(model.to(args.device), x, target, clip), label=name)
        right.set(xlabel="steps before the last", ylabel="norm of the gradient", yscale="log", title="before training")
        left.legend()
        right.legend()
    return common.finish(args, metrics)


if __name__ == "__main__":
    main()
