"""Values of the fields of `Config`: checked, and made what can be hashed and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmx.core.errors import ConfigError, nearest
from lmx.nn import position

POSITIVE_FLOATS = (
    "norm_eps", "rope_theta", "rope_local_theta", "initializer_range", "embedding_scale", "logit_scale",
    "attention_scale", "attention_softcap", "logit_softcap",
)  # fmt: skip
NULLABLE_FLOATS = ("rope_local_theta", "attention_scale", "attention_softcap", "logit_softcap")
BOOLS = (
    "norm_bias", "norm_offset", "parallel_residual", "first_attention_norm", "embedding_norm", "attention_bias",
    "attention_out_bias", "mlp_bias", "tie_embeddings", "head_hidden_bias", "head_norm", "head_bias",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"  # the compute dtype that suits the backend


def check_positive(name: str, value: Any) -> None:
    """Raise ConfigError for a field that is no whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive whole number, not {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ConfigError, with the nearest choice, for a field that is none of them."""
    if value not in choices:
        raise ConfigError(f"{name} {value!r} is none of {', '.join(choices)}{nearest(str(value), choices)}")


def dtype_name(name: str, value: Any) -> str:
    """The name of a dtype, or of what is to be decided where the model is used."""
    if name == "compute_dtype" and isinstance(value, str) and value == AUTO:
        return value
    try:
        value = jnp.dtype(value).name
    except TypeError as error:
        raise ConfigError(f"{name} {value!r} is not a dtype; try float32 or bfloat16") from error
    check_choice(name, value, (*DTYPES, AUTO) if name == "compute_dtype" else DTYPES)
    return value


def scaling_pairs(scaling: Any) -> tuple:
    """rope_scaling in one order. Raises ConfigError for what is no pairs of names and values, or no scaling."""
    try:
        pairs = tuple(sorted(dict(scaling).items()))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"rope_scaling is pairs of a name and a value, such as ('rope_type', 'linear'), not {scaling!r}"
        ) from error
    position.check_scaling(dict(pairs))
    return pairs


def tuples(value: Any) -> Any:
    """What JSON made lists, as tuples again."""
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def canonical(name: str, value: Any) -> Any:
    """A hashable Python value for a field, or ConfigError."""
    if name in ("dtype", "compute_dtype"):
        return dtype_name(name, value)
    if isinstance(value, tuple):
        return tuple(canonical(name, item) for item in value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{name} is NaN, which is not equal to itself and would retrace every call")
    if not isinstance(value, (str, int, float, bool, type(None))):
        given = type(value).__name__
        raise ConfigError(f"{name} must be a string, a number, a bool, None or a tuple of them, not {given}")
    if name in POSITIVE_FLOATS and not (value is None and name in NULLABLE_FLOATS):
        if isinstance(value, (bool, str, type(None))) or not 0 < value < math.inf:
            raise ConfigError(f"{name} must be a positive number, not {value!r}")
        return float(value)
    if name in BOOLS and not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, not {value!r}")
    return value
