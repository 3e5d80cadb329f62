"""What a model's folder says of generating, in Hugging Face's format or lmx's own: which tokens end a text, and so on.

generation_config.json counts first, then the config.json that a model came with, as for transformers' `generate`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmx.core.errors import FolderError
from lmx.models.filenames import CONFIG, GENERATION, STRUCTURE

NOTES = "hugging_face"  # in the notes of an lmx folder: the config.json that a model came with


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FolderError if it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"{path} is missing") from error
    except ValueError as error:
        raise FolderError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise FolderError(f"{path} is damaged: it holds no JSON object")
    return found


def origin(folder: Path) -> dict[str, Any] | None:
    """The config.json with which a model came: in Hugging Face's format the folder's own, in lmx's from its notes."""
    if (folder / STRUCTURE).exists():
        return read_json(folder / STRUCTURE).get("notes", {}).get(NOTES)
    return read_json(folder / CONFIG) if (folder / CONFIG).exists() else None


def setting(folder: Path, name: str) -> Any:
    """A setting such as "decoder_start_token_id", or None where the folder does not say."""
    first = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    if first.get(name) is not None:
        return first[name]
    return (origin(folder) or {}).get(name)


def eos_ids(folder: Path) -> tuple[int, ...] | None:
    """The tokens that end a text, one or several, or None where the folder does not say. Raises FolderError for what
    are no token ids."""
    found = setting(folder, "eos_token_id")
    if found is None:
        return None
    ids = tuple(found) if isinstance(found, list) else (found,)
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise FolderError(f"{folder} has eos_token_id {found!r}; it must be a token id or several: mend {GENERATION}")
    return ids
