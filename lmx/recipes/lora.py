"""`lmx lora attach`, `merge`, `extract` and `rerank`: adapters put on, added to their bases, found, made smaller."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lmx import hf, reparam
from lmx.core.errors import ConfigError, FolderError, nearest
from lmx.hf import updates
from lmx.models.transformer import Model
from lmx.recipes import calibration, derived, models

KEEP = ("lmx", "peft")


@dataclasses.dataclass(frozen=True)
class AttachOptions:
    """Put LoRA adapters on a model, which computes what it did until they are trained.

    `lmx train --init FOLDER --train lora_` then trains them alone.
    """

    model: str
    """The folder of a run or a model, or the name of a model of the hub."""
    output: str
    """The folder to write: the model with its adapters."""
    pattern: str = "attention/(query|value)$"
    """Which weights, by path."""
    rank: int = 8
    """Of every update."""
    alpha: float | None = None
    """An update counts alpha / rank times; the rank if not given."""
    init: str = "plain"
    """Where an adapter begins: plain, pissa (the weight's principal part), eva or corda (by what the weight reads)."""
    rslora: bool = False
    """Let an update count alpha / sqrt(rank) times."""
    data: str = "local"
    """For eva and corda, text to see what the weights read: as for lmx train."""
    tokens: int = 16_384
    """For eva and corda, how many tokens of it."""
    seed: int = 0
    """Of the numbers and the text that are drawn."""
    overwrite: bool = False
    """Replace a model that is in the output folder."""


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """Add LoRA adapters to the weights they are on.

    The model has them already (lmx lora attach), or they come from a folder in PEFT's format.
    """

    model: str
    """The folder of a run or a model, or the name of a model of the hub."""
    output: str
    """The folder to write: a model without adapters."""
    adapter: str | None = None
    """The folder of an adapter in PEFT's format for this model, or its name on the hub."""
    pattern: str = "."
    """Which adapters, by path; the others stay."""
    format: str = "lmx"
    """Of the result: lmx, or hf for Hugging Face's."""
    overwrite: bool = False
    """Replace a model that is in the output folder."""


@dataclasses.dataclass(frozen=True)
class ExtractOptions:
    """Find the adapter that brings a base to a model tuned from it: the best update of a rank for each difference."""

    model: str
    """The folder of the tuned model."""
    base: str
    """The folder of the model that it was tuned from, or its name on the hub."""
    output: str
    """The folder to write."""
    rank: int | None = None
    """Of every update; 16 if neither this nor the energy is given."""
    energy: float | None = None
    """Instead of a rank: the share of the difference's squares to keep, above 0 and at most 1."""
    pattern: str = "."
    """Which weights, by path."""
    partial: bool = False
    """Leave what else differs (norms, biases, weights outside the pattern) as it is in the base."""
    format: str = "peft"
    """What to write: peft, the adapter alone, or lmx, the base with it."""
    overwrite: bool = False
    """Replace what is in the output folder."""


@dataclasses.dataclass(frozen=True)
class RerankOptions:
    """Bring adapters to a lower rank: the best of that rank for each update."""

    model: str
    """The folder of a model with adapters, or of the base of --adapter."""
    output: str
    """The folder to write."""
    rank: int
    """The new rank; updates of no higher rank stay."""
    adapter: str | None = None
    """The folder of an adapter in PEFT's format for this model, or its name on the hub."""
    pattern: str = "."
    """Which adapters, by path."""
    data: str | None = None
    """Text, as for lmx train, by which to choose the best for what the weights give; if not given, for the weights."""
    tokens: int = 16_384
    """How many tokens of it."""
    format: str = "lmx"
    """What to write: lmx, the base with the adapter, or peft, the adapter alone."""
    overwrite: bool = False
    """Replace what is in the output folder."""


def attach(options: AttachOptions, console: Console | None = None) -> dict[str, Any]:
    """Attach and return {"source", "output", "adapters", "ranks", "trainable", "parameters", ...}. Raises LmxErrors."""
    o, begin = options, time.perf_counter()
    source = derived.open_source(o.model)
    given: dict[str, Any] = {"key": jax.random.key(o.seed)} if o.init == "plain" else {}
    if o.init in reparam.WITH_DATA:
        given["grams"] = calibration.input_moments(source, o.pattern, o.data, o.tokens, o.seed, console)
    model = reparam.attach(source.model, o.pattern, o.rank, o.alpha, init=o.init, rslora=o.rslora, **given)
    result = derived.write(source, model, o.output, "lmx lora attach", derived.told(o), "lmx", o.overwrite)
    return result | _adapters(model) | derived.timed(begin)


def merge(options: MergeOptions) -> dict[str, Any]:
    """Merge and return {"source", "output", "format", "adapters", "parameters", ...}. Raises LmxErrors."""
    o, begin = options, time.perf_counter()
    derived.check_format(o.format)
    source = derived.open_source(o.model)
    adapted = source.model if o.adapter is None else hf.load_adapter(source.model, o.adapter)
    model, about = reparam.merge(adapted, o.pattern), _adapters(adapted)
    result = derived.write(source, model, o.output, "lmx lora merge", derived.told(o), o.format, o.overwrite)
    return result | about | derived.timed(begin)


def extract(options: ExtractOptions) -> dict[str, Any]:
    """Extract and return {"source", "output", "format", "adapters", "ranks", ...}. Raises LmxErrors."""
    o, begin = options, time.perf_counter()
    _check_kept(o.format)
    tuned, base = derived.open_source(o.model), derived.open_source(o.base)
    rank = 16 if o.rank is None and o.energy is None else o.rank
    model = reparam.extract(tuned.model, base.model, rank, energy=o.energy, pattern=o.pattern, partial=o.partial)
    result = _write(
        base, model, o.base, o.output, "lmx lora extract", derived.told(o) | {"tuned": o.model}, o.format, o.overwrite
    )
    return result | _adapters(model) | derived.timed(begin)


def rerank(options: RerankOptions, console: Console | None = None) -> dict[str, Any]:
    """Re-rank and return {"source", "output", "format", "adapters", "ranks", ...}. Raises LmxErrors."""
    o, begin = options, time.perf_counter()
    _check_kept(o.format)
    source = derived.open_source(o.model)
    model = source.model if o.adapter is None else hf.load_adapter(source.model, o.adapter)
    grams = None
    if o.data is not None:
        adapted = dataclasses.replace(source, model=model)
        grams = calibration.input_moments(adapted, o.pattern, o.data, o.tokens, 0, console)
    model = reparam.rerank(model, o.rank, pattern=o.pattern, grams=grams)
    result = _write(source, model, o.model, o.output, "lmx lora rerank", derived.told(o), o.format, o.overwrite)
    return result | _adapters(model) | derived.timed(begin)


def _check_kept(name: str) -> None:
    if name not in KEEP:
        raise ConfigError(f"format {name!r} is none of {', '.join(KEEP)}{nearest(name, KEEP)}")


def _write(
    source: derived.Source, model: Model, base: str, output: str, made_by: str, told: dict, format: str, overwrite: bool
) -> dict[str, Any]:
    """The model with its adapters in lmx's format, or the adapters alone in PEFT's."""
    if format == "lmx":
        return derived.write(source, model, output, made_by, told, "lmx", overwrite)
    target = Path(output).expanduser()
    try:
        place = models.model_folder(base)
    except FolderError:  # a checkpoint, whose family is open
        place = None
    hf.save_adapter(model, target, base=place, overwrite=overwrite)
    return {"source": base, "output": output, "format": format, "files": sorted(x.name for x in target.iterdir())}


def _adapters(model: Model) -> dict[str, Any]:
    """How many matrices have one, of which ranks, and how many numbers they hold."""
    held = updates.held(model)
    sizes = [
        (node.lora_a.size + node.lora_b.size) // (1 if at is None else len(node.lora_a)) for node, at in held.values()
    ]
    ranks = sorted({node.rank for node, _ in held.values()})
    return {"adapters": len(held), "ranks": ranks, "trainable": sum(sizes)}
