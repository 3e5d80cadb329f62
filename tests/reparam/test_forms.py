"""Pivoted and quantized weights made of others: against float64 products, the bound of rounding, and whole models."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmx
from lmx import hf
from lmx.core import sharding, specs, tree, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA, LowRank, Pivoted, Quantized
from lmx.models import cost, transformer
from lmx.models.config import Config
from lmx.models.transformer import Model
from lmx.recipes import describe
from lmx.reparam.forms import pivot, quantize, quantize_model

CONFIG = Config(
    vocab_size=23, num_layers=3, hidden_size=16, num_heads=4, num_kv_heads=2, intermediate_size=24, remat="none",
    tie_embeddings=False,
)  # fmt: skip
is_weight = weights.is_weight


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compile for compile time: these programs run a few times on tiny arrays."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def model_of(config: Config = CONFIG) -> Model:
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape) + (s.init == "ones"), s.dtype)  # noqa: E731
    return Model(config, jax.tree.map(draw, transformer.abstract(config)))


def halved(model: Model, pattern: str = "layers/") -> Model:
    """Low-rank factors of every selected matrix, by numpy's SVD."""

    def cut(w, spec):
        n, m = spec.leading, int(np.prod(spec.shape[spec.leading : spec.leading + spec.inputs]))
        u, s, v = np.linalg.svd(float64(w).reshape(*w.shape[:n], m, -1), full_matrices=False)
        a, b = u[..., :5], s[..., :5, None] * v[..., :5, :]
        a = a.reshape(*w.shape[: n + spec.inputs], 5)
        b = b.reshape(*w.shape[:n], 5, *w.shape[n + spec.inputs :])
        return LowRank(jnp.asarray(a, w.dtype), jnp.asarray(b, w.dtype), spec.inputs)

    leaves = [
        cut(w, spec) if hit.all() and spec.inputs is not None else w
        for (_, w, hit), spec in zip(tree.matches(model, pattern), jax.tree.leaves(model.specs()), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def test_pivots_and_combinations_are_those_of_float64():
    """B is rows of the product itself, and the others are the combinations of those that least squares finds."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(12, 4)).astype(np.float32), rng.normal(size=(4, 9)).astype(np.float32)
    w = pivot(LowRank(jnp.asarray(a), jnp.asarray(b)))
    product, order = float64(a) @ float64(b), np.asarray(w.order)
    assert sorted(order) == list(range(12)) and w.rest.size + w.b.size == 4 * (12 + 9 - 4)
    np.testing.assert_allclose(w.b, product[order[:4]], rtol=1e-6, atol=1e-6)
    combinations = np.linalg.lstsq(product[order[:4]].T, product[order[4:]].T, rcond=None)[0].T
    np.testing.assert_allclose(w.rest, combinations, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(w.dense(), product, rtol=1e-5, atol=2e-6)
    assert np.abs(w.rest).max() < 4  # pivoting keeps them small


@pytest.mark.slow
@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    m=st.integers(2, 9), n=st.integers(1, 7), data=st.data(), scale=st.sampled_from([1e-6, 1.0, 1e4]),
    copies=st.sampled_from([(), (2,)]),
)  # fmt: skip
def test_pivoted_equals_low_rank(m, n, data, scale, copies):
    """Whatever the rank, that of the factor itself being lower too (then a column repeats, or is zero)."""
    rank, dull = data.draw(st.integers(1, m - 1)), data.draw(st.sampled_from(["", "zero", "equal"]))
    rng = np.random.default_rng(m * n)
    a, b = rng.normal(size=(*copies, m, rank)), scale * rng.normal(size=(*copies, rank, n))
    if dull:
        a[..., -1] = 0 if dull == "zero" else a[..., 0]
    low = LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    w = pivot(low)
    assert w.shape == low.shape and w.rank == rank and w.dtype == low.dtype
    wanted = float64(low.a) @ float64(low.b)
    np.testing.assert_allclose(w.dense(), wanted, rtol=1e-5, atol=2e-5 * scale * np.abs(a).max())


def test_pivoted_over_heads_of_a_stack():
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    low, x = LowRank(draw(3, 4, 2, 5), draw(3, 5, 7), inputs=2), draw(2, 4, 2)
    w = pivot(low)
    assert w.shape == (3, 4, 2, 7) and w.inputs == (4, 2) and w.order.shape == (3, 8)
    y = jax.lax.scan(lambda x, w: (x, weights.einsum("bhc,hcd->bd", x, w)), x, w)[1]
    wanted = np.einsum("bhc,nhcr,nrd->nbd", *map(float64, (x, low.a, low.b)))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=2e-5)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    rows=st.integers(1, 11), inputs=st.sampled_from([1, 2]), group=st.integers(1, 12), seed=st.integers(0, 99),
    dtype=st.sampled_from(["float32", "bfloat16"]), copies=st.sampled_from([(), (2,)]),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)  # fmt: skip
def test_no_number_moves_by_more_than_half_a_step(rows, inputs, group, seed, dtype, copies, scale):
    shape = (*copies, *((rows,) if inputs == 1 else (rows, 2)), 3)
    numbers = scale * np.random.default_rng(seed).normal(size=shape)
    numbers[..., -1] *= np.random.default_rng(seed + 1).uniform(size=shape[:-1]) < 0.5  # some zeros
    w = jnp.asarray(numbers, dtype)
    q = quantize(w, group, inputs=inputs, copies=len(copies))
    m = rows * (inputs if inputs == 1 else 2)
    groups = -(-m // group)
    assert q.values.dtype == jnp.int8 and q.dtype == q.scale.dtype == w.dtype and q.shape == shape
    assert q.scale.shape == (*copies, groups, 3)
    step = np.repeat(float64(q.scale), group, axis=len(copies))
    step = step.take(range(m), axis=len(copies)).reshape(shape)
    moved = np.abs(float64(w) - step * float64(q.values))
    assert (moved <= step / 2).all()
    top = np.abs(float64(w)).reshape(*copies, m, 3).max(axis=len(copies))  # and the steps are as small as they can be
    assert (float64(q.scale).max(axis=len(copies)) <= np.maximum(top / 127 * 1.005, 1.2e-38)).all()


def test_int8_by_hand():
    w = jnp.array([[1.27, 0.0], [-0.634, 0.0], [0.3, 2.54]])
    q = quantize(w, 2)
    assert q.values.tolist() == [[127, 0], [-63, 0], [127, 127]]
    np.testing.assert_allclose(q.scale[0, 0], 0.01, rtol=1e-6)
    np.testing.assert_allclose(q.scale[1], [0.3 / 127, 0.02], rtol=1e-6)


@pytest.fixture(scope="module")
def kinds():
    """A model with Pivoted, Quantized, low rank over int8 (both forms) and LoRA over int8."""
    model = halved(model_of(), "mlp/(up|down)|attention/(key|out)")
    model = tree.map(lambda w: pivot(w), model, "mlp/down|attention/out", is_weight)
    model = quantize_model(model, "mlp/(gate|up)|attention/(query|out)|embed/tokens|head/out", 5)
    lora = lambda w: LoRA(w, w.dense()[..., :2], w.dense()[:, :2], alpha=0.5)  # noqa: E731
    return tree.map(lora, model, "mlp/gate", is_weight)


TOKENS = jnp.asarray(np.random.default_rng(9).integers(0, 23, (2, 6)))


@pytest.mark.slow
def test_a_model_of_every_kind(kinds, tmp_path):
    block = kinds.params.decoder.layers.stacks[0][0]
    assert isinstance(block.mlp.up.a, Quantized) and isinstance(block.mlp.gate.base, Quantized)
    assert isinstance(block.mlp.down, Pivoted) and isinstance(block.attention.out.rest, Quantized)
    said = jax.tree.map(lambda s: (s.shape, s.dtype), kinds.specs())
    assert said == jax.tree.map(lambda x: (x.shape, x.dtype.name), kinds)
    logits = jax.jit(lambda m: m.logits(TOKENS))
    wanted = logits(lmx.fold(kinds))
    np.testing.assert_allclose(logits(kinds), wanted, atol=2e-4)

    lmx.save(kinds, tmp_path / "own")
    loaded = lmx.load(tmp_path / "own")
    assert jax.tree.structure(loaded) == jax.tree.structure(kinds)
    jax.tree.map(np.testing.assert_array_equal, loaded, kinds)
    parts = {p["path"]: p for p in describe.run(describe.DescribeOptions(str(tmp_path / "own"), length=8))["parts"]}
    shown = {name: part["kind"] for name, part in parts.items()}
    assert shown["decoder/layers[0:3]/mlp/down"] == "Pivoted 5"
    assert shown["decoder/layers[0:3]/mlp/up"] == "LowRank 5 (Quantized 5)"
    assert shown["decoder/layers[0:3]/attention/out"] == "Pivoted 5 (Quantized 5)"
    assert shown["decoder/layers[0:3]/mlp/gate"] == "LoRA 2 (Quantized 5)" and shown["embed/tokens"] == "Quantized 5"
    # 23 x 16 numbers of a byte, and a float32 scale for every 5 of the 23 rows
    assert parts["embed/tokens"]["bytes"] == 23 * 16 + 4 * 5 * 16

    hf.save(kinds, tmp_path / "hf", format="hf")
    exported = hf.load(tmp_path / "hf")
    assert exported.params.embed.tokens.dtype == jnp.float32
    np.testing.assert_allclose(logits(exported), wanted, atol=2e-4)


def test_cost_counts_bytes_as_stored_and_products_as_done(kinds):
    model = model_of()
    before, after = cost.cost(model, 8), cost.cost(quantize_model(model, "mlp/", 8), 8)
    mlp = 3 * 3 * 16 * 24
    assert before.parameter_bytes - after.parameter_bytes == 3 * mlp - 4 * mlp // 8
    assert before.forward_flops == after.forward_flops
    low = halved(model, "mlp/up")
    pivoted = tree.map(pivot, low, "mlp/up", is_weight)
    of = lambda m: cost.cost(m, 8).forward_flops  # noqa: E731
    assert of(low) - of(pivoted) == 3 * 2 * 5 * 5  # r^2 products a layer fewer


@pytest.mark.slow
def test_floats_are_trained_and_integers_are_not(kinds):
    trained, frozen = tree.partition(kinds, ".")
    assert {str(x.dtype) for x in jax.tree.leaves(frozen)} == {"int8", "int32"}

    @jax.jit
    def slopes(trained):
        return jax.grad(lambda t: jnp.square(tree.combine(t, frozen).logits(TOKENS)).mean())(trained)

    got = slopes(trained)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(got))
    down = got.params.decoder.layers.stacks[0][0].mlp.down
    assert down.order is None and down.rest.shape == (3, 19, 5)


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "auto"])
def test_sharded_equals_one_device(kinds, explicit):
    wanted = jax.jit(lambda m: m.logits(TOKENS))(kinds)
    with sharding.use_mesh("data=2,fsdp=2,tensor=2", explicit=explicit) as mesh:
        placed = jax.device_put(kinds, specs.shardings(kinds.specs()))
        tokens = jax.device_put(TOKENS, sharding.named_sharding(("batch", None), TOKENS.shape, mesh))
        got = jax.jit(lambda m, tokens: m.logits(tokens))(placed, tokens)
        again = quantize_model(placed, "attention/value", 5)  # surgery of a sharded model stays sharded
        value = again.params.decoder.layers.stacks[0][0].attention.value
        assert "fsdp" in str(value.values.sharding.spec)
    np.testing.assert_allclose(jax.device_get(got), wanted, atol=2e-4)
    of_value = kinds.params.decoder.layers.stacks[0][0].attention.value
    np.testing.assert_array_equal(value.values, quantize(of_value, 5, copies=1).values)


def test_only_what_can_be_quantized_is(kinds):
    again = quantize_model(kinds, "mlp|attention", 3)
    block, before = (m.params.decoder.layers.stacks[0][0] for m in (again, kinds))
    assert all(map(operator.is_, jax.tree.leaves(block.mlp.gate), jax.tree.leaves(before.mlp.gate)))
    assert isinstance(block.mlp.down.rest, Quantized) and block.mlp.down.order is before.mlp.down.order
    cut = quantize_model(model_of(), "layers[1]/mlp/up", 3)
    kinds_of = [type(p[0].mlp.up).__name__ for p in cut.params.decoder.layers.stacks]
    assert kinds_of == ["ArrayImpl", "Quantized", "ArrayImpl"]


def test_bad_input():
    ones = jnp.ones((4, 4))
    with pytest.raises(ConfigError, match="takes a LowRank weight, not a Array"):
        pivot(ones)
    with pytest.raises(ConfigError, match="4 inputs and rank 4 has no pivoted form"):
        pivot(LowRank(ones, ones))
    with pytest.raises(ConfigError, match="not finite"):
        pivot(LowRank(jnp.full((4, 2), jnp.nan), jnp.ones((2, 4))))
    with pytest.raises(ConfigError, match="not finite"):
        quantize(ones.at[1, 1].set(jnp.inf))
    with pytest.raises(ConfigError, match="not a int8 array"):
        quantize(ones.astype(jnp.int8))
    with pytest.raises(ConfigError, match="not a LowRank"):
        quantize(LowRank(ones, ones))
    for group in (0, -3, 2.0, True):
        with pytest.raises(ConfigError, match="group must be"):
            quantize(ones, group)
    with pytest.raises(ConfigError, match="2 copies and 1 inputs"):
        quantize(ones, copies=2)
    with pytest.raises(ConfigError, match="selects no matrix"):
        quantize_model(model_of(), "mlp_norm")
    with pytest.raises(ConfigError, match="selects nothing"):
        quantize_model(model_of(), "no/such/path")
