"""Transformers: generation with the cache is what full forward passes give, ragged batches, scanned stacks
too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import reparam
from lmx.core import specs, tree
from lmx.core.errors import ConfigError
from lmx.core.kinds import OutputsFirst
from lmx.core.sharding import use_mesh
from lmx.decode import generate, generate_text, stream
from lmx.decode.rows import for_steps
from lmx.models.presets import preset
from lmx.models.stacks import unstack
from lmx.models.transformer import init, model_specs
from lmx.models.unigram import from_counts
from lmx.reparam.grams import sites

TINY = dict(num_layers=2, hidden_size=32, vocab_size=60, initializer_range=0.3)
KEY = jax.random.key(5)
LENGTHS = np.array([9, 4, 1])
NEW = 12


@functools.cache
def model_of(name):
    extra = dict(max_length=32) if name == "gpt2-tiny" else {}
    return init(preset(name, **TINY, **extra), jax.random.key(1))


def prompts():
    return np.random.default_rng(0).integers(0, 60, (3, 9))


@pytest.fixture(scope="module", params=["llama-tiny", "gpt2-tiny"])
def model(request):
    return model_of(request.param)


def greedy_by_full_passes(model, prompt, n):
    """Every token the argmax of a forward pass over the whole text so far, which no cache takes part in."""
    forward = jax.jit(
        lambda m, tokens: m.logits(tokens)
    )  # one shape: what is right of a token does not matter to it
    text = np.zeros((1, len(prompt) + n), np.int32)
    text[0, : len(prompt)] = prompt
    for at in range(len(prompt), text.shape[1]):
        text[0, at] = int(forward(model, jnp.asarray(text))[0, at - 1].argmax())
    return text[0, len(prompt) :]


def test_greedy_equals_full_passes_token_for_token(model):
    made = generate(model, prompts(), max_new_tokens=NEW)
    for row, prompt in enumerate(prompts()):
        np.testing.assert_array_equal(made.tokens[row], greedy_by_full_passes(model, prompt, NEW))


def test_greedy_equals_full_passes_in_a_ragged_batch(model):
    made = generate(model, prompts(), lengths=LENGTHS, max_new_tokens=NEW)
    for row, (prompt, n) in enumerate(zip(prompts(), LENGTHS, strict=True)):
        np.testing.assert_array_equal(made.tokens[row], greedy_by_full_passes(model, prompt[:n], NEW))


def test_log_probs_are_the_score_of_the_whole_text(model):
    made = generate(model, prompts(), max_new_tokens=NEW, temperature=1.0, top_p=0.9, key=KEY)
    whole = jnp.concatenate([prompts(), made.tokens], axis=1)
    np.testing.assert_allclose(made.log_probs, model.score(whole)[:, -NEW:], atol=2e-4)


@pytest.mark.parametrize(
    "options", [dict(), dict(temperature=0.9, top_k=20, repetition_penalty=1.2, key=KEY)]
)
def test_stream_yields_the_tokens_of_generate(model, options):
    arguments = dict(lengths=LENGTHS, max_new_tokens=NEW, **options)
    made = generate(model, prompts(), **arguments)
    np.testing.assert_array_equal(np.stack(list(stream(model, prompts(), **arguments)), axis=1), made.tokens)


@pytest.mark.slow
def test_few_rows_are_fed_to_matrices_that_have_their_outputs_first(model):
    """As the tests above do with three rows. What it is arranged into computes the same, factorized layers too."""
    count, head, layers = len(sites(model)), model.params.head.out is not None, model.config.num_layers
    small = reparam.factorize(model, keep=0.9, method="svd", form="two-factor", allocation="uniform")
    for given, matrices in ((model, count - 2 * layers), (small, 2 * count)):  # three plain matrices are joined
        arranged = for_steps(given, 3)
        is_turned = lambda x: isinstance(x, OutputsFirst)  # noqa: E731
        assert sum(map(is_turned, jax.tree.leaves(arranged, is_leaf=is_turned))) == matrices + head
        np.testing.assert_allclose(arranged.logits(prompts()), given.logits(prompts()), atol=2e-5)


def test_few_rows_are_multiplied_by_query_key_and_value_at_once(model):
    for rows, joins in ((1, True), (32, True), (33, False)):
        arranged = for_steps(model, rows)
        blocks = [block for (block,) in arranged.params.decoder.layers.stacks]
        assert [block.attention.joined is not None for block in blocks] == [joins] * len(blocks)
        np.testing.assert_allclose(arranged.logits(prompts()), model.logits(prompts()), atol=2e-5)
        shapes = jax.tree.map(lambda spec, x: spec.shape == x.shape, arranged.specs().params, arranged.params)
        assert all(jax.tree.leaves(shapes))
        assert jax.tree.structure(for_steps(arranged, rows)) == jax.tree.structure(arranged)
    mixed = model.replace(params=tree.map(lambda x: x.astype(jnp.bfloat16), model.params, "attention/value$"))
    assert all(block.attention.joined is None for (block,) in for_steps(mixed, 1).params.decoder.layers.stacks)
    lora = reparam.attach(model, "attention/key", rank=2, key=KEY)
    assert all(block.attention.joined is None for (block,) in for_steps(lora, 1).params.decoder.layers.stacks)
    with use_mesh("fsdp=8"):
        assert jax.tree.structure(for_steps(model, 1)) == jax.tree.structure(unstack(model))


@pytest.mark.parametrize("qk_norm", ["head", "full"])
def test_what_is_multiplied_at_once_is_normalised_apart(qk_norm):
    model = init(preset("llama-tiny", **TINY, qk_norm=qk_norm), jax.random.key(1))
    arranged = for_steps(model, 1)
    assert arranged.params.decoder.layers.stacks[0][0].attention.joined is not None
    np.testing.assert_allclose(arranged.logits(prompts()), model.logits(prompts()), atol=2e-5)


@pytest.mark.slow
def test_what_multiplies_a_memory_is_left_as_it_is():
    config = preset("llama-tiny", **TINY, architecture="encoder_decoder")
    given = init(config, jax.random.key(0)).given(jnp.arange(12).reshape(3, 4))
    block = for_steps(given, 3).model.params.decoder.layers.stacks[0][0]
    assert isinstance(block.cross.query, OutputsFirst) and not isinstance(block.cross.key, OutputsFirst)
    latent = reparam.share_latent(model_of("llama-tiny"), 16)
    block = for_steps(latent, 3).params.decoder.layers.stacks[0][0]
    assert isinstance(block.attention.latent, OutputsFirst) and not isinstance(block.attention.key, OutputsFirst)
    made = generate(latent, prompts(), max_new_tokens=4).tokens
    np.testing.assert_array_equal(made[0], greedy_by_full_passes(latent, prompts()[0], 4))
    low = init(preset("llama-tiny", **TINY, compute_dtype="bfloat16"), jax.random.key(0))
    assert jax.tree.structure(for_steps(low, 3)) == jax.tree.structure(unstack(low))


def test_learned_positions_limit_the_text():
    model = model_of("gpt2-tiny")
    with pytest.raises(
        ConfigError, match="9 tokens with max_new_tokens=24 makes 33, and this model reads at most 32"
    ):
        generate(model, prompts(), max_new_tokens=24)
    assert generate(model, prompts(), max_new_tokens=23).tokens.shape == (3, 23)


def test_padded_prompts_use_all_of_the_learned_positions():
    """A text prompt is padded to 32 columns, which with 23 new tokens is more than the model has
    positions."""

    class Letters:
        vocab_size, eos_id = 60, 0
        encode = staticmethod(lambda text: [ord(c) - 64 for c in text])
        decode = staticmethod(lambda ids: "".join(chr(i + 64) for i in ids))

    model = model_of("gpt2-tiny")
    (text,) = generate_text(model, Letters(), "ABCDEFGH", max_new_tokens=23)
    expected = greedy_by_full_passes(model, [0, *range(1, 9)], 23)
    end = np.flatnonzero(expected == 0)
    assert text == Letters.decode(expected[: end[0]] if end.size else expected)


def test_a_unigram_and_a_transformer_are_generated_from_alike():
    for model in (model_of("llama-tiny"), from_counts(np.ones(60))):
        made = generate(model, prompts(), lengths=LENGTHS, max_new_tokens=4, temperature=1.0, key=KEY)
        assert made.tokens.shape == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [True, False])
def test_on_a_mesh_as_on_one_device(model, explicit):
    if jax.device_count() < 8:
        pytest.skip("needs 8 (simulated) devices")
    tokens, lengths = np.tile(prompts()[:2], (2, 1)), np.tile(LENGTHS[:2], 2)
    options = dict(
        lengths=lengths, max_new_tokens=5, temperature=0.9, top_p=0.9, repetition_penalty=1.2, key=KEY
    )
    plain = generate(model, tokens, **options)
    with use_mesh("fsdp=4,tensor=2", explicit=explicit):
        split = jax.device_put(model.params, specs.shardings(model_specs(model)))
        sharded = generate(model.replace(params=split), tokens, **options)
    np.testing.assert_array_equal(sharded.tokens, plain.tokens)
    np.testing.assert_allclose(sharded.log_probs, plain.log_probs, atol=1e-4)


def test_the_prefill_makes_no_log_probabilities_that_nobody_asks_for(model):
    call = jax.jit(lambda m, t, n: generate(m, t, lengths=n, max_new_tokens=2).tokens)
    made = call.lower(model, jnp.zeros((3, 30), jnp.int32), LENGTHS).compile().as_text()
    assert "f32[3,29,32]" in made  # the prompt's (b, t, d)
    assert "f32[3,29,60]" not in made and "f32[87,60]" not in made  # but no (b, t, v)
