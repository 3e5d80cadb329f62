"""A student trains and its teacher does not: no optimizer state, its arrays the caller's; accumulated, sharded."""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import pytest

from lmx.core import sharding, specs
from lmx.losses import Distillation, distillation
from lmx.train import adamw, make_train_step, start
from lmx.train.feed import place_batch

pytestmark = pytest.mark.usefixtures("quick")
MESHES = list(itertools.product(("fsdp=8", "fsdp=4,tensor=2"), ("explicit", "auto")))
OPTIMIZER = adamw(1e-2, eps=1e-3)  # Adam's g / |g| of gradients near 0 would multiply their rounding


@pytest.fixture(scope="module")
def pair(tiny):
    """A student of one layer and a teacher of other widths, heads and depth."""
    teacher = tiny("gpt2", num_layers=3, hidden_size=24, num_heads=2)
    return Distillation(tiny(num_layers=1), teacher)


def run(pair, batches, accumulate=1, steps=2, **options):
    """The state after some steps, and their metrics."""
    step = make_train_step(functools.partial(distillation, **options), OPTIMIZER, accumulate=accumulate)
    state, found = start(pair, OPTIMIZER, train="^student"), []
    for i in range(steps):
        state, metrics = step(state, place_batch(batches(i)))
        found.append(jax.device_get(metrics))
    return state, found


def test_the_teacher_is_frozen_and_lives_on(pair, packed):
    """Only the student has optimizer state, its copy is donated, and the teacher's arrays are the caller's own."""
    before = jax.device_get(pair)
    state = start(pair, OPTIMIZER, train="^student")
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]  # noqa: E731
    assert not jax.tree.leaves((state.trained.teacher, state.frozen.student))
    adam = state.opt_state[0]
    assert shapes(adam.mu) == shapes(adam.nu) == shapes(state.trained) == shapes(pair.student)
    state, found = run(pair, lambda i: packed(), steps=6)
    assert found[-1]["kl"] < found[0]["kl"]
    for ours, theirs in zip(jax.tree.leaves(state.model.teacher), jax.tree.leaves(pair.teacher), strict=True):
        assert ours is theirs
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(pair), before)  # the student given lives on too


@pytest.mark.slow
def test_microbatches_add_up(pair, packed):
    """Unlike weights and some rows with none: accumulated over 4 microbatches the steps are those of whole batches."""

    def batches(i):
        batch = packed(i)
        return batch | {"weights": batch["weights"] * (np.arange(8) % 4 > 0)[:, None]}

    (whole, found), (state, again) = (run(pair, batches, n, temperature=2.0, alpha=0.5) for n in (1, 4))
    for a, b in zip(found, again, strict=True):
        assert a.keys() == b.keys() >= {"loss", "kl", "agreement", "cross_entropy"}
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, *jax.device_get((whole.trained, state.trained)))


@pytest.fixture(scope="module")
def alone(pair, packed):
    state, found = run(pair, packed, divergence="jsd", alpha=0.5)
    return jax.device_get((state.trained, found))


@pytest.mark.slow
@pytest.mark.parametrize(("text", "kind"), MESHES)
def test_sharded_equals_alone(pair, packed, alone, text, kind):
    with sharding.use_mesh(text, explicit=kind == "explicit"):
        placed = Distillation(*(jax.device_put(m, specs.shardings(m.specs())) for m in (pair.student, pair.teacher)))
        state, found = run(placed, packed, divergence="jsd", alpha=0.5)
        got = jax.device_get((state.trained, found))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, alone)
