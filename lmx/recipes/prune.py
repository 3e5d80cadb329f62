"""`lmx prune`: fewer layers, heads and feed-forward units, those that matter least first."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from rich.console import Console

from lmx import reparam
from lmx.core import specs
from lmx.core.errors import ConfigError
from lmx.recipes import calibration, derived

WEIGHTS = "weights"


@dataclasses.dataclass(frozen=True)
class PruneOptions:
    """Make a model smaller: drop the layers, attention heads and feed-forward units that matter least.

    What matters is measured on text, layers first, then heads, then units. The result is an ordinary smaller model of
    its family; train it on (lmx train --init) to recover.
    """

    model: str
    """The folder of a run or a model, or the name of a model of the hub."""
    output: str
    """The folder to write."""
    layers: int | None = None
    """How many layers to keep."""
    heads: int | None = None
    """How many attention heads to keep in every layer, with their key-value heads."""
    kv_heads: int | None = None
    """How many key-value heads to keep; as many as leave the size of a group what it is, if not given."""
    units: int | None = None
    """How many feed-forward units to keep in every layer."""
    measure: str = "cosine"
    """How a layer is measured: cosine (how much it changes what it reads) or loss (what the model loses without it)."""
    data: str = "local"
    """Text to measure on, as for lmx train; or "weights", to go by the weights of heads and units alone."""
    tokens: int = 16_384
    """How many tokens of it."""
    seed: int = 0
    """Of the text that is drawn."""
    format: str = "lmx"
    """Of the result: lmx, or hf for Hugging Face's."""
    overwrite: bool = False
    """Replace a model that is in the output folder."""


def run(options: PruneOptions, console: Console | None = None) -> dict[str, Any]:
    """Prune and return {"source", "output", "dropped_layers", "importance", "changed", "parameters", ...}.

    "importance" are the layers' numbers, "changed" fields of the config, before and after. Raises LmxErrors for numbers
    that the model has not, or a model or text that cannot be used.
    """
    o, begin = options, time.perf_counter()
    derived.check_format(o.format)
    if o.layers is None and o.heads is None and o.units is None:
        raise ConfigError("say what to keep: --layers, --heads or --units")
    if o.layers is not None and o.data == WEIGHTS:
        raise ConfigError("layers are measured on text; give --data, or leave --layers out")
    source = derived.open_source(o.model)
    if o.layers is not None and o.measure == "loss":
        source.model.require_next_token()
    given = None if o.data == WEIGHTS else calibration.batches(source, o.data, o.tokens, o.seed, console)
    model, importance, dropped = source.model, {}, {}
    if o.layers is not None:
        tower = reparam.check_tower(model, None)
        seen = reparam.layer_importance(model, given, measure=o.measure)
        model = reparam.prune_layers(model, o.layers, seen)
        importance[tower], dropped[tower] = seen.tolist(), reparam.least_important(seen, o.layers)
    if o.heads is not None:
        grams = calibration.moments_of(model, given, "/(attention|cross)/out$", console)
        model = reparam.prune_heads(model, o.heads, o.kv_heads, importance=reparam.head_importance(model, grams))
    if o.units is not None:
        grams = calibration.moments_of(model, given, "/mlp/down$", console)
        model = reparam.prune_units(model, o.units, importance=reparam.unit_importance(model, grams))
    before, after = source.model.config.to_dict(), model.config.to_dict()
    changed = {name: [before[name], after[name]] for name in before if before[name] != after[name]}
    result = derived.write(source, model, o.output, "lmx prune", derived.told(o), o.format, o.overwrite)
    about = {"dropped_layers": dropped, "importance": importance, "changed": changed}
    return result | about | {"parameters_before": specs.count(source.model)} | derived.timed(begin)
