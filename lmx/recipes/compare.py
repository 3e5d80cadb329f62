"""`lmx compare`: ways to make a model cheaper, in one table of quality against cost.

A row is one function: a `Given` (the model, its calibration text) and the share to keep, to a model. All rows are
measured alike.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lmx import evaluate, reparam
from lmx.core import atomic, specs
from lmx.core.errors import ConfigError, FolderError, nearest
from lmx.models.cost import cost
from lmx.models.transformer import Model
from lmx.recipes import calibration, derived, models, train
from lmx.recipes.options import TrainOptions
from lmx.recipes.recovery import recover
from lmx.reparam.factorization import Parts
from lmx.reparam.grams import LINEARS, sites
from lmx.train.progress import PLAIN

RESULTS = ("compare.json", "compare.csv", "compare.png")
COLUMNS = (
    "method", "keep", "perplexity", "bits_per_byte", "kl", "parameters", "bytes", "flops_per_token",
    "prefill_tokens_per_second", "decode_tokens_per_second", "seconds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Make a model cheaper in several ways and print one table: quality against cost.

    Without a model, the small one of `lmx train` is trained first (a few minutes) and kept in runs/quick. Perplexity,
    bits per byte and the KL divergence from the original are on held-out text; speeds are measured here, now.
    """

    model: str | None = None
    """The folder of a run or a model, or the name of a model of the hub; that of `lmx train` if not given."""
    data: str = "local"
    """Text to calibrate and to measure on, as for lmx train."""
    keep: str = "0.8,0.7,0.5"
    """The shares of the layers' matrices to keep, with commas between."""
    methods: str = "svd,svd-llm,two-sided,lmx,int8,lmx+int8"
    """Rows, with commas between: svd, asvd, fwsvd, svd-llm, two-sided, lmx, lmx+recovery, depth and width
    (layers, or heads and units, left out), int8, lmx+int8."""
    tokens: int = 32_768
    """How many tokens to calibrate on."""
    test_tokens: int = 65_536
    """How many tokens of held-out text to measure on."""
    batch: int = 1
    """Rows at a time where speeds are measured."""
    recovery_steps: int = 100
    """Steps of distillation from the original in lmx+recovery."""
    length: int | None = None
    """Tokens a row; if not given, the length the model was trained with, or else 256."""
    seed: int = 0
    """Of the text and the labels that are drawn."""
    output: str = "runs/compare"
    """The folder for compare.json, compare.csv and compare.png."""
    overwrite: bool = False
    """Replace the results in the output folder."""


@dataclasses.dataclass
class Given:
    """What a row begins with, and what rows share, each made once."""

    model: Model
    batches: list[dict]
    options: CompareOptions
    made: dict[str, Any] = dataclasses.field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` makes, made at the first call with that name."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def decomposed(self, method: str) -> Parts:
        key = jax.random.key(self.options.seed)
        return self.once(method, lambda: reparam.decompose_model(self.model, self.batches, method=method, key=key))


def uniform(method: str) -> Callable[[Given, float], Model]:
    """Two factors, the same share of every matrix: how the method is published."""

    def row(given: Given, keep: float) -> Model:
        parts = given.decomposed(method)
        ranks = reparam.choose_ranks(given.model, parts, keep, form="two-factor", allocation="uniform")
        return reparam.rebuild(given.model, parts, ranks, form="two-factor")

    return row


def best(given: Given, keep: float) -> Model:
    """Both moments, ranks shared out under one budget, pivoted factors."""
    parts = given.decomposed("two-sided")
    return reparam.rebuild(given.model, parts, reparam.choose_ranks(given.model, parts, keep))


def recovered(given: Given, keep: float) -> Model:
    """`best`, then a short distillation from the original."""
    o = given.options
    rows = itertools.islice(itertools.cycle(given.batches), o.recovery_steps)
    return recover(best(given, keep), given.model, rows, o.recovery_steps, seed=o.seed).model


def depth(given: Given, keep: float) -> Model:
    """The layers that change what goes through them most; as many as come nearest to the share."""
    there = given.model.config.num_layers
    importance = given.once("layers", lambda: reparam.layer_importance(given.model, given.batches))
    return reparam.prune_layers(given.model, max(1, round(keep * there)), importance)


def width(given: Given, keep: float) -> Model:
    """The heads that matter most, whole groups of them, and as many feed-forward units as then fit the share, at least
    one."""
    model, c = given.model, given.model.config
    numbers = {"attention": 0, "mlp": 0}
    for site in sites(model, LINEARS):
        numbers[site.matrix.name.split("/")[0]] += math.prod(site.shape)
    groups = max(1, round(keep * c.num_kv_heads))
    left = keep * sum(numbers.values()) - numbers["attention"] * groups / c.num_kv_heads
    seen = given.once("outputs", lambda: calibration.moments_of(model, given.batches, "/(attention/out|mlp/down)$"))
    units = max(1, int(c.intermediate_size * left / numbers["mlp"]))
    heads, feeding = reparam.head_importance(model, seen), reparam.unit_importance(model, seen)
    model = reparam.prune_units(model, min(units, c.intermediate_size), importance=feeding)
    return reparam.prune_heads(model, groups * (c.num_heads // c.num_kv_heads), groups, importance=heads)


def int8(model: Model) -> Model:
    """The layers' matrices in int8, by groups."""
    return reparam.quantize_model(model, LINEARS)


# A row: (its function, whether it takes a share to keep)
ROWS: dict[str, tuple[Callable[[Given, float], Model], bool]] = {
    **{name: (uniform(name), True) for name in ("svd", "asvd", "fwsvd", "svd-llm", "two-sided")},
    "lmx": (best, True),
    "lmx+recovery": (recovered, True),
    "depth": (depth, True),
    "width": (width, True),
    "int8": (lambda given, keep: int8(given.model), False),
    "lmx+int8": (lambda given, keep: int8(best(given, keep)), True),
}


def run(options: CompareOptions, console: Console | None = None) -> dict[str, Any]:
    """Compare and return {"rows": [...], "model", "output", "files", "seconds"}; `COLUMNS` are the keys of a row.

    The three files are written once all rows are there. Raises LmxErrors for options, a model or a text that cannot be
    used, and for an output folder that holds results (unless overwrite).
    """
    o, begin, console = options, time.perf_counter(), console or Console(quiet=True)
    shares, names = _shares(o.keep), _names(o.methods)
    if o.batch < 1:
        raise ConfigError(f"--batch must be at least 1, not {o.batch}")
    output = Path(o.output).expanduser()
    taken = [name for name in RESULTS if (output / name).exists()]
    if taken and not o.overwrite:
        raise FolderError(f"{output} holds {', '.join(taken)}; give --overwrite to replace them, or another --output")
    source = derived.open_source(o.model if o.model is not None else trained(console))
    source.model.require_next_token()
    given = Given(source.model, calibration.batches(source, o.data, o.tokens, o.seed, console, o.length), o)
    held_out = calibration.batches(source, o.data, o.test_tokens, o.seed, console, o.length, split="test")
    size = _bytes_of(source, held_out)
    plan = [("original", None), *((name, keep) for name in names for keep in (shares if ROWS[name][1] else (None,)))]
    rows = []
    for name, keep in plan:
        what = name if keep is None else f"{name}, {keep:.0%} kept"
        with console.status(f"{len(rows) + 1} of {len(plan)}: {what}"):
            before = time.perf_counter()
            model = source.model if name == "original" else ROWS[name][0](given, 1.0 if keep is None else keep)
            spent = time.perf_counter() - before
            measured = measure(model, source.model, held_out, size, o.batch)
            rows.append({"method": name, "keep": keep} | measured | {"seconds": spent})
        if not console.is_terminal:
            console.print(f"{what}: perplexity {rows[-1]['perplexity']:.2f}", **PLAIN)
    result = {"rows": rows, "model": source.name, "batch": o.batch, "output": str(output), "files": list(RESULTS)}
    result["seconds"] = time.perf_counter() - begin
    write(output, result)
    return result


def measure(model: Model, original: Model, batches: Sequence[dict], size: int, rows: int) -> dict[str, Any]:
    """Everything of a row that its model says; `size`: the bytes of text that the batches' targets spell; speeds are
    those of so many rows at a time."""
    nll, tokens = evaluate.mean_nll(model, batches), sum(float(b["weights"].sum()) for b in batches)
    length = batches[0]["tokens"].shape[1]
    price = cost(model, length)
    prompt = 128 if model.max_length is None else min(128, model.max_length - 32)
    speed = evaluate.speeds(model, rows=rows, prompt=prompt)
    return {
        "perplexity": math.exp(nll),
        "bits_per_byte": nll * tokens / math.log(2) / size,
        "kl": 0.0 if model is original else evaluate.mean_kl(model, original, batches),
        "parameters": specs.count(model),
        "bytes": price.parameter_bytes,
        "flops_per_token": price.forward_flops,
        "prefill_tokens_per_second": speed["prefill"],
        "decode_tokens_per_second": speed["decode"],
    }


def write(folder: Path, result: dict[str, Any]) -> None:
    """The three files of a result. Raises FolderError if they cannot be written."""
    scratch = atomic.make_scratch(folder)
    try:
        with open(scratch / "compare.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(result["rows"])
        draw(result["rows"], scratch / "compare.png")
        (scratch / "compare.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            os.replace(scratch / name, folder / name)
    except OSError as error:
        raise FolderError(f"the results could not be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def draw(rows: Sequence[dict[str, Any]], png: Path) -> None:
    """Quality against cost: the divergence from the original over the bytes that are left, a line a method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    whole = next(row["bytes"] for row in rows if row["method"] == "original")
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "original"):
        points = sorted((row["bytes"] / whole, row["kl"]) for row in rows if row["method"] == method)
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.set(xlabel="bytes, share of the original", ylabel="KL from the original, nats/token", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, dpi=120)


def trained(console: Console) -> str:
    """The run of `lmx train`, made if it is not there yet, gone on with if it was stopped."""
    folder = Path("runs/quick")
    if not (folder / "result.json").exists():
        console.print("training the small model first: lmx train", **PLAIN)
        again = (folder / "run.json").exists()
        if "stopped" in train.run(TrainOptions(output=str(folder), resume=again), console):
            raise KeyboardInterrupt
    return str(folder)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--keep is shares with commas between, such as 0.8,0.5, not {text!r}") from error
    if not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"--keep takes shares above 0 and at most 1, not {text}")
    return shares


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in ROWS:
            raise ConfigError(f"no method {name!r}, there are {', '.join(ROWS)}{nearest(name, ROWS)}")
    return names


def _bytes_of(source: derived.Source, batches: Sequence[dict]) -> int:
    """The bytes of UTF-8 that the targets of batches spell."""
    tokenizer, total = models.load_tokenizer(source.name), 0
    for batch in batches:
        for row, weights in zip(batch["targets"], batch["weights"], strict=True):
            total += len(tokenizer.decode([int(t) for t in row[weights > 0]]).encode())
    return total
