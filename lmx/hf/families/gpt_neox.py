"""GPT-NeoX and Pythia (Black et al. 2022; Biderman et al. 2023): attention and feed-forward layer side by side, a part
of each head rotated, and each head's query, key and value together in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf import rope
from lmx.hf.families import llama
from lmx.hf.families.gpt2 import ACTIVATIONS
from lmx.hf.family import Class, Family
from lmx.hf.tables import copy, embedding, ignored, linear, norm, within
from lmx.models.config import Config

DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
    "rotary_emb_base": 10_000.0,
    "rotary_pct": 0.25,
    "rope_parameters": None,
    "rope_scaling": None,
}
TABLE = (
    embedding("gpt_neox.embed_in", "embed/tokens"),
    within(
        "gpt_neox.layers.{i}.", "decoder/layers/",
        norm("input_layernorm", "attention_norm"),
        linear("attention.query_key_value", "attention/query", "attention/key", "attention/value", per_head=True),
        linear("attention.dense", "attention/out"),
        norm("post_attention_layernorm", "mlp_norm"),
        linear("mlp.dense_h_to_4h", "mlp/up"),
        linear("mlp.dense_4h_to_h", "mlp/down"),
        ignored(r"attention\.((masked_)?bias|rotary_emb\.inv_freq)"),  # the causal mask and angles, in old files
    ),
    norm("gpt_neox.final_layer_norm", "decoder/norm"),
)  # fmt: skip


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    head_dim, bias = v["hidden_size"] // v["num_attention_heads"], v["attention_bias"]
    rotary = {**v, "rope_theta": v["rotary_emb_base"], "partial_rotary_factor": v["rotary_pct"]}
    return {
        "vocab_size": v["vocab_size"],
        "num_layers": v["num_hidden_layers"],
        "hidden_size": v["hidden_size"],
        "num_heads": v["num_attention_heads"],
        "intermediate_size": v["intermediate_size"],
        "activation": llama.activation(v["hidden_act"], ACTIVATIONS),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": v["layer_norm_eps"],
        "parallel_residual": v["use_parallel_residual"],
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": True,
        "tie_embeddings": v["tie_word_embeddings"],
        "initializer_range": v["initializer_range"],
        **rope.read(rotary, head_dim=head_dim),
    }


def _write(c: Config) -> dict[str, Any]:
    rotary = rope.write(c)
    part = rotary.pop("partial_rotary_factor", 1.0)
    rotary["rope_parameters"]["partial_rotary_factor"] = part
    return {
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.hidden_size,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.intermediate_size,
        "hidden_act": llama.activation_name(c.activation, ACTIVATIONS),
        "layer_norm_eps": c.norm_eps,
        "use_parallel_residual": c.parallel_residual,
        "attention_bias": c.attention_bias,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.initializer_range,
        "rotary_emb_base": rotary.pop("rope_theta"),
        "rotary_pct": part,
        **rotary,
    }


FAMILY = Family(
    model_type="gpt_neox",
    classes={
        "GPTNeoXForCausalLM": Class(
            "lm", (linear("embed_out", "head/out"), copy("embed_out.weight", "gpt_neox.embed_in.weight"))
        ),
        "GPTNeoXModel": Class("none"),
        "GPTNeoXForSequenceClassification": Class("sequence", llama.SCORE, {"pool": "last"}),
        "GPTNeoXForTokenClassification": Class("tokens", linear("classifier", "head/out"), {"head_bias": True}),
        "GPTNeoXForQuestionAnswering": Class("spans", linear("qa_outputs", "head/out"), {"head_bias": True}),
    },
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=TABLE,
    prefix="gpt_neox.",
    renames=((r"^lm_head\.", "embed_out."),),  # as version 5 of transformers calls it; it reads either
)
