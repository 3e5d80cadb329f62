"""Marian's translation models (Junczys-Dowmunt et al. 2018): BART's layers with sinusoids for positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families import bart
from lmx.hf.family import Class, Family
from lmx.hf.tables import Table, ignored
from lmx.models.config import Config

SINUSOIDS = ignored(r"model\.(encoder|decoder)\.embed_positions\.weight")  # old files hold what they follow from
TABLE: Table = (bart.TOWERS, SINUSOIDS)
DEFAULTS = bart.LAYERS | {"vocab_size": 58101}


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    return {**bart.read(v), "position": "sinusoidal"}


def _write(c: Config) -> dict[str, Any]:
    return {**bart.write(c), "decoder_vocab_size": c.vocab_size}


FAMILY = Family(
    model_type="marian",
    classes={"MarianMTModel": bart.LM_HEAD, "MarianModel": Class("none")},
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=TABLE,
    fixed={"tie_word_embeddings": True, "share_encoder_decoder_embeddings": True, "is_encoder_decoder": True},
    prefix="model.",
)
