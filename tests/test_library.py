"""`import lmx` from somebody else's code: the lines of the README, and lmx under the caller's own `jit` and loop."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmx

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[tuple[int, str]]:
    """(line number, code) of every python block of the README."""
    if not README.exists():
        return []
    text = README.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.S | re.M)
    return [(text[: match.start()].count("\n") + 1, match.group(1)) for match in found]


@pytest.mark.slow
@pytest.mark.skipif(not blocks(), reason="README.md has no python block")
@pytest.mark.parametrize("line, code", [pytest.param(*block, id=f"line {block[0]}") for block in blocks()])
def test_the_readme_runs_as_it_stands(line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * line + code, str(README), "exec"), {"__name__": "readme"})


def test_the_readme_shows_the_library():
    assert any("import" in code and "lmx.load" in code and "optax" in code for _, code in blocks())


@pytest.fixture
def model():
    return lmx.init(lmx.preset("llama-tiny", vocab_size=64), jax.random.key(0))


def test_logits_are_one_program(model, caplog):
    tokens = jnp.arange(38).reshape(2, 19)  # of a length that no other test has
    with jax.log_compiles():
        got = lmx.logits(model, tokens)
    programs = [line for line in caplog.messages if line.startswith("Compiling")]
    assert len(programs) == 1 and "logits" in programs[0], programs
    np.testing.assert_allclose(got, model.read(model.features(tokens)), atol=1e-5)


@pytest.mark.slow
def test_ten_lines(model, tmp_path):
    """Save, load, logits, generate, and training steps in a loop, a jit and an optimizer that are not lmx's."""
    lmx.save(model, tmp_path / "model")
    mine = lmx.load(tmp_path / "model")
    tokens = jnp.tile(jnp.arange(16) % 5, (4, 1))  # (b, t)
    np.testing.assert_array_equal(lmx.logits(mine, tokens), lmx.logits(model, tokens))

    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(model, opt_state, batch):
        def loss(model):
            total, weight, _ = lmx.losses.cross_entropy(model, batch)
            return total / weight

        value, grads = jax.value_and_grad(loss)(model)
        updates, opt_state = optimizer.update(grads, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, value

    state, values = optimizer.init(mine), []
    for _ in range(60):
        mine, state, value = step(mine, state, {"tokens": tokens})
        values.append(float(value))
    assert values[0] == pytest.approx(np.log(64), rel=0.05) and values[-1] < 0.1
    assert step._cache_size() == 1

    new = lmx.generate(mine, tokens[:1, :3], max_new_tokens=6).tokens  # greedy
    assert new.tolist() == [[3, 4, 0, 1, 2, 3]]


@pytest.mark.slow
def test_everything_works_inside_somebody_elses_jit(model):
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_allclose(jax.jit(lmx.logits)(model, tokens), lmx.logits(model, tokens), atol=1e-5)
    np.testing.assert_allclose(jax.jit(lmx.encode)(model, tokens), lmx.encode(model, tokens), atol=1e-5)

    @jax.jit
    def sample(model, tokens, key):
        return lmx.generate(model, tokens, max_new_tokens=5, temperature=0.7, key=key).tokens

    new = sample(model, tokens, jax.random.key(0))
    same = lmx.generate(model, tokens, max_new_tokens=5, temperature=0.7, key=jax.random.key(0)).tokens
    np.testing.assert_array_equal(new, same)

    per_example = jax.vmap(lambda row: model.score(row[None])[0])(tokens)  # under vmap too
    np.testing.assert_allclose(per_example, model.score(tokens), atol=1e-5)


def test_the_callers_arrays_outlive_lmx_training(model):
    optimizer = lmx.train.adamw(1e-3)
    state = lmx.start(model, optimizer, train="decoder")
    step = lmx.make_train_step(lmx.losses.cross_entropy, optimizer)
    for _ in range(2):
        state, metrics = step(state, {"tokens": jnp.arange(16).reshape(2, 8)})
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))  # none was donated
    np.testing.assert_array_equal(state.model.params.embed.tokens, model.params.embed.tokens)
