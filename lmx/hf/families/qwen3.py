"""Qwen3 (Yang et al. 2025): Qwen2 with a norm over each head of queries and keys; biases are an option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families import llama, qwen2
from lmx.hf.family import Family
from lmx.models.config import Config

DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128, "attention_bias": False}


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    bias = v["attention_bias"]
    kind = {"qk_norm": "head", "attention_bias": bias, "attention_out_bias": bias}
    return {**llama.read(v), **qwen2.read_windows(v), **kind}


def _write(c: Config) -> dict[str, Any]:
    return {**llama.write(c), **qwen2.write_windows(c), "attention_bias": c.attention_bias}


FAMILY = Family(
    model_type="qwen3",
    classes=llama.classes("Qwen3"),
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=llama.TABLE,
    prefix="model.",
)
