"""The train state: what is trained and what is not, whose arrays are whose, averages, and the shapes of it all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmx.core import sharding, specs, tree, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA
from lmx.losses import cross_entropy
from lmx.models.transformer import Model
from lmx.train import abstract_start, adafactor, adamw, make_train_step, muon, start
from lmx.train.feed import place_batch

pytestmark = pytest.mark.usefixtures("quick")
OPTIMIZER = adamw(0.05)


def buffers(model) -> dict[str, int]:
    return {str(path): leaf.unsafe_buffer_pointer() for path, leaf in tree.paths(model)}


def train(state, packed, steps=2, loss=cross_entropy):
    step = make_train_step(loss, OPTIMIZER)
    for i in range(steps):
        state, _ = step(state, packed(i))
    return state


def adapted(model) -> Model:
    """LoRA of rank 2 on every query and up matrix; B is 0 at first, as in the paper."""

    def adapt(w):
        a = np.random.default_rng(0).normal(size=(*w.shape[:2], 2))
        return LoRA(w, jnp.asarray(a, jnp.float32), jnp.zeros((w.shape[0], 2, *w.shape[2:])), alpha=4.0)

    return tree.map(adapt, model, "attention/query$|mlp/up$", weights.is_weight)


@pytest.mark.parametrize(
    ("pattern", "wanted", "stacks"),
    [
        ("mlp/up", lambda path: "mlp/up" in path, 1),
        (r"layers[1:]/attention/|head", lambda path: "layers[1:3]/attention/" in path or path == "head/out", 2),
        (r"layers[1]", lambda path: "layers[1]" in path, 3),
    ],
)
def test_only_what_the_pattern_names_is_trained(tiny, packed, pattern, wanted, stacks):
    """It changes, has optimizer state, and is copied; the rest is the caller's own buffers. All the caller's live."""
    model = tiny(num_layers=3)
    whole, before = jax.device_get(model), buffers(model)
    state = start(model, OPTIMIZER, train=pattern)
    assert len(state.model.params.decoder.layers.stacks) == stacks
    chosen = {str(path) for path, _ in tree.paths(state.trained)}
    assert chosen == {str(path) for path, _ in tree.paths(state.model) if wanted(str(path))} != set()
    assert specs.count(state.opt_state) == 2 * specs.count(state.trained) + 1  # two moments and a count
    split = {str(path): np.asarray(x) for path, x in tree.paths(state.model)}
    assert state.frozen.params.embed.tokens is model.params.embed.tokens
    frozen = buffers(state.frozen)
    state = train(state, packed)
    for path, leaf in tree.paths(state.model):
        same = np.array_equal(leaf, split[str(path)])
        assert same != (str(path) in chosen), path
    assert buffers(state.frozen) == frozen
    assert {path: at for path, at in frozen.items() if path in before} == {
        path: at for path, at in before.items() if path in frozen
    }
    jax.tree.map(np.testing.assert_array_equal, whole, jax.device_get(model))  # alive, and as they were


@pytest.mark.slow
def test_everything_trained_leaves_the_callers_model_alive(tiny, packed):
    model, key = tiny(), jax.random.key(3)
    whole = jax.device_get(model)
    state = start(model, OPTIMIZER, key=key)
    assert not set(buffers(model).values()) & set(buffers(state.trained).values())
    once = train(state, packed)
    assert state.key.is_deleted() and jax.tree.leaves(state.trained)[0].is_deleted()  # the state given is donated
    jax.tree.map(np.testing.assert_array_equal, whole, jax.device_get(model))
    again = train(start(model, OPTIMIZER, key=key), packed)  # and so the same start can be made again
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(once.trained), jax.device_get(again.trained))


@pytest.mark.slow
def test_lora(tiny, packed):
    """Only A and B change, only they have state, and the base weights stay the caller's."""
    plain = tiny(num_layers=3)
    model = adapted(plain)
    state = start(model, OPTIMIZER, train="lora_[ab]$")
    names = {path.parts[-1] for path, _ in tree.paths(state.trained)}
    assert names == {"lora_a", "lora_b"}
    # Each of three layers: query (16, 4, 4) and up (16, 24), so A 2 (16, 2), and B (2, 16) and (2, 24).
    assert specs.count(state.trained) == 3 * (2 * 16 * 2 + 2 * 16 + 2 * 24)
    assert specs.count(state.opt_state) == 2 * specs.count(state.trained) + 1
    frozen = buffers(state.frozen)
    state = train(state, packed, steps=3)
    assert buffers(state.frozen) == frozen == {name: at for name, at in buffers(model).items() if name in frozen}
    query = state.model.params.decoder.layers.stacks[0][0].attention.query
    assert query.base is plain.params.decoder.layers.stacks[0][0].attention.query
    assert np.abs(query.lora_b).max() > 0.01
    assert not np.array_equal(query.lora_a, model.params.decoder.layers.stacks[0][0].attention.query.lora_a)
    logits = jax.jit(lambda model: model.logits(packed()["tokens"]))
    # The folded model has the same function; the trained one is not the plain one.
    np.testing.assert_allclose(logits(weights.fold(state.model)), logits(state.model), rtol=1e-4, atol=1e-4)
    assert np.abs(logits(state.model) - logits(plain)).max() > 0.05


def test_integers_are_frozen(packed):
    """Whole numbers in a tree are carried along, whatever the pattern says; a pattern of nothing else is an error."""
    tree_ = {"w": jnp.ones(3), "table": jnp.arange(4), "flag": jnp.asarray([True])}
    state = start(tree_, OPTIMIZER)
    assert state.trained["table"] is None and state.frozen["table"] is tree_["table"]
    assert state.frozen["flag"] is tree_["flag"] and state.frozen["w"] is None
    loss = lambda x, batch, key: ((x["w"] * x["table"][1:]).sum(), jnp.float32(1), {})  # noqa: E731
    state = train(state, lambda i: {}, loss=loss)
    assert (np.asarray(state.model["w"]) < 1).all() and (np.asarray(state.model["table"]) == np.arange(4)).all()
    with pytest.raises(ConfigError, match="'table' selects only integer arrays, which cannot be trained"):
        start(tree_, OPTIMIZER, train="table")


@pytest.mark.slow
def test_moving_average(tiny, packed):
    """After n steps: decay^n of the start plus (1 - decay) decay^(n - i) of the parameters after step i."""
    decay, model = 0.7, tiny()
    state, step = start(model, OPTIMIZER, train="mlp", ema_decay=decay), make_train_step(cross_entropy, OPTIMIZER)
    history = [jax.device_get(state.trained)]
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.trained)
    for i in range(4):
        state, _ = step(state, packed(i))
        history.append(jax.device_get(state.trained))
    factors = [decay**4] + [(1 - decay) * decay ** (4 - i) for i in range(1, 5)]
    wanted = jax.tree.map(lambda *xs: sum(f * x.astype(np.float64) for f, x in zip(factors, xs, strict=True)), *history)
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)  # noqa: E731  (five roundings)
    jax.tree.map(close, state.ema, wanted)
    averaged = state.ema_model
    assert averaged.params.embed.tokens is model.params.embed.tokens
    jax.tree.map(close, tree.partition(averaged, "mlp")[0], wanted)
    assert np.isfinite(averaged.logits(packed()["tokens"])).all()


def test_the_average_of_bfloat16_is_kept_in_float32(tiny):
    state = start(tiny(dtype="bfloat16"), OPTIMIZER, ema_decay=0.9)
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.ema_model)} == {jnp.dtype("bfloat16")}


def test_without_an_average_its_model_is_the_model(tiny):
    state = start(tiny(), OPTIMIZER)
    assert state.ema is None
    jax.tree.map(np.testing.assert_array_equal, state.ema_model, state.model)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5, float("nan")])
def test_bad_decays(tiny, decay):
    with pytest.raises(ConfigError, match="ema_decay must lie between 0 and 1, such as 0.999, not"):
        start(tiny(), OPTIMIZER, ema_decay=decay)


def test_a_pattern_that_selects_nothing(tiny):
    with pytest.raises(ConfigError, match="'decoder/layers/mlp/upp' selects nothing; did you mean .*layers/mlp/up'"):
        start(tiny(), OPTIMIZER, train="decoder/layers/mlp/upp")
    with pytest.raises(ConfigError, match="selects nothing.*layers are numbered 0 to 1"):
        start(tiny(), OPTIMIZER, train=r"layers[5]/mlp")


@pytest.mark.parametrize("mesh", [None, "explicit", "auto"])
@pytest.mark.parametrize("make", [adamw, adafactor, muon])
def test_abstract_start_is_the_shape_of_start(tiny, make, mesh):
    """Structure, shapes, dtypes, and on a mesh the places of what has a parameter's shape."""
    model, optimizer = tiny(), make(0.1)
    with sharding.use_mesh(mesh and "fsdp=4,tensor=2", explicit=mesh == "explicit"):
        shapes = Model(model.config, specs.shapes(model.specs().params))
        if mesh:
            model = jax.device_put(model, specs.shardings(model.specs()))
        options = dict(train="layers[1:]|embed", ema_decay=0.9)
        made, wanted = abstract_start(shapes, optimizer, **options), start(model, optimizer, **options)
        assert jax.tree.structure(made) == jax.tree.structure(wanted)
        for (keys, a), b in zip(jax.tree_util.tree_flatten_with_path(made)[0], jax.tree.leaves(wanted), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), keys
            if mesh and a.ndim:
                assert a.sharding.is_equivalent_to(b.sharding, a.ndim), keys


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_frozen_parts_and_averages_on_a_mesh(tiny, packed, kind):
    """Freezing, averaging and cutting stacks leave every array where the rules put it, and compute what they did."""
    model = tiny()
    options = dict(train=r"layers[1]/mlp|head", ema_decay=0.5)
    alone = train(start(model, OPTIMIZER, **options), packed)
    with sharding.use_mesh("fsdp=4,tensor=2", explicit=kind == "explicit"):
        whole = jax.device_put(model, specs.shardings(model.specs()))
        state = train(start(whole, OPTIMIZER, **options), lambda i: place_batch(packed(i)))
        rules = specs.shardings(state.model.specs())
        for (path, x), (_, rule) in zip(tree.paths(state.model), tree.paths(rules), strict=True):
            assert x.sharding.is_equivalent_to(rule, x.ndim), path
        places = zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.trained), strict=True)
        assert all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in places)
    # Adam divides small gradients by their own size: see test_step.
    close = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-4)  # noqa: E731
    jax.tree.map(close, state.ema_model, alone.ema_model)


@pytest.mark.slow
def test_in_somebody_elses_jit_and_loop(tiny, packed):
    """`start`'s parts and the step work under the caller's own jit, with any optax optimizer."""
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(0.05))
    step = make_train_step(cross_entropy, optimizer)

    @jax.jit
    def twice(state, one, two):
        state, _ = step(state, one)
        return step(state, two)

    model = tiny()
    theirs, metrics = twice(start(model, optimizer), packed(0), packed(1))
    state = start(model, optimizer)
    for i in range(2):
        state, wanted = step(state, packed(i))
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)  # noqa: E731
    jax.tree.map(close, theirs.trained, state.trained)


@pytest.mark.slow
def test_a_teacher_is_an_argument_and_not_part_of_the_program(tiny, packed):
    """Distillation from a frozen teacher of 100 times the size: the program holds none of its numbers."""
    student, teacher = tiny(), tiny(hidden_size=64, intermediate_size=512, num_heads=8, num_kv_heads=8)

    def distil(models, batch, key):
        total, weight, metrics = cross_entropy(models["student"], batch)
        wanted = jax.nn.log_softmax(models["teacher"].logits(batch["tokens"]))
        got = jax.nn.log_softmax(models["student"].logits(batch["tokens"]))
        apart = (jnp.exp(wanted) * (wanted - got)).sum(-1) * batch["weights"]
        return total + apart.sum(), weight, metrics | {"apart": (apart.sum(), weight)}

    optimizer = adamw(0.01)
    state = start({"student": student, "teacher": teacher}, optimizer, train="student")
    step = make_train_step(distil, optimizer)
    text = jax.jit(step).lower(state, packed()).as_text()
    closed = make_train_step(lambda m, *rest: distil(m | {"teacher": teacher}, *rest), optimizer)
    embedded = jax.jit(closed).lower(start({"student": student}, optimizer), packed()).as_text()
    assert len(text) < 500_000 and len(embedded) > len(text) + specs.nbytes(teacher)  # what a closure would do
    before = jax.device_get(teacher)
    state, first = step(state, packed())
    for _ in range(5):
        state, metrics = step(state, packed())
    assert metrics["apart"] < first["apart"]
    assert specs.count(state.opt_state) == 2 * specs.count(student) + 1  # two moments and a count
    jax.tree.map(np.testing.assert_array_equal, before, state.model["teacher"])
