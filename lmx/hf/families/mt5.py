"""mT5 (Xue et al. 2021): T5 1.1 for many languages. Its logits are never scaled, as transformers 5 computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families import t5
from lmx.hf.family import Family
from lmx.models.config import Config

DEFAULTS = t5.SHAPE | {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    return t5.read(v, scaled=False)


def _write(c: Config) -> dict[str, Any]:
    return {**t5.write(c), "tie_word_embeddings": c.tie_embeddings}


FAMILY = Family(
    model_type="mt5",
    classes=t5.classes("MT5"),
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=t5.table,
    prefix="transformer.",
    tied_by_files=("lm_head.weight", "shared.weight"),
)
