"""Rotary positions in config.json, as transformers 4 and 5 write them.

Version 5 has one dict `rope_parameters` {"rope_type", "rope_theta", ...}; version 4 has `rope_theta` beside
`rope_scaling` {"rope_type" or "type", ...} and `partial_rotary_factor`. Both are read; both are written, so that either
version, and tools that know only one, read the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.models.config import Config

# What `read` reads: to be merged into the defaults of a family.
DEFAULTS = {"rope_parameters": None, "rope_scaling": None, "rope_theta": None, "partial_rotary_factor": None}
LENGTH, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"
NEEDS_LENGTH = ("llama3", "yarn", "longrope")  # they depend on how long the rows were before stretching


def parameters(values: Mapping[str, Any], theta: float = 10_000.0) -> dict[str, Any]:
    """The rotary parameters of a config.json in version 5's form; `theta` is the family's default."""
    found = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    older = found.pop("type", None)
    found.setdefault("rope_type", older or "default")
    if found.get("rope_theta") is None:
        found["rope_theta"] = values.get("rope_theta") or theta
    if found.get("partial_rotary_factor") is None:
        found.pop("partial_rotary_factor", None)
        if values.get("partial_rotary_factor") is not None:
            found["partial_rotary_factor"] = values["partial_rotary_factor"]
    return found


def read(values: Mapping[str, Any], theta: float = 10_000.0, head_dim: int | None = None) -> dict[str, Any]:
    """rope_theta, rope_scaling and rotary_dim of Config, only those that differ from its defaults.

    `head_dim` is needed where a family turns only a part of each head (partial_rotary_factor).
    """
    found = parameters(values, theta)
    kind, base = found["rope_type"], float(found.pop("rope_theta"))
    part = found.pop("partial_rotary_factor", 1.0)
    fields: dict[str, Any] = {"rope_theta": base}
    if head_dim is not None and part != 1.0:
        fields["rotary_dim"] = int(head_dim * part)
    if kind != "default":
        fields["rope_scaling"] = tuple((name, _frozen(value)) for name, value in sorted(_filled(found, values).items()))
    return fields


def _filled(found: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Scaling parameters with what transformers takes from elsewhere in config.json."""
    kind, length = found["rope_type"], values.get(LENGTH)
    if kind in NEEDS_LENGTH:  # Phi-3 has it outside, and there it counts
        found[ORIGINAL] = values.get(ORIGINAL) or found.get(ORIGINAL) or length
        if kind != "llama3" and found.get("factor") is None and found[ORIGINAL] and length:
            found["factor"] = length / found[ORIGINAL]
    elif kind == "dynamic":
        found[ORIGINAL] = length
    return found


def write(config: Config) -> dict[str, Any]:
    """The inverse of `read`, in the forms of both versions."""
    scaling = {name: _thawed(value) for name, value in config.rope_scaling or ()}
    part, length = {}, {}
    if config.rotary_dim is not None:
        part = {"partial_rotary_factor": config.rotary_dim / config.head_dim}
    if scaling.get("rope_type") == "dynamic":
        length = {LENGTH: scaling.pop(ORIGINAL)}
    both = {"rope_type": "default", **scaling, "rope_theta": config.rope_theta, **part}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": both,
        **part,
        **length,
    }


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
