import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx import reparam
from lmx.core import sharding, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LowRank, Pivoted
from lmx.reparam import grams
from lmx.reparam.decompose import stored

FORMS = {"two-factor": LowRank, "pivoted": Pivoted}


@pytest.fixture(scope="module")
def parts(model, batches):
    return reparam.decompose_model(model, batches, sequential=True, key=jax.random.key(1))


def matrices(model) -> dict:
    """The weights of the layers' matrices by path."""
    chosen = {site.path for site in grams.sites(model)}
    named = lmx.tree.paths(lmx.unstack(model), weights.is_weight)
    return {str(path): w for path, w in named if str(path) in chosen}


def divergence(model, other, batches) -> float:
    """The mean KL divergence of another model from the model, over tokens that are no padding."""
    total = count = 0.0
    for b in batches:
        p, q = (m.log_probs(m.features(b["tokens"], segment_ids=b["segment_ids"])) for m in (model, other))
        real = b["segment_ids"] != 0
        total += float(((jnp.exp(p) * (p - q)).sum(-1) * real).sum())
        count += float(real.sum())
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_share_is_kept_in_any_model_without_a_change_to_it(model, parts, batches, form, allocation, tmp_path):
    ranks = reparam.choose_ranks(model, parts, 0.6, form=form, allocation=allocation)
    small = reparam.rebuild(model, parts, ranks, form=form)
    dense = sum(m * n for m, n in (part.site.shape for part in parts.values()))
    kept = sum(stored(parts[path].site.shape, rank, form) for path, rank in ranks.items())
    assert 0.5 * dense < kept <= 0.6 * dense
    for path, w in matrices(small).items():
        assert isinstance(w, FORMS[form]) == (ranks[path] is not None)
        if ranks[path] is not None:
            assert w.rank == ranks[path]
            a, b = parts[path].decomposition.truncate(ranks[path])
            got = np.asarray(weights.dense(w))[0].reshape(parts[path].site.shape)
            np.testing.assert_allclose(got, a @ b, atol=3e-5)
    assert jax.tree.structure(lmx.specs.shapes(small.specs())) == jax.tree.structure(small)
    shapes = jax.tree.map(lambda s, x: (s.shape, s.dtype) == (x.shape, x.dtype.name), small.specs(), small)
    assert all(jax.tree.leaves(shapes))
    lmx.save(small, tmp_path / "small")
    tokens = batches[0]["tokens"]
    np.testing.assert_array_equal(lmx.logits(lmx.load(tmp_path / "small"), tokens), lmx.logits(small, tokens))
    new = lmx.generate(small, tokens[:2, :8], max_new_tokens=4).tokens
    assert new.shape == (2, 4)


@pytest.mark.slow
def test_a_factorized_model_leaves_as_an_ordinary_one(model, parts, batches, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    small = reparam.rebuild(model, parts, reparam.choose_ranks(model, parts, 0.5))
    lmx.save(small, tmp_path, format="hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = batches[0]["tokens"]
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(tokens)).long()).logits.numpy()
    np.testing.assert_allclose(lmx.logits(small, tokens), expected, atol=5e-5)


def test_all_is_kept_at_a_share_of_one_and_full_rank_is_exact(model, parts, batches):
    ranks = reparam.choose_ranks(model, parts, 1)
    assert set(ranks.values()) == {None}
    full = {path: min(part.site.shape) for path, part in parts.items()}
    tokens = batches[0]["tokens"]
    for form in ("two-factor", "dense"):
        same = reparam.rebuild(model, parts, full, form=form)
        np.testing.assert_allclose(lmx.logits(same, tokens), lmx.logits(model, tokens), atol=2e-4)


def test_forms_of_equal_ranks_compute_the_same(model, parts, batches):
    ranks = reparam.choose_ranks(model, parts, 0.5, form="two-factor")
    tokens = batches[0]["tokens"]
    two, pivoted, dense = (
        lmx.logits(reparam.rebuild(model, parts, ranks, form=f), tokens) for f in ("two-factor", "pivoted", "dense")
    )
    np.testing.assert_allclose(two, dense, atol=1e-4)
    np.testing.assert_allclose(pivoted, dense, atol=1e-4)


@pytest.mark.slow
def test_each_moment_that_is_known_brings_the_model_nearer(model, batches):
    """At equal stored numbers and uniform ranks: by second order the two-sided error is the divergence."""
    lost = {}
    for method in ("svd", "svd-llm", "two-sided"):
        small = reparam.factorize(
            model, 0.7, batches, method=method, form="two-factor", allocation="uniform", key=jax.random.key(1)
        )
        lost[method] = divergence(model, small, batches)
    best = reparam.factorize(model, 0.7, batches, key=jax.random.key(1))
    assert lost["svd"] > lost["svd-llm"] > lost["two-sided"] > 2 * divergence(model, best, batches)


@pytest.mark.slow
def test_diagonal_methods_run(model, batches):
    for method in ("asvd", "fwsvd"):
        small = reparam.factorize(model, 0.7, batches, method=method)
        assert np.isfinite(divergence(model, small, batches))


@pytest.mark.slow
def test_fitting_behind_the_factorized_layers(model, parts, batches):
    """Without a cut it changes nothing; at equal ranks what the layers give is nearer."""
    full = {path: min(part.site.shape) for path, part in parts.items()}
    same = reparam.rebuild(model, parts, full, form="dense", batches=batches)
    assert divergence(model, same, batches) < 1e-6
    ranks = reparam.choose_ranks(model, parts, 0.4, allocation="uniform")
    plain = reparam.rebuild(model, parts, ranks)
    fitted = reparam.rebuild(model, parts, ranks, batches=batches)

    def off(other) -> float:
        return sum(
            float(
                jnp.square(
                    other.features(b["tokens"], segment_ids=b["segment_ids"])
                    - model.features(b["tokens"], segment_ids=b["segment_ids"])
                ).sum()
            )
            for b in batches
        )

    assert off(fitted) < 0.95 * off(plain)


@pytest.fixture(scope="module")
def alone(model, batches):
    """(factorized without a mesh, its logits)."""
    small = reparam.factorize(model, 0.5, batches, key=jax.random.key(1))
    return small, lmx.logits(small, batches[0]["tokens"])


@pytest.mark.slow
def test_on_a_mesh(model, batches, alone, mesh):
    """Factorized and then laid out, or laid out and then factorized."""
    tokens, (wanted, expected) = batches[0]["tokens"], alone
    placed = jax.device_put(model, lmx.specs.shardings(model.specs()))
    small = reparam.factorize(placed, 0.5, batches, key=jax.random.key(1))
    assert jax.tree.structure(small) == jax.tree.structure(wanted)
    after = jax.device_put(wanted, lmx.specs.shardings(wanted.specs()))
    place = sharding.named_sharding(("batch", "sequence"), tokens.shape, mesh)
    for made in (small, after):
        got = jax.jit(lmx.logits)(made, jax.device_put(tokens, place))
        np.testing.assert_allclose(got, expected, atol=2e-3)


@pytest.mark.slow
def test_every_trainable_part_gets_a_gradient(model, parts, batches):
    for form in FORMS:
        small = reparam.rebuild(model, parts, reparam.choose_ranks(model, parts, 0.5, form=form), form=form)
        state = lmx.start(small, lmx.train.adamw(1e-2), train="/(attention|mlp)/")
        step = lmx.make_train_step(lmx.losses.cross_entropy, lmx.train.adamw(1e-2))
        before = jax.tree.map(np.asarray, state.trained)
        state, metrics = step(state, batches[0])
        changed = jax.tree.map(lambda a, b: bool((a != np.asarray(b)).any()), before, state.trained)
        assert all(jax.tree.leaves(changed)) and np.isfinite(metrics["loss"])


def test_one_matrix():
    w = np.random.default_rng(0).normal(size=(6, 2, 4))
    got = reparam.factorize_weight(jnp.asarray(w), rank=3)
    u, s, v = np.linalg.svd(w.reshape(6, 8), full_matrices=False)
    np.testing.assert_allclose(weights.dense(got), (u[:, :3] * s[:3] @ v[:3]).reshape(w.shape), atol=1e-5)
    assert isinstance(got, LowRank) and got.a.shape == (6, 3) and got.b.shape == (3, 2, 4)
    pivoted = reparam.factorize_weight(jnp.asarray(w), budget=45, form="pivoted")
    assert isinstance(pivoted, Pivoted) and pivoted.rank == 5  # 5 (14 - 5) = 45
    for bad, message in (
        (dict(), "give rank= or budget="),
        (dict(rank=7), "a rank from 1 to 6, not 7"),
        (dict(rank=0), "a rank from 1 to 6, not 0"),
        (dict(budget=9), r"9 numbers are too few for a matrix \(6, 8\): rank 1 takes 14"),
        (dict(rank=2, form="svd"), "no form 'svd'"),
    ):
        with pytest.raises(ConfigError, match=message):
            reparam.factorize_weight(w, **bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(keep=0.0), "keep is a share .* above 0 and at most 1, not 0.0"),
        (dict(keep=1.5), "not 1.5"),
        (dict(keep=0.001), "impossible: with the lowest ranks .*; keep at least that share"),
        (dict(keep=0.001, allocation="uniform"), "takes .* at rank 1, more than the 0.1% to keep"),
        (dict(method="svdllm"), "no method 'svdllm', there are .*did you mean 'svd-llm'"),
        (dict(form="pivot"), "no form 'pivot', there are .*did you mean 'pivoted'"),
        (dict(allocation="best"), "no allocation 'best'"),
        (dict(pattern="mpl"), "selects nothing"),
        (dict(batches=[]), "at least one batch"),
        (dict(grid=0), "grid must be at least 1, not 0"),
    ],
)
def test_bad_input(model, batches, change, message):
    with pytest.raises(ConfigError, match=message):
        reparam.factorize(**(dict(model=model, batches=batches, keep=0.5) | change))


def test_weights_that_are_no_numbers(model, batches):
    broken = lmx.tree.map(lambda w: w * jnp.nan, model, "layers[1]/mlp/up")
    with pytest.raises(ConfigError, match=r"decoder/layers\[.\]/.*not finite"):
        reparam.factorize(broken, 0.5, batches)
    with pytest.raises(ConfigError, match=r"layers\[1\]/mlp/up: the matrix .* not finite"):
        reparam.factorize(broken, 0.5, method="svd")
