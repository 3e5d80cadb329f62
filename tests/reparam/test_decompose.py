import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core.errors import ConfigError
from lmx.reparam.decompose import decompose, largest_rank, stored


def drawn(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix, and moments of inputs and of outputs that differ in scale by direction."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * m, m)) * 10.0 ** rng.uniform(-1.5, 0.5, m) @ np.linalg.qr(rng.normal(size=(m, m)))[0]
    g = rng.normal(size=(4 * n, n)) * 10.0 ** rng.uniform(-1.5, 0.5, n)
    return rng.normal(size=(m, n)), x.T @ x / len(x), g.T @ g / len(g)


def product(found, rank: int) -> np.ndarray:
    a, b = found.truncate(rank)
    return a @ b


def error(delta: np.ndarray, a: np.ndarray, g: np.ndarray) -> float:
    return float(np.trace(a @ delta @ g @ delta.T))


def test_without_moments_it_is_the_singular_decomposition():
    w = drawn(9, 6)[0]
    u, s, v = np.linalg.svd(w)
    np.testing.assert_allclose(product(decompose(w), 3), u[:, :3] * s[:3] @ v[:3], atol=1e-12)
    np.testing.assert_allclose(decompose(w).errors, [*(s[r:] @ s[r:] for r in range(6)), 0], atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_input_moments_alone_are_svd_llm(shape):
    """Wang et al. 2024, section 3.1, as its code has it: W (outputs, inputs), S = chol(X X'), W' = SVD_r(W S) S^-1."""
    w, a, _ = drawn(*shape)
    s = np.linalg.cholesky(a)
    u, values, v = np.linalg.svd(w.T @ s, full_matrices=False)
    expected = (u[:, :4] * values[:4] @ v[:4] @ np.linalg.inv(s)).T
    np.testing.assert_allclose(product(decompose(w, a), 4), expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_both_moments_by_symmetric_roots(shape):
    """The minimiser does not depend on which roots of the moments are taken: here scipy's symmetric ones."""
    w, a, g = drawn(*shape)
    left, right = scipy.linalg.sqrtm(a).real, scipy.linalg.sqrtm(g).real
    u, values, v = np.linalg.svd(left @ w @ right, full_matrices=False)
    expected = np.linalg.inv(left) @ (u[:, :3] * values[:3] @ v[:3]) @ np.linalg.inv(right)
    found = decompose(w, a, g)
    np.testing.assert_allclose(product(found, 3), expected, atol=1e-8)
    assert error(w - product(found, 3), a, g) == pytest.approx(found.errors[3], rel=1e-9)
    assert error(w - product(decompose(w, a), 3), a, g) > 1.01 * found.errors[3]


def test_diagonal_moments_are_their_matrices():
    w, a, g = drawn(8, 6)
    found, whole = decompose(w, np.diag(a), np.diag(g)), decompose(w, np.diag(np.diag(a)), np.diag(np.diag(g)))
    np.testing.assert_allclose(product(found, 2), product(whole, 2), atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.booleans(), st.booleans())
def test_full_rank_is_exact_and_more_rank_never_hurts(m, n, seed, inner, outer):
    w, a, g = drawn(m, n, seed)
    a, g = a if inner else np.eye(m), g if outer else np.eye(n)
    found = decompose(w, a if inner else None, g if outer else None)
    np.testing.assert_allclose(product(found, min(m, n)), w, atol=1e-7)
    errors = [error(w - product(found, r), a, g) for r in range(1, min(m, n) + 1)]
    np.testing.assert_allclose(errors, found.errors[1:], rtol=1e-6, atol=1e-9 * error(w, a, g))
    assert (np.diff(found.errors) <= 0).all()


def test_nearly_singular_moments_are_reported():
    w, a, _ = drawn(8, 6)
    said = []
    dead = a.copy()
    dead[:, 2] = dead[2, :] = 0  # an input that is never seen
    found = decompose(w, dead, report=said.append)
    assert said == [found.note] and "nearly singular" in found.note
    delta = w - product(found, 6)
    assert error(delta, dead, np.eye(6)) < 1e-12

    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    rounded = vectors * np.array([1, 1, 1, 1, 1, 1, 1e-3, -2e-7]) @ vectors.T  # as sums in float32 can leave it
    found = decompose(w, (rounded + rounded.T) / 2, report=said.append)
    assert "rank 7 of 8: eigenvalues took the place of Cholesky's factor" in said[-1]
    np.testing.assert_allclose(product(found, 6), w, atol=1e-7)
    assert np.abs(product(found, 4)).max() < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, a, g: (w * np.nan, a, g), "42 numbers that are not finite"),
        (lambda w, a, g: (w[0], a, g), "not an array of shape .7,.; flatten"),
        (lambda w, a, g: (w, a[:3, :3], g), r"input moments have shape \(3, 3\), not \(6, 6\) or \(6,\)"),
        (lambda w, a, g: (w, a, 0 * g), "output moments are all zero: nothing was observed"),
        (lambda w, a, g: (w, a * np.inf, g), "input moments have numbers that are not finite"),
        (lambda w, a, g: (w, np.triu(a), g), "input moments are not symmetric"),
        (lambda w, a, g: (w, -a, g), "input moments have a negative diagonal"),
        (lambda w, a, g: (w, a, g - 2 * g.max() * (1 - np.eye(7))), "output moments have an eigenvalue of -"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ConfigError, match=message):
        decompose(*change(*drawn(6, 7)))


@pytest.mark.parametrize("rank", [0, 7, -1])
def test_bad_ranks(rank):
    with pytest.raises(ConfigError, match=rf"a matrix \(6, 7\) has a rank from 1 to 6, not {rank}"):
        decompose(drawn(6, 7)[0]).truncate(rank)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1700), st.sampled_from(("two-factor", "pivoted")))
def test_the_largest_rank_is_the_last_that_fits(m, n, budget, form):
    rank = largest_rank((m, n), budget, form)
    assert rank == max((r for r in range(min(m, n) + 1) if stored((m, n), r, form) <= budget), default=0)


def test_two_factors_save_only_below_a_rank():
    """r (m + n) < m n below r = m n / (m + n); pivoted, any rank saves."""
    m, n = 128, 352
    assert stored((m, n), 93) < m * n < stored((m, n), 94) and 93 < m * n / (m + n) < 94
    assert stored((m, n), 127, "pivoted") < m * n == stored((m, n), 128, "pivoted") == stored((m, n), None)
