"""Figures of samples: percentiles, paired ratios with their intervals, and tests of two results. No NumPy needed."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist, median

__all__ = ["histogram", "holm", "mann_whitney", "median_interval", "percentile", "quantile_ratio",
           "relative_difference"]

DRAWS = 400
SIGNIFICANT_BITS = 8  # of a histogram's values: within 0.4 %


def percentile(ordered: Sequence[float], p: float) -> float:
    """The value that p percent do not exceed (nearest rank). `ordered`: not empty."""
    return ordered[min(max(math.ceil(len(ordered) * p / 100) - 1, 0), len(ordered) - 1)]


def histogram(samples: Sequence[int]) -> list[list[int]]:
    """[[ns, count], ...], ascending: the values' first 8 bits."""
    shifts = ((ns, max(ns.bit_length() - SIGNIFICANT_BITS, 0)) for ns in samples)
    return [[ns, count] for ns, count in sorted(Counter(ns >> shift << shift for ns, shift in shifts).items())]


def median_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """The median, and between which two of the values the true one lies, at 95 %.

    By order statistics: the binomial distribution, and nothing assumed of the values. None: fewer than six do not tell.
    """
    if len(values) < 6:
        return None
    ordered, n = sorted(values), len(values)
    below, rank = 0.0, 0  # the chance that fewer than `rank` + 1 of n lie below the median
    while (below := below + math.exp(math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1)
                                     - n * math.log(2))) <= 0.025:
        rank += 1
    low = max(rank - 1, 0)
    return median(ordered), ordered[low], ordered[n - 1 - low]


def quantile_ratio(
    rounds: Sequence[tuple[Sequence[int], Sequence[int]]], p: float
) -> tuple[float, float, float] | None:
    """The ratio of two percentiles over all rounds, (own, control) each, and what 95 of 100 resamplings give.

    A round's own and control are drawn together. None: fewer than six rounds.
    """
    if len(rounds) < 6:
        return None
    sides = []
    for side in (0, 1):
        sides.append(sorted(((ns, i) for i, pair in enumerate(rounds) for ns in pair[side]), reverse=True))
    sizes = [[len(pair[side]) for pair in rounds] for side in (0, 1)]

    def at(side: int, weights: Sequence[int]) -> float:
        """From the top: only the tail is walked through."""
        left = (1 - p / 100) * sum(size * weight for size, weight in zip(sizes[side], weights, strict=True))
        for ns, i in sides[side]:
            left -= weights[i]
            if left < 0:
                return ns or 1
        return sides[side][-1][0] or 1

    generator, n = random.Random(0), len(rounds)
    ratios = []
    for _ in range(DRAWS):
        drawn = Counter(generator.choices(range(n), k=n))
        weights = [drawn[i] for i in range(n)]
        ratios.append(at(0, weights) / at(1, weights))
    ratios.sort()
    return at(0, [1] * n) / at(1, [1] * n), percentile(ratios, 2.5), percentile(ratios, 97.5)


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """-> (p, Cliff's delta).

    p: how likely two samples of one distribution differ so much (two-sided, the normal approximation with ties). delta:
    how much more often b's values exceed a's than the other way, -1 to 1.
    """
    ordered = sorted([(value, 0) for value in a] + [(value, 1) for value in b])
    n, m, total = len(a), len(b), len(a) + len(b)
    ranks, ties, i = 0.0, 0, 0
    while i < total:
        j = i
        while j < total and ordered[j][0] == ordered[i][0]:
            j += 1
        ranks += (i + j + 1) / 2 * sum(side for _, side in ordered[i:j])
        ties += (j - i) ** 3 - (j - i)
        i = j
    u = ranks - m * (m + 1) / 2
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    delta = 2 * u / (n * m) - 1
    if variance <= 0:
        return 1.0, delta
    z = max(abs(u - n * m / 2) - 0.5, 0) / math.sqrt(variance)
    return min(2 * (1 - NormalDist().cdf(z)), 1.0), delta


def relative_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """By how much b's median exceeds a's, as a share of a's, and what 95 of 100 resamplings of both give."""
    generator = random.Random(0)
    differences = sorted(
        median(generator.choices(b, k=len(b))) / median(generator.choices(a, k=len(a))) - 1 for _ in range(DRAWS)
    )
    return median(b) / median(a) - 1, percentile(differences, 2.5), percentile(differences, 97.5)


def holm(chances: Sequence[float]) -> list[float]:
    """The same, corrected for how many there are (Holm): at 0.05 all of them together are wrong 5 times in 100."""
    corrected, highest = [0.0] * len(chances), 0.0
    for place, i in enumerate(sorted(range(len(chances)), key=lambda i: chances[i])):
        highest = max(highest, min(chances[i] * (len(chances) - place), 1.0))
        corrected[i] = highest
    return corrected
