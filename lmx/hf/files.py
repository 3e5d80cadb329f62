"""The files of a checkpoint in Hugging Face's format: config.json, safetensors in one file or several, and the rest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lmx.core import hub
from lmx.core.arrays import open_arrays
from lmx.core.errors import FolderError
from lmx.models import generation
from lmx.models.filenames import CONFIG, INDEX, STRUCTURE, TOKENIZER_FILES
from lmx.models.generation import read_json

WEIGHTS = "model.safetensors"


class TokenizerFiles:
    """The tokenizer of a folder as files, chat template and generation settings included: what `save` takes."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.names = [name for name in TOKENIZER_FILES if (self.folder / name).is_file()]

    def save(self, folder: str | os.PathLike) -> None:
        """Copy them, byte for byte."""
        for name in self.names:
            shutil.copyfile(self.folder / name, Path(folder) / name)


def is_folder(path: Path) -> bool:
    """Whether a folder is in Hugging Face's format rather than lmx's own."""
    if not path.is_dir() or (path / STRUCTURE).exists():
        return False
    return (path / CONFIG).exists() or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*"))


def read_config(path: Path) -> dict[str, Any]:
    """config.json. Raises FolderError if it is missing or damaged."""
    return read_json(path / CONFIG)


def origin(path: Path) -> dict[str, Any] | None:
    """The config.json that a model came with: of a folder in Hugging Face's format, or from the notes of lmx's own.
    Raises FolderError if it is missing or damaged."""
    return read_config(path) if is_folder(path) else generation.origin(path)


def open_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name, as views of memory maps.

    Raises FolderError if there are none in safetensors, or if a file of several is missing, damaged or incomplete.
    """
    if not (path / INDEX).exists():
        if (path / WEIGHTS).exists():
            return open_arrays(path / WEIGHTS)
        files = sorted(entry.name for entry in path.iterdir())
        if any(name.startswith("model-0") and name.endswith(".safetensors") for name in files):
            raise FolderError(f"{path} has a checkpoint in several files and lacks their index, {INDEX}; copy it again")
        raise FolderError(f"{path} {hub.only_pickles(files)}")
    try:
        index = dict(read_json(path / INDEX)["weight_map"])
        files = sorted(set(index.values()))
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{path / INDEX} is damaged: it has no weight_map") from error
    lost = [file for file in files if not (path / file).is_file()]
    if lost:
        raise FolderError(
            f"{path} is half a checkpoint: {len(lost)} of the {len(files)} files of its index are missing "
            f"({', '.join(lost[:3])}); fetch or copy it again"
        )
    stored: dict[str, np.ndarray] = {}
    for file in files:
        stored |= open_arrays(path / file)
    absent = [name for name in index if name not in stored]
    if absent:
        raise FolderError(
            f"{path} is damaged: its index names {len(absent)} tensors that its files lack ({', '.join(absent[:3])}); "
            "fetch or copy it again"
        )
    return stored
