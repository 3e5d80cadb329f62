"""Layers fitted again to what the changed layers before them give.

Errors of factorized layers add up, for each is made for inputs that it no longer gets. Where x went into a matrix W and
z does behind the layers changed before it, the matrix that gives from z what W gave from x, as well as one can, is

    E[z' z]^(-1) E[z' x] W

which is then decomposed under the moments of z (Wang et al. 2024, "SVD-LLM", has the idea for the second factor alone).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import sharding
from lmx.models.transformer import Model
from lmx.reparam.grams import Site
from lmx.reparam.walk import Batch, Matrix, Walk, changed, gram, real, shown

DAMPING = 1e-6  # of the mean diagonal: how much the new matrix is held to the old one where z says nothing
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]  # by path: E[z' z] and E[z' x], (m, m) each


def target(weight: np.ndarray, now: np.ndarray, across: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the matrix (m, n) to decompose, the moments (m, m) to do it under) for E[z' z] and E[z' x], all in float64."""
    hold = DAMPING * np.trace(now) / len(now) * np.eye(len(now))
    return np.linalg.solve(now + hold, (across + hold) @ weight), now + hold


def walk_behind(
    model: Model,
    changed_model: Model,
    batches: Sequence[Batch],
    chosen: Sequence[Site],
    fit: Callable[[Pairs], dict[str, np.ndarray]],
) -> None:
    """Go through the layers with the batches twice, as they are and behind layers that change on the way.

    changed_model: the same model, the matrices at its ends already replaced.
    fit: for each layer from the first to the last, the moments of its chosen matrices to the matrices (m, n) that take
    their place for the layers behind.
    """
    before, behind = Walk(model, batches), Walk(changed_model, batches)
    for tower, layers in before.layers.items():
        xs, zs = before.enter(tower), behind.enter(tower)
        for i, block in enumerate(layers):
            here = [site for site in chosen if (site.tower, site.layer) == (tower, i)]
            new_block = block
            if here:
                new = fit(_moments(before, behind, tower, block, xs, zs, here))
                by_name = {site.matrix.name: new[site.path] for site in here}
                new_block = changed(block, lambda name, w, by_name=by_name: _put(w, by_name.get(name)))
            xs, zs = before.step(tower, block, xs), behind.step(tower, new_block, zs)
        before.leave(tower, xs)
        behind.leave(tower, zs)


def _put(w, new: np.ndarray | None):
    return w if new is None else jnp.asarray(new.reshape(w.shape), w.dtype)


def _moments(before: Walk, behind: Walk, tower: str, block, xs: list, zs: list, sites: Sequence[Site]) -> Pairs:
    matrices, total = tuple(site.matrix for site in sites), None
    for x, z, batch, mx, mz in zip(xs, zs, before.batches, before.memory, behind.memory, strict=True):
        made = sharding.alone(_crossed(before.shell, tower, block, x, z, batch, mx, mz, matrices))
        total = made if total is None else jax.tree.map(jnp.add, total, made)
    found: Pairs = {}
    for site in sites:
        tokens, now, across = (np.asarray(value, np.float64) for value in total[site.matrix.name])
        found[site.path] = (now / max(tokens, 1), across / max(tokens, 1))
    return found


@functools.partial(jax.jit, static_argnames=("tower", "matrices"))
def _crossed(shell, tower, block, x, z, batch, memory_x, memory_z, matrices: tuple[Matrix, ...]):
    """{name: sums over a batch of (tokens, z' z, z' x)}."""
    of_x = shown(shell, tower, block, x, batch, memory_x, jnp.zeros_like(x), matrices)[0]
    of_z = shown(shell, tower, block, z, batch, memory_z, jnp.zeros_like(z), matrices)[0]
    sums = {}
    for m in matrices:
        here = real(batch, "encoder" if m.of_memory else tower)
        pairs = [tuple(run[m.name][0] * here[..., None] for run in both) for both in zip(of_x, of_z, strict=True)]
        now, across = sum(gram(z, z) for _, z in pairs), sum(gram(z, x) for x, z in pairs)
        sums[m.name] = (len(pairs) * here.sum(), now, across)
    return sums
