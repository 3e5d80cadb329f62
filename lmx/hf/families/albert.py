"""ALBERT (Lan et al. 2019): BERT with narrow token vectors and layers that run many times each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.core.errors import ConfigError
from lmx.hf.families import bert
from lmx.hf.family import Class, Family
from lmx.hf.tables import ignored, linear, norm, within
from lmx.models.config import Config

DEFAULTS = bert.DEFAULTS | {
    "vocab_size": 30000,
    "embedding_size": 128,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
    "hidden_act": "gelu_new",
    "num_hidden_groups": 1,
}
TABLE = (
    within("albert.embeddings.", "embed/", *bert.EMBEDDINGS),
    linear("albert.encoder.embedding_hidden_mapping_in", "embed/projection"),
    within(
        "albert.encoder.albert_layer_groups.{i}.albert_layers.0.", "encoder/layers/",
        linear("attention.query", "attention/query"),
        linear("attention.key", "attention/key"),
        linear("attention.value", "attention/value"),
        linear("attention.dense", "attention/out"),
        norm("attention.LayerNorm", "attention_norm"),
        linear("ffn", "mlp/up"),
        linear("ffn_output", "mlp/down"),
        norm("full_layer_layer_norm", "mlp_norm"),
    ),
)  # fmt: skip
POOLER = linear("albert.pooler", "head/hidden")
NO_POOLER = ignored(r"albert\.pooler\..*")
CLASSIFIER = linear("classifier", "head/out")
MASKED_HEAD = (
    bert.masked("predictions.dense", "predictions.LayerNorm", "predictions.decoder", "albert.embeddings."),
    ignored(r"sop_classifier\..*"),
    NO_POOLER,
)


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    """A group of layers is one layer here, which runs as often as the group has layers."""
    layers, groups = v["num_hidden_layers"], v["num_hidden_groups"]
    if layers % groups:
        raise ConfigError(f"{layers} layers are no whole number in each of {groups} groups (num_hidden_groups)")
    return {
        **bert.read(v),
        "num_layers": groups,
        "layer_repeats": layers // groups,
        "embedding_size": v["embedding_size"],
    }


def _write(c: Config) -> dict[str, Any]:
    return {
        **bert.write(c),
        "num_hidden_layers": c.num_layers * c.layer_repeats,
        "num_hidden_groups": c.num_layers,
        "embedding_size": c.embedding_size or c.hidden_size,
    }


FAMILY = Family(
    model_type="albert",
    classes={
        "AlbertForMaskedLM": Class("lm", MASKED_HEAD, bert.MASKED),
        "AlbertModel": Class("pooled", POOLER, bert.POOLED, optional=True),
        "AlbertForSequenceClassification": Class("sequence", (POOLER, CLASSIFIER), bert.HIDDEN),
        "AlbertForTokenClassification": Class("tokens", (CLASSIFIER, NO_POOLER), bert.PLAIN),
        "AlbertForQuestionAnswering": Class("spans", (linear("qa_outputs", "head/out"), NO_POOLER), bert.PLAIN),
    },
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=TABLE,
    fixed=bert.TIED | {"inner_group_num": 1},
    prefix="albert.",
    renames=bert.RENAMES,
)
