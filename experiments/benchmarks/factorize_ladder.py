"""What does a model lose when its matrices are factorized? lmx's rungs beside published methods at equal numbers.

    python experiments/benchmarks/factorize_ladder.py [--json] [--quick] [--results FOLDER] [--model FOLDERS]
        [--elsewhere TEXT] [--recover STEPS] [--sentences FILE --encoder FOLDER]

Two models: that of `lmx train` (trained first if runs/quick is not there), and one of its size whose heads share keys
and values (runs/grouped); or any other folders', with commas between. Of the numbers in their layers' matrices 20, 30
and 50 % are removed, with no training step: by plain SVD, ASVD, FWSVD and SVD-LLM, with the same share of every matrix
and two factors, as they are published; and by lmx's rungs, each with one thing more: both moments, ranks shared out
under one budget, pivoted factors, layers fitted behind factorized ones. A row has perplexity and the KL divergence from
the original (nats a token) on held-out text, and of the first model the medians of three draws of calibration text and
how far those are apart; --elsewhere measures on a second text, which nothing was calibrated on. `ratio` of a case is
SVD-LLM's KL over that of lmx's rung without the last step, above 1 where lmx is ahead; the whole one's, of the first
model at 50 %.

--recover distills every row at 50 % (first model, first draw) from the original, all for the same steps; the FLOPs of
student and teacher are counted. --encoder, a model of sentences, with --sentences, lines of tab-separated values whose
columns 5 to 7 are a score and two sentences (the form of STS-B), gives the rank correlation that is left as its
matrices shrink. Nothing is timed, so a busy machine does no harm.
"""

from __future__ import annotations

import csv
import gzip
import math
import statistics
from argparse import Namespace
from typing import Any

import turns

TEXT, TOKENS, HELD_OUT = "local", 16_384, 12_288
PUBLISHED = ("svd", "asvd", "fwsvd", "svd-llm")
RUNGS = {  # name -> (form, allocation, sequential)
    "two-sided": ("two-factor", "uniform", False),
    "two-sided + allocation": ("two-factor", "global", False),
    "two-sided + allocation + pivoted": ("pivoted", "global", False),
    "two-sided + allocation + pivoted + sequential": ("pivoted", "global", True),
}
BEST = "two-sided + allocation + pivoted"


SHARES = (0.8, 0.7, 0.5)


def benchmark(options: Namespace) -> dict[str, Any]:
    from rich.console import Console

    from lmx.recipes import compare, derived

    if (options.encoder is None) != (options.sentences is None):
        raise SystemExit("give --encoder and --sentences, both or none")
    console = Console(stderr=True)
    if options.model:
        folders = options.model.split(",")
    else:
        folders = [compare.trained(console), *([] if options.quick else [grouped(console)])]
    cases, about, recovered = [], {}, []
    for folder in folders:
        source = derived.open_source(folder)
        cases += ladder(source, options, [0, 1, 2] if folder == folders[0] and not options.quick else [0])
        about[folder] = originals(source, options)
        if options.recover and folder == folders[0]:
            recovered = recovery(source, options)
    half = next(case for case in cases if case["removed"] == 0.5)
    return {
        "name": "factorize_ladder",
        **{name: half[name] for name in ("ratio", "medians")},
        "floor": 0.0,
        "versions": turns.versions("jax", "numpy", "scipy"),
        "models": about,
        "calibration_tokens": tokens_of(options)[0],
        "cases": cases,
        "recovered": recovered,
        "sentences": sentences(options) if options.encoder else [],
    }


def tokens_of(options: Namespace) -> tuple[int, int]:
    """(to calibrate on, to measure on)."""
    return (4_096, 8_192) if options.quick else (TOKENS, HELD_OUT)


def tests(source: Any, options: Namespace) -> dict[str, list[dict]]:
    """The texts to measure on, by name."""
    from lmx.recipes import calibration

    held_out = tokens_of(options)[1]
    found = {"held out": calibration.batches(source, TEXT, held_out, 0, split="test")}
    if options.elsewhere:
        found["elsewhere"] = calibration.batches(source, options.elsewhere, held_out, 0, split="train")
    return found


def ladder(source: Any, options: Namespace, draws: list[int]) -> list[dict[str, Any]]:
    """The cases of a model, one for each share, over draws of calibration text."""
    from lmx.recipes import calibration

    texts, found = tests(source, options), {}
    for seed in draws:
        given = calibration.batches(source, TEXT, tokens_of(options)[0], seed)
        for keep, name, small in models(source.model, given, (0.5,) if options.quick else SHARES):
            measured = {text: lost(source.model, small, batches) for text, batches in texts.items()}
            found.setdefault((keep, name), []).append(measured)
            kl = 1e3 * measured["held out"]["kl"]
            turns.say(f"{source.name}: {name}, {1 - keep:.0%} removed, draw {seed}: KL {kl:.1f} thousandths")
    return [case(source.name, keep, found) for keep in sorted({keep for keep, _ in found}, reverse=True)]


def originals(source: Any, options: Namespace) -> dict[str, Any]:
    """What a model is before anything is removed."""
    import lmx

    c = source.model.config
    return {
        "parameters": lmx.specs.count(source.model),
        "heads": [c.num_heads, c.num_kv_heads],
        "perplexity": {name: perplexity(source.model, batches) for name, batches in tests(source, options).items()},
    }


def grouped(console: Any) -> str:
    """A model as that of `lmx train`, but two pairs of heads share keys and values each."""
    from pathlib import Path

    import jax

    import lmx
    from lmx.recipes import models, train
    from lmx.recipes.options import TrainOptions

    folder, new = Path("runs/grouped"), "runs/grouped-new"
    if not (folder / "result.json").exists():
        console.print("training a model with grouped heads")
        again = (folder / "run.json").exists()
        if not again:
            config = lmx.preset("llama-2m", num_heads=4, num_kv_heads=2)
            model = lmx.init(config, jax.random.key(0))
            lmx.save(model, new, tokenizer=models.load_tokenizer("runs/quick"), overwrite=True)
        options = TrainOptions(init=None if again else new, output=str(folder), resume=again)
        if "stopped" in train.run(options, console):
            raise KeyboardInterrupt
    return str(folder)


def recovery(source: Any, options: Namespace) -> list[dict[str, Any]]:
    """Every row of the first draw at 50 %, distilled from the original for some steps."""
    import itertools

    from lmx.recipes import calibration
    from lmx.recipes.recovery import recover

    steps, test = int(options.recover), tests(source, options)["held out"]
    given = calibration.batches(source, TEXT, tokens_of(options)[0], 0)
    rows = calibration.batches(source, TEXT, steps * len(given[0]["tokens"]) * given[0]["tokens"].shape[1], 1)
    found = []
    for _, name, small in models(source.model, given, (0.5,), form=None):
        before = lost(source.model, small, test)
        done = recover(small, source.model, itertools.islice(itertools.cycle(rows), steps), steps)
        after = lost(source.model, done.model, test)
        flops = {"student": done.student_flops, "teacher": done.teacher_flops}
        found.append({"name": name, "steps": steps, "before": before, "after": after, "flops": flops})
        turns.say(f"{name}: KL {1e3 * before['kl']:.1f} thousandths, {1e3 * after['kl']:.1f} after {steps} steps")
    return found


def sentences(options: Namespace) -> list[dict[str, Any]]:
    """What is left of a model of sentences: Spearman's correlation of cosines with the scores of pairs."""
    from lmx.recipes import derived
    from lmx.recipes import models as loading

    opened = gzip.open if options.sentences.endswith(".gz") else open
    with opened(options.sentences, "rt", encoding="utf-8") as file:
        pairs = [(float(row[4]), row[5], row[6]) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    # one half of the pairs calibrates, the other is measured on
    seen, pairs = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :][: 200 if options.quick else None]
    source, tokenizer = derived.open_source(options.encoder), loading.load_tokenizer(options.encoder)
    batches = padded(tokenizer, [text for pair in seen for text in pair[1:]][: 64 if options.quick else 512])
    found = [{"name": "original", "removed": 0.0, "spearman": correlation(source.model, tokenizer, pairs)}]
    for keep, name, small in models(source.model, batches, (0.5,) if options.quick else SHARES):
        left = correlation(restored(source.model, small), tokenizer, pairs)
        found.append({"name": name, "removed": round(1 - keep, 3), "spearman": left})
        turns.say(f"{options.encoder}: {name}, {1 - keep:.0%} removed: Spearman {left:.4f}")
    return found


def padded(tokenizer: Any, texts: list[str], rows: int = 32, length: int = 64) -> list[dict]:
    """Batches of texts, cut or padded to a length."""
    import numpy as np

    ids = tokenizer.encode_framed(texts, length)
    tokens, segments = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), np.int32)
    for i, row in enumerate(ids):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    return [
        {"tokens": tokens[i : i + rows], "segment_ids": segments[i : i + rows]} for i in range(0, len(ids), rows)
    ]


def correlation(model: Any, tokenizer: Any, pairs: list[tuple[float, str, str]]) -> float:
    from scipy import stats

    import lmx

    one, two = (lmx.encode_texts(model, tokenizer, [pair[i] for pair in pairs]) for i in (1, 2))
    return float(stats.spearmanr((one * two).sum(1), [pair[0] for pair in pairs]).statistic)


def models(model: Any, batches: list[dict], shares: tuple[float, ...], form: str | None = "dense"):
    """(share kept, name, model) of every row; a method's decompositions serve all shares.

    form: "dense", the products, which all rows measure by one program; None, each row's own factors."""
    from lmx import reparam

    for method in PUBLISHED:
        parts = reparam.decompose_model(model, batches, method=method)
        for keep in shares:
            ranks = reparam.choose_ranks(model, parts, keep, form="two-factor", allocation="uniform")
            yield keep, method, reparam.rebuild(model, parts, ranks, form=form or "two-factor")
    parts = reparam.decompose_model(model, batches, sequential=True)
    for name, (own, allocation, sequential) in RUNGS.items():
        for keep in shares:
            ranks = reparam.choose_ranks(model, parts, keep, form=own, allocation=allocation)
            again = batches if sequential else ()
            yield keep, name, reparam.rebuild(model, parts, ranks, form=form or own, batches=again)


def lost(model: Any, small: Any, batches: list[dict]) -> dict[str, float]:
    from lmx import evaluate

    small = restored(model, small)
    return {"kl": evaluate.mean_kl(small, model, batches), "perplexity": perplexity(small, batches)}


def restored(model: Any, small: Any) -> Any:
    """The model with plain arrays (form "dense": the products), in its own stacks, so that all rows share programs."""
    import lmx

    return lmx.restack(lmx.fold(small), len(model.config.layer_pattern))


def perplexity(model: Any, batches: list[dict]) -> float:
    from lmx import evaluate

    return math.exp(evaluate.mean_nll(model, batches))


def case(model: str, keep: float, found: dict) -> dict[str, Any]:
    """The row of one share: the medians over draws of every method's KL, and how far they are apart."""
    by_name = {name: rows for (k, name), rows in found.items() if k == keep}
    texts = next(iter(by_name.values()))[0]

    def middle(text: str, what: str) -> dict[str, float]:
        return {name: statistics.median(row[text][what] for row in rows) for name, rows in by_name.items()}

    kl = {name: [row["held out"]["kl"] for row in rows] for name, rows in by_name.items()}
    medians = middle("held out", "kl")
    return {
        "case": f"{model}, {1 - keep:.0%} removed",
        "removed": round(1 - keep, 3),
        "ratio": medians["svd-llm"] / medians[BEST],
        "medians": medians,
        "spread": {name: max(values) - min(values) for name, values in kl.items()},
        "perplexity": middle("held out", "perplexity"),
        "elsewhere": {what: middle("elsewhere", what) for what in ("kl", "perplexity")} if "elsewhere" in texts else {},
    }


if __name__ == "__main__":
    turns.main(
        __doc__,
        None,
        benchmark,
        model="folders of runs or models, with commas between, in the place of those that are trained",
        elsewhere="a second text to measure on, as lmx train takes it",
        recover="steps of distillation for every row at 50 %%",
        encoder="the folder of a model of sentences",
        sentences="scored pairs of sentences, in the form of STS-B",
    )
