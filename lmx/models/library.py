"""Models as a user handles them: load, save, logits, encode. What `import lmx` offers under these names."""

from __future__ import annotations

import os
from typing import Any

import jax
from jax.sharding import Mesh

from lmx.core import sharding, specs
from lmx.core.sharding import Rules
from lmx.models import (
    folders,
    transformer,  # noqa: F401  (registers the nodes that folders hold)
    unigram,  # noqa: F401
)
from lmx.models.protocol import LanguageModel


def load(
    folder: str | os.PathLike, *, dtype: Any = None, mesh: Mesh | str | None = None, rules: Rules | None = None
) -> Any:
    """The model in a folder, each array read straight into its dtype and its place on the mesh.

    folder: what `lmx.save` or `lmx train` wrote.
    dtype:  of the floating-point arrays; as stored by default.
    mesh:   a mesh or its string ("fsdp=4,tensor=2"); by default the one in force, if any. rules: as in `use_mesh`.
    Raises FolderError for a folder that cannot be read.
    """
    with sharding.use_mesh(sharding.concrete_mesh() if mesh is None else mesh, rules):
        placed = None
        if sharding.concrete_mesh() is not None:
            placed = lambda shapes: specs.shardings(specs.of(shapes))  # noqa: E731
        return folders.load(folder, dtype=dtype, shardings=placed)


def load_shapes(folder: str | os.PathLike) -> Any:
    """The model in a folder as `jax.ShapeDtypeStruct`s, with shardings where a mesh is in force; no array is read."""
    return specs.shapes(specs.of(folders.load_shapes(folder)))


def save(
    model: Any, folder: str | os.PathLike, *, tokenizer: Any = None, overwrite: bool = False, notes: dict | None = None
) -> None:
    """Write a model, and its tokenizer if given, to a folder: structure.json, config.json and safetensors.

    Raises FolderError if the folder is taken (unless overwrite) or cannot be written; nothing is then left half-done.
    """
    folders.save(model, folder, tokenizer=tokenizer, overwrite=overwrite, notes=notes)


def logits(
    model: LanguageModel, tokens: jax.Array, *, segment_ids=None, positions=None, types=None, encoder_tokens=None,
    encoder_segment_ids=None,
) -> jax.Array:  # fmt: skip
    """(b, t) -> (b, t, v) float32, up to a constant a position: `jax.nn.log_softmax` makes them log-probabilities.

    Of a model with a head for classes or vectors, what `Model.logits` says. segment_ids (b, t): tokens see only their
    own segment (0 is padding); positions (b, t): counted from each segment's start by default; types (b, t): of tokens;
    encoder_tokens (b, s) and encoder_segment_ids (b, s): what the encoder of an encoder-decoder reads.
    Raises ConfigError if t exceeds the model's learned positions, or for arguments that the model has no use for.
    """
    given = {"positions": positions, "types": types, "encoder_tokens": encoder_tokens}
    features = encode(model, tokens, segment_ids=segment_ids, encoder_segment_ids=encoder_segment_ids, **given)
    if hasattr(model, "read"):
        return model.read(features, segment_ids)
    return model.readout().logits(features)


def encode(model: LanguageModel, tokens: jax.Array, *, segment_ids=None, positions=None, **given: Any) -> jax.Array:
    """(b, t) -> (b, t, d): the vectors that the model's head reads. The arguments are those of `logits`."""
    given = {name: value for name, value in given.items() if value is not None}
    return model.features(tokens, segment_ids=segment_ids, positions=positions, **given)
