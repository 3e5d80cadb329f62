"""What training carries from step to step, and how it begins.

`start` splits a tree (a model, or several in one) by a path pattern into what is trained, copied because the step
donates it, and what is frozen, an argument that is neither donated nor returned: the caller's arrays live on.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core import sharding, tree
from lmx.core.errors import ConfigError
from lmx.core.nodes import node, static


@node
class TrainState:
    """`trained` and `frozen` are the same tree with None in the other's holes."""

    step: Any  # () int32: batches seen
    trained: Any
    frozen: Any
    opt_state: Any
    key: Any  # the run's random key; a step uses fold_in(key, step)
    skipped: Any  # () int32: steps left out because loss or gradient was not finite
    skipped_in_a_row: Any  # () int32
    ema: Any = None  # moving average of `trained` in float32, or None
    ema_decay: float | None = static(default=None)

    @property
    def model(self) -> Any:
        """The tree as it now is."""
        return tree.combine(self.trained, self.frozen)

    @property
    def ema_model(self) -> Any:
        """The tree with the trained leaves' moving averages; `model` where none is kept."""
        if self.ema is None:
            return self.model
        averaged = jax.tree.map(lambda mean, like: mean.astype(like.dtype), self.ema, self.trained)
        return tree.combine(averaged, self.frozen)


def start(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    train: str = ".",
    ema_decay: float | None = None,
    key: jax.Array | None = None,
) -> TrainState:
    """The state before the first step.

    Parameters are updated in their own dtype. For mixed precision keep them in float32 and set the config's
    compute_dtype to bfloat16: updates much smaller than a bfloat16 parameter are lost to rounding.

    train:     path pattern of what is trained; only that has optimizer state. Stacks that it cuts are split.
    ema_decay: keep a moving average of the trained leaves, mean = decay * mean + (1 - decay) * new.
    key:       of everything random in the run; `jax.random.key(0)` by default.
    Raises ConfigError if the pattern selects nothing or the decay is not between 0 and 1.
    """
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ConfigError(f"ema_decay must lie between 0 and 1, such as 0.999, not {ema_decay}")
    trained, frozen = tree.partition(model, train)
    trained = jax.jit(lambda t: jax.tree.map(jnp.copy, t))(trained)
    zero = jnp.zeros((), jnp.int32)
    in_float32 = lambda t: jax.tree.map(lambda x: x.astype(jnp.float32).copy(), t)  # noqa: E731
    ema = None if ema_decay is None else jax.jit(in_float32)(trained)
    return TrainState(
        step=zero,
        trained=trained,
        frozen=frozen,
        opt_state=_init_optimizer(optimizer, trained),
        key=jax.random.key(0) if key is None else jnp.copy(key),  # the step donates it
        skipped=zero + 0,
        skipped_in_a_row=zero + 0,
        ema=ema,
        ema_decay=ema_decay,
    )


def abstract_start(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    train: str = ".",
    ema_decay: float | None = None,
    key: jax.Array | None = None,
) -> TrainState:
    """What `start` would give, as `jax.ShapeDtypeStruct`s with shardings: the target of restoring a checkpoint.

    The leaves of `model` are such structs too (`lmx.core.specs.shapes`), so nothing is initialised to be overwritten.
    """
    trained, frozen = tree.partition(model, train)
    mesh = sharding.layout_mesh()
    whole = None if mesh is None else NamedSharding(mesh, P())
    zero = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    as_float32 = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)  # noqa: E731
    return TrainState(
        step=zero,
        trained=trained,
        frozen=frozen,
        opt_state=_optimizer_shapes(optimizer, trained),
        key=jax.random.key(0) if key is None else key,
        skipped=zero,
        skipped_in_a_row=zero,
        ema=None if ema_decay is None else jax.tree.map(as_float32, trained),
        ema_decay=ema_decay,
    )


def _optimizer_shapes(optimizer: optax.GradientTransformation, trained: Any) -> Any:
    """The optimizer's state as shapes and shardings: what has a parameter's path and shape lies as that does."""
    shapes = jax.eval_shape(optimizer.init, trained)
    mesh = sharding.layout_mesh()
    if mesh is None:
        return shapes
    flat = jax.tree_util.tree_flatten_with_path(trained)[0]
    places = {keys: (x.shape, x.sharding) for keys, x in flat}

    def place(keys: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        suffixes = (places.get(keys[i:]) for i in range(len(keys)))
        found = next((s for shape, s in filter(None, suffixes) if shape == leaf.shape), NamedSharding(mesh, P()))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=found)

    return jax.tree_util.tree_map_with_path(place, shapes)


def _init_optimizer(optimizer: optax.GradientTransformation, trained: Any) -> Any:
    """The optimizer's state, sharded from birth."""
    if sharding.concrete_mesh() is None:
        return jax.jit(optimizer.init)(trained)
    places = jax.tree.map(lambda x: x.sharding, _optimizer_shapes(optimizer, trained))
    if sharding.mesh_kind() is AxisType.Explicit:
        specs = jax.tree.map(lambda s: s.spec, places)
        return jax.jit(jax.sharding.auto_axes(optimizer.init, out_sharding=specs))(trained)
    return jax.jit(optimizer.init, out_shardings=places)(trained)
