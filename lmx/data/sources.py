"""Where text comes from: `read(source)` turns a short description into documents.

    read("local")                               the built-in corpus (lmx/data/local.py)
    read("books.txt")                           a file: one document, domain "books"
    read("news=data/*.jsonl.gz,wiki.txt")       several, separated by commas; `name=` names the domain
    read("tfds:ag_news_subset:train")           a dataset of tensorflow_datasets (lmx/data/tfds_source.py)
    read("hf:stanfordnlp/imdb:test@text")       a dataset of Hugging Face (lmx/data/hf_source.py)

A new source is one function from the text after its colon to documents, and one line in SOURCES.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from lmx.core.errors import DataError, nearest
from lmx.data.documents import Document
from lmx.data.files import read_files


def _local(argument: str) -> list[Document]:
    from lmx.data import local

    if argument:
        raise DataError(f"the source 'local' takes no argument, got {argument!r}; write just 'local'.")
    return local.collect().documents


def _tfds(argument: str) -> list[Document]:
    from lmx.data.tfds_source import read_tfds

    return read_tfds(argument)


def _hf(argument: str) -> list[Document]:
    from lmx.data.hf_source import read_hf

    return read_hf(argument)


SOURCES: dict[str, Callable[[str], list[Document]]] = {
    "local": _local,  # text that is on every Python machine
    "tfds": _tfds,  # tensorflow_datasets, without TensorFlow
    "hf": _hf,  # Hugging Face datasets
}

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_SCHEME = re.compile(r"([A-Za-z][\w+.-]+):(.*)", re.DOTALL)  # two letters at least: "C:" is a drive


def read(source: str) -> list[Document]:
    """All documents of a source: `local`, `tfds:NAME`, `hf:NAME`, or files, folders and globs of .txt and .jsonl (.gz).

    Several are separated by commas; `name=` before one names the domain of its documents. A .txt file is one
    document; each line of a .jsonl file is one, its text under the key `text`; blank documents are left out.
    The domain of a file that is named itself is its stem; below a folder or the fixed beginning of a glob, it
    is the first sub-folder, or that folder's own name for files directly in it.

    Raises FolderError for a path that is missing or holds no text, and DataError for text that cannot be read
    (which file, which line or byte) or a source that nobody knows.
    """
    whole = Path(source).exists()  # a path may hold commas
    entries = [source] if whole else [entry.strip() for entry in source.split(",") if entry.strip()]
    documents = [document for entry in entries for document in _read_entry(entry)]
    if not documents:
        raise DataError(
            f"the source {source!r} holds no text; give a file or a folder with .txt or .jsonl files."
        )
    return documents


def _read_entry(entry: str) -> list[Document]:
    named = None if Path(entry).exists() else _NAMED.fullmatch(entry)
    if named:
        domain, rest = named.groups()
        return [dataclasses.replace(document, domain=domain) for document in _read_entry(rest)]
    if entry in SOURCES:
        return SOURCES[entry]("")
    scheme = None if Path(entry).exists() else _SCHEME.fullmatch(entry)
    if scheme is None:
        return read_files(entry, other_names=SOURCES)
    name, argument = scheme.groups()
    if name not in SOURCES:
        close = nearest(name, SOURCES) or "."
        raise DataError(
            f"unknown source {name + ':'!r} in {entry!r}{close} Known sources: "
            f"{', '.join(sorted(SOURCES))}, and paths of .txt, .jsonl and .gz files."
        )
    return SOURCES[name](argument)
