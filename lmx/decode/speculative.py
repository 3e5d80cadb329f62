"""Speculative decoding: a draft proposes several tokens, the target checks all of them in one step.

Exact: tokens are distributed as `generate` draws them, whatever the draft (Leviathan et al. 2023, arXiv:2211.17192,
Algorithm 1; Chen et al. 2023, arXiv:2302.01318). A proposal x that was drawn from q is accepted with probability
min(1, p(x) / q(x)), p being the target's distribution after temperature and filters; the first that is not is
replaced by a draw from the excess max(0, p - q), normalised, and if all k are accepted one more token is drawn from
p. Greedy is the case where p is one token. Rows accept different numbers of tokens and go on from where they stand.

Cost: if a share a of proposals is accepted, a step of the target gives (1 - a^(k+1)) / (1 - a) tokens on average
(Leviathan et al., equation 1) and reads k + 1 positions instead of one, which costs about one step while the target
is bound by reading its weights. With c the cost of a draft's step over the target's, the text is made
(1 - a^(k+1)) / ((1 - a) (k c + 1)) times as fast (Theorem 3.8).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.errors import ConfigError
from lmx.decode import stopping
from lmx.decode.drafts import Draft, ModelDraft, Proposal, seen_tokens
from lmx.decode.request import Request, check
from lmx.decode.rows import for_steps, place_rows, prefill, rowwise
from lmx.decode.sampling import Sampling, distribution, sample
from lmx.models.protocol import LanguageModel, take_token


class Speculated(NamedTuple):
    """What `speculate` returns: `generate`'s result, and how it went. `n` is max_new_tokens."""

    tokens: Array  # (b, n) int32: the new tokens, `pad_id` after the end of a row
    lengths: Array  # (b,) int32: new tokens of each row, the end-of-sequence token or stop sequence included
    log_probs: Array  # (b, n) float32: log-probability under the model, before any filter; 0 after the end
    rounds: Array  # (b,) int32: steps of the target until the row ended; lengths / rounds is the gain
    proposed: Array  # (b,) int32: tokens proposed in those steps
    accepted: Array  # (b,) int32: those of them that stand in the text


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Written:
    """The text so far, all of it rows first; the states of the models are carried beside it."""

    text: Array  # (b, s) int32: prompt and new tokens, then anything
    lengths: Array  # (b,) int32: of prompt and new tokens
    made: Array  # (b,) int32: new tokens
    log_probs: Array  # (b, n) float32
    recent: Array | None  # (b, w) int32: the newest new tokens, if there is anything to stop at
    ended: Array  # (b,) bool
    rounds: Array  # (b,) int32
    proposed: Array  # (b,) int32
    accepted: Array  # (b,) int32


def speculate(
    model: LanguageModel,
    tokens: Array,
    *,
    draft: Draft | LanguageModel,
    max_new_tokens: int,
    lengths: Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    pad_id: int = 0,
    key: Array | None = None,
) -> Speculated:
    """`lmx.decode.generate`, several tokens a step: the same arguments, the same distribution.

    `draft` is a `ModelDraft` or `PromptLookup` (`lmx.decode.drafts`), anything else with the methods of `Draft`, or
    a language model, which then proposes 4 tokens a round. Greedy gives the tokens of `generate`, but where two
    tokens are as probable up to rounding; sampling gives other draws than `generate` from the same distribution.
    Needs room for the draft's num_tokens - 1 positions beyond the last new token.

    Raises what `generate` raises, and ConfigError for a model or draft that cannot rewind, a draft over another
    vocabulary, or one that proposes no token.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    request = Request(sampling, stopping.endings(eos_id, stop), pad_id, key)
    draft = draft if hasattr(draft, "propose") else ModelDraft(draft)
    k = draft.num_tokens
    if isinstance(k, bool) or not hasattr(k, "__index__") or k < 1:
        raise ConfigError(f"the draft's num_tokens is {k!r}; it must be a whole number, 1 or above")
    members = {"the model": model} | ({"the draft": draft.model} if isinstance(draft, ModelDraft) else {})
    prompts = []
    for name, member in members.items():
        if member.vocab_size != model.vocab_size:
            raise ConfigError(
                f"the draft's vocabulary has {member.vocab_size} tokens, the model's {model.vocab_size}: a draft must "
                "have the tokenizer and the vocabulary of the model it drafts for; or use PromptLookup"
            )
        prompts.append(check(member, tokens, lengths, max_new_tokens, request, drafted=k))
        _check_rewinds(name, member, prompts[-1][0].shape[0])
    shortest = min(prompts, key=lambda prompt: prompt[0].shape[1])  # a limited model cuts columns of padding off
    return _speculate(model, *shortest, draft, request, int(max_new_tokens))


def _check_rewinds(name: str, model: LanguageModel, rows: int) -> None:
    try:
        jax.eval_shape(lambda m: m.rewind(m.start(rows, 2), jnp.zeros((rows,), jnp.int32)), model)
    except (NotImplementedError, AttributeError) as error:
        raise ConfigError(
            f"{name}, a {type(model).__name__}, cannot rewind, and speculative decoding takes back the tokens that "
            "are not accepted: use generate, or a model that can"
        ) from error


@functools.partial(jax.jit, static_argnames="n")
def _speculate(
    model: LanguageModel, tokens: Array, lengths: Array | None, draft: Draft, request: Request, n: int
) -> Speculated:
    b = tokens.shape[0]
    model = for_steps(model, b * (draft.num_tokens + 1))  # positions count as rows
    if isinstance(draft, ModelDraft):
        draft = replace(draft, model=for_steps(draft.model, b))
    room = tokens.shape[1] + n + draft.num_tokens - 1
    state, _, real = prefill(model, tokens, lengths, room)
    begun = _begin(tokens, real, room, n, request)
    carry = (model.rewind(state, real - 1), draft.start(tokens, real, room), begun, jnp.zeros((), jnp.int32))

    def advance(carry: tuple[Any, Any, Written, Array]) -> tuple[Any, Any, Written, Array]:
        state, drafted, old, count = carry
        guess, check = (None, None) if request.key is None else _keys(request.key, count)
        proposal, drafted = draft.propose(drafted, old.text, old.lengths, request.sampling, guess)
        last = take_token(old.text, old.lengths - 1)
        fed = place_rows(jnp.concatenate([last[:, None], proposal.tokens], axis=1))  # (b, k + 1)
        log_probs, state = model.step(state, fed)
        seen = seen_tokens(old.text, old.lengths, model.vocab_size, request.sampling)
        new = rowwise(_settle, old, old, place_rows(log_probs), proposal, seen, check, request)
        return model.rewind(state, new.lengths - 1), drafted, new, count + 1

    end = jax.lax.while_loop(lambda carry: ~carry[2].ended.all(), advance, carry)[2]
    return rowwise(functools.partial(_result, pad_id=request.pad_id), _like(end), end)


def _keys(key: Array, count: Array) -> tuple[Array, Array]:
    """Of one round: for the draft, and for the check of what it proposed."""
    guess, check = jax.random.split(jax.random.fold_in(key, count))
    return guess, check


def _begin(tokens: Array, lengths: Array, room: int, n: int, request: Request) -> Written:
    b, t = tokens.shape
    zeros = place_rows(jnp.zeros((b,), jnp.int32))
    return Written(
        text=place_rows(jnp.pad(tokens, ((0, 0), (0, room - t)))),
        lengths=lengths,
        made=zeros,
        log_probs=place_rows(jnp.zeros((b, n), jnp.float32)),
        recent=None if request.endings is None else place_rows(stopping.newest(b, request.endings)),
        ended=place_rows(jnp.zeros((b,), bool)),
        rounds=zeros,
        proposed=zeros,
        accepted=zeros,
    )


def _settle(
    old: Written, log_probs: Array, proposal: Proposal, seen: Array | None, key: Array | None, request: Request
) -> Written:
    """The text after one round, given the target's log_probs (b, k + 1, v) at the last token and every proposal."""
    k, n = proposal.tokens.shape[1], old.log_probs.shape[1]
    final = _distributions(log_probs, proposal.tokens, seen, request.sampling)
    good, token = verify(final, proposal, key, request.sampling.greedy)
    guesses = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    fresh = jnp.where(jnp.arange(k + 1) < good[:, None], guesses, token[:, None])  # (b, k + 1)
    taken = jnp.minimum(good + 1, n - old.made)  # of the fresh ones
    ended, recent = taken + old.made >= n, old.recent
    if recent is not None:
        taken, stopped, recent = _stop(recent, fresh, taken, request.endings)
        ended = ended | stopped
    taken = jnp.where(old.ended, 0, taken)
    live = (~old.ended).astype(jnp.int32)
    return Written(
        text=_insert(old.text, old.lengths, fresh, taken),
        lengths=old.lengths + taken,
        made=old.made + taken,
        log_probs=_insert(old.log_probs, old.made, take_token(log_probs, fresh), taken),
        recent=recent,
        ended=ended | old.ended,
        rounds=old.rounds + live,
        proposed=old.proposed + live * proposal.count,
        accepted=old.accepted + jnp.minimum(good, taken),
    )


def _distributions(log_probs: Array, proposed: Array, seen: Array | None, sampling: Sampling) -> Array:
    """What the next token is drawn from at each of (b, k + 1) positions: log-probabilities (b, k + 1, v).

    Greedy: what the most probable token is taken of.
    """
    if seen is None and sampling.greedy:
        return log_probs
    if seen is None:
        return jax.vmap(lambda x: distribution(x, sampling), in_axes=1, out_axes=1)(log_probs)
    hot = jax.nn.one_hot(proposed, seen.shape[-1], dtype=bool)  # (b, k, v)
    before = jnp.concatenate([seen[:, None], seen[:, None] | (jnp.cumsum(hot, axis=1) > 0)], axis=1)
    choose = lambda x, seen: distribution(x, sampling, seen)  # noqa: E731
    return jax.vmap(choose, in_axes=1, out_axes=1)(log_probs, before)


def verify(final: Array, proposal: Proposal, key: Array | None, greedy: bool) -> tuple[Array, Array]:
    """How many proposals of each row are accepted (b,), and the token (b,) that follows them.

    final (b, k + 1, v): the target's log-probabilities after temperature and filters, at each proposal and one more.
    Accepted tokens and the one after them are distributed as if drawn from `final` one by one.
    """
    (b, k), v = proposal.tokens.shape, final.shape[-1]
    meant = jnp.arange(k) < proposal.count[:, None]  # (b, k)
    if greedy:
        best = jnp.argmax(final, axis=-1).astype(jnp.int32)  # (b, k + 1)
        good = _leading(meant & (best[:, :k] == proposal.tokens))
        return good, take_token(best, good)
    p = jnp.exp(final)
    if proposal.log_probs is None:
        q = jax.nn.one_hot(proposal.tokens, v, dtype=p.dtype)
    else:
        q = jnp.exp(proposal.log_probs)
    accept, redraw = jax.random.split(key)
    chances = jax.random.uniform(accept, (b, k)) * take_token(q, proposal.tokens)
    good = _leading(meant & (chances < take_token(p[:, :k], proposal.tokens)))
    q = jnp.pad(q * meant[..., None], ((0, 0), (0, 1), (0, 0)))  # nothing was proposed after the last
    here = (jnp.arange(k + 1) == good[:, None])[..., None]  # (b, k + 1, 1)
    p, q = (jnp.sum(jnp.where(here, x, 0), axis=1) for x in (p, q))  # (b, v)
    excess = jnp.maximum(p - q, 0)
    excess = jnp.where(excess.sum(-1, keepdims=True) > 0, excess, p)  # p = q up to rounding: nothing is in excess
    return good, sample(redraw, jnp.log(excess))


def _leading(good: Array) -> Array:
    """How many of (b, k) hold before the first that does not: (b,) int32."""
    return jnp.sum(jnp.cumprod(good.astype(jnp.int32), axis=1), axis=1)


def _stop(recent: Array, fresh: Array, taken: Array, table: Array) -> tuple[Array, Array, Array]:
    """Cut rows at the first ending in their first taken (b,) fresh tokens (b, k + 1).

    Returns (tokens taken (b,), whether an ending was met (b,), the newest tokens (b, w) then).
    """
    w, count = recent.shape[1], fresh.shape[1]
    joined = jnp.concatenate([recent, fresh], axis=1)
    windows = jnp.stack([joined[:, j : j + w] for j in range(count + 1)], axis=1)  # (b, k + 2, w)
    ends = jax.vmap(lambda x: stopping.ends(x, table), in_axes=1, out_axes=1)(windows[:, 1:])
    ends = ends & (jnp.arange(count) < taken[:, None])
    stopped = ends.any(axis=1)
    taken = jnp.where(stopped, jnp.argmax(ends, axis=1) + 1, taken)
    return taken, stopped, jax.vmap(lambda rows, at: rows[at])(windows, taken)


def _insert(values: Array, begin: Array, fresh: Array, count: Array) -> Array:
    """values (b, s) with the first count (b,) of fresh (b, m) from place begin (b,) on."""

    def row(values: Array, begin: Array, fresh: Array, count: Array) -> Array:
        at = jnp.arange(values.size) - begin
        return jnp.where((at >= 0) & (at < count), fresh[jnp.clip(at, 0, fresh.size - 1)], values)

    return jax.vmap(row)(values, begin, fresh, count)


def _result(end: Written, pad_id: int | Array) -> Speculated:
    n = end.log_probs.shape[1]
    new = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, n))(end.text, end.lengths - end.made)
    tokens = jnp.where(jnp.arange(n) < end.made[:, None], new, pad_id)
    return Speculated(tokens, end.made, end.log_probs, end.rounds, end.proposed, end.accepted)


def _like(end: Written) -> Speculated:
    return Speculated(end.log_probs, end.made, end.log_probs, end.rounds, end.proposed, end.accepted)
