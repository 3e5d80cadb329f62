"""A model's ends: its table of token vectors and its head's matrix, and where the way back through it begins.

A token picks a row, so the moments of what goes into the table are the tokens' frequencies. Of those of the gradient at
the head's outputs, diag(p) - p' p in the mean over the model's own labels, the diagonal E[p (1 - p)] stands for all:
(v, v) would be too many numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import sharding
from lmx.models.protocol import split_chunks
from lmx.models.transformer import Model
from lmx.nn import heads
from lmx.reparam.taps import Tap, zeros
from lmx.reparam.walk import Batch, Walk, enter, gram, leave, read_by, real

TABLE, OUT = "embed/tokens", "head/out"
CHUNK = 64  # positions whose logits are held at a time
Sums = dict[str, jax.Array]


def paths(model: Model) -> tuple[str, ...]:
    """The paths of the matrices at the ends whose moments can be seen."""
    return (TABLE, OUT) if model.config.head in ("lm", "tokens") and not is_tied(model) else (TABLE,)


def is_tied(model: Model) -> bool:
    """Whether the table of token vectors serves as the head's matrix too."""
    return model.config.head == "lm" and model.params.head.out is None


def seen_by_head(walk: Walk, xs: Sequence[jax.Array], want: tuple[str, ...]) -> Sums:
    """Sums over all batches of what the head's matrix sees, for what the last layer gave (b, t, d) each."""
    tower = list(walk.layers)[-1]
    pairs = zip(xs, walk.batches, strict=True)
    return total(sharding.alone(_head_sums(walk.shell, tower, x, batch, want)) for x, batch in pairs)


def seen_by_table(walk: Walk, tower: str, gs: Sequence[jax.Array] | None, want: tuple[str, ...]) -> Sums:
    """Sums over all batches of what the table sees as a tower reads, for gradients (b, t, d) at its first layer."""
    pairs = zip([None] * len(walk.batches) if gs is None else gs, walk.batches, strict=True)
    return total(sharding.alone(_table_sums(walk.shell, tower, batch, g, want)) for g, batch in pairs)


def total(sums: Iterable[Sums]) -> Sums:
    """Their sum, name by name."""
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), sums)


@functools.partial(jax.jit, static_argnames=("tower", "want"))
def _head_sums(shell: Model, tower: str, x: jax.Array, batch: Batch, want: tuple[str, ...]) -> Sums:
    """CHUNK positions at a time."""
    readout, here = shell.readout(), real(batch, tower)
    h = readout.hidden(leave(shell, tower, x))
    read = h.astype(jnp.float32) * here[..., None]
    sums = {"tokens": here.sum()}
    if "input" in want:
        sums["input"] = gram(read, read)
    if "absolute" in want:
        sums["absolute"] = jnp.abs(read).sum((0, 1))
    if set(want) <= {"input", "absolute"}:
        return sums
    size = min(CHUNK, h.shape[1])

    def one(piece: tuple[jax.Array, jax.Array]) -> Sums:
        h, here = piece
        y = sharding.place(readout.products(h), "batch", None, None)
        logits, slope = jax.jvp(readout.finished, (y,), (jnp.ones_like(y),))  # of each logit to its product
        p = jax.nn.softmax(logits)
        squares = p * (1 - p) * jnp.square(slope) * here
        of_rows = jnp.square(h.astype(jnp.float32)) * squares.sum(-1, keepdims=True)
        return {"output": sharding.place(squares.sum((0, 1)), None), "fisher": of_rows.sum((0, 1))}

    made = jax.lax.map(one, (split_chunks(h, size), split_chunks(here[..., None], size)))
    return sums | {name: made[name].sum(0) for name in made if name in want}


@functools.partial(jax.jit, static_argnames=("tower", "want"))
def _table_sums(shell: Model, tower: str, batch: Batch, g: jax.Array | None, want: tuple[str, ...]) -> Sums:
    here, table = real(batch, tower), shell.params.embed.tokens
    tokens, size = sharding.place(read_by(shell, tower, batch)[0], None, None), table.shape[0]
    by_token = lambda x: jnp.zeros(size).at[tokens].add(sharding.place(x, None, None))  # noqa: E731
    counts = by_token(here)
    sums = {"tokens": here.sum()} | {name: counts for name in ("input", "absolute") if name in want}
    if g is None:
        return sums

    def run(tap: jax.Array) -> jax.Array:
        params = shell.params.replace(embed=shell.params.embed.replace(tokens=Tap(table, None, tap)))
        return enter(shell.replace(params=params), tower, batch)

    _, pull = jax.vjp(run, zeros(*tokens.shape, table.shape[1]))
    at_rows = pull(g)[0] * here[..., None]
    made = {"output": lambda: gram(at_rows, at_rows), "fisher": lambda: by_token(jnp.square(at_rows).sum(-1))}
    return sums | {name: make() for name, make in made.items() if name in want}


@functools.partial(jax.jit, static_argnames="tower")
def begin_back(shell: Model, tower: str, x: jax.Array, batch: Batch, of_memory: Any, key: jax.Array) -> jax.Array:
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
