"""Chats as text: messages rendered by a tokenizer's own chat template, and where the assistant's turns lie in it.

    template = load_template("folder")          # chat_template.jinja, or what tokenizer_config.json holds
    render(messages, template)                  # the prompt for the assistant's next turn
    encode_chat(tokenizer, messages, template)  # (ids, mask of what the assistant said): to train on

Messages are {"role": ..., "content": ...}. Templates are Jinja2 programs by strangers: they run in its sandbox and
see plain JSON data only. Needs the extra `chat` (jinja2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmx.core.errors import DataError, FolderError, nearest
from lmx.data.jinja import render_jinja
from lmx.data.tokenizers import Tokenizer

Message = Mapping[str, Any]
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read the first or second
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja2 program and the special tokens that it may write."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # by name: bos_token, eos_token, ...


def load_template(where: str | Path, name: str | None = None) -> ChatTemplate:
    """The chat template of a folder: chat_template.jinja, else "chat_template" in tokenizer_config.json.

    `name` picks one of several, such as "tool_use"; without it the one called "default". Raises FolderError where
    there is none, DataError for files that cannot be read or a name that there is not.
    """
    folder = Path(where).expanduser()
    config = _read_json(folder / "tokenizer_config.json")
    tokens = {key: config.get(key) for key in SPECIAL}
    tokens = {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items() if token}
    found: dict[str, str] = {}
    stored = config.get("chat_template")
    if isinstance(stored, str):
        found["default"] = stored
    elif isinstance(stored, list):
        found |= {entry["name"]: entry["template"] for entry in stored}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found |= {key: path.read_text(encoding="utf-8") for key, path in files.items() if path.is_file()}
    if not found:
        raise FolderError(
            f"{str(where)!r} has no chat template (no chat_template.jinja, and none in tokenizer_config.json): it is "
            "not a chat model, or the template was left behind; give it plain text, or put its template there"
        )
    wanted = name or "default"
    if wanted not in found:
        hint = nearest(wanted, found)
        raise DataError(f"{str(where)!r} has no chat template {wanted!r}, but {', '.join(found)}{hint}")
    return ChatTemplate(found[wanted], tokens)


def render(
    messages: Sequence[Message],
    template: ChatTemplate | str,
    add_generation_prompt: bool = True,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The text of a chat as the model was trained to read it: what transformers' `apply_chat_template` gives.

    add_generation_prompt: end with what opens the assistant's next turn. tools: JSON schemas of functions.
    variables: anything else the template reads, such as bos_token (over the template's own special tokens),
    enable_thinking, or strftime_now for a fixed date.

    Raises DataError for messages that the template refuses or that are not plain data, and for a template that
    cannot run; ConfigError where jinja2 is not installed.
    """
    return _render(messages, template, add_generation_prompt, tools, documents, variables)[0]


def assistant_spans(
    messages: Sequence[Message], template: ChatTemplate | str, **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """(the text of a finished chat, (begin, end) in characters of each of the assistant's turns in it).

    A template with {% generation %} blocks marks them itself (transformers' return_assistant_tokens_mask). Of
    another one, a turn is what rendering adds between the prompt for it and the chat that ends with it: its
    content and what closes it, without blank space after that. `options` as in `render`.

    Raises DataError, naming the turn, where a template writes earlier turns differently once others follow: then
    no text holds what the model would have read when it answered.
    """
    source = template.source if isinstance(template, ChatTemplate) else template
    variables = {key: value for key, value in options.items() if key not in ("tools", "documents")}
    text, spans = _render(messages, template, False, options.get("tools"), options.get("documents"), variables)
    if GENERATION.search(source):
        return text, [span for span in spans if span[0] < span[1]]
    return text, [
        _turn(messages, i, template, text, options) for i, m in enumerate(messages) if m.get("role") == "assistant"
    ]


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], template: ChatTemplate | str, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(ids (t,) int32, mask (t,) bool) of a finished chat: True where the assistant is speaking.

    Special tokens that the template writes are encoded as such, and no others are added. A token that a turn
    shares with its surroundings belongs to the turn. Raises as `assistant_spans`.
    """
    text, spans = assistant_spans(messages, template, **options)
    ids, offsets = tokenizer.encode_with_offsets(text)
    begins, ends = np.array(offsets, int).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    for begin, end in spans:
        (inside,) = np.nonzero((begins < end) & (ends > begin))
        if inside.size:
            mask[inside[0] : inside[-1] + 1] = True  # blanks may have no width of their own
    return np.array(ids, np.int32), mask


def _turn(
    messages: Sequence[Message], i: int, template: ChatTemplate | str, text: str, options: dict[str, Any]
) -> tuple[int, int]:
    """Where turn i lies in the text of all messages, by rendering the chat up to it."""
    before = render(messages[:i], template, True, **options) if i else None
    after = render(messages[: i + 1], template, False, **options)
    if before is None or not after.startswith(before) or not text.startswith(after):
        why = "the chat up to it, as this template renders it, is not how the whole chat begins"
        why = "no turn comes before it" if before is None else why
        raise DataError(
            f"where turn {i} (the assistant's) lies cannot be told: {why}. "
            "Use a template that marks the assistant's words with {% generation %}"
        )
    said = after[len(before) :]
    content = messages[i].get("content")
    trimmed = said.rstrip()
    closed = not (isinstance(content, str) and trimmed.endswith(content.rstrip()))
    return len(before), len(before) + len(trimmed if closed else said)


def _render(
    messages: Sequence[Message],
    template: ChatTemplate | str,
    add_generation_prompt: bool,
    tools: Any,
    documents: Any,
    variables: dict[str, Any],
) -> tuple[str, list[tuple[int, int]]]:
    template = ChatTemplate(template) if isinstance(template, str) else template
    if isinstance(messages, str) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise DataError(
            'a chat is a list of at least one message such as {"role": "user", "content": "Hello"}; got '
            f"{messages!r}"
        )
    known = dict(
        messages=[_normal(message) for message in messages],
        tools=_plain(tools),
        documents=_plain(documents),
        add_generation_prompt=add_generation_prompt,
    )
    clock = {"strftime_now": variables["strftime_now"]} if callable(variables.get("strftime_now")) else {}
    others = {key: _plain(value) for key, value in variables.items() if key not in clock}
    return render_jinja(template.source, {**template.special_tokens, **others, **clock, **known})


def _normal(message: Message) -> dict[str, Any]:
    """A message without what is None, which templates would write out, and with reasoning under both its names."""
    plain = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value rebuilt of JSON's types, so that a template meets no object with methods. Raises DataError."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise DataError(
        f"messages, tools and variables of a chat template are plain data (text, numbers, lists, dicts); got a "
        f"{type(value).__name__}" + (": give its JSON schema" if callable(value) else "")
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not a JSON object ({error}).") from error
