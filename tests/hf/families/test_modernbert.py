"""ModernBERT, against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx import hf
from lmx.core.errors import ConfigError

FEW = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SPECIAL = dict.fromkeys(("cls_token_id", "sep_token_id")) | {"pad_token_id": 0}
# Windows reach from the padding to the tokens: where all that a row sees is padding, theirs is NaN.
BASE = SPECIAL | {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "local_attention": 8, "global_attn_every_n_layers": 2,
}  # fmt: skip
FIELDS = st.fixed_dictionaries({
    "num_hidden_layers": st.sampled_from([1, 2, 3]),
    "global_attn_every_n_layers": st.sampled_from([1, 2, 3]),
    "local_attention": st.sampled_from([8, 11, 40]),
    "norm_bias": st.booleans(),
    "attention_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "decoder_bias": st.booleans(),
    "classifier_bias": st.booleans(),
    "tie_word_embeddings": st.booleans(),
    "hidden_activation": st.sampled_from(["gelu", "silu"]),
    "classifier_activation": st.sampled_from(["gelu", "relu"]),
    "global_rope_theta": st.sampled_from([500.0, 160_000.0]),
})  # fmt: skip
HEADS = {
    "Model": {}, "ForSequenceClassification": {"num_labels": 3, "classifier_pooling": "mean"},
    "ForTokenClassification": {"num_labels": 5}, "ForQuestionAnswering": {"classifier_bias": True},
}  # fmt: skip
ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 90.0}}
WRONG = {
    "vocab_size": 38, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "norm_eps": 0.1,
    "hidden_activation": "silu", "norm_bias": True, "attention_bias": True, "mlp_bias": True, "decoder_bias": False,
    "classifier_bias": True, "classifier_activation": "relu", "tie_word_embeddings": False, "local_attention": 12,
    "layer_types": ["full_attention"] * 3, "rope_parameters": ROPE,
    "num_hidden_layers": 2,
}  # fmt: skip
OLDER = {"global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"}


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("ModernBertForMaskedLM", BASE | fields)


@pytest.mark.parametrize("head", HEADS)
def test_heads(parity, head):
    parity(f"ModernBert{head}", BASE | HEADS[head])


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("ModernBertForMaskedLM", BASE, field, WRONG[field])


def test_a_wrong_pool_is_noticed(wrong):
    wrong("ModernBertForSequenceClassification", BASE, "classifier_pooling", "mean")


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("modernbert", WRONG, OLDER | {"classifier_pooling"})
    defaults("modernbert")


def test_the_fields_of_version_4_say_the_same():
    family, name = hf.FAMILIES["modernbert"], "ModernBertForMaskedLM"
    older = {"num_hidden_layers": 4, "global_attn_every_n_layers": 2, "global_rope_theta": 9.0, "local_rope_theta": 5.0}
    kinds = ["full_attention", "sliding_attention"]
    newer = {"num_hidden_layers": 4, "layer_types": kinds * 2} | {
        "rope_parameters": {kind: {"rope_theta": theta} for kind, theta in zip(kinds, (9.0, 5.0), strict=True)}
    }
    config = family.config(older, name)
    assert config == family.config(newer, name)
    assert (config.rope_theta, config.rope_local_theta, config.window) == (9.0, 5.0, 65)
    assert {**older, **newer}.items() >= {k: v for k, v in family.write(config).items() if k in older}.items()


def test_stretched_positions_are_refused():
    rope = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}}
    with pytest.raises(ConfigError, match="'linear'.*'default'"):
        hf.FAMILIES["modernbert"].config({"rope_parameters": rope}, "ModernBertModel")
