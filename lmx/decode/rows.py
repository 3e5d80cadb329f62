"""What every search over rows needs: the prompts in a state, and rows moved within a batch, on any mesh.

Model states are batch-first in every leaf (`lmx.models.protocol`); how a leaf's other axes are split is the model's
own affair and is kept. What a search itself carries is split by rows and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lmx.core import sharding
from lmx.core.sharding import place
from lmx.models.protocol import LanguageModel, take_token
from lmx.models.stacks import unstack


def place_rows(x: Array) -> Array:
    """On a mesh, x (b, ...) split by rows and by nothing else; a scalar is left as it is."""
    return place(x, "batch", *[None] * (x.ndim - 1)) if x.ndim else x


def for_steps(model: LanguageModel, rows: int) -> LanguageModel:
    """The same model, arranged once, outside the loop, for many steps of so many rows: every layer a stack of its own,
    and each part that has a `for_steps` as that says."""
    has = lambda x: hasattr(x, "for_steps")  # noqa: E731
    return jax.tree.map(lambda x: x.for_steps(rows) if has(x) else x, unstack(model), is_leaf=has)


def prefill(
    model: LanguageModel, tokens: Array, lengths: Array | None, room: int
) -> tuple[Any, Array, Array]:
    """Feed prompts (b, t) but for their last tokens, into a state with room for `room` positions, at least t.

    Returns (the state, the last token of each prompt (b,), the lengths of the prompts (b,)).
    """
    b, t = tokens.shape
    tokens = place_rows(tokens)
    real = place_rows(jnp.full((b,), t, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32))
    state = model.start(b, room)
    whole = getattr(model, "stretch", None) is not None  # angles depend on how long prompts are, last tokens included
    if t > 1:
        _, state = model.step(state, tokens if whole else tokens[:, :-1])
    if t > 1 and (whole or lengths is not None):
        state = model.rewind(state, real - 1)
    return state, take_token(tokens, real - 1), real


def rowwise(function: Callable[..., Any], like: Any, *arguments: Any) -> Any:
    """function(*arguments), its inner layout left to the compiler, its results split by rows as `like` is shaped.

    `like` is a tree of arrays (or their shapes) in the structure and shapes of the results, rows first. On an Explicit
    mesh plain indexing and sorting would otherwise have to state their sharding at every step.
    """
    if sharding.mesh_kind() is not AxisType.Explicit:
        return jax.tree.map(place_rows, function(*arguments))
    specs = jax.tree.map(lambda x: _row_spec(x.shape), like)
    return jax.sharding.auto_axes(function, out_sharding=specs)(*arguments)


def take_rows(state: Any, parents: Array, before: Any = None) -> Any:
    """Rows chosen within each group: leaves (b * m, ...) to (b * n, ...), row (i, j) being (i, parents[i, j]).

    parents (b, n) hold 0 to m - 1. Nothing moves between groups, and so nothing between devices that split them.
    `before`: the state before the step that made this one, if it began with equal rows in every group: leaves that no
    step touches, such as what a decoder remembers of its source, still have them and are left alone.
    """
    b, n = parents.shape

    def take(leaf: Array, parents: Array) -> Array:
        groups = leaf.reshape(b, leaf.shape[0] // b, *leaf.shape[1:])
        return jax.vmap(lambda group, at: group[at])(groups, parents).reshape(b * n, *leaf.shape[1:])

    def lay_out(leaf: Array) -> Array:
        if sharding.mesh_kind() is not AxisType.Explicit:
            return take(leaf, parents)
        rest = list(jax.typeof(leaf).sharding.spec)[1:]
        spec = P(*_row_spec((b * n,)), *rest)
        return jax.sharding.auto_axes(take, out_sharding=spec)(leaf, parents)

    if before is None:
        return jax.tree.map(lay_out, state)
    leaves, structure = jax.tree.flatten(state)
    pairs = zip(leaves, jax.tree.leaves(before), strict=True)
    return structure.unflatten([new if new is old else lay_out(new) for new, old in pairs])


def _row_spec(shape: tuple[int, ...]) -> P:
    axes = ["batch", *[None] * (len(shape) - 1)] if shape else []
    return sharding.partition_spec(axes, shape, jax.sharding.get_abstract_mesh())
