"""ELECTRA (Clark et al. 2020): BERT with token vectors of another width; a generator and a discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families import bert
from lmx.hf.family import Class, Family
from lmx.hf.tables import copy, linear, norm
from lmx.models.config import Config

DEFAULTS = bert.DEFAULTS | {
    "embedding_size": 128,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "tie_word_embeddings": True,
}
GENERATOR = (
    linear("generator_predictions.dense", "head/hidden"),
    norm("generator_predictions.LayerNorm", "head/norm"),
    linear("generator_lm_head", "head/out"),
    copy("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
)
DISCRIMINATOR = (
    linear("discriminator_predictions.dense", "head/hidden"),
    linear("discriminator_predictions.dense_prediction", "head/out"),
)
CLASSIFIER = (linear("classifier.dense", "head/hidden"), linear("classifier.out_proj", "head/out"))


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    narrow = {} if v["embedding_size"] == v["hidden_size"] else {"embedding_size": v["embedding_size"]}
    return {**bert.read(v), "tie_embeddings": v["tie_word_embeddings"], **narrow}


def _write(c: Config) -> dict[str, Any]:
    width = c.embedding_size or c.hidden_size
    return {**bert.write(c), "embedding_size": width, "tie_word_embeddings": c.tie_embeddings}


FAMILY = Family(
    model_type="electra",
    classes={
        "ElectraForMaskedLM": Class("lm", GENERATOR, bert.MASKED | {"head_activation": "gelu"}),
        "ElectraModel": Class("none"),
        "ElectraForSequenceClassification": Class("sequence", CLASSIFIER, bert.HIDDEN | {"head_activation": "gelu"}),
        "ElectraForTokenClassification": Class("tokens", linear("classifier", "head/out"), bert.PLAIN),
        "ElectraForQuestionAnswering": Class("spans", linear("qa_outputs", "head/out"), bert.PLAIN),
        # Which tokens were replaced: one logit a token, its hidden layer with the activation of the others.
        "ElectraForPreTraining": Class("tokens", DISCRIMINATOR, {"head_bias": True, "num_labels": 1}),
    },
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=(bert.body("electra."), linear("electra.embeddings_project", "embed/projection")),
    fixed=bert.FIXED,
    prefix="electra.",
    renames=bert.RENAMES,
)
