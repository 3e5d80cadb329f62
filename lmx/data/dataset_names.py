"""How a published dataset is named in a source, and which of its texts are meant: NAME[:SPLIT][@KEY]."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lmx.core.errors import DataError, nearest
from lmx.data.documents import Document

USUAL_KEYS = ("text", "content", "document", "article", "body", "sentence", "story")
_FORM = re.compile(r"(?P<name>[^@]*?)(?::(?P<split>[A-Za-z_][^/@]*))?(?:@(?P<key>[^@/]+))?", re.DOTALL)


class DatasetName(NamedTuple):
    """The dataset, its split such as "train" or "train[:10%]", and the key of its text (None: to be chosen)."""

    name: str
    split: str
    key: str | None


def parse(argument: str, scheme: str) -> DatasetName:
    """What stands after the colon of a source. Raises DataError if it is not of the form NAME[:SPLIT][@KEY]."""
    found = _FORM.fullmatch(argument)
    if found is None or not found["name"].strip("/"):
        raise DataError(
            f"the source '{scheme}:{argument}' names no dataset; write {scheme}:NAME, {scheme}:NAME:SPLIT or "
            f"{scheme}:NAME:SPLIT@KEY, such as {scheme}:NAME:train@text."
        )
    return DatasetName(found["name"], found["split"] or "train", found["key"])


def check_split(split: str, splits: Sequence[str], where: str) -> None:
    """Raise DataError if a split, or one of those it is a sum or slice of, is not there."""
    for part in split.split("+"):
        name = part.split("[")[0]
        if name not in splits and name != "all":
            raise DataError(
                f"{where} has no split {name!r}{nearest(name, splits) or '.'} "
                f"Its splits: {', '.join(splits) or 'none'}."
            )


def choose_key(given: str | None, textual: Sequence[str], others: Sequence[str], where: str) -> str:
    """The key of the text: the one given, else the only one, else a usual name. Raises DataError if none is clear."""
    if given in textual or (given is None and len(textual) == 1):
        return given or textual[0]
    known = f"Keys that hold text: {', '.join(textual) or 'none'}; others: {', '.join(others) or 'none'}."
    if given is not None:
        what = "no text" if given in others else "no key"
        raise DataError(f"{where} has {what} {given!r}{nearest(given, textual) or '.'} {known}")
    for key in USUAL_KEYS:
        if key in textual:
            return key
    raise DataError(f"which text of {where} is meant is not clear; add @KEY to the source. {known}")


def documents(texts: Iterable[str | bytes | None], where: str, domain: str) -> list[Document]:
    """One document a text; blank ones are left out. Raises DataError for bytes that are not UTF-8, and for no text."""
    found = []
    for number, text in enumerate(texts):
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}, example {number}: not UTF-8 ({error}); name another key.") from error
        if text is not None and text.strip():
            found.append(Document(text, f"{where}:{number}", domain))
    if not found:
        raise DataError(f"{where} holds no text: every example is blank.")
    return found
