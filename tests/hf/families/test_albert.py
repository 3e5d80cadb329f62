"""ALBERT, against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx.hf.families import bert

FEW = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BASE = {
    "vocab_size": 37, "embedding_size": 12, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 20,
}  # fmt: skip
FIELDS = st.fixed_dictionaries({
    "num_hidden_groups": st.sampled_from([1, 2, 3]),
    "num_hidden_layers": st.just(6),
    "embedding_size": st.sampled_from([8, 16]),  # projected even where it is the hidden size
    "hidden_act": st.sampled_from(["gelu", "gelu_new"]),
})  # fmt: skip
HEADS = {
    "Model": {}, "ForSequenceClassification": {"num_labels": 3}, "ForTokenClassification": {"num_labels": 5},
    "ForQuestionAnswering": {},
}  # fmt: skip
WRONG = {
    "embedding_size": 16, "num_hidden_layers": 2, "num_hidden_groups": 3, "inner_group_num": 2, "hidden_act": "relu",
    "tie_word_embeddings": False,
}  # fmt: skip


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("AlbertForMaskedLM", BASE | fields)


@pytest.mark.parametrize("head", HEADS)
def test_heads(parity, head):
    model = parity(f"Albert{head}", BASE | HEADS[head])
    assert (model.config.num_layers, model.config.layer_repeats) == (1, 3)


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("AlbertForMaskedLM", BASE, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("albert", WRONG, set(bert.DEFAULTS))  # the others are BERT's
    defaults("albert")
