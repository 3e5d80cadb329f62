"""A run's text: read, split and tokenised once, kept in the run's folder, and opened again when the run goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmx import data, evaluate
from lmx.core.errors import DataError, FolderError, nearest
from lmx.data import Document, TokenCache, Tokenizer
from lmx.recipes import models
from lmx.train.progress import si

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised text in three splits, and what lzma makes of the test split."""

    tokenizer: Tokenizer
    caches: dict[str, TokenCache]
    lzma: dict[str, float]  # bits per byte of the test split, "all" and by domain


def choose_tokenizer(name: str, vocab_size: int, texts: Callable[[], list[str]]) -> Tokenizer:
    """The tokenizer "bpe" (trained on the texts), "byte", or that of a folder. Raises DataError or FolderError."""
    if name == "bpe":
        return data.train_bpe(texts(), vocab_size)
    if name == "byte":
        return data.byte_tokenizer()
    if not Path(name).expanduser().exists() and (hint := nearest(name, ("bpe", "byte"))):
        raise DataError(f"no tokenizer {name!r}, there are bpe, byte, and folders with a tokenizer.json{hint}")
    return models.load_tokenizer(name)


def prepare(source: str, tokenizer: str, vocab_size: int, folder: Path, console: Console) -> Corpus:
    """Read a source, drop near-duplicates, split it, train or load the tokenizer, and pack everything in `folder`."""
    with console.status(f"reading {escape(source)}"):
        documents = data.deduplicate(data.read(source))
        splits = data.split(documents)
    show_sizes(splits, console)
    with console.status("training the tokenizer" if tokenizer == "bpe" else "loading the tokenizer"):
        made = choose_tokenizer(tokenizer, vocab_size, lambda: [d.text for d in splits["train"]])
    with console.status("tokenising"):
        caches = {name: data.build_cache(splits[name], made, folder / "tokens") for name in SPLITS}
    tokens = caches["train"].num_tokens
    size = sum(caches["train"].domain_bytes.values()) / tokens
    console.print(
        f"{made.vocab_size} kinds of token; {si(tokens)}tokens to train on, of {size:.2f} bytes on average",
        highlight=False,
        soft_wrap=True,
    )
    with console.status("compressing the test split with lzma"):
        lzma = evaluate.lzma_bits_per_byte(by_domain(splits["test"]))
    made.save(folder / "tokenizer")
    about = {"caches": {name: cache.folder.name for name, cache in caches.items()}, "lzma": lzma}
    (folder / "corpus.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    return Corpus(made, caches, lzma)


def reopen(folder: Path) -> Corpus:
    """What `prepare` put in `folder`. Raises FolderError if it is not whole."""
    try:
        about = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(
            f"{folder} holds no prepared text to go on with ({error}); start over with --overwrite"
        ) from error
    caches = {name: data.open_cache(folder / "tokens", key) for name, key in about["caches"].items()}
    return Corpus(data.load_tokenizer(folder / "tokenizer"), caches, about["lzma"])


def by_domain(documents: list[Document]) -> dict[str, list[str]]:
    """The texts of each domain."""
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document.domain, []).append(document.text)
    return texts


def show_sizes(splits: dict[str, list[Document]], console: Console) -> None:
    """A table of documents and bytes by domain and split."""
    table = Table("domain", *(f"{name} (documents)" for name in splits), box=None, header_style="")
    cells: dict[str, list[str]] = {}
    for row in data.summary(splits):
        cells.setdefault(row.domain, []).append(f"{si(row.bytes)}B ({row.documents})")
    for domain, sizes in cells.items():
        table.add_row(escape(domain), *sizes)
    console.print(table)
