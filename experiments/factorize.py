"""Fewer numbers in a whole model: out of its layers alone, or out of its table of token vectors too?

    lmx train                                          # the model, in runs/quick
    python experiments/factorize.py                    # factorized, and recovered by a short distillation
    python experiments/factorize.py --model MODEL --data 'texts/*.txt' --keep 0.7 --steps 0

In a small model the table is a third of all numbers. Every row keeps the same share of *all* parameters, the ends (the
table, and a head's own matrix) counted whether they are factorized or not. "svd" knows nothing of the text and takes
the same share of every matrix; "two-sided" knows what each matrix sees, and shares ranks out under one budget. Then
each is distilled from the original for equal steps.

Results with --steps 60 (Python 3.11 with jax 0.10.2, one draw of text), the model of `lmx train`:

                                           numbers      KL   perpl.    after 60 steps
    original                                 1.9 M   0.000    64.21
    80%, layers, svd                        1.52 M   0.447   100.37   0.093    70.97
    65%, layers, svd                        1.23 M   1.433   275.41   0.270    86.63
    80%, layers, two-sided                  1.52 M   0.023    66.40   0.023    66.42
    65%, layers, two-sided                  1.24 M   0.121    74.53   0.066    70.33
    80%, layers and ends, svd               1.52 M   0.234    79.75   0.079    70.25
    65%, layers and ends, svd               1.24 M   0.740   133.44   0.180    77.59
    80%, layers and ends, two-sided         1.53 M   0.022    66.32   0.030    66.85
    65%, layers and ends, two-sided         1.24 M   0.094    72.28   0.062    69.65

Under one budget the ends give little at 80 %, where the layers have enough to spare, and a fifth of the divergence at
65 %. What the method knows counts for more than where it looks, before and after distillation. At 80 % the two-sided
rows, near their original already, gain nothing by distillation at its peak rate of 1e-3; no other was tried.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from typing import Any

import numpy as np

import lmx
from lmx import data, evaluate, reparam
from lmx.recipes.recovery import recover
from lmx.reparam import ends
from lmx.reparam.grams import LINEARS
from lmx.train.feed import place_batch
from lmx.train.progress import si

SHAPE = dict(batch_size=8, length=256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quick/model", help="a model's folder, or its name on the hub")
    parser.add_argument("--data", default="local", help='"local", or files, folders and globs of text')
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.65], help="shares of all parameters")
    parser.add_argument("--batches", type=int, default=16, help="of 8 rows of 256 tokens, to calibrate on")
    parser.add_argument("--steps", type=int, default=100, help="of distillation afterwards")
    arguments = parser.parse_args()

    model, tokenizer = lmx.load(arguments.model), lmx.load_tokenizer(arguments.model)
    splits = data.split(data.deduplicate(data.read(arguments.data)))
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: data.build_cache(documents, tokenizer, folder) for name, documents in splits.items()}
        experiment(arguments, model, caches)


def experiment(arguments: argparse.Namespace, model: Any, caches: dict[str, data.TokenCache]) -> None:
    text = data.Batches(caches["train"], **SHAPE, seed=0)
    given = [text.at(step) for step in range(arguments.batches)]
    test = list(itertools.islice(data.evaluation_rows(caches["test"], **SHAPE), 16))
    total = lmx.specs.count(model)
    at_ends = "|".join(f"^{path}$" for path in ends.paths(model))
    patterns = {"layers": LINEARS, "layers and ends": f"{at_ends}|{LINEARS}"}

    def measured(other: Any) -> str:
        kl = 0.0 if other is model else evaluate.mean_kl(other, model, test, place=place_batch)
        perplexity = math.exp(evaluate.mean_nll(other, test, place=place_batch))
        return f"{kl:8.3f}{perplexity:9.2f}"

    after = f"after {arguments.steps} steps"
    print(f"{'':37s}{'numbers':>9s}{'KL':>8s}{'perpl.':>9s}{after:>18s}")
    print(f"{'original':37s}{si(total):>9s}{measured(model)}", flush=True)
    for what, pattern in patterns.items():
        for method, allocation in (("svd", "uniform"), ("two-sided", "global")):
            parts = reparam.decompose_model(model, given, method=method, pattern=pattern)
            numbers = sum(int(np.prod(part.site.shape)) for part in parts.values())
            for keep in arguments.keep:
                share = 1 - (1 - keep) * total / numbers  # of the matrices' own numbers
                name = f"{keep:.0%}, {what}, {method}"
                if share <= 0:
                    print(f"{name:37s} cannot be: the rest has more numbers")
                    continue
                ranks = reparam.choose_ranks(model, parts, share, allocation=allocation)
                small = reparam.rebuild(model, parts, ranks)
                line = f"{name:37s}{si(lmx.specs.count(small)):>9s}{measured(small)}"
                if arguments.steps:
                    batches = data.Batches(caches["train"], **SHAPE, seed=1).iterate()
                    line += measured(recover(small, model, batches, arguments.steps).model)
                print(line, flush=True)


if __name__ == "__main__":
    main()
