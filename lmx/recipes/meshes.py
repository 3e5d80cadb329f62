"""The mesh of a run on the devices that are there, which may be others than those it began on."""

from __future__ import annotations

import math

from lmx.core.errors import ConfigError
from lmx.core.sharding import MESH_AXES


def fit_mesh(text: str | None, rows: int, devices: int, processes: int = 1, *, asked: bool = False) -> str | None:
    """The mesh to use: `text` where it has as many devices as there are or was asked for just now, else one like it.

    A mesh that the run began with on other devices keeps its tensor and expert axes, and the rest goes to fsdp (and
    data, where that divides). Without a text it is all devices by fsdp, or None for one device.

    rows: of a batch, or of a microbatch. Raises ConfigError, with the nearest numbers that do, where the rows do not
    divide over several processes or over a mesh chosen here in place of another.
    """
    if asked or text is not None and _size(text) == devices:
        return text
    if text is None and devices == 1:
        return None
    if text is None and processes == 1:
        return f"fsdp={devices}"
    sizes = {} if text is None else _sizes(text)
    kept = {name: sizes[name] for name in ("tensor", "expert") if sizes.get(name, 1) > 1}
    fixed = math.prod(kept.values())
    valid = [n * fixed for n in range(1, rows + 1) if rows % (n * kept.get("expert", 1)) == 0]
    if devices in valid:
        rest = devices // fixed
        data = sizes.get("data", 1) if rest % max(1, sizes.get("data", 1)) == 0 else 1
        found = {"data": data, "fsdp": rest // data, **kept}
        return ",".join(f"{name}={size}" for name, size in found.items() if size > 1) or None
    there = f"{devices} devices of {processes} process{'es' if processes > 1 else ''}"
    raise ConfigError(
        f"{rows} rows a step{f', {_text(kept)} apart,' if kept else ''} do not divide over {there}; "
        f"{_nearest(valid, devices, devices // processes)}; or give another batch size, or a --mesh for all devices"
    )


def _nearest(valid: list[int], devices: int, each: int) -> str:
    """The nearest numbers of devices, in processes of as many as now where that can be."""
    whole = [n for n in valid if n % each == 0] or valid
    near = [max((n for n in whole if n < devices), default=None), min((n for n in whole if n > devices), default=None)]
    said = [f"{n // each} process{'es' if n > each else ''} ({n} devices)" for n in near if n and n % each == 0]
    return f"the nearest that do are {' and '.join(said or [f'{n} devices' for n in near if n])}"


def _text(sizes: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def _sizes(text: str) -> dict[str, int]:
    """The sizes of the axes of a mesh that a run began with; an axis of -1, which fits any devices, is left out."""
    pairs = (part.partition("=") for part in text.split(","))
    sizes = {name.strip(): int(size) for name, _, size in pairs if name.strip() in MESH_AXES}
    return {name: size for name, size in sizes.items() if size > 0}


def _size(text: str) -> int:
    return math.prod(_sizes(text).values())
