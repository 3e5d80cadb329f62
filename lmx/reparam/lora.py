"""LoRA adapters as data: put on by path, merged and unmerged, extracted from two models, brought to a lower rank.

An adapter is what `LoRA` weights hold beside their bases: `lmx.start(model, optimizer, train="lora_")` trains it
alone, `lmx.save_adapter` writes it for PEFT. For y = x W with W (m, n), the update is (alpha / r) a b of rank r.
`grams` are the inputs' second moments A = E[x' x] (m, m), or their diagonal (m,), by the path of one layer's weight,
such as "decoder/layers[3]/mlp/up".
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lmx.core import tree, weights
from lmx.core.errors import ConfigError, nearest
from lmx.core.kinds import LoRA
from lmx.core.tree import paths
from lmx.hf import updates
from lmx.hf.family import differences
from lmx.hf.tables import spell
from lmx.hf.updates import Key, Update
from lmx.models import transformer
from lmx.models.folders import whole
from lmx.models.transformer import Model
from lmx.reparam.decompose import check_rank, decompose
from lmx.reparam.layers import finished, on_host, restacked

Grams = Mapping[str, np.ndarray]
INITS = ("plain", "pissa", "eva", "corda")
WITH_DATA = ("eva", "corda")


def attach(
    model: Model,
    pattern: str,
    rank: int,
    alpha: float | None = None,
    *,
    init: str = "plain",
    rslora: bool = False,
    grams: Grams | None = None,
    key: jax.Array | None = None,
    max_stacks: int = 8,
) -> Model:
    """The model with LoRA over the weight matrices that the pattern selects. It computes what it did, up to rounding.

    alpha: by default the rank; rslora: the update counts alpha / sqrt(r) times (Kalajdzievski 2023), not alpha / r: in
           the weight alpha is then sqrt(r) times as large.
    init:  "plain": a normal of variance 1 / m, b zero (Hu et al. 2022); "eva": a the leading eigenvectors of the
           inputs' moments, b zero (Paischer et al. 2024, section 3.2); "pissa": a b the best matrix of rank r for the
           weight, the base what is left of it (Meng et al. 2024, equations 2 to 4); "corda": the same under the inputs'
           moments (Yang et al. 2024, section 3.3, with the leading components).
    key:   for "plain". grams: for "eva" and "corda".

    Raises ConfigError for a pattern that selects no matrix or one with an adapter, a rank that a matrix cannot have,
    moments that are missing or do not fit, or a base that is no plain array where its numbers are to be taken.
    """
    _check_init(init, grams, key)
    found: dict[Key, Update] = {}
    bases: dict[Key, np.ndarray] = {}
    strength = float(rank if alpha is None else alpha) * (math.sqrt(rank) if rslora else 1.0)
    for where, weight, inputs in _matrices(model, pattern):
        if isinstance(weight, LoRA):
            raise ConfigError(f"{spell(*where)} has an adapter; merge it first (lmx.reparam.merge)")
        ins, outs = weight.shape[:inputs], weight.shape[inputs:]
        m, n = math.prod(ins), math.prod(outs)
        check_rank(rank, (m, n))
        if init in ("plain", "eva"):
            a = _drawn(key, where, m, rank) if init == "plain" else _leading(_gram(grams, where, m), rank)
            b = np.zeros((rank, n))
        else:
            a, b, bases[where] = _principal(where, weight, (m, n), rank, strength, grams)
        found[where] = _update(a, b, strength, ins, outs)
    return _adapted(model, bases, found, max_stacks)


def merge(model: Model, pattern: str = ".", *, max_stacks: int = 8) -> Model:
    """The adapters that the pattern selects, added to their bases as plain arrays; others stay.

    Exact up to rounding in the base's dtype. A base of another kind (low rank, quantized) is written out. Raises
    ConfigError if none is selected.
    """
    _adapters(model, pattern)
    add = lambda w: w.dense() if isinstance(w, LoRA) else w  # noqa: E731
    return restacked(tree.map(add, model, pattern, weights.is_weight), max_stacks)


def detach(model: Model, pattern: str = ".", *, max_stacks: int = 8) -> Model:
    """The model without the adapters that the pattern selects: their bases. Raises ConfigError if none is selected."""
    _adapters(model, pattern)
    off = lambda w: w.base if isinstance(w, LoRA) else w  # noqa: E731
    return restacked(tree.map(off, model, pattern, weights.is_weight), max_stacks)


def unmerge(merged: Model, adapted: Model, *, max_stacks: int = 8) -> Model:
    """`merged`, into which the adapters of `adapted` went, with them beside their bases again.

    The bases are found by subtraction, so they equal the old ones up to the rounding of merging (in bfloat16 some 0.4 %
    of the sum). Where the old bases are at hand, put the adapter on them instead: nothing is lost then. Raises
    ConfigError if `adapted` has no adapters, or other shapes.
    """
    held, found, bases = _held(merged), {}, {}
    for where, (node, at) in _adapters(adapted, ".").items():
        a, b, alpha = _parts(node, at)
        weight = _array(held, where)
        if weight.shape != (*a.shape[:-1], *b.shape[1:]):
            raise ConfigError(f"{spell(*where)} has the shape {weight.shape}, and its adapter is of another model")
        bases[where] = _less(weight, a, b, alpha)
        found[where] = (a, b, alpha)
    return _adapted(merged, bases, found, max_stacks)


def extract(
    tuned: Model,
    base: Model,
    rank: int | None = None,
    *,
    energy: float | None = None,
    alpha: float | None = None,
    grams: Grams | None = None,
    pattern: str = ".",
    partial: bool = False,
    max_stacks: int = 8,
) -> Model:
    """The base with adapters that bring it to the tuned model: the best update of a rank for each difference.

    rank: of every update (less where a matrix has none so large). Or energy, above 0 and at most 1: the least rank that
    keeps this share of the difference's squares, the same for all layers of a path. grams: the best under the
    inputs' second moments, which is the best for what the layer gives (Eckart and Young 1936, in that metric); energy
    is then of its results. alpha: by default each update's rank. pattern: which weights; partial: leave what else
    differs as it is in the base.

    Raises ConfigError for models of unlike shape or without a difference, rank and energy both or neither, and, unless
    partial, differences that are not selected or in what is no matrix (norms, biases), naming them.
    """
    if (rank is None) == (energy is None) or energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"give rank, or energy above 0 and at most 1; not rank {rank} and energy {energy}")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}")
    _check_alike(tuned, base)
    new, parts = _held(tuned), {}
    for where, weight, inputs in _matrices(base, pattern):
        difference = on_host(_layer(*new[where])) - on_host(weight)
        if difference.any():
            ins, outs = weight.shape[:inputs], weight.shape[inputs:]
            matrix = difference.reshape(math.prod(ins), -1)
            parts[where] = (ins, outs, decompose(matrix, None if grams is None else _gram(grams, where, len(matrix))))
    left = [where for where, old in _held(base).items() if where not in parts and _differs(_layer(*old), new[where])]
    if left and not partial:
        shown = ", ".join(spell(*where) for where in left[:3])
        raise ConfigError(
            f"{len(left)} arrays differ that the adapter would not hold ({shown}): they are no matrices, or the "
            "pattern leaves them out; partial=True keeps the base's"
        )
    if not parts:
        raise ConfigError("the two models do not differ in any matrix that the pattern selects")
    ranks = _ranks({where: part[2].values for where, part in parts.items()}, rank, energy)
    found = {}
    for where, (ins, outs, made) in parts.items():
        r = ranks[where]
        strength = float(r if alpha is None else alpha)
        a, b = made.truncate(r)
        found[where] = _update(a * (r / strength), b, strength, ins, outs)
    return _adapted(base, {}, found, max_stacks)


def rerank(model: Model, rank: int, *, pattern: str = ".", grams: Grams | None = None, max_stacks: int = 8) -> Model:
    """The adapters that the pattern selects at a lower rank: the best of each update, counted as often as before.

    Found from the triangles of both factors; the (m, n) update is never formed. grams: the best under the inputs'
    second moments. An update of no higher rank stays as it is. Raises ConfigError for a rank below 1, or if no adapter
    is selected.
    """
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}")
    found = {}
    for where, (node, at) in _adapters(model, pattern).items():
        a, b, alpha = _parts(node, at)
        if node.rank > rank:
            ins, outs = a.shape[:-1], b.shape[1:]
            gram = None if grams is None else _gram(grams, where, math.prod(ins))
            alpha *= rank / node.rank
            a, b = _lower(a.reshape(-1, node.rank), b.reshape(node.rank, -1), rank, gram)
            found[where] = _update(a, b, alpha, ins, outs)
        else:
            found[where] = (a, b, alpha)
    return _adapted(detach(model, pattern, max_stacks=1 << 30), {}, found, max_stacks)


def matrix_paths(model: Model, pattern: str) -> list[str]:
    """The paths, without layers, of the weight matrices a pattern selects. Raises ConfigError if there are none."""
    return list(dict.fromkeys(leaf for (leaf, _), _, _ in _matrices(model, pattern)))


def _check_init(init: str, grams: Grams | None, key: jax.Array | None) -> None:
    if init not in INITS:
        raise ConfigError(f"no init {init!r}, there are {', '.join(INITS)}{nearest(init, INITS)}")
    if (grams is not None) != (init in WITH_DATA):
        raise ConfigError(f"init {init!r} takes {'' if init in WITH_DATA else 'no '}grams=: the inputs' second moments")
    if init == "plain" and key is None:
        raise ConfigError("init 'plain' draws numbers: give key=, such as jax.random.key(0)")


def _matrices(model: Model, pattern: str) -> Iterator[tuple[Key, Any, int]]:
    """(leaf and layer, the weight of that layer, how many of its axes are inputs) of every matrix that is selected."""
    inputs = {path.plain: spec.inputs for path, spec in paths(transformer.abstract(model.config))}
    hits = tree.matches(model, pattern, weights.is_weight)
    if not any(hit.any() and inputs[path.plain] for path, _, hit in hits):
        raise ConfigError(f"path pattern {pattern!r} selects no weight matrix, only biases or norms")
    for path, weight, hit in hits:
        if inputs[path.plain]:
            for at, layer in enumerate(path.layers or (None,)):
                if hit[at]:
                    yield (path.plain, layer), _layer(weight, None if layer is None else at), inputs[path.plain]


def _adapters(model: Model, pattern: str) -> dict[Key, tuple[LoRA, int | None]]:
    """(leaf, layer) -> (its LoRA, the layer's position in it), of those that are selected."""
    found = {}
    for path, weight, hit in tree.matches(model, pattern, weights.is_weight):
        if isinstance(weight, LoRA):
            for at, layer in enumerate(path.layers or (None,)):
                if hit[at]:
                    found[path.plain, layer] = (weight, None if layer is None else at)
    if not found:
        raise ConfigError(f"path pattern {pattern!r} selects no adapter (a weight of the kind LoRA)")
    return found


def _held(model: Model) -> dict[Key, tuple[Any, int | None]]:
    """(leaf, layer) -> (weight, the layer's position in it), of all there are."""
    return {
        (path.plain, layer): (weight, None if layer is None else at)
        for path, weight in paths(model, weights.is_weight)
        for at, layer in enumerate(path.layers or (None,))
    }


def _layer(weight: Any, at: int | None) -> Any:
    return weight if at is None else jax.tree.map(lambda x: x[at], weight)


def _parts(node: LoRA, at: int | None) -> Update:
    a, b = (whole(weights.dense(_layer(x, at))) for x in (node.lora_a, node.lora_b))
    return a, b, node.alpha


def _array(held: Mapping[Key, tuple[Any, int | None]], where: Key) -> np.ndarray:
    """The plain array of a layer. Raises ConfigError for another kind, or where there is none."""
    if where not in held:
        raise ConfigError(f"this model has no {spell(*where)}")
    weight = _layer(*held[where])
    if weights.is_weight(weight):
        raise ConfigError(
            f"{spell(*where)} is of the kind {type(weight).__name__}; its numbers are taken from plain arrays alone: "
            "fold it first (lmx.reparam.fold)"
        )
    return whole(weight)


def _gram(grams: Grams, where: Key, size: int) -> np.ndarray:
    name = spell(*where)
    if name not in grams:
        raise ConfigError(f"grams has no second moments for {name}, which must be ({size}, {size}); collect them too")
    gram = np.asarray(grams[name], np.float64)
    if gram.shape not in ((size,), (size, size)) or not np.isfinite(gram).all():
        raise ConfigError(f"the moments of {name} must be finite and ({size}, {size}), not {gram.shape}")
    return gram


def _drawn(key: jax.Array, where: Key, m: int, rank: int) -> np.ndarray:
    own = jax.random.fold_in(key, zlib.crc32(spell(*where).encode()))
    return np.asarray(jax.random.normal(own, (m, rank))) / math.sqrt(m)


def _leading(gram: np.ndarray, rank: int) -> np.ndarray:
    """(m, r): the leading eigenvectors."""
    if gram.ndim == 1:
        return (np.argsort(np.argsort(-gram, kind="stable"))[:, None] == np.arange(rank)).astype(np.float64)
    return np.linalg.eigh(gram)[1][:, ::-1][:, :rank]


def _principal(
    where: Key, weight: Any, shape: tuple[int, int], rank: int, alpha: float, grams: Grams | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, the base that is left) where a b, counted alpha / r times, is the best of its rank for the weight."""
    w = _array({where: (weight, None)}, where)
    gram = None if grams is None else _gram(grams, where, shape[0])
    a, b = decompose(w.reshape(shape), gram).truncate(rank)
    share = math.sqrt(rank / alpha)
    a, b = (a * share).astype(np.float32), (b * share).astype(np.float32)
    return a, b, _less(w.reshape(shape), a, b, alpha).reshape(w.shape)


def _less(weight: np.ndarray, a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    """The weight less the update, in its dtype."""
    update = alpha / a.shape[-1] * np.tensordot(a.astype(np.float64), b.astype(np.float64), 1)
    return (weight.astype(np.float64) - update).astype(weight.dtype)


def _lower(a: np.ndarray, b: np.ndarray, rank: int, gram: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(m, k) and (k, n): the best matrix of rank k for a b, under moments of what it reads, from (r, r) matrices.

    It is a b V V', V the leading right singular vectors of A^(1/2) a b; with a' A a = R' R and b' = Q T, those of R T'
    through Q (Eckart and Young 1936).
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    q, triangle = np.linalg.qr(b.T)  # (n, p), (p, r)
    if gram is None:
        root = np.linalg.qr(a)[1]
    else:
        seen = a.T @ (gram[:, None] * a if gram.ndim == 1 else gram @ a)
        values, vectors = np.linalg.eigh((seen + seen.T) / 2)
        root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    kept = np.linalg.svd(root @ triangle.T, full_matrices=True)[2][:rank].T  # (p, k)
    a, b = a @ (triangle.T @ kept), (q @ kept).T
    size = np.sqrt(np.linalg.norm(a, axis=0))  # both factors of one size, as training likes them
    size[size == 0] = 1.0
    return a / size, b * size[:, None]


def _update(a: np.ndarray, b: np.ndarray, alpha: float, ins: tuple[int, ...], outs: tuple[int, ...]) -> Update:
    a, b = a.astype(np.float32), b.astype(np.float32)
    return a.reshape(*ins, a.shape[-1]), b.reshape(b.shape[0], *outs), float(alpha)


def _ranks(values: Mapping[Key, np.ndarray], rank: int | None, energy: float | None) -> dict[Key, int]:
    """The rank of each update: the one given, or what keeps so much of the energy in the layer that needs most."""
    if rank is not None:
        return {where: min(rank, len(v)) for where, v in values.items()}
    needed: dict[str, int] = {}
    for (leaf, _), v in values.items():
        kept = np.cumsum(v**2) / np.sum(v**2)
        own = min(int(np.searchsorted(kept, energy - 1e-12)) + 1, len(v))
        needed[leaf] = max(needed.get(leaf, 1), own)
    return {where: needed[where[0]] for where in values}


def _check_alike(tuned: Model, base: Model) -> None:
    if ways := differences(tuned.config, base.config):
        shown = ", ".join(f"{n} {getattr(tuned.config, n)!r} and {getattr(base.config, n)!r}" for n in ways[:3])
        raise ConfigError(f"the tuned model and the base are of unlike shape: {shown}")


def _differs(old: Any, new: tuple[Any, int | None]) -> bool:
    return not np.array_equal(on_host(old), on_host(_layer(*new)))


def _adapted(model: Model, bases: Mapping[Key, np.ndarray], found: Mapping[Key, Update], max_stacks: int) -> Model:
    """The model with other numbers in the places of `bases`, and LoRA over the weights that have an update."""

    def one(path: tree.Path, leaf: Any) -> Any:
        new = {at: bases.get((path.plain, layer)) for at, layer in enumerate(path.layers or (None,))}
        if all(x is None for x in new.values()):
            return leaf
        made = np.array(whole(leaf))
        for at, x in new.items():
            if x is not None:
                made[... if path.layers is None else at] = x
        return made

    return updates.attach(finished(model.replace(params=updates.mapped(one, model.params)), 1 << 30), found, max_stacks)
