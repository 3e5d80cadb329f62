"""`lmx convert`: a model from Hugging Face's format to lmx's own and back, its tokenizer as it is."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lmx import hf
from lmx.core import hub, specs
from lmx.core.errors import ConfigError, nearest
from lmx.hf import files
from lmx.hf.library import FORMATS
from lmx.models import generation
from lmx.models.fields import DTYPES
from lmx.recipes import models


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Bring a model from Hugging Face's format to lmx's own, or back, its tokenizer and chat template with it.

    Weights of other kinds than plain matrices (factorized, LoRA) are written out for Hugging Face's format.
    """

    source: str
    """The folder of a run, a model or a checkpoint, of lmx or of Hugging Face, or the name of a model of the hub."""
    target: str
    """The folder to write."""
    to: str | None = None
    """The format to write, hf or lmx; by default the one that the source is not in."""
    dtype: str | None = None
    """Of the weights: float32, bfloat16 or float16; as they are stored by default."""
    like: str | None = None
    """For hf: a family such as mistral, or a folder with a config.json to follow; by default the one it came from."""
    overwrite: bool = False
    """Replace a model that is in the target folder: its files, and no others."""


def run(options: ConvertOptions) -> dict[str, Any]:
    """Convert and return {"source", "target", "format", "architecture", "parameters", "bytes", "seconds", "files"}.

    Raises LmxErrors for a source that cannot be read, or a model that the format cannot express.
    """
    o, begin = options, time.perf_counter()
    for name, value, choices in (("to", o.to, FORMATS), ("dtype", o.dtype, DTYPES)):
        if value is not None and value not in choices:
            raise ConfigError(f"{name} {value!r} is none of {', '.join(choices)}{nearest(value, choices)}")
    source = hub.folder(o.source)
    foreign = files.is_folder(source)
    to = o.to or ("lmx" if foreign else "hf")
    if o.like is not None and to != "hf":
        raise ConfigError("like says how to write Hugging Face's format; leave it out, or give to=hf")
    dtype = None if o.dtype is None else jnp.dtype(o.dtype)
    model = hf.load(source, dtype=dtype) if foreign else models.load_model(str(source), dtype=dtype)
    origin, tokenizer = models.came_from(str(source)), models.tokenizer_files(str(source))
    if origin is None and to == "hf":  # born in lmx: the tokenizer says which token ends a text
        tokenizer = models.ending(str(source), tokenizer)
    target = Path(o.target).expanduser()
    if to == "hf":
        hf.save(model, target, tokenizer=tokenizer, overwrite=o.overwrite, format="hf", like=o.like or origin)
    else:
        notes = None if origin is None else {generation.NOTES: origin}
        hf.save(model, target, tokenizer=tokenizer, overwrite=o.overwrite, notes=notes)
    return {
        "source": o.source,
        "target": o.target,
        "format": to,
        "architecture": (origin or {}).get("model_type"),
        "parameters": specs.count(model),
        "bytes": specs.nbytes(model),
        "seconds": time.perf_counter() - begin,
        "files": sorted(entry.name for entry in target.iterdir()),
    }
