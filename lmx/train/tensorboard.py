"""Metrics for TensorBoard: the same numbers as in the metrics file, as scalars."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmx.core.errors import ConfigError


def check() -> None:
    """Raise ConfigError where TensorBoard is not installed."""
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "TensorBoard metrics need a package that is not installed: pip install 'lmx[tensorboard]'"
        ) from error


class Mirror:
    """Writes scalars into an event file of its own in `folder`; one process of a run may have it open.

    first: the step the run goes on from; TensorBoard forgets what older event files have after it.
    Raises ConfigError where TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike, first: int = 0) -> None:
        check()
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # not TensorFlow's: needs none of it

        self._event, self._summary = event_pb2, summary_pb2.Summary
        self._writer = EventFileWriter(os.fspath(folder))
        if first:
            began = self._event.SessionLog(status=self._event.SessionLog.START)
            self._writer.add_event(self._event.Event(wall_time=time.time(), step=first + 1, session_log=began))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers among the values of a step; those that are not finite too."""
        scalars = [(name, np.asarray(value)) for name, value in values.items() if not isinstance(value, str | Mapping)]
        numbers = [(name, float(x)) for name, x in scalars if x.ndim == 0 and np.issubdtype(x.dtype, np.number)]
        summary = self._summary(value=[self._summary.Value(tag=name, simple_value=x) for name, x in numbers])
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()  # a process that is killed must not take them along

    def close(self) -> None:
        """Write what is waiting and close the file."""
        self._writer.close()
