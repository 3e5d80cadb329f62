"""Speculative decoding: greedy is greedy, draws have the target's exact distribution, rows go on each on its own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from scipy import stats

from lmx.core import specs
from lmx.core.errors import ConfigError, DataError
from lmx.core.sharding import use_mesh
from lmx.decode import generate
from lmx.decode.drafts import Draft, ModelDraft, PromptLookup
from lmx.decode.sampling import Sampling
from lmx.decode.speculative import speculate
from lmx.models.presets import preset
from lmx.models.transformer import init
from lmx.models.unigram import from_counts

PROMPTS = np.array([[3, 1, 4, 1, 3], [9, 2, 9, 0, 0], [5, 0, 0, 0, 0]])
LENGTHS = np.array([5, 3, 1])
KEY = jax.random.key(11)


def drafts(trigram):
    """A bad draft, the target itself, and the row's own tokens."""
    return [ModelDraft(trigram(1), 3), ModelDraft(trigram(), 4), PromptLookup(4, max_ngram=2)]


@pytest.mark.parametrize("which", range(3))
def test_greedy_equals_greedy_with_eos_and_stop_sequences(trigram, which):
    model, draft = trigram(), drafts(trigram)[which]
    free = np.asarray(generate(model, PROMPTS, lengths=LENGTHS, max_new_tokens=16).tokens)
    for ends in (dict(), dict(eos_id=int(free[0, 6]), stop=(tuple(free[1, 4:7].tolist()), (10, 10, 10)), pad_id=7)):
        options = dict(lengths=LENGTHS, max_new_tokens=16, **ends)
        wanted, made = generate(model, PROMPTS, **options), speculate(model, PROMPTS, draft=draft, **options)
        for name in ("tokens", "lengths"):
            np.testing.assert_array_equal(getattr(made, name), getattr(wanted, name))
        np.testing.assert_allclose(made.log_probs, wanted.log_probs, atol=1e-5)
    assert made.lengths.min() < 16  # something stopped


def test_what_a_perfect_draft_saves_is_counted(trigram):
    model = trigram()
    made = speculate(model, PROMPTS, lengths=LENGTHS, draft=ModelDraft(model, 4), max_new_tokens=16)
    np.testing.assert_array_equal(made.rounds, 4)  # 5 + 5 + 5 + 1
    np.testing.assert_array_equal(made.proposed, 16)
    np.testing.assert_array_equal(made.accepted, 4 + 4 + 4 + 1)
    alone = speculate(from_counts([1, 2, 3]), [[0]], draft=from_counts([3, 2, 1]), max_new_tokens=5)
    assert (alone.rounds[0], alone.proposed[0], alone.accepted[0]) == (5, 20, 0)


def test_a_ragged_batch_is_its_rows_alone_and_padding_is_never_seen(trigram):
    model, draft = trigram(), ModelDraft(trigram(1), 3)
    together = speculate(model, np.where(PROMPTS == 0, 8, PROMPTS), lengths=LENGTHS, draft=draft, max_new_tokens=9)
    for row, n in enumerate(LENGTHS):
        alone = speculate(model, PROMPTS[row : row + 1, :n], draft=draft, max_new_tokens=9)
        for name in alone._fields:
            np.testing.assert_allclose(getattr(together, name)[row], getattr(alone, name)[0], atol=1e-6)


def exact_of_three(model, exact, prompt, **options):
    """The probability of each of the v ** 3 continuations, from the definitions, in float64."""
    v = model.vocab_size
    p = np.zeros((v,) * 3)
    for a, b in itertools.product(range(v), repeat=2):
        text, chance = list(prompt), 1.0
        for token in (a, b, None):
            log_probs = model.log_probs(model.features(jnp.asarray(text)[None]))[0, -1]
            row = exact(np.asarray(log_probs), np.isin(np.arange(v), text), **options)
            if token is None:
                p[a, b] = chance * row
            else:
                chance, text = chance * row[token], [*text, token]
    return p.ravel()


@pytest.mark.slow
@pytest.mark.parametrize(
    "draft, options",
    [
        ("model", dict(temperature=1.0)),
        ("model", dict(temperature=0.9, top_k=4, top_p=0.9, repetition_penalty=1.3)),
        ("lookup", dict(temperature=1.2, min_p=0.02)),
        ("itself", dict(temperature=0.8)),
    ],
)
def test_draws_pass_a_chi_square_test_against_the_exact_distribution(trigram, exact, draft, options):
    model, rows, prompt = trigram(3, vocab_size=6), 12_000, [2, 5, 2]
    made = {"model": ModelDraft(trigram(4, vocab_size=6), 2), "lookup": PromptLookup(2), "itself": ModelDraft(model, 2)}
    got = speculate(model, np.tile(prompt, (rows, 1)), draft=made[draft], max_new_tokens=3, key=KEY, **options)
    drawn = np.bincount(np.asarray(got.tokens) @ [36, 6, 1], minlength=216)
    wanted = rows * exact_of_three(model, exact, prompt, **options)
    assert drawn[wanted == 0].sum() == 0
    common = wanted >= 5  # the test's own condition; the rare ones are one class together
    drawn, wanted = (np.append(x[common], x[~common].sum()) for x in (drawn, wanted))
    assert stats.chisquare(drawn[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3
    if draft != "itself":  # some are taken and some are not: both halves of the rule are at work
        assert 0.05 < got.accepted.sum() / got.proposed.sum() < 0.95


def test_prompt_lookup_finds_the_latest_of_the_longest():
    text = jnp.array([[1, 2, 3, 9, 2, 3, 8, 7, 2, 3, 0, 0], [4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0]])
    look = lambda n, **o: PromptLookup(3, **o).propose((), text, jnp.asarray(n), Sampling(), None)[0]  # noqa: E731
    found = look([10, 6])
    assert found.tokens[0].tolist() == [8, 7, 2] and found.count.tolist() == [3, 0]
    longest = look([6, 1])  # "2 3" after 1, not the 3 alone
    assert longest.tokens[0].tolist() == [9, 2, 3] and longest.count.tolist() == [3, 0]
    short = look([5, 3])  # ... 9 2: once before, followed by 3 9 2
    assert short.tokens[0].tolist() == [3, 9, 2]
    assert isinstance(PromptLookup(), Draft) and isinstance(ModelDraft(from_counts([1])), Draft)


@pytest.fixture(scope="module")
def pair():
    """A Transformer and a smaller one."""
    shape = dict(num_layers=1, vocab_size=60, initializer_range=0.3)
    return [init(preset("llama-tiny", hidden_size=d, **shape), jax.random.key(d)) for d in (32, 16)]


TOKENS = np.tile(np.random.default_rng(0).integers(0, 6, (2, 9)), (2, 1))  # few kinds: look-ups find something
OPTIONS = dict(lengths=np.array([9, 4, 9, 4]), max_new_tokens=6)


@pytest.mark.slow
def test_transformers_take_back_their_caches_row_by_row(pair):
    model, small = pair
    wanted = generate(model, TOKENS, **OPTIONS)
    for draft in (ModelDraft(small, 3), PromptLookup(3)):
        made = speculate(model, TOKENS, draft=draft, **OPTIONS)
        np.testing.assert_array_equal(made.tokens, wanted.tokens)
        np.testing.assert_allclose(made.log_probs, wanted.log_probs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind, explicit", [("model", True), ("model", False), ("lookup", True)])
def test_on_a_mesh_as_on_one_device(pair, kind, explicit):
    if jax.device_count() < 8:
        pytest.skip("needs 8 (simulated) devices")
    draft = lambda m: ModelDraft(m, 3) if kind == "model" else PromptLookup(3)  # noqa: E731
    options = dict(temperature=0.9, top_p=0.9, repetition_penalty=1.2, key=KEY, **OPTIONS)
    plain = speculate(pair[0], TOKENS, draft=draft(pair[1]), **options)
    with use_mesh("fsdp=4,tensor=2", explicit=explicit):
        split = [jax.device_put(m, specs.shardings(m.specs())) for m in pair]
        made = speculate(split[0], TOKENS, draft=draft(split[1]), **options)
    np.testing.assert_array_equal(made.tokens, plain.tokens)
    np.testing.assert_array_equal(made.accepted, plain.accepted)
    np.testing.assert_allclose(made.log_probs, plain.log_probs, atol=1e-4)


def test_inside_somebody_elses_jit(trigram):
    model, draft = trigram(), ModelDraft(trigram(1), 3)
    options = dict(max_new_tokens=5, temperature=0.7)
    call = lambda m, d, t, n, key: speculate(m, t, draft=d, lengths=n, key=key, **options).tokens  # noqa: E731
    inside = jax.jit(call)(model, draft, PROMPTS, LENGTHS, KEY)
    np.testing.assert_array_equal(inside, call(model, draft, PROMPTS, LENGTHS, KEY))


@struct.dataclass
class Forward:
    """A model that cannot rewind."""

    vocab_size: int = struct.field(pytree_node=False, default=11)

    def start(self, batch, length):
        return jnp.zeros((batch,), jnp.int32)

    def step(self, state, tokens):
        return jax.nn.log_softmax(jnp.zeros((*tokens.shape, self.vocab_size))), state + 1

    def rewind(self, state, lengths):
        raise NotImplementedError


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(draft=from_counts([1, 2])), ConfigError, "draft's vocabulary has 2 tokens, the model's 11: .*PromptLook"),
        (dict(draft=Forward()), ConfigError, "the draft, a Forward, cannot rewind, and speculative decoding"),
        (dict(model=Forward()), ConfigError, "the model, a Forward, cannot rewind"),
        (dict(draft=PromptLookup(0)), ConfigError, "num_tokens is 0; it must be a whole number, 1 or above"),
        (dict(temperature=1.0), ConfigError, "needs a key"),
        (dict(max_new_tokens=0), ConfigError, "max_new_tokens is 0"),
        (dict(tokens=[[11]]), DataError, "the prompt has the token id 11"),
        (dict(limit=9), ConfigError, "max_new_tokens=4 and 3 drafted beyond them makes 12, and this .* at most 9"),
    ],
)
def test_errors(trigram, change, error, message):
    limit = change.pop("limit", None)
    options = dict(model=trigram(max_length=limit), tokens=PROMPTS, draft=PromptLookup(4), max_new_tokens=4) | change
    with pytest.raises(error, match=message):
        speculate(options.pop("model"), options.pop("tokens"), **options)


def test_an_ngram_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="max_ngram is 0; it must be a whole number, 1 or above"):
        PromptLookup(max_ngram=0)
