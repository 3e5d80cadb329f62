"""The batches that a run of `lmx train` learns from, and those that it is measured on, whatever its objective."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from lmx import data
from lmx.data.packing import Batch
from lmx.data.stepwise import Stepwise
from lmx.recipes.corpus import Corpus
from lmx.recipes.objectives import kind, learnt
from lmx.recipes.options import TrainOptions


def batches(options: TrainOptions, corpus: Corpus) -> Stepwise:
    """The batches to train on, a function of (seed, step)."""
    o = options
    if kind(o.objective).examples:
        return data.ExampleBatches(corpus.examples["train"], o.batch_size, o.length, o.seed, **_how(corpus))
    return data.Batches(corpus.caches["train"], o.batch_size, o.length, o.seed, learnt(o.objective, corpus.tokenizer))


def held_out(options: TrainOptions, corpus: Corpus, split: str, most: int | None = None) -> Iterator[Batch]:
    """Batches in which every target of a split comes once, or up to `most` of them, spread over it.

    What is masked or removed is drawn from the seed and the batch's number: it is the same at every evaluation.
    """
    o = options
    if kind(o.objective).examples:
        rows = data.ExampleBatches(corpus.examples[split], 1, o.length, o.seed, **_how(corpus))
        count, found = -(-rows.steps_per_epoch // o.batch_size), rows.each(o.batch_size)
    else:
        cache, made = corpus.caches[split], learnt(o.objective, corpus.tokenizer)
        stretch = o.length if made is None else made.stretch(o.length)
        count = -(-data.num_rows(cache, stretch) // o.batch_size)
        found = data.evaluation_rows(cache, stretch, batch_size=o.batch_size)
    some = itertools.islice(enumerate(found), 0, None, 1 if most is None else -(-count // most))
    if kind(o.objective).examples or made is None:
        return (batch for _, batch in some)
    rows = range(o.batch_size)
    return (made.apply(batch, o.length, seed=o.seed, step=number, rows=rows) for number, batch in some)


def _how(corpus: Corpus) -> dict[str, Any]:
    """Several examples a row, each seeing itself alone; those longer than a row are left out (and were counted)."""
    return dict(pad_id=corpus.tokenizer.eos_id, packed=True, too_long="drop")
