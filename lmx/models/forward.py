"""What a model makes of tokens, as a user calls it: `lmx.logits` and `lmx.encode`.

Both are compiled as a whole, for each structure and shape once; within somebody else's `jit` they are part of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmx.core.errors import ConfigError
from lmx.models.protocol import LanguageModel


@jax.jit
def logits(
    model: LanguageModel, tokens: jax.Array, *, segment_ids=None, positions=None, types=None, encoder_tokens=None,
    encoder_segment_ids=None,
) -> jax.Array:  # fmt: skip
    """(b, t) -> (b, t, v) float32, up to a constant a position: `jax.nn.log_softmax` makes them log-probabilities.

    Of a model with a head for classes or vectors, what `Model.logits` says. segment_ids (b, t): tokens see only their
    own segment (0 is padding); positions (b, t): counted from each segment's start by default; types (b, t): of tokens;
    encoder_tokens (b, s) and encoder_segment_ids (b, s): what the encoder of an encoder-decoder reads.
    Raises ConfigError for tokens that are no array of ids (b, t), if t exceeds the model's learned positions, or for
    arguments that the model has no use for.
    """
    given = {"positions": positions, "types": types, "encoder_tokens": encoder_tokens}
    features = encode(model, tokens, segment_ids=segment_ids, encoder_segment_ids=encoder_segment_ids, **given)
    if hasattr(model, "read"):
        return model.read(features, segment_ids)
    return model.readout().logits(features)


@jax.jit
def encode(model: LanguageModel, tokens: jax.Array, *, segment_ids=None, positions=None, **given: Any) -> jax.Array:
    """(b, t) -> (b, t, d): the vectors that the model's head reads. The arguments are those of `logits`."""
    if getattr(tokens, "ndim", None) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        what = f"{tokens.dtype} of shape {tokens.shape}" if hasattr(tokens, "dtype") else f"a {type(tokens).__name__}"
        raise ConfigError(f"tokens are {what}; they must be an array of token ids (b, t), for one row tokens[None]")
    given = {name: value for name, value in given.items() if value is not None}
    return model.features(tokens, segment_ids=segment_ids, positions=positions, **given)
