import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core.errors import ConfigError
from lmx.reparam.allocate import Curve, _Tower, allocate, curve
from lmx.reparam.decompose import decompose
from lmx.reparam.prices import numbers


def drawn(rng: np.random.Generator, layers: int, names: int = 2, choices: int = 3) -> list[dict[str, Curve]]:
    """Neighbours: prices are alike by name, errors fall with the rank and end at zero."""
    prices = {str(i): np.sort(rng.uniform(1, 10, choices)) for i in range(names)}
    ranks = (*range(1, choices), None)
    fall = lambda: np.append(np.sort(rng.uniform(1, 100, choices - 1))[::-1], 0)  # noqa: E731
    return [{name: Curve(ranks, price, fall()) for name, price in prices.items()} for _ in range(layers)]


def spent(towers, ranks) -> tuple[float, float]:
    """(price, error) of an allocation."""
    total = np.zeros(2)
    for tower, chosen in zip(towers, ranks, strict=True):
        for run, got in zip(tower, chosen, strict=True):
            for curves, by_name in zip(run, got, strict=True):
                for name, rank in by_name.items():
                    i = curves[name].ranks.index(rank)
                    total += curves[name].prices[i], curves[name].errors[i]
    return tuple(total)


def divisions(run_sizes: list[int], most: int):
    """Every way to cut runs into at most so many segments."""
    each = [
        [
            [b - a for a, b in itertools.pairwise((0, *cuts, n))]
            for k in range(n)
            for cuts in itertools.combinations(range(1, n), k)
        ]
        for n in run_sizes
    ]
    return (cut for cut in itertools.product(*each) if sum(map(len, cut)) <= most)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [2, 3, 5])
def test_a_division_is_the_best_of_all(seed, most):
    """Against every division and, in each, every choice."""
    rng = np.random.default_rng(seed)
    runs = [drawn(rng, 3), drawn(rng, 2)]
    multiplier = float(rng.uniform(0.5, 30))

    def best(segment: list[dict[str, Curve]]) -> float:
        total = 0.0
        for name, first in segment[0].items():
            lost = sum(one[name].errors for one in segment)
            total += min(lost + multiplier * len(segment) * first.prices)
        return total

    def value(cut) -> float:
        total = 0.0
        for run, sizes in zip(runs, cut, strict=True):
            at = 0
            for size in sizes:
                total += best(run[at : at + size])
                at += size
        return total

    expected = min(map(value, divisions([3, 2], most)))
    segments = _Tower(runs, most).divide(multiplier)
    assert len(segments) <= most and sum(s.size for s in segments) == 5
    got = sum(s.curves[n].errors[i] + multiplier * s.curves[n].prices[i] for s in segments for n, i in s.choice.items())
    assert got == pytest.approx(expected, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.floats(0.2, 1.0), st.integers(1, 6))
def test_a_budget_is_kept_and_nothing_affordable_is_left(seed, share, most):
    rng = np.random.default_rng(seed)
    towers = [[drawn(rng, 4), drawn(rng, 1)], [drawn(rng, 3, names=1)]]
    dense = sum(c.prices[-1] for tower in towers for run in tower for one in run for c in one.values())
    try:
        ranks = allocate(towers, share * dense, most)
    except ConfigError as error:
        assert "impossible" in str(error)
        return
    price, lost = spent(towers, ranks)
    assert price <= share * dense + 1e-9
    more = [r if r == 1.0 else min(1.0, r + 0.2) for r in (share,)][0]
    assert spent(towers, allocate(towers, more * dense, most))[1] <= lost + 1e-9
    for tower, chosen in zip(towers, ranks, strict=True):
        stacks = sum(1 + sum(a != b for a, b in itertools.pairwise(run)) for run in chosen)
        assert stacks <= max(most, len(tower))


def test_what_loses_most_stays_dense():
    rng = np.random.default_rng(0)
    weak, strong = rng.normal(size=(16, 16)), 100 * rng.normal(size=(16, 16))
    curves = [{"w": curve(decompose(w), numbers("two-factor"), grid=1)} for w in (weak, strong)]
    (run,) = allocate([[curves]], 0.6 * 512)[0]
    assert run[1]["w"] is None and run[0]["w"] is not None


def test_a_grid_bounds_the_choices():
    w = np.random.default_rng(0).normal(size=(32, 48))
    assert curve(decompose(w), numbers("two-factor"), grid=4).ranks == (4, 8, 12, 16, None)  # 20 (32 + 48) > 32 48
    assert curve(decompose(w), numbers("pivoted"), grid=8).ranks == (8, 16, 24, None)


def test_a_budget_below_the_lowest_ranks():
    w = np.random.default_rng(0).normal(size=(32, 48))
    curves = [{"w": curve(decompose(w), numbers("two-factor"), grid=4)}]
    with pytest.raises(
        ConfigError, match=r"a budget of 100 is impossible: with the lowest ranks .* 320, 20.8% of dense"
    ):
        allocate([[curves]], 100)
