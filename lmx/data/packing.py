"""Packing: documents become one long stream of tokens, in a memory-mapped cache.

The stream is [eos, tokens of document 0, eos, tokens of document 1, ..., eos]. Every token but the first is a
target, predicted from the one before it: a document's leading eos predicts its first token, and the next
document's leading eos is its end of text. Batches are windows of it (windows.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmx.core.errors import DataError, FolderError
from lmx.data.documents import Document
from lmx.data.tokenizers import Tokenizer

FORMAT = 1
BLOCK_BYTES = 4_000_000  # text given to the tokenizer at once
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class TokenCache:
    """A packed stream. Of each document: where it starts in the stream, its length in bytes, its domain."""

    folder: Path
    fingerprint: str  # of the documents and the tokenizer; the folder's name
    tokens: np.ndarray  # (num_tokens,) uint16 or uint32, memory-mapped
    documents: np.ndarray  # (documents,) int64, increasing; the first is 0
    document_bytes: np.ndarray  # (documents,) int64, of UTF-8
    document_domains: np.ndarray  # (documents,) int64, indices into domains
    domains: tuple[str, ...]  # in order of first appearance
    eos_id: int
    vocab_size: int
    tokenizer_fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Length of the stream, one more than there are targets."""
        return len(self.tokens)

    @property
    def domain_bytes(self) -> dict[str, int]:
        """UTF-8 bytes of each domain's text: what its targets' total loss is divided by for bits per byte."""
        sums = np.bincount(self.document_domains, self.document_bytes, len(self.domains))
        return {domain: int(total) for domain, total in zip(self.domains, sums, strict=True)}


def build_cache(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> TokenCache:
    """Tokenise and pack documents into `folder`/<key>, or open what is there already.

    The key is a hash of the documents and the tokenizer. The cache is written beside its place and renamed,
    so it is there whole or not at all, also when several processes build it at once; one whose files have the
    wrong size is built anew. `progress(done, total)` is told bytes of text. Raises DataError for no documents
    and FolderError if the folder cannot be written.
    """
    if not documents:
        raise DataError("there are no documents to pack; give some text.")
    key = _key(documents, tokenizer)
    home = Path(folder).expanduser() / key
    try:
        cache = _open(home)
        if cache is None:
            _write(documents, tokenizer, home, progress)
            cache = _open(home)
    except OSError as error:
        raise FolderError(
            f"cannot write the token cache {str(home)!r}: {error.strerror or error}. "
            "Give a folder that can be written and has room."
        ) from error
    if cache is None:
        raise FolderError(f"the token cache {str(home)!r} changed while it was read; run again.")
    return cache


def open_cache(folder: str | Path, key: str) -> TokenCache:
    """The cache that `build_cache` put in `folder`/`key`. Raises FolderError if it is not there whole."""
    cache = _open(Path(folder).expanduser() / key)
    if cache is None:
        raise FolderError(f"there is no whole token cache in {str(Path(folder) / key)!r}; build it again.")
    return cache


def _key(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, tokenizer.fingerprint, tokenizer.eos_id]).encode())
    for document in documents:
        text = document.text.encode()
        digest.update(json.dumps([document.domain, len(text)]).encode())
        digest.update(text)
    return digest.hexdigest()[:32]


def _write(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    home: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(home)
    building = home.parent / f"{home.name}.building-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        _write_files(documents, tokenizer, building, home.name, progress)
        if _open(home) is None:
            shutil.rmtree(home, ignore_errors=True)
            os.rename(building, home)
    except OSError:
        if _open(home) is None:  # else another process was faster
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_files(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    folder: Path,
    key: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < 2**16 else np.uint32)
    sizes = np.array([document.num_bytes for document in documents], np.int64)
    lengths = []
    with open(folder / "tokens.bin", "wb") as file:
        for block in _blocks(sizes):
            encoded = tokenizer.encode_batch([document.text for document in documents[block]])
            file.write(
                np.concatenate([np.array([tokenizer.eos_id, *ids], dtype) for ids in encoded]).tobytes()
            )
            lengths += [1 + len(ids) for ids in encoded]
            if progress:
                progress(int(sizes[: block.stop].sum()), int(sizes.sum()))
        file.write(np.array([tokenizer.eos_id], dtype).tobytes())
    starts = np.cumsum([0, *lengths])
    domains = {
        name: index for index, name in enumerate(dict.fromkeys(document.domain for document in documents))
    }
    of_domain = np.array([domains[document.domain] for document in documents])
    np.save(folder / "documents.npy", np.stack([starts[:-1], sizes, of_domain]).astype(np.int64))
    meta = {
        "format": FORMAT,
        "fingerprint": key,
        "num_tokens": int(starts[-1]) + 1,
        "num_documents": len(documents),
        "dtype": dtype.name,
        "domains": list(domains),
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _blocks(sizes: np.ndarray) -> Iterator[slice]:
    """Runs of documents of about BLOCK_BYTES each."""
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // BLOCK_BYTES)) + 1
    for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(sizes)], strict=True):
        yield slice(start, stop)


def _open(home: Path) -> TokenCache | None:
    """The cache in that folder, or None if there is none that is whole."""
    try:
        meta = json.loads((home / "meta.json").read_text(encoding="utf-8"))
        dtype = np.dtype(meta["dtype"])
        if os.path.getsize(home / "tokens.bin") != meta["num_tokens"] * dtype.itemsize:
            return None
        starts, sizes, of_domain = np.load(home / "documents.npy")
        if len(starts) != meta["num_documents"]:
            return None
        tokens = np.memmap(home / "tokens.bin", dtype, "r")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, EOFError):
        return None
    return TokenCache(
        folder=home,
        fingerprint=meta["fingerprint"],
        tokens=tokens,
        documents=starts,
        document_bytes=sizes,
        document_domains=of_domain,
        domains=tuple(meta["domains"]),
        eos_id=meta["eos_id"],
        vocab_size=meta["vocab_size"],
        tokenizer_fingerprint=meta["tokenizer_fingerprint"],
    )


def _remove_abandoned(home: Path) -> None:
    """Delete what builds of this cache left behind that were killed on this machine."""
    for folder in home.parent.glob(f"{home.name}.building-{socket.gethostname()}-*"):
        try:
            os.kill(int(folder.name.rsplit("-", 1)[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (PermissionError, ValueError):  # somebody else's process, or not a build at all
            continue
