"""DistilBERT, against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BASE = {"vocab_size": 37, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 20}
FIELDS = st.fixed_dictionaries({
    "vocab_size": st.sampled_from([37, 64]),
    "n_heads": st.sampled_from([1, 4]),
    "activation": st.sampled_from(["gelu", "relu"]),
    "tie_word_embeddings": st.booleans(),
})  # fmt: skip
HEADS = {
    "Model": {}, "ForSequenceClassification": {"num_labels": 3}, "ForTokenClassification": {"num_labels": 5},
    "ForQuestionAnswering": {},
}  # fmt: skip
WRONG = {
    "vocab_size": 38, "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "activation": "relu",
    "max_position_embeddings": 21, "tie_word_embeddings": False,
}  # fmt: skip


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("DistilBertForMaskedLM", BASE | fields)


@pytest.mark.parametrize("head", HEADS)
def test_heads(parity, head):
    parity(f"DistilBert{head}", BASE | HEADS[head])


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("DistilBertForMaskedLM", BASE, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("distilbert", WRONG)
    defaults("distilbert")
