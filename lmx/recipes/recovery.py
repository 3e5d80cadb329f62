"""Recovery: a short distillation from the original, by which a model gets back what surgery took from it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from rich.console import Console

from lmx.core import tree
from lmx.core.errors import ConfigError
from lmx.core.nodes import node
from lmx.losses import Distillation, distillation
from lmx.models import cost
from lmx.models.protocol import LanguageModel
from lmx.train import optimizers
from lmx.train.feed import place_batch
from lmx.train.loop import train as run_loop
from lmx.train.progress import ProgressReport
from lmx.train.state import start
from lmx.train.step import Loss, make_train_step


@node
class _Parts:
    """The student as what learns and what does not, so that a pattern need not know of the teacher."""

    trained: Any
    rest: Any
    teacher: Any


@dataclasses.dataclass(frozen=True)
class Recovered:
    """A model after its recovery, and what that took."""

    model: Any
    steps: int
    tokens: int
    student_flops: int  # three times its forward pass a token, as if all of it were trained
    teacher_flops: int  # one forward pass a token
    skipped: int  # steps with a non-finite loss or gradient
    tokens_per_second: float  # the first step, which compiles, left out

    @property
    def flops(self) -> int:
        """Of student and teacher."""
        return self.student_flops + self.teacher_flops


def recover(
    student: LanguageModel,
    teacher: LanguageModel,
    batches: Iterable[dict],
    steps: int,
    learning_rate: float = 1e-3,
    *,
    train: str = ".",
    loss: Loss = distillation,
    optimizer: str = "adamw",
    accumulate: int = 1,
    clip_norm: float | None = 1.0,
    seed: int = 0,
    place: Callable[[dict], dict] = place_batch,
    console: Console | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Recovered:
    """Train the student for some steps to predict what the teacher does. Both given live on; so do their arrays.

    batches:       one a step, from the first on, such as `lmx.data.Batches(...).iterate()`.
    learning_rate: its peak, reached in the first twentieth of the steps; then a half cosine down to a tenth. There is
                   no weight decay: the student is to become the teacher, not smaller.
    train:         path pattern, in the student, of what is trained. Stacks that it cuts stay cut (`lmx.restack`).
    loss:          of a `Distillation(student, teacher)`; `functools.partial(distillation, temperature=2.0)`, say.
    accumulate, clip_norm: as `make_train_step` takes them. place: puts a batch on the device or mesh.
    console:       where progress is shown, if anywhere.
    asked_to_stop: called once a step; when it says so, the model is returned as it is then, with fewer `steps`.
    The same arguments give the same model, bit for bit, on the same machine.
    Raises ConfigError for steps or a rate out of range, or a pattern that selects nothing that can be trained;
    DataError if the batches end before the steps do; NonFiniteError after ten non-finite steps in a row.
    """
    if steps < 0 or not learning_rate > 0:
        raise ConfigError(f"recovery takes 0 steps or more at a learning rate above 0, not {steps} at {learning_rate}")
    trained, rest = tree.partition(student, train)
    made = optimizers.optimizer(
        optimizer, optimizers.cosine(learning_rate, max(steps, 1), warmup=steps // 20), weight_decay=0.0
    )
    state = start(_Parts(trained, rest, teacher), made, train="^trained", key=jax.random.key(seed))

    def of_parts(parts: _Parts, batch: Any, key: jax.Array):
        return loss(Distillation(tree.combine(parts.trained, parts.rest), parts.teacher), batch, key)

    step = make_train_step(of_parts, made, accumulate=accumulate, clip_norm=clip_norm)
    seen: collections.Counter[int] = collections.Counter()  # tokens by the length of their row
    rows, length = _peeked(batches)
    with _shown(console, steps, sum(_flops(student, teacher, length))) as report:
        counted = _counted(map(place, rows), seen)
        outcome = run_loop(state, step, counted, steps=steps, report=report, asked_to_stop=asked_to_stop)
    spent = [(n, _flops(student, teacher, t)) for t, n in seen.items()]
    parts = outcome.state.model
    return Recovered(
        model=tree.combine(parts.trained, parts.rest),
        steps=outcome.step,
        tokens=seen.total(),
        student_flops=sum(n * of_student for n, (of_student, _) in spent),
        teacher_flops=sum(n * of_teacher for n, (_, of_teacher) in spent),
        skipped=outcome.skipped,
        tokens_per_second=outcome.tokens_per_second,
    )


@contextlib.contextmanager
def _shown(console: Console | None, steps: int, flops: int) -> Iterator[ProgressReport | None]:
    """The report of the steps on a console, as long as they last."""
    if console is None:
        yield None
        return
    report = ProgressReport(console, steps, flops)
    with report.shown():
        yield report


def _flops(student: Any, teacher: Any, length: int) -> tuple[int, int]:
    """(of the student, of the teacher) a token of rows of that length."""
    return cost.cost(student, length).train_flops, cost.cost(teacher, length).forward_flops


def _peeked(batches: Iterable[dict]) -> tuple[Iterator[dict], int]:
    """The batches, and the length of a row of the first; 1 where there is none."""
    rows = iter(batches)
    first = list(itertools.islice(rows, 1))
    return itertools.chain(first, rows), first[0]["tokens"].shape[1] if first else 1


def _counted(batches: Iterator[dict], seen: collections.Counter[int]) -> Iterator[dict]:
    for batch in batches:
        b, t = batch["tokens"].shape
        seen[t] += b * t
        yield batch
