"""T5, in both its versions, and mT5, against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx import hf
from lmx.core.errors import LmxError

FEW = settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BASE = {
    "vocab_size": 37, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10,
}  # fmt: skip
ONE = {"feed_forward_proj": "relu"}
ONE_POINT_ONE = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "untied": True}
FROM_SCRATCH = ONE_POINT_ONE | {"untied": False}  # as transformers 5 makes them
FIELDS = st.fixed_dictionaries({
    "vocab_size": st.sampled_from([37, 64]),
    "d_kv": st.sampled_from([4, 8]),
    "num_layers": st.integers(1, 2),
    "num_decoder_layers": st.sampled_from([None, 1, 3]),
    "num_heads": st.sampled_from([1, 4]),
    "relative_attention_num_buckets": st.sampled_from([4, 8, 32]),
    "relative_attention_max_distance": st.sampled_from([9, 128]),
    "layer_norm_epsilon": st.sampled_from([1e-6, 1e-3]),
    "feed_forward_proj": st.sampled_from(["relu", "gelu", "gated-gelu", "gated-silu", "gated-relu"]),
    "tie_word_embeddings": st.booleans(),
    "untied": st.booleans(),
})  # fmt: skip
HEADS = (
    "T5Model", "T5EncoderModel", "T5ForTokenClassification", "T5ForQuestionAnswering", "T5ForSequenceClassification",
)  # fmt: skip
WRONG = {
    "vocab_size": 38, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 10, "relative_attention_max_distance": 5, "layer_norm_epsilon": 0.1,
    "feed_forward_proj": "gelu", "scale_decoder_outputs": False,
}  # fmt: skip


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("T5ForConditionalGeneration", BASE | fields)


@pytest.mark.parametrize("version", [ONE, ONE_POINT_ONE, FROM_SCRATCH], ids=["1.0", "1.1", "1.1 from scratch"])
def test_both_versions(parity, version):
    config = parity("T5ForConditionalGeneration", BASE | version).config
    assert config.tie_embeddings == (version is not ONE_POINT_ONE)
    assert config.logit_scale == (0.25 if version is ONE else 1.0)
    assert config.activation == ("relu" if version is ONE else "geglu_tanh")


@pytest.mark.parametrize("head", HEADS)
def test_heads(parity, head):
    labels = {"num_labels": 3, "eos_token_id": 2} if head.endswith("Classification") else {}
    parity(head, BASE | {"num_layers": 1} | labels)


def test_mt5(parity):
    config = parity("MT5ForConditionalGeneration", BASE | {"untied": True}).config
    assert (config.logit_scale, config.tie_embeddings) == (1.0, False)


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("T5ForConditionalGeneration", BASE, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    for family in ("t5", "mt5"):
        complete(family, WRONG, {"tie_word_embeddings"})  # it says whether logits are scaled, where nothing else does
        defaults(family)


def test_what_config_json_says_of_the_scale(torch_model):
    """Before transformers 5 whether the two are tied stood for it, and it still does where nothing else is said."""
    config = lambda **given: hf.FAMILIES["t5"].config(given, "T5ForConditionalGeneration")  # noqa: E731
    assert config().logit_scale == 512**-0.5 == config(tie_word_embeddings=True).logit_scale
    assert config(tie_word_embeddings=False).logit_scale == 1.0
    assert config(tie_word_embeddings=True, scale_decoder_outputs=False).logit_scale == 1.0
    with pytest.raises(LmxError, match="the activation 'gated-mish' is none of"):
        config(feed_forward_proj="gated-mish")
