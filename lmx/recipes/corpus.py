"""A run's text: read, split and tokenised once, kept in the run's folder, and opened again when the run goes on.

It is a stream of documents, or for the objectives "pairs" and "chat" examples from files of their own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmx import data, evaluate
from lmx.core.errors import DataError, FolderError, nearest
from lmx.data import ChatTemplate, Document, Examples, TokenCache, Tokenizer, special_tokens
from lmx.hf.files import TokenizerFiles
from lmx.models.filenames import CONFIG
from lmx.recipes import models, objectives
from lmx.recipes.options import TrainOptions
from lmx.train.progress import si

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised text in three splits, of one kind, and what lzma makes of the test split of a stream."""

    tokenizer: Tokenizer
    caches: dict[str, TokenCache]  # of documents; or
    examples: dict[str, Examples]  # of pairs or conversations
    lzma: dict[str, float]  # bits per byte of the test split, "all" and by domain
    tokenizer_files: TokenizerFiles  # the same tokenizer, with its chat template where it has one


def choose_tokenizer(name: str, vocab_size: int, texts: Callable[[], list[str]]) -> Tokenizer:
    """The tokenizer "bpe" (trained on the texts), "byte", or that of a folder. Raises DataError or FolderError."""
    if name == "bpe":
        return data.train_bpe(texts(), vocab_size)
    if name == "byte":
        return data.byte_tokenizer()
    if not Path(name).expanduser().exists() and (hint := nearest(name, ("bpe", "byte"))):
        raise DataError(f"no tokenizer {name!r}, there are bpe, byte, and folders with a tokenizer.json{hint}")
    return models.load_tokenizer(name)


def prepare(options: TrainOptions, folder: Path, console: Console) -> None:
    """Read the text, split it, train or load the tokenizer, and put everything tokenised in `folder`."""
    if objectives.kind(options.objective).examples:
        _prepare_examples(options, folder, console)
    else:
        _prepare_stream(options, folder, console)


def _prepare_stream(options: TrainOptions, folder: Path, console: Console) -> None:
    with console.status(f"reading {escape(options.data)}"):
        documents = data.deduplicate(data.read(options.data))
        splits = data.split(documents)
    show_sizes(splits, console)
    made = _tokenizer(options, lambda: [d.text for d in splits["train"]], console)
    objectives.learnt(options.objective, made)  # or it says what the tokenizer lacks
    with console.status("tokenising"):
        caches = {name: data.build_cache(splits[name], made, folder / "tokens") for name in SPLITS}
    tokens = caches["train"].num_tokens
    size = sum(caches["train"].domain_bytes.values()) / tokens
    console.print(
        f"{made.vocab_size} kinds of token; {si(tokens)}tokens to train on, of {size:.2f} bytes on average",
        highlight=False,
        soft_wrap=True,
    )
    lzma = {}
    if options.objective == "causal":
        with console.status("compressing the test split with lzma"):
            lzma = evaluate.lzma_bits_per_byte(by_domain(splits["test"]))
    _save_tokenizer(options, made, folder / "tokenizer")
    _write(folder, {"caches": {name: cache.folder.name for name, cache in caches.items()}, "lzma": lzma})


def _prepare_examples(options: TrainOptions, folder: Path, console: Console) -> None:
    """Examples are split by what is asked (the source, the first message), so that no two splits ask the same."""
    o, chat = options, options.objective == "chat"
    template = models.load_template(o.init or o.tokenizer) if chat else None
    with console.status(f"reading {escape(o.data)}"):
        read = read_conversations(o.data) if chat else read_pairs(o.data)
        splits = data.split_by(read, (lambda turns: json.dumps(turns[0])) if chat else (lambda pair: pair.source))
    made = _tokenizer(o, lambda: [text for pair in splits["train"] for text in pair], console)
    with console.status("tokenising"):
        examples = {name: _encode(o, splits[name], made, template) for name in SPLITS}
    counts = ", ".join(f"{len(examples[name])} ({name})" for name in SPLITS)
    long = sum(int((one.lengths > o.length).sum()) for one in examples.values())
    left_out = f"; {long} of them are longer than {o.length} tokens and left out" if long else ""
    targets = si(int(examples["train"].learnt.sum()))
    console.print(
        f"{made.vocab_size} kinds of token; {counts} {'conversations' if chat else 'pairs'}, {targets}tokens to "
        f"learn{left_out}",
        highlight=False,
        soft_wrap=True,
    )
    _save_tokenizer(o, made, folder / "tokenizer")
    for name, one in examples.items():
        data.save_examples(one, folder / f"{name}.safetensors")
    _write(folder, {"examples": [f"{name}.safetensors" for name in SPLITS]})


def _tokenizer(options: TrainOptions, texts: Callable[[], list[str]], console: Console) -> Tokenizer:
    name = options.tokenizer if options.init is None else options.init
    with console.status("training the tokenizer" if name == "bpe" else "loading the tokenizer"):
        made = choose_tokenizer(name, options.vocab_size, texts)
    return made if options.init is not None else objectives.complete(options.objective, made)


def _encode(options: TrainOptions, read: list, tokenizer: Tokenizer, template: ChatTemplate | None) -> Examples:
    if template is not None:
        return data.encode_conversations(read, tokenizer, template)
    start = None if options.init is None else models.decoder_start(options.init, tokenizer)
    return data.encode_pairs(read, tokenizer, start_id=start, source_start_id=special_tokens.first_id(tokenizer))


def _save_tokenizer(options: TrainOptions, made: Tokenizer, place: Path) -> None:
    """A tokenizer that came with a model, or with a template, with all the files that it had there, unchanged; what the
    model's config says of its tokens, such as which end a text, is read from beside them."""
    if options.init is None and options.objective != "chat":
        made.save(place)
        return
    name = options.init or options.tokenizer
    place.mkdir(parents=True, exist_ok=True)
    models.tokenizer_files(name).save(place)
    if (origin := models.came_from(name)) is not None:
        (place / CONFIG).write_text(json.dumps(origin), encoding="utf-8")


def read_pairs(source: str) -> list[data.Pair]:
    """Pairs from .jsonl files (keys "source" and "target"), by commas, or from two text files, line i of one for line i
    of the other. Raises DataError for anything else, and as `lmx.data.pairs`."""
    names = _names(source)
    if all(name.removesuffix(".gz").endswith(".jsonl") for name in names):
        return [pair for name in names for pair in data.read_json_pairs(name)]
    if len(names) != 2 or any(name.removesuffix(".gz").endswith(".jsonl") for name in names):
        raise DataError(
            f"the objective 'pairs' learns from --data FILE.jsonl with the keys source and target, or from two text "
            f"files of as many lines, --data SOURCE,TARGET; not from {source!r}"
        )
    return data.read_pairs(*names)


def read_conversations(source: str) -> list[list[data.Message]]:
    """Conversations from .jsonl files, by commas. Raises DataError as `lmx.data.conversations`."""
    names = _names(source)
    if not all(name.removesuffix(".gz").endswith(".jsonl") for name in names):
        raise DataError(
            "the objective 'chat' learns from --data FILE.jsonl with a list of messages under the key messages in each "
            f"line, not from {source!r}"
        )
    return [turns for name in names for turns in data.read_conversations(name)]


def _names(source: str) -> list[str]:
    return [name.strip() for name in source.split(",") if name.strip()]


def _write(folder: Path, about: dict[str, Any]) -> None:
    (folder / "corpus.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def reopen(folder: Path) -> Corpus:
    """What `prepare` put in `folder`. Raises FolderError if it is not whole."""
    try:
        about = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(
            f"{folder} holds no prepared text to go on with ({error}); start over with --overwrite"
        ) from error
    caches = {name: data.open_cache(folder / "tokens", key) for name, key in about.get("caches", {}).items()}
    examples = {Path(name).stem: data.open_examples(folder / name) for name in about.get("examples", ())}
    place = folder / "tokenizer"
    return Corpus(data.load_tokenizer(place), caches, examples, about.get("lzma", {}), TokenizerFiles(place))


def by_domain(documents: list[Document]) -> dict[str, list[str]]:
    """The texts of each domain."""
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document.domain, []).append(document.text)
    return texts


def show_sizes(splits: dict[str, list[Document]], console: Console) -> None:
    """A table of documents and bytes by domain and split."""
    table = Table("domain", *(f"{name} (documents)" for name in splits), box=None, header_style="")
    cells: dict[str, list[str]] = {}
    for row in data.summary(splits):
        cells.setdefault(row.domain, []).append(f"{si(row.bytes)}B ({row.documents})")
    for domain, sizes in cells.items():
        table.add_row(escape(domain), *sizes)
    console.print(table)
