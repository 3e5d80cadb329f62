"""What every stream of training batches can do once it has `at(step)`: divide, iterate, be identified and checked."""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lmx.core.errors import ConfigError, DataError
from lmx.data.packing import Batch


class Stepwise(abc.ABC):
    """Batches of `batch_size` rows, without end, the batch of a step a pure function of (seed, step)."""

    batch_size: int

    @abc.abstractmethod
    def at(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The batch of a step, or this process's rows of it: the process_index-th equal part.

        Raises DataError if the batch size does not divide by the number of processes.
        """

    @abc.abstractmethod
    def state(self, step: int) -> dict[str, Any]:
        """What identifies the data at a step, fit for JSON: saved with a checkpoint, checked on resuming."""

    def iterate(
        self, start_step: int = 0, *, prefetch: int = 2, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """The batches from `start_step` on, made by a thread that stays up to `prefetch` ahead.

        Closing the iterator (or dropping it) ends the thread.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="lmx-batches")
        step, coming = start_step, deque()
        try:
            while True:
                while len(coming) <= prefetch:
                    coming.append(pool.submit(self.at, step, process_index, process_count))
                    step += 1
                yield coming.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def check(self, state: dict[str, Any]) -> None:
        """Raise DataError, naming the fields, if a state was saved by a run on other batches than these."""
        own = self.state(state.get("step", 0))
        unlike = [
            f"{name} (was {state.get(name)!r}, is {own.get(name)!r})"
            for name in dict.fromkeys([*own, *state])
            if state.get(name) != own.get(name)
        ]
        if unlike:
            raise DataError(
                f"this run's data is not that of the run it resumes: {', '.join(unlike)}. "
                "Resume with the same text, tokenizer and options, or start a new run in another folder."
            )

    def share(self, process_index: int, process_count: int) -> range:
        """The numbers, within the batch, of the rows of a process."""
        if self.batch_size % process_count:
            raise DataError(
                f"a batch of {self.batch_size} rows does not divide among {process_count} processes; "
                f"give a batch size that is a multiple of {process_count}."
            )
        size = self.batch_size // process_count
        return range(process_index * size, (process_index + 1) * size)


def check_numbers(batch_size: int, length: int, seed: int) -> None:
    """Raise ConfigError for a batch size, length of rows or seed that is out of range."""
    if batch_size < 1 or length < 1 or not 0 <= seed < 2**32:
        raise ConfigError(
            f"batch_size {batch_size} and length {length} must be at least 1, seed {seed} in [0, 2**32)."
        )


def generator(seed: int, step: int, row: int) -> np.random.Generator:
    """Random numbers of one row of one step: the same in every process, whoever else draws.

    Philox (Salmon et al. 2011) counts rather than remembers: the row is the top word of its counter.
    """
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, row]))
