"""The errors that lmx raises on purpose, how a process ends with one, and the search for the nearest right name.

Each says what was given, what was expected and how to mend it. The command line prints an `LmxError` without a
traceback; everything else is a fault of lmx and keeps its traceback.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable

MISTAKE = 2  # exit codes: what was given cannot be right,
LOST = 75  # another process of the run was lost (EX_TEMPFAIL: try again),
INTERRUPTED = 130  # Ctrl-C or SIGTERM where nothing could be saved


class LmxError(Exception):
    """A mistake in what lmx was given, told in a message a user can act on."""


class ConfigError(LmxError, ValueError):
    """An option, a config, a mesh, a path pattern or a shape that cannot be right."""


class DataError(LmxError, ValueError):
    """Text, tokens or a tokenizer that cannot be used."""


class FolderError(LmxError, OSError):
    """A folder that is missing, damaged, taken or cannot be written."""


class NonFiniteError(LmxError, ArithmeticError):
    """Training met a run of non-finite losses or gradients."""


class Stopped(KeyboardInterrupt):
    """An interruption that loses nothing, as the message says: the process ends with exit code 0."""


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the last words of a process that ends with this error."""
    if isinstance(error, LmxError):
        return MISTAKE, f"lmx: {error}"
    if isinstance(error, Stopped):
        return 0, f"lmx: {error}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "lmx: interrupted"
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1, "lmx: another process of the run ended"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def nearest(name: str, names: Iterable[str], count: int = 1) -> str:
    """`; did you mean 'x'?` for the names closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, [str(n) for n in names], n=count, cutoff=0.4)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
