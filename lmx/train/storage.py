"""The one file that knows orbax (its v1 API): a flat dict of arrays and a JSON text, written in the background.

A checkpoint is the folder

    state/                      the arrays, in OCDBT (one database for all arrays, one folder for each process's part)
    about/data.json             {"about": JSON text, "crc": its CRC-32}
    seal.process_<i>.json       `lmx.train.seals`

OCDBT needs about ten files however many arrays there are, where a folder for each array has two files. Arrays are not
compressed: that takes time (experiments/benchmarks/checkpoint_faults.py) and gains little on weights, and a changed bit
then is one changed element, which the checksum always sees. Orbax gives the folder its name last, so a checkpoint is
whole or not there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from orbax.checkpoint import utils
from orbax.checkpoint import v1 as ocp

from lmx.core.errors import LmxError
from lmx.train import buckets

STATE, ABOUT = "state", "about"
ABOUT_FILE = f"{ABOUT}/data.json"  # as orbax's JsonHandler names it
TEMPORARY = "orbax-checkpoint-tmp"  # in the names of folders that orbax has not finished


class Unreadable(Exception):
    """Orbax could not read what was asked for; the message is its cause, in a line."""


def write(path: Any, arrays: Mapping[str, Any], about: dict) -> ocp.AsyncResponse:
    """Begin to write a checkpoint; the arrays are copied to the host before this returns. All processes call it.

    `.result()` of what is returned waits until it is whole on the disk, in every process, and raises what went wrong.
    """
    text = json.dumps(about)
    context = _context()
    context.array.saving.use_compression = False
    with context:
        parts = {STATE: dict(arrays), ABOUT: {"about": text, "crc": zlib.crc32(text.encode())}}
        return ocp.save_checkpointables_async(path, parts)


def read(path: Any, targets: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of these names, each into its target (shape, dtype, sharding; numpy where that is numpy).

    Every process reads for itself and waits for nobody. Raises Unreadable.
    """
    context = _context()
    context.pytree.loading.partial_load = True
    if jax.process_count() > 1:
        index = jax.process_index()
        context.multiprocessing.active_processes = {index}
        context.multiprocessing.primary_host = index
    cause = None
    with _unheard():
        try:
            with context:
                return ocp.load_checkpointables(path, {STATE: dict(targets)})[STATE]
        except Exception as error:
            cause = cause_of(error)
        gc.collect()  # what orbax began and never awaited complains when it is collected: let it do so in here
    raise Unreadable(cause)


def read_about(path: Any) -> dict:
    """The JSON data written with a checkpoint. Raises OSError, or ValueError if they are not what was written."""
    place = path / ABOUT_FILE
    try:
        stored = json.loads(place.read_text() if buckets.is_local(path) else buckets.read_text(place))
        text, crc = stored["about"], stored["crc"]
        if zlib.crc32(text.encode()) == crc:
            return json.loads(text)
    except (KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ValueError(f"it is not as written: {error}") from error
    raise ValueError("its checksum is wrong")


def is_finalized(path: Any) -> bool:
    """Whether orbax has finished a checkpoint."""
    return utils.is_checkpoint_finalized(path)


def root_of(error: BaseException) -> BaseException:
    """What orbax met at first, or what lmx says of it."""
    while not isinstance(error, LmxError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return error


def cause_of(error: BaseException) -> str:
    """The first line of it."""
    error = root_of(error)
    line = next(iter(str(error).splitlines()), "")
    return line.split(" [tensorstore_spec")[0].split(" [os_error_code")[0][:600] or type(error).__name__


def _silence() -> None:
    """Keep orbax's messages off the terminal: what matters is raised, and the rest a user cannot act on."""
    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)
        sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _unraisable(before: Callable[[Any], Any], what: Any) -> None:
    """Where one read of many fails, tensorstore finishes the others for an event loop that orbax has closed."""
    if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
        before(what)


def _context() -> ocp.Context:
    _silence()
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=ABOUT)  # else it would be taken for arrays
    context.checkpointables.registry = registry
    return context


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Without warnings about orbax's own options and files, and what asyncio logs about tasks that it abandoned."""
    logger = logging.getLogger("asyncio")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.addFilter(_not_abandoned)
        try:
            yield
        finally:
            logger.removeFilter(_not_abandoned)


def _not_abandoned(record: logging.LogRecord) -> bool:
    return "never retrieved" not in record.getMessage()
