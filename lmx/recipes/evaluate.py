"""`lmx eval`: how well a model predicts a text, in bits per byte and by domain, with lzma beside it."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape

from lmx import data, evaluate
from lmx.core import sharding, specs
from lmx.core.errors import ConfigError, nearest
from lmx.models.transformer import Model
from lmx.recipes.corpus import by_domain
from lmx.recipes.models import open_model, trained_length
from lmx.train import processes
from lmx.train.feed import place_batch

SPLITS = ("train", "valid", "test", "all")


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Measure a model on text: bits per byte, whole and by domain, beside lzma on the same bytes."""

    model: str
    """The folder of a run or a model."""
    data: str = "local"
    """Text to predict: "local" (the built-in corpus), or files, folders and globs as for lmx train."""
    split: str = "test"
    """Which part of the text: train, valid, test (as lmx train splits it) or all of it."""
    length: int | None = None
    """Tokens a window; if not given, the length the model was trained with, or else 256."""
    overlap: int | None = None
    """Tokens of a window that are context only; half of it if not given."""
    batch_size: int = 16
    """Windows computed at a time."""
    mesh: str | None = None
    """Devices to split over, such as fsdp=4,tensor=2; if not given one, or with several processes all by fsdp."""


def run(options: EvalOptions, console: Console | None = None) -> dict[str, Any]:
    """Evaluate and return {"bits_per_byte", "references", "nats_per_token", "perplexity", "tokens", "bytes", ...}.

    Raises LmxErrors for a model, a text or an option that cannot be used.
    """
    console = (console or Console()) if processes.leads() else Console(quiet=True)
    if options.split not in SPLITS:
        there = ", ".join(SPLITS)
        raise ConfigError(f"no split {options.split!r}, there are {there}{nearest(options.split, SPLITS)}")
    for name in ("batch_size", "length"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(options, name)}")
    mesh = options.mesh or (f"fsdp={jax.device_count()}" if jax.process_count() > 1 else None)
    with sharding.use_mesh(mesh), tempfile.TemporaryDirectory(prefix="lmx-eval-") as scratch:
        model, tokenizer = open_model(options.model)
        if isinstance(model, Model):
            model.require_next_token()
        with console.status(f"reading {escape(options.data)}"):
            documents = data.deduplicate(data.read(options.data))
            documents = documents if options.split == "all" else data.split(documents)[options.split]
            cache = data.build_cache(documents, tokenizer, Path(scratch))
        length = options.length or trained_length(options.model) or 256
        overlap = length // 2 if options.overlap is None else options.overlap
        rows = data.evaluation_rows(cache, length, overlap, batch_size=options.batch_size)
        with console.status("evaluating"):
            bits = evaluate.bits_per_byte(model, rows, cache.domain_bytes, place=place_batch)
            lzma = evaluate.lzma_bits_per_byte(by_domain(documents))
        targets, size = cache.num_tokens - 1, sum(cache.domain_bytes.values())
        nats = bits["all"] * size * math.log(2) / targets
        return {
            "bits_per_byte": bits,
            "references": {"lzma": lzma},
            "nats_per_token": nats,
            "perplexity": math.exp(nats),
            "tokens": targets,
            "bytes": size,
            "length": length,
            "parameters": specs.count(model),
            "model": options.model,
        }
