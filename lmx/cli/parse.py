"""From the words of a command line to the options of a command, and the help, with tyro."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Iterable, Sequence
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


def overview(commands: dict[str, type], group: str = "") -> str:
    """What `lmx --help` prints, or `lmx GROUP --help`."""
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {summary(kind)}" for name, kind in commands.items())
    if group:
        first = next(iter(commands))
        return f"usage: lmx {group} COMMAND [OPTIONS]\n\n{lines}\n\n`lmx {first} --help` explains its options."
    return (
        "usage: lmx COMMAND [OPTIONS]\n\n"
        "Take a language model apart, make its parts cheaper, put them back together.\n\n"
        + lines
        + "\n\n`lmx COMMAND --help` explains its options, `lmx --version` says which lmx this is.\n"
        "To begin: lmx train"
    )


def named(arguments: Sequence[str], commands: Iterable[str]) -> tuple[str, list[str]]:
    """(the command's name, of one word or two, the rest) of the words of a command line."""
    first, *rest = arguments or ("--help",)
    if rest and f"{first} {rest[0]}" in commands:
        return f"{first} {rest[0]}", rest[1:]
    return first, rest


def parse(arguments: Sequence[str], commands: dict[str, type], defaults: dict[type, dict[str, Any]]) -> Any:
    """The options of the command that the first argument names, an instance of its class.

    `defaults` fills in options by class. Prints and exits for --help, --version and options that are wrong; raises
    ConfigError for a command that there is not.
    """
    name, rest = named(arguments, commands)
    if name in ("-h", "--help"):
        print(overview(commands))
        sys.exit(0)
    if name == "--version":
        print(f"lmx {__version__}")
        sys.exit(0)
    group = {command: kind for command, kind in commands.items() if command.startswith(f"{name} ")}
    if group and (not rest or rest[0] in ("-h", "--help")):
        print(overview(group, name))
        sys.exit(0)
    if group:
        told = ", ".join(group)
        raise ConfigError(f"no command {f'{name} {rest[0]}'!r}, there are {told}{nearest(f'{name} {rest[0]}', group)}")
    if name not in commands:
        raise ConfigError(f"no command {name!r}, there are {', '.join(commands)}{nearest(name, commands)}")
    kind = commands[name]
    filled = {"default": kind(**defaults[kind])} if kind in defaults else {}
    return tyro.cli(
        kind,
        prog=f"lmx {name}",
        description=inspect.getdoc(kind),
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=_registry,
        **filled,
    )
