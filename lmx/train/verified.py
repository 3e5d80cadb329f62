"""Reading a checkpoint and proving it: what is returned is what was saved, or the damage is named.

The checksums are computed on the restored arrays themselves, wherever they were put: nothing between the devices that
saved and the devices that restored is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from lmx.core.errors import FolderError
from lmx.train import agreement, leaves, seals, storage
from lmx.train.checksums import checksums

# What tensorstore and jax say of failures that are not the files' fault, by which a file without a seal is judged.
PASSING = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "DEADLINE_EXCEEDED", "ABORTED", "UNAUTHENTICATED")


class Damaged(FolderError):
    """A checkpoint is not what was saved. The message names its files and arrays."""


def about(path: Any) -> dict:
    """What a checkpoint says of itself: "leaves", "sums", "extra", "metrics". Raises Damaged."""
    try:
        found = storage.read_about(path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise Damaged(_describe(path, {storage.ABOUT_FILE: f"cannot be read ({error})"}, None)) from error
    except OSError as error:  # which may pass: what cannot be read now is not called damaged
        raise FolderError(f"{path / storage.ABOUT_FILE} cannot be read: {error}") from error
    if "sums" not in found:
        raise FolderError(f"{path} was written by an lmx without checksums; train again, or restore it with that lmx")
    return found


def fetch(path: Any, wanted: Mapping[str, Any], *, others: bool = False) -> tuple[dict[str, jax.Array], dict]:
    """The arrays of these names, straight into the shardings that `wanted` asks for, and the "extra" data.

    All processes call it and all learn the same. others: the checkpoint may hold more than is wanted.
    Raises Damaged, FolderError if it cannot be read though its files are as written, and ConfigError if it holds
    something else.
    """
    found = _about_in_all(path)
    saved = {name: found["leaves"][name] for name in found["leaves"] if name in wanted or not others}
    leaves.compare(path, saved, {name: leaves.describe(leaf) for name, leaf in wanted.items()})
    targets = {name: leaves.target(leaf) for name, leaf in wanted.items() if 0 not in leaf.shape}
    arrays, cause = _read(path, targets)
    causes = [said for said in agreement.everyone(cause) if said]
    wrong = [] if causes else _wrong(arrays, found["sums"])
    if causes or wrong:
        raise _diagnosis(path, targets, found["sums"], wrong, causes)
    return {name: leaves.finish(arrays.get(name), leaf) for name, leaf in wanted.items()}, found["extra"]


def _about_in_all(path: Any) -> dict:
    """As `about`; what one process fails to read is an error in all."""
    found = mine = None
    try:
        found = about(path)
    except FolderError as error:
        mine = [isinstance(error, Damaged), str(error)]
    said = next((one for one in agreement.everyone(mine) if one is not None), None)
    if said is not None:
        raise (Damaged if said[0] else FolderError)(said[1])
    return found


def _read(path: Any, targets: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """(arrays, None), or ({}, why they cannot be read)."""
    try:
        return (storage.read(path, targets) if targets else {}), None
    except storage.Unreadable as error:
        return {}, str(error)


def _wrong(arrays: Mapping[str, Any], sums: Mapping[str, str]) -> list[str]:
    """The arrays that are not what was saved, as any process sees it."""
    mine = [name for name, found in checksums(arrays).items() if found != sums[name]]
    return sorted(set().union(*agreement.everyone(mine)))


def _diagnosis(path: Any, targets: dict, sums: dict, wrong: list[str], causes: list[str]) -> FolderError:
    """The error that names files and arrays."""
    shares = agreement.everyone(seals.changed(path, jax.process_index(), jax.process_count()))
    sealed = [share for share in shares if share is not None]
    files = {name: what for share in sealed for name, what in share.items()} if sealed else None
    if causes and files is not None and not files:
        return FolderError(f"{path} could not be read, although its files are as they were written: {causes[0]}")
    if causes and files is None and any(word in causes[0] for word in PASSING):
        return FolderError(f"{path} could not be read: {causes[0]}. Try again")
    if causes:  # which arrays does this concern? Ask for each alone
        mine = []
        for name, target in targets.items():
            arrays, cause = _read(path, {name: target})
            alone = jax.process_count() == 1  # a checksum needs all processes to have read
            if cause or alone and checksums(arrays)[name] != sums[name]:
                mine.append(name)
        wrong = sorted(set().union(*agreement.everyone(mine)))
    return Damaged(_describe(path, files, None if len(wrong) == len(targets) else wrong, causes))


def _describe(path: Any, files: dict[str, str] | None, arrays: list[str] | None, causes: list[str] = ()) -> str:
    """files: None where none was sealed; arrays: None for all of them."""
    named = [f"{path / name} {what}" for name, what in (files or {}).items()]
    if files is None:
        named = [f"a file in {path / storage.STATE} (which one is not known: it was not sealed)"]
    elif not files:
        named = ["its files are as written, so memory or a device failed while it was saved or read"]
    many = arrays is None or len(arrays) > 1
    which = "all of its arrays" if arrays is None else ", ".join(arrays[:5]) + (", ..." if arrays[5:] else "")
    because = f" ({causes[0]})" if causes else ""
    return (
        f"{path} is damaged: {'; '.join(named)}. What cannot be restored as it was saved: "
        f"{'' if arrays is None else 'the arrays ' if many else 'the array '}{which}{because}"
    )
