"""How sure a score is: bootstrap intervals, and the exact test of paired answers.

Legend: S runs (seeds), N questions, U patterns, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 4000
"""Bootstrap samples; the ends of an interval then move by some thousandths of its width from seed to seed."""

LEVEL = 0.95
"""Share of the resamples between the ends of an interval."""

_SEED = 20250918
_Z = 1.959963984540054  # of the normal distribution, for LEVEL


@dataclass(frozen=True)
class Estimate:
    """A mean and how far it is sure.

    Attributes:
        value: the mean.
        low, high: ends of its 95 % interval.
        n: questions it is over.
    """

    value: float
    low: float
    high: float
    n: int

    def as_json(self, name: str) -> dict[str, Any]:
        """The form of `scores.json`: `name`, `interval` and `n`."""
        return {name: self.value, "interval": [self.low, self.high], "n": self.n}


def mean_interval(values_SN: np.ndarray, lowest: float = 0.0) -> Estimate | None:
    """The mean over questions and runs with its percentile bootstrap interval (Efron & Tibshirani, 1993, chapter 13).

    Questions are drawn anew with replacement, and so are runs where there are several: what is said holds for other
    questions of the kind and for other seeds. All runs answer the same questions. As all that counts of a question is
    what it has in each run, resampling is drawing from the multinomial distribution of these patterns: exact, and quick
    for any number of questions.

    Args:
        values_SN: one row a run, one column a question; for one run, `[N]` will do. 0 or 1 for accuracy, -1, 0 or 1
            for the difference of two.
        lowest: the least that a value can be; the most is 1.

    Returns:
        None without questions. Where all values are the same the bootstrap has no width; the interval is then as wide
        as Wilson's (1927) for a share of which nothing was seen among as many questions.
    """
    values_SN = np.atleast_2d(np.asarray(values_SN, float))
    runs, n = values_SN.shape
    if n == 0:
        return None
    mean = float(values_SN.mean())
    if np.all(values_SN == values_SN[0, 0]):
        width = _Z**2 / (n + _Z**2)
        return Estimate(mean, max(lowest, mean - width), min(1.0, mean + width), n)
    rng = np.random.default_rng(_SEED)
    patterns_US, counts_U = np.unique(values_SN.T, axis=0, return_counts=True)
    means_BS = rng.multinomial(n, counts_U / n, size=RESAMPLES) @ patterns_US / n
    if runs > 1:
        drawn_BS = rng.integers(runs, size=(RESAMPLES, runs))
        means_BS = np.take_along_axis(means_BS, drawn_BS, axis=1)
    low, high = np.quantile(means_BS.mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), n)


def mcnemar(gained: int, forgotten: int) -> float:
    """Two-sided exact p-value of McNemar's test (1947): whether two models that answered the same questions differ.

    Under the null hypothesis a question that one alone has right is as likely one's as the other's:
    p = 2 P(X <= min(gained, forgotten)), X ~ Binomial(gained + forgotten, 1/2), at most 1.

    Args:
        gained: questions that the second alone has right.
        forgotten: those that the first alone has right.
    """
    n, k = gained + forgotten, min(gained, forgotten)
    log_all = math.lgamma(n + 1) - n * math.log(2)
    below = math.fsum(math.exp(log_all - math.lgamma(i + 1) - math.lgamma(n - i + 1)) for i in range(k + 1))
    return min(1.0, 2 * below)


def paired(base: Mapping[str, bool], student: Mapping[str, bool]) -> dict[str, Any] | None:
    """Student beside base on the questions that both answered.

    Args:
        base, student: whether each question's answer is right, by sample id.

    Returns:
        `n`, `difference` (student minus base, as a share), its `interval`, `gained` (right now, wrong before),
        `forgotten` (the reverse) and `p_value`; None where they have no question in common.
    """
    common = [name for name in base if name in student]
    gains = np.array([int(student[name]) - int(base[name]) for name in common])
    estimate = mean_interval(gains, lowest=-1.0)
    if estimate is None:
        return None
    gained, forgotten = int((gains > 0).sum()), int((gains < 0).sum())
    counts = {"gained": gained, "forgotten": forgotten, "p_value": mcnemar(gained, forgotten)}
    return estimate.as_json("difference") | counts
