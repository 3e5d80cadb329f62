"""A model made from another: opened with all that travels along, and written with a note of how it was made."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from lmx import hf
from lmx.core import specs
from lmx.core.errors import ConfigError, nearest
from lmx.hf.library import FORMATS
from lmx.models import generation
from lmx.models.transformer import Model
from lmx.recipes import models


@dataclasses.dataclass(frozen=True)
class Source:
    """A model and what came with it."""

    name: str  # as it was given
    model: Model
    tokenizer: Any  # what `lmx.save` takes, or None
    origin: dict[str, Any] | None  # the config.json of Hugging Face's that it came with
    notes: dict[str, Any]  # of its structure.json


def open_source(name: str) -> Source:
    """The model of a folder, of lmx or of Hugging Face. Raises FolderError, or ConfigError if it is no Transformer."""
    model = models.load_model(name)
    if not isinstance(model, Model):
        raise ConfigError(f"{name} holds a {type(model).__name__}; this works on Transformers")
    return Source(name, model, models.tokenizer_files(name), models.came_from(name), models.notes_of(name))


def check_format(name: str) -> None:
    """Raise ConfigError for a format that there is not."""
    if name not in FORMATS:
        raise ConfigError(f"format {name!r} is none of {', '.join(FORMATS)}{nearest(name, FORMATS)}")


def write(
    source: Source, model: Model, output: str, made_by: str, options: dict[str, Any], format: str, overwrite: bool
) -> dict[str, Any]:
    """Write a model made from a source, and return {"source", "output", "format", "parameters", "bytes", "files"}.

    A folder of lmx's says how it was made ("made by", "from", "with"), and what its source's said before. Raises
    FolderError, and ConfigError where no family of Hugging Face's can express the model.
    """
    target = Path(output).expanduser()
    if format == "hf":
        tokenizer = source.tokenizer
        if source.origin is None:  # born in lmx: the tokenizer says which token ends a text
            tokenizer = models.ending(source.name, tokenizer)
        hf.save(model, target, tokenizer=tokenizer, overwrite=overwrite, format="hf", like=source.origin)
    else:
        notes = {**source.notes, "made by": made_by, "from": source.name, "with": options}
        if "made by" in source.notes:
            notes["before"] = {name: source.notes.get(name) for name in ("made by", "from", "with", "before")}
        if source.origin is not None:
            notes[generation.NOTES] = source.origin
        hf.save(model, target, tokenizer=source.tokenizer, overwrite=overwrite, notes=notes)
    return {
        "source": source.name,
        "output": output,
        "format": format,
        "parameters": specs.count(model),
        "bytes": specs.nbytes(model),
        "files": sorted(entry.name for entry in target.iterdir()),
    }


def told(options: Any) -> dict[str, Any]:
    """The options that say how the result was made."""
    return {name: x for name, x in dataclasses.asdict(options).items() if name not in ("model", "output", "overwrite")}


def timed(begin: float) -> dict[str, float]:
    """What every result ends with."""
    return {"seconds": time.perf_counter() - begin}
