"""A new head on a model that came from Hugging Face, as the class of its family with that head has it.

    base = lmx.load("bert-base-uncased")
    model = lmx.with_head(base, "sequence", key, num_labels=2)     # with format="hf": BertForSequenceClassification
"""

from __future__ import annotations

import os
from typing import Any

import jax

from lmx.core.errors import ConfigError, nearest
from lmx.hf import writing
from lmx.hf.family import BARE, HOW, LABELLED, differences
from lmx.models import heads
from lmx.models.config import CHOICES, Config
from lmx.models.transformer import Model

OF_HEADS = (
    "head", "num_labels", "head_activation", "head_hidden_bias", "head_norm", "head_bias", "pool", "tie_embeddings",
    "logit_scale", "logit_softcap",
)  # fmt: skip


def with_head(
    model: Model,
    head: str,
    key: jax.Array,
    *,
    num_labels: int | None = None,
    like: str | os.PathLike | dict[str, Any] | None = None,
) -> Model:
    """The model with a freshly drawn head; the trained body stays as it is, its pooler (BERT's) included.

    head: "sequence" or "tokens" (num_labels classes), "spans" (begin and end), or "lm" (tokens, masked ones of an
    encoder). What belongs to it, such as a hidden layer and its activation, is as in the family's class with that head.
    like: as in `lmx.save(format="hf")`: the family, by default the first that can express the model.
    Raises ConfigError for a model of no family, a head that its family has not, or labels that do not go with the head.
    """
    kinds = tuple(kind for kind in CHOICES["head"] if kind not in BARE)
    if head not in kinds:
        raise ConfigError(f"head {head!r} is none of {', '.join(kinds)}{nearest(head, kinds)}")
    if (head in LABELLED) != (num_labels is not None):
        needs = "needs num_labels=, a number of classes" if head in LABELLED else "has no num_labels="
        raise ConfigError(f"a head of kind {head!r} {needs}")
    config = _config(model.config, head, num_labels, writing.origin_of(like))
    return heads.with_head(model, **{name: getattr(config, name) for name in OF_HEADS}, key=key)


def _config(config: Config, head: str, num_labels: int | None, original: Any) -> Config:
    """The config of the family's class with that head whose body is the given one's."""
    family, _, values = writing.describe(config, original)
    for name, chosen in family.classes.items():
        if chosen.head != head:
            continue
        found = family.config({**values, "num_labels": num_labels, "id2label": None}, name)
        found = found.replace(**{field: getattr(config, field) for field in HOW})
        if set(differences(config, found)) <= set(OF_HEADS):
            return found
    raise ConfigError(
        f"Hugging Face's models of the family {family.model_type!r} and the architecture {config.architecture!r} have "
        f"no head of kind {head!r}; give another, or lmx.models.heads.with_head for one of your own"
    )
