"""`lmx generate`: text from a model, a decoder's continuation or what an encoder-decoder makes of a source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lmx import decode
from lmx.core.errors import ConfigError, DataError
from lmx.data import chat
from lmx.decode.request import given
from lmx.recipes import models
from lmx.recipes.models import decoder_start, open_model


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Let a model continue a text; an encoder-decoder, such as one that translates, reads it and writes another."""

    model: str
    """The folder of a run or a model."""
    prompt: str = ""
    """The text to continue, empty for a new document; of an encoder-decoder, what it is to read."""
    max_new_tokens: int = 200
    """The most tokens to write."""
    chat: bool = False
    """The prompt is a message to the assistant: put it into the model's chat template and give the answer."""
    temperature: float | None = None
    """Below 1 likelier, above 1 more various; 0 always takes the likeliest token; 0.8 if not given."""
    top_k: int | None = None
    """Choose among so many likeliest tokens."""
    top_p: float | None = 0.95
    """Choose among the likeliest tokens that together have this probability; 1 is all."""
    min_p: float | None = None
    """Choose among tokens at least this likely relative to the likeliest."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that have appeared less likely."""
    stop: tuple[str, ...] = ()
    """Texts at which to stop, without writing them."""
    num_beams: int = 1
    """Above 1: search for the likeliest whole text with so many hypotheses instead of drawing tokens."""
    length_penalty: float = 1.0
    """Of the search: above 0 favors long texts, below 0 short ones."""
    draft: str | None = None
    """The folder of a smaller model with the same tokenizer: it guesses ahead, and the text comes sooner."""
    prompt_lookup: int | None = None
    """Guess so many tokens ahead from what the text has repeated so far; the text comes sooner."""
    samples: int = 1
    """How many continuations."""
    seed: int = 0
    """Of the random choices."""


def run(options: GenerateOptions, show: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Generate and return {"texts", "prompt", "model"}; `show` gets what is to be read, as soon as it is final.

    The texts are the same with and without `show`. Raises LmxErrors for a model or an option that cannot be used.
    """
    o = options
    _check(o)
    model, tokenizer = open_model(o.model)
    reads = getattr(getattr(model, "config", None), "architecture", None) == "encoder_decoder"
    if reads:
        model, prompt = _with_source(o, model, tokenizer)
    else:
        prompt = _chat_prompt(o) if o.chat else o.prompt
    how: dict[str, Any] = dict(max_new_tokens=o.max_new_tokens, stop=o.stop, special=o.chat or reads)
    if o.num_beams == 1:
        how |= dict(key=jax.random.key(o.seed), **_sampling(o))
    ahead: dict[str, Any] = dict(draft=_draft(o, tokenizer))
    if o.num_beams > 1:
        ahead |= dict(num_beams=o.num_beams, length_penalty=o.length_penalty)
    said = "" if o.chat or reads else o.prompt
    if show is None or o.samples > 1 or o.num_beams > 1 or ahead["draft"] is not None:
        texts = decode.generate_text(model, tokenizer, [prompt] * o.samples, **how, **ahead)
        if show is not None and o.samples > 1:
            show("\n".join(f"--- {i} ---\n{said}{text}\n" for i, text in enumerate(texts, start=1)))
        elif show is not None:
            show(said + texts[0])
    else:
        pieces = []
        show(said)
        for piece in decode.stream_text(model, tokenizer, prompt, **how):
            show(piece)
            pieces.append(piece)
        texts = ["".join(pieces)]
    return {"texts": texts, "prompt": o.prompt, "model": o.model}


def _check(o: GenerateOptions) -> None:
    """What can be told before the model is read. Raises ConfigError."""
    if o.samples < 1:
        raise ConfigError(f"samples must be at least 1, not {o.samples}")
    if o.num_beams < 1:
        raise ConfigError(f"num_beams must be at least 1, not {o.num_beams}")
    if o.draft is not None and o.prompt_lookup is not None:
        raise ConfigError("--draft and --prompt-lookup both guess ahead: give one of them")
    if o.num_beams == 1 and o.length_penalty != 1:
        raise ConfigError("--length-penalty belongs to the search: give --num-beams 4, or leave it out")
    if o.num_beams > 1:
        given = {
            "--temperature": o.temperature, "--top-k": o.top_k, "--min-p": o.min_p,
            "--repetition-penalty": o.repetition_penalty, "--draft": o.draft, "--prompt-lookup": o.prompt_lookup,
            "--samples": o.samples if o.samples > 1 else None,
        }  # fmt: skip
        if wrong := [name for name, value in given.items() if value]:
            raise ConfigError(f"--num-beams finds the likeliest text; it cannot go with {', '.join(wrong)}")
    if o.chat and not o.prompt:
        raise ConfigError("--chat needs a message to answer: give it with --prompt")


def _with_source(o: GenerateOptions, model: Any, tokenizer: Any) -> tuple[Any, str]:
    """(the model given the prompt as its source, the token that its decoder begins with, as text).

    The source has the special tokens that the tokenizer's own template puts around a text, and ends with </s>.
    """
    if o.chat or not o.prompt:
        what = "has no chats: leave --chat out" if o.chat else "needs a text to read: give it with --prompt"
        raise ConfigError(f"{o.model!r} is an encoder-decoder and {what}")
    ids = tokenizer.backend.encode(o.prompt).ids
    ids += [] if ids[-1:] == [tokenizer.eos_id] else [tokenizer.eos_id]
    start = decoder_start(o.model, tokenizer)
    text = tokenizer.backend.id_to_token(start)
    if text is None or tokenizer.encode(text, special=True) != [start]:
        raise DataError(f"the decoder of {o.model!r} begins with the token {start}, no special one of its tokenizer")
    return given(model, np.array([ids] * o.samples)), text


def _sampling(o: GenerateOptions) -> dict[str, Any]:
    if o.temperature == 0:  # the filters choose among samples; there is nothing to sample
        return dict(temperature=0, repetition_penalty=o.repetition_penalty)
    temperature = 0.8 if o.temperature is None else o.temperature
    filters = dict(top_k=o.top_k, top_p=o.top_p, min_p=o.min_p)
    return dict(temperature=temperature, repetition_penalty=o.repetition_penalty, **filters)


def _draft(o: GenerateOptions, tokenizer: Any) -> Any:
    """What guesses ahead, or None. Raises ConfigError for a model with another tokenizer."""
    if o.prompt_lookup is not None:
        return decode.PromptLookup(o.prompt_lookup)
    if o.draft is None:
        return None
    model, its = open_model(o.draft)
    if its.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"the draft {o.draft!r} has another tokenizer than {o.model!r} ({its.vocab_size} tokens against "
            f"{tokenizer.vocab_size}): its guesses would mean something else. Use a model trained with the same "
            "one, or --prompt-lookup 8"
        )
    return decode.ModelDraft(model)


def _chat_prompt(o: GenerateOptions) -> str:
    """The prompt as a user's message, as the model's own chat template writes it. Raises FolderError without one."""
    template = models.load_template(o.model)
    return chat.render([{"role": "user", "content": o.prompt}], template)
