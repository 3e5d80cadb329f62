"""Pairs of texts, a source and what is to be made of it: from two files of lines, or from one of JSON objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lmx.core.errors import DataError
from lmx.data import special_tokens
from lmx.data.examples import Example, Examples, gather
from lmx.data.files import missing, read_objects, read_text
from lmx.data.tokenizers import Tokenizer


class Pair(NamedTuple):
    """A text and what it is to become: its translation, its summary, the answer to it."""

    source: str
    target: str


def read_pairs(source: str | Path, target: str | Path) -> list[Pair]:
    """Line i of one file with line i of the other, each perhaps .gz; pairs with a blank side are left out.

    Raises FolderError for a file that is missing, DataError for text that is not UTF-8, for files of unequal numbers of
    lines and for nothing but blanks.
    """
    sides = [_lines(path) for path in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise DataError(
            f"{str(source)!r} has {len(sides[0])} lines and {str(target)!r} {len(sides[1])}; line i of one must belong "
            "to line i of the other."
        )
    return _some((Pair(*sentences) for sentences in zip(*sides, strict=True)), f"{str(source)!r} and {str(target)!r}")


def read_json_pairs(path: str | Path, source: str = "source", target: str = "target") -> list[Pair]:
    """The values under two keys of each line of a .jsonl or .jsonl.gz file; pairs with a blank are left out.

    Raises FolderError for a file that is missing, and DataError, with the line, for one without these keys.
    """
    found = []
    for where, row in read_objects(_existing(path)):
        for key in (source, target):
            if not isinstance(row.get(key), str):
                keys = ", ".join(map(repr, row)) or "none"
                raise DataError(f"{where}: there is no text under the key {key!r} (keys found: {keys}). Name the keys.")
        found.append(Pair(row[source], row[target]))
    return _some(found, repr(str(path)))


def encode_pairs(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    *,
    start_id: int | None = None,
    source_start_id: int | None = None,
) -> Examples:
    """Pairs as examples: the encoder is given source and </s>, the decoder begins with `start_id` and ends with </s>.

    start_id:        the decoder's first token: the padding token if not given (T5, Marian; BART has </s>).
    source_start_id: put before the source (BART: <s>); nothing if not given.
    Raises DataError for no pairs, and for a tokenizer without a padding token if no start is given.
    """
    if not pairs:
        raise DataError("there are no pairs to encode; give at least one.")
    start, end = special_tokens.pad_id(tokenizer, start_id), tokenizer.eos_id
    before = [] if source_start_id is None else [source_start_id]
    sources, targets = (tokenizer.encode_batch(list(side)) for side in zip(*pairs, strict=True))
    return gather(
        Example([start, *out, end], [False, *[True] * (len(out) + 1)], [*before, *into, end])
        for into, out in zip(sources, targets, strict=True)
    )


def _some(pairs: Iterator[Pair] | list[Pair], where: str) -> list[Pair]:
    kept = [pair for pair in pairs if pair.source.strip() and pair.target.strip()]
    if not kept:
        raise DataError(f"no pairs in {where}: every one has a blank side. Give pairs of texts.")
    return kept


def _lines(path: str | Path) -> list[str]:
    lines = read_text(_existing(path)).split("\n")  # as wc counts: str.splitlines would break inside lines
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise missing(path)
    return path
