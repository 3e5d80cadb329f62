"""Gemma 2 and Gemma 3 (text), against transformers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx import hf
from lmx.core.errors import ConfigError

FEW = settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FULL, NEAR = "full_attention", "sliding_attention"
BASE = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12,
    "final_logit_softcapping": 4.0,
}  # fmt: skip
CAPPED = BASE | {"attn_logit_softcapping": 2.0}
ROTARY = {
    FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    NEAR: {"rope_type": "default", "rope_theta": 50.0},
}
BASES = {"2": CAPPED, "3": BASE | {"rope_parameters": ROTARY, "layer_types": [NEAR, FULL, NEAR]}}
FIELDS = st.fixed_dictionaries({
    "num_key_value_heads": st.sampled_from([1, 4]),
    "head_dim": st.sampled_from([6, 12]),
    "tie_word_embeddings": st.booleans(),
    "attention_bias": st.booleans(),
    "hidden_activation": st.sampled_from(["gelu_pytorch_tanh", "silu"]),
    "sliding_window": st.sampled_from([1, 4, 30]),
    "layer_types": st.sampled_from([None, [FULL] * 3, [NEAR] * 3, [NEAR, FULL, FULL]]),
    "final_logit_softcapping": st.sampled_from([None, 3.0]),
})  # fmt: skip
CAP = st.sampled_from([None, 3.0])
WRONG = {
    "vocab_size": 38, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 4, "hidden_activation": "relu", "rms_norm_eps": 0.1,
    "tie_word_embeddings": False, "attention_bias": True, "query_pre_attn_scalar": 8, "sliding_window": 6,
    "layer_types": [FULL, NEAR, FULL], "final_logit_softcapping": None, "use_bidirectional_attention": True,
}  # fmt: skip
TURNED = {"rope_type": "default", "rope_theta": 9.0}
WRONGS = {
    "2": WRONG | {"attn_logit_softcapping": None, "rope_parameters": TURNED},
    "3": {  # what it does not read by the function of Gemma 2
        "sliding_window": 6, "layer_types": [FULL, NEAR, FULL], "use_bidirectional_attention": True,
        "attn_logit_softcapping": 2.0, "rope_parameters": ROTARY | {NEAR: TURNED},
    },
}  # fmt: skip
# Fields of version 4, which only count where those of version 5 are missing: see test_fields_of_version_4.
OLDER = {"rope_local_base_freq", "sliding_window_pattern"}


@FEW
@given(fields=FIELDS, cap=CAP)
def test_parity_of_gemma_2(parity, fields, cap):
    parity("Gemma2ForCausalLM", CAPPED | fields | {"attn_logit_softcapping": cap})


@FEW
@given(fields=FIELDS, scaled=st.booleans())
def test_parity_of_gemma_3(parity, fields, scaled):
    parity("Gemma3ForCausalLM", BASE | fields | ({"rope_parameters": ROTARY} if scaled else {}))


@pytest.mark.parametrize("name", ["Gemma2ForTokenClassification", "Gemma3TextForSequenceClassification"])
def test_heads(parity, name):
    parity(name, BASES[name[5]] | {"num_labels": 3})


@pytest.mark.parametrize(("version", "field"), [(version, field) for version in WRONGS for field in WRONGS[version]])
def test_a_wrong_field_is_noticed(wrong, version, field):
    wrong(f"Gemma{version}ForCausalLM", BASES[version], field, WRONGS[version][field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("gemma2", WRONGS["2"])
    complete("gemma3_text", WRONG | WRONGS["3"], OLDER)
    defaults("gemma2"), defaults("gemma3_text")


def test_fields_of_version_4():
    transformers = pytest.importorskip("transformers")
    older = BASE | {
        "rope_theta": 500.0, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    }  # fmt: skip
    newer = transformers.Gemma3TextConfig(**older).to_dict()
    family = hf.FAMILIES["gemma3_text"]
    config = family.config(older, "Gemma3ForCausalLM")
    assert config == family.config(newer, "Gemma3ForCausalLM")
    assert (config.rope_theta, config.rope_local_theta, config.layer_pattern) == (500.0, 50.0, ("local", "global"))


def test_windows_that_stretch_are_refused():
    stretched = {"rope_parameters": ROTARY | {NEAR: ROTARY[FULL]}}
    with pytest.raises(ConfigError, match="stretch sliding_attention by 'linear'"):
        hf.FAMILIES["gemma3_text"].config(stretched, "Gemma3ForCausalLM")
