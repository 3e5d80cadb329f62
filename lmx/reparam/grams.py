"""What a model's weights see: second moments of their inputs, and of the loss's gradient at their outputs.

    for seen in moments(model, batches, want=("input", "output")):     # a layer at a time
        seen["decoder/layers[3]/mlp/up"].input                         # E[x' x], (m, m)

Calibration batches go forward once, and back once where gradients are wanted: layer by layer, all batches through one
layer before the next, so that the moments of one layer and the batches' activations are all that is in memory. The
gradient is that of -log p(y) for labels y drawn from the model's own distribution, whose second moments are the Fisher
information (Martens and Grosse 2015, section 2); a model without one has noise of unit variance on what it gives. Heads
that share keys and values need nothing of their own: a weight's axes are flattened to (m, n). The table of token
vectors and the head's matrix are seen in `lmx.reparam.ends`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import sharding, tree, weights
from lmx.core.errors import ConfigError, nearest
from lmx.core.kinds import Sum
from lmx.models import stacks
from lmx.models.transformer import Model
from lmx.reparam import ends
from lmx.reparam.walk import Batch, Matrix, Walk, gram, real, shown

LINEARS = "/(attention|cross|mlp)/(query|key|value|out|gate|up|down)$"
GRADIENTS = ("output", "fisher")
KINDS = ("input", "absolute", *GRADIENTS)


@dataclasses.dataclass(frozen=True)
class Site:
    """A matrix of a model: one weight of one layer, or one at its ends."""

    path: str  # such as decoder/layers[3]/mlp/up, or embed/tokens
    tower: str  # decoder or encoder; embed or head at the ends
    layer: int | None
    inputs: int  # how many of its axes are inputs
    matrix: Matrix

    @property
    def at_end(self) -> bool:
        return self.layer is None

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape


@dataclasses.dataclass(frozen=True)
class Moments:
    """Means over the tokens that were seen, in float64; what was not wanted is None.

    On the side of a vocabulary, of `input` and `output` there is the diagonal (v,).
    """

    tokens: int
    input: np.ndarray | None = None  # E[x' x], (m, m)
    absolute: np.ndarray | None = None  # E|x|, (m,)
    output: np.ndarray | None = None  # E[g' g], (n, n)
    fisher: np.ndarray | None = None  # E[x_i^2 |g|^2], (m,): of each row of the weight


def sites(model: Model, pattern: str = LINEARS) -> list[Site]:
    """The matrices that a path pattern selects, in order: of the model's layers, `embed/tokens` and `head/out`.

    Raises ConfigError if it selects nothing, or what is none of these.
    """
    model, found = jax.eval_shape(stacks.unstack, model), []
    axes = [spec for _, spec in tree.paths(model.specs(), weights.is_weight)]
    for (path, leaf, hit), spec in zip(tree.matches(model, pattern, weights.is_weight), axes, strict=True):
        if not hit.all():
            continue
        inputs, at_end = _inputs(leaf, spec), str(path) in ends.paths(model)
        if inputs is None or path.layers is None and not at_end:
            raise ConfigError(
                f"path pattern {pattern!r} selects {path}, which is no matrix of a layer, nor one of "
                f"{' and '.join(ends.paths(model))}; the default is {LINEARS!r}"
            )
        shape = leaf.shape if at_end else leaf.shape[1:]
        sides = int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:]))
        name = str(path) if at_end else "/".join(path.parts[path.at + 1 :])
        layer = None if at_end else path.layers[0]
        found.append(Site(str(path), path.parts[0], layer, inputs, Matrix(name, sides)))
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
    Raises ConfigError for batches without tokens, a kind of moments that there is not, or for others than "input" with
    "output" of a table that serves as the head's matrix too.
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
    if AT_TABLE in wanted and ends.is_tied(model) and set(want) != {"input", "output"}:
        raise ConfigError(
            f"{ends.TABLE} is the head's matrix too: moments of its inputs alone say nothing of that use; leave it "
            "out, or ask for 'input' and 'output' (as the method 'two-sided' of factorizing does)"
        )
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


Wanted = dict[tuple[str, int | None], list[Site]]  # by tower and layer
AT_TABLE, AT_OUT = ("embed", None), ("head", None)


def _forward(walk: Walk, wanted: Wanted, want: tuple[str, ...]) -> Iterator[dict[str, Moments]]:
    """Moments of inputs, from the first layer to the last."""
    if AT_TABLE in wanted:
        yield {ends.TABLE: _of_table(ends.seen_by_table(walk, tower, None, want) for tower in walk.layers)}
    for tower, layers in walk.layers.items():
        xs = walk.enter(tower)
        for i, block in enumerate(layers):
            here = wanted.get((tower, i))
            if here:
                yield _observed(walk, tower, block, xs, [jnp.zeros_like(x) for x in xs], here, want)[0]
            xs = walk.step(tower, block, xs)
        walk.leave(tower, xs)
    if AT_OUT in wanted:
        yield {ends.OUT: _means(ends.seen_by_head(walk, xs, want))}


def _backward(walk: Walk, wanted: Wanted, want: tuple[str, ...], key: jax.Array) -> Iterator[dict[str, Moments]]:
    """All moments, from the last layer to the first."""
    entered: dict[str, list[list]] = {}  # by tower and layer: what each batch brings to it
    for tower, layers in walk.layers.items():
        entered[tower] = [walk.enter(tower)]
        for block in layers:
            entered[tower].append(walk.step(tower, block, entered[tower][-1]))
        walk.leave(tower, entered[tower][-1])
    of_memory, keys = [None] * len(walk.batches), jax.random.split(key, len(walk.batches))
    of_table, as_head, table = [], None, AT_TABLE in wanted
    if AT_OUT in wanted or table and ends.is_tied(walk.shell):
        as_head = _means(ends.seen_by_head(walk, entered[tower][-1], want))
    if AT_OUT in wanted:
        yield {ends.OUT: as_head}
    for tower, layers in reversed(walk.layers.items()):
        last = zip(entered[tower].pop(), walk.batches, of_memory, keys, strict=True)
        gs = [sharding.alone(ends.begin_back(walk.shell, tower, *end)) for end in last]
        for i in reversed(range(len(layers))):
            here = wanted.get((tower, i), [])
            seen, gs, more = _observed(walk, tower, layers[i], entered[tower].pop(), gs, here, want)
            of_memory = [b if a is None else a if b is None else a + b for a, b in zip(of_memory, more, strict=True)]
            if here:
                yield seen
        if table:
            of_table.append(ends.seen_by_table(walk, tower, gs, want))
    if table:
        yield {ends.TABLE: _of_table(of_table, as_head if ends.is_tied(walk.shell) else None)}


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


def _of_table(sums: Iterable[dict[str, jax.Array]], as_head: Moments | None = None) -> Moments:
    """The moments of the table of token vectors over all towers, and of its use as the head's matrix.

    Each token counts as if it had been seen once more, in the mean. Of two uses, A1 x G1 and A2 x G2 as Kronecker
    products, the product that has their sum's partial traces is taken.
    """
    seen = _means(ends.total(sums))
    once_more = lambda x: None if x is None else (seen.tokens * x + x.sum()) / (seen.tokens + len(x))  # noqa: E731
    changed = {name: once_more(getattr(seen, name)) for name in ("input", "absolute", "fisher")}
    seen = dataclasses.replace(seen, **changed)
    if as_head is None:
        return seen
    share = as_head.tokens / seen.tokens  # an encoder's tokens are not predicted
    mine, its = np.trace(seen.output), share * np.trace(as_head.input)
    inner = seen.input * mine + as_head.output * its
    outer = seen.output * seen.input.sum() + share * as_head.input * as_head.output.sum()
    return dataclasses.replace(seen, input=inner, output=outer / inner.sum())


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
