"""Floor 3: Hugging Face's checkpoints in and out. A family of models is one file in `families`; see `tables`."""

from lmx.hf.adapters import load_adapter, save_adapter
from lmx.hf.families import FAMILIES, family_of
from lmx.hf.files import TokenizerFiles
from lmx.hf.heads import with_head
from lmx.hf.library import load, load_shapes, save

__all__ = [
    "FAMILIES",
    "TokenizerFiles",
    "family_of",
    "load",
    "load_adapter",
    "load_shapes",
    "save",
    "save_adapter",
    "with_head",
]
