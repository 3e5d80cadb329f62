"""Nodes: frozen dataclasses that are pytrees and can be written to and rebuilt from a folder.

`@node` is `flax.struct.dataclass` plus a registration by class name; `structure.json` stores those names. Fields marked
`static()` are part of the tree's definition (hashable values), all others are children.
"""

from __future__ import annotations

from typing import Any, TypeVar, dataclass_transform

from flax import struct

from lmx.core.errors import FolderError, nearest

T = TypeVar("T")
REGISTRY: dict[str, type] = {}


def static(**kwargs: Any) -> Any:
    """A field that belongs to the tree's definition rather than to its leaves; its value must be hashable."""
    return struct.field(pytree_node=False, **kwargs)


def register(cls: type[T]) -> type[T]:
    """Let folders hold a class by its name: nodes, and static values with `to_dict` and `from_dict`.

    Raises ValueError if another class has the name.
    """
    known = REGISTRY.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"two classes named {cls.__name__}: {known.__module__} and {cls.__module__}; rename one")
    REGISTRY[cls.__name__] = cls
    return cls


@dataclass_transform(frozen_default=True)
def node(cls: type[T]) -> type[T]:
    """Make a class a frozen pytree dataclass and register it by name. Raises ValueError if the name is taken."""
    return register(struct.dataclass(cls))


def node_class(name: str) -> type:
    """The registered class of that name. Raises FolderError, naming the nearest, if there is none."""
    if name not in REGISTRY:
        raise FolderError(
            f"this folder holds a part of kind {name!r}, which this lmx does not know (a newer one may have written "
            f"it){nearest(name, REGISTRY)}"
        )
    return REGISTRY[name]
