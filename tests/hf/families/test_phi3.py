"""Phi-3, against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx import hf

FEW = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BASE = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "sliding_window": 5,
}  # fmt: skip


def stretched(original: int, part: float = 1.0, **more: float) -> dict:
    """LongRoPE for texts of up to 32 tokens; those of the tests have 12."""
    pairs = int(8 * part) // 2
    factors = {"short_factor": [1.0, 1.5, 2.0, 1.2][:pairs], "long_factor": [2.0, 3.0, 5.0, 1.7][:pairs]}
    rotary = {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": part, **factors, **more}
    return {"max_position_embeddings": 32, "original_max_position_embeddings": original, "rope_parameters": rotary}


FIELDS = st.fixed_dictionaries({
    "num_key_value_heads": st.sampled_from([1, 4, None]),
    "tie_word_embeddings": st.booleans(),
    "sliding_window": st.sampled_from([None, 1, 4, 30]),
})  # fmt: skip
ROTARY = st.sampled_from([
    {"partial_rotary_factor": 0.5}, stretched(8), stretched(16), stretched(16, 0.5, attention_factor=1.3),
])  # fmt: skip
LONG = BASE | stretched(8)
WRONG = {
    "vocab_size": 38, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "hidden_act": "gelu", "rms_norm_eps": 0.1, "tie_word_embeddings": True,
    "sliding_window": 6, "original_max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}  # fmt: skip


@FEW
@given(fields=FIELDS, rotary=ROTARY)
def test_parity(parity, fields, rotary):
    parity("Phi3ForCausalLM", BASE | fields | rotary)


def test_heads(parity):
    parity("Phi3ForTokenClassification", BASE | {"num_labels": 3})


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("Phi3ForCausalLM", LONG, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("phi3", WRONG)
    defaults("phi3")


def test_fields_of_version_4():
    transformers = pytest.importorskip("transformers")
    given = stretched(8)
    rotary = given.pop("rope_parameters")
    scaling = {"type": "longrope", "short_factor": rotary["short_factor"], "long_factor": rotary["long_factor"]}
    fields = BASE | given | {"rope_theta": 100.0, "rope_scaling": scaling}
    family = hf.FAMILIES["phi3"]
    config = family.config(fields, "Phi3ForCausalLM")
    assert dict(config.rope_scaling)["factor"] == 4.0
    for older in ("su", "yarn"):  # transformers no longer reads the first
        assert family.config(fields | {"rope_scaling": scaling | {"type": older}}, "Phi3ForCausalLM") == config
    newer = transformers.Phi3Config(**fields | {"rope_scaling": dict(scaling)}).to_dict()
    assert config == family.config(newer, "Phi3ForCausalLM")
    written = family.write(config)
    assert written["rope_scaling"] == scaling
    assert (written["max_position_embeddings"], written["original_max_position_embeddings"]) == (32, 8)
