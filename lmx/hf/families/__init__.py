"""The families of models that lmx reads and writes: one file each, and one line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.core.errors import ConfigError, nearest
from lmx.hf.families import (
    albert,
    bart,
    bert,
    distilbert,
    electra,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    marian,
    mistral,
    modernbert,
    mt5,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    roberta,
    smollm3,
    t5,
)
from lmx.hf.family import Family

# model_type -> family; where a model of lmx's own fits several, it is saved as the first.
FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        llama,
        mistral,
        qwen2,
        qwen3,
        gpt2,
        gemma2,
        gemma3,
        olmo2,
        phi3,
        smollm3,
        gpt_neox,
        bert,
        roberta,
        distilbert,
        electra,
        albert,
        modernbert,
        t5,
        mt5,
        bart,
        marian,
    )
}


def family_of(values: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its model_type, else by the class it names.

    Raises ConfigError, naming the nearest, for a family that lmx does not know.
    """
    model_type, architectures = values.get("model_type"), values.get("architectures") or []
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if not model_type:
        for family in FAMILIES.values():
            if any(name in family.classes for name in architectures):
                return family
    given = model_type or ", ".join(map(str, architectures)) or "no model_type"
    known = [*FAMILIES, *(name for family in FAMILIES.values() for name in family.classes)]
    raise ConfigError(
        f"config.json says {given!r}, an architecture that lmx does not read{nearest(str(given), known, 3)}; it reads "
        f"{', '.join(FAMILIES)}. A new family is one file in lmx/hf/families"
    )
