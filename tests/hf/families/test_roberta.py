"""RoBERTa, against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx import hf
from lmx.core.errors import ConfigError
from lmx.hf.families import bert

FEW = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BASE = {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 20, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
FIELDS = st.fixed_dictionaries({
    "pad_token_id": st.sampled_from([0, 1, 2]),
    "type_vocab_size": st.sampled_from([1, 2]),
    "hidden_act": st.sampled_from(["gelu", "relu"]),  # the masked head has gelu all the same
})  # fmt: skip
HEADS = {
    "Model": {}, "ForSequenceClassification": {"num_labels": 3}, "ForTokenClassification": {"num_labels": 5},
    "ForQuestionAnswering": {},
}  # fmt: skip
WRONG = {
    "pad_token_id": 2, "hidden_act": "relu", "max_position_embeddings": 19, "type_vocab_size": 2, "layer_norm_eps": 0.1,
    "tie_word_embeddings": False,
}  # fmt: skip


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    model = parity("RobertaForMaskedLM", BASE | fields)
    assert model.config.position_offset == fields["pad_token_id"] + 1
    assert model.config.max_length == 20 - model.config.position_offset


@pytest.mark.parametrize("head", HEADS)
def test_heads(parity, head):
    parity(f"Roberta{head}", BASE | HEADS[head])


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("RobertaForMaskedLM", BASE, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("roberta", WRONG, set(bert.DEFAULTS))  # the others are BERT's
    defaults("roberta")


def test_a_bert_is_no_roberta(made, tmp_path):
    config = hf.FAMILIES["bert"].config({**BASE}, "BertForMaskedLM")
    with pytest.raises(ConfigError, match="position_offset 0"):
        hf.save(made(config), tmp_path / "model", format="hf", like="roberta")
