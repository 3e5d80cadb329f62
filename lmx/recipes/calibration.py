"""Text to calibrate on: batches of it for a model, and what the model's weights read."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from lmx import data, reparam
from lmx.core.errors import ConfigError
from lmx.models.transformer import Model
from lmx.recipes import models
from lmx.recipes.derived import Source
from lmx.reparam.grams import moments

ROWS = 8


def batches(
    source: Source,
    text: str,
    tokens: int,
    seed: int,
    console: Console | None = None,
    length: int | None = None,
    split: str = "train",
) -> list[dict[str, np.ndarray]]:
    """Batches of about so many tokens, drawn from a split of a text, of the rows that the model was trained on.

    Of a split that has fewer, all there are. Raises ConfigError for too few tokens, an encoder-decoder (which reads
    pairs of texts), DataError for the text.
    """
    if source.model.config.architecture == "encoder_decoder":
        raise ConfigError(
            "calibration on plain text is for encoders and decoders; an encoder-decoder reads pairs of texts"
        )
    length = length or models.trained_length(source.name) or 256
    length = min(length, source.model.max_length or length)
    if tokens < length:
        raise ConfigError(f"{tokens} tokens to calibrate on are less than one row of {length}; give more")
    tokenizer = models.load_tokenizer(source.name)
    data.check_fits(tokenizer, source.model.vocab_size)
    console = console or Console(quiet=True)
    with tempfile.TemporaryDirectory(prefix="lmx-calibration-") as scratch:
        with console.status(f"reading {escape(text)}"):
            documents = data.split(data.deduplicate(data.read(text)))[split]
            cache = data.build_cache(documents, tokenizer, Path(scratch))
        rows = max(1, min(tokens // length, data.num_rows(cache, length)))
        size = min(ROWS, rows)
        drawn = data.Batches(cache, batch_size=size, length=length, seed=seed)
        return [{name: np.array(x) for name, x in drawn.at(step).items()} for step in range(rows // size)]


def input_moments(
    source: Source, pattern: str, text: str, tokens: int, seed: int, console: Console | None = None
) -> dict[str, np.ndarray]:
    """Path of each selected matrix -> second moments of what it reads on a text, (m, m), or of a table of token vectors
    their diagonal (v,). Raises LmxErrors."""
    exact = "|".join(f"^{path}$" for path in reparam.matrix_paths(source.model, pattern))
    return moments_of(source.model, batches(source, text, tokens, seed, console), exact, console)


def moments_of(
    model: Model, given: list[dict[str, np.ndarray]] | None, pattern: str, console: Console | None = None
) -> dict[str, np.ndarray] | None:
    """`input_moments` on batches; None without batches."""
    if given is None:
        return None
    with (console or Console(quiet=True)).status("seeing what the weights read"):
        every = moments(model, given, pattern, want=("input",))
        return {path: found.input for seen in every for path, found in seen.items()}
