"""Conversations to learn from: a .jsonl file of messages, and only what the assistant says weighs.

    conversations = read_conversations("chat.jsonl")           # {"messages": [{"role": "user", "content": "..."}, ...]}
    examples = encode_conversations(conversations, tokenizer, load_template("folder"))                       # chat.py
    batches = ExampleBatches(examples, 32, 512, packed=True)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmx.core.errors import DataError
from lmx.data.chat import ChatTemplate, Message, encode_chat
from lmx.data.examples import Example, Examples, gather
from lmx.data.files import missing, read_objects
from lmx.data.tokenizers import Tokenizer


def read_conversations(path: str | Path, key: str = "messages") -> list[list[Message]]:
    """The messages under a key of each line of a .jsonl or .jsonl.gz file.

    Raises FolderError for a file that is missing, and DataError, with the line, for messages without a role and a
    content (a null content, which goes with tool calls, is left as it is), and for a file without any.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise missing(path)
    found = []
    for where, row in read_objects(path):
        messages = row.get(key)
        if not isinstance(messages, list) or not messages:
            keys = ", ".join(map(repr, row)) or "none"
            raise DataError(f"{where}: there is no list of messages under {key!r} (keys found: {keys}). Name the key.")
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise DataError(f"{where}: message {number} needs a role and a content, it is {str(message)[:80]!r}.")
        found.append(messages)
    if not found:
        raise DataError(f"{str(path)!r} has no conversations; give one JSON object a line.")
    return found


def encode_conversations(
    conversations: Iterable[Sequence[Message]], tokenizer: Tokenizer, template: ChatTemplate | str, **options: Any
) -> Examples:
    """Conversations as examples, only the assistant's turns learnt; those in which it says nothing are left out.

    template, options: as in `chat.encode_chat`, which renders and encodes each.
    Raises DataError, with the conversation's number, for one that the template refuses, and if nothing is left.
    """
    examples = []
    for number, messages in enumerate(conversations):
        try:
            ids, learnt = encode_chat(tokenizer, messages, template, **options)
        except DataError as error:
            raise DataError(f"conversation {number}: {error}") from error
        if learnt[1:].any():
            examples.append(Example(ids, learnt))
    if not examples:
        raise DataError("no conversation has an assistant's turn, so there is nothing to learn; check the roles.")
    return gather(examples)
