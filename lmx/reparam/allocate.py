"""Which rank each matrix gets, under one budget for all of them.

A matrix has an error (`Decomposition.errors`) and a price by rank; the best ranks minimise the sum of errors for a sum
of prices, and `allocate` finds them by a price of error (a Lagrange multiplier), dense matrices among the choices.
Layers of equal ranks are stored and compiled as one stack, so neighbours are given equal ranks where more than
`max_stacks` would be needed: for each multiplier the best division of the layers into stacks is found exactly, by
dynamic programming.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lmx.core.errors import ConfigError
from lmx.reparam.decompose import Decomposition

Price = Callable[[tuple[int, int], int | None], float]  # of a matrix (m, n) at a rank, dense where that is None
Ranks = dict[str, int | None]  # by the name of a matrix; None keeps it dense


@dataclasses.dataclass(frozen=True)
class Curve:
    """The choices for one matrix, from the cheapest to dense: ranks (the last is None), prices and errors."""

    ranks: tuple[int | None, ...]
    prices: np.ndarray
    errors: np.ndarray


Run = Sequence[Mapping[str, Curve]]  # neighbours that may be stacked: the curves of each by name, equal but for errors


def default_grid(shape: tuple[int, int]) -> int:
    """Ranks are multiples of a power of two, about 1/32 of the largest."""
    return max(1, 2 ** round(math.log2(max(min(shape) / 32, 1))))


def curve(decomposition: Decomposition, price: Price, grid: int | None = None) -> Curve:
    """The choices for a matrix: ranks that are multiples of `grid` and cost less than it does dense, and dense."""
    shape = decomposition.shape
    step = default_grid(shape) if grid is None else grid
    if step < 1:
        raise ConfigError(f"grid must be at least 1, not {step}")
    dense, errors = price(shape, None), decomposition.errors
    ranks = [r for r in range(step, min(shape), step) if price(shape, r) < dense] or [1]
    prices = [*(price(shape, r) for r in ranks), dense]
    return Curve((*ranks, None), np.array(prices, float), np.append(errors[ranks], 0.0))


def allocate(towers: Sequence[Sequence[Run]], budget: float, max_stacks: int = 8) -> list[list[list[Ranks]]]:
    """The ranks of every matrix: for each tower, run and neighbour in it, a rank by name.

    towers: each the runs of one tower, in order; a run's neighbours may share a stack, and a tower has at most
    max_stacks (or as many as it has runs). budget: the sum of prices that may be reached. Raises ConfigError for a
    budget that even the lowest ranks exceed.
    """
    plans = [_Tower(runs, max_stacks) for runs in towers if runs]
    least = sum(plan.least for plan in plans)
    if budget < least:
        dense = sum(plan.dense for plan in plans)
        raise ConfigError(
            f"a budget of {budget:.6g} is impossible: with the lowest ranks these matrices take {least:.6g}, "
            f"{least / dense:.1%} of dense; keep at least that share, use a finer grid, or select fewer matrices"
        )
    low, high = 0.0, max(sum(plan.worst for plan in plans), 1e-30) / max(budget, 1e-30)
    divided = [plan.divide(low) for plan in plans]
    if _price(divided) > budget:
        while _price([plan.divide(high) for plan in plans]) > budget:
            high *= 10
        for _ in range(60):
            middle = math.sqrt(low * high) if low else high / 1e3 if high > 1e-280 else 0.0
            tried = [plan.divide(middle) for plan in plans]
            low, high = (middle, high) if _price(tried) > budget else (low, middle)
        divided = [plan.divide(high) for plan in plans]
    _spend([segment for segments in divided for segment in segments], budget - _price(divided))
    chosen = iter([segments for segments in divided])
    return [_spread(runs, next(chosen)) if runs else [] for runs in towers]


@dataclasses.dataclass
class _Segment:
    """Neighbours that share a stack: how many, in which run, and for each name the choice and its curve, summed."""

    run: int
    size: int
    curves: dict[str, Curve]
    choice: dict[str, int]

    @property
    def price(self) -> float:
        return sum(self.curves[name].prices[i] for name, i in self.choice.items())


def _price(divided: list[list[_Segment]]) -> float:
    return sum(segment.price for segments in divided for segment in segments)


class _Tower:
    """The runs of one tower, with what every division of them costs at a multiplier."""

    def __init__(self, runs: Sequence[Run], max_stacks: int) -> None:
        self.runs, self.most = runs, max(max_stacks, len(runs))
        self.sums = [  # by run and name: (neighbours + 1, choices), the errors of all before
            {n: np.cumsum([np.zeros_like(run[0][n].errors), *(one[n].errors for one in run)], axis=0) for n in run[0]}
            for run in runs
        ]
        every = [c for run in runs for one in run for c in one.values()]
        self.least, self.dense = sum(c.prices.min() for c in every), sum(c.prices[-1] for c in every)
        self.worst = sum(c.errors[0] for c in every)

    def divide(self, multiplier: float) -> list[_Segment]:
        """The best division into segments, and the best choices in each, at a price of error."""
        size = sum(len(run) for run in self.runs)
        value = np.full((size + 1, size + 1), np.inf)  # of the segment from i to j
        first = 0
        for run, sums in zip(self.runs, self.sums, strict=True):
            i, j = np.triu_indices(len(run) + 1, 1)
            total = np.zeros(len(i))
            for name, errors in sums.items():
                paid = multiplier * (j - i)[:, None] * run[0][name].prices
                total += (errors[j] - errors[i] + paid).min(1)
            value[first + i, first + j] = total
            first += len(run)
        best, before = np.full(size + 1, np.inf), []
        best[0] = 0.0
        ends = None
        for _ in range(min(self.most, size)):
            through = best[:, None] + value
            before.append(through.argmin(0))
            best = through.min(0)
            if ends is None or best[size] < ends[0] * (1 - 1e-12):
                ends = (best[size], len(before))
        cuts = [size]
        for step in reversed(before[: ends[1]]):
            cuts.append(int(step[cuts[-1]]))
        return [self._segment(a, b, multiplier) for a, b in zip(cuts[::-1], cuts[::-1][1:], strict=False)]

    def _segment(self, begin: int, end: int, multiplier: float) -> _Segment:
        run = 0
        while begin >= len(self.runs[run]):
            begin, end, run = begin - len(self.runs[run]), end - len(self.runs[run]), run + 1
        curves = {
            name: Curve(one.ranks, (end - begin) * one.prices, self.sums[run][name][end] - self.sums[run][name][begin])
            for name, one in self.runs[run][0].items()
        }
        choice = {name: int(np.argmin(c.errors + multiplier * c.prices)) for name, c in curves.items()}
        return _Segment(run, end - begin, curves, choice)


def _spend(segments: list[_Segment], left: float) -> None:
    """Raise ranks for what is left of the budget, the largest gain for its price first."""
    while True:
        gains = []
        for segment in segments:
            for name, at in segment.choice.items():
                c = segment.curves[name]
                more, gain = c.prices - c.prices[at], c.errors[at] - c.errors
                for i in np.flatnonzero((more <= left) & (more > 0) & (gain > 0)):
                    gains.append((gain[i] / more[i], more[i], int(i), name, segment))
        if not gains:
            return
        _, paid, i, name, segment = max(gains, key=lambda one: one[0])
        segment.choice[name] = i
        left -= paid


def _spread(runs: Sequence[Run], segments: list[_Segment]) -> list[list[Ranks]]:
    """The segments' choices for each neighbour of each run."""
    spread: list[list[Ranks]] = [[] for _ in runs]
    for segment in segments:
        ranks = {name: segment.curves[name].ranks[i] for name, i in segment.choice.items()}
        spread[segment.run].extend([ranks] * segment.size)
    return spread
