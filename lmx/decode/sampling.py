"""From a distribution over the next token to a token: temperature, filters, repetition penalty, and the draw.

Every filter maps log-probabilities (b, v) to normalised log-probabilities (b, v); a token that is filtered
out has -inf. `distribution` chains them in Hugging Face's order: penalty, temperature, top-k, top-p, min-p.
`Sampling` holds the options.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.errors import ConfigError


def temperature(log_probs: Array, value: float | Array) -> Array:
    """p ** (1 / value), normalised: sharper below 1, flatter above; towards 0 the best token takes all."""
    gaps = log_probs - jnp.max(log_probs, axis=-1, keepdims=True)  # the best stays finite under any division
    return jax.nn.log_softmax(gaps / jnp.maximum(value, jnp.finfo(jnp.float32).tiny), axis=-1)


def top_k(log_probs: Array, k: int) -> Array:
    """Keep the k most probable tokens (Fan et al. 2018), and those that tie with the last of them.

    `k` is static; one of the vocabulary's size or above keeps everything.
    """
    weakest = jax.lax.top_k(log_probs, min(k, log_probs.shape[-1]))[0][..., -1:]  # (b, 1)
    return _keep(log_probs, log_probs >= weakest)


def top_p(log_probs: Array, p: float | Array) -> Array:
    """Nucleus sampling (Holtzman et al. 2020, section 3.1): keep the fewest tokens of total probability p.

    Tokens are taken from the most probable down, among equals the lowest id first; one is always kept.
    """
    log_probs = jax.nn.log_softmax(log_probs, axis=-1)

    def nucleus(row: Array) -> Array:  # (v,) to (v,) bool
        order = jnp.argsort(-row)
        probs = jnp.exp(row[order])
        before = jnp.cumsum(probs) - probs  # the mass of the more probable tokens
        keep = (before < p) | (p >= 1)  # p = 1 by its value: the sum is rounded, and may pass 1 too early
        return jnp.zeros(row.shape, bool).at[order].set(keep, unique_indices=True)

    return _keep(log_probs, jax.vmap(nucleus)(log_probs))


def min_p(log_probs: Array, p: float | Array) -> Array:
    """Keep the tokens at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    strongest = jnp.max(log_probs, axis=-1, keepdims=True)
    return _keep(log_probs, log_probs >= strongest + jnp.log(p))


def repetition_penalty(log_probs: Array, seen: Array, penalty: float | Array) -> Array:
    """Make the tokens marked in seen (b, v) less probable (Keskar et al. 2019, CTRL, section 4.1).

    The log-probability of a seen token is multiplied by `penalty`: above 1 it falls, 1 changes nothing. CTRL
    divides logits, but logits are defined only up to a constant, and dividing a negative one rewards the
    repetition; normalised log-probabilities are never positive, so here the same penalty means the same thing
    in every model.
    """
    log_probs = jax.nn.log_softmax(log_probs, axis=-1)
    return jax.nn.log_softmax(jnp.where(seen, log_probs * penalty, log_probs), axis=-1)


def sample(key: Array, log_probs: Array) -> Array:
    """One token per row of log_probs (b, v), drawn with their probabilities: (b,) int32."""
    return jax.random.categorical(key, log_probs, axis=-1).astype(jnp.int32)


def _keep(log_probs: Array, kept: Array) -> Array:
    return jax.nn.log_softmax(jnp.where(kept, log_probs, -jnp.inf), axis=-1)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; `temperature` 0 is greedy: the most probable token, always.

    `None` leaves an option out. Hashable, and a pytree in which the numbers are leaves: under `jit`, changing
    a temperature, p or penalty compiles nothing new; which options are used, greedy or not, and `top_k` are
    static. Raises ConfigError, naming the option, what it was and what it may be.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        self._number("temperature", lambda x: x >= 0, "0 (greedy: the most probable token) or above")
        self._number("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1; None leaves it out")
        self._number("min_p", lambda x: 0 <= x <= 1, "0 to 1; None leaves it out")
        self._number("repetition_penalty", lambda x: x > 0, "above 0: 1 is no penalty, 1.1 to 1.3 are usual")
        k = self.top_k
        if k is not None and (isinstance(k, bool) or not hasattr(k, "__index__") or int(k) < 1):
            raise ConfigError(f"top_k is {k!r}; it must be a whole number, 1 or above; None leaves it out")
        object.__setattr__(self, "top_k", None if k is None else int(k))

    def _number(self, name: str, holds: Any, expected: str) -> None:
        """Check one option and store it as a float; a traced value is left as it is."""
        value = getattr(self, name)
        if isinstance(value, jax.core.Tracer) or (value is None and name != "temperature"):
            return
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or not holds(number):
            raise ConfigError(f"{name} is {value!r}; it must be {expected}")
        object.__setattr__(self, name, number)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken; a traced temperature is not greedy."""
        return isinstance(self.temperature, float) and self.temperature == 0

    def tree_flatten(self) -> tuple[tuple, tuple]:
        heat = None if self.greedy else self.temperature
        return (heat, self.top_p, self.min_p, self.repetition_penalty), (self.greedy, self.top_k)

    @classmethod
    def tree_unflatten(cls, static: tuple, leaves: tuple) -> Sampling:
        greedy, k = static
        heat, p, floor, penalty = leaves
        made = object.__new__(cls)  # not __init__: leaves may be tracers, or jax's placeholders
        values = (0.0 if greedy else heat, k, p, floor, penalty)
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(made, field.name, value)
        return made


def distribution(log_probs: Array, sampling: Sampling, seen: Array | None = None) -> Array:
    """The log-probabilities (b, v) that the next token is drawn from, given the model's (b, v).

    `seen` (b, v) bool marks the tokens that the repetition penalty falls on. Greedy gives all mass to one
    token.
    """
    if sampling.repetition_penalty is not None:
        log_probs = repetition_penalty(log_probs, seen, sampling.repetition_penalty)
    if sampling.greedy:
        best = jnp.argmax(log_probs, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(log_probs.shape[-1]) == best, 0.0, -jnp.inf)
    log_probs = temperature(log_probs, sampling.temperature)
    if sampling.top_k is not None:
        log_probs = top_k(log_probs, sampling.top_k)
    if sampling.top_p is not None:
        log_probs = top_p(log_probs, sampling.top_p)
    if sampling.min_p is not None:
        log_probs = min_p(log_probs, sampling.min_p)
    return log_probs


def choose(key: Array | None, log_probs: Array, sampling: Sampling, seen: Array | None = None) -> Array:
    """One token per row (b,) int32 from the model's log_probs (b, v); greedy needs no key."""
    if not sampling.greedy:
        return sample(key, distribution(log_probs, sampling, seen))
    if sampling.repetition_penalty is not None:
        log_probs = repetition_penalty(log_probs, seen, sampling.repetition_penalty)
    return best(log_probs)


def best(log_probs: Array) -> Array:
    """The most probable token (b,) int32, of equals the lowest id; `argmax`, but for that a row with a NaN gives 0.

    Two plain maxima: XLA's CPU backend does not vectorise an `argmax`, which was a tenth of a step of eight rows.
    """
    least = -jnp.arange(log_probs.shape[-1], dtype=jnp.float32)  # exact: no vocabulary has 2 ** 24 tokens
    below = log_probs < log_probs.max(axis=-1, keepdims=True)
    return (-jnp.where(below, -jnp.inf, least).max(axis=-1)).astype(jnp.int32)
