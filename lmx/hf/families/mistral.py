"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families import llama
from lmx.hf.family import Family
from lmx.models.config import Config

DEFAULTS = llama.DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    local = {} if v["sliding_window"] is None else {"layer_pattern": ("local",), "window": v["sliding_window"]}
    return {**llama.read(v), **local}


def _write(c: Config) -> dict[str, Any]:
    return {**llama.write(c), "sliding_window": c.window}


FAMILY = Family(
    model_type="mistral",
    classes=llama.classes("Mistral"),
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=llama.TABLE,
    prefix="model.",
)
