"""Recovery brings a factorized model nearer to its original, costs what arithmetic says, and changes nothing else."""

from __future__ import annotations

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import lmx
from lmx.core import tree, weights
from lmx.core.errors import ConfigError, DataError, NonFiniteError
from lmx.evaluate import mean_kl
from lmx.losses import cross_entropy, distillation
from lmx.models import cost
from lmx.recipes.recovery import recover

V, B, T = 48, 4, 12


@pytest.fixture(scope="module")
def original() -> lmx.Model:
    config = lmx.Config(
        vocab_size=V, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=24, remat="none",
        initializer_range=0.25,
    )  # fmt: skip
    return lmx.init(config, jax.random.key(0))


@pytest.fixture(scope="module")
def factorized(original) -> lmx.Model:
    """The original with feed-forward matrices of rank 2, the best there are (Eckart and Young 1936)."""

    def cut(w):
        u, s, v = np.linalg.svd(np.asarray(w), full_matrices=False)
        return lmx.LowRank(jnp.asarray(u[..., :2]), jnp.asarray(s[:, :2, None] * v[:, :2]))

    return tree.map(cut, original, "mlp/(up|gate|down)$", weights.is_weight)


def batches(count: int = 1000, b: int = B, t: int = T):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"tokens": rng.integers(0, V, (b, t)).astype(np.int32)}


@pytest.fixture(scope="module")
def recovered(factorized, original):
    quiet = io.StringIO()  # no terminal
    got = recover(factorized, original, batches(), 40, 1e-2, console=Console(file=quiet))
    assert not quiet.getvalue()
    return got


def apart(model, original) -> float:
    held_out = {"tokens": np.random.default_rng(1).integers(0, V, (8, T)).astype(np.int32)}
    return mean_kl(model, original, [held_out])


@pytest.mark.slow
def test_it_is_nearer_to_the_original(factorized, original, recovered):
    """On text that it has not seen; of the same kinds and shapes; what was given is as it was."""
    before = apart(factorized, original)
    assert apart(recovered.model, original) < 0.75 * before
    shapes = lambda model: jax.tree.map(lambda x: (x.shape, x.dtype), model)  # noqa: E731
    assert shapes(recovered.model) == shapes(factorized)
    assert isinstance(recovered.model.params.decoder.layers.stacks[0][0].mlp.up, lmx.LowRank)
    assert apart(factorized, original) == before  # its arrays were not donated


def test_the_same_again(factorized, original, recovered):
    again = recover(factorized, original, batches(), 40, 1e-2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.model), jax.device_get(recovered.model))


def test_it_can_be_ended_early(factorized, original):
    """What it was in that step is what a run with a longer schedule is then: some of the way, and counted so."""
    asked = iter([False, False, True])
    got = recover(factorized, original, batches(), 40, 1e-2, asked_to_stop=lambda: next(asked))
    assert got.steps == 3 and got.tokens == 3 * B * T
    assert 0 < apart(got.model, original) < apart(factorized, original)


def test_what_it_costs(factorized, original, recovered):
    """Three forward passes of the student and one of the teacher, for every token of every row, by its length."""
    assert recovered.steps == 40 and recovered.tokens == 40 * B * T and recovered.skipped == 0
    student, teacher = cost.cost(factorized, T), cost.cost(original, T)
    assert recovered.student_flops == 40 * B * T * 3 * student.forward_flops
    assert recovered.teacher_flops == 40 * B * T * teacher.forward_flops
    assert recovered.flops == recovered.student_flops + recovered.teacher_flops


@pytest.mark.slow
def test_rows_of_unlike_length(factorized, original):
    got = recover(factorized, original, [*batches(1), *batches(1, t=6)], 2)
    assert got.tokens == B * (T + 6)
    assert got.teacher_flops == sum(cost.cost(original, t).forward_flops * B * t for t in (T, 6))


def test_only_what_the_pattern_names_moves(factorized, original):
    """A layer of a stack alone: the stack is cut, and the rest are the very arrays of the student."""
    got = recover(factorized, original, batches(), 2, 1e-2, train="layers[1]/mlp/").model
    for path, leaf in tree.paths(got):
        (_, before), *_ = tree.select(factorized, f"^{path.plain}$")
        inside = path.layers is not None and 1 in path.layers and "mlp" in path.parts
        before = before if path.layers is None else before[path.layers.start : path.layers.stop]
        assert (np.abs(leaf - before).max() > 0) == inside, path
    assert jax.tree.structure(lmx.restack(got)) == jax.tree.structure(factorized)


@pytest.mark.slow
def test_another_loss_another_optimizer(factorized, original):
    """What the loss reads is its own affair: cross-entropy of the student, without a teacher, costs no teacher."""
    hot = functools.partial(distillation, temperature=2.0, alpha=0.5)
    one = recover(factorized, original, batches(), 3, 1e-2, loss=hot, optimizer="muon", accumulate=2, clip_norm=None)
    assert np.isfinite(apart(one.model, original))
    alone = recover(factorized, None, batches(), 3, loss=lambda pair, batch, key: cross_entropy(pair.student, batch))
    assert alone.teacher_flops == 0 and alone.flops > 0


def test_no_steps(factorized, original):
    got = recover(factorized, original, batches(), 0)
    assert got.steps == got.tokens == got.flops == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got.model), jax.device_get(factorized))


def test_progress(factorized, original):
    """A bar where there is a terminal."""
    said = io.StringIO()
    recover(factorized, original, batches(), 1, console=Console(file=said, force_terminal=True))
    assert "step 1/1" in said.getvalue() and "loss" in said.getvalue()


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (dict(steps=-1), ConfigError, "takes 0 steps or more at a learning rate above 0, not -1 at 0.001"),
        (dict(steps=3, learning_rate=0.0), ConfigError, "at a learning rate above 0, not 3 at 0.0"),
        (dict(steps=3, train="mlq"), ConfigError, "'mlq' selects nothing.*mlp"),
        (dict(steps=3, optimizer="adamv"), ConfigError, "no optimizer 'adamv'.*did you mean 'adamw'"),
        (dict(steps=3, batches=batches(2)), DataError, "the batches ended after step 2, but 3 steps were asked for"),
    ],
)
def test_bad_input(factorized, original, options, kind, said):
    with pytest.raises(kind, match=said):
        recover(factorized, original, **(dict(batches=batches()) | options))


@pytest.mark.slow
def test_a_teacher_that_is_not_finite_ends_it(factorized, original):
    broken = jax.tree.map(lambda x: x * np.nan, original)
    with pytest.raises(NonFiniteError, match="steps in a row.*had a non-finite loss"):
        recover(factorized, broken, batches(), 40)
