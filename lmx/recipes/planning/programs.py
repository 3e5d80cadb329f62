"""The real train step and the real decode step, compiled for a target, and what the compiler says about them."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx import losses
from lmx.core import hlo, sharding, specs
from lmx.core.errors import ConfigError
from lmx.core.topology import Target
from lmx.decode.generate import advance, begin
from lmx.decode.request import Request
from lmx.decode.sampling import Sampling
from lmx.models import presets, transformer
from lmx.models.stacks import unstack
from lmx.models.transformer import Model
from lmx.recipes import models
from lmx.train import abstract_start, make_train_step, optimizers

# The compiler's options: as for a run, or with less done to make the program fast.
EFFORTS = {"full": None, "low": {"exec_time_optimization_effort": -1.0}}
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be compiled, but for how it is split: `model` gives the model's shapes on the mesh in force."""

    model: Callable[..., Model]  # (**changes of the config)
    batch_size: int
    length: int
    optimizer: str | None  # None: decode
    effort: str = "full"  # of the compiler, a key of EFFORTS


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to split and compute it."""

    mesh: str
    remat: str
    accumulate: int = 1

    def __str__(self) -> str:
        more = f", accumulate {self.accumulate}" if self.accumulate > 1 else ""
        return f"{self.mesh}, remat {self.remat}{more}"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device."""

    parameters: int
    optimizer: int  # 0 when decoding
    cache: int  # 0 when training
    inputs: int  # all else that the program is given: batch, counters, padding of the layout
    temporaries: int  # gradients, activations, gathered weights, workspace
    program: int
    available: int

    @property
    def peak(self) -> int:
        parts = dataclasses.asdict(self)
        return sum(value for name, value in parts.items() if name != "available")

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling a case told."""

    case: Case
    mesh: Mesh
    model: Model  # shapes and shardings
    memory: Memory
    collectives: list[hlo.Collective] | None  # None where the compiler gave up for want of memory
    seconds: float  # of CPU that compiling took


def source(name: str, changes: dict[str, Any]) -> Callable[..., Model]:
    """`Work.model` of a preset's name, a model folder or checkpoints. Raises LmxErrors for a name that is neither."""
    if name in presets.PRESETS and not Path(name).exists():
        config = presets.preset(name, **changes)
        return lambda **more: shapes_of(config.replace(**more))
    shapes = lambda: models.load_shapes(name, also=tuple(presets.PRESETS))  # noqa: E731
    kind = shapes()
    if not isinstance(kind, Model):
        raise ConfigError(f"{name} holds a {type(kind).__name__}; lmx plan plans Transformers")
    kind.require_next_token()

    def stored(**more: Any) -> Model:
        model = shapes()
        return model.replace(config=model.config.replace(**(changes | more)))

    return stored


def shapes_of(config: Any) -> Model:
    """A model of a config as shapes, with shardings on the mesh in force."""
    return Model(config, specs.shapes(transformer.abstract(config)))


def local_bytes(tree: Any) -> int:
    """Bytes that the leaves of a tree of shapes take on one device."""
    shape = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)  # noqa: E731
    width = lambda x: 0 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.dtype(x.dtype).itemsize  # noqa: E731
    return sum(math.prod(shape(x)) * width(x) for x in jax.tree.leaves(tree))


def train_arguments(work: Work, case: Case, mesh: Mesh) -> tuple[Any, Any, Any]:
    """(optimizer, state, batch) as shapes with shardings; the mesh must be in force."""
    optimizer = optimizers.optimizer(work.optimizer, 1e-3)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, P()))
    state = abstract_start(work.model(remat=case.remat), optimizer, key=key)
    return optimizer, state, {"tokens": tokens_of(work, mesh)}


def tokens_of(work: Work, mesh: Mesh, length: int | None = None) -> jax.ShapeDtypeStruct:
    """The shape of a batch of token ids."""
    shape = (work.batch_size, length or work.length)
    place = sharding.named_sharding(("batch", "sequence"), shape, mesh)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)


def lower_train(work: Work, case: Case, mesh: Mesh) -> tuple[Any, Any]:
    """(the lowered train step, its state); the mesh must be in force."""
    optimizer, state, batch = train_arguments(work, case, mesh)
    step = make_train_step(losses.cross_entropy, optimizer, accumulate=case.accumulate)
    return jax.jit(step, donate_argnums=0).lower(state, batch), state


def lower_decode(work: Work, mesh: Mesh) -> tuple[Any, Any, Model, Any]:
    """(lowered prefill, lowered step, model, cache): a prompt of all but one of `length` positions, then one token."""
    request = Request(Sampling(), None, 0, None)
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_placed(x, mesh))  # noqa: E731
    model = jax.tree.map(placed, jax.eval_shape(unstack, work.model()))
    prompt = tokens_of(work, mesh, work.length - 1)
    prefill = lambda model, tokens: begin(model, tokens, None, request, work.length)  # noqa: E731
    progress = jax.tree.map(placed, jax.eval_shape(prefill, model, prompt))
    step = lambda model, progress: advance(model, progress, request)  # noqa: E731
    lowered = jax.jit(prefill).lower(model, prompt), jax.jit(step, donate_argnums=1).lower(model, progress)
    return *lowered, model, progress


def _placed(x: Any, mesh: Mesh) -> NamedSharding:
    spec = getattr(x.sharding, "spec", P()) if x.sharding is not None else P()
    return NamedSharding(mesh, spec)


def compile_train(work: Work, case: Case, target: Target) -> Compiled:
    """Compile a train step. Too little memory is a result, not an error; raises ConfigError for what cannot be."""
    begun, mesh = time.process_time(), target.mesh(case.mesh)
    with sharding.use_mesh(mesh):
        lowered, state = lower_train(work, case, mesh)
        parts = dict(parameters=local_bytes(state.model), optimizer=local_bytes(state.opt_state), cache=0)
        memory, found = _compile(lowered, parts, target, work.effort)
    return Compiled(case, mesh, state.model, memory, found, time.process_time() - begun)


def compile_decode(work: Work, case: Case, target: Target) -> tuple[Compiled, Compiled]:
    """Compile (the prefill, a step of one token) of greedy decoding."""
    begun, mesh, results = time.process_time(), target.mesh(case.mesh), []
    with sharding.use_mesh(mesh):
        *programs, model, progress = lower_decode(work, mesh)
        parts = dict(parameters=local_bytes(model), optimizer=0, cache=local_bytes(progress.state))
        for index, lowered in enumerate(programs):
            memory, found = _compile(lowered, parts, target, work.effort, cache_is_result=index == 0)
            now = time.process_time()
            results.append(Compiled(case, mesh, model, memory, found, now - begun))
            begun = now
    return results[0], results[1]


def _compile(lowered: Any, parts: dict[str, int], target: Target, effort: str, cache_is_result: bool = False):
    """(memory, collectives or None)."""
    available = target.chip.memory
    given = sum(parts.values()) - (parts["cache"] if cache_is_result else 0)
    try:
        compiled = lowered.compile(compiler_options=EFFORTS[effort])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = wanted_bytes(str(error), given, available)
        return Memory(**parts, inputs=0, temporaries=wanted, program=0, available=available), None
    m = compiled.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    memory = Memory(
        **parts,
        inputs=max(0, held - sum(parts.values())),
        temporaries=m.temp_size_in_bytes,
        program=m.generated_code_size_in_bytes,
        available=available,
    )
    return memory, hlo.collectives(compiled.as_text())


def wanted_bytes(message: str, given: int, available: int) -> int:
    """Bytes of temporaries that a compiler which ran out of memory says it needed.

    It states either the temporaries alone or all that is used; where it states no number, what would just not fit.
    """
    number = r"([\d.]+)([KMGT]?)"
    if found := re.search(rf"temporaries \({number}\)", message):
        return int(float(found.group(1)) * UNITS[found.group(2)])
    if found := re.search(rf"Used {number} of", message):
        return max(0, int(float(found.group(1)) * UNITS[found.group(2)]) - given)
    return max(0, available - given) + 1
