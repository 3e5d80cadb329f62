"""`lmx describe`: what is in a model: its parts, their shapes and kinds of weight, and what a token costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from lmx.core import specs, tree, weights
from lmx.core.errors import ConfigError
from lmx.models import cost, presets, transformer
from lmx.recipes.models import load_model


@dataclasses.dataclass(frozen=True)
class DescribeOptions:
    """Show what is in a model: parts, shapes, kinds of weight, parameters, FLOPs and bytes a token."""

    model: str
    """The folder of a run or a model, or the name of a preset such as llama-7b."""
    length: int = 1024
    """Tokens a row, for the cost of attention and of the cache."""


def run(options: DescribeOptions) -> dict[str, Any]:
    """Describe and return {"parts": [...], "parameters", "bytes", "forward_flops", "train_flops", ...}.

    A preset is described from its specs, without making its arrays. Raises LmxErrors for a name that is neither.
    """
    if options.length < 1:
        raise ConfigError(f"length must be at least 1, not {options.length}")
    if options.model in presets.PRESETS and not Path(options.model).exists():
        config = presets.preset(options.model)
        model: Any = transformer.Model(config, transformer.abstract(config))
    else:
        model = load_model(options.model, also=tuple(presets.PRESETS))
    length = min(options.length, getattr(model, "max_length", None) or options.length)
    price = cost.cost(model, length)
    return {
        "model": options.model,
        "config": model.config.to_dict() if hasattr(model, "config") else None,
        "parts": [_part(path, w) for path, w in tree.paths(model, weights.is_weight)],
        "parameters": price.parameters,
        "bytes": price.parameter_bytes,
        "length": length,
        "forward_flops": price.forward_flops,
        "train_flops": price.train_flops,
        "decode_bytes": price.decode_bytes,
        "cache_bytes": price.cache_bytes,
    }


def _part(path: tree.Path, w: Any) -> dict[str, Any]:
    return {
        "path": str(path),
        "kind": kind(w),
        "shape": list(w.shape),
        "dtype": str(w.dtype),
        "parameters": specs.count(w),
        "bytes": specs.nbytes(w),
    }


def kind(w: Any) -> str:
    """A weight's kind with what is in it: "dense", "LowRank 16", "LoRA 4 (LowRank 16)", "Pivoted 16 (Quantized 64)"."""
    if not weights.is_weight(w):
        return "dense"
    fields = jax.tree.leaves(w, is_leaf=lambda x: weights.is_weight(x) and x is not w)
    inner = dict.fromkeys(kind(field) for field in fields if weights.is_weight(field))
    return f"{type(w).__name__} {w.rank}" + (f" ({', '.join(inner)})" if inner else "")
