"""What `lmx train --objective` may be, and the model and tokenizer that each needs."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmx import data
from lmx.core.errors import ConfigError, nearest
from lmx.data import special_tokens
from lmx.models.transformer import Model


@dataclasses.dataclass(frozen=True)
class Kind:
    """An objective: the architecture of its models, whether it learns from examples instead of a stream of text, the
    special tokens that a tokenizer must have for it, and what it predicts."""

    architecture: str
    examples: bool
    special: tuple[str, ...]
    targets: str


KINDS = {
    "causal": Kind("decoder", False, (), "tokens"),
    "masked": Kind("encoder", False, ("<mask>",), "masked tokens"),
    "spans": Kind(
        "encoder_decoder", False, tuple(f"<extra_id_{i}>" for i in range(100)), "tokens of the removed spans"
    ),
    "pairs": Kind("encoder_decoder", True, (), "tokens of the target texts"),
    "chat": Kind("decoder", True, (), "tokens that the assistant says"),
}


def kind(name: str) -> Kind:
    """The objective of a name. Raises ConfigError if there is none."""
    if name not in KINDS:
        raise ConfigError(f"no objective {name!r}, there are {', '.join(KINDS)}{nearest(name, KINDS)}")
    return KINDS[name]


def check_model(objective: str, model: Any, where: str) -> None:
    """Raise ConfigError unless a model (or its shapes) can learn by an objective; `where` it comes from."""
    if not isinstance(model, Model):
        raise ConfigError(f"{where} holds a {type(model).__name__}; lmx train trains Transformers")
    wanted, found = kind(objective).architecture, model.config.architecture
    if found != wanted:
        fitting = " or ".join(name for name, k in KINDS.items() if k.architecture == found)
        raise ConfigError(
            f"the objective {objective!r} trains models of architecture {wanted!r}, and {where} holds one of "
            f"{found!r}: give --objective {fitting}, or another --init"
        )
    model.require_vocabulary()


def complete(objective: str, tokenizer: data.Tokenizer) -> data.Tokenizer:
    """The tokenizer of a new model, with the special tokens that the objective needs and it lacks."""
    if objective == "masked":
        names = special_tokens.MASK
    elif objective == "spans":
        names = tuple(form.format(0) for form in special_tokens.SENTINEL)
    else:
        return tokenizer
    known = any(tokenizer.backend.token_to_id(name) is not None for name in names)
    return tokenizer if known else special_tokens.add(tokenizer, kind(objective).special)


def learnt(objective: str, tokenizer: data.Tokenizer) -> data.Objective | None:
    """What is to be learnt from a stream of text; None is the next token. Raises DataError for what the tokenizer
    lacks."""
    if objective == "masked":
        return data.masked(tokenizer, first_id=special_tokens.first_id(tokenizer))
    return data.span_corruption(tokenizer) if objective == "spans" else None
