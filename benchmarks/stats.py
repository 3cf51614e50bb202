"""Statistics of a paired comparison. No distribution is assumed: medians, order statistics, quartiles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Median of `count` values with an interval that holds the true median with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float
    count: int

    @property
    def relative_width(self) -> float:
        return (self.high - self.low) / self.median


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one side's samples, in the samples' unit."""

    median: float
    q1: float
    q3: float


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The narrowest symmetric pair of order statistics that covers the median with `confidence`.

    The k-th smallest and k-th largest of n values hold the median between them unless fewer than k of
    the n fair coins fall on one side: coverage = 1 - 2 P(Binomial(n, 1/2) < k). With n < 6 even the
    extremes (k = 1) cover less than 0.95; `coverage` then says how much.
    """
    ordered = sorted(values)
    n = len(ordered)
    if n == 0:
        raise ValueError("median_interval: no values")

    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, j) for j in range(k)) / 2**n

    k = 1
    while k + 1 <= (n + 1) // 2 and coverage(k + 1) >= confidence:
        k += 1
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[n - k], max(coverage(k), 0.0), n)


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3)


def pair_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """theirs / ours, pair by pair: above 1 we are faster."""
    return [b / a for a, b in zip(ours, theirs, strict=True)]


def verdict(ratio: Interval, tie: float) -> str:
    """'win', 'loss' or 'tie'. A tie: the interval holds 1, or the gap is under `tie` (0.2 = 20%)."""
    if ratio.low <= 1 <= ratio.high or 1 / (1 + tie) < ratio.median < 1 + tie:
        return "tie"
    return "win" if ratio.median > 1 else "loss"


def is_noisy(ratio: Interval, noisy: float, confidence: float = 0.95) -> bool:
    """The interval is wider than `noisy` times the median, or there were too few pairs to make one."""
    return ratio.relative_width > noisy or ratio.coverage < confidence


def geometric_mean(values: Sequence[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None
