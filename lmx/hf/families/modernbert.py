"""ModernBERT (Warner et al. 2024): an encoder with rotary positions, gated layers, norms before, and local layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.core.errors import ConfigError
from lmx.hf.families.gpt2 import ACTIVATIONS
from lmx.hf.families.llama import activation, activation_name
from lmx.hf.family import Class, Family, layer_pattern
from lmx.hf.tables import copy, embedding, linear, norm, within
from lmx.models.config import Config

DEFAULTS = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
    "hidden_activation": "gelu",
    "initializer_range": 0.02,
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_bias": True,
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "classifier_pooling": "cls",
    "tie_word_embeddings": True,
    "local_attention": 128,
    "layer_types": None,
    "rope_parameters": None,
    # transformers 4 has these for layer_types and rope_parameters
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160_000.0,
    "local_rope_theta": 10_000.0,
}
KINDS = {"full_attention": "global", "sliding_attention": "local"}
POOLS = {"cls": "first", "mean": "mean"}
TABLE = (
    embedding("model.embeddings.tok_embeddings", "embed/tokens"),
    norm("model.embeddings.norm", "embed/norm"),
    within(
        "model.layers.{i}.", "encoder/layers/",
        norm("attn_norm", "attention_norm"),
        linear("attn.Wqkv", "attention/query", "attention/key", "attention/value"),
        linear("attn.Wo", "attention/out"),
        norm("mlp_norm", "mlp_norm"),
        linear("mlp.Wi", "mlp/gate", "mlp/up"),
        linear("mlp.Wo", "mlp/down"),
    ),
    norm("model.final_norm", "encoder/norm"),
)  # fmt: skip
HIDDEN = (linear("head.dense", "head/hidden"), norm("head.norm", "head/norm"))
MASKED_HEAD = (
    HIDDEN,
    linear("decoder", "head/out"),
    copy("decoder.weight", "model.embeddings.tok_embeddings.weight"),
)
CLASSIFIER = (HIDDEN, linear("classifier", "head/out"))
EACH_TOKEN = {"head_bias": True, "pool": "first"}


def _thetas(v: Mapping[str, Any]) -> tuple[float, float]:
    """The rotary bases of global and local layers."""
    found = []
    for kind, older in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
        nested = (v["rope_parameters"] or {}).get(kind) or {}
        if nested.get("rope_type", "default") != "default":
            raise ConfigError(f"rope_parameters of {kind} are of type {nested['rope_type']!r}, lmx reads 'default'")
        found.append(float(nested.get("rope_theta") or v[older] or found[0]))
    return found[0], found[1]


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    types = v["layer_types"] or [
        "sliding_attention" if i % v["global_attn_every_n_layers"] else "full_attention"
        for i in range(v["num_hidden_layers"])
    ]
    pattern = layer_pattern([KINDS[kind] for kind in types])
    theta, near = _thetas(v)
    if "local" not in pattern:
        near = theta
    return {
        "architecture": "encoder",
        "vocab_size": v["vocab_size"],
        "num_layers": v["num_hidden_layers"],
        "hidden_size": v["hidden_size"],
        "num_heads": v["num_attention_heads"],
        "intermediate_size": v["intermediate_size"],
        "activation": activation(v["hidden_activation"]),
        "norm": "layernorm",
        "norm_bias": v["norm_bias"],
        "norm_eps": v["norm_eps"],
        "first_attention_norm": False,
        "embedding_norm": True,
        "rope_theta": theta,
        "rope_local_theta": None if near == theta else near,
        "layer_pattern": pattern,
        "window": v["local_attention"] // 2 + 1 if "local" in pattern else None,
        "attention_bias": v["attention_bias"],
        "attention_out_bias": v["attention_bias"],
        "mlp_bias": v["mlp_bias"],
        "tie_embeddings": v["tie_word_embeddings"],
        "head_activation": activation(v["classifier_activation"], ACTIVATIONS),
        "head_hidden_bias": v["classifier_bias"],
        "head_norm": True,
        "head_bias": v["decoder_bias"],
        "pool": POOLS[v["classifier_pooling"]],
        "initializer_range": v["initializer_range"],
    }


def _write(c: Config) -> dict[str, Any]:
    kinds = c.kinds
    names = {kind: name for name, kind in KINDS.items()}
    if unknown := set(kinds) - set(names):
        raise ConfigError(f"layer_pattern has {', '.join(sorted(unknown))}")
    near = c.rope_theta if c.rope_local_theta is None else c.rope_local_theta
    thetas = {"full_attention": c.rope_theta, "sliding_attention": near}
    every = next((n for n in range(1, len(kinds) + 1) if _every(n, len(kinds)) == kinds), None)
    older = {"global_rope_theta": c.rope_theta, "local_rope_theta": near}
    head = {}
    if c.head != "none":
        head = {
            "classifier_activation": activation_name(c.head_activation, ACTIVATIONS),
            "classifier_bias": c.head_hidden_bias,
            "classifier_pooling": "mean" if c.pool == "mean" else "cls",
        }
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.intermediate_size,
        "hidden_activation": activation_name(c.activation),
        "initializer_range": c.initializer_range,
        "norm_eps": c.norm_eps,
        "norm_bias": c.norm_bias,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "tie_word_embeddings": c.tie_embeddings,
        "layer_types": [names[kind] for kind in kinds],
        "rope_parameters": {k: {"rope_type": "default", "rope_theta": theta} for k, theta in thetas.items()},
        **({} if c.window is None else {"local_attention": 2 * (c.window - 1)}),
        **({"decoder_bias": c.head_bias} if c.head == "lm" else {}),
        **head,
        **older,
        **({} if every is None else {"global_attn_every_n_layers": every}),
    }


def _every(n: int, layers: int) -> list[str]:
    return ["local" if i % n else "global" for i in range(layers)]


FAMILY = Family(
    model_type="modernbert",
    classes={
        "ModernBertForMaskedLM": Class("lm", MASKED_HEAD, {"pool": "first"}),
        "ModernBertModel": Class("none"),
        "ModernBertForSequenceClassification": Class("sequence", CLASSIFIER, {"head_bias": True}),
        "ModernBertForTokenClassification": Class("tokens", CLASSIFIER, EACH_TOKEN),
        "ModernBertForQuestionAnswering": Class("spans", CLASSIFIER, EACH_TOKEN),
    },
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=TABLE,
    fixed={"rope_scaling": None},
    prefix="model.",
)
