"""OLMo 2 (OLMo Team 2025): norms after attention and feed-forward layer, and over all heads of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families import llama
from lmx.hf.family import Class, Family
from lmx.hf.tables import norm
from lmx.models.config import Config

DEFAULTS = {name: value for name, value in llama.DEFAULTS.items() if name != "mlp_bias"} | {
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
}
TABLE = llama.body(
    llama.ATTENTION,
    norm("post_attention_layernorm", "attention_out_norm"),
    llama.MLP,
    norm("post_feedforward_layernorm", "mlp_out_norm"),
)


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    bias = v["attention_bias"]
    kind = {"norm_placement": "output", "qk_norm": "full", "attention_bias": bias, "attention_out_bias": bias}
    return {**llama.read(v), **kind}


def _write(c: Config) -> dict[str, Any]:
    return {**llama.write(c), "attention_bias": c.attention_bias}


FAMILY = Family(
    model_type="olmo2",
    classes={
        "Olmo2ForCausalLM": Class("lm", llama.LM_HEAD),
        "Olmo2Model": Class("none"),
        "Olmo2ForSequenceClassification": Class("sequence", llama.SCORE, {"pool": "last"}),
    },
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=TABLE,
    prefix="model.",
)
