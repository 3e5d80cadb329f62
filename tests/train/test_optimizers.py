"""Optimizers: equal to optax's own on single matrices, however layers are stacked; rates and decays by path."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmx.core import tree, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA, LowRank
from lmx.models.stacks import unstack
from lmx.train import adafactor, adamw, muon, optimizer

pytestmark = pytest.mark.usefixtures("quick")
RATE, DECAY, STEPS = 0.03, 0.2, 3
SCHEDULE = optax.linear_schedule(RATE, 0.0, 5)
OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "muon": muon}
# The same float32 operations on each matrix, in programs that may add up in another order. Muon's five iterations of
# matrix products amplify rounding about tenfold.
CLOSE = dict(rtol=1e-5, atol=1e-6)
MUON_CLOSE = dict(rtol=1e-4, atol=1e-5)


def gradients(params, seed: int):
    """Random ones, the same number for the same element of the same layer however the layers are stacked."""
    made = {}

    def draw(path, leaf):
        shape = leaf.shape if path.layers is None else leaf.shape[1:]
        layers = [None] if path.layers is None else path.layers
        for i in layers:
            name = f"{path.plain}#{i}"
            rng = np.random.default_rng([seed, *name.encode()])
            made[name] = rng.normal(size=shape).astype(np.float32) * 10 ** rng.uniform(-2, 1)
        pieces = [made[f"{path.plain}#{i}"] for i in layers]
        return pieces[0] if path.layers is None else np.stack(pieces)

    leaves = [draw(path, leaf) for path, leaf in tree.paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def run(transformation, params, steps: int = STEPS, grads=gradients):
    """params (of numpy, with which taking stacks apart compiles nothing) after some steps on random gradients."""

    @jax.jit
    def step(params, state, grads):
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, template = jax.jit(transformation.init)(params), params
    for i in range(steps):
        params, state = step(params, state, grads(template, i))
    return jax.device_get(params)


def matrices(model) -> dict[str, np.ndarray]:
    """Every layer's every leaf on its own, matrices flattened to (inputs, outputs) as the specs say."""
    apart, flat = unstack(model), {}
    for (path, leaf), (_, spec) in zip(tree.paths(apart), tree.paths(apart.specs()), strict=True):
        sizes = spec.shape[spec.leading :]
        middle = len(sizes) if spec.inputs is None else spec.inputs
        shape = (math.prod(sizes[:middle]), math.prod(sizes[middle:]))
        flat[str(path)] = leaf.reshape(shape[:1] if spec.inputs is None else shape)
    return flat


@pytest.fixture(scope="module")
def model(tiny):
    """Three layers of grouped heads, biases and learned positions: every shape of leaf."""
    return jax.device_get(tiny("gpt2", num_layers=3, num_kv_heads=2, tie_embeddings=False))


@pytest.fixture(scope="module")
def factorized(model):
    """The same with a low-rank weight, an adapted one, and a factorized embedding."""
    low = lambda w: LowRank(w[..., 0, :3], np.ones((w.shape[0], 3, *w.shape[2:]), "f"))  # noqa: E731
    adapt = lambda w: LoRA(w, w[..., :2], w[..., :2, :] * 0.5)  # noqa: E731
    model = tree.map(low, model, "attention/query$", weights.is_weight)
    model = tree.map(adapt, model, "mlp/up$", weights.is_weight)
    return tree.map(lambda w: LowRank(w[:, :4], np.ones((4, 16), "f")), model, "embed/tokens$", weights.is_weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stack_trains_as_a_list_of_layers(name, factorized):
    params = factorized
    transformation = OPTIMIZERS[name](SCHEDULE, weight_decay=DECAY)
    stacked, listed = run(transformation, params), run(transformation, unstack(params))
    assert listed.params.decoder.layers.sizes == (1, 1, 1) and stacked.params.decoder.layers.sizes == (3,)
    close = MUON_CLOSE if name == "muon" else CLOSE
    for (path, a), (_, b), (_, old) in zip(*map(tree.paths, (unstack(stacked), listed, unstack(params))), strict=True):
        np.testing.assert_allclose(a, b, **close, err_msg=str(path))
        assert np.abs(np.asarray(b) - np.asarray(old)).max() > 1e-3, path


def by_hand(theirs, model):
    """optax's optimizer on a plain dict of single matrices, fed the same gradients in the same shapes."""

    def grads(flat, seed):
        return matrices(gradients(model, seed))

    return run(theirs, matrices(model), grads=grads)


def test_adamw_is_optax_adamw(model):
    mask = {name: x.ndim == 2 for name, x in matrices(model).items()}
    theirs = optax.adamw(SCHEDULE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=DECAY, mask=mask)
    ours = matrices(run(adamw(SCHEDULE, weight_decay=DECAY), model))
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), ours, by_hand(theirs, model))


@pytest.mark.slow
def test_adafactor_is_optax_adafactor_on_each_matrix(model):
    theirs = optax.adafactor(SCHEDULE, min_dim_size_to_factor=1, decay_rate=0.8, clipping_threshold=1.0)
    ours = matrices(run(adafactor(SCHEDULE), model))
    # optax looks at a tree leaf by leaf, so a dict of matrices is each matrix on its own.
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), ours, by_hand(theirs, model))


def test_adafactor_keeps_a_row_and_a_column(model):
    """Of a matrix (inputs, outputs) the optimizer remembers inputs + outputs numbers, and one count."""
    flat = matrices(model)
    wanted = sum(sum(x.shape) for x in flat.values())
    state = adafactor(0.1).init(model)
    numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    # scale_by_factored_rms puts one zero in the place of what it does not keep: two for a vector, one for a matrix.
    fillers = sum(1 if x.ndim == 2 else 2 for x in flat.values())
    assert sum(x.size for x in numbers) == wanted + fillers


def test_muon_is_optax_muon_on_each_matrix(model):
    inside = lambda name: "layers" in name and not name.endswith(("bias", "scale"))  # noqa: E731
    numbers = {name: optax.contrib.MuonDimensionNumbers(0, 1) if inside(name) else None for name in matrices(model)}
    theirs = optax.contrib.muon(
        SCHEDULE, beta=0.95, weight_decay=DECAY, consistent_rms=0.2, muon_weight_dimension_numbers=numbers
    )
    mask = {name: x.ndim == 2 for name, x in matrices(model).items()}
    adam = by_hand(optax.adamw(SCHEDULE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=DECAY, mask=mask), model)
    wanted = {name: x if inside(name) else adam[name] for name, x in by_hand(theirs, model).items()}
    ours = matrices(run(muon(SCHEDULE, weight_decay=DECAY), model))
    jax.tree.map(functools.partial(np.testing.assert_allclose, **MUON_CLOSE), ours, wanted)


@pytest.mark.parametrize("kind", ["model", "factorized"])
def test_who_goes_to_muon(kind, request):
    """Matrices inside layers; embeddings, positions, head, norms and biases go to Adam."""
    params = request.getfixturevalue(kind)
    state = muon(0.1).init(params)[0]
    momentum = {str(path) for path, _ in tree.paths(state["muon"][0].mu)}
    adam = {str(path) for path, _ in tree.paths(state["adam"].mu)}
    everyone = {str(path) for path, _ in tree.paths(params)}
    assert momentum | adam == everyone and not momentum & adam
    mlp = {"mlp/up", "mlp/down"} if kind == "model" else {"mlp/up/base", "mlp/up/lora_a", "mlp/up/lora_b", "mlp/down"}
    query = {"attention/query"} if kind == "model" else {"attention/query/a", "attention/query/b"}
    inside = query | mlp | {"attention/key", "attention/value", "attention/out"}
    wanted = {f"decoder/layers[0:3]/{name}" for name in inside}
    assert momentum == wanted | ({"embed/tokens/b"} if kind == "factorized" else set())
    assert {"embed/positions", "head/out", "decoder/norm/scale", "decoder/layers[0:3]/attention/query_bias"} <= adam


def test_muon_updates_have_adams_size(model):
    """Liu et al. 2025: orthogonal updates scaled by 0.2 sqrt(max(inputs, outputs)) have a root mean square of about
    0.2, whatever the shape; five iterations leave singular values between 0.7 and 1.2."""
    new = matrices(run(muon(1.0, weight_decay=0.0), model, steps=1))
    for name, old in matrices(model).items():
        if "layers" in name and old.ndim == 2:
            size = np.sqrt(np.square(new[name] - old).mean())
            assert 0.6 * 0.2 < size < 1.3 * 0.2, (name, size)


# Rates and decays by path


def change(transformation, model, grads):
    first = lambda grads, model: transformation.update(grads, transformation.init(model), model)[0]  # noqa: E731
    updates = jax.jit(first)(grads, model)
    return {str(path): np.asarray(u) for path, u in tree.paths(unstack(jax.device_get(updates)))}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learning_rates_by_path(name, model):
    """A factor is a factor of everything the step does to a leaf, decay too; the last pattern that matches wins."""
    make, grads = OPTIMIZERS[name], gradients(model, 0)
    factors = {"mlp": 0.5, r"layers[1:]/mlp/up$": 0.0, "head": 3.0, r"layers[-1]/attention": 0.25}
    plain = change(make(0.1, weight_decay=DECAY), model, grads)
    got = change(make(0.1, weight_decay=DECAY, learning_rates=factors), model, grads)
    for path, u in plain.items():
        factor = 1.0
        factor = 0.5 if "mlp/" in path or "mlp_norm" in path else factor
        factor = 0.0 if path in ("decoder/layers[1]/mlp/up", "decoder/layers[2]/mlp/up") else factor
        factor = 3.0 if path == "head/out" else factor
        factor = 0.25 if "layers[2]/attention" in path else factor
        np.testing.assert_allclose(got[path], factor * u, rtol=1e-5, atol=1e-8, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_is_of_matrices_and_by_path(name, model):
    """Without a gradient a step is -rate * decay * parameter and nothing else."""
    zeros, make = jax.tree.map(np.zeros_like, model), OPTIMIZERS[name]
    params = {str(path): np.asarray(x) for path, x in tree.paths(unstack(model))}
    matrix = {str(path): spec.inputs is not None for path, spec in tree.paths(unstack(model).specs())}
    for path, u in change(make(0.1, weight_decay=DECAY), model, zeros).items():
        np.testing.assert_allclose(u, -0.1 * DECAY * matrix[path] * params[path], rtol=1e-5, atol=1e-8, err_msg=path)
    decays = {"embed": 0.0, r"layers[0]/mlp": 0.5, "decoder/norm": 0.7}
    for path, u in change(make(0.1, weight_decay=DECAY, weight_decays=decays), model, zeros).items():
        decay = DECAY * matrix[path]
        decay = 0.0 if path.startswith("embed") else decay
        decay = 0.5 if "layers[0]/mlp" in path else decay
        decay = 0.7 if path.startswith("decoder/norm") else decay
        np.testing.assert_allclose(u, -0.1 * decay * params[path], rtol=1e-5, atol=1e-8, err_msg=path)


@pytest.mark.parametrize("option", ["learning_rates", "weight_decays"])
def test_a_pattern_that_selects_nothing(option, model):
    transformation = adamw(0.1, **{option: {"layers/mpl/up": 0.0}})
    with pytest.raises(ConfigError, match="path pattern 'layers/mpl/up' selects nothing; did you mean .*mlp/up"):
        change(transformation, model, model)


def test_by_name(model):
    one, two = optimizer("adamw", 0.1, b1=0.5), adamw(0.1, b1=0.5)
    grads = gradients(model, 0)
    jax.tree.map(np.testing.assert_array_equal, change(one, model, grads), change(two, model, grads))
    assert list(OPTIMIZERS) == ["adamw", "adafactor", "muon"]
    for name in OPTIMIZERS:
        optimizer(name, 0.1)
    with pytest.raises(ConfigError, match="no optimizer 'adam', there are adamw, .*; did you mean 'adamw'"):
        optimizer("adam", 0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_holes_are_left_alone(name, model):
    """What is not trained is None: no state, no update."""
    trained, _ = tree.partition(model, "layers[1]/mlp/up$")
    transformation = OPTIMIZERS[name](0.1)
    state = jax.jit(transformation.init)(trained)
    updates, _ = jax.jit(transformation.update)(trained, state, trained)
    assert [str(path) for path, _ in tree.paths(updates)] == ["decoder/layers[1]/mlp/up"]
    largest = max(x.size for x in jax.tree.leaves(state))
    assert largest <= 16 * 64 and sum(x.size for x in jax.tree.leaves(state)) <= 2 * 16 * 64 + 5
