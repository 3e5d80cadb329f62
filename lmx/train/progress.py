"""A progress bar for a run: step, loss, tokens/s, FLOP/s and the time left; plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN = dict(highlight=False, markup=False, soft_wrap=True)  # a line of text, whatever the terminal


class ProgressReport:
    """Shows what the loop tells; a `lmx.train.loop.Report`.

    On a terminal there is one live line, and evaluations are printed above it. Elsewhere a line is printed for
    each evaluation and each note, and nothing else.
    """

    def __init__(self, console: Console, steps: int, flops_per_token: float, first: int = 0) -> None:
        self.console, self.steps, self.flops = console, steps, flops_per_token
        self.bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("train", total=steps, completed=first, status="compiling")
        self.loss = float("nan")

    @contextlib.contextmanager
    def shown(self) -> Iterator[ProgressReport]:
        with self.bar:
            yield self

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.loss = values["loss"]
        rate = values["tokens_per_second"]
        speed = f"  {si(rate)}tok/s  {si(rate * self.flops)}FLOP/s" if rate else ""
        status = f"loss {self.loss:.3f}{speed}"
        self.bar.update(self.task, completed=step, status=status)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        numbers = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
        self.console.print(f"step {step}/{self.steps}  loss {self.loss:.3f}  {numbers}", highlight=False)

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False)


def si(number: float) -> str:
    """12345.6 as "12.3 k": three digits and the SI prefix."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
