"""One factorization of a matrix, and every published one as its arguments.

For y = x W with W (m, n), second moments of the inputs A = E[x' x] (m, m) and of the loss's gradient at the outputs
G = E[g' g] (n, n), the best W' of rank r minimises

    E = |A^(1/2) (W - W') G^(1/2)|^2,       A = L L',  G = M M'

and is W' = L'^(-1) U_r S_r V_r' M^(-1), where U S V' is the singular decomposition of L' W M; its error is the sum of
the squares of the singular values beyond r (Eckart and Young 1936, in the metric of the two moments). Without moments
this is the plain decomposition; a diagonal A of (E|x|)^(2 alpha) is ASVD's (Yuan et al. 2023), of the rows' Fisher
information FWSVD's (Hsu et al. 2022); A alone is SVD-LLM's (Wang et al. 2024); with both, E is the loss's increase to
second order, its Fisher information taken as the Kronecker product of A and G (Martens and Grosse 2015).

All of it runs in float64 on the host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lmx.core.errors import ConfigError, nearest

JITTERS = (0.0, 1e-10, 1e-8)  # shares of the mean diagonal, added in turn before the eigenvalues are asked
TINY = 1e-10  # squares of Cholesky's pivots, and eigenvalues, below this share of the others count as zero
FORMS = ("two-factor", "pivoted", "dense")


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """A matrix (m, n) as left right, the most important rank first.

    left: (m, p) and right: (p, n), p = min(m, n); values: (p,), the singular values in the metric of the moments.
    note: what was out of the ordinary, or None.
    """

    left: np.ndarray
    right: np.ndarray
    values: np.ndarray
    note: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def errors(self) -> np.ndarray:
        """(p + 1,): the error E of every rank from 0 to p."""
        return np.append(np.cumsum(self.values[::-1] ** 2)[::-1], 0.0)

    def truncate(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """The factors (m, r) and (r, n) of the best matrix of a rank. Raises ConfigError for one that cannot be."""
        check_rank(rank, self.shape)
        return self.left[:, :rank], self.right[:rank]


def decompose(
    weight: Any, input_gram: Any = None, output_gram: Any = None, *, report: Callable[[str], None] | None = None
) -> Decomposition:
    """The decomposition of a matrix (m, n) under second moments of its inputs and of its outputs' gradient.

    input_gram:  (m, m), or (m,) for a diagonal one; None for the identity. output_gram: (n, n), (n,) or None.
    report:      told when moments are nearly singular, and what was done: a little was added to their diagonal, or
                 eigenvalues took the place of Cholesky's factor. The decomposition's `note` says it too.
    Raises ConfigError for a matrix or moments that are not finite, moments of another shape, not symmetric, with a
    negative eigenvalue, or all zero.
    """
    w = np.asarray(weight, np.float64)
    if w.ndim != 2:
        raise ConfigError(f"a matrix (m, n) is decomposed, not an array of shape {w.shape}; flatten its axes")
    if not np.isfinite(w).all():
        raise ConfigError(f"the matrix {w.shape} has {np.sum(~np.isfinite(w))} numbers that are not finite")
    left, left_inverse, said = _root("input", input_gram, w.shape[0])
    right, right_inverse, said_too = _root("output", output_gram, w.shape[1])
    u, values, v = np.linalg.svd(right(left(w).T).T, full_matrices=False)
    scale = np.sqrt(values)
    notes = "; ".join(filter(None, (said, said_too))) or None
    if notes and report is not None:
        report(notes)
    return Decomposition(left_inverse(u * scale), right_inverse((scale[:, None] * v).T).T, values, notes)


Apply = Callable[[np.ndarray], np.ndarray]


def _root(name: str, gram: Any, size: int) -> tuple[Apply, Apply, str | None]:
    """(x -> L' x, x -> L'^(-1) x, what was out of the ordinary) for moments L L'."""
    if gram is None:
        return (lambda x: x), (lambda x: x), None
    gram = np.asarray(gram, np.float64)
    _check_gram(name, gram, size)
    if gram.ndim == 1:
        root = np.sqrt(np.maximum(gram, TINY * gram.max()))[:, None]
        return (lambda x: root * x), (lambda x: x / root), None
    scale = np.trace(gram) / size
    for jitter in JITTERS:
        try:
            upper = np.linalg.cholesky(gram + jitter * scale * np.eye(size)).T
        except np.linalg.LinAlgError:
            continue
        if (np.diag(upper) ** 2).min() > TINY * scale:  # else what is inverted is rounding
            note = f"the {name} moments are nearly singular: {jitter:g} of their mean diagonal was added"
            return (
                functools.partial(np.matmul, upper),
                functools.partial(np.linalg.solve, upper),
                note if jitter else None,
            )
    values, vectors = np.linalg.eigh(gram)
    if values[0] < -1e-6 * values[-1]:
        raise ConfigError(f"the {name} moments have an eigenvalue of {values[0]:.3g}; they are no second moments")
    least = JITTERS[-1] * values[-1]  # what was never seen matters least, and is not lost
    root = np.sqrt(np.maximum(values, least))[:, None]
    rank = int((values > least).sum())
    note = f"the {name} moments have rank {rank} of {size}: eigenvalues took the place of Cholesky's factor"
    return (lambda x: root * (vectors.T @ x)), (lambda x: vectors @ (x / root)), note


def _check_gram(name: str, gram: np.ndarray, size: int) -> None:
    if gram.shape not in ((size,), (size, size)):
        raise ConfigError(
            f"the {name} moments have shape {gram.shape}, not ({size}, {size}) or ({size},), as the matrix has"
        )
    if not np.isfinite(gram).all():
        raise ConfigError(f"the {name} moments have numbers that are not finite; look for NaN in model and batches")
    diagonal = gram if gram.ndim == 1 else np.diag(gram)
    if not diagonal.any():
        raise ConfigError(f"the {name} moments are all zero: nothing was observed; calibrate on batches with tokens")
    if (diagonal < 0).any():
        raise ConfigError(f"the {name} moments have a negative diagonal; they are no second moments")
    if gram.ndim == 2 and np.abs(gram - gram.T).max() > 1e-4 * np.abs(gram).max():
        raise ConfigError(f"the {name} moments are not symmetric; they are no second moments")


def stored(shape: tuple[int, int], rank: int | None, form: str = "two-factor") -> int:
    """Numbers that a matrix (m, n) takes at a rank, dense where it is None.

    Two factors take r (m + n), fewer than m n only below r = m n / (m + n); without the freedom of an invertible (r, r)
    matrix between them (form "pivoted") they take r (m + n - r), never more than m n.
    """
    m, n = shape
    if rank is None or form == "dense":
        return m * n
    return rank * (m + n - (rank if form == "pivoted" else 0))


def largest_rank(shape: tuple[int, int], budget: float, form: str = "two-factor") -> int:
    """The largest rank whose numbers fit a budget (of numbers); 0 if none does. (Form "dense": as two factors.)"""
    m, n = shape
    if form != "pivoted":
        return min(int(budget // (m + n)), m, n)
    if budget >= m * n:
        return min(m, n)
    rank = int(((m + n) - math.sqrt((m + n) ** 2 - 4 * budget)) / 2)
    return rank + 1 if stored(shape, rank + 1, form) <= budget else rank


def check_form(form: str) -> None:
    """Raise ConfigError for a form that there is not."""
    if form not in FORMS:
        raise ConfigError(f"no form {form!r}, there are {', '.join(FORMS)}{nearest(form, FORMS)}")


def check_rank(rank: int, shape: tuple[int, int]) -> None:
    """Raise ConfigError for a rank that a matrix (m, n) cannot have."""
    if not 1 <= rank <= min(shape):
        raise ConfigError(f"a matrix {shape} has a rank from 1 to {min(shape)}, not {rank}")
