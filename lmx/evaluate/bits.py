"""Bits per byte: the loss in a unit that no tokenizer changes, whole and by domain, and lzma's beside it."""

from __future__ import annotations

import functools
import lzma
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core.errors import DataError
from lmx.losses.cross_entropy import GIVEN
from lmx.models.protocol import LanguageModel, target_log_probs

ALL = "all"


@functools.partial(jax.jit, static_argnames="domains")
def nll_by_domain(model: LanguageModel, batch: dict[str, jax.Array], domains: int) -> jax.Array:
    """(domains,) sums of weight * -log p(target) in nats over a batch with "domains" (b, t), indices of domains."""
    features = model.features(batch["tokens"], **{name: batch[name] for name in GIVEN if name in batch})
    nll = -target_log_probs(model, features, batch["targets"]) * batch["weights"]  # (b, t)
    here = (batch["domains"][..., None] == jnp.arange(domains)) & (batch["weights"] != 0)[..., None]
    return jnp.where(here, nll[..., None], 0.0).sum((0, 1))


def bits_per_byte(
    model: LanguageModel,
    batches: Iterable[dict[str, np.ndarray]],
    domain_bytes: Mapping[str, int],
    *,
    place: Callable[[dict], dict] = lambda batch: batch,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """{"all": ..., domain: ...}: total -log2 p of every target over the bytes of the text they spell.

    batches:      cover each target once (`lmx.data.evaluation_rows`); "domains" index the keys of domain_bytes.
    domain_bytes: UTF-8 bytes of each domain's text. Ends of text are predicted too and counted, at no bytes.
    place:        puts a batch on the device or mesh. advance: called after each batch.
    """
    total = np.zeros(len(domain_bytes), np.float64)
    for batch in batches:
        total += np.asarray(nll_by_domain(model, place(batch), len(domain_bytes)), np.float64)
        advance()
    return _rates(dict(zip(domain_bytes, total / math.log(2), strict=True)), domain_bytes)


def mean_nll(model: LanguageModel, batches: Iterable[dict], *, place: Callable[[dict], dict] = lambda b: b) -> float:
    """Mean -log p of the targets of some batches, in nats a target: what is watched while training.

    batches: of any objective (`lmx.data.objectives`), with "targets" and "weights". Raises DataError if no target has
    weight.
    """
    total = weight = 0.0
    for batch in batches:
        total += float(nll_by_domain(model, place({**batch, "domains": np.zeros_like(batch["tokens"])}), 1)[0])
        weight += float(np.sum(batch["weights"]))
    if not weight:
        raise DataError("no targets to evaluate on: there are no batches, or all their weights are 0")
    return total / weight


def lzma_bits_per_byte(texts: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """{"all": ..., domain: ...}: what xz at its strongest makes of the same bytes, all documents of a domain as one."""
    joined = {domain: "".join(pieces).encode() for domain, pieces in texts.items()}
    size = lambda data: 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))  # noqa: E731
    rates = _rates({d: size(data) for d, data in joined.items()}, {d: len(data) for d, data in joined.items()})
    whole = b"".join(joined.values())
    return rates | {ALL: size(whole) / len(whole)}


def _rates(bits: Mapping[str, float], size: Mapping[str, int]) -> dict[str, float]:
    empty = [domain for domain, n in size.items() if n == 0]
    if empty or not size:
        raise DataError(f"no bytes to evaluate on in domain {', '.join(empty) or '(none)'}; give it more text")
    return {ALL: sum(bits.values()) / sum(size.values())} | {d: float(bits[d] / size[d]) for d in size}
