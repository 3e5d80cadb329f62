"""What does a model lose when its matrices are factorized? lmx's rungs beside published methods at equal numbers.

    python experiments/benchmarks/factorize_ladder.py [--json] [--quick] [--results FOLDER] [--model FOLDER]

The model is that of `lmx train` (trained first if runs/quick is not there), or any other folder's. Of the numbers in
its layers' matrices 20, 30 and 50 % are removed, with no training step: by plain SVD, ASVD, FWSVD and SVD-LLM, with the
same share of every matrix and two factors, as they are published; and by lmx's rungs, each with one thing more: both
moments, ranks shared out under one budget, pivoted factors, layers fitted behind factorized ones. A row has perplexity
and the KL divergence from the original (nats a token) on held-out text, the medians of three draws of calibration text,
and how far the draws are apart. `ratio` of a case is SVD-LLM's KL over that of lmx's rung without the last step, above
1 where lmx is ahead; the whole one's is that at 50 %. Nothing is timed, so a busy machine does no harm.
"""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from typing import Any

import turns

TEXT, TOKENS, HELD_OUT = "local", 16_384, 32_768
PUBLISHED = ("svd", "asvd", "fwsvd", "svd-llm")
RUNGS = {  # name -> (form, allocation, sequential)
    "two-sided": ("two-factor", "uniform", False),
    "two-sided + allocation": ("two-factor", "global", False),
    "two-sided + allocation + pivoted": ("pivoted", "global", False),
    "two-sided + allocation + pivoted + sequential": ("pivoted", "global", True),
}
BEST = "two-sided + allocation + pivoted"


def benchmark(options: Namespace) -> dict[str, Any]:
    from rich.console import Console

    from lmx.recipes import calibration, compare, derived

    console = Console(stderr=True)
    source = derived.open_source(options.model or compare.trained(console))
    draws = [0] if options.quick else [0, 1, 2]
    tokens, held_out = (4_096, 8_192) if options.quick else (TOKENS, HELD_OUT)
    given = {seed: calibration.batches(source, TEXT, tokens, seed) for seed in draws}
    test = calibration.batches(source, TEXT, held_out, 0, split="test")
    found: dict[tuple[float, str], list[dict[str, float]]] = {}
    for seed in draws:
        for keep, name, small in models(source.model, given[seed], (0.5,) if options.quick else (0.8, 0.7, 0.5)):
            measured = lost(source.model, small, test)
            found.setdefault((keep, name), []).append(measured)
            turns.say(f"{name}, {1 - keep:.0%} removed, draw {seed}: KL {1e3 * measured['kl']:.1f} thousandths")
    cases = [case(keep, found) for keep in sorted({keep for keep, _ in found}, reverse=True)]
    half = cases[-1]
    packages = ("jax", "numpy", "scipy")
    picked = {name: half[name] for name in ("ratio", "medians")}
    return {
        "name": "factorize_ladder",
        **picked,
        "floor": 0.0,
        "versions": turns.versions(*packages),
        "model": source.name,
        "perplexity": perplexity(source.model, test),
        "calibration_tokens": tokens,
        "cases": cases,
    }


def models(model: Any, batches: list[dict], shares: tuple[float, ...]):
    """(share kept, name, model) of every row; a method's decompositions serve all shares."""
    from lmx import reparam

    for method in PUBLISHED:
        parts = reparam.decompose_model(model, batches, method=method)
        for keep in shares:
            ranks = reparam.choose_ranks(model, parts, keep, form="two-factor", allocation="uniform")
            yield keep, method, reparam.rebuild(model, parts, ranks, form="dense")
    parts = reparam.decompose_model(model, batches, sequential=True)
    for name, (form, allocation, sequential) in RUNGS.items():
        for keep in shares:
            ranks = reparam.choose_ranks(model, parts, keep, form=form, allocation=allocation)
            again = batches if sequential else ()
            yield keep, name, reparam.rebuild(model, parts, ranks, form="dense", batches=again)


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


def case(keep: float, found: dict) -> dict[str, Any]:
    """The row of one share: the medians over draws of every method's KL, and how far they are apart."""
    by_name = {name: rows for (k, name), rows in found.items() if k == keep}
    kl = {name: [row["kl"] for row in rows] for name, rows in by_name.items()}
    medians = {name: statistics.median(values) for name, values in kl.items()}
    return {
        "case": f"{1 - keep:.0%} removed",
        "ratio": medians["svd-llm"] / medians[BEST],
        "medians": medians,
        "spread": {name: max(values) - min(values) for name, values in kl.items()},
        "perplexity": {name: statistics.median(row["perplexity"] for row in rows) for name, rows in by_name.items()},
    }


if __name__ == "__main__":
    turns.main(__doc__, None, benchmark, model="the folder of a run or a model, in the place of that of lmx train")
