"""Named arrays in safetensors files: written one array at a time, read through a memory map.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header (little
endian), the header `{name: {"dtype", "shape", "data_offsets"}}`, then the raw bytes. Writing keeps one array
in memory, never a whole file; reading through a map lets the caller copy only the slice a device needs.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmx.core.errors import FolderError

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def storable(dtype: Any) -> bool:
    """Whether safetensors has a name for this dtype."""
    return not hasattr(dtype, "_impl") and dtype in NAMES


def nbytes(array: Any) -> int:
    """The bytes of anything with a shape and a dtype."""
    return math.prod(array.shape) * array.dtype.itemsize


def write_arrays(path: Path, arrays: Mapping[str, Any], fetch: Callable[[str], np.ndarray]) -> None:
    """Write a safetensors file and flush it to the disk.

    Args:
      path: the file to create.
      arrays: name -> anything with `shape` and `dtype`, in the order of the file.
      fetch: gives the values of one array; called once for each name, in order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + nbytes(array)
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data start on a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in arrays:
            file.write(np.ascontiguousarray(fetch(name)).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def open_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file as read-only views of a memory map; indexing reads.

    Raises:
      FolderError: the file is missing, truncated or not safetensors.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"its header describes {end} bytes, the file has {size}")
        data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        return {name: _view(data[8 + length :], name, entry) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise FolderError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(
            f"{path} is damaged or truncated ({error}): copy the folder again, or save the model again"
        ) from error


def forget(array: np.ndarray) -> None:
    """Let the system take back the memory with which it read a view that `open_arrays` gave; the view stays valid."""
    owner = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    if not isinstance(owner, mmap.mmap) or not array.nbytes:
        return
    start = array.__array_interface__["data"][0] - np.frombuffer(owner, np.uint8).__array_interface__["data"][0]
    begin = start - start % mmap.PAGESIZE
    owner.madvise(mmap.MADV_DONTNEED, begin, start + array.nbytes - begin)


def _view(data: np.ndarray, name: str, entry: dict) -> np.ndarray:
    dtype, shape, (start, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} and dtype {dtype} cannot have {end - start} bytes")
    return np.asarray(data[start:end]).view(dtype).reshape(shape)
