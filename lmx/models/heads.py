"""A new head on a model: the trained body stays, the head is drawn from its specs, as for a new model."""

from __future__ import annotations

from typing import Any

import jax

from lmx.core import specs
from lmx.models.transformer import Model, abstract


def with_head(model: Model, head: str, key: jax.Array, *, num_labels: int | None = None, **fields: Any) -> Model:
    """The model with a freshly drawn head of a kind of `Config.head`; all other arrays are the model's own.

    So is the hidden layer of a "pooled" head, BERT's pooler, under a "sequence" head that has such a layer too.

    num_labels: classes of the heads "sequence" and "tokens". fields: what else `Config` says of heads (head_activation,
    head_bias, head_norm, pool, tie_embeddings, ...); by default one linear map with a bias, and pooling as it was.
    Raises ConfigError for a kind or a field that there is not, or for a number of labels that does not go with it.
    """
    plain = dict(head_activation=None, head_hidden_bias=True, head_norm=False, head_bias=True)
    config = model.config.replace(head=head, num_labels=num_labels, **(plain | fields))
    wanted, old = abstract(config).head, model.params.head
    made = None if wanted is None else specs.init(wanted, key)
    pooler = (model.config.head, head, model.config.head_activation) == ("pooled", "sequence", config.head_activation)
    if pooler and made.hidden is not None:
        made = made.replace(hidden=old.hidden, hidden_bias=old.hidden_bias)
    return Model(config, model.params.replace(head=made))
