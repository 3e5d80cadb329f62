"""Phi-3 and Phi-4 (Abdin et al. 2024): query, key and value in one tensor, gate and up in another, LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf import rope
from lmx.hf.families import llama
from lmx.hf.family import Family
from lmx.hf.tables import linear, norm
from lmx.models.config import Config

DEFAULTS = {name: value for name, value in llama.DEFAULTS.items() if not name.endswith("_bias")} | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    rope.ORIGINAL: 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
TABLE = llama.body(
    norm("input_layernorm", "attention_norm"),
    linear("self_attn.qkv_proj", "attention/query", "attention/key", "attention/value"),
    linear("self_attn.o_proj", "attention/out"),
    norm("post_attention_layernorm", "mlp_norm"),
    linear("mlp.gate_up_proj", "mlp/gate", "mlp/up"),
    linear("mlp.down_proj", "mlp/down"),
)
OLDER = ("su", "yarn")  # what LongRoPE was called in the first files


def _rotary(v: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    scaling = dict(v["rope_scaling"] or v["rope_parameters"] or {})
    for name in ("type", "rope_type"):
        if scaling.get(name) in OLDER:
            scaling[name] = "longrope"
    return rope.read({**v, "rope_scaling": None, "rope_parameters": scaling}, head_dim=head_dim)


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    fields = llama.read({**v, "rope_scaling": None, "rope_parameters": None})
    local = {} if v["sliding_window"] is None else {"layer_pattern": ("local",), "window": v["sliding_window"]}
    return {**fields, **_rotary(v, fields["head_dim"]), **local}


def _write(c: Config) -> dict[str, Any]:
    fields = {**llama.write(c), "sliding_window": c.window}
    scaling = fields["rope_scaling"]
    if scaling is not None and scaling["rope_type"] == "longrope":
        original = scaling[rope.ORIGINAL]
        fields |= {rope.ORIGINAL: original, rope.LENGTH: round(original * (scaling.get("factor") or 1))}
        if scaling.get("attention_factor") is None:  # version 4 takes three fields and finds the rest in the lengths
            names = ("short_factor", "long_factor")
            fields["rope_scaling"] = {"type": "longrope", **{name: scaling[name] for name in names}}
    return fields


FAMILY = Family(
    model_type="phi3",
    classes={name: found for name, found in llama.classes("Phi3").items() if found.head != "spans"},
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=TABLE,
    prefix="model.",
)
