"""Learning-rate schedules at the steps where their definitions say a number."""

from __future__ import annotations

import numpy as np
import pytest

from lmx.core.errors import ConfigError
from lmx.train import cosine, schedule, wsd

EXACT = dict(rtol=1e-6, atol=1e-9)  # one float32 formula


def test_cosine():
    rate = cosine(2.0, steps=110, warmup=10, final=0.1)
    at = {0: 0, 5: 1, 10: 2, 60: (2 + 0.2) / 2, 110: 0.2, 200: 0.2}
    np.testing.assert_allclose([rate(step) for step in at], list(at.values()), **EXACT)
    progress = np.linspace(0, 1, 101)
    wanted = 0.2 + 1.8 * (1 + np.cos(np.pi * progress)) / 2  # Loshchilov and Hutter 2017, equation 5
    np.testing.assert_allclose([rate(10 + i) for i in range(101)], wanted, rtol=1e-5)


def test_cosine_without_warmup():
    rate = cosine(2.0, steps=100)
    np.testing.assert_allclose([rate(0), rate(50), rate(100)], [2, 1.1, 0.2], **EXACT)


def test_wsd():
    rate = wsd(2.0, steps=100, warmup=10, decay=0.2, final=0.5)
    at = {0: 0, 5: 1, 10: 2, 50: 2, 80: 2, 90: 1.5, 100: 1, 150: 1}
    np.testing.assert_allclose([rate(step) for step in at], list(at.values()), **EXACT)


def test_wsd_without_warmup_falls_to_zero():
    rate = wsd(2.0, steps=10)
    np.testing.assert_allclose([rate(i) for i in (0, 1, 8, 9, 10)], [2, 2, 2, 1, 0], **EXACT)


def test_wsd_is_warmup_then_decay_where_nothing_is_between():
    rate = wsd(2.0, steps=10, warmup=5, decay=0.5)
    np.testing.assert_allclose([rate(i) for i in (4, 5, 6)], [1.6, 2, 1.6], **EXACT)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_short_runs_have_finite_rates(name, steps):
    rate = schedule(name, 2.0, steps)
    rates = np.array([rate(i) for i in range(steps + 1)])
    assert np.isfinite(rates).all() and (rates >= 0).all() and rates[0] == 2


def test_by_name():
    np.testing.assert_allclose(schedule("cosine", 2.0, 100, 10)(33), cosine(2.0, 100, 10)(33), rtol=0)
    np.testing.assert_allclose(schedule("wsd", 2.0, 100, 10)(93), wsd(2.0, 100, 10)(93), rtol=0)
    with pytest.raises(ConfigError, match="no schedule 'cosin', there are cosine, wsd; did you mean 'cosine'?"):
        schedule("cosin", 2.0, 100)


@pytest.mark.parametrize("warmup", [100, 101, -1])
@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_warmup_too_long(name, warmup):
    with pytest.raises(ConfigError, match=f"warmup {warmup} must be at least 0 and less than the 100 steps"):
        schedule(name, 2.0, 100, warmup)


def test_warmup_and_decay_overlap():
    with pytest.raises(ConfigError, match="90 warm-up steps and 20 of decay exceed 100 steps; lower warmup or decay"):
        wsd(2.0, 100, 90)
