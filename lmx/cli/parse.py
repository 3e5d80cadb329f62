"""From the words of a command line to the options of a command, and the help, with tyro."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from lmx.core.errors import ConfigError, nearest
from lmx.version import __version__

_registry = ConstructorRegistry()


@_registry.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """`int | None` reads and looks like `int`: None is what is not given, and nobody types it."""
    kinds = typing.get_args(info.type)
    if typing.get_origin(info.type) not in (typing.Union, types.UnionType) or type(None) not in kinds:
        return None
    (kind,) = (kind for kind in kinds if kind is not type(None))
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def summary(kind: type) -> str:
    """The first paragraph of a command's docstring, which it may inherit, on one line."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def overview(commands: dict[str, type]) -> str:
    """What `lmx --help` prints."""
    width = max(map(len, commands))
    lines = (f"  {name:<{width}}  {summary(kind)}" for name, kind in commands.items())
    return (
        "usage: lmx COMMAND [OPTIONS]\n\n"
        "Take a language model apart, make its parts cheaper, put them back together.\n\n"
        + "\n".join(lines)
        + "\n\n`lmx COMMAND --help` explains its options, `lmx --version` says which lmx this is.\n"
        "To begin: lmx train"
    )


def parse(arguments: Sequence[str], commands: dict[str, type], defaults: dict[type, dict[str, Any]]) -> Any:
    """The options of the command that the first argument names, an instance of its class.

    `defaults` fills in options by class. Prints and exits for --help, --version and options that are wrong; raises
    ConfigError for a command that there is not.
    """
    first, *rest = arguments or ("--help",)
    if first in ("-h", "--help"):
        print(overview(commands))
        sys.exit(0)
    if first == "--version":
        print(f"lmx {__version__}")
        sys.exit(0)
    if first not in commands:
        raise ConfigError(f"no command {first!r}, there are {', '.join(commands)}{nearest(first, commands)}")
    kind = commands[first]
    filled = {"default": kind(**defaults[kind])} if kind in defaults else {}
    return tyro.cli(
        kind,
        prog=f"lmx {first}",
        description=inspect.getdoc(kind),
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=_registry,
        **filled,
    )
