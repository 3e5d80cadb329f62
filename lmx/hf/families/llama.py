"""Llama (Touvron et al. 2023; Grattafiori et al. 2024), and what the families that follow it share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.core.errors import ConfigError
from lmx.hf import rope
from lmx.hf.family import Class, Family
from lmx.hf.tables import Table, copy, embedding, linear, norm, within
from lmx.models.config import Config

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "relu": "reglu"}
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    **rope.DEFAULTS,
}
ATTENTION: Table = (
    linear("self_attn.q_proj", "attention/query"),
    linear("self_attn.k_proj", "attention/key"),
    linear("self_attn.v_proj", "attention/value"),
    linear("self_attn.o_proj", "attention/out"),
    norm("self_attn.q_norm", "attention/query_norm"),
    norm("self_attn.k_norm", "attention/key_norm"),
)
MLP: Table = (
    linear("mlp.gate_proj", "mlp/gate"),
    linear("mlp.up_proj", "mlp/up"),
    linear("mlp.down_proj", "mlp/down"),
)


def body(*layer: Table) -> Table:
    """The table of a decoder whose layers have these entries."""
    return (
        embedding("model.embed_tokens", "embed/tokens"),
        within("model.layers.{i}.", "decoder/layers/", *layer),
        norm("model.norm", "decoder/norm"),
    )


TABLE = body(norm("input_layernorm", "attention_norm"), ATTENTION, norm("post_attention_layernorm", "mlp_norm"), MLP)
SCORE = linear("score", "head/out")


def classes(name: str, question_prefix: str | None = None) -> dict[str, Class]:
    """The classes that decoders of this kind have, by the family's name in them."""
    return {
        f"{name}ForCausalLM": Class("lm", LM_HEAD),
        f"{name}Model": Class("none"),
        f"{name}ForSequenceClassification": Class("sequence", SCORE, {"pool": "last"}),
        f"{name}ForTokenClassification": Class("tokens", SCORE, {"head_bias": True}),
        f"{name}ForQuestionAnswering": Class(
            "spans", linear("qa_outputs", "head/out"), {"head_bias": True}, question_prefix
        ),
    }


LM_HEAD = (linear("lm_head", "head/out"), copy("lm_head.weight", "model.embed_tokens.weight"))


def activation(name: str, known: Mapping[str, str] = GATED) -> str:
    """The activation of lmx that transformers calls by this name. Raises ConfigError for another."""
    if name not in known:
        raise ConfigError(f"the activation {name!r} is none of {', '.join(known)}")
    return known[name]


def activation_name(name: str, known: Mapping[str, str] = GATED) -> str:
    """The inverse of `activation`. Raises ConfigError for one that the family has not."""
    for theirs, ours in known.items():
        if ours == name:
            return theirs
    raise ConfigError(f"activation {name!r} is none of {', '.join(dict.fromkeys(known.values()))}")


def read(v: Mapping[str, Any], theta: float = 10_000.0) -> dict[str, Any]:
    """The arguments of Config for a decoder with rotary positions, RMSNorm and a gated feed-forward layer."""
    head_dim = v.get("head_dim") or v["hidden_size"] // v["num_attention_heads"]
    return {
        "vocab_size": v["vocab_size"],
        "num_layers": v["num_hidden_layers"],
        "hidden_size": v["hidden_size"],
        "num_heads": v["num_attention_heads"],
        "num_kv_heads": v["num_key_value_heads"],
        "head_dim": head_dim,
        "intermediate_size": v["intermediate_size"],
        "activation": activation(v["hidden_act"]),
        "norm_eps": v["rms_norm_eps"],
        "tie_embeddings": v["tie_word_embeddings"],
        "initializer_range": v["initializer_range"],
        **rope.read(v, theta),
    }


def write(c: Config) -> dict[str, Any]:
    """The inverse of `read`."""
    return {
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.hidden_size,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "hidden_act": activation_name(c.activation),
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.initializer_range,
        **rope.write(c),
    }


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    bias = v["attention_bias"]
    return {**read(v), "attention_bias": bias, "attention_out_bias": bias, "mlp_bias": v["mlp_bias"]}


def _write(c: Config) -> dict[str, Any]:
    return {**write(c), "attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias}


FAMILY = Family(
    model_type="llama",
    classes=classes("Llama", question_prefix="transformer."),
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=TABLE,
    prefix="model.",
)
