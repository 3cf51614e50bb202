"""How warm will it be in the next day? An LSTM reads hours of temperatures and says, after each, the 24 that follow.

    python examples/forecast.py

The network is trained on weeks that begin at midnight, in which it has to forecast from the first hour on, so that the
state which it begins with counts: it is learned (fastrnn's learn_initial_state), or zero. What counts is the mean
absolute error on two held-out months, by how many hours are looked ahead, beside two baselines: the last hour's
temperature (naive), and that of the same hour a day before (seasonal). The plot shows all of them.

Data: hourly temperatures in Seattle, 2010, of the package vega-datasets (MIT; the data are NOAA's, in the public
domain). They are as smooth as means over many years: a day before it was the same within a tenth of a degree, so that
the seasonal baseline is hard to beat.
"""

from __future__ import annotations

import csv
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import fastrnn

DAY, WEEK = 24, 7 * 24


class LSTMFromLearnedState(nn.LSTM):
    """What learn_initial_state=True is, of torch.nn's LSTM with one layer."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden, batch_first=True)
        self.h_0, self.c_0 = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        h, c = (state.expand(1, len(x), -1).contiguous() for state in (self.h_0, self.c_0))
        return super().forward(x, (h, c))


class Forecaster(nn.Module):
    def __init__(self, library: Any, hidden: int, learned: bool) -> None:
        super().__init__()
        if learned and library is not fastrnn:
            self.lstm: Any = LSTMFromLearnedState(1, hidden)
        else:
            self.lstm = library.LSTM(1, hidden, batch_first=True, **({"learn_initial_state": True} if learned else {}))
        self.head = nn.Linear(hidden, DAY)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T] -> what is to be added to each for the 24 values after it [B, T, 24]"""
        output, _ = self.lstm(x[..., None])
        return self.head(output)


def temperatures() -> Tensor:
    """Degrees Celsius of every hour [hours]"""
    with open(common.package_file("vega-datasets", "vega_datasets", "_data/seattle-temps.csv")) as file:
        return torch.tensor([(float(row["temp"]) - 32) / 1.8 for row in csv.DictReader(file)])


def pieces(hours: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """Weeks [N, 168] that begin every so many hours, and for each of their hours the 24 after it [N, 168, 24]"""
    longer = hours.unfold(0, WEEK + DAY, every)
    return longer[:, :WEEK], longer[:, 1:].unfold(1, DAY, 1)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.options("forecast", __doc__, epochs=60, every=24, batch=32, hidden=64, lr=1e-2)
    args = common.start(parser, argv, epochs=6, every=8, batch=16, hidden=16, lr=2e-2)
    hours = temperatures().to(args.device)
    cut = len(hours) * 10 // 12 // DAY * DAY  # a midnight
    mean, deviation = hours[:cut].mean(), hours[:cut].std()
    samples = list(zip(*pieces(hours[:cut], args.every), strict=True))
    x, after = pieces(hours[cut:], DAY)

    def forecast(model: Forecaster, x: Tensor) -> Tensor:
        return x[..., None] + deviation * model((x - mean) / deviation)

    def loss_of(model: Forecaster, batch: list[Any]) -> Tensor:
        x, after = (torch.stack(part) for part in zip(*batch, strict=True))
        return F.l1_loss(forecast(model, x), after)

    said = {}
    for name, learned in {"zero": False, "learned": True}.items():
        common.seed(args)
        model = Forecaster(args.library, args.hidden, learned).to(args.device)
        common.fit(args, model, loss_of, samples, f"{name} initial state")
        with torch.no_grad():
            said[name] = forecast(model, x)

    seen = DAY - 1  # the first hour with a whole day behind it, from which on the seasonal baseline can say something
    ways = {
        "LSTM": said["learned"][:, seen:],
        "naive": x[:, seen:, None],
        "seasonal": x.unfold(1, DAY, 1),  # of the 24 hours up to each, as which those after it are forecast
    }
    errors = {name: (way - after[:, seen:]).abs().mean((0, 1)).tolist() for name, way in ways.items()}
    metrics = {f"degrees, {h} h ahead, {name}": error[h - 1] for h in (1, 12) for name, error in errors.items()}
    for name, way in said.items():
        metrics[f"degrees, first 3 hours, {name} state"] = (way - after)[:, :3].abs().mean().item()
    with common.plot(args, 1, 2, (10, 4)) as (left, right):
        for name, error in errors.items():
            left.plot(range(1, DAY + 1), error, label=name)
        left.set(xlabel="hours ahead", ylabel="mean absolute error, degrees Celsius")
        right.plot(range(-DAY, DAY), torch.cat([x[0, -DAY:], after[0, -1]]).tolist(), color="black", label="measured")
        for name, way in ways.items():
            right.plot(range(DAY), way[0, -1].expand(DAY).tolist(), label=name)
        right.set(xlabel="hours", ylabel="degrees Celsius")
        left.legend()
        right.legend()
    return common.finish(args, metrics)


if __name__ == "__main__":
    main()
