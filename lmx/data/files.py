"""Text files: find them by path, folder or glob, unpack, decode, and cut them into documents.

Readable are .txt (one document a file) and .jsonl (one document a line, under the key `text`), each also as
.gz. Every complaint names the file, and the line or byte in it.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lmx.core.errors import DataError, FolderError, nearest
from lmx.data.documents import Document

ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


def read_files(where: str, other_names: Iterable[str] = ()) -> list[Document]:
    """The documents of a file, of all files below a folder, or of a glob; blank ones are left out.

    `other_names` are further right answers, for the error about a path that is missing. Raises FolderError
    (missing, unreadable, no text files) and DataError (binary, undecodable, malformed, or nothing but
    blanks).
    """
    found = _find(where, other_names)
    documents = [document for path, domain in found for document in _read_file(path, domain)]
    if not documents:
        raise DataError(
            f"no text in {where!r}: {len(found)} file(s) with nothing but blanks. "
            "Give files with text in them."
        )
    return documents


def _find(where: str, other_names: Iterable[str]) -> list[tuple[Path, str]]:
    """(file, domain) for every readable file that `where` stands for, in sorted order."""
    path = Path(where).expanduser()
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise DataError(
                f"cannot tell what is in {where!r}: expected a name that ends in {' or '.join(ENDINGS)}."
            )
        return [(path, _stem(path))]
    if path.is_dir():
        root, files = path, list(_walk(path))
    elif glob.has_magic(where):
        root, files = _fixed_beginning(path), list(dict.fromkeys(_matches(path)))
    else:
        raise missing(Path(where).expanduser(), other_names)
    if not files:
        what = "folder" if path.is_dir() else "pattern"
        raise FolderError(
            f"the {what} {where!r} gives no text files: none found that ends in {' or '.join(ENDINGS)}."
        )
    return [(file, _domain(file, root)) for file in files]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(ENDINGS))


def _matches(pattern: Path) -> Iterator[Path]:
    for match in sorted(glob.glob(str(pattern), recursive=True)):
        if os.path.isdir(match):
            yield from _walk(Path(match))
        elif match.endswith(ENDINGS):
            yield Path(match)


def _fixed_beginning(pattern: Path) -> Path:
    parts = pattern.parts
    magic = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:magic])


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def _domain(file: Path, root: Path) -> str:
    below = file.relative_to(root).parts
    return below[0] if len(below) > 1 else root.resolve().name


def _nearest_path(path: Path, other_names: Iterable[str]) -> str:
    """What stands beside the first missing part of the path, nearest names first."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        beside = sorted(os.listdir(missing.parent))
    except OSError:
        beside = []
    names = [*beside, *other_names] if missing == path else beside
    return (
        nearest(missing.name, names, count=3) or f"; {str(missing.parent)!r} has nothing of a similar name."
    )


def read_text(path: Path) -> str:
    """The text of a file, unpacked if it ends in .gz. Raises FolderError (unreadable) and DataError (not text)."""
    return _decode(_unpack(path), path)


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for every line of a .jsonl file that is not blank. Raises DataError for a line that is none."""
    # "\n" only: str.splitlines would also break at separators that stand inside JSON strings.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(line, where)


def missing(path: Path, other_names: Iterable[str] = ()) -> FolderError:
    """The error for a file or folder that is not there: it names what stands beside it, nearest names first."""
    return FolderError(f"there is no file or folder {str(path)!r}{_nearest_path(path, other_names)}")


def _read_file(path: Path, domain: str) -> Iterator[Document]:
    text = read_text(path)
    if _is_jsonl(path):
        yield from _read_lines(text, path, domain)
    elif text.strip():
        yield Document(text, str(path), domain)


def _is_jsonl(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(".jsonl")


def _unpack(path: Path) -> bytes:
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise FolderError(f"cannot read {str(path)!r}: {error.strerror}. Check its permissions.") from error
    if path.suffix != ".gz":
        return packed
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{str(path)!r} is not a whole gzip file ({error}); pack or copy it again."
        ) from error


def _decode(content: bytes, path: Path) -> str:
    unpacked = " of the unpacked text" if path.suffix == ".gz" else ""
    zero = content.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{str(path)!r} is a binary file, not text: byte {zero}{unpacked} is zero. "
            "Give text files in UTF-8."
        )
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r} is not UTF-8: byte {error.start}{unpacked} is 0x{content[error.start]:02x} "
            f"({error.reason}). Convert the file (iconv -t utf-8) or leave it out."
        ) from error


def _read_lines(text: str, path: Path, domain: str) -> Iterator[Document]:
    # "\n" only: str.splitlines would also break at separators that stand inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value = _line_text(line, f"{path}, line {number}")
        if value.strip():
            yield Document(value, f"{path}:{number}", domain)


def _object(line: str, where: str, holding: str = "") -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}). Each line must be one JSON object.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object{holding}, found {type(row).__name__}.")
    return row


def _line_text(line: str, where: str) -> str:
    row = _object(line, where, " with the key 'text'")
    if "text" not in row:
        keys = ", ".join(repr(key) for key in row) or "none"
        raise DataError(
            f"{where}: there is no key 'text' (keys found: {keys}). Rename the key that holds the text."
        )
    value = row["text"]
    if not isinstance(value, str):
        raise DataError(f"{where}: the value of 'text' must be a string, found {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a surrogate pair at character {error.start} of 'text'; mend it."
        ) from error
    return value
