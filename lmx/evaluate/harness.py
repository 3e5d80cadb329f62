"""Any language model with a tokenizer as a model of lm-evaluation-harness, which has the tasks that papers report.

    import lm_eval                                             # the extra `eval`
    model = lmx.evaluate.harness_model(lmx.load(folder), lmx.load_tokenizer(folder))
    lm_eval.simple_evaluate(model, tasks=["lambada_openai", "piqa"])["results"]

Texts become tokens as for the harness's own "hf" models: special tokens are recognised, and what the tokenizer's
template puts before a text is put there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from lmx.core.errors import ConfigError, nearest
from lmx.data import special_tokens
from lmx.data.chat import ChatTemplate, render
from lmx.data.tokenizers import Tokenizer, check_fits
from lmx.decode.scoring import score_continuations, score_rolling
from lmx.decode.text import generate_text
from lmx.models.protocol import LanguageModel

MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one thing
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def harness_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    template: ChatTemplate | None = None,
    seed: int = 0,
) -> Any:
    """An `lm_eval.api.model.LM`: what `lm_eval.simple_evaluate` and `lm_eval.evaluate` take.

    max_length:     the most tokens that the model is given at once; its own, or 2048 where it has no limit. What is
                    longer loses its beginning, but for texts of which every token counts: they go in windows.
    max_new_tokens: of a generated text where the task does not say. template: for tasks with apply_chat_template=True.
    seed:           of tasks that sample.
    Raises ConfigError where lm_eval is not installed, and DataError for a tokenizer that does not fit the model.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ConfigError("lm-evaluation-harness is not installed: pip install 'lmx[eval]'") from error
    check_fits(tokenizer, model.vocab_size)
    made = type("LmxModel", (Harnessed, TemplateLM), {})()
    made.model, made.own, made.template = model, tokenizer, template
    made.max_length = max_length or getattr(model, "max_length", None) or 2048
    made.batch_size, made.max_new_tokens, made.seed = batch_size, max_new_tokens, seed
    return made


class Harnessed:
    """The methods that lm_eval calls; requests have `args`, and answers come in their order."""

    model: LanguageModel
    own: Tokenizer
    template: ChatTemplate | None
    max_length: int
    batch_size: int
    max_new_tokens: int
    seed: int

    @property
    def eot_token_id(self) -> int:
        return self.own.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text is conditioned on where nothing comes before it."""
        return self.own.prefix_ids[0]

    @property
    def tokenizer_name(self) -> str:
        return self.own.fingerprint[:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids, first = self.own.encode(string, special=True), special_tokens.first_id(self.own)
        return ids if first is None or add_special_tokens is False or ids[:1] == [first] else [first, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether it is the likeliest) of (texts, context, continuation)."""
        texts, contexts, continuations = zip(*requests, strict=True)
        how = dict(batch_size=self.batch_size, max_length=self.max_length)
        scores = score_continuations(self.model, contexts, continuations, **how)
        found = [(float(sum_), bool(same)) for sum_, same in zip(scores.log_probs, scores.greedy, strict=True)]
        for pair, answer in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p(text) in nats of (text,), however long."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        how = dict(prefix_id=self.prefix_token_id, max_length=self.max_length, batch_size=self.batch_size)
        found = [float(x) for x in score_rolling(self.model, texts, **how).log_probs]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuations of (context, how): {"until": texts to stop at, "max_gen_toks": ..., "do_sample": ...}."""
        asked: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            asked.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for spelled, members in asked.items():
            most, how = generation(json.loads(spelled), self.max_new_tokens)
            prompts = Prompts(self, self.max_length - most)
            for number, rows in enumerate(self._batches([requests[i].args[0] for i in members])):
                filled = [requests[members[i]].args[0] for i in rows] + [""] * (self.batch_size - len(rows))
                key = jax.random.fold_in(jax.random.key(self.seed), number)
                made = generate_text(
                    self.model, prompts, filled, special=True, max_new_tokens=most, key=key, **how
                )
                for i, text in zip(rows, made, strict=False):
                    texts[members[i]] = text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _batches(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The numbers of texts of about one length, the longest first: what does not fit fails at once."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        return (order[begin : begin + self.batch_size] for begin in range(0, len(order), self.batch_size))

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render(chat_history, self._template(), add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._template().source if chat_template else ""

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise ConfigError("a chat was asked for: give harness_model its template=lmx.data.load_template(folder)")
        return self.template


class Prompts:
    """A tokenizer for `generate_text`: prompts as the harness encodes them, the last `most` tokens of each."""

    def __init__(self, harnessed: Harnessed, most: int) -> None:
        if most < 1:
            raise ConfigError(
                f"a text of {harnessed.max_length - most} new tokens leaves no room for a prompt within max_length "
                f"{harnessed.max_length}; give a larger one, or ask for fewer"
            )
        self.harnessed, self.most = harnessed, most
        self.vocab_size, self.eos_id = harnessed.own.vocab_size, harnessed.own.eos_id
        self.decode = harnessed.own.decode

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return (self.harnessed.tok_encode(text) or [self.harnessed.prefix_token_id])[-self.most :]


def generation(asked: dict[str, Any], max_new_tokens: int) -> tuple[int, dict[str, Any]]:
    """(most new tokens, options of `generate_text`) of what a task asks for. Raises ConfigError for unknown names."""
    asked = dict(asked)
    given = [asked.pop(name, None) for name in MOST]
    most = next((value for value in given if value is not None), max_new_tokens)
    until = asked.pop("until", None) or ()
    sampled = asked.pop("do_sample", None)
    how = {name: asked.pop(name) for name in SAMPLING if asked.get(name) is not None}
    if asked:
        raise ConfigError(
            f"a task asks for {', '.join(asked)}, which is unknown here; known are until, do_sample, "
            f"{', '.join((*MOST, *SAMPLING))}{nearest(next(iter(asked)), SAMPLING)}"
        )
    temperature = how.pop("temperature", 1.0 if sampled else 0.0)
    if sampled is False or temperature == 0:  # what filters samples has nothing to filter
        how = {name: value for name, value in how.items() if name == "repetition_penalty"}
        temperature = 0.0
    stop = tuple(text for text in ((until,) if isinstance(until, str) else until) if text)
    return most, {"stop": stop, "temperature": temperature, **how}
