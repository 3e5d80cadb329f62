"""GPT-2 (Radford et al. 2019): weights stored (inputs, outputs), query, key and value in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families.llama import activation, activation_name
from lmx.hf.family import Class, Family
from lmx.hf.tables import conv1d, copy, embedding, ignored, linear, norm, within
from lmx.models.config import Config

ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh",
}  # fmt: skip
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}
TABLE = (
    embedding("transformer.wte", "embed/tokens"),
    embedding("transformer.wpe", "embed/positions"),
    within(
        "transformer.h.{i}.", "decoder/layers/",
        norm("ln_1", "attention_norm"),
        conv1d("attn.c_attn", "attention/query", "attention/key", "attention/value"),
        conv1d("attn.c_proj", "attention/out"),
        norm("ln_2", "mlp_norm"),
        conv1d("mlp.c_fc", "mlp/up"),
        conv1d("mlp.c_proj", "mlp/down"),
        ignored(r"attn\.(masked_)?bias"),  # the causal mask, which old files hold
    ),
    norm("transformer.ln_f", "decoder/norm"),
)  # fmt: skip


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": v["vocab_size"],
        "num_layers": v["n_layer"],
        "hidden_size": v["n_embd"],
        "num_heads": v["n_head"],
        "intermediate_size": v["n_inner"] or 4 * v["n_embd"],
        "activation": activation(v["activation_function"], ACTIVATIONS),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": v["layer_norm_epsilon"],
        "position": "learned",
        "max_length": v["n_positions"],
        "attention_bias": True,
        "attention_out_bias": True,
        "attention_scale": None if v["scale_attn_weights"] else 1.0,
        "mlp_bias": True,
        "tie_embeddings": v["tie_word_embeddings"],
        "initializer_range": v["initializer_range"],
    }


def _write(c: Config) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_layer": c.num_layers,
        "n_embd": c.hidden_size,
        "n_head": c.num_heads,
        "n_inner": c.intermediate_size,
        "activation_function": activation_name(c.activation, ACTIVATIONS),
        "layer_norm_epsilon": c.norm_eps,
        "n_positions": c.max_length,
        "scale_attn_weights": c.attention_scale is None,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.initializer_range,
    }


FAMILY = Family(
    model_type="gpt2",
    classes={
        "GPT2LMHeadModel": Class(
            "lm", (linear("lm_head", "head/out"), copy("lm_head.weight", "transformer.wte.weight"))
        ),
        "GPT2Model": Class("none"),
        "GPT2ForSequenceClassification": Class("sequence", linear("score", "head/out"), {"pool": "last"}),
        "GPT2ForTokenClassification": Class("tokens", linear("classifier", "head/out"), {"head_bias": True}),
        "GPT2ForQuestionAnswering": Class("spans", linear("qa_outputs", "head/out"), {"head_bias": True}),
    },
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=TABLE,
    fixed={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    prefix="transformer.",
)
