"""A model made of unlike weights trains, saves, loads without its history and generates, as any other model does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core import specs, tree, weights
from lmx.core.kinds import LoRA, LowRank
from lmx.decode import generate
from lmx.hf import library
from lmx.losses import cross_entropy
from lmx.models import stacks
from lmx.models.transformer import Model
from lmx.train import adamw, make_train_step, start

pytestmark = pytest.mark.usefixtures("quick")


def low_rank(rank: int):
    """The best approximation of that rank, layer by layer (Eckart and Young 1936)."""

    def cut(w):
        n, d, *outs = w.shape
        u, s, v = np.linalg.svd(np.asarray(w).reshape(n, d, -1), full_matrices=False)
        b = s[:, :rank, None] * v[:, :rank]
        return LowRank(jnp.asarray(u[..., :rank]), jnp.asarray(b.reshape(n, rank, *outs)))

    return cut


def adapt(w):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(*w.shape[:2], 2)), 0.1 * rng.normal(size=(w.shape[0], 2, *w.shape[2:]))
    return LoRA(w, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), alpha=4.0)


@pytest.fixture(scope="module")
def factorized(tiny) -> Model:
    """Four layers of ranks 3, 3, 5 and dense, the second and third adapted; embedding factorized, head adapted."""
    kinds = weights.is_weight
    model = tree.map(low_rank(3), tiny(num_layers=4), r"layers[0:2]/(attention/(query|value)|mlp/(up|gate))$", kinds)
    model = tree.map(low_rank(5), model, r"layers[2]/(attention/query|mlp/up)$", kinds)
    model = tree.map(adapt, model, r"layers[1:3]/(attention/query|mlp/up)$", kinds)
    model = tree.map(lambda w: LowRank(w[:, :6], jnp.eye(16)[:6]), model, "embed/tokens$", kinds)
    lora = lambda w: LoRA(w, w[:, :2] * 0.1, w[:2] * 0.1)  # noqa: E731
    return stacks.restack(tree.map(lora, model, "^head/out$", kinds))


def test_it_is_what_it_says(factorized, tiny):
    assert factorized.params.decoder.layers.sizes == (1, 1, 1, 1)  # no neighbours are equal
    kinds = [type(stack[0].attention.query).__name__ for stack in factorized.params.decoder.layers.stacks]
    assert kinds == ["LowRank", "LoRA", "LoRA", "ArrayImpl"]
    said = jax.tree.map(lambda s: (s.shape, s.dtype), factorized.specs())
    have = jax.tree.map(lambda x: (x.shape, x.dtype.name), factorized)
    assert said == have
    assert specs.count(factorized) != specs.count(tiny(num_layers=4))


@pytest.mark.slow
def test_trains_saves_loads_and_generates(factorized, packed, tmp_path):
    traces = []

    def loss(model, batch, key):
        traces.append("step")
        return cross_entropy(model, batch)

    @jax.jit
    def logits(model, tokens):
        traces.append("logits")
        return model.logits(tokens)

    optimizer, batch = adamw(0.01), packed()
    step, state = make_train_step(loss, optimizer), start(factorized, optimizer)
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3
    trained = state.model
    for (path, new), (_, old) in zip(tree.paths(trained), tree.paths(factorized), strict=True):
        assert (new != old).any(), path  # every part of every weight learns

    folder = tmp_path / "model"
    library.save(trained, folder)
    loaded = library.load(folder)
    assert jax.tree.structure(loaded) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)
    wanted, got = logits(trained, batch["tokens"]), logits(loaded, batch["tokens"])
    np.testing.assert_array_equal(got, wanted)
    folded = logits(weights.fold(trained), batch["tokens"])
    np.testing.assert_allclose(folded, wanted, rtol=1e-4, atol=1e-4)  # float32, four layers, logits of size 3

    prompt = jnp.asarray(batch["tokens"][:2, :4])
    one, two = (generate(model, prompt, max_new_tokens=5).tokens for model in (trained, loaded))
    np.testing.assert_array_equal(one, two)
    tokens = prompt
    for _ in range(5):
        tokens = jnp.concatenate([tokens, loaded.logits(tokens)[:, -1:].argmax(-1).astype(tokens.dtype)], axis=1)
    np.testing.assert_array_equal(one, tokens[:, 4:])

    before = list(traces)
    assert before.count("logits") == 2  # the model as it is, and folded; the reloaded one came from the cache
    again, metrics = step(start(loaded, optimizer), batch)
    assert traces == before and np.isfinite(metrics["loss"])  # training goes on without a new trace


def test_the_adapters_alone_can_be_trained(factorized, packed):
    """Over unlike bases, and what lies under them does not move."""
    optimizer = adamw(0.01)
    state = start(factorized, optimizer, train="lora_[ab]$")
    state, _ = make_train_step(cross_entropy, optimizer)(state, packed())
    for (path, new), (_, old) in zip(tree.paths(state.model), tree.paths(factorized), strict=True):
        assert bool((new != old).any()) == path.parts[-1].startswith("lora_"), path
