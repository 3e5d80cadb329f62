"""Knowledge distillation: a student learns the next-token distributions of a teacher (Hinton et al. 2015).

In chunks of positions (`chunks.py`): of student and teacher no more than (b, chunk, v) logits exist. With p the
teacher's and q the student's distribution, both at temperature T, the divergences are

    "forward"  KL(p || q), which makes q cover all that p does (Hinton et al. 2015)
    "reverse"  KL(q || p), which makes q seek p's modes (Gu et al. 2023, "MiniLLM")
    "jsd"      beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (Agarwal et al. 2023, "GKD")

What others call their distillation loss, in the arguments here (sums are divided by the weight; each line is tested):

    TRL `generalized_jsd_loss(beta=0)`      t_squared=False; beta=1: divergence="reverse"; between: "jsd" of that beta
    DistillKit, all v logits kept           t_squared=False, and the sum is not divided
    TextBrewer `kd_ce_loss`                 t_squared=False, all weights 1; it adds the teacher's entropy (no gradient)
    Tunix `LogitStrategy`                   all weights 1; its share of cross-entropy is 1 - alpha
    torch `kl_div(log_target=True)`         t_squared=False of the logits over T; reduction "batchmean" divides by rows

Without T^2 the gradient shrinks as 1/T^2 and the learning rate has to follow the temperature.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lmx.core import sharding
from lmx.core.errors import ConfigError, nearest
from lmx.core.nodes import node
from lmx.losses import chunks
from lmx.losses.cross_entropy import Metrics, features_of, targets_of
from lmx.models.protocol import LanguageModel, take_token

DIVERGENCES = ("forward", "reverse", "jsd")


@node
class Distillation:
    """A student and its teacher, language models of any kind over one vocabulary. `lmx.start(pair, optimizer,
    train="^student")` gives the teacher no optimizer state and lets its arrays live on."""

    student: LanguageModel
    teacher: LanguageModel


def distillation(
    model: Distillation,
    batch: dict[str, jax.Array],
    key: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    alpha: float = 1.0,
    t_squared: bool = True,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(sum, weight, metrics) of alpha * T^2 * divergence + (1 - alpha) * cross-entropy over a batch.

    batch:       as `cross_entropy` takes it; both models read it, and its weights (`targets_of`) say which positions
                 count. Targets matter for alpha < 1 only.
    temperature: T, by which the logits of both are divided in the divergence; cross-entropy is at 1.
    beta:        of "jsd", between 0 and 1.
    alpha:       the divergence's share, 1 for it alone.
    t_squared:   multiply by T^2, so that gradients keep their size whatever the temperature (Hinton, section 2).
    chunk:       positions of every row taken at a time; by default about 2 million logits of each model a device, 32
                 on accelerators.
    metrics:     "loss", what is minimised; "kl" (for "jsd" named so), the divergence in nats a token without T^2;
                 "agreement", how often both hold the same token for the likeliest; "cross_entropy" where it is used.
    The sum and the weight can be differentiated with respect to the student; the teacher has no gradient.
    Raises ConfigError for an option out of range, and for vocabularies of unlike size.
    """
    terms = _Terms(float(temperature), divergence, float(beta), float(alpha), bool(t_squared))
    student, teacher = model.student, jax.lax.stop_gradient(model.teacher)
    _check_vocabularies(student, teacher)
    targets, weights = targets_of(batch)
    if chunk is None:
        b, t = targets.shape
        chunk = chunks.default(b, t, 2 * student.vocab_size)
    features, seen = features_of(student, batch), features_of(teacher, batch)
    readout, fixed = chunks.gathered(student.readout(), features), chunks.gathered(teacher.readout(), features)
    total, apart, nll, agreed = chunks.summed(terms, chunk, readout, features, fixed, (seen, targets, weights))
    weight = weights.sum()
    metrics = {"loss": (total, weight), "jsd" if divergence == "jsd" else "kl": (apart, weight)}
    metrics["agreement"] = (agreed, weight)
    if alpha < 1:
        metrics["cross_entropy"] = (nll, weight)
    return total, weight, metrics


def _check_vocabularies(student: LanguageModel, teacher: LanguageModel) -> None:
    s, t = student.vocab_size, teacher.vocab_size
    if s != t:
        raise ConfigError(
            f"the student's vocabulary has {s} tokens and the teacher's {t}; distributions are compared token by "
            f"token, so both need the same. If they share a tokenizer and one is padded, make the student with "
            f"vocab_size={t}: ids that no token has are never seen. A student with another tokenizer can learn from "
            "text that the teacher writes (lmx.generate_text) by losses.cross_entropy"
        )


@dataclasses.dataclass(frozen=True)
class _Terms:
    """The sums (total, divergence, nll, agreed) of one chunk, and the total's gradient of the student's logits."""

    temperature: float
    divergence: str
    beta: float
    alpha: float
    t_squared: bool

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be above 0, such as 1 or 2, not {self.temperature:g}")
        if self.divergence not in DIVERGENCES:
            hint = nearest(self.divergence, DIVERGENCES)
            raise ConfigError(f"no divergence {self.divergence!r}, there are {', '.join(DIVERGENCES)}{hint}")
        if self.divergence == "jsd" and not 0 < self.beta < 1:
            raise ConfigError(
                f"beta must lie between 0 and 1, not {self.beta:g}; where others' beta is 0 or 1 they mean divergence="
                '"forward" or "reverse"'
            )
        if not 0 < self.alpha <= 1:
            raise ConfigError(
                f"alpha is the divergence's share, above 0 and at most 1, not {self.alpha:g}; without a teacher there "
                "is losses.cross_entropy"
            )

    def __call__(self, logits: jax.Array, fixed: Any, piece: Any) -> tuple[tuple[jax.Array, ...], jax.Array]:
        seen, targets, weights = piece
        t, counts = self.temperature, weights != 0
        theirs = _alike(fixed.logits(seen), logits)
        log_q, log_p = jax.nn.log_softmax(logits / t), jax.nn.log_softmax(theirs / t)
        each, slope = self._apart(log_p, log_q)  # (b, c), (b, c, v)
        total = self.alpha * (t * t if self.t_squared else 1.0)
        slope, nll = slope * (total / t), jnp.zeros_like(weights)
        if self.alpha < 1:
            log_1 = log_q if t == 1 else jax.nn.log_softmax(logits)
            nll = -take_token(log_1, targets)
            chosen = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
            slope = slope + (1 - self.alpha) * (jnp.exp(log_1) - chosen)
        best = lambda x: x >= x.max(-1, keepdims=True)  # noqa: E731
        agreed = (weights * (best(logits) & best(theirs)).any(-1)).sum()
        # what weighs nothing may be impossible
        apart, nll = (jnp.where(counts, weights * x, 0.0).sum() for x in (each, nll))
        d_logits = jnp.where(counts[..., None], weights[..., None] * slope, 0.0)
        return (total * apart + (1 - self.alpha) * nll, apart, nll, agreed), d_logits

    def _apart(self, log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The divergence (b, c), and its gradient (b, c, v) with respect to the logits of log_q."""
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        if self.divergence == "forward":
            return _kl(p, log_p, q, log_q), q - p
        if self.divergence == "reverse":
            m, log_m, share = p, log_p, 1.0
        else:
            share = 1 - self.beta
            log_m = jnp.logaddexp(log_p + math.log(self.beta), log_q + math.log(share))
            m = jnp.exp(log_m)
        each = share * _kl(q, log_q, m, log_m)
        if self.divergence == "jsd":
            each = each + self.beta * _kl(p, log_p, m, log_m)
        ratio = _ratio(q, log_q, log_m)
        return each, share * q * (ratio - (q * ratio).sum(-1, keepdims=True))


def _ratio(p: jax.Array, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """log p / q, and 0 where p is 0: it is multiplied by p."""
    return jnp.where(p > 0, log_p - log_q, 0.0)


def _kl(p: jax.Array, log_p: jax.Array, q: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis. q - p adds up to 0 and takes out what rounding did to the two normalisers."""
    return (p * _ratio(p, log_p, log_q) + (q - p)).sum(-1)


def _alike(x: jax.Array, like: jax.Array) -> jax.Array:
    """x laid out as `like` is, which on an Explicit mesh may differ between two models."""
    if sharding.mesh_kind() is not AxisType.Explicit:
        return x
    return jax.reshard(x, jax.typeof(like).sharding.spec)
