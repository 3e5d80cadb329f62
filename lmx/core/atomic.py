"""Folders that are complete or absent: written under a hidden name beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from lmx.core.errors import FolderError


def make_scratch(target: Path) -> Path:
    """An empty hidden folder beside `target`, to be filled and then `put` in its place.

    Raises FolderError if the parent cannot be written.
    """
    scratch = beside(target, "saving")
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
    except OSError as error:
        raise FolderError(
            f"{scratch.parent} is not writable ({error.strerror}), so {target.name} cannot be saved there; "
            "choose another place or mend its permissions"
        ) from error
    return scratch


def beside(target: Path, purpose: str) -> Path:
    """A new hidden path beside `target`; a process that is killed may leave it, and no later one minds."""
    return target.parent / f".{target.name}.{purpose}-{uuid.uuid4().hex[:8]}"


def flush(folder: Path) -> None:
    """Push every file below a folder, and its list of files, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def put(scratch: Path, target: Path, kept: Iterable[str] = ()) -> None:
    """Flush a filled folder and give it its name; what stood there is moved aside first and removed last.

    kept: names in `target` that are to be in the new folder too, unless it has such itself.
    """
    flush(scratch)
    for name in kept:
        _share(target / name, scratch / name)
    old = None
    if target.exists() and any(target.iterdir()):
        old = beside(target, "replaced")
        os.rename(target, old)
    try:
        os.rename(scratch, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _share(source: Path, target: Path) -> None:
    """The same file or folder in a second place, by links where the file system has them."""
    if os.path.lexists(target):
        return
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def moved_aside(target: Path) -> Path | None:
    """What `put` was replacing if it was killed between its two renames and `target` is therefore missing."""
    if target.exists() or not target.parent.is_dir():
        return None
    return max(target.parent.glob(f".{target.name}.replaced-*"), key=os.path.getmtime, default=None)
