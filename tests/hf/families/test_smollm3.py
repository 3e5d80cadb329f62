"""SmolLM3, against transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx import hf

FEW = settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FULL, NEAR = "full_attention", "sliding_attention"
BASE = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "use_sliding_window": True, "sliding_window": 4,
    "no_rope_layers": [1, 0, 1], "layer_types": [NEAR, NEAR, FULL],
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip
FIELDS = st.fixed_dictionaries({
    "num_key_value_heads": st.sampled_from([1, 4]),
    "tie_word_embeddings": st.booleans(),
    "attention_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "no_rope_layers": st.sampled_from([None, [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
    "layer_types": st.sampled_from([None, [FULL, NEAR, NEAR]]),
    "sliding_window": st.sampled_from([1, 30]),
})  # fmt: skip
WRONG = {
    "vocab_size": 38, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "hidden_act": "gelu", "rms_norm_eps": 0.1, "tie_word_embeddings": False,
    "attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
    "sliding_window": 5, "no_rope_layers": [1, 1, 0], "layer_types": [NEAR, FULL, FULL],
}  # fmt: skip
# How layer_types and no_rope_layers come about where they are not given, as they always are in files.
MADE = {"use_sliding_window", "no_rope_layer_interval"}


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("SmolLM3ForCausalLM", BASE | fields)


def test_decoding_sees_what_the_kinds_say(parity):
    model = parity("SmolLM3ForCausalLM", BASE)
    assert model.config.layer_pattern == ("local", "local_unrotated", "global")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, 9)), jnp.int32)

    def both(model, tokens):
        first, state = model.step(model.start(2, 9), tokens[:, :6])
        rest, _ = model.step(state, tokens[:, 6:])
        return jnp.concatenate([first, rest], axis=1), model.log_probs(model.features(tokens))

    few = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    decoded, wanted = jax.jit(both).lower(model, tokens).compile(compiler_options=few)(model, tokens)
    np.testing.assert_allclose(decoded, wanted, atol=2e-5)


def test_heads(parity):
    parity("SmolLM3ForQuestionAnswering", BASE)


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("SmolLM3ForCausalLM", BASE, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("smollm3", WRONG, MADE)
    defaults("smollm3")


def test_layers_that_no_field_names():
    transformers = pytest.importorskip("transformers")
    family = hf.FAMILIES["smollm3"]
    fields = {"num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 3}
    config = family.config(fields, "SmolLM3ForCausalLM")
    assert config.layer_pattern == ("global", "global", "local_unrotated")
    assert config == family.config(transformers.SmolLM3Config(**fields).to_dict(), "SmolLM3ForCausalLM")
