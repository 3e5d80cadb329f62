"""lmx: take a language model apart, make its parts cheaper, put them back together.

    import lmx
    model = lmx.init(lmx.preset("llama-tiny"), jax.random.key(0))      # Model(config, params), a pytree
    logits = lmx.logits(model, tokens)                                  # (b, t) -> (b, t, v)

A lazy facade (PEP 562): a name is imported when it is first used, and nothing inside lmx imports this module's names.
"""

from __future__ import annotations

import importlib
from typing import Any

from lmx.version import __version__

_NAMES = {  # public name -> where it is
    "Config": "lmx.models.config",
    "preset": "lmx.models.presets",
    "Model": "lmx.models.transformer",
    "LanguageModel": "lmx.models.protocol",
    "init": "lmx.models.transformer",
    "load_adapter": "lmx.hf.adapters",
    "save_adapter": "lmx.hf.adapters",
    "with_head": "lmx.hf.heads",
    "load": "lmx.hf.library",
    "save": "lmx.hf.library",
    "logits": "lmx.models.forward",
    "encode": "lmx.models.forward",
    "embed_sentences": "lmx.models.embeddings",
    "encode_texts": "lmx.models.embeddings",
    "unstack": "lmx.models.stacks",
    "restack": "lmx.models.stacks",
    "load_tokenizer": "lmx.data.tokenizers",
    "generate": "lmx.decode.generate",
    "generate_text": "lmx.decode.text",
    "stream_text": "lmx.decode.text",
    "beam_search": "lmx.decode.beam",
    "speculate": "lmx.decode.speculative",
    "score_continuations": "lmx.decode.scoring",
    "score_rolling": "lmx.decode.scoring",
    "start": "lmx.train.state",
    "make_train_step": "lmx.train.step",
    "LowRank": "lmx.core.kinds",
    "LoRA": "lmx.core.kinds",
    "Pivoted": "lmx.core.kinds",
    "Quantized": "lmx.core.kinds",
    "Sum": "lmx.core.kinds",
    "fold": "lmx.core.weights",
    "Rules": "lmx.core.sharding",
    "make_mesh": "lmx.core.sharding",
    "use_mesh": "lmx.core.sharding",
    "LmxError": "lmx.core.errors",
}
_ROOMS = ("core", "nn", "models", "hf", "data", "losses", "train", "decode", "evaluate", "reparam", "recipes")
_INSIDE = {"tree": "lmx.core.tree", "weights": "lmx.core.weights", "specs": "lmx.core.specs"}

__all__ = ["__version__", *_NAMES, *_ROOMS, *_INSIDE]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _INSIDE:
        value = importlib.import_module(_INSIDE[name])
    elif name in _ROOMS:
        value = importlib.import_module(f"lmx.{name}")
    else:
        from lmx.core.errors import nearest

        raise AttributeError(f"module 'lmx' has no attribute {name!r}{nearest(name, __all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
