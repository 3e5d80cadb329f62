"""How far is `lmx plan` from the truth? Its peak memory and step time against measured ones, on this machine's GPU.

    python experiments/benchmarks/plan_accuracy.py [--json] [--quick] [--results FOLDER]

Each case runs in a process of its own: it is planned for the chip that is there (`lmx plan --topology h100:1`), trained
for some steps, and compared. `ratio` is predicted over measured peak memory, the median of the cases; a case's
`time_ratio` is the same of the step's time, which the plan bounds from below. `medians` and `floor` are the measured
step and that bound, in seconds, of the first case. Needs an A100, H100 or H200, and `lmx[cuda]`; without one it ends
with a message and exit code 1. `--quick` runs the first case only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import turns

CASES = [  # preset, rows, tokens a row, remat
    ("llama-110m", 16, 1024, "full"),
    ("llama-110m", 16, 1024, "none"),
    ("llama-1b", 4, 2048, "full"),
]
ONE_CASE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import plan_accuracy
print(json.dumps(plan_accuracy.compare(*plan_accuracy.CASES[int(sys.argv[2])])))
"""
FRACTION = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}  # what the plan takes for granted


def benchmark(options: Namespace) -> dict[str, Any]:
    rows = [one_case(index) for index in range(1 if options.quick else len(CASES))]
    return {
        "name": "plan_accuracy",
        "ratio": statistics.median(row["ratio"] for row in rows),
        "medians": rows[0]["medians"],
        "floor": rows[0]["floor"],
        "versions": turns.versions("jax", "jaxlib") | {"device": rows[0]["device"]},
        "cases": rows,
    }


def one_case(index: int) -> dict[str, Any]:
    words = [sys.executable, "-c", ONE_CASE, str(Path(__file__).parent), str(index)]
    made = subprocess.run(words, env=os.environ | FRACTION, stdout=subprocess.PIPE, text=True)
    if made.returncode:
        raise SystemExit(made.returncode)  # what went wrong is printed already
    row = json.loads(made.stdout.splitlines()[-1])
    turns.say(f"{row['case']}: {row['ratio']:.2f} of the peak, {row['time_ratio']:.2f} of the time")
    return row


def chip_here() -> tuple[str, str]:
    """(the name of this machine's GPU in the table of chips, as jax says it); exits with a message where there is
    none."""
    import jax

    kinds = [d.device_kind for d in jax.devices() if d.platform == "gpu"]
    name = next((name for name in ("a100", "h100", "h200") if kinds and name in kinds[0].lower()), None)
    if name is None:
        sys.exit(f"plan_accuracy needs an A100, H100 or H200; jax finds {kinds or jax.devices()[0].platform} here")
    return name, kinds[0]


def compare(model: str, rows: int, length: int, remat: str) -> dict[str, Any]:
    """One case: what was predicted, and what ten steps took."""
    chip, device = chip_here()
    import jax
    import numpy as np

    import lmx
    from lmx import losses
    from lmx.models import transformer
    from lmx.recipes.plan import PlanOptions, run

    how = dict(remat=remat, compute_dtype="bfloat16")
    plan = run(PlanOptions(model, f"{chip}:1", batch_size=rows, length=length, **how))
    config = lmx.preset(model, attention=plan["attention"], **how)
    optimizer = lmx.train.adamw(1e-3)
    step = lmx.make_train_step(losses.cross_entropy, optimizer)
    state = lmx.start(transformer.init(config, jax.random.key(0)), optimizer)
    batch = {"tokens": np.random.default_rng(0).integers(0, config.vocab_size, (rows, length)).astype(np.int32)}

    def work() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    taken = statistics.median([turns.timed(work) for _ in range(13)][3:])
    peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return {
        "case": f"{model}, {rows} x {length}, remat {remat}, {plan['attention']} attention",
        "device": device,
        "medians": {"lmx": taken},
        "floor": plan["roofline"]["step"],
        "ratio": plan["memory"]["peak"] / peak,
        "time_ratio": plan["roofline"]["step"] / taken,
        "predicted_peak_bytes": plan["memory"]["peak"],
        "measured_peak_bytes": peak,
    }


if __name__ == "__main__":
    turns.main(__doc__, None, benchmark)
