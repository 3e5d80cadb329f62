"""Floor 3, data: text in, batches out.

    documents = deduplicate(read("local"))                     # sources.py, files.py, local.py, documents.py
    splits = split(documents)
    tokenizer = train_bpe((d.text for d in splits["train"]), 4096)                             # tokenizers.py
    cache = build_cache(splits["train"], tokenizer, "cache")                                    # packing.py
    batch = Batches(cache, batch_size=32, length=256, seed=0).at(step)                # windows.py, batches.py

What is learnt from the stream is an objective (objectives.py, spans.py). Pairs of texts and conversations are examples
of their own (examples.py, pairs.py, conversations.py), in batches of the same kind (example_batches.py).

All of it is numpy on the host; nothing here computes with jax.
"""

from lmx.data.batches import Batches
from lmx.data.chat import ChatTemplate, Message, assistant_spans, encode_chat, load_template, render
from lmx.data.conversations import encode_conversations, read_conversations
from lmx.data.documents import Document, SummaryRow, deduplicate, split, split_by, summary
from lmx.data.example_batches import ExampleBatches
from lmx.data.examples import Example, Examples, gather, open_examples, save_examples
from lmx.data.objectives import Masked, Objective, masked
from lmx.data.packing import TokenCache, build_cache, open_cache
from lmx.data.pairs import Pair, encode_pairs, read_json_pairs, read_pairs
from lmx.data.sources import SOURCES, read
from lmx.data.spans import SpanCorruption, span_corruption
from lmx.data.tokenizers import Tokenizer, byte_tokenizer, check_fits, load_tokenizer, train_bpe
from lmx.data.windows import evaluation_rows, num_rows, rows, windows

__all__ = [
    "SOURCES",
    "Batches",
    "ChatTemplate",
    "Document",
    "Example",
    "ExampleBatches",
    "Examples",
    "Masked",
    "Message",
    "Objective",
    "Pair",
    "SpanCorruption",
    "SummaryRow",
    "TokenCache",
    "Tokenizer",
    "assistant_spans",
    "build_cache",
    "byte_tokenizer",
    "check_fits",
    "deduplicate",
    "encode_chat",
    "encode_conversations",
    "encode_pairs",
    "evaluation_rows",
    "gather",
    "load_template",
    "load_tokenizer",
    "masked",
    "num_rows",
    "open_cache",
    "open_examples",
    "read",
    "read_conversations",
    "read_json_pairs",
    "read_pairs",
    "render",
    "rows",
    "save_examples",
    "span_corruption",
    "split",
    "split_by",
    "summary",
    "train_bpe",
    "windows",
]
