"""Gemma 2 (Gemma Team 2024): norms on both sides of each part, scales stored less 1, soft caps, alternating windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families import llama, qwen2
from lmx.hf.family import Class, Family, layer_pattern
from lmx.hf.tables import norm
from lmx.models.config import Config

DEFAULTS = {name: value for name, value in llama.DEFAULTS.items() if name not in ("hidden_act", "mlp_bias")} | {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
TABLE = llama.body(
    norm("input_layernorm", "attention_norm"),
    llama.ATTENTION,
    norm("post_attention_layernorm", "attention_out_norm"),
    norm("pre_feedforward_layernorm", "mlp_norm"),
    llama.MLP,
    norm("post_feedforward_layernorm", "mlp_out_norm"),
)
UNCAPPED = {"logit_softcap": None}  # only logits over the vocabulary have a cap


def read(v: Mapping[str, Any], period: int) -> dict[str, Any]:
    """The arguments of Config for Gemma 2 and 3; every `period`-th layer sees everything where layer_types is None."""
    kinds = v["layer_types"]
    if kinds is None:
        last = lambda i: (i + 1) % period == 0  # noqa: E731
        kinds = ["full_attention" if last(i) else "sliding_attention" for i in range(v["num_hidden_layers"])]
    pattern = layer_pattern([qwen2.KINDS[kind] for kind in kinds])
    fields = llama.read({**v, "hidden_act": v["hidden_activation"]})
    usual = v["query_pre_attn_scalar"] == fields["head_dim"]
    return {
        **fields,
        "norm_offset": True,
        "norm_placement": "both",
        "embedding_scale": v["hidden_size"] ** 0.5,
        "attention_bias": v["attention_bias"],
        "attention_out_bias": v["attention_bias"],
        "attention_scale": None if usual else v["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": v["attn_logit_softcapping"],
        "logit_softcap": v["final_logit_softcapping"],
        "layer_pattern": pattern,
        "window": v["sliding_window"] if "local" in pattern else None,
    }


def write(c: Config) -> dict[str, Any]:
    """The inverse of `read`."""
    fields = llama.write(c)
    theirs = {ours: theirs for theirs, ours in qwen2.KINDS.items()}
    return {
        **fields,
        "hidden_activation": fields.pop("hidden_act"),
        "attention_bias": c.attention_bias,
        "query_pre_attn_scalar": c.head_dim if c.attention_scale is None else round(c.attention_scale**-2),
        "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.logit_softcap,
        "layer_types": [theirs.get(kind) for kind in c.kinds],
        "sliding_window": c.window or DEFAULTS["sliding_window"],  # transformers makes that mask, used or not
    }


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    return read(v, 2)


FAMILY = Family(
    model_type="gemma2",
    classes={
        "Gemma2ForCausalLM": Class("lm", llama.LM_HEAD),
        "Gemma2Model": Class("none"),
        "Gemma2ForSequenceClassification": Class("sequence", llama.SCORE, {"pool": "last", **UNCAPPED}),
        "Gemma2ForTokenClassification": Class("tokens", llama.SCORE, {"head_bias": True, **UNCAPPED}),
    },
    defaults=DEFAULTS,
    read=_read,
    write=write,
    table=TABLE,
    fixed={"use_bidirectional_attention": (None, False)},
    prefix="model.",
)
