"""The training step: accumulated, sharded, recomputed or unrolled it is the same step; bad steps change nothing."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from lmx.core import sharding, specs, tree
from lmx.core.errors import ConfigError
from lmx.losses import cross_entropy
from lmx.models.stacks import unstack
from lmx.models.transformer import Model
from lmx.train import adafactor, adamw, make_train_step, muon, start
from lmx.train.feed import place_batch

pytestmark = pytest.mark.usefixtures("quick")
MESHES = list(itertools.product(("fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"), ("explicit", "auto")))
RATE = 0.01
loss = functools.partial(cross_entropy, z_loss=1e-3, chunk=5)
# Float32, added up in another order: gradients agree to about 1e-6 of their size. Adam divides a gradient by its own
# size, so an element whose gradient is a thousandth of its tensor's may move by a thousandth of a step more or less.
SAME_LOSS = dict(rtol=1e-5, atol=1e-6)
SAME_PARAMS = dict(rtol=1e-5, atol=2e-3 * RATE)


def close(got, wanted, **tolerance) -> None:
    for (path, g), (_, w) in zip(tree.paths(got), tree.paths(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), **tolerance, err_msg=str(path))


def run(model, optimizer, batches, steps=2, place=lambda batch: batch, **options):
    """(state after the steps, the metrics of each)."""
    state, step = start(model, optimizer), make_train_step(loss, optimizer, **options)
    history = []
    for i in range(steps):
        state, metrics = step(state, place(batches(i)))
        history.append(jax.device_get(metrics))
    return state, history


# Accumulation


@functools.cache
def descent(accumulate: int):
    """Plain gradient descent: the change of the parameters is the clipped gradient itself."""
    return make_train_step(loss, optax.sgd(1.0), accumulate=accumulate)


@pytest.mark.slow
@settings(deadline=None, max_examples=12)
@given(k=st.sampled_from([2, 8]), seed=st.integers(0, 1000), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_microbatches_add_up_to_one_batch(tiny, packed, k, seed, scale):
    """Packed rows of unlike weights, whole rows of weight 0 among them, z-loss, metrics, norm and clipping."""
    model, batch = tiny(), packed(seed)
    rng = np.random.default_rng(seed)
    batch["weights"] = batch["weights"] * rng.choice([0, 1, 10], (8, 1)).astype(np.float32) * scale
    one, wanted = descent(1)(start(model, optax.sgd(1.0)), batch)
    many, metrics = descent(k)(start(model, optax.sgd(1.0)), batch)
    assert metrics.keys() == wanted.keys() >= {"loss", "accuracy", "z_loss", "grad_norm", "weight", "skipped"}
    for name, value in metrics.items():
        np.testing.assert_allclose(value, wanted[name], rtol=2e-5, atol=1e-7, err_msg=name)
    # The gradient has norm at most 1 over some 4000 elements.
    close(many.trained, one.trained, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_the_gradient_is_of_the_mean_and_clipped_to_the_norm(tiny, packed):
    model, batch = tiny(), packed()

    def mean(model):
        total, weight, _ = loss(model, batch)
        return total / weight

    value, grads = jax.jit(jax.value_and_grad(mean))(model)
    norm = np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(grads)))
    assert norm > 1
    state, metrics = descent(1)(start(model, optax.sgd(1.0)), batch)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"] + metrics["z_loss"], value, rtol=1e-5)
    inside = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    np.testing.assert_allclose(metrics["weight"], (batch["weights"][:, :-1] * inside).sum(), rtol=1e-6)
    close(state.trained, jax.tree.map(lambda p, g: p - g / norm, model, grads), rtol=1e-5, atol=1e-6)
    unclipped = make_train_step(loss, optax.sgd(1.0), clip_norm=None)
    state, _ = unclipped(start(model, optax.sgd(1.0)), batch)
    close(state.trained, jax.tree.map(jnp.subtract, model, grads), rtol=1e-5, atol=1e-5)


def test_a_batch_without_weight(tiny, packed):
    """Nothing to learn from: the gradient is 0, no number is NaN, and the step is not counted as skipped."""
    model, batch = tiny(), packed()
    state, metrics = descent(1)(start(model, optax.sgd(1.0)), batch | {"weights": np.zeros_like(batch["weights"])})
    jax.tree.map(np.testing.assert_array_equal, state.trained, model)
    assert all(np.isfinite(x) for x in metrics.values()) and metrics["weight"] == 0 and metrics["skipped"] == 0


@pytest.mark.slow
def test_every_step_and_microbatch_has_its_own_key(tiny, packed):
    """The loss sees fold_in(fold_in(key, step), microbatch): reproducible, and never the same twice."""

    def noisy(model, batch, key):
        total, weight, _ = loss(model, batch)
        return total, weight, {"draw": (jax.random.uniform(key), jnp.float32(1))}

    for k in (1, 2):
        step = make_train_step(noisy, optax.sgd(0.0), accumulate=k)
        state = start(tiny(), optax.sgd(0.0), key=jax.random.key(7))
        draws = []
        for i in range(2):
            state, metrics = step(state, packed(i))
            key = jax.random.fold_in(jax.random.key(7), i)
            keys = [key] if k == 1 else [jax.random.fold_in(key, j) for j in range(k)]
            np.testing.assert_allclose(metrics["draw"], np.mean([jax.random.uniform(x) for x in keys]), rtol=1e-6)
            draws.append(float(metrics["draw"]))
        assert draws[0] != draws[1]


def test_errors(tiny, packed):
    with pytest.raises(ConfigError, match="accumulate must be at least 1, not 0"):
        make_train_step(loss, optax.sgd(1.0), accumulate=0)
    step = make_train_step(loss, optax.sgd(1.0), accumulate=3)
    with pytest.raises(ConfigError, match="a batch of 8 rows does not divide into 3 microbatches; change one of them"):
        step(start(tiny(), optax.sgd(1.0)), packed())


# Sharding


@pytest.fixture(scope="module")
def alone(tiny, packed):
    """alone(name): two steps without a mesh, to be equalled."""
    model = tiny()
    return functools.cache(lambda name: run(model, OPTIMIZERS[name], packed))


OPTIMIZERS = {"adamw": adamw(RATE), "muon": muon(RATE), "adafactor": adafactor(RATE)}


def placed(model: Model) -> Model:
    return Model(model.config, jax.device_put(model.params, specs.shardings(model.specs().params)))


def bytes_on_one_device(arrays) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arrays))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("text", "kind"), MESHES)
def test_sharded_equals_alone(tiny, packed, alone, text, kind, accumulate):
    check_sharded(tiny(), packed, alone, "adamw", text, kind, accumulate)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["explicit", "auto"])
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_sharded_equals_alone_for_other_optimizers(tiny, packed, alone, name, kind):
    check_sharded(tiny(), packed, alone, name, "fsdp=4,tensor=2", kind, 2)


def check_sharded(model, packed, alone, name, text, kind, accumulate) -> None:
    """Losses and parameters are those without a mesh, and every array lies as the rules say, before and after."""
    optimizer = OPTIMIZERS[name]
    wanted, history = alone(name)
    with sharding.use_mesh(text, explicit=kind == "explicit") as mesh:
        model = placed(model)
        rules = specs.shardings(model.specs())
        before = start(model, optimizer)
        places = jax.tree.map(lambda x: x.sharding, before)
        state, got = run(model, optimizer, packed, place=place_batch, accumulate=accumulate)
        for now in (before, state):
            for (path, x), (_, rule) in zip(tree.paths(now.trained), tree.paths(rules), strict=True):
                assert x.sharding.is_equivalent_to(rule, x.ndim), f"{path} lies as {x.sharding}"
        for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim)
        if name == "adamw":
            for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
                for x, rule in zip(jax.tree.leaves(moment), jax.tree.leaves(rules), strict=True):
                    assert x.sharding.is_equivalent_to(rule, x.ndim)
            # Every matrix is split over all devices but those that data= copies it to; norm scales are whole.
            whole = sum(x.nbytes for path, x in tree.paths(model) if "scale" in path.plain)
            split = mesh.size // mesh.shape["data"]
            exact = 3 * ((specs.nbytes(model) - whole) // split + whole)
            assert bytes_on_one_device((state.trained, state.opt_state[0].mu, state.opt_state[0].nu)) == exact
    for mine, theirs in zip(got, history, strict=True):
        for metric, value in theirs.items():
            np.testing.assert_allclose(mine[metric], value, **SAME_LOSS, err_msg=metric)
    close(jax.device_get(state.trained), wanted.trained, **SAME_PARAMS)


@pytest.mark.slow
def test_one_device_mesh_equals_alone(tiny, packed, alone):
    wanted, history = alone("adamw")
    with sharding.use_mesh(sharding.make_mesh("", devices=jax.devices()[:1])):
        state, got = run(placed(tiny()), OPTIMIZERS["adamw"], packed, place=place_batch)
    for mine, theirs in zip(got, history, strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], **SAME_LOSS)
    close(jax.device_get(state.trained), wanted.trained, **SAME_PARAMS)


@pytest.mark.slow
def test_gathered_copies_do_not_outlive_the_step(tiny, packed):
    """What the compiled step returns is only as large as the shards: FSDP's gathered weights are temporary."""
    with sharding.use_mesh("fsdp=8"):
        state = start(placed(tiny()), OPTIMIZERS["adamw"])
        batch = place_batch(packed())
        step = make_train_step(loss, OPTIMIZERS["adamw"])
        compiled = jax.jit(step).lower(state, batch).compile()
        assert sharding.mesh_kind() is AxisType.Explicit
        numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        sizes = compiled.memory_analysis()
        assert sizes.output_size_in_bytes < 1.1 * bytes_on_one_device(numbers) + 4096  # scalars, alignment


# Recomputing and unrolling


@pytest.mark.slow
@pytest.mark.parametrize("change", ["dots", "full", "unrolled", "unrolled full"])
def test_remat_and_unrolling_change_nothing(tiny, packed, alone, change):
    wanted, history = alone("adamw")
    model = tiny(remat=change.removeprefix("unrolled").strip() or "none")
    state, got = run(unstack(model) if "unrolled" in change else model, OPTIMIZERS["adamw"], packed)
    for mine, theirs in zip(got, history, strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], **SAME_LOSS)
    close(unstack(state.trained), unstack(wanted.trained), **SAME_PARAMS)


# Bad steps


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_non_finite_step_changes_nothing_but_the_counts(tiny, packed, bad, accumulate):
    optimizer = OPTIMIZERS["adamw"]
    state, step = start(tiny(), optimizer, ema_decay=0.5), make_train_step(loss, optimizer, accumulate=accumulate)
    state, _ = step(state, packed(0))
    worse = packed(1)
    worse["weights"][3, 1] = bad
    kept = jax.device_get((state.trained, state.opt_state, state.ema))
    for i in (1, 2):
        state, metrics = step(state, worse)
        jax.tree.map(np.testing.assert_array_equal, kept, jax.device_get((state.trained, state.opt_state, state.ema)))
        assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (1 + i, i, i)
        assert metrics["skipped"] == i and metrics["skipped_in_a_row"] == i and not np.isfinite(metrics["loss"])
    state, metrics = step(state, packed(1))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (4, 2, 0)
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 2 and metrics["skipped_in_a_row"] == 0
    assert not np.array_equal(jax.tree.leaves(state.trained)[0], jax.tree.leaves(kept[0])[0])


def test_a_non_finite_gradient_of_a_finite_loss_is_skipped_too():
    """sqrt at 0."""
    step = make_train_step(lambda x, batch, key: (jnp.sqrt(x["w"]).sum(), jnp.float32(1), {}), optax.sgd(1.0))
    state, metrics = step(start({"w": jnp.zeros(3)}, optax.sgd(1.0)), {})
    assert metrics["loss"] == 0 and not np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1
    np.testing.assert_array_equal(state.trained["w"], 0)


# Mixed precision


@pytest.mark.slow
def test_bfloat16_compute_trains_float32_parameters(tiny, packed):
    """Activations have 8 bits: losses of 4 differ by a few hundredths; parameters and moments stay float32."""
    batches = lambda i: packed(0)  # noqa: E731
    optimizer = OPTIMIZERS["adamw"]
    plain, wanted = run(tiny(), optimizer, batches, steps=8)
    state, got = run(tiny(compute_dtype="bfloat16"), optimizer, batches, steps=8)
    assert {x.dtype for x in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.opt_state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    losses = np.array([[m["loss"] for m in history] for history in (got, wanted)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)
    assert losses[0, -1] < losses[0, 0] - 0.1
    distance = lambda one: optax.tree.norm(jax.tree.map(jnp.subtract, plain.trained.params, one))  # noqa: E731
    assert distance(state.trained.params) < 0.2 * distance(tiny().params)


@pytest.mark.slow
def test_bfloat16_parameters_stay_bfloat16(tiny, packed):
    state, history = run(tiny(dtype="bfloat16"), OPTIMIZERS["adamw"], packed, accumulate=2)
    assert {x.dtype for x in jax.tree.leaves(state.trained)} == {jnp.dtype("bfloat16")}
    assert np.isfinite(history[-1]["loss"]) and history[-1]["skipped"] == 0
