"""The output folder of a run: claimed for a new one, opened for one that goes on, as it was if the start fails."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmx.core.errors import ConfigError, FolderError
from lmx.recipes.options import TrainOptions, resolve, resumed, values
from lmx.train import steps
from lmx.train.checkpoints import open_path

RECORD = "run.json"  # the options of the run
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"  # has a line once training has begun
REPLACED = ".replaced"  # what --overwrite replaces, until the new run has begun


@contextlib.contextmanager
def claim(options: TrainOptions, folder: Path) -> Iterator[TrainOptions]:
    """The options in full (those of the run that goes on where there is one), the folder made ready for them.

    If a new run ends in an error before its first step is logged, the folder is put back as it was found, an
    overwritten run included. Raises ConfigError and FolderError.
    """
    if options.resume and options.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it; give one of them")
    if options.resume:
        full = resumed(options, stored_options(folder))
        _forget_replaced(folder)
        yield full
        _forget_replaced(folder)  # where the run that overwrites was killed before it began
        return
    options = resolve(options)
    if (folder / REPLACED).exists() and not _has_begun(folder):  # an overwriting run was killed before it began
        _put_back(folder, [])
    _check_free(folder, options.overwrite)
    _check_no_checkpoints(options.checkpoint_folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        _make_room(folder)
        kept = {k: v for k, v in values(options).items() if k not in ("resume", "overwrite")}
        (folder / RECORD).write_text(json.dumps({"options": kept}, indent=1), encoding="utf-8")
    except OSError as error:
        _put_back(folder, made)
        raise FolderError(f"{folder} cannot be written ({error.strerror}); choose another --output") from error
    try:
        yield options
    except BaseException:
        if not _has_begun(folder):
            _put_back(folder, made)
        raise
    finally:
        _forget_replaced(folder)


def checkpoints_of(folder: Path, options: TrainOptions) -> str:
    """Where the run in a folder keeps its checkpoints, as its options in full say."""
    return options.checkpoint_folder or str(folder / CHECKPOINTS)


def stored_options(folder: Path) -> dict:
    """The options that the run in a folder was started with. Raises FolderError if there is none."""
    record = folder / RECORD
    if not record.exists():
        raise FolderError(f"there is no run in {folder} to resume; leave out --resume to start one")
    try:
        return json.loads(record.read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{record} is damaged ({error}); start over with --overwrite") from error


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder} is a file, and a run needs a folder; choose another --output")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / RECORD).exists():
        raise FolderError(f"{folder} is not empty and holds no run of lmx; choose another --output")
    if not overwrite:
        raise FolderError(
            f"{folder} holds another run; go on with it by --resume, replace it by --overwrite, "
            "or choose another --output"
        )


def _check_no_checkpoints(place: str | None) -> None:
    """Refuse what a new run would take for its own; --overwrite could not bring them back if its start failed."""
    found = steps.find(open_path(place)) if place is not None else {}
    if found:
        raise FolderError(
            f"{place} holds checkpoints of another run (steps {', '.join(map(str, found))}); choose another "
            "--checkpoint-folder, or remove them"
        )


def _make_room(folder: Path) -> None:
    """Move what is in the folder aside, within it: so it may be a mount point or the working directory."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / REPLACED
    if aside.exists():  # from a process that was killed
        shutil.rmtree(aside)
    there = list(folder.iterdir())
    if there:
        aside.mkdir()
    for path in there:
        path.rename(aside / path.name)


def _has_begun(folder: Path) -> bool:
    metrics = folder / METRICS
    return metrics.exists() and metrics.stat().st_size > 0


def _forget_replaced(folder: Path) -> None:
    """Remove what the run in the folder replaced, if it has begun."""
    if _has_begun(folder):
        shutil.rmtree(folder / REPLACED, ignore_errors=True)


def _put_back(folder: Path, made: list[Path]) -> None:
    """Remove what this run wrote, bring back what it moved aside, and remove the folders that it made."""
    aside = folder / REPLACED
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if path != aside:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    for path in list(aside.iterdir()) if aside.is_dir() else ():
        path.rename(folder / path.name)
    for path in (aside, *made):
        with contextlib.suppress(OSError):  # not made after all, or used by somebody else since
            path.rmdir()
