"""Finding a model by what a user types: the folder of a run, of a model, of a checkpoint, or of checkpoints."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx import data
from lmx.core import hub
from lmx.core.errors import FolderError, nearest
from lmx.data import special_tokens
from lmx.hf import files, library
from lmx.models import generation
from lmx.models.presets import PRESETS
from lmx.recipes import checkpointed

STRUCTURE = "structure.json"


def model_folder(name: str, also: tuple[str, ...] = ()) -> Path:
    """The folder that holds the model: `name` itself, `name`/model where a run wrote it, or what the hub has as `name`.

    `also` are further right answers, for the error. Raises FolderError if there is no model.
    """
    if (place := _model_place(name)) is not None:
        return place
    folder = Path(name).expanduser()
    if hub.is_name(name):
        return hub.folder(name)
    if (folder / "run.json").exists():
        place = _checkpoints_of(folder)
        there = f", or open its newest checkpoint: {place}" if checkpointed.found_in(place) else ""
        raise FolderError(
            f"the run in {name!r} has not finished a model yet; go on with: lmx train --resume --output {name}{there}"
        )
    if folder.exists():
        library.load(folder)  # which is no model, and says in what way
    if name in PRESETS:
        raise FolderError(
            f"{name!r} is a preset, a shape without weights, and a trained model is wanted: the folder of a run. "
            f"`lmx train --model {name}` trains one"
        )
    beside = [str(p) for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    hint = nearest(name, [*beside, *also]) or "; `lmx train` makes one"
    raise FolderError(f"there is no folder {name!r}{hint}")


def _model_place(name: str) -> Path | None:
    """The folder on this machine that holds the model, if one does."""
    folder = Path(name).expanduser()
    is_model = lambda place: (place / STRUCTURE).exists() or files.is_folder(place)  # noqa: E731
    return next(filter(is_model, (folder, folder / "model")), None)


def came_from(name: str | None) -> dict[str, Any] | None:
    """config.json of Hugging Face with which the model of a folder or checkpoint came; None where it did not come from
    there, or is there no more."""
    with contextlib.suppress(FolderError):
        if name is not None:
            at_checkpoint = checkpointed.found_in(name)
            return notes_of(name).get(generation.NOTES) if at_checkpoint else files.origin(model_folder(name))
    return None


def notes_of(name: str) -> dict[str, Any]:
    """What the folder or checkpoint of a model says of how it was made. Raises FolderError."""
    if checkpointed.found_in(name):
        return checkpointed.open_notes(name)
    structure = model_folder(name) / STRUCTURE
    return json.loads(structure.read_text(encoding="utf-8")).get("notes", {}) if structure.exists() else {}


def open_model(name: str, *, dtype: Any = None) -> tuple[Any, data.Tokenizer]:
    """(model, its tokenizer) of a folder, in the mesh in force. Raises FolderError or DataError."""
    if checkpointed.found_in(name):
        model, tokenizer = checkpointed.open_checkpoint(name, dtype=dtype)
        if tokenizer is None:
            raise FolderError(f"the checkpoint {name} has no tokenizer with it")
    else:
        folder = model_folder(name)
        model, tokenizer = library.load(folder, dtype=dtype), data.load_tokenizer(folder)
    data.check_fits(tokenizer, model.vocab_size)
    return model, tokenizer


def load_model(name: str, *, dtype: Any = None, also: tuple[str, ...] = ()) -> Any:
    """The model of a folder, in the mesh in force. Raises FolderError; `also` are further right answers, for it."""
    if checkpointed.found_in(name):
        return checkpointed.open_checkpoint(name, dtype=dtype)[0]
    return library.load(model_folder(name, also), dtype=dtype)


def load_shapes(name: str, *, also: tuple[str, ...] = ()) -> Any:
    """The model of a folder as `jax.ShapeDtypeStruct`s with shardings; no array is read. Raises FolderError."""
    if checkpointed.found_in(name):
        return checkpointed.open_shapes(name)
    return library.load_shapes(model_folder(name, also))


def load_tokenizer(name: str) -> data.Tokenizer:
    """The tokenizer of a model's folder or checkpoint, or of any folder with a tokenizer.json.

    Raises FolderError or DataError.
    """
    if checkpointed.found_in(name):
        tokenizer = checkpointed.open_tokenizer(name)
        if tokenizer is None:
            raise FolderError(f"the checkpoint {name} has no tokenizer with it")
        return tokenizer
    return data.load_tokenizer(_tokenizer_home(name))


def tokenizer_files(name: str) -> Any:
    """The tokenizer of a model's folder or checkpoint, or of any folder, as files, chat template included: what
    `lmx.save` takes, or None where a checkpoint has none. Raises FolderError."""
    if checkpointed.found_in(name):
        return checkpointed.open_tokenizer_files(name)
    return files.TokenizerFiles(_tokenizer_home(name))


def _tokenizer_home(name: str) -> Path:
    """The folder in which a name that is no checkpoint has its tokenizer. Raises FolderError for one of the hub that
    cannot be fetched."""
    return _model_place(name) or hub.folder(name, hub.TOKENIZER)


def _at_tokenizer(name: str, read: Callable[[Path], Any]) -> Any:
    """What `read` gives of the folder in which a model has its tokenizer, those of a checkpoint written out for it."""
    return checkpointed.at_tokenizer(name, read) if checkpointed.found_in(name) else read(_tokenizer_home(name))


@dataclass(frozen=True)
class Ending:
    """A tokenizer's files with the ids that end a text, which Hugging Face's config of a new model has to say."""

    files: Any
    eos_ids: tuple[int, ...]

    def save(self, folder: str | Path) -> None:
        self.files.save(folder)


def ending(name: str, its_files: Any) -> Any:
    """The files of the tokenizer of a model that was born in lmx, as `Ending`; as they are where there are none."""
    return Ending(its_files, load_tokenizer(name).eos_ids) if getattr(its_files, "names", ()) else its_files


def load_template(name: str) -> data.ChatTemplate:
    """The chat template of a model's folder or checkpoint, or of any folder. Raises FolderError or DataError where
    there is none."""
    try:
        return _at_tokenizer(name, data.load_template)
    except FolderError:
        if not checkpointed.found_in(name):
            raise
        raise FolderError(
            f"the checkpoint {name} has no chat template with it: the run's objective was not chat, or its tokenizer "
            "had none; give the model plain text"
        ) from None


def decoder_start(name: str, tokenizer: data.Tokenizer) -> int:
    """What the decoder of an encoder-decoder begins with: by the configs of Hugging Face it came with, else the padding
    token."""
    found = _at_tokenizer(name, lambda folder: generation.setting(folder, "decoder_start_token_id"))
    return special_tokens.pad_id(tokenizer) if found is None else found


def check(name: str) -> None:
    """Raise FolderError unless there is a model to open."""
    if not checkpointed.found_in(name):
        model_folder(name)


def _checkpoints_of(run: Path) -> str:
    """Where a run keeps its checkpoints (`lmx.recipes.claim` wrote it down)."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        options = json.loads((run / "run.json").read_text(encoding="utf-8"))["options"]
        return options["checkpoint_folder"] or str(run / "checkpoints")
    return str(run / "checkpoints")


def trained_length(name: str) -> int | None:
    """The tokens a row with which a run trained the model, or None where that is not known."""
    return notes_of(name).get("options", {}).get("length")
