"""The training step: one jitted, donated, sharded function made from a loss and an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

from lmx.core import sharding, tree
from lmx.core.errors import ConfigError
from lmx.train.state import TrainState

Loss = Callable[..., tuple[jax.Array, jax.Array, dict]]
Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, accumulate: int = 1, clip_norm: float | None = 1.0
) -> Step:
    """`step(state, batch) -> (state, metrics)`, jitted; the state given to it is donated, but for what is frozen.

    loss:       `loss(model, batch, key) -> (sum, weight, metrics)`. The gradient is that of sum / weight over the
                whole batch.
    accumulate: microbatches a batch, whose sums and weights are added up before dividing once; a term of the loss that
                is a statistic of its batch is then one of its microbatch.
    clip_norm:  the largest norm of the gradient of all that is trained (Pascanu et al. 2013), or None.
    metrics:    "loss" (sum / weight unless the loss reports one of its own), "grad_norm" before clipping, "weight",
                "skipped", "skipped_in_a_row", and the loss's own metrics, each divided by its weight.

    A step whose loss or gradient is not finite changes nothing but `step` and the two counts of skipped steps.
    Raises ConfigError for accumulate < 1, and when called if the batch does not divide by it.
    """
    if accumulate < 1:
        raise ConfigError(f"accumulate must be at least 1, not {accumulate}")

    def update(moving: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(moving.key, moving.step)
        grads, total, weight, sums = _gradient(loss, moving.trained, frozen, batch, key, accumulate)
        scale = jnp.where(weight > 0, 1.0 / jnp.maximum(weight, 1e-30), 0.0)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads)) * scale
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        clip = 1.0 if clip_norm is None else jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
        grads = jax.tree.map(lambda g, p: (g * (scale * clip)).astype(p.dtype), grads, moving.trained)
        updates, opt_state = _apply(optimizer, grads, moving.opt_state, moving.trained)
        trained = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), moving.trained, updates)
        ema = moving.ema
        if ema is not None:
            d = moving.ema_decay
            ema = jax.tree.map(lambda mean, x: d * mean + (1 - d) * x.astype(jnp.float32), ema, trained)
        old, new = (moving.trained, moving.opt_state, moving.ema), (trained, opt_state, ema)
        trained, opt_state, ema = jax.tree.map(lambda a, b: jnp.where(finite, b, a), old, new)
        bad = 1 - finite.astype(jnp.int32)
        moved = moving.replace(
            step=moving.step + 1,
            trained=trained,
            opt_state=opt_state,
            ema=ema,
            skipped=moving.skipped + bad,
            skipped_in_a_row=(moving.skipped_in_a_row + bad) * bad,
        )
        metrics = {"loss": total * scale} | {name: a / jnp.maximum(b, 1e-30) for name, (a, b) in sums.items()}
        counts = {"weight": weight, "skipped": moved.skipped, "skipped_in_a_row": moved.skipped_in_a_row}
        return moved, metrics | {"grad_norm": norm} | counts

    @functools.cache
    def compiled(layout: Any) -> Callable:
        """One jitted function a layout of the state: on a mesh the new state must lie as the old one did."""
        outputs = {} if layout is None else {"out_shardings": (jax.tree.unflatten(*layout), None)}
        return jax.jit(update, donate_argnums=0, **outputs)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        moving = state.replace(frozen=None)
        moved, metrics = compiled(_layout(moving))(moving, state.frozen, batch)
        return moved.replace(frozen=state.frozen), metrics

    return step


def _layout(moving: TrainState) -> tuple | None:
    """(tree structure, shardings) of a concrete state on an Auto mesh; elsewhere None, jit needing no telling."""
    leaves, structure = jax.tree.flatten(moving)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if traced or sharding.mesh_kind() is not AxisType.Auto:
        return None
    return structure, tuple(leaf.sharding for leaf in leaves)


def _gradient(loss: Loss, trained: Any, frozen: Any, batch: Any, key: jax.Array, accumulate: int):
    """(gradient of the sum in float32 when accumulated, sum, weight, metrics) over all microbatches."""

    def objective(trained: Any, piece: Any, key: jax.Array):
        total, weight, metrics = loss(tree.combine(trained, frozen), piece, key)
        return total.astype(jnp.float32), (weight.astype(jnp.float32), metrics)

    differentiate = jax.value_and_grad(objective, has_aux=True)
    if accumulate == 1:
        (total, (weight, metrics)), grads = differentiate(trained, batch, key)
        return grads, total, weight, metrics

    pieces = jax.tree.map(lambda x: _microbatches(x, accumulate), batch)
    first = jax.tree.map(lambda x: x[0], pieces)
    shapes = jax.eval_shape(lambda t, p, k: objective(t, p, k)[1][1], trained, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    zero = jnp.zeros((), jnp.float32)

    def add(carry, piece_and_index):
        piece, index = piece_and_index
        (total, (weight, metrics)), grads = differentiate(trained, piece, jax.random.fold_in(key, index))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (grads, total, weight, metrics)), None

    begin = (jax.tree.map(lambda x: sharding.zeros_like(x, jnp.float32), trained), zero, zero, zeros)
    sums, _ = jax.lax.scan(add, begin, (pieces, jnp.arange(accumulate)))
    return sums


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    """(b, ...) to (count, b / count, ...), every device keeping the rows it has: microbatch i is rows i::count."""
    b, *rest = x.shape
    if b % count:
        raise ConfigError(f"a batch of {b} rows does not divide into {count} microbatches; change one of them")
    out = sharding.out_sharding((b // count, count, *rest), "batch", None, *[None] * len(rest))
    return jnp.swapaxes(jnp.reshape(x, (b // count, count, *rest), out_sharding=out), 0, 1)


def _apply(optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, trained: Any) -> tuple[Any, Any]:
    """The optimizer's updates; on Explicit meshes it runs under automatic axes, being foreign code."""
    if sharding.mesh_kind() is not AxisType.Explicit:
        return optimizer.update(grads, opt_state, trained)
    spec = lambda x: jax.typeof(x).sharding.spec  # noqa: E731
    out = jax.tree.map(spec, (trained, opt_state))
    return jax.sharding.auto_axes(optimizer.update, out_sharding=out)(grads, opt_state, trained)
