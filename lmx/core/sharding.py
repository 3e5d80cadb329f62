"""Meshes, the rules from logical axes to mesh axes, and `place`, the one helper that applies them.

Model code names axes by words ("batch", "embed", "heads"); `Rules` says which mesh axes split them. The same functions
run on an Explicit mesh, an Auto mesh, inside `shard_map` and with no mesh at all: `place` reshards, constrains or does
nothing. The rules in force are part of jit's cache key (`jax.make_user_context`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core.errors import ConfigError, nearest

log = logging.getLogger("lmx")
MESH_AXES = ("data", "fsdp", "tensor", "expert")
MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes split each logical axis; () keeps it whole on every device."""

    batch: MeshAxes = ("data", "fsdp", "expert")  # rows of a batch
    sequence: MeshAxes = ()  # positions within a row
    embed: MeshAxes = ("fsdp",)  # model width of weights (activations keep it whole)
    heads: MeshAxes = ("tensor",)  # query heads
    kv_heads: MeshAxes = ("tensor",)  # key-value heads
    head_dim: MeshAxes = ()  # width of a head
    mlp: MeshAxes = ("tensor",)  # feed-forward width
    experts: MeshAxes = ("expert",)  # experts of a sparse layer
    vocab: MeshAxes = ("tensor",)  # rows of the embedding, columns of the head
    rank: MeshAxes = ()  # inner width of a factorized weight
    layers: MeshAxes = ()  # the stacked axis: scanned over, so never split


_rules = jax.make_user_context(Rules())


def current_rules() -> Rules:
    """The rules in force: those of the innermost `use_mesh`."""
    return _rules.value


def make_mesh(text: str, *, devices: Sequence[Any] | None = None, explicit: bool = True) -> Mesh:
    """A mesh from a string such as `fsdp=4,tensor=2`; axes left out have size 1, one size may be -1 (the rest).

    Neighbours along the last axes are neighbours in the torus of a TPU slice or on one node, as far as that goes.
    Raises ConfigError for an unknown axis, a size that is not a number, or a mesh that does not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, given = dict.fromkeys(MESH_AXES, 1), set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (piece.strip() for piece in item.partition("="))
        if name not in MESH_AXES:
            hint = nearest(name, MESH_AXES)
            raise ConfigError(f"mesh {text!r}: no axis {name!r}, the axes are {', '.join(MESH_AXES)}{hint}")
        if name in given:
            raise ConfigError(f"mesh {text!r} gives axis {name} twice")
        given.add(name)
        if not number.removeprefix("-").isdigit() or int(number) == 0 or int(number) < -1:
            raise ConfigError(f"mesh {text!r}: axis {name} needs a size such as {name}=4 (or -1 for the rest)")
        sizes[name] = int(number)
    known = math.prod(size for size in sizes.values() if size > 0)
    if list(sizes.values()).count(-1) == 1 and len(devices) % known == 0:
        sizes = {name: len(devices) // known if size == -1 else size for name, size in sizes.items()}
    if -1 in sizes.values() or math.prod(sizes.values()) != len(devices):
        wanted = "an unknown number of" if -1 in sizes.values() else math.prod(sizes.values())
        raise ConfigError(
            f"mesh {text!r} describes {wanted} devices, but there are {len(devices)} ({devices[0].platform}); the "
            f"sizes must multiply to {len(devices)}, e.g. fsdp={len(devices)}"
        )
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return Mesh(_arranged(text, tuple(sizes.values()), devices), MESH_AXES, axis_types=(kind,) * len(sizes))


def _arranged(text: str, shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices in the shape of a mesh. `jax.make_mesh` would split a physical axis of a torus on v5e alone."""
    slices = {getattr(d, "slice_index", 0) for d in devices}
    if devices[0].platform == "tpu" and len(slices) > 1:
        raise ConfigError(f"mesh {text!r} would join {len(slices)} TPU slices; a run uses the devices of one slice")
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:  # what jax raises where it finds none
        raise ConfigError(
            f"mesh {text!r} cannot be laid out on these {len(devices)} devices ({devices[0].device_kind}): {error}; "
            f"choose sizes that are products of the slice's own, or fsdp={len(devices)}"
        ) from error


@contextlib.contextmanager
def use_mesh(
    mesh: Mesh | AbstractMesh | str | None, rules: Rules | None = None, *, explicit: bool = True
) -> Iterator[Mesh | AbstractMesh | None]:
    """Put a mesh (or its string; None for no mesh) and rules in force for everything inside the `with`.

    An AbstractMesh has sizes and no devices: programs can be lowered for it, shapes laid out, and nothing can run.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(mesh, str):
            mesh = make_mesh(mesh, explicit=explicit)
        if isinstance(mesh, AbstractMesh):
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        else:
            stack.enter_context(jax.set_mesh(Mesh(np.empty((), object), ()) if mesh is None else mesh))
        stack.enter_context(_rules(current_rules() if rules is None else rules))
        yield mesh


_reported: set[tuple] = set()


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Rules | None = None) -> P:
    """The PartitionSpec of an array with these logical axes on this mesh.

    An axis whose size its mesh axes do not divide keeps the leading ones that do, and that is logged once. Raises
    ConfigError if an axis has no rule or two axes of the array want one mesh axis.
    """
    rules = current_rules() if rules is None else rules
    sizes, entries, owner = dict(mesh.shape), [], {}
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and not hasattr(rules, axis):
            names = [f.name for f in dataclasses.fields(rules)]
            raise ConfigError(f"no rule for the logical axis {axis!r}{nearest(axis, names)}")
        wanted = tuple(a for a in (getattr(rules, axis) if axis else ()) if sizes.get(a, 1) > 1)
        kept = wanted
        while kept and size % math.prod(sizes[a] for a in kept):
            kept = kept[:-1]
        if kept != wanted and size > 1 and (axis, size, wanted) not in _reported:
            _reported.add((axis, size, wanted))
            split = " x ".join(f"{a}={sizes[a]}" for a in wanted)
            what = f"split over {', '.join(kept)} alone" if kept else "kept whole on every device"
            log.warning("axis %r of size %d does not divide by %s: %s", axis, size, split, what)
        for a in kept:
            if a in owner:
                raise ConfigError(
                    f"the rules give mesh axis {a!r} to both {owner[a]!r} and {axis!r} of one array "
                    f"{tuple(shape)}; an array can use a mesh axis once"
                )
            owner[a] = axis
        entries.append(kept[0] if len(kept) == 1 else kept or None)
    return P(*entries)


def mesh_kind() -> AxisType | None:
    """The kind of the mesh in force here: Explicit, Auto, Manual (inside shard_map), or None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    kinds = set(mesh.axis_types)
    return next((k for k in (AxisType.Manual, AxisType.Explicit, AxisType.Auto) if k in kinds), None)


def place(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay `x` out as the rules say for these logical axes: reshard, constrain, or (no mesh, manual axes) nothing."""
    if mesh_kind() not in (AxisType.Explicit, AxisType.Auto):
        return x
    return reshard(x, partition_spec(axes, x.shape, jax.sharding.get_abstract_mesh()))


def reshard(x: jax.Array, spec: P) -> jax.Array:
    """`x` laid out by a PartitionSpec: moved on an Explicit mesh, constrained on an Auto one."""
    if mesh_kind() is AxisType.Explicit:
        return jax.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def entries(x: jax.Array) -> list[tuple[str, ...]]:
    """The mesh axes that split each dimension of x, on an Explicit mesh."""
    spec = jax.typeof(x).sharding.spec
    full = [*spec, *[None] * (x.ndim - len(spec))]
    return list(map(_names, full))


def _names(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def platform() -> str:
    """What programs are compiled for here, "cpu", "gpu" or "tpu": the mesh's devices, which need not be on this
    machine, and without a mesh jax's default backend."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return next((name for name in ("tpu", "cpu") if name in kind), "gpu")


def row_axes(x: jax.Array) -> tuple[str, ...]:
    """The mesh axes that split the rows of a batch x (b, ...): on an Explicit mesh as x is split, on an Auto one as
    the rules say; () elsewhere."""
    if mesh_kind() is AxisType.Explicit:
        return entries(x)[0]
    if mesh_kind() is not AxisType.Auto:
        return ()
    (entry,) = partition_spec(("batch",), x.shape[:1], jax.sharding.get_abstract_mesh())
    return _names(entry)


@contextlib.contextmanager
def rows_whole() -> Iterator[None]:
    """Rules in force by which nothing splits rows: for a program that sees the rows of one shard (under `vmap`)."""
    with _rules(dataclasses.replace(current_rules(), batch=())):
        yield


def out_sharding(shape: Sequence[int], *axes: str | None) -> P | None:
    """What an operation's `out_sharding=` wants for these logical axes: a spec on Explicit meshes, else None."""
    if mesh_kind() is not AxisType.Explicit:
        return None
    return partition_spec(axes, shape, jax.sharding.get_abstract_mesh())


def named_sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Rules | None = None):
    """The NamedSharding of an array with these logical axes on a mesh."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, rules))


def concrete_mesh() -> Mesh | None:
    """The mesh of real devices in force (set by `use_mesh`), or None. Inside jit there are no devices: None."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # jax's answer while tracing
        return None
    return None if mesh.empty else mesh


def layout_mesh() -> Mesh | AbstractMesh | None:
    """The mesh on which shapes are laid out: that of real devices in force, else an abstract one, else None."""
    mesh = concrete_mesh()
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def alone(x: Any) -> Any:
    """x, awaited where the next program must not begin beside the one that makes it: on simulated devices, the
    collectives of two programs at once can wait for each other for ever."""
    mesh = concrete_mesh()
    return jax.block_until_ready(x) if mesh is not None and platform() == "cpu" else x


def zeros_like(x: jax.Array, dtype: Any) -> jax.Array:
    """Zeros of x's shape and layout in another dtype."""
    explicit = mesh_kind() is AxisType.Explicit
    return jnp.zeros(x.shape, dtype, out_sharding=jax.typeof(x).sharding.spec if explicit else None)
