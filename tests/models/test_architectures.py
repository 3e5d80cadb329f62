"""Encoders, encoder-decoders and unlike layers: the same laws as for decoders. Families are checked in tests/hf."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core import sharding, specs, tree
from lmx.core.errors import ConfigError
from lmx.models import forward, stacks, transformer
from lmx.models.config import Config
from lmx.models.protocol import LanguageModel
from lmx.models.transformer import Model, model_specs

SHAPE = dict(vocab_size=53, num_layers=2, hidden_size=16, num_heads=4, intermediate_size=24, initializer_range=0.3)
GEMMA = dict(
    num_kv_heads=2, norm_offset=True, norm_placement="both", embedding_scale=4.0, window=4, logit_softcap=3.0,
    layer_pattern=("local", "local", "global"), rope_local_theta=100.0, qk_norm="head", attention_softcap=5.0,
    rope_scaling=(("rope_type", "linear"), ("factor", 8.0)),
)  # fmt: skip
BERT = dict(
    architecture="encoder", norm="layernorm", norm_bias=True, norm_placement="post", position="learned", max_length=16,
    position_offset=2, type_vocab_size=2, embedding_norm=True, activation="gelu", mlp_bias=True, attention_bias=True,
    embedding_size=8, layer_repeats=2, head_activation="gelu", head_norm=True, head_bias=True,
)  # fmt: skip
T5 = dict(architecture="encoder_decoder", num_encoder_layers=2, position="relative", relative_buckets=8,
          attention_scale=1.0, logit_scale=0.25, activation="reglu")  # fmt: skip
BART = BERT | dict(architecture="encoder_decoder", type_vocab_size=0, embedding_size=None, layer_repeats=1,
                   head_activation=None, head_norm=False, num_encoder_layers=3)  # fmt: skip
CONFIGS = {
    "gemma": Config(**(SHAPE | dict(num_layers=4)), **GEMMA),
    "neox": Config(**SHAPE, parallel_residual=True, rotary_dim=2, norm="layernorm", norm_bias=True),
    "olmo": Config(**SHAPE, norm_placement="output", qk_norm="full", layer_pattern=("global", "unrotated")),
    "shared": Config(**SHAPE, layer_repeats=2, position="sinusoidal"),
    "bert": Config(**SHAPE, **BERT),
    "modernbert": Config(
        **(SHAPE | dict(num_layers=3)), architecture="encoder", first_attention_norm=False,
        layer_pattern=("global", "local"), window=3,
    ),
    "t5": Config(**SHAPE, **T5),
    "bart": Config(**SHAPE, **BART),
}
DECODERS = [name for name, config in CONFIGS.items() if config.architecture == "decoder"]
ENCODERS = [name for name, config in CONFIGS.items() if config.architecture == "encoder"]
BOTH = [name for name, config in CONFIGS.items() if config.architecture == "encoder_decoder"]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 53, (4, 12)), jnp.int32)
SOURCE = jnp.asarray(np.random.default_rng(1).integers(1, 53, (4, 9)), jnp.int32)
REAL = jnp.asarray(np.arange(9) < np.array([[9], [4], [7], [1]]), jnp.int32)
CLOSE = dict(rtol=1e-5, atol=5e-5)  # float32 sums in another order, through up to eight layers


def make(config: Config) -> Model:
    """A model whose norms and biases differ from 1 and 0, where a mistake would not show. Nothing is compiled."""
    rng = np.random.default_rng(0)

    def draw(spec):
        middle, spread = (0.0, spec.init) if isinstance(spec.init, float) else (spec.init == "ones", 0.2)
        return jnp.asarray(rng.normal(middle, spread, spec.shape).astype(np.float32))

    return Model(config, jax.tree.map(draw, transformer.abstract(config)))


@pytest.fixture(scope="module")
def models():
    return {name: make(config) for name, config in CONFIGS.items()}


@jax.jit
def logits(model, tokens, **given):
    return model.logits(tokens, **given)


def source(name) -> dict:
    return {} if name not in BOTH else {"encoder_tokens": SOURCE, "encoder_segment_ids": REAL}


@jax.jit
def step(model, state, tokens):
    return model.step(state, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS + BOTH)
def test_steps_equal_the_whole(models, name):
    model = models[name]
    wanted = jax.nn.log_softmax(logits(model, TOKENS, **source(name)))
    speaker = model.given(SOURCE, REAL) if name in BOTH else model
    assert isinstance(speaker, LanguageModel)
    np.testing.assert_allclose(jax.nn.log_softmax(speaker.logits(TOKENS)), wanted, **CLOSE)
    state, rows = speaker.start(4, 14), []
    for first, last in ((0, 11), (11, 12)):
        log_probs, state = step(speaker, state, TOKENS[:, first:last])
        rows.append(log_probs)
    np.testing.assert_allclose(jnp.concatenate(rows, 1), wanted, **CLOSE)
    assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(state))
    state = speaker.rewind(state, jnp.array([3, 9, 5, 11]))  # rows that stand at unlike places
    log_probs, _ = step(speaker, state, jnp.stack([TOKENS[b, n : n + 1] for b, n in enumerate((3, 9, 5, 11))]))
    for b, n in enumerate((3, 9, 5, 11)):
        np.testing.assert_allclose(log_probs[b, 0], wanted[b, n], **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_each_position_sees(models, name):
    """A token in the middle is changed: decoders change from there on, encoders everywhere near."""
    changed = TOKENS.at[:, 6].set(TOKENS[:, 6] % 52 + 1)
    of = lambda tokens, **given: np.asarray(logits(models[name], tokens, **(source(name) | given)))  # noqa: E731
    moved = np.abs(of(TOKENS) - of(changed))
    moved = moved.max((0, 2)) > 0
    assert moved[6:].all() and moved[:6].all() == (name in ENCODERS) and (name in ENCODERS or not moved[:6].any())
    if name in BOTH:
        other = SOURCE.at[:, 0].set(SOURCE[:, 0] % 52 + 1)
        assert (of(TOKENS, encoder_tokens=other) != of(TOKENS)).any(2).all()
        hidden = jnp.where(REAL == 1, SOURCE, 7)  # another padding
        np.testing.assert_array_equal(of(TOKENS, encoder_tokens=hidden), of(TOKENS))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_segments_equal_separate_rows(models, name):
    ids = jnp.array([[1] * 5 + [2] * 4 + [0] * 3] * 4)
    pieces = [(0, 5), (5, 9)]
    given = {}
    if name in BOTH:
        given = {"encoder_tokens": SOURCE, "encoder_segment_ids": jnp.array([[1] * 3 + [2] * 4 + [0] * 2] * 4)}
    packed = logits(models[name], TOKENS, segment_ids=ids, **given)
    for (first, last), part in zip(pieces, (slice(0, 3), slice(3, 7)), strict=True):
        alone = {"encoder_tokens": SOURCE[:, part]} if name in BOTH else {}
        np.testing.assert_allclose(packed[:, first:last], logits(models[name], TOKENS[:, first:last], **alone), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "explicit"), [*((name, True) for name in CONFIGS), ("gemma", False), ("bart", False)])
def test_sharded_equals_unsharded(models, name, explicit):
    """The whole and the first step of decoding in one program, on eight devices."""
    model, ones = models[name], jnp.ones_like(TOKENS)
    wanted = logits(model, TOKENS, segment_ids=ones, **source(name))

    @jax.jit
    def both(model, tokens, ones, given):
        whole = model.logits(tokens, segment_ids=ones, **given)
        if name in ENCODERS:
            return whole, jax.nn.log_softmax(whole)
        speaker = model.given(given["encoder_tokens"], given["encoder_segment_ids"]) if given else model
        return whole, speaker.step(speaker.start(4, 12), tokens)[0]

    with sharding.use_mesh("fsdp=2,tensor=4", explicit=explicit) as mesh:
        placed = jax.device_put(model, specs.shardings(model.specs()))
        rows = jax.NamedSharding(mesh, jax.P("fsdp"))
        whole, first = both(placed, *jax.device_put((TOKENS, ones, source(name)), rows))
    np.testing.assert_allclose(whole, wanted, **CLOSE)
    np.testing.assert_allclose(first, jax.nn.log_softmax(wanted), **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_specs_and_stacks(models, name):
    model = models[name]
    same = lambda specs: [(str(p), s.shape) for p, s in tree.paths(specs)]  # noqa: E731
    assert same(model_specs(model)) == same(transformer.abstract(model.config)) == same(model.params)
    alone = stacks.unstack(model)
    np.testing.assert_allclose(
        logits(alone, TOKENS, **source(name)), logits(model, TOKENS, **source(name)), **CLOSE
    )
    assert jax.tree.structure(model_specs(alone)) == jax.tree.structure(alone.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma", "bert", "bart"])
def test_gradients_reach_every_parameter(models, name):
    loss = lambda model: jnp.square(model.logits(TOKENS, **source(name))).mean()  # noqa: E731
    unused = "types" if name == "bert" else "^$"  # the second type is nobody's
    for path, g in tree.paths(jax.jit(jax.grad(loss))(models[name])):
        assert jnp.isfinite(g).all() and (jnp.abs(g).max() > 0 or unused in str(path)), path


def test_layers_follow_the_pattern(models):
    kinds = [b.kind for b in stacks.layer_list(models["gemma"].params.decoder.layers)]
    assert kinds == ["local", "local", "global", "local"]
    assert models["gemma"].params.decoder.layers.sizes == (1, 1)  # one period, and what is left over
    first = models["modernbert"].params.encoder.layers
    assert first.sizes == (1, 1) and stacks.layer_list(first)[0].attention_norm is None
    cut = transformer.abstract(CONFIGS["gemma"].replace(num_layers=8)).decoder.layers
    assert cut.sizes == (2, 1) and [len(period) for period in cut.stacks] == [3, 2]


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        (dict(head="sequence", num_labels=3, pool="last"), (4, 3)),
        (dict(head="sequence", num_labels=2, head_activation="tanh", head_bias=True), (4, 2)),
        (dict(head="tokens", num_labels=5), (4, 12, 5)),
        (dict(head="spans"), (4, 12, 2)),
        (dict(head="pooled", head_activation="tanh"), (4, 16)),
    ],
)
def test_heads_give_their_shapes(changes, shape):
    model = make(Config(**SHAPE, architecture="encoder", **changes))
    padded = jnp.where(jnp.arange(12) < 8, 1, 0) * jnp.ones_like(TOKENS)
    got = model.logits(TOKENS, segment_ids=padded)
    assert got.shape == shape and got.dtype == jnp.float32
    alone = model.logits(TOKENS[:, :8])
    np.testing.assert_allclose(got if got.ndim == 2 else got[:, :8], alone, **CLOSE)


def test_what_a_model_cannot_do(models):
    with pytest.raises(ConfigError, match="an encoder: it sees whole texts and has no next token to give or score"):
        models["bert"].start(1, 4)
    with pytest.raises(ConfigError, match="no next token to give or score"):
        models["bert"].score(TOKENS)
    with pytest.raises(ConfigError, match=r"use model.given\(encoder_tokens\)"):
        models["t5"].start(1, 4)
    with pytest.raises(ConfigError, match="'encoder_decoder': an encoder_decoder needs encoder_tokens="):
        models["t5"].logits(TOKENS)
    with pytest.raises(ConfigError, match="'decoder': encoder_tokens= are for"):
        models["neox"].logits(TOKENS, encoder_tokens=SOURCE)
    with pytest.raises(ConfigError, match="given\\(\\) is for encoder-decoders, and this model is of 'encoder'"):
        models["bert"].given(SOURCE)
    with pytest.raises(ConfigError, match="3 rows are to be decoded and 4 sources were given"):
        models["t5"].given(SOURCE).start(3, 4)
    with pytest.raises(ConfigError, match="this model has no token types; leave out types="):
        models["neox"].features(TOKENS, types=TOKENS)
    bare = make(CONFIGS["bert"].replace(head="none", head_activation=None, head_norm=False))
    with pytest.raises(ConfigError, match="no head to give logits; use lmx.encode"):
        bare.logits(TOKENS)
    assert bare.features(TOKENS).shape == (4, 12, 16)
    labels = make(Config(**SHAPE, head="sequence", num_labels=2))
    both = make(CONFIGS["bart"].replace(head="sequence", num_labels=2)).given(SOURCE, REAL)
    for speak in (lambda: labels.start(1, 4), lambda: both.start(4, 4), lambda: both.score(TOKENS)):
        with pytest.raises(ConfigError, match="a head of kind 'sequence', which gives no next token"):
            speak()


def test_the_facade_reads_every_head(models):
    """The facade compiles the whole, the methods run op by op: sums of float32 in another order."""
    given = {"encoder_tokens": SOURCE, "encoder_segment_ids": REAL}
    wanted = models["bart"].logits(TOKENS, **given)
    np.testing.assert_allclose(forward.logits(models["bart"], TOKENS, **given), wanted, **CLOSE)
    wanted = models["bert"].features(TOKENS, types=TOKENS % 2)
    np.testing.assert_allclose(forward.encode(models["bert"], TOKENS, types=TOKENS % 2), wanted, **CLOSE)
    labels = make(Config(**SHAPE, head="sequence", num_labels=3, pool="last"))
    ids = jnp.asarray(np.arange(12) < np.array([[12], [4], [7], [1]]), jnp.int32)
    wanted = labels.logits(TOKENS, segment_ids=ids)
    np.testing.assert_allclose(forward.logits(labels, TOKENS, segment_ids=ids), wanted, **CLOSE)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([[1, 2, 3]], "tokens are a list; .* an array of token ids"),
        (np.arange(3), r"tokens are int\w* of shape \(3,\); .* for one row tokens\[None\]"),
        (np.ones((1, 3), np.float32), r"tokens are float32 of shape \(1, 3\)"),
    ],
)
def test_the_facade_takes_rows_of_ids(models, tokens, said):
    for call in (forward.logits, forward.encode):
        with pytest.raises(ConfigError, match=said):
            call(models["neox"], tokens)
