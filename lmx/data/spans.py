"""Span corruption (Raffel et al. 2020, arXiv:1910.10683, sections 3.1.4 and 3.3.4): fill in the removed spans.

    original            Thank you for inviting me to your party last week
    encoder_tokens      Thank you <0> me to your party <1> week </s>
    targets             <0> for inviting <1> last </s>

The procedure is that of the paper's code: how many tokens and spans are removed follows from the length alone, and
where they lie is drawn uniformly among all ways to cut the kept and the removed tokens into so many spans. A row
begins with kept tokens and ends with removed ones, so no sentinel closes the targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lmx.core.errors import ConfigError
from lmx.data import special_tokens
from lmx.data.objectives import describe
from lmx.data.packing import Batch
from lmx.data.stepwise import generator
from lmx.data.tokenizers import Tokenizer


class Counts(NamedTuple):
    """What becomes of a stretch of tokens: how many are removed, in how many spans, and the two lengths with </s>."""

    removed: int
    spans: int
    inputs: int
    targets: int


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """Replaces spans of the text by sentinels; the decoder writes each sentinel and what it stands for.

    `density` of the tokens are removed, in spans of `mean_span` tokens on average. `pad_id` fills up rows and is what
    the decoder starts with. A row of length t is made of a longer stretch of text (568 tokens for t = 512), which
    fills the encoder's t tokens exactly; the decoder's length follows (114 of them). Documents share a row as they lie
    in the stream, with its ends of text between them, and see each other.

    Raises ConfigError for a density or span out of range, sentinels that repeat or that are too few.
    """

    sentinel_ids: tuple[int, ...]
    pad_id: int
    eos_id: int
    density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1 or not self.mean_span >= 1:
            raise ConfigError(
                f"density ({self.density}) must lie between 0 and 1, such as 0.15, and mean_span ({self.mean_span}) be "
                "at least 1, such as 3"
            )
        if not self.sentinel_ids or len(set(self.sentinel_ids)) < len(self.sentinel_ids):
            raise ConfigError("sentinel_ids must be distinct ids, at least one")
        if min(*self.sentinel_ids, self.pad_id, self.eos_id) < 0:
            raise ConfigError("sentinel_ids, pad_id and eos_id must be at least 0")

    def counts(self, length: int) -> Counts:
        """What becomes of `length` >= 2 tokens."""
        removed = min(max(round(length * self.density), 1), length - 1)
        spans = min(max(round(removed / self.mean_span), 1), length - removed)
        return Counts(removed, spans, length - removed + spans + 1, removed + spans + 1)

    def stretch(self, length: int) -> int:
        """The most tokens of the stream that fit, corrupted and with </s>, into an encoder row of `length`."""
        if length < 3:
            raise ConfigError(f"rows of span corruption need a length of at least 3 tokens, not {length}")
        size = 2
        while self.counts(size + 1).inputs <= length:
            size += 1
        if self.counts(size).spans > len(self.sentinel_ids):
            raise ConfigError(
                f"rows of {length} tokens have {self.counts(size).spans} removed spans, there are only "
                f"{len(self.sentinel_ids)} sentinels; give shorter rows, a longer mean_span, or more sentinels"
            )
        return size

    def apply(self, batch: Batch, length: int, *, seed: int, step: int, rows: Sequence[int]) -> Batch:
        """`encoder_tokens`, `encoder_segment_ids` (b, length); the rest (b, u), u the length of the targets."""
        targets_length = self.counts(self.stretch(length)).targets
        b = len(batch["tokens"])
        encoder = np.full((b, length), self.pad_id, np.int32)
        targets = np.full((b, targets_length), self.pad_id, np.int32)
        seen, weights = np.zeros((b, length), np.int32), np.zeros((b, targets_length), np.float32)
        for i, row in enumerate(rows):
            text = batch["tokens"][i, batch["weights"][i] != 0]
            if len(text) < 2:  # the stream's last row may hold next to nothing
                continue
            removed = draw_removed(generator(seed, step, row), len(text), self)
            source = [*collapse(text, removed, self.sentinel_ids), self.eos_id]
            answer = [*collapse(text, ~removed, self.sentinel_ids), self.eos_id]
            encoder[i, : len(source)], seen[i, : len(source)] = source, 1
            targets[i, : len(answer)], weights[i, : len(answer)] = answer, 1
        return {
            "encoder_tokens": encoder,
            "encoder_segment_ids": seen,
            "tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=self.pad_id),
            "targets": targets,
            "weights": weights,
            "segment_ids": weights.astype(np.int32),
            "positions": np.tile(np.arange(targets_length, dtype=np.int32), (b, 1)),
        }

    def state(self) -> dict[str, Any]:
        """What identifies the objective, fit for JSON."""
        return describe(self)


def draw_removed(draws: np.random.Generator, length: int, options: SpanCorruption) -> np.ndarray:
    """Which of `length` tokens are removed (length,): kept and removed spans in turn, the first kept."""
    removed, spans, _, _ = options.counts(length)
    kept_lengths = _segments(draws, length - removed, spans)
    removed_lengths = _segments(draws, removed, spans)
    lengths = np.stack([kept_lengths, removed_lengths], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _segments(draws: np.random.Generator, items: int, segments: int) -> np.ndarray:
    """Lengths (segments,) of a cut of `items` into non-empty segments, uniform among all such cuts."""
    cut = draws.permutation(np.arange(items - 1) < segments - 1)
    return np.diff(np.concatenate([[0], np.flatnonzero(cut) + 1, [items]]))


def collapse(tokens: np.ndarray, gone: np.ndarray, sentinel_ids: Sequence[int]) -> np.ndarray:
    """The tokens with each run of those that are `gone` replaced by the next sentinel."""
    begins = gone & ~np.concatenate([[False], gone[:-1]])
    sentinels = np.asarray(sentinel_ids, np.int32)[np.maximum(np.cumsum(begins) - 1, 0)]
    return np.where(begins, sentinels, tokens)[~gone | begins]


def span_corruption(
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    sentinel_ids: Sequence[int] | None = None,
    pad_id: int | None = None,
    **options: Any,
) -> SpanCorruption:
    """Span corruption for a tokenizer: its sentinels, padding and end of text; further options are SpanCorruption's.

    sentinel_ids: for a tokenizer without <extra_id_0>, <extra_id_1>, ...; or give the model's `vocab_size`, and they
                  are taken from its end, beyond the tokenizer's ids (Raffel et al. 2020 did so).
    pad_id:       for a tokenizer without padding token.
    Raises DataError for what the tokenizer lacks.
    """
    sentinels = sentinel_ids or special_tokens.sentinel_ids(tokenizer, vocab_size)
    pad = special_tokens.pad_id(tokenizer, pad_id)
    return SpanCorruption(tuple(sentinels), pad_id=pad, eos_id=tokenizer.eos_id, **options)
