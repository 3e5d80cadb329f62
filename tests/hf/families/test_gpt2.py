"""GPT-2, against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BASE = {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20}
FIELDS = st.fixed_dictionaries({
    "vocab_size": st.sampled_from([37, 64]),
    "n_layer": st.integers(1, 3),
    "n_head": st.sampled_from([1, 2, 4]),
    "n_inner": st.sampled_from([None, 24]),
    "n_positions": st.sampled_from([12, 20]),
    "activation_function": st.sampled_from(["gelu_new", "gelu", "relu", "silu", "tanh"]),
    "layer_norm_epsilon": st.sampled_from([1e-5, 1e-3]),
    "scale_attn_weights": st.booleans(),
    "tie_word_embeddings": st.booleans(),
})  # fmt: skip
HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
WRONG = {
    "vocab_size": 38, "n_positions": 21, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_inner": 24,
    "activation_function": "relu", "layer_norm_epsilon": 0.1, "scale_attn_weights": False,
    "tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True,
}  # fmt: skip


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("GPT2LMHeadModel", BASE | fields)


@pytest.mark.parametrize("head", HEADS)
def test_heads(parity, head):
    labels = {} if head in ("Model", "ForQuestionAnswering") else {"num_labels": 3}
    parity(f"GPT2{head}", BASE | labels)


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("GPT2LMHeadModel", BASE, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("gpt2", WRONG)
    defaults("gpt2")
