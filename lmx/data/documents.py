"""Documents, and what is done to a list of them before it is tokenised: deduplicate, split, summarise.

    splits = split(deduplicate(read("local")))          # {"train": [...], "valid": [...], "test": [...]}

All three are pure functions of the documents' text and order: no seed, no clock, no hash that Python
randomises.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from lmx.core.errors import DataError

SPLITS = ("train", "valid", "test")
PARTS = 200  # a domain that must be cut gives about this many parts: ten for valid, ten for test
SHINGLE_WORDS = 5
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Document:
    """A text, where it came from (a path, a module, a topic), and the named domain it belongs to."""

    text: str
    origin: str
    domain: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode())


def deduplicate(documents: Sequence[Document], threshold: float = 0.8) -> list[Document]:
    """Drop every document that mostly repeats those before it; what stays keeps its order.

    A document is dropped if at least `threshold` of its distinct shingles (runs of five words, separated by
    whitespace) occur in documents that were kept: containment (Broder, "On the resemblance and containment of
    documents", 1997), measured against all kept text at once and exactly rather than by MinHash, so pieces
    copied from several documents are found too. A text of fewer than five words is one shingle: only its
    exact repeat is dropped.
    """
    shingles = [_shingles(document.text) for document in documents]
    if not shingles:
        return []
    distinct, ids = np.unique(np.concatenate(shingles), return_inverse=True)
    seen = np.zeros(len(distinct), bool)
    kept = []
    ends = np.cumsum([len(s) for s in shingles])
    for document, own in zip(documents, np.split(ids, ends[:-1]), strict=True):
        if seen[own].mean() < threshold:
            seen[own] = True
            kept.append(document)
    return kept


def _shingles(text: str) -> np.ndarray:
    """Distinct 64-bit hashes of the runs of five words in `text`; at least one."""
    words = text.encode().split()
    if len(words) < SHINGLE_WORDS:
        digest = hashlib.blake2b(b" ".join(words), digest_size=8).digest()
        return np.frombuffer(digest, np.uint64)
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    mixed = np.zeros(len(words) - SHINGLE_WORDS + 1, np.uint64)
    for offset in range(SHINGLE_WORDS):  # a polynomial of the word hashes, modulo 2^64
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(mixed)]
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


def split(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Divide documents into about 90 % train, 5 % valid and 5 % test by the hash of their text.

    Where a text goes depends on the text alone, so a repeated one never stands on both sides and a growing
    corpus keeps its splits. A small domain (one book, a handful of files) would leave a split empty: a domain
    of which valid or test would get less than 1 % of the bytes is first cut, at line ends, into about 200
    parts, and the parts are hashed in place of the documents; parts of one document then do stand in several
    splits. Raises DataError if a split stays empty even so.
    """
    by_domain = defaultdict(list)
    for document in documents:
        by_domain[document.domain].append(document)
    splits = {name: [] for name in SPLITS}
    for members in by_domain.values():
        divided = _divide(members)
        if not _all_served(divided):
            divided = _divide(_parts(members))
        for name in SPLITS:
            splits[name] += divided[name]
    for name in SPLITS:
        if not splits[name]:
            total = sum(document.num_bytes for document in documents)
            raise DataError(
                f"{len(documents)} documents of {total} bytes in all are too little text: nothing is left "
                f"for the {name} split. Give more text (some 100 kB at least)."
            )
    return splits


def split_by(items: Sequence[T], text: Callable[[T], str]) -> dict[str, list[T]]:
    """Divide anything into about 90 % train, 5 % valid and 5 % test by the hash of its `text`, each in its order.

    Items of equal text stay together. Raises DataError if a split stays empty.
    """
    divided = _divide(items, text)
    for name, members in divided.items():
        if not members:
            raise DataError(f"{len(items)} examples are too few: none is left for the {name} split. Give some 100.")
    return divided


def _divide(items: Sequence[T], text: Callable[[T], str] = lambda document: document.text) -> dict[str, list[T]]:
    divided = {name: [] for name in SPLITS}
    for item in items:
        bucket = int.from_bytes(hashlib.sha256(text(item).encode()).digest()[:8], "big") % 20
        divided[{0: "valid", 1: "test"}.get(bucket, "train")].append(item)
    return divided


def _all_served(divided: dict[str, list[Document]]) -> bool:
    sizes = {name: sum(document.num_bytes for document in members) for name, members in divided.items()}
    return all(size > 0.01 * sum(sizes.values()) for size in sizes.values())


def _parts(documents: Sequence[Document]) -> Iterator[Document]:
    """Cut the documents of a domain into about 200 parts at line ends (else at blanks, else anywhere)."""
    size = max(1, sum(len(document.text) for document in documents) // PARTS)
    for document in documents:
        text, start = document.text, 0
        while start < len(text):
            least = start + size
            ends = (text.find(blank, least, least + size) + 1 for blank in "\n ")
            end = next((end for end in ends if end), least)
            yield Document(text[start:end], f"{document.origin}#{start}", document.domain)
            start = end


class SummaryRow(NamedTuple):
    """How much text a domain gives to a split."""

    domain: str
    split: str
    documents: int
    bytes: int


def summary(splits: dict[str, list[Document]]) -> list[SummaryRow]:
    """One row (domain, split, documents, bytes) per domain and split, domains as they first appear."""
    domains = dict.fromkeys(document.domain for members in splits.values() for document in members)
    rows = []
    for domain in domains:
        for name, members in splits.items():
            own = [document.num_bytes for document in members if document.domain == domain]
            rows.append(SummaryRow(domain, name, len(own), sum(own)))
    return rows
