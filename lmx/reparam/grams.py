"""What a model's weights see: second moments of their inputs, and of the loss's gradient at their outputs.

    for seen in moments(model, batches, want=("input", "output")):     # a layer at a time
        seen["decoder/layers[3]/mlp/up"].input                         # E[x' x], (m, m)

Calibration batches go forward once, and back once where gradients are wanted: layer by layer, all batches through one
layer before the next, so that the moments of one layer and the batches' activations are all that is in memory. The
gradient is that of -log p(y) for labels y drawn from the model's own distribution, whose second moments are the Fisher
information (Martens and Grosse 2015, section 2); a model without one has noise of unit variance on what it gives. Heads
that share keys and values need nothing of their own: a weight's axes are flattened to (m, n).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import sharding, tree, weights
from lmx.core.errors import ConfigError, nearest
from lmx.core.kinds import Sum
from lmx.models import stacks
from lmx.models.protocol import split_chunks
from lmx.models.transformer import Model
from lmx.nn import heads
from lmx.reparam.walk import Batch, Matrix, Walk, gram, leave, real, shown

LINEARS = "/(attention|cross|mlp)/(query|key|value|out|gate|up|down)$"
GRADIENTS = ("output", "fisher")
KINDS = ("input", "absolute", *GRADIENTS)
CHUNK = 64  # positions whose labels are drawn at a time


@dataclasses.dataclass(frozen=True)
class Site:
    """A matrix of a model: one weight of one layer."""

    path: str  # such as decoder/layers[3]/mlp/up
    tower: str  # decoder or encoder
    layer: int
    inputs: int  # how many of its axes are inputs
    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape


@dataclasses.dataclass(frozen=True)
class Moments:
    """Means over the tokens that were seen, in float64; what was not wanted is None."""

    tokens: int
    input: np.ndarray | None = None  # E[x' x], (m, m)
    absolute: np.ndarray | None = None  # E|x|, (m,)
    output: np.ndarray | None = None  # E[g' g], (n, n)
    fisher: np.ndarray | None = None  # E[x_i^2 |g|^2], (m,): of each row of the weight


def sites(model: Model, pattern: str = LINEARS) -> list[Site]:
    """The matrices in the model's layers that a path pattern selects, in order.

    Raises ConfigError if it selects nothing, or what is no matrix of a layer.
    """
    model = stacks.unstack(model)
    found = []
    axes = [spec for _, spec in tree.paths(model.specs(), weights.is_weight)]
    for (path, leaf, hit), spec in zip(tree.matches(model, pattern, weights.is_weight), axes, strict=True):
        if not hit.all():
            continue
        inputs = _inputs(leaf, spec)
        if path.layers is None or inputs is None:
            raise ConfigError(
                f"path pattern {pattern!r} selects {path}, which is no matrix of a layer; the default is {LINEARS!r}"
            )
        shape = leaf.shape[1:]
        sides = int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:]))
        name = "/".join(path.parts[path.at + 1 :])
        found.append(Site(str(path), path.parts[0], path.layers[0], inputs, Matrix(name, sides)))
    return found


def moments(
    model: Model,
    batches: Sequence[Batch],
    pattern: str = LINEARS,
    *,
    want: Sequence[str] = ("input", "output"),
    key: jax.Array | None = None,
) -> Iterator[dict[str, Moments]]:
    """The moments of every selected matrix, those of one layer at a time, by path.

    batches: "tokens" (b, t) each, and what else the model reads (`Model.features`); padding (segment 0) does not count.
      Equal shapes are compiled once. On a mesh they are laid out as the rules say, and sums are over all of them.
    want: of "input", "absolute", "output", "fisher". The last two go back through the model, and layers then come from
      the last to the first. key: for the labels that are drawn.
    Raises ConfigError for batches without tokens, or a kind of moments that there is not.
    """
    for kind in want:
        if kind not in KINDS:
            raise ConfigError(f"no moments {kind!r}, there are {', '.join(KINDS)}{nearest(kind, KINDS)}")
    walk = Walk(model, batches)
    if not any(float(real(batch).sum()) for batch in walk.batches):
        raise ConfigError("calibration needs at least one batch with a token that is no padding")
    wanted: Wanted = {}
    for site in sites(model, pattern):
        wanted.setdefault((site.tower, site.layer), []).append(site)
    if set(want) & set(GRADIENTS):
        yield from _backward(walk, wanted, tuple(want), jax.random.key(0) if key is None else key)
    else:
        yield from _forward(walk, wanted, tuple(want))


def _inputs(w: Any, spec: Any) -> int | None:
    """How many of its axes are inputs; None for what is no matrix."""
    if not weights.is_weight(w):
        return spec.inputs
    if isinstance(w, Sum):
        return _inputs(w.parts[0], spec.parts[0])
    return len(w.inputs) if isinstance(w.inputs, tuple) else w.inputs


Wanted = dict[tuple[str, int], list[Site]]  # by tower and layer


def _forward(walk: Walk, wanted: Wanted, want: tuple[str, ...]) -> Iterator[dict[str, Moments]]:
    """Moments of inputs, from the first layer to the last."""
    for tower, layers in walk.layers.items():
        xs = walk.enter(tower)
        for i, block in enumerate(layers):
            here = wanted.get((tower, i))
            if here:
                yield _observed(walk, tower, block, xs, [jnp.zeros_like(x) for x in xs], here, want)[0]
            xs = walk.step(tower, block, xs)
        walk.leave(tower, xs)


def _backward(walk: Walk, wanted: Wanted, want: tuple[str, ...], key: jax.Array) -> Iterator[dict[str, Moments]]:
    """All moments, from the last layer to the first."""
    entered: dict[str, list[list]] = {}  # by tower and layer: what each batch brings to it
    for tower, layers in walk.layers.items():
        entered[tower] = [walk.enter(tower)]
        for block in layers:
            entered[tower].append(walk.step(tower, block, entered[tower][-1]))
        walk.leave(tower, entered[tower][-1])
    of_memory, keys = [None] * len(walk.batches), jax.random.split(key, len(walk.batches))
    for tower, layers in reversed(walk.layers.items()):
        ends = zip(entered[tower].pop(), walk.batches, of_memory, keys, strict=True)
        gs = [sharding.alone(_begin_back(walk.shell, tower, *end)) for end in ends]
        for i, block in reversed(list(enumerate(layers))):
            here = wanted.get((tower, i), [])
            seen, gs, more = _observed(walk, tower, block, entered[tower].pop(), gs, here, want)
            of_memory = [b if a is None else a if b is None else a + b for a, b in zip(of_memory, more, strict=True)]
            if here:
                yield seen


def _observed(walk: Walk, tower: str, block: Any, xs: list, gs: list, sites: list[Site], want: tuple[str, ...]):
    """(one layer's moments over all batches, the gradients of what went in, and of the memory)."""
    total, back, of_memory = None, [], []
    matrices = tuple(site.matrix for site in sites)
    for x, g, batch, memory in zip(xs, gs, walk.batches, walk.memory, strict=True):
        made = sharding.alone(_observe(walk.shell, tower, block, x, batch, memory, g, matrices, want))
        total = made[0] if total is None else jax.tree.map(jnp.add, total, made[0])
        back.append(made[1])
        of_memory.append(made[2])
    return {site.path: _means(total[site.matrix.name]) for site in sites}, back, of_memory


def _means(sums: dict[str, jax.Array]) -> Moments:
    whole = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    tokens = max(int(whole.pop("tokens")), 1)
    return Moments(tokens, **{name: value / tokens for name, value in whole.items()})


@functools.partial(jax.jit, static_argnames=("tower", "matrices", "want"))
def _observe(shell, tower, block, x, batch, memory, g, matrices: tuple[Matrix, ...], want: tuple[str, ...]):
    """({name: sums over a batch}, the gradient of x, that of the memory or None) for a gradient g (b, t, d)."""
    seen, dx, d_memory = shown(shell, tower, block, x, batch, memory, g, matrices)
    here = lambda m: real(batch, "encoder" if m.of_memory else tower)  # noqa: E731
    return {m.name: _sums([run[m.name] for run in seen], here(m), want) for m in matrices}, dx, d_memory


def _sums(runs: Sequence[tuple[jax.Array, jax.Array]], here: jax.Array, want: tuple[str, ...]) -> dict[str, jax.Array]:
    """The sums over a batch, and over the runs of a layer that runs several times, of inputs and gradients."""
    sums = {"tokens": len(runs) * here.sum()}
    for run in runs:
        x, g = (seen * here[..., None] for seen in run)
        made = {
            "input": lambda x=x: gram(x, x),
            "absolute": lambda x=x: jnp.abs(x).sum((0, 1)),
            "output": lambda g=g: gram(g, g),
            "fisher": lambda x=x, g=g: (jnp.square(x) * jnp.square(g).sum(-1, keepdims=True)).sum((0, 1)),
        }
        for name in want:
            sums[name] = sums.get(name, 0.0) + made[name]()
    return sums


@functools.partial(jax.jit, static_argnames="tower")
def _begin_back(shell: Model, tower: str, x: jax.Array, batch: Batch, of_memory: Any, key: jax.Array) -> jax.Array:
    """The gradient at what the last layer gives (b, t, d); of_memory: that of an encoder's memory, where it is one."""
    features, pull = jax.vjp(lambda x: leave(shell, tower, x), x)
    if of_memory is not None:
        return pull(of_memory)[0]
    return pull(_drawn(shell, features, batch, key).astype(features.dtype))[0]


def _drawn(shell: Model, features: jax.Array, batch: Batch, key: jax.Array) -> jax.Array:
    """(b, t, d): the gradient of -log p(y) at the features, for labels y drawn from the model's own p."""
    kind, here, segments = shell.config.head, real(batch), batch.get("segment_ids")
    if kind in ("lm", "tokens"):
        return draw_labels(shell.readout(), features, key)[0] * here[..., None].astype(features.dtype)
    if kind == "none":  # vectors: those of sentences, as `lmx.embed_sentences` makes them
        give = lambda f: _unit(heads.pool(f.astype(jnp.float32), "mean", segments))  # noqa: E731
    else:
        give = lambda f: shell.read(f, segments)  # noqa: E731
    made, pull = jax.vjp(give, features)
    if kind == "sequence":
        label = jax.random.categorical(key, made, axis=-1)
        return pull(jax.nn.softmax(made) - jax.nn.one_hot(label, made.shape[-1]))[0]
    noise = jax.random.normal(key, made.shape, made.dtype)
    return pull(noise * here[..., None] if kind == "spans" else noise)[0]


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def draw_labels(readout: Any, features: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the gradient of -log p(y) at features (b, t, d), y (b, t)) for labels y drawn from p, a label a position.

    CHUNK positions at a time, so that logits are never held whole."""
    b, t, _ = features.shape
    pieces = split_chunks(features, min(CHUNK, t))

    def one(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits, pull = jax.vjp(readout.logits, piece[0])
        whole = sharding.place(logits, "batch", None, None)
        label = jax.random.categorical(piece[1], whole, axis=-1)
        g = jax.nn.softmax(whole) - (jnp.arange(whole.shape[-1]) == label[..., None])
        return pull(sharding.place(g, "batch", None, "vocab"))[0], label

    made = jax.lax.map(one, (pieces, jax.random.split(key, len(pieces))))  # each (chunks, b, chunk, ...)
    whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(b, -1, *x.shape[3:])[:, :t]  # noqa: E731
    return whole(made[0]), whole(made[1])
