"""What surgery does to a weight of any kind: scale what it reads, transpose it, keep some of its rows or columns.

Exact, and the kind stays: each field is changed where the axis stands. Kinds of which that is not true (quantized or
pivoted ones) are refused; folded into plain arrays they are taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmx.core import weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA, LowRank, Sum
from lmx.core.specs import ParamSpec
from lmx.models.folders import whole

LINEAR = (LowRank, LoRA, Sum)  # kinds whose fields are linear in what they read, channel by channel


def fits(w: Any) -> bool:
    """Whether a weight consists of kinds that are changed channel by channel."""
    if not weights.is_weight(w):
        return True
    parts = w.parts if isinstance(w, Sum) else [getattr(w, name) for name in _names(w)]
    return isinstance(w, LINEAR) and all(map(fits, parts))


def check_fits(w: Any, where: Any) -> None:
    """Raise ConfigError, saying what to do, for a weight of another kind."""
    if not fits(w):
        raise ConfigError(
            f"{where} is of the kind {type(w).__name__}, which cannot be changed channel by channel without an error; "
            "fold it into a plain array first (lmx.reparam.fold)"
        )


def scale_inputs(w: Any, scale: np.ndarray) -> Any:
    """The weight of x -> (scale x) W, of one input axis: scale (copies..., inputs)."""
    if isinstance(w, Sum):
        return w.replace(parts=tuple(scale_inputs(part, scale) for part in w.parts))
    if isinstance(w, LowRank):
        return w.replace(a=scale_inputs(w.a, scale))
    if isinstance(w, LoRA):
        return w.replace(base=scale_inputs(w.base, scale), lora_a=scale_inputs(w.lora_a, scale))
    x = whole(w)
    return (x.astype(np.float64) * scale.reshape(*scale.shape, *[1] * (x.ndim - scale.ndim))).astype(x.dtype)


def transpose(w: Any) -> Any:
    """The weight (n, m) of a weight (m, n)."""
    if isinstance(w, Sum):
        return w.replace(parts=tuple(map(transpose, w.parts)))
    if isinstance(w, LowRank):
        return LowRank(transpose(w.b), transpose(w.a))
    if isinstance(w, LoRA):
        return LoRA(transpose(w.base), transpose(w.lora_b), transpose(w.lora_a), alpha=w.alpha)
    return whole(w).T


def keep(w: Any, axis: int, indices: np.ndarray) -> Any:
    """The weight without copies of which one axis has only these indices left, in their order."""
    n = len(w.shape)
    return _keep(w, ParamSpec((0,) * n, tuple(map(str, range(n)))), str(axis), indices)


def _keep(w: Any, spec: ParamSpec, label: str, indices: np.ndarray) -> Any:
    if isinstance(w, Sum):
        return w.replace(parts=tuple(_keep(part, spec, label, indices) for part in w.parts))
    if weights.is_weight(w):
        parts = w.children(spec)
        return w.replace(**{name: _keep(getattr(w, name), parts[name], label, indices) for name in parts})
    return np.take(whole(w), indices, spec.axes.index(label)) if label in spec.axes else w


def _names(w: Any) -> tuple[str, ...]:
    return {LowRank: ("a", "b"), LoRA: ("base", "lora_a", "lora_b")}.get(type(w), ())
