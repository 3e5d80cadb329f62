"""A CRC-32 of every file of a checkpoint, to name the file that changed when an array is not what was saved.

The checksums of the arrays decide whether a checkpoint is sound (`lmx.train.checksums`); these only say where the
damage is. They are computed once the checkpoint is whole, from the files as the page cache has them: each process reads
what it wrote itself (orbax's folder ocdbt.process_<i>, process 0 also all else) and writes seal.process_<i>.json. A
process that is killed before leaves a checkpoint that is sound all the same. Only for local folders: reading back from
gs:// would cost a download, and its objects carry checksums of their own.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

from lmx.train.buckets import is_local

BLOCK = 1 << 22  # bytes read at once


def seal(path: Any, index: int) -> None:
    """Write the CRC of the files that process `index` answers for. Raises OSError."""
    if not is_local(path):
        return
    root = Path(path)
    files = {name: _crc(root / name) for name in _files(root) if _owner(name) == index}
    text = json.dumps(files)
    scratch = root / f".seal.process_{index}"
    scratch.write_text(json.dumps({"crc": zlib.crc32(text.encode()), "files": text}))
    scratch.rename(root / f"seal.process_{index}.json")


def changed(path: Any, index: int = 0, count: int = 1) -> dict[str, str] | None:
    """The files of a checkpoint that are not what was written: name -> what happened to it.

    Process `index` of `count` that ask looks at its share. None where there is no seal to go by.
    """
    if not is_local(path):
        return None
    root, found, sealed = Path(path), {}, False
    for place in sorted(root.glob("seal.process_*.json"))[index::count]:
        files = _read(place)
        if files is None:
            continue
        sealed = True
        for name, crc in files.items():
            try:
                now = _crc(root / name)
            except FileNotFoundError:
                found[name] = "is missing"
            except OSError as error:
                found[name] = f"cannot be read ({error.strerror})"
            else:
                if now != crc:
                    found[name] = "has changed" if now[0] == crc[0] else f"has {now[0]} bytes instead of {crc[0]}"
    return found if sealed else None


def _files(root: Path) -> list[str]:
    names = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return sorted(name for name in names if not re.match(r"\.?seal\.process_", name))


def _owner(name: str) -> int:
    found = re.search(r"ocdbt\.process_(\d+)", name)
    return int(found[1]) if found else 0


def _crc(path: Path) -> list[int]:
    """[bytes, CRC-32]."""
    crc = size = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _read(place: Path) -> dict[str, list[int]] | None:
    """The content of a seal, None if it is itself damaged or unreadable."""
    try:
        seal = json.loads(place.read_text())
        return json.loads(seal["files"]) if zlib.crc32(seal["files"].encode()) == seal["crc"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
