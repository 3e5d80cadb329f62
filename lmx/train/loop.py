"""The training loop, read from top to bottom: batches in, steps, metrics, evaluations, checkpoints, a sound stop.

It knows nothing of models, losses or data: the step, the batches and the evaluations are arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from lmx.core.errors import DataError, NonFiniteError
from lmx.train.checkpoints import Checkpoints
from lmx.train.metrics import MetricsLog
from lmx.train.state import TrainState
from lmx.train.step import Step

Evaluation = Callable[[TrainState], dict[str, float]]


class Report(Protocol):
    """What the loop tells whoever watches (`lmx.train.progress`)."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...
    def evaluation(self, step: int, values: dict[str, float]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class Every:
    """How often, in steps; 0 is never, and the last step counts for evaluating and saving."""

    log: int = 10
    evaluate: int = 0
    save: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: TrainState
    step: int
    stopped: bool  # before its last step, because it was asked to
    tokens_per_second: float  # over the steps of this process, evaluations and saving left out, the first left out
    skipped: int  # steps with a non-finite loss or gradient


def train(
    state: TrainState,
    step: Step,
    batches: Iterator[Any],
    *,
    steps: int,
    every: Every = Every(),  # noqa: B008  (frozen)
    evaluate: Evaluation | None = None,
    checkpoints: Checkpoints | None = None,
    extra: Callable[[int], dict] = lambda step: {"data": {"step": step}},
    log: MetricsLog | None = None,
    report: Report | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    max_skipped: int = 10,
) -> Outcome:
    """Train from `state.step` to `steps`.

    batches:     the batches from that step on, as `step` takes them; "tokens" is counted for the speed.
    evaluate:    numbers to log about a state, at `every.evaluate` and at the end.
    extra:       JSON saved with a checkpoint of that step, such as the position in the data. An evaluation of that
                 very step is given to the checkpoints too, which may keep the best by it.
    max_skipped: so many steps in a row with a non-finite loss or gradient, counted when metrics are logged, raise
                 NonFiniteError.

    The state given is donated. `asked_to_stop` is called once a step; when it says so, that step is saved and the loop
    returns. Raises FolderError as soon as a save has failed, after the step in hand.
    Raises DataError if the batches end before the steps do.
    """
    first = int(state.step)
    speed = _Speed()
    position, stopped, skipped = first, False, int(state.skipped)
    with contextlib.closing(batches) if hasattr(batches, "close") else contextlib.nullcontext(batches):
        while position < steps and not stopped:
            batch = next(batches, None)
            if batch is None:
                raise DataError(f"the batches ended after step {position}, but {steps} steps were asked for")
            state, metrics = step(state, batch)
            position += 1
            stopped, last = asked_to_stop(), position == steps
            if checkpoints is not None:
                checkpoints.check()
            speed.count(batch, warm=position == first + 1, wait=metrics)
            evaluating = evaluate is not None and (_due(position, every.evaluate) or last)
            if _due(position, every.log) or evaluating or last or stopped or position == first + 1:
                values = {name: float(np.asarray(x)) for name, x in jax.device_get(metrics).items()}
                values |= {"tokens": position * _tokens(batch), "tokens_per_second": speed.rate()}
                skipped = _watch(values, position, skipped, max_skipped, report, log)
                _tell(log, report, "metrics", position, values)
            found = {}
            if evaluating:
                with speed.paused():
                    found = evaluate(state)
                    _tell(log, report, "evaluation", position, found)
            if checkpoints is not None and (_due(position, every.save) or last or stopped):
                with speed.paused():
                    checkpoints.save(position, state, extra(position), metrics=found)
    if checkpoints is not None:
        checkpoints.wait()
    return Outcome(state, position, stopped and position < steps, speed.rate(), skipped)


def _due(position: int, every: int) -> bool:
    return every > 0 and position % every == 0


def _tell(log: MetricsLog | None, report: Report | None, kind: str, position: int, values: dict[str, float]) -> None:
    if log is not None:
        log.log(position, values)
    if report is not None:
        getattr(report, kind)(position, values)


def _watch(values, position, skipped, max_skipped, report, log) -> int:
    """Report newly skipped steps; raise NonFiniteError where too many came in a row."""
    now, in_a_row = int(values["skipped"]), int(values["skipped_in_a_row"])
    if now > skipped and report is not None:
        report.note(f"{now - skipped} step(s) up to {position} had a non-finite loss or gradient and were skipped")
    if in_a_row >= max_skipped:
        _tell(log, None, "metrics", position, values)
        loss = values.get("loss", math.nan)
        raise NonFiniteError(
            f"{in_a_row} steps in a row up to step {position} had a non-finite loss or gradient (loss {loss}); the "
            "parameters are those before them. Lower the learning rate, lengthen the warm-up, or look at the data "
            "of these steps; the last checkpoint is sound"
        )
    return now


def _tokens(batch: Any) -> int:
    """Positions in a batch, 0 if it has no "tokens"."""
    return int(np.prod(batch["tokens"].shape)) if isinstance(batch, dict) and "tokens" in batch else 0


class _Speed:
    """Tokens a second of the steps alone: evaluations and saving are paused, the first (compiling) step left out."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.since = 0, 0.0, time.perf_counter()
        self.pending: Any = None

    def count(self, batch: Any, warm: bool, wait: Any) -> None:
        self.pending = wait
        if warm:
            jax.block_until_ready(wait)
            self.since = time.perf_counter()
            return
        self.tokens += _tokens(batch)

    def _stop(self) -> None:
        jax.block_until_ready(self.pending)
        self.seconds += time.perf_counter() - self.since

    def rate(self) -> float:
        self._stop()
        self.since = time.perf_counter()
        return self.tokens / self.seconds if self.tokens else 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._stop()
        yield
        self.since = time.perf_counter()
