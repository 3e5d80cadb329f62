"""`lmx fold`: the same function in fewer parts."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from lmx import reparam
from lmx.core import tree, weights
from lmx.core.errors import ConfigError
from lmx.recipes import derived


@dataclasses.dataclass(frozen=True)
class FoldOptions:
    """Write a model in fewer parts that compute the same: factors and adapters as arrays, norms into what reads them.

    What cannot be folded without an error stays, and is listed with the reason.
    """

    model: str
    """The folder of a run or a model."""
    output: str
    """The folder to write."""
    pattern: str = "."
    """Which weights to write out as plain arrays (LoRA, low rank, sums, quantized), by path; all of them by default."""
    norms: bool = False
    """Fold the norms' scales and biases into the linear layers that read them, wherever that is exact."""
    untie: bool = False
    """Give the head a matrix of its own where it is the token table, so that the last norm can go into it."""
    value_biases: bool = False
    """Fold the values' biases into those of attention's output."""
    embedding: bool = False
    """Fold a factorized embedding and its projection into one table."""
    format: str = "lmx"
    """Of the result: lmx, or hf for Hugging Face's."""
    overwrite: bool = False
    """Replace a model that is in the output folder."""


def run(options: FoldOptions) -> dict[str, Any]:
    """Fold and return {"source", "output", "format", "folded", "kept", "parameters", "bytes", ...}.

    "folded" are paths, "kept" the norms that stayed, with the reason. Raises LmxErrors for a model that cannot be read,
    or where there is nothing to fold.
    """
    o, begin = options, time.perf_counter()
    derived.check_format(o.format)
    source = derived.open_source(o.model)
    model, folded, kept = source.model, [], {}
    kinds = [
        str(path)
        for path, w, hit in tree.matches(model, o.pattern, weights.is_weight)
        if hit.any() and weights.is_weight(w)
    ]
    if kinds:
        model, folded = reparam.fold(model, o.pattern), kinds
    if o.embedding:
        model, folded = reparam.fold_embedding(model), [*folded, "embed/projection"]
    if o.value_biases:
        folded += [str(path) for path, _ in tree.select(model, "value_bias$")]
        model = reparam.fold_value_bias(model)
    if o.untie:
        model = reparam.untie(model)
    if o.norms:
        reasons = reparam.norm_folds(model)
        model = reparam.fold_norms(model)
        folded += [path for path, reason in reasons.items() if reason is None]
        kept = {path: reason for path, reason in reasons.items() if reason is not None}
    if not folded and not o.untie:
        raise ConfigError(
            f"there is nothing to fold in {o.model}: its weights are plain arrays; --norms, --value-biases and "
            "--embedding fold more"
        )
    told = {
        name: value for name, value in dataclasses.asdict(o).items() if name not in ("model", "output", "overwrite")
    }
    result = derived.write(source, model, o.output, "lmx fold", told, o.format, o.overwrite)
    return result | {"folded": folded, "kept": kept} | derived.timed(begin)
