"""Tokenizers: text to ids and back, over the `tokenizers` library.

    byte_tokenizer()                    256 bytes and the end of text; nothing to train
    train_bpe(texts, 4096)              byte-level BPE
    load_tokenizer("folder")            any folder with a tokenizer.json

A document is ordinary text from its first to its last byte: when `<|endoftext|>` is written in it, it is
spelled out, never turned into the special token. The end of text is added by the packer alone, as `eos_id`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from lmx.core import hub
from lmx.core.errors import DataError, FolderError, nearest
from lmx.models import generation
from lmx.models.filenames import GENERATION

END_OF_TEXT = "<|endoftext|>"
KNOWN_EOS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "[SEP]", "<eos>")

# GPT-4's pattern, with at most two digits a token since vocabularies here are small. A line's end closes a
# token and the blanks before a word stay together but for the last, so that indentation becomes one token.
WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
SIGNS_AND_BLANKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

# The library warns when a process forks after it used threads, unless this is set. A forked child has none of
# those threads and would wait for them for ever, so there it works on one.
if "TOKENIZERS_PARALLELISM" not in os.environ:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


class Tokenizer:
    """Text to ids and back. `eos_token` ends a text; without it the known names are tried.

    eos_ids: the tokens at which a model that generates is to stop, where they are others than that one.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, eos_token: str | None = None, eos_ids: Sequence[int] | None = None
    ):
        backend.no_truncation()  # a tokenizer.json may ask for either, and both would change the text
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        self.eos_token = _find_eos(backend, eos_token)
        self.eos_ids = (self.eos_id,) if eos_ids is None else tuple(eos_ids)

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the rows an embedding needs (ids may have holes)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def eos_id(self) -> int:
        """The id that ends a text and, in a packed stream, begins the next."""
        return self.backend.token_to_id(self.eos_token)

    @cached_property
    def prefix_ids(self) -> list[int]:
        """What a text begins with: what the tokenizer's own template puts before one (Llama's <s>), else eos_id."""
        ids = self.backend.encode("").ids
        return (ids[:-1] if ids[-1:] == [self.eos_id] else ids) or [self.eos_id]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's JSON: equal for equal tokenizers."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text; no special token is added, and none is recognised in it.

        With `special` those written in it are: for text that a program made, such as a rendered chat.
        """
        backend = self._recognising if special else self.backend
        return backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text in which special tokens are recognised, and (begin, end) in characters of each."""
        encoding = self._recognising.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @cached_property
    def _recognising(self) -> tokenizers.Tokenizer:
        """A copy of the backend that finds special tokens in text: a switch on the one would reach other threads."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        return [
            encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def encode_framed(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """The ids of each text within the special tokens that the tokenizer puts around one ([CLS] and [SEP], say).

        A text is cut at its end so that there are at most `max_length` ids, special tokens included. Raises DataError
        if they leave no room for text.
        """
        special = self.backend.num_special_tokens_to_add(False)
        if max_length is not None and max_length <= special:
            raise DataError(f"max_length {max_length} leaves no room beside {special} special tokens; give more.")
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        for encoding in encodings if max_length is not None else ():
            encoding.truncate(max_length - special)
        return [self.backend.post_process(encoding).ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json (the end of text), as Hugging Face reads them, and where
        others than that end a text generation_config.json, unless one is there."""
        folder = Path(folder)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
            (folder / "tokenizer_config.json").write_text(
                json.dumps(config, indent=2) + "\n", encoding="utf-8"
            )
            if self.eos_ids != (self.eos_id,) and not (folder / GENERATION).exists():
                text = json.dumps({"eos_token_id": list(self.eos_ids)}, indent=2)
                (folder / GENERATION).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise FolderError(f"cannot write a tokenizer to {str(folder)!r}: {error.strerror}.") from error


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 is the end of text. Loses nothing."""
    backend = _byte_level(
        models.BPE(vocab={name: byte for byte, name in enumerate(_byte_names())}, merges=[])
    )
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2). Loses nothing.

    Id 0 is the end of text, 1 to 256 are bytes, the rest merges. A pair must occur twice to be merged, so a
    short text gives fewer than `vocab_size` ids. The same texts give the same tokenizer. Raises DataError if
    `vocab_size` has no room for the bytes.
    """
    if vocab_size < 257:
        raise DataError(
            f"vocab_size {vocab_size} has no room for 256 bytes and {END_OF_TEXT}; give at least 257."
        )
    backend = _byte_level(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{WORDS}|{SIGNS_AND_BLANKS}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_byte_names(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def load_tokenizer(where: str | Path, eos_token: str | None = None) -> Tokenizer:
    """Load a tokenizer.json, the one in a folder, or that of a model of the hub ("owner/name", "hf:name").

    The end of text is `eos_token`, else what tokenizer_config.json beside it says, else the first known name
    in the vocabulary. Generating stops at the tokens that generation_config.json beside it names, else the config.json
    that the model came with, else at the end of text; at `eos_token` alone if that is given. Of a model of the hub only
    the tokenizer's files are fetched.

    Raises FolderError if there is no such file and DataError if it is broken or its end of text unknown.
    """
    where = hub.folder(where, hub.TOKENIZER)
    path = where / "tokenizer.json" if where.is_dir() else where
    if not path.is_file():
        raise FolderError(_nothing_there(where))
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise DataError(
            f"{str(path)!r} is not a tokenizer that the tokenizers library reads ({error})."
        ) from error
    try:
        if eos_token:
            return Tokenizer(backend, eos_token)
        ends = generation.eos_ids(path.parent)
        return Tokenizer(backend, _configured_eos(path.parent / "tokenizer_config.json"), ends)
    except DataError as error:
        raise DataError(f"{str(path)!r}: {error}") from error


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise DataError if the tokenizer has ids for which a model of `vocab_size` has no embedding."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {vocab_size} rows. "
            "Use the tokenizer the model was trained with, or a model with vocab_size of at least "
            f"{tokenizer.vocab_size}."
        )


def _find_eos(backend: tokenizers.Tokenizer, eos_token: str | None) -> str:
    if eos_token is not None:
        if backend.token_to_id(eos_token) is None:
            close = nearest(eos_token, backend.get_vocab())
            raise DataError(f"the tokenizer has no token {eos_token!r} to end a text with{close}")
        return eos_token
    for name in KNOWN_EOS:
        if backend.token_to_id(name) is not None:
            return name
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    raise DataError(
        f"which token ends a text is unknown: none of {', '.join(KNOWN_EOS)} is in the vocabulary. "
        f"Name it with eos_token= (special tokens here: {', '.join(special) or 'none'})."
    )


def _configured_eos(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{str(path)!r} is not a JSON object ({error}).") from error
    return token.get("content") if isinstance(token, dict) else token


def _nothing_there(where: Path) -> str:
    if where.is_dir():
        names = ", ".join(sorted(os.listdir(where))[:8]) or "nothing"
        return f"the folder {str(where)!r} has no tokenizer.json (it holds: {names}). Give one that has."
    beside = os.listdir(where.parent) if where.parent.is_dir() else []
    close = nearest(where.name, beside) or "."
    return f"there is no tokenizer {str(where)!r}{close} Give a folder with a tokenizer.json."


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_names() -> list[str]:
    """The printable character that stands for each byte in a vocabulary (GPT-2's bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
