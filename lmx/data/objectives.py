"""Training objectives as data: what is to be learnt from a stretch of the token stream.

    Batches(cache, 32, 512)                                             the next token (windows.py)
    Batches(cache, 32, 512, objective=masked(tokenizer))                masked tokens (BERT), for encoders
    Batches(cache, 32, 512, objective=span_corruption(tokenizer))   removed spans (T5; spans.py), for encoder-decoders

Pairs of texts and conversations are not a stream: ExampleBatches (examples.py) has those. All objectives end in the
same keys, and in the same cross-entropy: `targets` and `weights`, predicted at `tokens` (given `encoder_tokens`).
An objective draws its random numbers from (seed, step, row) alone, so a row that returns in another epoch is masked
anew (RoBERTa's dynamic masking: Liu et al. 2019, section 4.1).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lmx.core.errors import ConfigError
from lmx.data import special_tokens
from lmx.data.packing import Batch
from lmx.data.stepwise import generator
from lmx.data.tokenizers import Tokenizer


class Objective(Protocol):
    """Turns windows of the stream into batches."""

    def stretch(self, length: int) -> int:
        """How many tokens of the stream make a row of `length`."""

    def apply(self, batch: Batch, length: int, *, seed: int, step: int, rows: Sequence[int]) -> Batch:
        """The batch made from windows (b, stretch), whose numbers within the step's batch are `rows`."""

    def state(self) -> dict[str, Any]:
        """What identifies the objective, fit for JSON."""


def describe(objective: Any) -> dict[str, Any]:
    """The state of an objective that is a dataclass: its name, its fields, and how this numpy draws."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value for name, value in vars(objective).items()
    }
    draws = generator(0, 0, 0)
    drawn = [draws.random(8).tolist(), draws.permutation(8).tolist()]
    return {"name": type(objective).__name__, **fields, "draws": hashlib.sha256(repr(drawn).encode()).hexdigest()[:16]}


@dataclasses.dataclass(frozen=True)
class Masked:
    """Masked language modelling (Devlin et al. 2019, arXiv:1810.04805, section 3.1).

    Every ordinary token is chosen with `probability`; of the chosen, a share `masked` become `mask_id`, a share
    `random` another ordinary token drawn uniformly, and the rest stay. The targets are the tokens as they were, and
    only the chosen weigh. `special_ids` are never chosen and never drawn. `first_id`, if given, is put before every row
    ([CLS]), as part of its first document.

    Raises ConfigError for shares that are none and for ids outside the vocabulary.
    """

    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...] = ()
    probability: float = 0.15
    masked: float = 0.8
    random: float = 0.1
    first_id: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ConfigError(f"probability must lie above 0 and be at most 1, such as 0.15, not {self.probability}")
        if min(self.masked, self.random) < 0 or self.masked + self.random > 1:
            raise ConfigError(
                f"masked ({self.masked}) and random ({self.random}) are shares of the chosen tokens: each at least 0, "
                "together at most 1, such as 0.8 and 0.1"
            )
        ids = (self.mask_id, *self.special_ids, *([] if self.first_id is None else [self.first_id]))
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ConfigError(f"the vocabulary has the ids 0 to {self.vocab_size - 1}, {outside} are not among them")
        if not len(self.ordinary):
            raise ConfigError(f"all {self.vocab_size} tokens are special, so there is nothing to mask")

    @property
    def ordinary(self) -> np.ndarray:
        """The ids that may be masked and drawn, in increasing order."""
        return np.setdiff1d(np.arange(self.vocab_size, dtype=np.int32), (self.mask_id, *self.special_ids))

    def stretch(self, length: int) -> int:
        """Tokens of the stream a row: all, but for the one that is put before them."""
        if length < 2:
            raise ConfigError(f"rows need a length of at least 2 tokens, not {length}")
        return length - (self.first_id is not None)

    def apply(self, batch: Batch, length: int, *, seed: int, step: int, rows: Sequence[int]) -> Batch:
        """The batch (b, length): `tokens` masked, `targets` as they were, `weights` 1 where chosen."""
        tokens, segments, positions = batch["tokens"], batch["segment_ids"], batch["positions"]
        if self.first_id is not None:
            first = segments == 1
            positions = np.where(first, positions + 1, positions)
            tokens = np.pad(tokens, ((0, 0), (1, 0)), constant_values=self.first_id)
            segments = np.concatenate([segments[:, :1], segments], axis=1)
            positions = np.pad(positions, ((0, 0), (1, 0)))
        draws = np.stack([generator(seed, step, row).random((3, length)) for row in rows])  # (b, 3, t)
        maskable = (segments != 0) & ~np.isin(tokens, (self.mask_id, *self.special_ids))
        if self.first_id is not None:
            maskable[:, 0] = False
        masked, chosen = mask_tokens(
            tokens, maskable, draws, self.mask_id, self.ordinary, self.probability, self.masked, self.random
        )
        return {
            "tokens": masked,
            "targets": tokens,
            "weights": chosen.astype(np.float32),
            "segment_ids": segments,
            "positions": positions.astype(np.int32),
        }

    def state(self) -> dict[str, Any]:
        """What identifies the objective, fit for JSON."""
        return describe(self)


def mask_tokens(
    tokens: np.ndarray,
    maskable: np.ndarray,
    draws: np.ndarray,
    mask_id: int,
    ordinary: np.ndarray,
    probability: float,
    masked: float,
    random: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens with some of them masked, which were chosen), both (b, t), from uniform `draws` (b, 3, t).

    The first draw chooses where `maskable`, the second says what becomes of the chosen, the third which of the
    `ordinary` ids a random token is.
    """
    chosen = maskable & (draws[:, 0] < probability)
    other = ordinary[(draws[:, 2] * len(ordinary)).astype(np.int64)]
    changed = np.where(draws[:, 1] < masked, np.int32(mask_id), np.where(draws[:, 1] < masked + random, other, tokens))
    return np.where(chosen, changed, tokens).astype(np.int32), chosen


def masked(
    tokenizer: Tokenizer, *, vocab_size: int | None = None, mask_id: int | None = None, **options: Any
) -> Masked:
    """The masked objective for a tokenizer: its mask token, its special tokens; further options are Masked's.

    mask_id:    for a tokenizer without a mask token.
    vocab_size: ids of the model, where it has more than the tokenizer; random tokens are the tokenizer's either way.
    Raises DataError if the tokenizer has no mask token and none is given.
    """
    found = special_tokens.mask_id(tokenizer, mask_id)
    known = tokenizer.vocab_size
    size = max(known, found + 1) if vocab_size is None else vocab_size
    special = {*special_tokens.special_ids(tokenizer), tokenizer.eos_id, *range(known, size)}
    return Masked(size, found, tuple(sorted(special | set(options.pop("special_ids", ())))), **options)
