"""The Transformer and `Model`: one function however it is stacked, packed, recomputed or stepped through."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core import tree, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA, LowRank
from lmx.core.tree import Layers
from lmx.models import stacks, transformer
from lmx.models.config import Config
from lmx.models.protocol import LanguageModel
from lmx.models.transformer import Model, model_specs

SHAPE = dict(vocab_size=53, num_layers=4, hidden_size=32, num_heads=4, intermediate_size=40, initializer_range=0.2)
GPT2 = dict(
    activation="gelu_tanh", norm="layernorm", norm_bias=True, position="learned", max_length=16,
    attention_bias=True, attention_out_bias=True, mlp_bias=True,
)  # fmt: skip
CONFIGS = {
    "llama": Config(**SHAPE, num_kv_heads=2, tie_embeddings=False),
    "gpt2": Config(**SHAPE, **GPT2),
    "no positions": Config(**SHAPE, position="none", activation="relu", num_kv_heads=1, attention="reference"),
}
# The same float32 numbers added in another order, through four layers, logits up to about 10.
CLOSE = dict(rtol=1e-5, atol=3e-5)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 53, (3, 12)), jnp.int32)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    made = {name: transformer.init(config, jax.random.key(0)) for name, config in CONFIGS.items()}
    # Biases and norms begin at 0 and 1, where a mistake would not show.
    noise = lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)  # noqa: E731
    return {name: tree.map(noise, model, "bias|scale") if name == "gpt2" else model for name, model in made.items()}


@jax.jit
def logits(model, tokens, segment_ids=None, positions=None):
    return model.logits(tokens, segment_ids=segment_ids, positions=positions)


@jax.jit
def gradient(model):
    return jax.value_and_grad(lambda model: -model.score(TOKENS).mean())(model)


@jax.jit
def step(model, state, tokens):
    return model.step(state, tokens)


def factorized(model: Model) -> Model:
    """Surgery: ranks 3 and 5, adapters over two of the factorized layers, a factorized embedding."""

    def cut(rank):
        def one(w):
            u, s, v = np.linalg.svd(np.asarray(w).reshape(*w.shape[:2], -1), full_matrices=False)
            b = (s[..., :rank, None] * v[..., :rank, :]).reshape(w.shape[0], rank, *w.shape[2:])
            return LowRank(jnp.asarray(u[..., :rank]), jnp.asarray(b))

        return one

    def adapt(w):
        keys = jax.random.split(jax.random.key(3))
        a = jax.random.normal(keys[0], (w.shape[0], w.shape[1], 2))
        return LoRA(w, a, 0.1 * jax.random.normal(keys[1], (w.shape[0], 2, *w.shape[2:])), alpha=4.0)

    def lookup(w):
        return LowRank(w[:, :7], jnp.eye(32)[:7])

    model = tree.map(cut(3), model, r"layers[0:3]/(attention/(query|value)|mlp/up)$", weights.is_weight)
    model = tree.map(cut(5), model, r"layers[3]/attention/query$", weights.is_weight)
    model = tree.map(adapt, model, r"layers[1:3]/attention/query$", weights.is_weight)
    model = tree.map(lookup, model, "embed/tokens$", weights.is_weight)
    return stacks.restack(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_a_language_model(models, name):
    model = models[name]
    assert isinstance(model, LanguageModel)
    assert (model.vocab_size, model.max_length) == (53, CONFIGS[name].max_length)
    features = model.features(TOKENS)
    assert features.shape == (3, 12, 32)
    log_probs = model.log_probs(features)
    assert log_probs.shape == (3, 12, 53) and log_probs.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(np.asarray(log_probs, np.float64)).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits(model, TOKENS)), **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_causal(models, name):
    changed = TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 53)
    one, two = logits(models[name], TOKENS), logits(models[name], changed)
    np.testing.assert_array_equal(one[:, :7], two[:, :7])
    assert (jnp.abs(one - two)[:, 7:].max(-1) > 1e-3).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_score_is_a_gather_from_the_log_probabilities(models, name):
    log_probs = np.asarray(jax.nn.log_softmax(logits(models[name], TOKENS)))
    wanted = np.take_along_axis(log_probs[:, :-1], np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(models[name].score(TOKENS), wanted, **CLOSE)


@pytest.mark.slow
def test_remat_changes_nothing(models):
    model = models["llama"]
    found = {
        remat: gradient(model.replace(config=model.config.replace(remat=remat))) for remat in ("none", "dots", "full")
    }
    for remat in ("dots", "full"):
        value, grads = found[remat]
        np.testing.assert_allclose(value, found["none"][0], rtol=1e-6)
        wanted = jax.tree.leaves(found["none"][1])
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6),
            jax.tree.leaves(grads),
            wanted,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remat_dots_keeps_the_products_with_weights(dtype):
    """Counted in FLOPs of one layer: full computes its forward products twice, dots none of those with weights."""
    config = CONFIGS["llama"].replace(num_layers=1, compute_dtype=dtype)
    tokens = jnp.zeros((2, 64), jnp.int32)
    counted = {}
    for remat in ("dots", "full"):
        model = transformer.init(config.replace(remat=remat), jax.random.key(0))
        gradient = jax.jit(jax.grad(lambda m: m.features(tokens).astype(jnp.float32).sum(), allow_int=True))
        counted[remat] = gradient.lower(model).cost_analysis()["flops"]
    layer = jax.tree.leaves(model.params.decoder.layers)
    products = 2 * tokens.size * sum(leaf.size for leaf in layer if leaf.ndim > 2)
    assert counted["full"] - counted["dots"] > 0.9 * products * 6 / 7  # the last one's result is needed by nobody


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_scan_equals_single_layers(models, remat):
    model = models["gpt2"].replace(config=CONFIGS["gpt2"].replace(remat=remat))
    alone = stacks.unstack(model)
    assert alone.params.decoder.layers.sizes == (1, 1, 1, 1)
    np.testing.assert_allclose(logits(alone, TOKENS), logits(model, TOKENS), **CLOSE)
    (value, grads), (wanted, wanted_grads) = gradient(alone), gradient(model)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    close = lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, stacks.restack(grads), wanted_grads)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_segments_equal_separate_rows(models, name):
    """Two documents and padding in one row against one document a row: what came before is not seen."""
    pieces = [(0, 5), (5, 9)]
    segment_ids = jnp.array([[1] * 5 + [2] * 4 + [0] * 3] * 3)
    packed = logits(models[name], TOKENS, segment_ids)
    for first, last in pieces:
        alone = logits(models[name], TOKENS[:, first:last])
        np.testing.assert_allclose(packed[:, first:last], alone, **CLOSE)
    whole = logits(models[name], TOKENS)
    assert jnp.abs(whole - packed)[:, 5:9].max() > 1e-2  # and without ids it does


def test_positions_are_an_argument(models):
    shifted = jnp.broadcast_to(jnp.arange(12) + 3, (3, 12))
    # Rotary products see distances alone, learned positions do not.
    np.testing.assert_allclose(
        logits(models["llama"], TOKENS, None, shifted), logits(models["llama"], TOKENS), atol=2e-4
    )
    assert jnp.abs(logits(models["gpt2"], TOKENS, None, shifted) - logits(models["gpt2"], TOKENS)).max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_with_a_cache_equal_the_whole(models, name):
    model = models[name]
    wanted = jax.nn.log_softmax(logits(model, TOKENS))
    state, rows = model.start(3, 14), []
    for first, last in ((0, 5), (5, 6), (6, 7), (7, 12)):
        log_probs, state = step(model, state, TOKENS[:, first:last])
        rows.append(log_probs)
    assert rows[0].dtype == jnp.float32
    np.testing.assert_allclose(jnp.concatenate(rows, 1), wanted, **CLOSE)
    assert state.lengths.tolist() == [12] * 3
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(state))  # batch-first, so that beams reorder by take


@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_prompts_by_rewinding(models, name):
    """Right-padded prompts: one step over all columns, a rewind, then each row goes on where it stands."""
    model, lengths = models[name], [3, 7, 5]
    prompts = jnp.where(jnp.arange(7) < jnp.array(lengths)[:, None], TOKENS[:, :7], 0)
    _, state = step(model, model.start(3, 12), prompts)
    state = model.rewind(state, jnp.array(lengths))
    wanted = np.asarray(jax.nn.log_softmax(logits(model, TOKENS)))
    for i in range(5):
        column = jnp.array([[TOKENS[b, n + i]] for b, n in enumerate(lengths)])
        log_probs, state = step(model, state, column)
        for b, n in enumerate(lengths):
            np.testing.assert_allclose(log_probs[b, 0], wanted[b, n + i], **CLOSE)
    # Two more of several tokens at once, again after going back.
    state = model.rewind(state, jnp.array([2, 4, 6]))
    block = jnp.stack([TOKENS[b, n : n + 3] for b, n in enumerate((2, 4, 6))])
    log_probs, state = step(model, state, block)
    for b, n in enumerate((2, 4, 6)):
        np.testing.assert_allclose(log_probs[b], wanted[b, n : n + 3], **CLOSE)


def test_more_tokens_than_learned_positions(models):
    long = jnp.zeros((1, 17), jnp.int32)
    with pytest.raises(ConfigError, match="17 tokens a row exceed the 16 learned positions"):
        models["gpt2"].logits(long)
    with pytest.raises(ConfigError, match="17 positions .* exceed the 16 learned positions"):
        models["gpt2"].start(1, 17)
    assert models["llama"].logits(long).shape == (1, 17, 53)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(models):
    model = models["llama"]
    rough = model.replace(config=model.config.replace(compute_dtype="bfloat16"))
    assert rough.features(TOKENS).dtype == jnp.bfloat16
    found, wanted = logits(rough, TOKENS), logits(model, TOKENS)
    assert found.dtype == jnp.float32
    # Some 30 roundings of 2^-9 in a row, at random: a few percent of the spread.
    assert float(jnp.abs(found - wanted).mean()) < 0.05 * float(wanted.std())
    _, grads = gradient(rough)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}


def described(specs) -> list:
    return [(str(path), s.shape, s.dtype) for path, s in tree.paths(specs)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_specs_state_the_structure(models, name):
    model = models[name]
    cut = factorized(model)
    assert [type(p[0].attention.query).__name__ for p in cut.params.decoder.layers.stacks] == [
        "LowRank",
        "LoRA",
        "LowRank",
    ]
    assert cut.params.decoder.layers.sizes == (1, 2, 1)
    assert cut.params.decoder.layers.stacks[2][0].attention.query.rank == 5
    for one in (model, cut, stacks.unstack(cut), jax.tree.map(lambda x: x.astype(jnp.bfloat16), cut)):
        specs = model_specs(one)
        assert jax.tree.structure(specs) == jax.tree.structure(one.params)
        assert described(specs) == [(str(path), x.shape, x.dtype.name) for path, x in tree.paths(one.params)]
        of_query = specs.decoder.layers.stacks[0][0].attention.query
        if one is not model:
            assert of_query.a.axes == ("layers", "embed", "rank")
            assert of_query.b.axes == ("layers", "rank", "heads", "head_dim")
            assert specs.embed.tokens.a.axes == ("vocab", "rank") and specs.embed.tokens.b.axes == (
                "rank",
                "embed",
            )
    assert model_specs(model) == jax.tree.map(lambda s: s.replace(), transformer.abstract(model.config))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_factorized_model_is_a_model(models, name):
    """No line of the model knows the kinds: logits, gradients and steps equal those of the folded model."""
    model = factorized(models[name])
    folded = weights.fold(model)
    assert all(not weights.is_weight(x) for x in jax.tree.leaves(folded, is_leaf=weights.is_weight))
    wanted = logits(folded, TOKENS)
    np.testing.assert_allclose(logits(model, TOKENS), wanted, rtol=1e-4, atol=1e-4)  # products of two factors more
    assert jnp.abs(wanted - logits(models[name], TOKENS)).max() > 0.1
    log_probs, _ = step(model, model.start(3, 12), TOKENS)
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(wanted), rtol=1e-4, atol=1e-4)
    value, grads = gradient(model)
    assert jax.tree.structure(grads) == jax.tree.structure(model)
    assert all(jnp.abs(g).max() > 0 for _, g in tree.select(grads, "query"))


def test_two_kinds_that_alternate_are_one_stack_of_periods(models):
    model = models["llama"]
    cut = lambda w: LowRank(w[..., 0, :3], jnp.ones((w.shape[0], 3, *w.shape[2:])))  # noqa: E731
    cut_every_second = tree.map(cut, model, "layers[1::2]/attention/query$", weights.is_weight)
    assert cut_every_second.params.decoder.layers.sizes == (1, 1, 1, 1)
    paired = stacks.restack(cut_every_second, period=2)
    assert paired.params.decoder.layers.sizes == (2,) and paired.params.decoder.layers.num_layers == 4
    np.testing.assert_allclose(logits(paired, TOKENS), logits(cut_every_second, TOKENS), **CLOSE)
    log_probs, _ = step(paired, paired.start(3, 12), TOKENS)
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits(paired, TOKENS)), **CLOSE)
    names = [str(path) for path, _ in tree.select(paired, "query")]
    assert names == [
        "decoder/layers[0:3:2]/attention/query",
        "decoder/layers[1:4:2]/attention/query/a",
        "decoder/layers[1:4:2]/attention/query/b",
    ]
    specs = model_specs(paired)
    assert described(specs) == [(str(path), x.shape, x.dtype.name) for path, x in tree.paths(paired.params)]


def test_equal_configs_hit_the_jit_cache(models):
    traces = []

    @jax.jit
    def run(model, tokens):
        traces.append(1)
        return model.logits(tokens)

    model = models["llama"]
    again = Config.from_dict(model.config.to_dict())
    numpy = Config(
        **{
            k: np.asarray(v)[()] if isinstance(v, int | float) else v
            for k, v in model.config.to_dict().items()
            if k != "config_version"
        }
    )
    copied = jax.tree.map(jnp.array, model.params)
    for config, params in ((model.config, model.params), (again, copied), (numpy, copied)):
        run(Model(config, params), TOKENS)
    rebuilt = Layers.of(list(copied.decoder.layers.stacks))
    run(Model(again, copied.replace(decoder=copied.decoder.replace(layers=rebuilt))), TOKENS)
    assert len(traces) == 1
    run(Model(again.replace(norm_eps=2e-5), copied), TOKENS)
    assert len(traces) == 2


@pytest.mark.slow
def test_init_draws_residual_outputs_smaller():
    """Radford et al. 2019: what writes to the residual stream is divided by sqrt(2 layers)."""
    model = transformer.init(CONFIGS["llama"], jax.random.key(0))
    block = model.params.decoder.layers.stacks[0][0]
    assert float(block.mlp.up.std()) == pytest.approx(0.2, rel=0.05)
    for w in (block.mlp.down, block.attention.out):
        assert float(w.std()) == pytest.approx(0.2 / 8**0.5, rel=0.05)
