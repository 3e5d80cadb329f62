"""`lmx factorize`: a model's matrices as low rank, a share of their size kept."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import time
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from lmx import evaluate, reparam
from lmx.core import specs
from lmx.core.errors import ConfigError
from lmx.recipes import calibration, derived
from lmx.recipes.recovery import recover
from lmx.reparam import ends, factorization, grams, prices
from lmx.reparam.factorization import METHODS
from lmx.train.interrupt import stop_requests
from lmx.train.progress import PLAIN

HELD_OUT = 8_192  # tokens that the result is compared on
ROW_TOKENS = 2_048  # of a step of recovery, about


@dataclasses.dataclass(frozen=True)
class FactorizeOptions:
    """Write a model's matrices as products of smaller ones, chosen on calibration text, without a training step.

    Ranks are shared out over all matrices under one budget, dense ones among the choices. The result is measured on
    held-out text of the same source: perplexity before and after, and the KL divergence from the original.
    """

    model: str
    """The folder of a run or a model, or the name of a model of the hub."""
    output: str
    """The folder to write."""
    keep: float = 0.5
    """The share of the matrices' size to keep, above 0 and at most 1."""
    unit: str = "numbers"
    """What size is: numbers (stored), flops, bytes, or seconds (measured here, for products of 64 rows)."""
    method: str = "two-sided"
    """By which moments: svd (none), asvd, fwsvd, svd-llm (inputs), two-sided (inputs and gradients)."""
    form: str = "pivoted"
    """How factors are stored: pivoted (fewest numbers), two-factor, or dense (a plain matrix of that rank)."""
    allocation: str = "global"
    """How ranks are shared out: global (by error, under one budget) or uniform (the same share of every matrix)."""
    sequential: bool = False
    """Fit each layer again to what the factorized layers before it give."""
    pattern: str = grams.LINEARS
    """Which matrices, by path; by default all of the layers'. Also embed/tokens and head/out, where they are named."""
    grid: int | None = None
    """Ranks are multiples of it; about 1/32 of a matrix's largest if not given."""
    max_stacks: int = 8
    """How many unlike runs of layers there may be, as each costs compile time."""
    recover: int = 0
    """Steps of distillation from the original afterwards. Ctrl-C ends them, and keeps the model as it is then."""
    data: str = "local"
    """Text to calibrate on, to recover and to compare on, as for lmx train."""
    tokens: int = 32_768
    """How many tokens of it to calibrate on."""
    length: int | None = None
    """Tokens a row; if not given, the length the model was trained with, or else 256."""
    seed: int = 0
    """Of the text and the labels that are drawn."""
    format: str = "lmx"
    """Of the result: lmx, or hf for Hugging Face's (which has no such matrices: they are written out, and as large)."""
    overwrite: bool = False
    """Replace a model that is in the output folder."""


def run(options: FactorizeOptions, console: Console | None = None) -> dict[str, Any]:
    """Factorize and return {"source", "output", "kept", "ranks", "kl", "perplexity", "parameters", "bytes", ...}.

    "kept" is the share of the matrices' price in the unit, "ranks" by path (None: dense), "notes" what was out of the
    ordinary, with how often. Raises LmxErrors for options, a model or a text that cannot be used.
    """
    o, begin, console = options, time.perf_counter(), console or Console(quiet=True)
    derived.check_format(o.format)
    if not 0 < o.keep <= 1:
        raise ConfigError(f"--keep is a share, above 0 and at most 1, not {o.keep}")
    source = derived.open_source(o.model)
    if o.unit in ("flops", "seconds") and not ends.is_tied(source.model):
        if any(site.path == ends.TABLE for site in grams.sites(source.model, o.pattern)):
            raise ConfigError(f"{ends.TABLE} is looked up, not multiplied: give --unit numbers or bytes, not {o.unit}")
    price = prices.price_of(o.unit, o.form, dtype=source.model.config.dtype)
    given = calibration.batches(source, o.data, o.tokens, o.seed, console, o.length)
    held_out = calibration.batches(source, o.data, HELD_OUT, o.seed, console, o.length, split="valid")
    notes: collections.Counter[str] = collections.Counter()
    note = lambda text: notes.update([text.split(": ", 1)[1]])  # noqa: E731
    parts = _decomposed(source.model, given, o, note, console)
    how = dict(form=o.form, max_stacks=o.max_stacks)
    ranks = reparam.choose_ranks(source.model, parts, o.keep, allocation=o.allocation, price=price, grid=o.grid, **how)
    with console.status("putting the model together"):
        again = given if o.sequential else ()
        small = reparam.rebuild(source.model, parts, ranks, batches=again, method=o.method, **how)
    recovery, made_by = {}, derived.told(o)
    if o.recover:
        rows = calibration.batches(source, o.data, o.recover * ROW_TOKENS, o.seed + 1, console, o.length)
        rows = itertools.islice(itertools.cycle(rows), o.recover)
        with stop_requests() as asked:
            done = recover(small, source.model, rows, o.recover, seed=o.seed, console=console, asked_to_stop=asked)
        if done.steps < o.recover:
            made_by |= {"recover": done.steps}
            console.print(f"stopped after {done.steps} of {o.recover} steps: the model is kept as it is now", **PLAIN)
        small, recovery = done.model, {"recovery_flops": done.flops, "recovery_steps": done.steps}
    for text, times in notes.items():
        console.print(f"{text} ({times} matrices)" if times > 1 else text, **PLAIN)
    with console.status("comparing on held-out text"):
        compared = compare(source.model, small, held_out)
    result = derived.write(source, small, o.output, "lmx factorize", made_by, o.format, o.overwrite)
    paid, whole = (sum(price(p.site.shape, r) for p, r in _each(parts, some)) for some in (ranks, dict.fromkeys(parts)))
    about = {"kept": paid / whole, "ranks": ranks, "notes": dict(notes), "parameters_before": specs.count(source.model)}
    return result | about | compared | recovery | derived.timed(begin)


def compare(original: Any, model: Any, batches: list[dict]) -> dict[str, Any]:
    """{"kl" from the original in nats a token, "perplexity", "perplexity_before"}; {} for what has no next token."""
    if original.config.architecture != "decoder" or original.config.head != "lm":
        return {}
    before, after = (math.exp(evaluate.mean_nll(m, batches)) for m in (original, model))
    return {"kl": evaluate.mean_kl(model, original, batches), "perplexity": after, "perplexity_before": before}


def _each(parts: factorization.Parts, ranks: factorization.Ranks):
    return ((part, ranks[path]) for path, part in parts.items())


def _decomposed(model: Any, given: list[dict], o: FactorizeOptions, note: Any, console: Console) -> factorization.Parts:
    """The matrices decomposed, with a bar over the layers."""
    layers = len({(site.tower, site.layer) for site in grams.sites(model, o.pattern)})
    steps = factorization.decompose_layers(
        model, given if METHODS.get(o.method, [1])[0] else (), method=o.method, pattern=o.pattern,
        sequential=o.sequential, key=jax.random.key(o.seed), report=note,
    )  # fmt: skip
    shown = track(
        steps, "decomposing layers", total=layers, console=console, transient=True, disable=not console.is_terminal
    )
    return factorization.in_order(model, o.pattern, shown)
