"""Parallel linear branches: wide while training, one matrix to serve (`lmx.reparam.fold`)."""

from __future__ import annotations

from typing import Any

import jax

from lmx.core import tree, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA, Sum
from lmx.models.transformer import Model
from lmx.reparam.lora import attach


def widen(model: Model, pattern: str, rank: int, *, branches: int = 1, key: jax.Array, max_stacks: int = 8) -> Model:
    """The model with low-rank branches beside the weight matrices that the pattern selects: y = x (W + a b + ...).

    Each branch begins with b zero, so that the model computes what it did. All of it is trained, and folded afterwards
    (Ding et al. 2021, "RepVGG", of branches that are linear). Raises ConfigError for a number of branches below 1, or
    what `attach` raises.
    """
    if branches < 1:
        raise ConfigError(f"branches must be at least 1, not {branches}")
    for i in range(branches):
        adapted = attach(model, pattern, rank, key=jax.random.fold_in(key, i), max_stacks=max_stacks)
        model = tree.map(_beside, adapted, pattern, weights.is_weight)
    return model


def _beside(w: Any) -> Any:
    """An adapter, which counts once, as one more part of a sum."""
    if not isinstance(w, LoRA):
        return w
    return Sum((*(w.base.parts if isinstance(w.base, Sum) else (w.base,)), w.update))
