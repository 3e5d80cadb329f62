"""Text from any language model and a tokenizer: `generate_text` whole, `stream_text` in pieces.

A tokenizer is any object with `encode(text) -> ids`, `decode(ids) -> text`, `vocab_size` and `eos_id` (or None), and
with `eos_ids` if several tokens end a text. A prompt is fed as in training, where every document starts with the
end-of-sequence token: [eos_id] + ids. A rendered chat brings its own special tokens: `special=True` recognises them and
puts none first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax import Array

from lmx.core.errors import ConfigError, DataError
from lmx.decode.beam import beam_search
from lmx.decode.drafts import Draft
from lmx.decode.generate import generate, stream
from lmx.decode.speculative import speculate
from lmx.models.padding import pad, padded_length
from lmx.models.protocol import LanguageModel

BROKEN = "\ufffd"  # what decoders write for bytes that are not, or not yet, UTF-8
SHORTEST = 32  # prompts are padded to this many tokens at least


class Pieces:
    """The text of one row as its tokens arrive, in pieces that are final.

    Text is held back while its last character may be incomplete, and while it may be the start of a stop
    string. Joined, the pieces are the text up to the first stop string, which is found whatever the token
    boundaries; bytes at the very end that are not UTF-8 are dropped.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.window = list(prompt)  # tokens decoded together: spaces and bytes may depend on the ones before
        self.fresh = len(self.window)  # where in the window the tokens begin whose text is not yet given
        self.given = len(tokenizer.decode(self.window))  # how much of the window's text is
        self.held = ""  # complete text that may be the start of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became final with this token; sets `stopped` if it completed a stop string."""
        if token >= self.tokenizer.vocab_size:  # a model's vocabulary may be padded; such a token has no text
            return ""
        self.window.append(int(token))
        text = self.tokenizer.decode(self.window)
        if text.endswith(BROKEN) or len(text) <= self.given:
            return ""
        new = text[self.given :]
        self.window = self.window[self.fresh :]
        self.fresh, self.given = len(self.window), len(self.tokenizer.decode(self.window))
        return self._release(new)

    def close(self) -> str:
        """The text that was held back, now that no token follows."""
        rest = self.tokenizer.decode(self.window)[self.given :].rstrip(BROKEN)
        piece = self._release(rest)
        if not self.stopped:
            piece, self.held = piece + self.held, ""
        return piece

    def _release(self, new: str) -> str:
        text = self.held + new
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def generate_text(
    model: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[str] | str,
    *,
    max_new_tokens: int,
    stop: Sequence[str] | str = (),
    key: Array | None = None,
    special: bool = False,
    draft: Draft | LanguageModel | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    **sampling: Any,
) -> list[str]:
    """The continuation of every prompt, without the prompt: a list even for one prompt.

    A text ends before one of the tokenizer's end-of-sequence tokens, before the first stop string, or after
    `max_new_tokens` tokens. `sampling`: temperature (0, the default, is greedy), top_k, top_p, min_p,
    repetition_penalty, as in `generate`. Prompts may differ in length, and an empty one starts a new
    document. The model must be able to `rewind`.

    special: prompts are rendered chats (`lmx.data.chat`): special tokens in them are recognised and none is put
    first; the tokenizer's encode must take `special=True`. draft: see `lmx.decode.speculative`. num_beams above 1
    searches (`lmx.decode.beam`) instead of sampling, and gives the best.

    Raises DataError for a tokenizer that does not fit the model, ConfigError for what else cannot be, such as beam
    search with a temperature or a draft.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    ids = _encode(model, tokenizer, prompts, stop, special)
    tokens, lengths = _pad(ids)
    ends = _eos_ids(tokenizer)
    options = dict(lengths=lengths, max_new_tokens=max_new_tokens, eos_id=ends)
    if num_beams != 1:
        _check_search(num_beams, draft, sampling)
        search = dict(num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping)
        columns = np.asarray(beam_search(model, tokens, **options, **search).sequences[:, 0]).T
    elif draft is not None:
        columns = np.asarray(speculate(model, tokens, draft=draft, key=key, **options, **sampling).tokens).T
    elif stop:  # looked for while tokens come; without any, the whole loop stays on the device
        columns = stream(model, tokens, key=key, **options, **sampling)
    else:
        columns = np.asarray(generate(model, tokens, key=key, **options, **sampling).tokens).T
    rows = [Pieces(tokenizer, row, stop) for row in ids]
    texts, running = [""] * len(rows), set(range(len(rows)))
    for column in columns:
        for i in sorted(running):
            ended = int(column[i]) in ends
            if not ended:
                texts[i] += rows[i].push(column[i])
            if ended or rows[i].stopped:
                running.discard(i)
        if not running:
            break
    return [text + row.close() for text, row in zip(texts, rows, strict=True)]


def stream_text(
    model: LanguageModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    stop: Sequence[str] | str = (),
    key: Array | None = None,
    special: bool = False,
    **sampling: Any,
) -> Iterator[str]:
    """The continuation of one prompt in pieces, as they become final; joined, that of `generate_text`.

    No piece ends inside a character or holds a part of a stop string. Arguments and errors as in
    `generate_text`; the errors are raised by the call itself.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    ids = _encode(model, tokenizer, [prompt], stop, special)
    tokens, lengths = _pad(ids)
    ends = _eos_ids(tokenizer)
    options = dict(lengths=lengths, max_new_tokens=max_new_tokens, eos_id=ends, key=key, **sampling)
    columns = stream(model, tokens, **options)

    def pieces() -> Iterator[str]:
        row = Pieces(tokenizer, ids[0], stop)
        for (token,) in columns:
            piece = "" if int(token) in ends else row.push(token)
            if piece:
                yield piece
            if row.stopped:
                return
        if rest := row.close():
            yield rest

    return pieces()


def _check_search(num_beams: int, draft: Any, sampling: dict[str, Any]) -> None:
    """Raises ConfigError for what cannot go with beam search."""
    set_ = [name for name, value in sampling.items() if value is not None and (name, value) != ("temperature", 0)]
    if draft is not None or set_:
        what = "a draft" if draft is not None else ", ".join(set_)
        raise ConfigError(
            f"num_beams={num_beams} searches for the most probable text, and {what} cannot go with that: leave it out, "
            "or num_beams"
        )


def _encode(
    model: LanguageModel, tokenizer: Any, prompts: Sequence[str], stop: Sequence[str], special: bool
) -> list[list[int]]:
    """Every prompt's token ids, after what begins a text unless special; checks what can be wrong with text."""
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise ConfigError(f"prompts must be one string or several, and at least one; got {prompts!r}")
    if not all(isinstance(s, str) and s for s in stop):
        raise ConfigError(
            f"stop must be strings with at least one character; got {stop!r}. Token ids belong to generate"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"this tokenizer does not fit the model: it has {tokenizer.vocab_size} tokens, the model's "
            f"vocabulary {model.vocab_size}; load the tokenizer that the model was trained with"
        )
    if special:
        return [list(tokenizer.encode(p, special=True)) for p in prompts]
    first = getattr(tokenizer, "prefix_ids", [] if tokenizer.eos_id is None else [tokenizer.eos_id])
    return [[*first, *tokenizer.encode(p)] for p in prompts]


def _pad(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unlike length to tokens (b, t), zeros on the right; lengths (b,)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    return pad(rows, padded_length(int(lengths.max()), SHORTEST)), lengths


def _eos_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text."""
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return tuple(getattr(tokenizer, "eos_ids", own))
