"""SmolLM3 (Bakouch et al. 2025): Llama in which some layers do not rotate, and windows where layer_types says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families import llama
from lmx.hf.family import Family, layer_pattern
from lmx.models.config import Config

THETA = 2_000_000.0
DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "layer_types": None,
}
# (of layer_types, whether the layer rotates) -> kind
KINDS = {
    ("full_attention", True): "global",
    ("sliding_attention", True): "local",
    ("full_attention", False): "unrotated",
    ("sliding_attention", False): "local_unrotated",
}


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    layers, turns, types = range(v["num_hidden_layers"]), v["no_rope_layers"], v["layer_types"]
    if turns is None:
        turns = [(i + 1) % v["no_rope_layer_interval"] != 0 for i in layers]
    if types is None:
        near = v["use_sliding_window"] and v["sliding_window"] is not None
        types = ["sliding_attention" if near and not turns[i] else "full_attention" for i in layers]
    pattern = layer_pattern([KINDS[types[i], bool(turns[i])] for i in layers])
    window = v["sliding_window"] if any(kind.startswith("local") for kind in pattern) else None
    bias = v["attention_bias"]
    return {
        **llama.read(v, THETA),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": v["mlp_bias"],
        "layer_pattern": pattern,
        "window": window,
    }


def _write(c: Config) -> dict[str, Any]:
    theirs = {ours: theirs for theirs, ours in KINDS.items()}
    types, turns = zip(*(theirs[kind] for kind in c.kinds), strict=True)
    return {
        **llama.write(c),
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "no_rope_layers": [int(rotates) for rotates in turns],
        "layer_types": list(types),
        "use_sliding_window": c.window is not None,
        "sliding_window": c.window,
    }


FAMILY = Family(
    model_type="smollm3",
    classes=llama.classes("SmolLM3", question_prefix="transformer."),
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=llama.TABLE,
    prefix="model.",
)
