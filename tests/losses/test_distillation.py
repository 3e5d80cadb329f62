"""Distillation: values and gradients against float64 written out by hand and against torch, chunked, sharded."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from lmx.core import hlo, sharding
from lmx.core.errors import ConfigError
from lmx.losses import Distillation, cross_entropy, distillation
from lmx.models.unigram import Unigram

B, T, V, D = 8, 12, 48, 16
MESHES = list(itertools.product(("fsdp=8", "fsdp=4,tensor=2"), ("explicit", "auto")))
# "jsd" both ways from its middle; T below, at and above 1; with and without T^2, with and without cross-entropy.
OPTIONS = [
    dict(divergence=divergence, temperature=temperature, **more)
    for (divergence, temperature), more in zip(
        itertools.product(("forward", "reverse", "jsd"), (1.0, 0.5, 2.0, 4.0)),
        itertools.cycle([{}, dict(t_squared=False, beta=0.3), dict(alpha=0.25, beta=0.9)]),
        strict=False,
    )
]


def make_batch(b: int = B, t: int = T, v: int = V) -> dict[str, np.ndarray]:
    """Unlike weights, a third of them 0."""
    rng = np.random.default_rng(1)
    weights = rng.uniform(0.1, 3, (b, t)) * (rng.uniform(size=(b, t)) > 0.3)
    tokens, targets = rng.integers(0, v, (2, b, t)).astype(np.int32)
    return {"tokens": tokens, "targets": targets, "weights": weights.astype(np.float32)}


@pytest.fixture
def pair(bigram):
    """A student and a teacher of twice its width."""
    return jax.tree.map(jnp.asarray, Distillation(bigram(V, D, False), bigram(V, 2 * D, True, seed=1)))


def logits_of(model, tokens) -> np.ndarray:
    rows = np.asarray(model.rows, np.float64)
    return rows[tokens] @ (rows.T if model.head is None else np.asarray(model.head, np.float64))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(pair, batch, temperature=1.0, divergence="forward", beta=0.5, alpha=1.0, t_squared=True):
    """(total, divergence, nll, agreed, gradient of the rows, of the head) in float64, the logits held whole; the
    gradient by the Jacobian of softmax, (diag(q) - q q') times what the divergence's derivative by q is."""
    tokens, targets, w = batch["tokens"], batch["targets"], np.asarray(batch["weights"], np.float64)
    z, y = logits_of(pair.student, tokens), logits_of(pair.teacher, tokens)
    p, q = softmax(y / temperature), softmax(z / temperature)
    if divergence == "forward":
        each, by_q = p * np.log(p / q), -p / q
    elif divergence == "reverse":
        each, by_q = q * np.log(q / p), np.log(q / p) + 1
    else:
        m = beta * p + (1 - beta) * q
        each = beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)
        by_q = -beta * p * (1 - beta) / m + (1 - beta) * (np.log(q / m) + 1 - q * (1 - beta) / m)
    jacobian = np.einsum("btv,vu->btvu", q, np.eye(V)) - np.einsum("btv,btu->btvu", q, q)
    scale = alpha * (temperature**2 if t_squared else 1)
    d_logits = scale / temperature * np.einsum("btvu,btu->btv", jacobian, by_q)
    one_hot, p_1 = np.eye(V)[targets], softmax(z)
    d_logits = w[..., None] * (d_logits + (1 - alpha) * (p_1 - one_hot))
    apart, nll = (w * each.sum(-1)).sum(), -(w * np.log((p_1 * one_hot).sum(-1))).sum()
    features = np.asarray(pair.student.rows, np.float64)[tokens]
    d_rows = np.zeros_like(pair.student.rows, np.float64)
    np.add.at(d_rows, tokens, d_logits @ np.asarray(pair.student.head, np.float64).T)
    agreed = (w * (z.argmax(-1) == y.argmax(-1))).sum()
    return scale * apart + (1 - alpha) * nll, apart, nll, agreed, d_rows, np.einsum("btd,btv->dv", features, d_logits)


NAMES = ("temperature", "divergence", "beta", "alpha", "t_squared", "chunk")


@functools.partial(jax.jit, static_argnames=NAMES)
def differentiate(pair, batch, **options):
    def total(pair):
        total, weight, metrics = distillation(pair, batch, **options)
        return total, (weight, metrics)

    return jax.value_and_grad(total, has_aux=True, allow_int=True)(pair)


def close(got, want) -> None:
    """One part in a million of a gradient: of its norm, for single entries cancel."""
    assert np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want)


def check(pair, batch, got, **options):
    (total, (weight, metrics)), grads = jax.device_get(got)
    wanted, apart, nll, agreed, d_rows, d_head = by_hand(pair, batch, **options)
    mass = np.asarray(batch["weights"], np.float64).sum()
    np.testing.assert_allclose(weight, mass, rtol=1e-6)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    by_name = {"loss": wanted, "jsd" if options.get("divergence") == "jsd" else "kl": apart, "agreement": agreed}
    by_name |= {"cross_entropy": nll} if options.get("alpha", 1) < 1 else {}
    assert set(metrics) == set(by_name)
    for name, value in by_name.items():
        np.testing.assert_allclose(metrics[name], (value, mass), rtol=1e-6)
    close(grads.student.rows, d_rows)
    close(grads.student.head, d_head)
    assert not np.asarray(grads.teacher.rows).any()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_equals_float64(pair, options):
    check(pair, make_batch(), differentiate(pair, make_batch(), chunk=5, **options), **options)  # 5 does not divide 12


@pytest.mark.parametrize("chunk", [1, 100, None])
def test_any_chunk_gives_the_same(pair, chunk):
    check(pair, make_batch(), differentiate(pair, make_batch(), chunk=chunk, temperature=2.0), temperature=2.0)


def test_without_gradient_the_values_are_the_same(pair):
    run = jax.jit(functools.partial(distillation, chunk=5, divergence="jsd", alpha=0.5))
    total, weight, metrics = run(pair, make_batch())
    (again, (weight_2, metrics_2)), _ = differentiate(pair, make_batch(), chunk=5, divergence="jsd", alpha=0.5)
    np.testing.assert_allclose((total, weight), (again, weight_2), rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), metrics, metrics_2)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(pair):
    """Divergence 0 to the rounding of v probabilities, not below it; no gradient; agreement 1."""
    same = pair.replace(teacher=pair.student)
    for divergence in ("forward", "reverse", "jsd"):
        (total, (weight, metrics)), grads = differentiate(same, make_batch(), divergence=divergence)
        assert abs(total) < 1e-6 * weight and np.abs(grads.student.rows).max() < 1e-5
        agreed, of = metrics["agreement"]  # sums of the same weights, in any order: one token less would be 1e-3 less
        np.testing.assert_allclose(agreed, of, rtol=1e-6)


def test_near_its_teacher_the_divergence_keeps_its_digits(pair):
    """A KL of 1e-6 nats, far below the rounding of the log-probabilities (5e-7 at size 5), to one part in a hundred."""
    rng = np.random.default_rng(3)
    head = pair.student.head
    near = pair.replace(teacher=pair.student.replace(head=head + 5e-4 * rng.normal(size=head.shape).astype("f")))
    wanted, apart, *_ = by_hand(near, make_batch())
    assert apart < 2e-5 * make_batch()["weights"].sum()
    np.testing.assert_allclose(distillation(near, make_batch())[0], wanted, rtol=1e-2)


# What others compute, from torch's own functions. `lmx/losses/distillation.py` has the table.


def as_torch(pair, batch, temperature):
    torch = pytest.importorskip("torch", reason="torch is the oracle of peers' losses; install the extra 'oracle'")
    z = torch.tensor(logits_of(pair.student, batch["tokens"]), requires_grad=True)
    y = torch.tensor(logits_of(pair.teacher, batch["tokens"]))
    return torch, z, torch.log_softmax(z / temperature, -1), torch.log_softmax(y / temperature, -1)


def ours(pair, batch, **options):
    """(mean over the weight, its gradient of the student's head)."""

    def mean(head):
        student = pair.student.replace(head=head)
        total, weight, _ = distillation(pair.replace(student=student), batch, **options)
        return total / weight

    return jax.value_and_grad(mean)(pair.student.head)


def head_gradient(pair, batch, z) -> np.ndarray:
    features = np.asarray(pair.student.rows, np.float64)[batch["tokens"]]
    return np.einsum("btd,btv->dv", features, z.grad.numpy())


def agree(pair, batch, z, theirs, **options):
    theirs.backward()
    value, gradient = ours(pair, batch, **options)
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-6)
    close(gradient, head_gradient(pair, batch, z))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5, 0.1])
def test_trl(pair, beta, temperature):
    """Token mean over labels that are not -100, no T^2; beta 0 is forward, 1 reverse, and between the mixture."""
    batch = make_batch()
    batch["weights"] = (batch["weights"] > 0).astype(np.float32)
    torch, z, log_q, log_p = as_torch(pair, batch, temperature)
    kl_div = functools.partial(torch.nn.functional.kl_div, reduction="none", log_target=True)  # of (log q, log p)
    if beta in (0.0, 1.0):
        each = kl_div(log_q, log_p) if beta == 0 else kl_div(log_p, log_q)
    else:
        log_m = torch.logsumexp(torch.stack([log_q + np.log1p(-beta), log_p + np.log(beta)]), 0)
        each = beta * kl_div(log_m, log_p) + (1 - beta) * kl_div(log_m, log_q)
    theirs = each[torch.tensor(batch["weights"]) > 0].sum() / batch["weights"].sum()
    divergence = {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd")
    how = dict(beta=beta) if divergence == "jsd" else {}
    agree(pair, batch, z, theirs, divergence=divergence, temperature=temperature, t_squared=False, **how)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_textbrewer(pair, temperature):
    """Cross-entropy to soft targets, a mean over all positions, no T^2: less the teacher's entropy it is the KL."""
    batch = make_batch() | {"weights": np.ones((B, T), np.float32)}
    _, z, log_q, log_p = as_torch(pair, batch, temperature)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    theirs = -(log_p.exp() * log_q).sum(-1).mean() - entropy
    agree(pair, batch, z, theirs, temperature=temperature, t_squared=False)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tunix(pair, temperature):
    """A mean over all positions times T^2, mixed with cross-entropy to the targets at temperature 1."""
    batch = make_batch() | {"weights": np.ones((B, T), np.float32)}
    torch, z, log_q, log_p = as_torch(pair, batch, temperature)
    soft = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    hard = torch.nn.functional.cross_entropy(z.reshape(-1, V), torch.tensor(batch["targets"].reshape(-1)).long())
    agree(pair, batch, z, 0.3 * soft + 0.7 * hard, temperature=temperature, alpha=0.3)


def test_distillkit_and_torch(pair):
    """Sums over tokens; torch's "batchmean" divides them by the rows."""
    batch = make_batch() | {"weights": np.ones((B, T), np.float32)}
    torch, _, log_q, log_p = as_torch(pair, batch, 2.0)
    total = distillation(pair, batch, temperature=2.0, t_squared=False)[0]
    for reduction, divisor in (("sum", 1), ("batchmean", B)):
        theirs = torch.nn.functional.kl_div(log_q, log_p, reduction=reduction, log_target=True)
        np.testing.assert_allclose(total / divisor, theirs.item(), rtol=1e-6)


# Which positions count


def test_weight_zero_is_as_if_it_were_not_there(pair):
    """Other tokens and targets under zero weights: the same numbers, and a batch of the rest alone too."""
    batch = make_batch()
    dead = batch["weights"] == 0
    other = batch | {"tokens": np.where(dead, 3, batch["tokens"]), "targets": np.where(dead, 5, batch["targets"])}
    got, again = (differentiate(pair, x, alpha=0.5)[0] for x in (batch, other))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, again)
    alive = {name: x[~dead][None] for name, x in batch.items()}
    check(pair, alive, differentiate(pair, batch, alpha=0.5), alpha=0.5)


def test_targets_weights_and_segments_are_those_of_cross_entropy(pair):
    """Where nothing else is said, the end of a row, the ends of segments and padding do not count."""
    tokens = make_batch()["tokens"]
    segments = np.repeat([[1] * 6 + [2] * 4 + [0] * 2], B, 0)
    for batch in ({"tokens": tokens}, {"tokens": tokens, "segment_ids": segments}):
        _, weight, metrics = distillation(pair, batch, alpha=0.5)
        _, wanted, of_student = cross_entropy(pair.student, batch)
        assert weight == wanted == (B * 11 if "segment_ids" not in batch else B * 8)
        np.testing.assert_allclose(metrics["cross_entropy"], of_student["loss"], rtol=1e-6)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_nothing_that_counts(pair, divergence):
    """Weight 0, sum 0 and gradient 0, also where what does not count is not a number."""
    batch = make_batch() | {"weights": np.zeros((B, T), np.float32)}
    for broken in (pair, pair.replace(teacher=jax.tree.map(lambda x: x * np.nan, pair.teacher))):
        (total, (weight, metrics)), grads = differentiate(broken, batch, divergence=divergence, alpha=0.5)
        assert total == 0 and weight == 0 and not any(np.asarray(x).any() for x in jax.tree.leaves(grads))
        assert not any(a or b for a, b in metrics.values())


def test_impossible_tokens():
    """What neither holds possible adds nothing. What the teacher alone does is infinitely far forward, and finite
    backward; the JSD is at most the entropy of its weights."""
    weights = {"tokens": jnp.zeros((1, 3), jnp.int32), "targets": jnp.ones((1, 3), jnp.int32)}
    narrow, wide = (Unigram(jnp.log(jnp.asarray(p))) for p in ([0.0, 0.0, 0.5, 0.5], [0.0, 0.5, 0.25, 0.25]))
    apart = lambda s, t, **how: distillation(Distillation(s, t), weights, **how)[0] / 3  # noqa: E731
    np.testing.assert_allclose(apart(wide, narrow), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(apart(narrow, wide, divergence="reverse"), np.log(2), rtol=1e-6)
    assert apart(narrow, wide) == np.inf and apart(wide, narrow, divergence="reverse") == np.inf
    ends = [Unigram(jnp.log(jnp.asarray(p))) for p in ([1.0, 0.0], [0.0, 1.0])]
    entropy = -0.3 * np.log(0.3) - 0.7 * np.log(0.7)
    np.testing.assert_allclose(apart(*ends, divergence="jsd", beta=0.3), entropy, rtol=1e-6)
    grads = jax.grad(lambda s: apart(s, wide, divergence="jsd"))(narrow)
    assert np.isfinite(grads.log_probabilities).all()


@jax.custom_jvp
def untouched(x):
    return x


@untouched.defjvp
def _touched(primals, tangents):
    raise AssertionError("the teacher was differentiated")


def test_the_teacher_is_never_differentiated(pair):
    """Not even to throw it away, where the gradient of both is asked for: its activations would be kept."""

    class Watched(type(pair.teacher)):
        def features(self, tokens, **_):
            return untouched(super().features(tokens))

    watched = struct.dataclass(Watched)(pair.teacher.rows, None)
    with pytest.raises(AssertionError, match="was differentiated"):
        jax.grad(lambda model: cross_entropy(model, make_batch())[0])(watched)
    check(pair, make_batch(), differentiate(pair.replace(teacher=watched), make_batch()))


# Any language model, chunks, meshes


@struct.dataclass
class Table:
    """A bigram table whose features are the tokens themselves."""

    table: jax.Array  # (v, v)

    @property
    def vocab_size(self) -> int:
        return self.table.shape[0]

    def features(self, tokens, **_):
        return tokens

    def readout(self):
        return self

    def logits(self, features):
        return self.table[features].astype(jnp.float32)


def test_kinds_may_differ(pair):
    """A table teaches a unigram, whose best is then known: with as many positions a token, the mean of p by token."""
    table = np.random.default_rng(0).normal(size=(V, V))
    tokens = np.arange(V, dtype=np.int32)[None]
    batch = {"tokens": tokens, "targets": tokens}
    best = Unigram(jnp.asarray(np.log(softmax(table).mean(0)), jnp.float32))
    teacher = Table(jnp.asarray(table, jnp.float32))
    (total, _), grads = differentiate(Distillation(best, teacher), batch)
    assert np.abs(grads.student.log_probabilities).max() < 1e-5 * V
    for other in (Unigram(jnp.zeros(V)), pair.student):
        assert distillation(Distillation(other, teacher), batch)[0] > total


def test_the_logits_are_never_held_whole(bigram):
    """No array in the compiled step is of more numbers than a chunk's logits; where all are one chunk, one is."""
    b, t, v, chunk = 4, 64, 256, 8
    pair, batch = Distillation(bigram(v, 8, False), bigram(v, 16, True, seed=1)), make_batch(b, t, v)

    def largest(chunk: int) -> int:
        run = jax.grad(lambda pair: distillation(pair, batch, chunk=chunk, divergence="jsd", alpha=0.5)[0])
        computations, _ = hlo._parse(jax.jit(run).lower(pair).compile().as_text())
        shapes = {i.shape for found in computations.values() for i in found}
        return max(hlo.nbytes(shape) for shape in shapes if not shape.startswith("("))

    assert largest(chunk) == 4 * b * chunk * v
    assert largest(t) == 4 * b * t * v


@pytest.mark.parametrize(("text", "kind"), MESHES)
def test_sharded_equals_float64(pair, text, kind):
    batch, options = make_batch(), dict(divergence="jsd", alpha=0.5, temperature=2.0)
    with sharding.use_mesh(text, explicit=kind == "explicit") as mesh:
        put = lambda x, *axes: jax.device_put(x, sharding.named_sharding(axes, x.shape, mesh))  # noqa: E731
        student = pair.student.replace(
            rows=put(pair.student.rows, "vocab", "embed"), head=put(pair.student.head, "embed", "vocab")
        )
        placed = Distillation(student, pair.teacher.replace(rows=put(pair.teacher.rows, None, "embed")))
        rows = {name: put(x, "batch", "sequence") for name, x in batch.items()}
        got = differentiate(placed, rows, chunk=5, **options)
        check(pair, batch, got, **options)
        if kind == "explicit":  # gradients lie as the parameters do
            assert got[1].student.rows.sharding.is_equivalent_to(student.rows.sharding, 2)


def test_features_split_where_targets_are_not(pair):
    batch, options = make_batch(), dict(divergence="jsd", alpha=0.5)
    with sharding.use_mesh("data=2,fsdp=4") as mesh:
        head = pair.student.head
        head = jax.device_put(head, sharding.named_sharding(("embed", "vocab"), head.shape, mesh))
        placed = Distillation(pair.student.replace(head=head), pair.teacher)
        check(pair, batch, differentiate(placed, batch, chunk=5, **options), **options)


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(temperature=0), "temperature must be above 0, such as 1 or 2, not 0"),
        (dict(temperature=-2.0), "temperature must be above 0, such as 1 or 2, not -2"),
        (dict(temperature=float("nan")), "temperature must be above 0, such as 1 or 2, not nan"),
        (dict(divergence="revers"), "no divergence 'revers', there are forward, .*did you mean 'reverse'"),
        (dict(divergence="jsd", beta=0.0), 'beta must lie between 0 and 1, not 0; .*="forward" or "reverse"'),
        (dict(alpha=0.0), "alpha is the divergence's share, above 0 and at most 1, not 0; .*losses.cross_entropy"),
        (dict(alpha=1.5), "alpha is the divergence's share, above 0 and at most 1, not 1.5"),
    ],
)
def test_bad_options(pair, options, said):
    with pytest.raises(ConfigError, match=said):
        distillation(pair, make_batch(), **options)


def test_vocabularies_of_unlike_size(bigram):
    with pytest.raises(ConfigError, match="student's vocabulary has 48 tokens and the teacher's 64.*vocab_size=64"):
        distillation(Distillation(bigram(48, D, True), bigram(64, D, True)), make_batch())
