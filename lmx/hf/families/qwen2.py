"""Qwen2 (Yang et al. 2024): Llama with biases of query, key and value, and a window in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families import llama
from lmx.hf.family import Family, layer_pattern
from lmx.models.config import Config

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
KINDS = {"full_attention": "global", "sliding_attention": "local"}  # of config.json's layer_types


def read_windows(v: Mapping[str, Any]) -> dict[str, Any]:
    """layer_pattern and window of Config."""
    window = v["sliding_window"] if v["use_sliding_window"] else None
    kinds = v["layer_types"]
    if kinds is None:
        local = lambda i: window is not None and i >= v["max_window_layers"]  # noqa: E731
        kinds = ["sliding_attention" if local(i) else "full_attention" for i in range(v["num_hidden_layers"])]
    pattern = layer_pattern([KINDS[kind] for kind in kinds])
    return {"layer_pattern": pattern, "window": window if "local" in pattern else None}


def write_windows(c: Config) -> dict[str, Any]:
    """The inverse of `read_windows`."""
    theirs = {ours: theirs for theirs, ours in KINDS.items()}
    return {
        "layer_types": [theirs.get(kind) for kind in c.kinds],
        "use_sliding_window": c.window is not None,
        "sliding_window": c.window,
    }


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    return {**llama.read(v), **read_windows(v), "attention_bias": True}


def _write(c: Config) -> dict[str, Any]:
    return {**llama.write(c), **write_windows(c)}


FAMILY = Family(
    model_type="qwen2",
    classes=llama.classes("Qwen2"),
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=llama.TABLE,
    prefix="model.",
)
