"""Examples: sequences of tokens of which some are to be learnt, each perhaps given a text for an encoder.

    examples = encode_pairs(read_pairs("train.de", "train.en"), tokenizer)                    # pairs.py
    examples = encode_conversations(read_conversations("chat.jsonl"), ...)                     # conversations.py
    batch = ExampleBatches(examples, 32, (32, 64, 128)).at(step)                               # example_batches.py

They are kept as a few flat arrays, whatever their number, in memory or in a file (`save_examples`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmx.core.arrays import open_arrays, write_arrays
from lmx.core.errors import DataError


class Example(NamedTuple):
    """Token ids, which of them are to be learnt (given those before), and what an encoder is given (or nothing)."""

    tokens: Sequence[int]
    learnt: Sequence[bool]
    encoder_tokens: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples one after another in flat arrays; example i has tokens[starts[i]:starts[i + 1]]."""

    tokens: np.ndarray  # (all tokens,) int32
    learnt: np.ndarray  # (all tokens,) bool; the first of an example never is: nothing comes before it
    starts: np.ndarray  # (examples + 1,) int64
    encoder_tokens: np.ndarray | None = None  # (all tokens of encoders,) int32
    encoder_starts: np.ndarray | None = None  # (examples + 1,) int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Example:
        where = slice(self.starts[index], self.starts[index + 1])
        if self.encoder_tokens is None:
            return Example(self.tokens[where], self.learnt[where])
        given = slice(self.encoder_starts[index], self.encoder_starts[index + 1])
        return Example(self.tokens[where], self.learnt[where], self.encoder_tokens[given])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Positions (examples,) that each needs in a row: the longer of its targets and its encoder's tokens."""
        needed = np.diff(self.starts) - 1
        return needed if self.encoder_starts is None else np.maximum(needed, np.diff(self.encoder_starts))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything: equal for equal examples in equal order."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.learnt, self.starts, self.encoder_tokens, self.encoder_starts):
            digest.update(b"-" if array is None else str(len(array)).encode() + array.tobytes())
        return digest.hexdigest()[:32]


def gather(examples: Iterable[Example]) -> Examples:
    """Examples as flat arrays. Raises DataError, with its number, for one that teaches nothing or is unlike the rest.

    The first token of an example is given, never learnt, and so counts for nothing if it is marked.
    """
    tokens, learnt, given = [], [], []
    for number, example in enumerate(examples):
        marks = np.asarray(example.learnt, bool).copy()
        if len(marks) != len(example.tokens):
            raise DataError(f"example {number} has {len(example.tokens)} tokens and {len(marks)} marks; give one each.")
        marks[:1] = False
        if not marks.any():
            raise DataError(f"example {number} has no token to learn after its first; leave it out.")
        if number and (example.encoder_tokens is None) != (not given):
            raise DataError(f"example {number} and those before it differ: give all of them encoder_tokens, or none.")
        if example.encoder_tokens is not None:
            if not len(example.encoder_tokens):
                raise DataError(f"example {number} gives the encoder no tokens; leave it out.")
            given.append(np.asarray(example.encoder_tokens, np.int32))
        tokens.append(np.asarray(example.tokens, np.int32))
        learnt.append(marks)
    if not tokens:
        raise DataError("there are no examples; give at least one.")
    encoder = (np.concatenate(given), _starts(given)) if given else (None, None)
    return Examples(np.concatenate(tokens), np.concatenate(learnt), _starts(tokens), *encoder)


def save_examples(examples: Examples, path: Path) -> None:
    """Write examples to a safetensors file."""
    arrays = {name: array for name, array in dataclasses.asdict(examples).items() if array is not None}
    write_arrays(path, arrays, arrays.__getitem__)


def open_examples(path: Path) -> Examples:
    """The examples of a file, through a memory map. Raises FolderError if it is missing or damaged."""
    return Examples(**open_arrays(path))


def _starts(parts: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)
