"""What a call to `generate` asks for, and the checks on it: all that can be wrong before a token is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.errors import ConfigError, DataError
from lmx.decode.sampling import Sampling
from lmx.decode.stopping import ANY
from lmx.models.conditional import Conditional
from lmx.models.protocol import LanguageModel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
    """How to continue a prompt; a pytree, so that new numbers in it compile nothing new."""

    sampling: Sampling
    endings: Array | None  # (n, s) int32, see lmx.decode.stopping
    pad_id: int | Array
    key: Array | None


def given(model: Any, encoder_tokens: Any, encoder_segment_ids: Any = None) -> LanguageModel:
    """The model of what follows a source, which its encoder reads here; a model that wants none, as it is.

    encoder_tokens (b, s), encoder_segment_ids (b, s) with 0 for padding: as in `lmx.models.transformer.Model.given`.
    Raises ConfigError for an encoder-decoder without a source or another model with one, and for a source of other
    shapes; DataError for token ids outside the vocabulary.
    """
    kind = getattr(getattr(model, "config", None), "architecture", type(model).__name__)
    if encoder_tokens is None:
        if encoder_segment_ids is not None:
            raise ConfigError("encoder_segment_ids say which of encoder_tokens are padding: give encoder_tokens= too")
        if kind == "encoder_decoder":
            raise ConfigError(
                "this model is an encoder-decoder, which reads a source first: give it as encoder_tokens= (b, s), or "
                "use model.given(encoder_tokens)"
            )
        return model
    if kind != "encoder_decoder":
        raise ConfigError(f"encoder_tokens= are for an encoder-decoder, and this model is {kind!r}: leave them out")
    tokens = encoder_tokens if isinstance(encoder_tokens, jax.Array) else np.asarray(encoder_tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ConfigError(f"encoder_tokens are {tokens.dtype} of shape {tokens.shape}; they must be token ids (b, s)")
    if encoder_segment_ids is not None and np.shape(encoder_segment_ids) != tokens.shape:
        raise ConfigError(
            f"encoder_segment_ids have the shape {np.shape(encoder_segment_ids)} and encoder_tokens {tokens.shape}; "
            "they must have one shape"
        )
    _check_ids("encoder_tokens", tokens, model.vocab_size)
    segments = None if encoder_segment_ids is None else jnp.asarray(encoder_segment_ids, jnp.int32)
    return Conditional(model, _encoded(model, jnp.asarray(tokens, jnp.int32), segments), segments)


_encoded = jax.jit(lambda model, tokens, segment_ids: model.encoded(tokens, segment_ids))


def check(
    model: LanguageModel, tokens: Any, lengths: Any, max_new_tokens: int, request: Request, *, drafted: int = 0
) -> tuple[Array, Array | None]:
    """The prompt as arrays, tokens (b, t) and lengths (b,) or None; raises what `generate` says it raises.

    Columns that hold only padding are cut off where the model would have no room for them. `drafted`: how
    many tokens a draft proposes at a time, all but one of which need room beyond the new tokens.
    """
    ahead = max(0, drafted - 1)
    if isinstance(max_new_tokens, bool) or not hasattr(max_new_tokens, "__index__") or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number, 1 or above")
    if not request.sampling.greedy and request.key is None:
        raise ConfigError(
            f"temperature {request.sampling.temperature} draws tokens at random and needs a key: pass "
            "key=jax.random.key(0), or temperature=0 for the most probable token"
        )
    _check_ids("pad_id", request.pad_id, model.vocab_size)
    if request.endings is not None:
        _check_ids("eos_id or stop", request.endings[request.endings != ANY], model.vocab_size)
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if tokens.ndim != 2 or not (tokens.size == 0 or jnp.issubdtype(tokens.dtype, jnp.integer)):
        raise ConfigError(
            f"the prompt is {tokens.dtype} of shape {tokens.shape}; it must be token ids of shape "
            "(batch, length), for one prompt tokens[None]"
        )
    longest = _longest(tokens.shape, lengths)
    _check_ids("the prompt", tokens, model.vocab_size)
    limit = getattr(model, "max_length", None)
    needed = longest + max_new_tokens + ahead
    if limit is not None and needed > limit:
        drafted = f" and {ahead} drafted beyond them" if ahead else ""
        raise ConfigError(
            f"a prompt of {longest} tokens with max_new_tokens={max_new_tokens}{drafted} makes "
            f"{needed}, and this model reads at most {limit}: shorten the prompt or lower max_new_tokens"
        )
    if limit is not None:
        tokens = tokens[:, : limit - max_new_tokens - ahead]
    if getattr(model, "stretch", None) is not None:
        _check_stretch(*model.stretch, longest, max_new_tokens, drafted)
        tokens = tokens[:, :longest]  # padding would count as text
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    return jnp.asarray(tokens, jnp.int32), lengths


def _check_stretch(kind: str, length: int, longest: int, max_new_tokens: int, drafted: int) -> None:
    """Raise ConfigError where what is cached would not fit what follows (`lmx.nn.position.frequencies`)."""
    end = longest + max_new_tokens - 1 + drafted  # the last new token is not read
    if kind == "longrope" and longest <= length < end:
        raise ConfigError(
            f"this model turns positions otherwise in texts of more than {length} tokens (longrope), and a prompt of "
            f"{longest} with max_new_tokens={max_new_tokens} grows beyond that: its cached keys would no longer fit. "
            f"Take max_new_tokens={length - longest + 1 - drafted} at most, and go on with the text so far as prompt"
        )
    if kind == "dynamic" and drafted and length < end:
        raise ConfigError(
            f"this model turns positions by a text's length beyond {length} tokens (dynamic), and drafted tokens that "
            "are not kept would count: generate without a draft, or shorten prompt or max_new_tokens"
        )


def _longest(shape: tuple[int, int], lengths: Any) -> int:
    """The longest prompt's length. Raises ConfigError if there is none, or a length is not 1 to t."""
    b, t = shape
    if b == 0:
        raise ConfigError(f"the prompt has shape {shape}: there are no rows to continue")
    known = np.full((b,), t) if lengths is None else _concrete(lengths)
    if known is None:
        return t
    if known.shape != (b,) or not np.issubdtype(known.dtype, np.integer):
        raise ConfigError(
            f"lengths is {known.dtype} of shape {known.shape}; it must be a whole number for each of {b} rows"
        )
    if known.min() < 1:
        row = int(known.argmin())
        raise ConfigError(
            f"the prompt of row {row} is empty (length {known[row]}), and a model predicts from what it has "
            "read: give it the end-of-sequence (eos) or begin-of-sequence (bos) token as first token"
        )
    if known.max() > t:
        row = int(known.argmax())
        raise ConfigError(
            f"the length of row {row} is {known[row]}, but tokens has shape {shape}: at most {t}"
        )
    return int(known.max())


def _check_ids(name: str, ids: Any, vocab_size: int) -> None:
    known = _concrete(ids)
    if known is not None and known.size and not (known.min() >= 0 and known.max() < vocab_size):
        wrong = known.min() if known.min() < 0 else known.max()
        raise DataError(
            f"{name} has the token id {wrong}, and the model's vocabulary of {vocab_size} tokens is "
            f"0 to {vocab_size - 1}"
        )


def _concrete(x: Any) -> np.ndarray | None:
    """The values of x, or None under `jit` and where other processes hold some of them."""
    if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)
