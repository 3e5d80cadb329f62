"""Batches of examples, padded in buckets of like length or packed several to a row; again a function of (seed, step).

A row of one bucket holds one example. A packed row holds as many as fit: they have segments 1, 2, ... in the decoder
and in the encoder, and see their own segment alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lmx.core.errors import ConfigError, DataError
from lmx.data.examples import Examples
from lmx.data.packing import Batch
from lmx.data.stepwise import Stepwise, check_numbers, generator

OPEN_ROWS = 64  # packing looks for room in so many rows before it closes the fullest
FILLED = ("tokens", "targets", "encoder_tokens")  # with the padding token; the rest with zeros


class Plan(NamedTuple):
    """An epoch: the bucket of each batch, and the numbers (batch_size,) of its rows, -1 where there are none left."""

    buckets: list[int]
    rows: list[np.ndarray]


class ExampleBatches(Stepwise):
    """Examples in shuffled order, `batch_size` rows at a time, without end; each once an epoch.

    lengths:  one length of row, or several: an example lies in the shortest that holds it. All rows of a batch have the
              same length, so a step is compiled once for each. What is left over in a bucket at the end of an epoch
              goes into longer rows, and the last batch of an epoch is filled up with rows that weigh nothing.
    pad_id:   what fills rows up; it is never learnt.
    packed:   put several examples in a row of the (one) length: fewer rows, for a model that keeps segments apart.
    too_long: what happens to an example longer than the longest row: "refuse" it, "drop" it, or "cut" its end off.

    Batches have "tokens", "targets", "weights", "segment_ids", "positions" (b, t) and, if the examples have them,
    "encoder_tokens", "encoder_segment_ids" (b, t). Raises ConfigError for lengths that are none
    and DataError for examples that are too long, or for fewer rows than one batch.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        lengths: int | Sequence[int],
        seed: int = 0,
        *,
        pad_id: int = 0,
        packed: bool = False,
        too_long: Literal["refuse", "drop", "cut"] = "refuse",
    ):
        self.lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
        check_numbers(batch_size, min(self.lengths, default=0), seed)
        if list(self.lengths) != sorted(set(self.lengths)):
            raise ConfigError(f"lengths must increase, such as 32, 64, 128, not {', '.join(map(str, self.lengths))}")
        if packed and len(self.lengths) > 1:
            raise ConfigError(f"packed rows have one length, not {len(self.lengths)} ({self.lengths})")
        if too_long not in ("refuse", "drop", "cut"):
            raise ConfigError(f"too_long must be refuse, drop or cut, not {too_long!r}")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.pad_id, self.packed, self.too_long = pad_id, packed, too_long
        kept = _kept(examples, self.lengths[-1], too_long)
        self.num_dropped = len(examples) - len(kept)
        if packed:
            self._rows = _pack(examples, generator(seed, 0, 1).permutation(kept), self.lengths[0])
            self._bucket = np.zeros(len(self._rows), np.int64)
        else:
            self._rows = [np.array([i]) for i in kept]
            self._bucket = np.searchsorted(self.lengths, np.minimum(examples.lengths[kept], self.lengths[-1]))
        if len(self._rows) < batch_size:
            raise DataError(
                f"{len(kept)} examples make {len(self._rows)} rows, one batch needs {batch_size}. Give more examples, "
                "or a smaller batch size."
            )
        self._plan = functools.lru_cache(2)(self._plan_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in which each example comes once."""
        return len(self._plan(0).rows)

    def at(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The batch of a step (b, t), or this process's rows of it: the process_index-th equal part.

        Raises DataError if the batch size does not divide by the number of processes.
        """
        mine = self.share(process_index, process_count)
        epoch, place = divmod(step, self.steps_per_epoch)
        plan = self._plan(epoch)
        rows = plan.rows[place][mine.start : mine.stop]
        return self._batch(rows, self.lengths[plan.buckets[place]])

    def state(self, step: int) -> dict[str, Any]:
        """What identifies the data at a step, fit for JSON: saved with a checkpoint, checked on resuming."""
        first = np.concatenate(self._plan(0).rows[:64])  # another numpy may shuffle otherwise
        return {
            "step": step,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "length": list(self.lengths),
            "fingerprint": self.examples.fingerprint,
            "order": hashlib.sha256(first.astype(np.int64).tobytes()).hexdigest()[:16],
            "examples": f"pad {self.pad_id}, {'packed' if self.packed else 'padded'}, {self.too_long}",
        }

    def each(self, rows: int) -> Iterator[Batch]:
        """Batches of `rows` rows of the longest length in which every example that is kept comes once, in order: for
        evaluation. The last is filled up with rows that weigh nothing."""
        for begin in range(0, len(self._rows), rows):
            numbers = np.arange(begin, begin + rows)
            yield self._batch(np.where(numbers < len(self._rows), numbers, -1), self.lengths[-1])

    def _plan_epoch(self, epoch: int) -> Plan:
        """The order of an epoch: shuffled within each bucket, and its batches among each other."""
        draws = generator(self.seed, epoch, 0)
        buckets, rows, left = [], [], np.zeros(0, np.int64)
        for bucket in range(len(self.lengths)):
            here = draws.permutation(np.concatenate([left, np.flatnonzero(self._bucket == bucket)]))
            whole = len(here) - len(here) % self.batch_size
            rows += list(here[:whole].reshape(-1, self.batch_size))
            buckets += [bucket] * (whole // self.batch_size)
            left = here[whole:]
        if len(left):
            rows.append(np.pad(left, (0, self.batch_size - len(left)), constant_values=-1))
            buckets.append(int(self._bucket[left].max()))
        order = draws.permutation(len(rows))
        return Plan([buckets[i] for i in order], [rows[i] for i in order])

    def _batch(self, rows: np.ndarray, length: int) -> Batch:
        shape = (len(rows), length)
        names = ["tokens", "targets", "segment_ids", "positions"]
        if self.examples.encoder_tokens is not None:
            names += ["encoder_tokens", "encoder_segment_ids"]
        batch = {name: np.full(shape, self.pad_id if name in FILLED else 0, np.int32) for name in names}
        batch["weights"] = np.zeros(shape, np.float32)
        for i, row in enumerate(rows):
            self._fill({name: array[i] for name, array in batch.items()}, [] if row < 0 else self._rows[row])
        return batch

    def _fill(self, row: dict[str, np.ndarray], members: Sequence[int]) -> None:
        """Write examples one after another into the arrays (t,) of a row."""
        length, begin, given = len(row["tokens"]), 0, 0
        for segment, index in enumerate(members, start=1):
            example = self.examples[int(index)]
            end = min(begin + len(example.tokens) - 1, length)
            here, count = slice(begin, end), end - begin
            row["tokens"][here] = example.tokens[:count]
            row["targets"][here] = example.tokens[1 : count + 1]
            row["weights"][here] = example.learnt[1 : count + 1]
            row["segment_ids"][here], row["positions"][here] = segment, np.arange(count)
            begin = end
            if example.encoder_tokens is not None:
                end = min(given + len(example.encoder_tokens), length)
                here, count = slice(given, end), end - given
                row["encoder_tokens"][here] = example.encoder_tokens[:count]
                row["encoder_segment_ids"][here] = segment
                given = end


def _kept(examples: Examples, longest: int, too_long: str) -> np.ndarray:
    """The numbers of the examples that are used. Raises DataError if one is refused or all are dropped."""
    long = np.flatnonzero(examples.lengths > longest)
    if len(long) and too_long == "refuse":
        most = int(examples.lengths.max())
        raise DataError(
            f"{len(long)} of {len(examples)} examples exceed the longest row of {longest} (the first is number "
            f'{long[0]}, the longest has {most}). Give longer rows, or too_long="drop" or "cut".'
        )
    if too_long == "drop":
        return np.flatnonzero(examples.lengths <= longest)
    if len(long):
        return np.array([i for i in range(len(examples)) if examples[i].learnt[1 : longest + 1].any()])
    return np.arange(len(examples))


def _pack(examples: Examples, order: np.ndarray, length: int) -> list[np.ndarray]:
    """Rows of examples whose tokens fit in `length`, in the encoder too: best fit, among a few open rows."""
    needs = np.minimum(np.diff(examples.starts) - 1, length)[:, None]
    if examples.encoder_starts is not None:
        needs = np.concatenate([needs, np.minimum(np.diff(examples.encoder_starts), length)[:, None]], axis=1)
    done, members, room = [], [], np.zeros((0, needs.shape[1]), np.int64)
    for index in order:
        fits = np.flatnonzero((room >= needs[index]).all(1))
        if len(fits):
            best = fits[np.argmin(room[fits].min(1))]
            members[best].append(index)
            room[best] -= needs[index]
            continue
        if len(members) == OPEN_ROWS:
            fullest = int(np.argmin(room.min(1)))
            done.append(members.pop(fullest))
            room = np.delete(room, fullest, axis=0)
        members.append([index])
        room = np.concatenate([room, length - needs[index][None]])
    return [np.array(row) for row in [*done, *members]]
