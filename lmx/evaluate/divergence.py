"""How far a model has gone from its original: what perplexity alone hides."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax

from lmx.core.errors import DataError
from lmx.losses import Distillation, distillation
from lmx.models.protocol import LanguageModel

_sums = jax.jit(distillation)


def mean_kl(
    model: LanguageModel,
    original: LanguageModel,
    batches: Iterable[dict],
    *,
    place: Callable[[dict], dict] = lambda batch: batch,
) -> float:
    """Mean KL(original || model) of the next token in nats, over the positions of some batches that have weight.

    In chunks of positions; any two language models over one vocabulary. place: puts a batch on the device or mesh.
    Raises DataError if no position has weight, ConfigError for vocabularies of unlike size.
    """
    total = weight = 0.0
    for batch in batches:
        _, _, metrics = _sums(Distillation(model, original), place(batch))
        apart, count = jax.device_get(metrics["kl"])
        total, weight = total + float(apart), weight + float(count)
    if not weight:
        raise DataError("no positions to compare on: there are no batches, or all their weights are 0")
    return total / weight
