"""Folders of checkpoints in a bucket (gs://), which has no folders, no renames and may be out of reach.

A checkpoint there is whole if it has orbax's marker, which is written last. So it is put last where one is copied and
removed first where one goes: whoever is killed meanwhile leaves none that looks whole and is not, and of a move at
least one whole copy. Every question is answered by a new listing of the objects, never from a cache, for tensorstore
and other processes write there too. This needs gcsfs, which orbax reads and writes its small files with as well.

Where a bucket has answered once, what fails for a passing reason is tried again: five times by gcsfs (half a minute in
all), 32 times by tensorstore, which reads and writes the arrays (a quarter of an hour; saves are in the background).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

from lmx.core.errors import ConfigError, FolderError

SCHEME = "gs://"
MARKER = "commit_success.txt"  # as orbax names it
PATIENCE = 20.0  # seconds that the first answer of a bucket may take

_reached: set[str] = set()


def is_local(path: Any) -> bool:
    """Whether a path is on this machine's file systems, not in a bucket."""
    return "://" not in os.fspath(path)


def check(path: str) -> None:
    """Raise ConfigError for a path that is neither local nor gs://BUCKET/..., and where gs:// is not installed."""
    if is_local(path):
        return
    if not path.startswith(SCHEME) or not all(path.removeprefix(SCHEME).partition("/")[::2]):
        raise ConfigError(f"checkpoints are kept in a local folder or in gs://BUCKET/FOLDER, not in {path}")
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"{path} needs a package that is not installed: pip install 'lmx[gcs]'")


def names(path: Any) -> set[str]:
    """The names of all objects below a path, without it; none if there are none.

    Raises FolderError if the bucket is not there, may not be listed, or does not answer; the first time soon.
    """
    with _told(path):
        root = _bare(path) + "/"
        bucket = root.partition("/")[0]
        if bucket not in _reached:
            _reach(bucket, root)
        found = _store().find(root, update_cache=False)
        return {name.removeprefix(root) for name in found if name.startswith(root) and not name.endswith("/")}


def read_text(path: Any) -> str:
    """The content of an object. Raises FileNotFoundError, UnicodeError, or FolderError if it cannot be had."""
    with _told(path):
        return _store().cat_file(_bare(path)).decode("utf-8")


def copy(path: Any, to: Any) -> None:
    """Copy a checkpoint, within the bucket; what was at `to` goes first."""
    remove(to)
    found = sorted(names(path) - {MARKER})
    with _told(to):
        source, target = f"{_bare(path)}/", f"{_bare(to)}/"
        _store().copy([source + name for name in found], [target + name for name in found])
        _store().cp_file(source + MARKER, target + MARKER)


def remove(path: Any) -> None:
    """Remove all objects below a path, if there are any."""
    found = names(path)
    with _told(path):
        if MARKER in found:
            _store().rm_file(f"{_bare(path)}/{MARKER}")
        if found - {MARKER}:
            _store().rm(_bare(path), recursive=True)


@functools.cache
def _store() -> Any:
    """The file system that etils.epath, and so orbax, uses for gs://."""
    from etils.epath import backend

    logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # what it says of an error is raised as well
    store = backend.fsspec_backend.fs(SCHEME)
    store.invalidate_cache()
    store.dircache.use_listings_cache = False
    return store


def _reach(bucket: str, root: str) -> None:
    """Ask for the first time, in a thread: credentials and each try may take their time where nobody answers."""
    importlib.import_module("gcsfs")  # no answer of the bucket
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            _store().find(root, update_cache=False)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=ask, name="lmx-bucket", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        raise FolderError(
            f"{SCHEME}{bucket} did not answer within {PATIENCE:.0f} seconds; is there a way to it from this machine, "
            "and are there credentials (gcloud auth application-default login, or a service account)?"
        )
    if failed:
        raise failed[0]
    _reached.add(bucket)


@contextlib.contextmanager
def _told(path: Any) -> Iterator[None]:
    """Turn what gcsfs raises into a FolderError with its cause in a line."""
    try:
        yield
    except (FolderError, UnicodeError):
        raise
    except FileNotFoundError as error:
        bucket = _bare(path).partition("/")[0]
        if not str(error).endswith(f"b/{bucket}/o"):  # an object, not the listing of all
            raise
        raise FolderError(f"there is no bucket {SCHEME}{bucket}, or these credentials do not see it") from error
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise FolderError(f"{os.fspath(path)} cannot be reached: {why}") from error


def _bare(path: Any) -> str:
    return os.fspath(path).removeprefix(SCHEME).rstrip("/")
