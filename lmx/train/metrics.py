"""Metrics of a run: JSON lines, written as training goes, cut back on resuming, read again, and drawn.

A line is `{"step": 10, "loss": 3.2, ...}`. A value that is not finite is written as null and named in
`"nonfinite"`, so that every line is valid JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmx.core.errors import FolderError


class MetricsLog:
    """Appends lines to a file, each flushed at once; in a run of several processes only one may have it open.

    Args:
      path: the file, made with its folder if needed; what it holds stays.
      resume_step: keep only the lines up to this step, so that the resumed run has no step twice.
      mirror: another log that gets the same values, and is closed with this one (`lmx.train.tensorboard`).

    Raises:
      FolderError: the file cannot be written, or a line that is not its last is no JSON.
    """

    def __init__(self, path: str | os.PathLike, *, resume_step: int | None = None, mirror: Any = None) -> None:
        self.path, self.mirror = Path(path), mirror
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._mend(resume_step)
            self._file = open(self.path, "a", encoding="utf-8")
        except FolderError:
            raise
        except OSError as error:
            raise FolderError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line. Values are numbers (scalar arrays too), strings, bools, None, mappings of them."""
        nonfinite: list[str] = []
        line = {"step": int(step)} | {name: _plain(value, name, nonfinite) for name, value in values.items()}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self.mirror is not None:
            self.mirror.log(step, values)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self.mirror is not None:
            self.mirror.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _mend(self, resume_step: int | None) -> None:
        """Drop a last line that was cut off and the lines after `resume_step`, atomically."""
        kept = [line for line in read(self.path) if resume_step is None or line["step"] <= resume_step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if text.encode() != self.path.read_bytes():
            scratch = self.path.with_name(f".{self.path.name}.new")
            with open(scratch, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, self.path)


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics file. A last line that was cut off by a killed process is left out.

    Raises:
      FolderError: there is no such file, or a line that is not its last is damaged (its number is named).
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror or error}") from error
    lines, parsed = text.split(b"\n"), []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                raise ValueError("it is no object with a step")
        except ValueError as error:
            if number == len(lines):  # what follows the last newline
                break
            raise FolderError(f"line {number} of {path} is damaged: {error}") from error
        parsed.append(values)
    return parsed


def plot(
    path: str | os.PathLike,
    png: str | os.PathLike,
    *,
    title: str = "",
    train: str = "loss",
    valid: str = "valid_loss",
    tokens: str = "tokens",
    unit: str = "nats/token",
) -> None:
    """Draw the loss curve of a metrics file as a PNG.

    Args:
      path: the metrics file.
      png: the picture to write.
      title: what stands above it.
      train, valid: the names of the training and the validation loss, both in `unit`; either may be missing.
      tokens: the name of the count of tokens seen; if it grows evenly it makes a second axis.
      unit: what the loss is measured in, such as "nats/token" or "bits per byte".

    Raises:
      FolderError: the file cannot be read, the picture cannot be written, or there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    lines = read(path)
    curves = {name: _series(lines, name) for name in (train, valid)}
    if not any(np.isfinite(values).any() for _, values in curves.values()):
        raise FolderError(f"{path} has no finite {train} or {valid}, so there is no curve to draw")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss ({unit})")
    _draw_train(axes, *curves[train])
    if len(curves[valid][0]):
        axes.plot(*curves[valid], "o-", color="tab:orange", markersize=4, label="validation")
    _add_tokens_axis(axes, *_series(lines, tokens))
    axes.grid(alpha=0.3)
    axes.legend()
    if title:
        figure.suptitle(title)
    FigureCanvasAgg(figure)
    scratch = Path(png).with_name(f".{Path(png).name}.new")
    try:
        figure.savefig(scratch, format="png", dpi=120)
        os.replace(scratch, png)
    except OSError as error:
        raise FolderError(f"{png} cannot be written: {error.strerror or error}") from error


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    """A value as JSON; notes the names of numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _plain(inner, f"{name}.{key}", nonfinite) for key, inner in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    value = np.asarray(value).item()
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    return value


def _series(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (NaN where null) of the lines that have the name."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, float), np.array([math.nan if value is None else value for value in values], float)


def _draw_train(axes: Any, steps: np.ndarray, values: np.ndarray) -> None:
    """Every value if there are few; a pale line below its running mean if there are many."""
    if not len(steps):
        return
    window = len(steps) // 40
    if window < 3:
        axes.plot(steps, values, color="tab:blue", label="train")
        return
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    mean = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(steps, mean, color="tab:blue", label=f"train (mean of {window})")


def _add_tokens_axis(axes: Any, steps: np.ndarray, tokens: np.ndarray) -> None:
    later = (steps > 0) & np.isfinite(tokens) & (tokens > 0)
    if not later.any():
        return
    rates = tokens[later] / steps[later]
    if rates.max() > 1.05 * rates.min():  # not even: one axis would lie about the other
        return
    rate = float(rates[-1])
    second = axes.secondary_xaxis("top", functions=(lambda step: step * rate, lambda count: count / rate))
    second.set_xlabel("tokens")
