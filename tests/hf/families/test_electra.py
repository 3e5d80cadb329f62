"""ELECTRA, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx import hf
from lmx.hf.families import bert

FEW = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BASE = {
    "vocab_size": 37, "embedding_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 20, "hidden_act": "relu",
}  # fmt: skip
FIELDS = st.fixed_dictionaries({
    "embedding_size": st.sampled_from([8, 16, 20]),
    "tie_word_embeddings": st.booleans(),
    "hidden_act": st.sampled_from(["gelu", "relu"]),
})  # fmt: skip
HEADS = {
    "Model": {}, "ForSequenceClassification": {"num_labels": 3}, "ForTokenClassification": {"num_labels": 5},
    "ForQuestionAnswering": {},
}  # fmt: skip
WRONG = {"embedding_size": 16, "tie_word_embeddings": False, "hidden_act": "gelu", "layer_norm_eps": 0.1}


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("ElectraForMaskedLM", BASE | fields)


@pytest.mark.parametrize("head", HEADS)
def test_heads(parity, head):
    parity(f"Electra{head}", BASE | HEADS[head])


def test_the_discriminator(torch_model, tmp_path):
    """One logit a token: whether it was replaced."""
    theirs = torch_model("ElectraForPreTraining", BASE)
    model = hf.load(theirs.save(tmp_path / "theirs"))
    tokens = np.arange(24).reshape(2, 12)
    _, end = theirs.answer({"input_ids": tokens})
    np.testing.assert_allclose(model.logits(tokens)[..., 0], end, atol=2e-5)
    hf.save(model, tmp_path / "ours", format="hf", like="electra")
    assert theirs.same_tensors(theirs.again(tmp_path / "ours"))


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("ElectraForMaskedLM", BASE, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("electra", WRONG, set(bert.DEFAULTS))  # the others are BERT's
    defaults("electra")
