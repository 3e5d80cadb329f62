"""DistilBERT (Sanh et al. 2019): BERT without token types and pooler, under names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families import bert
from lmx.hf.family import Class, Family
from lmx.hf.tables import copy, embedding, ignored, linear, norm, within
from lmx.models.config import Config

EPS = 1e-12  # of every norm; config.json has no field for it
NAMES = {  # BERT's fields -> DistilBERT's
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
}
DEFAULTS = {theirs: bert.DEFAULTS[name] for name, theirs in NAMES.items()} | {
    "n_layers": 6,
    "tie_word_embeddings": True,
}
TABLE = (
    within(
        "distilbert.embeddings.", "embed/",
        embedding("word_embeddings", "tokens"),
        embedding("position_embeddings", "positions"),
        norm("LayerNorm", "norm"),
        ignored("position_ids"),
    ),
    within(
        "distilbert.transformer.layer.{i}.", "encoder/layers/",
        linear("attention.q_lin", "attention/query"),
        linear("attention.k_lin", "attention/key"),
        linear("attention.v_lin", "attention/value"),
        linear("attention.out_lin", "attention/out"),
        norm("sa_layer_norm", "attention_norm"),
        linear("ffn.lin1", "mlp/up"),
        linear("ffn.lin2", "mlp/down"),
        norm("output_layer_norm", "mlp_norm"),
    ),
)  # fmt: skip
MASKED_HEAD = (
    linear("vocab_transform", "head/hidden"),
    norm("vocab_layer_norm", "head/norm"),
    linear("vocab_projector", "head/out"),
    copy("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
)
CLASSIFIER = linear("classifier", "head/out")


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    same = {name: v[theirs] for name, theirs in NAMES.items()}
    found = bert.read({**same, "type_vocab_size": 0, "layer_norm_eps": EPS})
    return {**found, "tie_embeddings": v["tie_word_embeddings"]}


def _write(c: Config) -> dict[str, Any]:
    fields = bert.fields(c)
    return {theirs: fields[name] for name, theirs in NAMES.items()} | {"tie_word_embeddings": c.tie_embeddings}


FAMILY = Family(
    model_type="distilbert",
    classes={
        "DistilBertForMaskedLM": Class("lm", MASKED_HEAD, bert.MASKED),
        "DistilBertModel": Class("none"),
        "DistilBertForSequenceClassification": Class(
            "sequence", (linear("pre_classifier", "head/hidden"), CLASSIFIER), bert.HIDDEN | {"head_activation": "relu"}
        ),
        "DistilBertForTokenClassification": Class("tokens", CLASSIFIER, bert.PLAIN),
        "DistilBertForQuestionAnswering": Class("spans", linear("qa_outputs", "head/out"), bert.PLAIN),
    },
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=TABLE,
    prefix="distilbert.",
)
