"""Cross-entropy: values and gradients against float64 written out by hand, in any chunks, on any mesh, of any model."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from lmx.core import hlo, sharding
from lmx.core.errors import ConfigError
from lmx.losses import cross_entropy, targets_of
from lmx.models.unigram import Unigram

B, T, V, D = 8, 12, 48, 16
# Float32 against float64: sums of at most 96 positions and 48 tokens of size 1, so about 100 roundings of 6e-8.
CLOSE = dict(rtol=1e-5, atol=1e-5)
MESHES = list(itertools.product(("fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"), ("explicit", "auto")))


def make_batch(b: int = B, t: int = T, v: int = V) -> dict[str, np.ndarray]:
    """Unlike weights, a third of them 0."""
    rng = np.random.default_rng(1)
    weights = rng.uniform(0.1, 3, (b, t)) * (rng.uniform(size=(b, t)) > 0.3)
    tokens, targets = rng.integers(0, v, (2, b, t)).astype(np.int32)
    return {"tokens": tokens, "targets": targets, "weights": weights.astype(np.float32)}


def by_hand(model, batch: dict[str, np.ndarray], z_loss: float):
    """(total, nll, squares, correct, gradient of rows, gradient of head) in float64, the logits held whole."""
    rows = np.asarray(model.rows, np.float64)
    head = rows.T if model.head is None else np.asarray(model.head, np.float64)
    tokens, targets, w = batch["tokens"], batch["targets"], np.asarray(batch["weights"], np.float64)
    features = rows[tokens]
    logits = features @ head  # (b, t, v)
    log_z = np.log(np.exp(logits).sum(-1))
    one_hot = np.eye(rows.shape[0])[targets]
    nll = w * (log_z - (logits * one_hot).sum(-1))
    correct = (w * (logits.argmax(-1) == targets)).sum()
    p = np.exp(logits - log_z[..., None])
    d_logits = w[..., None] * ((1 + 2 * z_loss * log_z[..., None]) * p - one_hot)
    d_rows = np.zeros_like(rows)
    np.add.at(d_rows, tokens, d_logits @ head.T)
    d_head = np.einsum("btd,btv->dv", features, d_logits)
    if model.head is None:
        d_rows, d_head = d_rows + d_head.T, None
    square = (w * log_z**2).sum()
    return nll.sum() + z_loss * square, nll.sum(), square, correct, d_rows, d_head


@functools.partial(jax.jit, static_argnames=("z_loss", "chunk"))
def differentiate(model, batch, z_loss=0.0, chunk=None):
    def total(model):
        total, weight, metrics = cross_entropy(model, batch, z_loss=z_loss, chunk=chunk)
        return total, (weight, metrics)

    return jax.value_and_grad(total, has_aux=True, allow_int=True)(model)


def check(model, batch, got, z_loss, **close):
    (total, (weight, metrics)), grads = jax.device_get(got)
    wanted, nll, square, correct, d_rows, d_head = by_hand(model, batch, z_loss)
    mass = np.asarray(batch["weights"], np.float64).sum()
    np.testing.assert_allclose(weight, mass, rtol=1e-6)
    np.testing.assert_allclose(total, wanted, rtol=close["rtol"])
    np.testing.assert_allclose(metrics["loss"], (nll, mass), rtol=close["rtol"])
    np.testing.assert_allclose(metrics["accuracy"], (correct, mass), rtol=close["rtol"])
    assert ("z_loss" in metrics) == bool(z_loss)
    if z_loss:
        np.testing.assert_allclose(metrics["z_loss"], (z_loss * square, mass), rtol=close["rtol"])
    np.testing.assert_allclose(grads.rows, d_rows, **close)
    if d_head is not None:
        np.testing.assert_allclose(grads.head, d_head, **close)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk", [1, 5, 100, None])  # 5 does not divide 12
def test_equals_float64(bigram, chunk, z_loss, tied):
    model, batch = bigram(V, D, tied), make_batch()
    check(model, batch, differentiate(model, batch, z_loss, chunk), z_loss, **CLOSE)


def test_without_gradient_the_values_are_the_same(bigram):
    model, batch = bigram(V, D, False), make_batch()
    total, weight, metrics = jax.jit(functools.partial(cross_entropy, z_loss=0.01, chunk=5))(model, batch)
    (again, (weight_2, metrics_2)), _ = differentiate(model, batch, 0.01, 5)
    np.testing.assert_allclose((total, weight), (again, weight_2), rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), metrics, metrics_2)


def test_gradients_scale_with_what_is_above(bigram):
    """The backward pass multiplies by the cotangent: minus three times the loss has minus three times the gradient."""
    model, batch = bigram(V, D, False), make_batch()
    plain = jax.grad(lambda model: cross_entropy(model, batch)[0])(model)
    scaled = jax.grad(lambda model: -3 * cross_entropy(model, batch)[0] + 7)(model)
    jax.tree.map(lambda s, p: np.testing.assert_allclose(s, -3 * p, **CLOSE), scaled, plain)


def test_bfloat16_compute(bigram):
    """Features and head are rounded to 8 bits each and so are the products: 2^-8 of logits of size 2 is 0.01 nats a
    token, of either sign. Gradients keep their direction: within 2 % by norm."""
    model, batch = bigram(V, D, False).replace(dtype="bfloat16"), make_batch()
    (total, (weight, _)), grads = differentiate(model, batch, 0.0, 5)
    wanted, _, _, _, d_rows, d_head = by_hand(model, batch, 0.0)
    assert total.dtype == jnp.float32 and grads.head.dtype == jnp.float32
    assert abs(total - wanted) / weight < 0.01
    for got, want in ((grads.rows, d_rows), (grads.head, d_head)):
        assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def test_bfloat16_parameters_have_bfloat16_gradients(bigram):
    """Summed over chunks in float32 and rounded once: half a unit in the last of 8 bits, beside the roundings above."""
    model, batch = bigram(V, D, False), make_batch()
    model = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), model)
    _, grads = differentiate(model, batch, 0.0, 1)
    _, _, _, _, d_rows, d_head = by_hand(model, batch, 0.0)
    assert grads.head.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(grads.head, np.float64) - d_head) < 5e-3 * np.linalg.norm(d_head)


def test_large_logits_are_finite(bigram):
    """exp(500) overflows; log Z and the gradient do not."""
    model, batch = bigram(V, D, False), make_batch()
    model = model.replace(head=model.head * 200)
    (total, _), grads = differentiate(model, batch)
    assert np.isfinite(total) and all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(grads)))


def sizes(jaxpr) -> set[int]:
    """The sizes of all arrays anywhere in a program."""
    found = set()
    for eqn in jaxpr.eqns:
        found |= {v.aval.size for v in [*eqn.invars, *eqn.outvars] if hasattr(v.aval, "size")}
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            found |= sizes(getattr(inner, "jaxpr", inner)) if is_jaxpr(inner) else set()
    return found


def is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize("gradient", [False, True])
def test_the_logits_are_never_held_whole(bigram, gradient):
    b, t, v, chunk = 4, 64, 96, 8
    model, batch = bigram(v, 8, True), make_batch(b, t, v)

    def largest(chunk):
        run = lambda model: cross_entropy(model, batch, chunk=chunk)[0]  # noqa: E731
        run = jax.grad(run) if gradient else run
        compiled = jax.jit(run).lower(model).compile().as_text()
        shapes = re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", compiled)
        in_compiled = max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
        return max(sizes(jax.make_jaxpr(run)(model).jaxpr)), in_compiled

    assert max(largest(chunk)) == b * chunk * v  # what it does hold, in the program as written and as compiled
    assert min(largest(t)) == b * t * v  # the check sees it where it is


def test_the_default_chunk_follows_the_vocabulary():
    """About 4 million logits: 16 positions of 4 rows at least, and all of a short text at once."""

    def chunks(b, t, v):
        shapes = jax.eval_shape(lambda: {"tokens": jnp.zeros((b, t), jnp.int32)})
        model = Unigram(jax.ShapeDtypeStruct((v,), jnp.float32))
        return max(sizes(jax.make_jaxpr(lambda m, x: cross_entropy(m, x)[0])(model, shapes).jaxpr)) // (b * v)

    assert chunks(4, 64, 100) == 64
    assert chunks(4, 1024, 32768) == 32
    assert chunks(4, 1024, 1 << 20) == 16


@pytest.mark.parametrize(("text", "kind"), MESHES)
def test_sharded_equals_float64(bigram, text, kind):
    tied = text == "fsdp=4,tensor=2"  # the head's axes are then exchanged
    model, batch = bigram(V, D, tied), make_batch()
    with sharding.use_mesh(text, explicit=kind == "explicit") as mesh:
        put = lambda x, *axes: jax.device_put(x, sharding.named_sharding(axes, x.shape, mesh))  # noqa: E731
        head = None if tied else put(model.head, "embed", "vocab")
        placed = model.replace(rows=put(model.rows, "vocab", "embed"), head=head)
        got = differentiate(placed, {name: put(x, "batch", "sequence") for name, x in batch.items()}, 0.01, 5)
        check(model, batch, got, 0.01, **CLOSE)
        if kind == "explicit":  # gradients lie as the parameters do
            assert got[1].rows.sharding.is_equivalent_to(placed.rows.sharding, 2)


@pytest.mark.parametrize(("text", "kind"), MESHES)
def test_the_heads_gradient_is_summed_over_devices_behind_the_last_chunk(bigram, text, kind):
    """And no scalar sum for every chunk: within the loop only a split vocabulary makes devices talk."""
    model, batch = bigram(V, D, False), make_batch()
    with sharding.use_mesh(text, explicit=kind == "explicit") as mesh:
        put = lambda x, *axes: jax.device_put(x, sharding.named_sharding(axes, x.shape, mesh))  # noqa: E731
        placed = model.replace(rows=put(model.rows, None, "embed"), head=put(model.head, "embed", "vocab"))
        rows = {name: put(x, "batch", "sequence") for name, x in batch.items()}
        step = jax.jit(jax.grad(lambda model, batch: cross_entropy(model, batch, chunk=4)[0]))
        found = hlo.collectives(step.lower(placed, rows).compile().as_text())
    tensor = mesh.shape["tensor"]
    assert {len(one.group) for one in found if one.count > 1} == ({tensor} if tensor > 1 else set())
    sums = [one for one in found if one.kind == "all-reduce" and len(one.group) == 8 // tensor]
    assert sums and max(one.bytes for one in sums) >= V * D * 4 // tensor


@pytest.mark.parametrize(("text", "kind"), MESHES)
def test_a_readout_that_places_what_it_gives(text, kind):
    """Of several rows a shard: there the rules' axes of the batch are taken."""
    model, batch = Unigram(jnp.asarray(np.random.default_rng(0).normal(size=V), jnp.float32)), make_batch(b=32)
    wanted = differentiate(model, batch, 0.01, 5)
    with sharding.use_mesh(text, explicit=kind == "explicit") as mesh:
        put = lambda x, *axes: jax.device_put(x, sharding.named_sharding(axes, x.shape, mesh))  # noqa: E731
        rows = {name: put(x, "batch", "sequence") for name, x in batch.items()}
        placed = jax.tree.map(lambda x: put(x, None), model)
        got = jax.device_get(jax.jit(differentiate, static_argnums=(2, 3))(placed, rows, 0.01, 5))
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), got, jax.device_get(wanted))


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_features_split_where_targets_are_not(bigram, kind):
    model, batch = bigram(V, D, False), make_batch()
    with sharding.use_mesh("data=2,fsdp=4", explicit=kind == "explicit") as mesh:
        head = jax.device_put(model.head, sharding.named_sharding(("embed", "vocab"), model.head.shape, mesh))
        check(model, batch, differentiate(model.replace(head=head), batch, 0.01, 5), 0.01, **CLOSE)


def test_one_device_mesh(bigram):
    model, batch = bigram(V, D, False), make_batch()
    with sharding.use_mesh(sharding.make_mesh("", devices=jax.devices()[:1])):
        check(model, batch, differentiate(model, batch, 0.01, 5), 0.01, **CLOSE)


# Which targets count


def test_targets_are_the_tokens_shifted_within_segments():
    tokens = np.array([[5, 6, 7, 8, 9, 0, 0], [1, 2, 3, 4, 5, 6, 7]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
    targets, weights = targets_of({"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments)})
    np.testing.assert_array_equal(weights, [[1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    counted = np.asarray(weights) > 0
    np.testing.assert_array_equal(np.asarray(targets)[:, :-1][counted[:, :-1]], tokens[:, 1:][counted[:, :-1]])
    _, weights = targets_of({"tokens": jnp.asarray(tokens)})
    np.testing.assert_array_equal(weights, [[1] * 6 + [0]] * 2)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("given", [True, False])
def test_weights_of_any_dtype_are_summed_in_float32(dtype, given):
    """1000 weights of 1 and of 3 are counted exactly: bfloat16 would stop at 256."""
    batch = {"tokens": jnp.zeros((10, 101), jnp.int32), "weights": jnp.ones((10, 101), dtype)}
    batch |= {"targets": batch["tokens"]} if given else {}
    _, weight, metrics = cross_entropy(Unigram(jnp.zeros(7)), batch)
    assert weight.dtype == jnp.float32 and weight == (1010 if given else 1000)
    np.testing.assert_allclose(metrics["loss"][0] / weight, np.log(7), rtol=1e-5)


def test_given_targets_and_weights_are_taken_as_they_are(bigram):
    """Segment ends count if the batch says so, and weights multiply what is derived."""
    tokens = jnp.asarray(make_batch()["tokens"])
    segments = jnp.asarray(np.repeat([[1] * 6 + [2] * 4 + [0] * 2], B, 0))
    _, weights = targets_of({"tokens": tokens, "targets": tokens, "segment_ids": segments})
    np.testing.assert_array_equal(weights, segments != 0)
    scaled = jnp.full((B, T), 0.5)
    _, weights = targets_of({"tokens": tokens, "weights": scaled, "segment_ids": segments})
    np.testing.assert_array_equal(weights[0], [0.5] * 5 + [0] + [0.5] * 3 + [0, 0.5, 0])


def test_weight_zero_is_as_if_it_were_not_there(bigram):
    """Other targets under zero weights: the same bits."""
    model, batch = bigram(V, D, False), make_batch()
    other = batch | {"targets": np.where(batch["weights"] == 0, 3, batch["targets"])}
    assert (other["targets"] != batch["targets"]).any()
    jax.tree.map(np.testing.assert_array_equal, differentiate(model, batch), differentiate(model, other))


def test_what_weighs_nothing_may_be_impossible():
    """A target of probability 0 under weight 0 adds nothing, gradient taken or not; under weight 1, infinity."""
    model = Unigram(jnp.asarray([-np.inf, 0.0, 0.0], jnp.float32))
    batch = {"tokens": jnp.ones((1, 3), jnp.int32), "targets": jnp.asarray([[0, 1, 2]])}
    for run in (cross_entropy, lambda model, batch: differentiate(model, batch)[0]):
        total = run(model, batch | {"weights": jnp.asarray([[0.0, 1.0, 1.0]])})[0]
        np.testing.assert_allclose(total, 2 * np.log(2), rtol=1e-6)
        assert run(model, batch | {"weights": jnp.ones((1, 3))})[0] == np.inf


# Other models


def test_unigram_by_hand():
    """-sum of w log p, and the gradient of the logits: w (p - counts)."""
    batch = make_batch(v=5)
    model = Unigram(jnp.asarray(np.random.default_rng(0).normal(size=5), jnp.float32))
    (total, (_, metrics)), grads = differentiate(model, batch, 0.0, 5)
    logits = np.asarray(model.log_probabilities, np.float64)
    log_p = logits - np.log(np.exp(logits).sum())
    w, targets = batch["weights"].astype(np.float64), batch["targets"]
    np.testing.assert_allclose(total, -(w * log_p[targets]).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"][0], w[targets == logits.argmax()].sum(), rtol=1e-5)
    counts = np.bincount(targets.ravel(), w.ravel(), minlength=5)
    np.testing.assert_allclose(grads.log_probabilities, w.sum() * np.exp(log_p) - counts, **CLOSE)


@struct.dataclass
class Table:
    """A bigram table: its features are the tokens themselves, and its head holds whole numbers beside the table."""

    table: jax.Array  # (v, v)
    shift: jax.Array  # () int32

    @property
    def vocab_size(self) -> int:
        return self.table.shape[0]

    def features(self, tokens: jax.Array, **_) -> jax.Array:
        return tokens

    def readout(self) -> Table:
        return self

    def logits(self, features: jax.Array) -> jax.Array:
        return self.table[(features + self.shift) % self.vocab_size]


@pytest.mark.parametrize("mesh", [None, "fsdp=8"])
def test_features_and_heads_with_integers(mesh):
    """N-gram models are language models too: what is an integer has no gradient, and the rest has the right one."""
    batch, table = make_batch(), np.random.default_rng(0).normal(size=(V, V))
    with sharding.use_mesh(mesh, explicit=False):  # on an Explicit one its lookup would have to say its layout
        (total, _), grads = differentiate(Table(jnp.asarray(table, jnp.float32), jnp.int32(1)), batch, 0.0, 5)
    w, rows = batch["weights"].astype(np.float64), (batch["tokens"] + 1) % V
    p = np.exp(table) / np.exp(table).sum(-1, keepdims=True)
    np.testing.assert_allclose(total, -(w * np.log(p[rows, batch["targets"]])).sum(), rtol=1e-5)
    wanted = np.zeros((V, V))
    np.add.at(wanted, rows, w[..., None] * (p[rows] - np.eye(V)[batch["targets"]]))
    np.testing.assert_allclose(grads.table, wanted, **CLOSE)


def test_negative_z_loss():
    with pytest.raises(ConfigError, match="z_loss must be 0 .off. or a small positive number such as 1e-4, not -1"):
        cross_entropy(Unigram(jnp.zeros(7)), {"tokens": jnp.zeros((1, 4), jnp.int32)}, z_loss=-1)
