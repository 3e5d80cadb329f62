"""Training batches: the global batch is a pure function of (seed, step).

So nothing about the data needs saving but the step: a run that resumes asks for the next one, and each of
several processes asks for its own rows of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lmx.core.errors import DataError
from lmx.data.objectives import Objective
from lmx.data.packing import Batch, TokenCache
from lmx.data.stepwise import Stepwise, check_numbers
from lmx.data.windows import num_rows, rows


class Batches(Stepwise):
    """Rows of one or several token caches in shuffled order, `batch_size` at a time, without end.

    Each epoch goes once through every row, in an order of its own (grain's index shuffle: it needs no
    memory). An `objective` (objectives.py) makes what is to be learnt from each row; without one it is the next token.

    Raises DataError if the caches hold less than one batch or were tokenised differently, and ConfigError for numbers
    out of range.
    """

    def __init__(
        self,
        caches: TokenCache | Sequence[TokenCache],
        batch_size: int,
        length: int,
        seed: int = 0,
        objective: Objective | None = None,
    ):
        self.caches = [caches] if isinstance(caches, TokenCache) else list(caches)
        self.batch_size, self.length, self.seed, self.objective = batch_size, length, seed, objective
        check_numbers(batch_size, length, seed)
        self.stretch = length if objective is None else objective.stretch(length)
        if len({cache.tokenizer_fingerprint for cache in self.caches}) != 1:
            raise DataError(
                "the token caches of one run must be made with one tokenizer; tokenise them again."
            )
        targets = sum(cache.num_tokens - 1 for cache in self.caches)
        if targets < batch_size * self.stretch:
            raise DataError(
                f"the training text has {targets} tokens, one batch needs {batch_size} x {self.stretch} = "
                f"{batch_size * self.stretch}. Give more text, or a smaller batch size or length."
            )
        self._ends = np.cumsum([num_rows(cache, self.stretch) for cache in self.caches])

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows; an epoch is `rows_per_epoch / batch_size` steps, not always a whole number."""
        return int(self._ends[-1])

    def at(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The batch of a step (b, t), or this process's rows of it: the process_index-th equal part.

        Raises DataError if the batch size does not divide by the number of processes.
        """
        numbers = self.share(process_index, process_count)
        first = step * self.batch_size
        batch = self._gather(np.array([self._order[first + number] for number in numbers], np.int64))
        if self.objective is None:
            return batch
        return self.objective.apply(batch, self.length, seed=self.seed, step=step, rows=numbers)

    def state(self, step: int) -> dict[str, Any]:
        """What identifies the data at a step, fit for JSON: saved with a checkpoint, checked on resuming."""
        order = ",".join(str(self._order[i]) for i in range(64))
        learnt = {} if self.objective is None else {"objective": self.objective.state()}
        return {
            "step": step,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "length": self.length,
            "fingerprint": "+".join(cache.fingerprint for cache in self.caches),
            "order": hashlib.sha256(order.encode()).hexdigest()[:16],  # another grain may shuffle otherwise
            **learnt,
        }

    @cached_property
    def _order(self) -> Any:
        import grain  # takes half a second, and imports jax

        return grain.MapDataset.range(self.rows_per_epoch).seed(self.seed).shuffle().repeat()

    def _gather(self, indices: np.ndarray) -> Batch:
        """Rows by their number over all caches, in that order."""
        if len(self.caches) == 1:
            return rows(self.caches[0], indices, self.stretch)
        which = np.searchsorted(self._ends, indices, side="right")
        begins = np.concatenate([[0], self._ends])
        parts = [
            rows(cache, indices[which == i] - begins[i], self.stretch) for i, cache in enumerate(self.caches)
        ]
        back = np.argsort(np.argsort(which, kind="stable"))
        return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}
