"""The built-in corpus: text that is on every machine with Python, in three domains; needs no network.

    reference   the language reference as `help()` shows it (pydoc_data.topics)
    code        the standard library's source, without tests and without pydoc_data
    docs        the docstrings of installed packages (not of the standard library), one document a module

The same machine gives the same corpus: files are taken in the order of the hash of their path, up to a bound
per domain, so a large site-packages costs no more than a small one and every package has its share.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lmx.core.errors import DataError
from lmx.data.documents import Document

CODE_BYTES = 8_000_000
DOCS_BYTES = 6_000_000
FILE_BYTES = 300_000  # larger files are tables and generated code
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "testing", "site-packages", "dist-packages", "pydoc_data"}
)
DOMAINS = {
    "reference": "the module pydoc_data.topics",
    "code": "Python files in the standard library's folder",
    "docs": "packages with docstrings in a site-packages folder",
}


class Corpus(NamedTuple):
    """All documents, and how many files of each domain could not be read or parsed."""

    documents: list[Document]
    skipped: dict[str, int]


def collect() -> Corpus:
    """Read this machine's three domains: about 15 MB in some 5 s. Raises DataError naming an empty one."""
    skipped = dict.fromkeys(DOMAINS, 0)
    documents = [*_reference()]
    documents += _bounded(_code(Path(sysconfig.get_path("stdlib")), skipped), CODE_BYTES)
    documents += _bounded(_docs(_package_folders(), skipped), DOCS_BYTES)
    found = {document.domain for document in documents}
    for domain, what in DOMAINS.items():
        if domain not in found:
            raise DataError(
                f"the built-in corpus has no text for its domain {domain!r}: this Python lacks {what}. "
                "Use a complete Python, or give text of your own: a path of .txt or .jsonl files."
            )
    return Corpus(documents, skipped)


def _reference() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name, text in sorted(topics.items()):
        yield Document(text, f"pydoc_data.topics[{name!r}]", "reference")


def _code(folder: Path, skipped: dict[str, int]) -> Iterator[Document]:
    for path in _python_files(folder):
        source = _read_source(folder / path)
        if source is None:
            skipped["code"] += 1
        elif source.strip():
            yield Document(source, path, "code")


def _docs(folders: Iterable[Path], skipped: dict[str, int]) -> Iterator[Document]:
    for folder in folders:
        for path in _python_files(folder):
            source = _read_source(folder / path)
            tree = None if source is None else _parse(source)
            if tree is None:
                skipped["docs"] += 1
                continue
            text = "\n\n".join(_docstrings(tree, _module_name(path)))
            if not _is_encodable(text):
                skipped["docs"] += 1
            elif text:
                yield Document(text, path, "docs")


def _package_folders() -> list[Path]:
    """The site-packages folders this Python imports from, the environment's own first."""
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    more = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return [
        Path(folder)
        for folder in dict.fromkeys(os.path.realpath(f) for f in own + more)
        if os.path.isdir(folder)
    ]


def _python_files(folder: Path) -> list[str]:
    """Paths below `folder` (slashes between parts), tests left out, in the order of their hash."""
    found = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found += [Path(parent, name).relative_to(folder).as_posix() for name in names if _is_wanted(name)]
    return sorted(found, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())


def _is_wanted(name: str) -> bool:
    return name.endswith(".py") and not name.startswith("test_") and not name.endswith("_test.py")


def _read_source(path: Path) -> str | None:
    try:
        if path.stat().st_size > FILE_BYTES:
            return ""
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterator[str]:
    """`qualified.name` and its docstring, for a module and each class and function in it, in order."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring and docstring.strip():
        yield f"{name}\n\n{inspect.cleandoc(docstring)}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _is_encodable(text: str) -> bool:
    """Whether the text is free of lone surrogates, which a docstring's escapes can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bounded(documents: Iterator[Document], limit: int) -> Iterator[Document]:
    """Documents until `limit` bytes are reached."""
    total = 0
    for document in documents:
        total += document.num_bytes
        if total > limit:
            return
        yield document
