"""Trees by path: select, mask, map, partition, combine and average the leaves that a pattern names.

A path reads `decoder/layers[0:6]/attention/query`. A pattern is a regular expression searched in the path without its
brackets (`attention/query`, `^decoder`, `.`), in which `layers[0:4]` (Python's slices, negative numbers too, or
one number) narrows a stacked leaf to those layers; alternatives are separated by `|`. Freezing, learning rates,
weight decay, surgery and partial loading all name parts of a model this way and no other.

Layers that repeat are stored stacked (`Layers`). Where a pattern cuts a stack, the stack is split: the model stays
the same function and every leaf is then wholly inside or wholly outside.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core.errors import ConfigError, nearest
from lmx.core.nodes import node, static

IsLeaf = Callable[[Any], bool] | None


@node
class Layers:
    """Consecutive layers, stored as stacks.

    A stack is one period (a tuple of blocks) whose leaves have a leading axis over its repetitions; layer
    `first + i * len(period) + j` is repetition i of block j. Models run each stack of several repetitions by one scan.
    `sizes`, the repetitions of each stack, is kept beside the arrays: where they are partitioned into trained and
    frozen, a stack may be left with none to read it from.
    """

    stacks: tuple
    sizes: tuple[int, ...] = static()

    @classmethod
    def of(cls, stacks: Sequence[tuple]) -> Layers:
        """Layers of these stacks, the sizes read from their arrays (or specs)."""
        return cls(tuple(stacks), tuple(jax.tree.leaves(period)[0].shape[0] for period in stacks))

    @property
    def num_layers(self) -> int:
        return sum(n * len(period) for n, period in zip(self.sizes, self.stacks, strict=True))


class Path:
    """Where a leaf stands: its parts, and for a stacked leaf which layers it holds and out of how many."""

    __slots__ = ("parts", "at", "layers", "total")

    def __init__(self, parts: tuple[str, ...] = (), at: int = -1, layers: range | None = None, total: int = 0):
        self.parts, self.at, self.layers, self.total = parts, at, layers, total

    def __truediv__(self, part: str) -> Path:
        return Path((*self.parts, part), self.at, self.layers, self.total)

    def within(self, layers: range, total: int) -> Path:
        return Path(self.parts, len(self.parts) - 1, layers, total)

    @property
    def plain(self) -> str:
        """The path without its layer range: what regular expressions are searched in."""
        return "/".join(self.parts)

    def __str__(self) -> str:
        if self.layers is None:
            return self.plain
        one, step = len(self.layers) == 1, self.layers.step
        end = self.layers[-1] + 1
        inside = f"{self.layers.start}" if one else f"{self.layers.start}:{end}" + (f":{step}" if step > 1 else "")
        return "/".join(p + (f"[{inside}]" if i == self.at else "") for i, p in enumerate(self.parts))

    __repr__ = __str__


def paths(tree: Any, is_leaf: IsLeaf = None) -> list[tuple[Path, Any]]:
    """Every leaf with its path, in the order of `jax.tree.leaves(tree, is_leaf)`."""
    return list(_walk(tree, Path(), is_leaf))


def _walk(tree: Any, path: Path, is_leaf: IsLeaf):
    if tree is None:
        return
    if is_leaf is not None and is_leaf(tree):
        yield path, tree
    elif isinstance(tree, Layers):
        first, total = 0, tree.num_layers
        for n, period in zip(tree.sizes, tree.stacks, strict=True):
            for j, block in enumerate(period):
                held = range(first + j, first + n * len(period), len(period))
                yield from _walk(block, path.within(held, total), is_leaf)
            first += n * len(period)
    else:
        children = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]
        for keys, child in children:
            if not keys:
                yield path, child
                continue
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            hidden = name in getattr(type(tree), "transparent", ())
            yield from _walk(child, path if hidden else path / name, is_leaf)


_RANGE = re.compile(r"\[(-?\d*)(:)?(-?\d*)(?::(\d+))?\]")
_TOKEN = re.compile(r"layers" + _RANGE.pattern)


def _is_range(start: str, is_slice: str | None, stop: str, step: str | None) -> bool:
    numbers = [start, stop] if is_slice else [start]
    return (is_slice or start and not stop and not step) and "-" not in numbers and step not in ("", "0")


@functools.lru_cache(maxsize=1024)
def _alternatives(pattern: str) -> tuple[tuple[re.Pattern, tuple | None], ...]:
    """A pattern's alternatives: (regular expression, (start, is_slice, stop, step) of its layer range)."""
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"a path pattern is a non-empty string, not {pattern!r}; '.' selects everything")
    pieces, depth, start = [], 0, 0
    if _TOKEN.search(pattern):
        for i, c in enumerate(pattern):
            depth += (c == "(") - (c == ")")
            if c == "|" and depth == 0:
                pieces.append(pattern[start:i])
                start = i + 1
    pieces.append(pattern[start:])
    made = []
    for piece in pieces:
        found = _TOKEN.search(piece)
        text = _TOKEN.sub(r"layers\\b", piece)
        if "layers[" in text or found and not _is_range(*found.groups()):
            raise ConfigError(f"path pattern {piece!r}: layers[...] takes a number or a slice, as layers[0:8:2] does")
        if found and piece.count("(", 0, found.start()) > piece.count(")", 0, found.start()):
            raise ConfigError(f"path pattern {piece!r}: write layers[...] outside parentheses, alternatives with |")
        if len(_TOKEN.findall(piece)) > 1:
            raise ConfigError(f"path pattern {piece!r} has two layer ranges; write them as two alternatives with |")
        try:
            made.append((re.compile(text), found.groups() if found else None))
        except re.error as error:
            raise ConfigError(f"path pattern {pattern!r} is not a regular expression: {error}") from error
    return tuple(made)


def _matched(pattern: str, path: Path) -> np.ndarray:
    """Which layers of the leaf the pattern selects: (repetitions,) of bool, or (1,) for a leaf outside stacks."""
    hit = np.zeros(1 if path.layers is None else len(path.layers), bool)
    for expression, numbers in _alternatives(pattern):
        if not expression.search(path.plain):
            continue
        if numbers is None:
            hit[:] = True
        elif path.layers is not None:
            start, is_slice, stop, step = numbers
            number = [int(x) if x else None for x in (start, stop, step)]
            one = slice(number[0], number[0] + 1 or None) if number[0] is not None else slice(None)
            wanted = range(path.total)[slice(*number) if is_slice else one]
            hit |= np.isin(np.asarray(path.layers), np.asarray(wanted, int))
    return hit


def matches(tree: Any, pattern: str, is_leaf: IsLeaf = None) -> list[tuple[Path, Any, np.ndarray]]:
    """(path, leaf, which of its layers) for every leaf. Raises ConfigError, naming near paths, if nothing matches."""
    found = [(path, leaf, _matched(pattern, path)) for path, leaf in paths(tree, is_leaf)]
    if not any(hit.any() for _, _, hit in found):
        known = list(dict.fromkeys(str(path) for path, _, _ in found))
        plain = list(dict.fromkeys(path.plain for path, _, _ in found))
        parts = list(dict.fromkeys(part for path, _, _ in found for part in path.parts))
        wanted = _TOKEN.sub("layers", pattern)
        hint = nearest(wanted, plain, 3) or nearest(wanted, parts, 3)
        hint += f"; paths are such as {', '.join(known[:4])}"
        layers = next((f"; layers are numbered 0 to {p.total - 1}" for p, _, _ in found if p.layers), "")
        raise ConfigError(f"path pattern {pattern!r} selects nothing{hint}{layers if '[' in pattern else ''}")
    return found


def select(tree: Any, pattern: str, is_leaf: IsLeaf = None) -> list[tuple[Path, Any]]:
    """The leaves of which the pattern selects at least one layer. Raises ConfigError if there are none."""
    return [(path, leaf) for path, leaf, hit in matches(tree, pattern, is_leaf) if hit.any()]


def mask(tree: Any, pattern: str, is_leaf: IsLeaf = None) -> Any:
    """The same tree of bools; of bool arrays (repetitions, 1, ..., 1) where the pattern cuts a stack."""
    return rates(tree, {pattern: True}, False, is_leaf)


def rates(tree: Any, by_pattern: dict[str, Any], default: Any, is_leaf: IsLeaf = None) -> Any:
    """The same tree of numbers: `default`, overridden by each pattern's number in turn (the last that matches wins).

    A leaf of which a pattern selects only some layers gets an array (repetitions, 1, ..., 1) over its layer axis.
    Raises ConfigError for a pattern that selects nothing.
    """
    found = paths(tree, is_leaf)
    dtype = np.result_type(*(np.asarray(number) for number in (default, *by_pattern.values())))
    values = [np.full(1 if path.layers is None else len(path.layers), default, dtype) for path, _ in found]
    for pattern, number in by_pattern.items():
        for i, (_, _, hit) in enumerate(matches(tree, pattern, is_leaf)):
            values[i] = np.where(hit, np.asarray(number, dtype), values[i])
    leaves = [
        value[0].item() if (value == value[0]).all() else value.reshape(-1, *[1] * (len(leaf.shape) - 1))
        for value, (_, leaf) in zip(values, found, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_leaf), leaves)


def split(tree: Any, pattern: str, is_leaf: IsLeaf = None) -> Any:
    """The same model with its stacks cut so that the pattern selects each stacked leaf whole or not at all."""
    hits = iter([hit for _, _, hit in matches(tree, pattern, is_leaf)])
    stops = lambda x: isinstance(x, Layers) or is_leaf is not None and is_leaf(x)  # noqa: E731

    def cut(part: Any) -> Any:
        if not isinstance(part, Layers):
            next(hits)
            return part
        stacks, sizes = [], []
        for n, period in zip(part.sizes, part.stacks, strict=True):
            found = [np.broadcast_to(next(hits), n) for _ in jax.tree.leaves(period, is_leaf)]
            selected = np.stack(found or [np.zeros(n, bool)])  # (leaves, n); a stack of holes stays whole
            edges = np.flatnonzero((selected[:, 1:] != selected[:, :-1]).any(0)) + 1
            bounds = [0, *edges.tolist(), n]
            sizes += np.diff(bounds).tolist()
            if len(bounds) == 2:
                stacks.append(period)
                continue
            for low, high in zip(bounds, bounds[1:], strict=False):
                stacks.append(jax.tree.map(lambda leaf, low=low, high=high: _cut(leaf, low, high), period))
        return Layers(tuple(stacks), tuple(sizes))

    return jax.tree.map(cut, tree, is_leaf=stops)


def _cut(leaf: Any, low: int, high: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((high - low, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
    return leaf[low:high]


def map(function: Callable, tree: Any, pattern: str = ".", is_leaf: IsLeaf = None) -> Any:
    """`function(leaf)` on the leaves that the pattern selects, after splitting the stacks that it cuts.

    With `is_leaf=weights.is_weight` the function gets weights of any kind, and may return another kind.
    """
    tree = split(tree, pattern, is_leaf)
    leaves = [function(leaf) if hit.all() else leaf for _, leaf, hit in matches(tree, pattern, is_leaf)]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_leaf), leaves)


def partition(tree: Any, pattern: str) -> tuple[Any, Any]:
    """(selected, rest): the same tree twice with None in the holes; integer leaves are always in the rest.

    Stacks that the pattern cuts are split first, so `combine(selected, rest)` computes what `tree` did but may have
    more stacks. Raises ConfigError if nothing that can be trained is selected.
    """
    tree = split(tree, pattern)
    found = matches(tree, pattern)
    chosen = [bool(hit.all()) and jnp.issubdtype(leaf.dtype, jnp.inexact) for _, leaf, hit in found]
    if not any(chosen):
        raise ConfigError(f"path pattern {pattern!r} selects only integer arrays, which cannot be trained")
    structure = jax.tree.structure(tree)
    pick = lambda wanted: structure.unflatten(  # noqa: E731
        [leaf if c is wanted else None for (_, leaf, _), c in zip(found, chosen, strict=True)]
    )
    return pick(True), pick(False)


def combine(*trees: Any) -> Any:
    """The tree whose holes in the first are filled from the others: the inverse of `partition`."""
    first = lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None)  # noqa: E731
    return jax.tree.map(first, *trees, is_leaf=lambda x: x is None)


def average(trees: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    """The leafwise mean, weighted by weights / sum(weights), computed in float32, in each leaf's own dtype."""
    weights = [1.0] * len(trees) if weights is None else weights
    weights = [w / sum(weights) for w in weights]
    mean = lambda *leaves: sum(w * x.astype(jnp.float32) for w, x in zip(weights, leaves, strict=True))  # noqa: E731
    return jax.tree.map(lambda *leaves: mean(*leaves).astype(leaves[0].dtype), *trees)
