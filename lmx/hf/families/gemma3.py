"""Gemma 3 (Gemma Team 2025), its text model: Gemma 2 with a norm over each head of queries and keys and two thetas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.core.errors import ConfigError
from lmx.hf import rope
from lmx.hf.families import gemma2, llama
from lmx.hf.family import Class, Family
from lmx.models.config import Config

DEFAULTS = {name: value for name, value in gemma2.DEFAULTS.items() if name != "attn_logit_softcapping"} | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "rope_local_base_freq": None,
    "sliding_window_pattern": 6,
}
THETA, LOCAL_THETA = 1_000_000.0, 10_000.0


def _rotary(v: Mapping[str, Any]) -> dict[str, Any]:
    """Version 5 has rope_parameters for each kind of layer; in version 4 the scaling is for those that see everything.

    Raises ConfigError for windows with a scaling of their own.
    """
    kinds = v["rope_parameters"] or {}
    far = {**(kinds.get("full_attention") or {}), **(v["rope_scaling"] or {})}
    near = kinds.get("sliding_attention") or {}
    if near.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_parameters stretch sliding_attention by {near['rope_type']!r}; lmx has that globally")
    theta = near.get("rope_theta") or v["rope_local_base_freq"] or LOCAL_THETA
    return {**rope.read({**v, "rope_parameters": far, "rope_scaling": None}, THETA), "rope_local_theta": theta}


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    plain = {**v, "rope_parameters": None, "rope_scaling": None, "attn_logit_softcapping": None}
    return {**gemma2.read(plain, v["sliding_window_pattern"]), **_rotary(v), "qk_norm": "head"}


def _write(c: Config) -> dict[str, Any]:
    fields = gemma2.write(c)
    fields.pop("attn_logit_softcapping")
    near = {"rope_type": "default", "rope_theta": c.rope_local_theta}
    return {
        **fields,
        "rope_parameters": {"full_attention": fields["rope_parameters"], "sliding_attention": near},
        "rope_local_base_freq": c.rope_local_theta,
    }


FAMILY = Family(
    model_type="gemma3_text",
    classes={
        "Gemma3ForCausalLM": Class("lm", llama.LM_HEAD),
        "Gemma3TextModel": Class("none"),
        "Gemma3TextForSequenceClassification": Class("sequence", llama.SCORE, {"pool": "last", **gemma2.UNCAPPED}),
    },
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=gemma2.TABLE,
    fixed={"use_bidirectional_attention": (None, False), "attn_logit_softcapping": None},
    prefix="model.",
)
