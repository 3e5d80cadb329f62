"""How much memory do second moments take, beside the model? One layer's at a time against those of all layers.

    python experiments/benchmarks/grams.py [--json] [--quick] [--results FOLDER]

`lmx.reparam.moments` goes over a decoder of 12 layers (width 768, hidden 3072, 126 M parameters) with 2048 tokens of
calibration, forwards and back, for both sides of all its 84 matrices. lmx lets go of a layer's moments before the next;
"lmx, all kept" holds them to the end, as one does who collects first and factorizes then; "lmx, model alone" holds the
model and computes nothing. `above` is the peak memory of a process less that of "lmx, model alone"; `moments` are the
bytes of one layer's moments in float64, `activations` those of what enters each layer, kept on the way forward. `ratio`
is the `above` of "lmx, all kept" to that of lmx; `floor` is the seconds of the products at the rate measured in the
same run; the medians are of one round, what is compiled in it included.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import turns

KEPT, ALONE = "lmx, all kept", "lmx, model alone"
SIZES = {"12 layers": (12, 768, 3072), "4 layers": (4, 256, 1024)}  # layers, width, hidden
ROWS, LENGTH, BATCHES = 4, 128, 4


def benchmark(options: Namespace) -> dict[str, Any]:
    import jax

    from lmx.models.cost import cost
    from lmx.reparam.grams import sites

    case = "4 layers" if options.quick else "12 layers"
    row = turns.compete(case, (turns.LMX, KEPT, ALONE), rounds=1, warm=0)
    model, tokens = jax.eval_shape(lambda: init(case)), ROWS * LENGTH * BATCHES
    found = sites(model)
    layers, width, _ = SIZES[case]
    row["above"] = {name: row["peak_bytes"][name] - row["peak_bytes"][ALONE] for name in (turns.LMX, KEPT)}
    row["moments"] = sum(8 * (m * m + n * n) for m, n in (site.shape for site in found)) // layers
    row["activations"] = 4 * tokens * width * (layers + 1)
    products = sum(2 * tokens * (m * m + n * n) for m, n in (site.shape for site in found))
    through = 2 / 3 * cost(model, LENGTH).train_flops  # forwards, and back to what came in, not to the weights
    row["floor"] = (through * tokens + products) / turns.product_rate()
    row["ratio"] = row["above"][KEPT] / row["above"][turns.LMX]
    turns.say(
        f"lmx {row['above'][turns.LMX] / 1e6:.0f} MB above the model, all kept {row['above'][KEPT] / 1e6:.0f} MB; a "
        f"layer's moments are {row['moments'] / 1e6:.0f} MB, activations {row['activations'] / 1e6:.0f} MB"
    )
    picked = {name: row[name] for name in ("ratio", "medians", "floor")}
    return {"name": "grams", **picked, "versions": turns.versions("jax", "numpy"), "cases": [row]}


def init(case: str) -> Any:
    import jax

    import lmx

    layers, width, hidden = SIZES[case]
    shape = dict(num_layers=layers, hidden_size=width, num_heads=width // 64, intermediate_size=hidden)
    return lmx.init(lmx.preset("llama-17m", vocab_size=8192, **shape), jax.random.key(0))


def contend(case: str, name: str) -> turns.Turn:
    import jax

    from lmx.reparam import moments

    model = jax.block_until_ready(init(case))
    turns.forget_peak()  # drawing the numbers took more than they do
    tokens = jax.random.randint(jax.random.key(1), (BATCHES, ROWS, LENGTH), 0, 8192)
    batches = [{"tokens": rows} for rows in tokens]

    def work() -> None:
        if name == ALONE:
            return
        kept = []
        for seen in moments(model, batches):
            if name == KEPT:
                kept.append(seen)

    return lambda: turns.timed(work)


if __name__ == "__main__":
    turns.main(__doc__, contend, benchmark)
