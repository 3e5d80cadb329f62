"""RoBERTa (Liu et al. 2019): BERT whose positions count from the padding id on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.core.errors import ConfigError
from lmx.hf.families import bert
from lmx.hf.family import Class, Family
from lmx.hf.tables import ignored, linear
from lmx.models.config import Config

NO_POOLER = ignored(r"roberta\.pooler\..*")
CLASSIFIER = (
    linear("classifier.dense", "head/hidden"),
    linear("classifier.out_proj", "head/out"),
    NO_POOLER,
)


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    """The table of positions begins with rows for padding, which nobody reads: up to that of the padding id."""
    offset = v["pad_token_id"] + 1
    return {**bert.read(v), "position_offset": offset, "max_length": v["max_position_embeddings"] - offset}


def _write(c: Config) -> dict[str, Any]:
    if c.position_offset < 1:
        raise ConfigError(f"position_offset {c.position_offset} is not the padding id and 1")
    rows = c.max_length + c.position_offset
    return {**bert.write(c), "pad_token_id": c.position_offset - 1, "max_position_embeddings": rows}


FAMILY = Family(
    model_type="roberta",
    classes={
        "RobertaForMaskedLM": Class(
            "lm",
            (
                bert.masked("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "roberta.embeddings."),
                NO_POOLER,
            ),
            bert.MASKED | {"head_activation": "gelu"},
        ),
        "RobertaModel": Class("pooled", linear("roberta.pooler.dense", "head/hidden"), bert.POOLED, optional=True),
        "RobertaForSequenceClassification": Class("sequence", CLASSIFIER, bert.HIDDEN),
        "RobertaForTokenClassification": Class("tokens", (linear("classifier", "head/out"), NO_POOLER), bert.PLAIN),
        "RobertaForQuestionAnswering": Class("spans", (linear("qa_outputs", "head/out"), NO_POOLER), bert.PLAIN),
    },
    defaults=bert.DEFAULTS | {"vocab_size": 50265, "pad_token_id": 1},
    read=_read,
    write=_write,
    table=bert.body("roberta."),
    fixed=bert.FIXED | bert.TIED,
    prefix="roberta.",
)
