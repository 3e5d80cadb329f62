"""The ids of a tokenizer's special tokens, found by the names that tokenizers give them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import tokenizers

from lmx.core.errors import DataError
from lmx.data.tokenizers import Tokenizer

MASK = ("<mask>", "[MASK]", "<|mask|>")
PAD = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
SENTINEL = ("<extra_id_{}>", "▁<extra_id_{}>")


def mask_id(tokenizer: Tokenizer, given: int | None = None) -> int:
    """The id of the token that hides another. Raises DataError if there is none, or the id given is none."""
    return _find(tokenizer, "mask", MASK, given)


def pad_id(tokenizer: Tokenizer, given: int | None = None) -> int:
    """The id that fills up rows; <|endoftext|> serves where nothing else does. Raises DataError if there is none."""
    return _find(tokenizer, "padding", PAD, given)


def sentinel_ids(tokenizer: Tokenizer, vocab_size: int | None = None) -> tuple[int, ...]:
    """The ids that stand for removed spans, first to last: <extra_id_0>, <extra_id_1>, ...

    A tokenizer without them gets the ids of a model's vocabulary that it does not use itself, from the end down (at
    most 100). Raises DataError if there are neither.
    """
    for name in SENTINEL:
        ids = map(tokenizer.backend.token_to_id, map(name.format, itertools.count()))
        found = tuple(itertools.takewhile(lambda i: i is not None, ids))
        if found:
            return found
    free = 0 if vocab_size is None else vocab_size - tokenizer.vocab_size
    if free < 1:
        raise DataError(
            f"the tokenizer has no sentinels (<extra_id_0>, ...) {_special(tokenizer)}. Name their ids with "
            f"sentinel_ids=, or give vocab_size= of a model with more than the tokenizer's {tokenizer.vocab_size} ids."
        )
    return tuple(range(vocab_size - 1, vocab_size - 1 - min(free, 100), -1))


def first_id(tokenizer: Tokenizer) -> int | None:
    """What the tokenizer's own template puts before a text, such as [CLS] or <s>; None if it puts nothing there."""
    ids = tokenizer.backend.encode("").ids
    return ids[0] if ids and ids[0] != tokenizer.eos_id else None


def special_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of all tokens that the tokenizer calls special, in increasing order."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return tuple(sorted(i for i, token in added.items() if token.special))


def add(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with these special tokens too, each at the next free id; those it has already stay as they are."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(list(names))
    return Tokenizer(backend, tokenizer.eos_token)


def _find(tokenizer: Tokenizer, what: str, names: Sequence[str], given: int | None) -> int:
    if given is not None:
        if given < 0:
            raise DataError(f"the id of the {what} token must be at least 0, not {given}.")
        return given
    for name in names:
        found = tokenizer.backend.token_to_id(name)
        if found is not None:
            return found
    raise DataError(
        f"the tokenizer has no {what} token: none of {', '.join(names)} is in its vocabulary {_special(tokenizer)}. "
        f"Name its id with {'pad' if what == 'padding' else what}_id=."
    )


def _special(tokenizer: Tokenizer) -> str:
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return f"(special tokens: {', '.join(token.content for token in added if token.special) or 'none'})"
