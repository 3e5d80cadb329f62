"""Where a token stands: rotary angles, sinusoids, relative distances in buckets, and positions from segments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core.errors import ConfigError, nearest

# What each way of stretching rotary positions over longer texts must be told; names are those of config.json.
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
BY_LENGTH = ("dynamic", "longrope")  # those whose angles depend on the longest row of the batch


def check_scaling(scaling: Mapping[str, Any]) -> None:
    """Raise ConfigError for a `rope_type` there is not, or one that lacks a number it needs."""
    kind = scaling.get("rope_type")
    if kind not in SCALINGS:
        raise ConfigError(f"rope_type {kind!r} is none of {', '.join(SCALINGS)}{nearest(str(kind), SCALINGS)}")
    missing = [name for name in SCALINGS[kind] if scaling.get(name) is None]
    if missing:
        raise ConfigError(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}")
    for name in set(SCALINGS[kind]) - {"short_factor", "long_factor"}:
        if isinstance(scaling[name], (str, bool)) or not scaling[name] > 0:
            raise ConfigError(f"rope_scaling has {name} {scaling[name]!r}, which must be a number above 0")


def rotary_angles(
    positions: jax.Array, width: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[jax.Array, jax.Array]:
    """(cosines, sines), each (b, t, width/2) float32, for positions (b, t). Su et al. 2021, "RoFormer", section 3.2.2.

    scaling: how to reach past the trained length, see `frequencies`.
    """
    turns, factor = frequencies(width, theta, scaling or {}, positions)
    angles = positions[..., None].astype(jnp.float32) * turns
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def frequencies(width: int, theta: float, scaling: Mapping[str, Any], positions: jax.Array) -> tuple[Any, float]:
    """(radians a position (width/2,), what cosines and sines are multiplied by).

    "linear": positions divided by `factor` (Chen et al. 2023, "Extending Context Window"); "dynamic": a larger theta
    for texts beyond the original length (NTK-aware); "llama3": slow turns divided by `factor`, fast ones kept
    (Grattafiori et al. 2024); "yarn": Peng et al. 2023, section 3; "longrope": a factor for each pair of channels
    (Ding et al. 2024), short or long by the text's length.

    The length of a text for "dynamic" and "longrope" is one more than the largest of all `positions`, those of padding
    among them, as transformers 5 has it: a row's numbers then depend on what else is in its batch. (transformers'
    "dynamic" also remembers the longest batch before; here angles are a function of the positions alone.)
    """
    kind = scaling.get("rope_type", "default")
    exponents = np.arange(0, width, 2, dtype=np.float32) / width
    plain = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / np.float32(scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if kind == "yarn":
        return _yarn(plain, width, theta, scaling)
    original = scaling["original_max_position_embeddings"]
    length = positions.max() + 1
    if kind == "dynamic":
        stretch = scaling["factor"] * jnp.maximum(length, original) / original - (scaling["factor"] - 1)
        return 1.0 / (theta * stretch ** (width / (width - 2))) ** exponents, 1.0
    short, long = (np.asarray(scaling[name], np.float32) for name in ("short_factor", "long_factor"))
    factor = scaling.get("attention_factor")
    if factor is None:
        reach = scaling.get("factor") or 1.0
        factor = math.sqrt(1 + math.log(reach) / math.log(original)) if reach > 1 else 1.0
    return jnp.where(length > original, plain / long, plain / short), factor


def _llama3(plain: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    factor, low, high = (scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # in the original length
    if high == low:
        return np.where(turns < low, plain / factor, plain).astype(np.float32)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - keep) * plain / factor + keep * plain).astype(np.float32)


def _yarn(plain: np.ndarray, width: int, theta: float, scaling: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    channel = lambda turns: width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
    first, last = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (np.arange(width // 2, dtype=np.float32) - first) / ((last - first) or 1e-3)
    stretched = np.clip(ramp, 0, 1)
    turns = (plain / factor * stretched + plain * (1 - stretched)).astype(np.float32)
    return turns, _yarn_attention(factor, scaling)


def _yarn_attention(factor: float, scaling: Mapping[str, Any]) -> float:
    """Peng et al. 2023, section 3.4: scores grow with the logarithm of the stretch."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    grown = lambda scale=1.0: 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return grown(scaling["mscale"]) / grown(scaling["mscale_all_dim"])
    return grown()


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the leading channels of x (b, t, heads, c), as many as there are angles for; the others stay.

    The pairs are (i, i + w/2) of the w that turn, Llama's layout. float32 inside, x's dtype outside.
    """
    cos, sin = (angle[:, :, None, :] for angle in angles)  # (b, t, 1, w/2)
    half = cos.shape[-1]
    y = x.astype(jnp.float32)
    low, high, rest = y[..., :half], y[..., half : 2 * half], x[..., 2 * half :]
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """(b, t, width) float32: sines, then cosines, of positions (b, t). Vaswani et al. 2017, section 3.5, its pairs
    apart."""
    half = (width + 1) // 2
    turns = 10_000.0 ** (-2 * np.arange(half) / width)
    angles = positions[..., None].astype(jnp.float32) * turns.astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)[..., : width - half]], axis=-1)


def relative_buckets(
    queries: jax.Array, keys: jax.Array, *, bidirectional: bool, buckets: int, max_distance: int
) -> jax.Array:
    """(b, t, s) int32: the bucket of each distance between queries at (b, t) and keys at (b, s).

    Half of the buckets are distances one by one, the others grow with the logarithm up to max_distance; where keys may
    come after the query they have half of all buckets (Raffel et al. 2020, section 2.1).
    """
    distance = keys[:, None, :] - queries[:, :, None]
    first = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first, distance = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    growth = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (growth * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return first + jnp.where(distance < exact, distance, far)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """(b, t) positions that count from 0 in every run of equal segment ids (b, t)."""
    t = segment_ids.shape[1]
    index = jnp.arange(t)[None, :]
    previous = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    begins = jnp.where(segment_ids != previous, index, 0)
    return index - jax.lax.cummax(begins, axis=1)
