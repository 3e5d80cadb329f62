"""The folders of a run's checkpoints: which are whole, which stay, and what is moved or removed.

    200                        a whole checkpoint: orbax gives it this name last (on gs:// it writes a marker last, and
                               without it this is one being written, or what a killed process left of it)
    200.orbax-checkpoint-tmp   the same of a local one
    200.replaced               the earlier checkpoint of a step that is being saved again; counts until the new is whole
    200.removed                one being removed
    200.damaged                one that did not restore as it was saved; never removed by lmx

Paths are those of etils.epath. Moves are one rename on a local disk; in a bucket they copy (`lmx.train.buckets`).
"""

from __future__ import annotations

import math
import os
import re
import shutil
from typing import Any

from lmx.core.errors import FolderError
from lmx.train import buckets
from lmx.train.buckets import is_local
from lmx.train.storage import TEMPORARY, is_finalized

REPLACED, REMOVED, DAMAGED = ".replaced", ".removed", ".damaged"
LEFT = re.compile(rf"(\d+)(\.{TEMPORARY}.*|{re.escape(REPLACED)}|{re.escape(REMOVED)})?")


def is_complete(path: Any) -> bool:
    """Whether orbax finished writing a checkpoint, and nobody was killed while removing it.

    It gets its name (in a bucket, its marker) last and loses it first; what it lacks then is damage, which reading it
    names.
    """
    if is_local(path):
        return is_finalized(path) and path.is_dir() and any(path.iterdir())
    return buckets.MARKER in buckets.names(path)


def find(folder: Any) -> dict[int, Any]:
    """The whole checkpoints of a folder: step -> path, in the order of the steps. Raises FolderError for a bucket."""
    return _whole(folder, _listed(folder))


def _listed(folder: Any) -> dict[str, bool | None]:
    """What is in a folder: name -> whether it is a whole checkpoint, None if that is to be looked up."""
    if is_local(folder):
        return {path.name: None for path in folder.iterdir()} if folder.is_dir() else {}
    found: dict[str, bool | None] = {}
    for name in buckets.names(folder):
        head, _, rest = name.partition("/")
        found[head] = found.get(head, False) or rest == buckets.MARKER
    return found


def _whole(folder: Any, listed: dict[str, bool | None]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for name, whole in listed.items():
        number = name.removesuffix(REPLACED)
        if number.isdigit() and (name == number or int(number) not in found):
            if is_complete(folder / name) if whole is None else whole:
                found[int(number)] = folder / name
    return dict(sorted(found.items()))


def kept(steps: list[int], metrics: dict[int, float], keep: int, keep_every: int | None) -> set[int]:
    """Which of the steps stay: the newest `keep`, every multiple of `keep_every`, and that of the lowest metric."""
    stay = set(sorted(steps)[-keep:])
    if keep_every:
        stay |= {step for step in steps if step % keep_every == 0}
    known = {step: metrics[step] for step in steps if math.isfinite(metrics.get(step, math.nan))}
    return stay | {min(known, key=lambda step: (known[step], -step))} if known else stay


def make_room_for(folder: Any, step: int) -> None:
    """Move an earlier checkpoint of the same step to its other name; it is lost only when the new one is whole."""
    path = folder / str(step)
    if _exists(path):
        aside = folder / f"{step}{REPLACED}"
        remove(aside)
        _move(path, aside)


def remove(path: Any) -> None:
    """Remove a checkpoint, if it is there, so that whoever is killed meanwhile leaves none that looks whole."""
    if not is_local(path):
        buckets.remove(path)
    elif path.exists():
        path.rename(path.parent / f"{path.name.removesuffix(REPLACED)}{REMOVED}").rmtree(missing_ok=True)


def clean(folder: Any) -> None:
    """Remove what killed saves and removals left, and give a checkpoint that was being replaced its name back."""
    listed = _listed(folder)
    whole = _whole(folder, listed)
    for path in (folder / name for name in listed):
        found = LEFT.fullmatch(path.name)
        if found is not None and whole.get(int(found[1])) != path:
            path.rmtree(missing_ok=True) if is_local(path) else buckets.remove(path)
    for step, path in whole.items():
        if path.name != str(step):
            _move(path, folder / str(step))


def move_aside(path: Any) -> Any:
    """Rename a damaged checkpoint; returns its new path."""
    name = path.name.removesuffix(REPLACED) + DAMAGED
    names = [name, *(f"{name}-{i}" for i in range(2, 1000))]
    return _move(path, next(path.parent / name for name in names if not _exists(path.parent / name)))


def _exists(path: Any) -> bool:
    return path.exists() if is_local(path) else bool(buckets.names(path))


def _move(path: Any, to: Any) -> Any:
    """Give a checkpoint another name, its new path."""
    if is_local(path):
        return path.rename(to)
    buckets.copy(path, to)
    buckets.remove(path)
    return to


def require_room(folder: Any, needed: int) -> None:
    """Make the folder and raise before anything is written that would not fit; a bucket needs neither.

    The checkpoints that the new one supersedes are removed after it is whole, so their bytes do not count.
    Raises FolderError with both numbers of bytes, or OSError if the folder cannot be made or written.
    """
    if not is_local(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied", os.fspath(folder))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FolderError(
            f"it needs {needed / 1e6:.1f} MB and its disk has {free / 1e6:.1f} MB free (the checkpoints it supersedes "
            "are removed only after it is whole). Remove something, keep fewer, or choose another disk"
        )
