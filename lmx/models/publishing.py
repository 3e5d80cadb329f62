"""Writing a folder of arrays and texts that is complete or absent, whatever its format (`publish`).

Every process calls it, process 0 writes. What stood there is replaced once the new folder is complete: the files that
formats of models own go, whatever else somebody keeps beside them stays.
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lmx.core import atomic
from lmx.core.arrays import nbytes, write_arrays
from lmx.core.errors import FolderError
from lmx.models.filenames import CONFIG, STRUCTURE, TOKENIZER_FILES


def publish(
    folder: str | os.PathLike,
    arrays: dict[str, Any],
    fetched: Iterator[np.ndarray],
    texts: dict[str, str],
    tokenizer: Any,
    overwrite: bool,
    max_file_bytes: int,
    names: tuple[str, str] = ("model", CONFIG),
) -> None:
    """Write a folder of arrays and texts that is complete or absent; every process calls it, process 0 writes.

    arrays: name -> shape and dtype; fetched: their values, one by one in that order, taken by every process; texts:
    file name -> what it says; names: of the files of arrays, without their ending, and of the text beside them by which
    a folder of this kind is known when it is to be replaced. The rest, and what is raised, as in `save`.
    """
    target = local(folder)
    leader, error = jax.process_index() == 0, None
    scratch, kept = None, []
    try:
        if leader:
            kept = _check_target(target, overwrite, *names)
            scratch = atomic.make_scratch(target)
    except Exception as caught:
        error = caught
    _agree(error, target)
    try:
        if leader:
            _write_arrays(scratch, arrays, fetched, max_file_bytes, names[0])
            for name, text in texts.items():
                (scratch / name).write_text(text, encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(scratch)
            atomic.put(scratch, target, kept)
    except Exception as caught:
        error = caught
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    if jax.process_count() > 1:  # followers, and a leader that failed, still take part in every gather
        collections.deque(fetched, maxlen=0)
    _agree(error, target)


def local(folder: str | os.PathLike) -> Path:
    """The path. Raises FolderError for what is none of this machine."""
    if "://" in os.fspath(folder):
        raise FolderError(f"{os.fspath(folder)} is no local path; save and load locally, and copy the folder")
    return Path(folder).expanduser().resolve()


def _check_target(target: Path, overwrite: bool, stem: str, about: str) -> list[str]:
    """The names of what in the folder is to stay. Raises FolderError if it may not be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return []
    if not target.is_dir():
        raise FolderError(f"{target} is a file; a model needs a folder")
    if not overwrite:
        raise FolderError(
            f"{target} exists; choose another folder, or replace it by overwrite=True (--overwrite)"
        )
    weights = any((target / f"{stem}.safetensors{end}").exists() for end in ("", ".index.json"))
    if not (target / STRUCTURE).exists() and not (weights and (target / about).exists()):
        raise FolderError(
            f"{target} holds no model of lmx (no {STRUCTURE}) nor of Hugging Face, so it is not overwritten; remove it "
            "by hand"
        )
    return sorted(entry.name for entry in target.iterdir() if not _owned(entry.name, stem, about))


def _owned(name: str, stem: str, about: str) -> bool:
    """Whether a file belongs to a folder of this kind. A model's own are those of lmx's and of Hugging Face's format,
    its tokenizer's among them; an adapter's are its two."""
    if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name):
        return True
    return name in ((about, STRUCTURE, *TOKENIZER_FILES) if about == CONFIG else (about,))


def _agree(error: Exception | None, target: Path) -> None:
    """Raise the leader's error in every process, so that none waits for the others."""
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
    if isinstance(error, OSError) and not isinstance(error, FolderError):
        raise FolderError(f"could not write {target}: {error}; nothing half-written was left") from error
    if error is not None:
        raise error
    if failed:
        raise FolderError(f"process 0 could not save {target}; its message says why")


def whole(array: Any) -> np.ndarray:
    """All values of an array in the memory of this process (a collective for arrays of several processes)."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _write_arrays(folder: Path, arrays: dict, fetched: Iterator[np.ndarray], max_bytes: int, stem: str) -> None:
    files, room = [{}], max_bytes
    for name, array in arrays.items():
        if files[-1] and nbytes(array) > room:
            files, room = [*files, {}], max_bytes
        files[-1][name] = array
        room -= nbytes(array)
    index = {}
    for i, part in enumerate(files, start=1):
        file = f"{stem}.safetensors" if len(files) == 1 else f"{stem}-{i:05d}-of-{len(files):05d}.safetensors"
        index |= dict.fromkeys(part, file)
        write_arrays(folder / file, part, lambda _: next(fetched))
    if len(files) > 1:
        total = sum(nbytes(array) for array in arrays.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (folder / f"{stem}.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
