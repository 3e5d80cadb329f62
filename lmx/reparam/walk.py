"""Batches on their way through a model, one layer after the other: what goes in, what comes back, what its taps show.

All batches go through one layer before the next, by programs that layers of one structure share.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core import sharding, tree, weights
from lmx.core.errors import ConfigError
from lmx.models import blocks, stacks
from lmx.models.transformer import Model, memory_mask
from lmx.reparam.layers import towers
from lmx.reparam.taps import Tap, zeros

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight of a layer by its name there, such as mlp/up, as a matrix (m, n), each the product of its axes."""

    name: str
    shape: tuple[int, int]

    @property
    def of_memory(self) -> bool:
        """Whether it multiplies what an encoder gave."""
        return self.name in ("cross/key", "cross/value")


class Walk:
    """A model's layers, one by one, and the batches that go through them.

    layers: the blocks of each tower, each taken out of its stack when it is read. shell: the model without them.
    memory: by batch, what the encoder of an encoder-decoder gave, once it is through.
    """

    def __init__(self, model: Model, batches: Sequence[Batch]) -> None:
        self.batches = [checked(batch) for batch in batches]
        self.layers = {name: stacks.EachLayer(tower.layers) for name, tower in towers(model).items()}
        bare = {name: tower.replace(layers=None) for name, tower in towers(model).items()}
        self.shell = model.replace(params=model.params.replace(**bare))
        self.memory: list[Any] = [None] * len(self.batches)

    def enter(self, tower: str) -> list[jax.Array]:
        """What each batch brings to the first layer."""
        return [sharding.alone(enter(self.shell, tower, batch)) for batch in self.batches]

    def step(self, tower: str, block: Any, xs: Sequence[jax.Array]) -> list[jax.Array]:
        """What each batch brings to the next layer."""
        pairs = zip(xs, self.batches, self.memory, strict=True)
        return [sharding.alone(_step(self.shell, tower, block, x, batch, memory)) for x, batch, memory in pairs]

    def leave(self, tower: str, xs: Sequence[jax.Array]) -> None:
        """The last layer is through; an encoder's memory is what the decoder reads next."""
        if len(self.layers) == 2 and tower == "encoder":
            self.memory = [sharding.alone(leave(self.shell, tower, x)) for x in xs]


def checked(batch: Batch) -> Batch:
    """A batch on the devices, laid out as the rules say. Raises ConfigError for one without tokens (b, t)."""
    if "tokens" not in batch or np.ndim(batch["tokens"]) != 2:
        raise ConfigError(f"a calibration batch is a dict with 'tokens' (b, t); it has {sorted(batch)}")
    mesh = sharding.concrete_mesh()
    if mesh is None:
        return {name: jnp.asarray(value) for name, value in batch.items()}
    place = lambda x: jax.device_put(x, sharding.named_sharding(("batch", "sequence"), x.shape, mesh))  # noqa: E731
    return {name: place(jnp.asarray(value)) for name, value in batch.items()}


def real(batch: Batch, tower: str = "decoder") -> jax.Array:
    """(b, t) float32: 1 for tokens, 0 for padding, of what a tower reads."""
    of_encoder = tower == "encoder" and "encoder_tokens" in batch
    tokens = batch["encoder_tokens" if of_encoder else "tokens"]
    segments = batch.get("encoder_segment_ids" if of_encoder else "segment_ids")
    return jnp.ones(tokens.shape, jnp.float32) if segments is None else (segments != 0).astype(jnp.float32)


def read_by(shell: Model, tower: str, batch: Batch) -> tuple:
    """Tokens, segments, positions and types as the tower reads them."""
    if tower == "encoder" and shell.config.architecture == "encoder_decoder":
        return batch["encoder_tokens"], batch.get("encoder_segment_ids"), None, None
    return batch["tokens"], batch.get("segment_ids"), batch.get("positions"), batch.get("types")


@functools.partial(jax.jit, static_argnames="tower")
def enter(shell: Model, tower: str, batch: Batch) -> jax.Array:
    """What a batch brings to a tower's first layer (b, t, d)."""
    return shell.enter_tower(tower, *read_by(shell, tower, batch))[0]


@functools.partial(jax.jit, static_argnames="tower")
def leave(shell: Model, tower: str, x: jax.Array) -> jax.Array:
    """What a tower gives (b, t, d), of what its last layer gave."""
    return blocks.normalise(shell.config, getattr(shell.params, tower).norm, x)


def shown(
    shell: Model, tower: str, block: Any, x: jax.Array, batch: Batch, memory: Any, g: jax.Array, sites: Sequence[Matrix]
) -> tuple[list[dict[str, tuple[jax.Array, jax.Array]]], jax.Array, Any]:
    """(what the taps show, the gradient of x, that of the memory) for a gradient g (b, t, d) of what the layer gives.

    For each run of a layer that runs several times: by name, the inputs (b, t, m) of each matrix and the gradients
    (b, t, n) at its outputs. What is not used is not computed.
    """
    here, runs = real(batch, tower), getattr(shell.params, tower).repeats
    length = lambda site: memory.shape[1] if site.of_memory else here.shape[1]  # noqa: E731
    taps = [{s.name: tuple(zeros(len(here), length(s), n) for n in s.shape) for s in sites} for _ in range(runs)]

    def run(x: jax.Array, memory: Any, taps: list) -> jax.Array:
        one = _layer(shell, tower, batch, memory)
        for tap in taps:
            x = one(changed(block, lambda name, w, tap=tap: Tap(w, *tap[name]) if name in tap else w), x)
        return x

    _, pull = jax.vjp(run, x, memory, taps)
    dx, d_memory, seen = pull(g)
    return seen, dx, d_memory


def changed(block: Any, change: Callable[[str, Any], Any]) -> Any:
    """The block with `change(name, weight)` in the place of each weight."""
    named = tree.paths(block, weights.is_weight)
    leaves = [change(path.plain, w) for path, w in named]
    return jax.tree.unflatten(jax.tree.structure(block, is_leaf=weights.is_weight), leaves)


def gram(x: jax.Array, y: jax.Array) -> jax.Array:
    """x (b, t, m) and y (b, t, n) -> (m, n): the sum of x' y over all positions, whole on every device."""
    out = sharding.out_sharding((x.shape[-1], y.shape[-1]), None, None)
    return jnp.einsum("btm,btn->mn", x, y, precision=jax.lax.Precision.HIGHEST, out_sharding=out)


@functools.partial(jax.jit, static_argnames="tower")
def _step(shell: Model, tower: str, block: Any, x: jax.Array, batch: Batch, memory: Any) -> jax.Array:
    one = _layer(shell, tower, batch, memory)
    for _ in range(getattr(shell.params, tower).repeats):
        x = one(block, x)
    return x


def _layer(shell: Model, tower: str, batch: Batch, memory: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """One layer as a function of its block and x (b, t, d)."""
    read = read_by(shell, tower, batch)
    x, about = shell.enter_tower(tower, *read)
    mask = None if memory is None else memory_mask(read[0], read[1], batch.get("encoder_segment_ids"))
    return blocks.layer(
        shell.config.tower(tower), getattr(shell.params, tower), length=x.shape[1], memory=memory, memory_mask=mask,
        **about,
    )  # fmt: skip
