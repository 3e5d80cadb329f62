"""How does the cost of a training step grow? Tokens a second and memory against batch, length, layers, width, devices.

    python experiments/benchmarks/scaling.py [--json] [--quick] [--results FOLDER]

Starting from one small decoder (4 layers, width 256, 4 heads, vocabulary 4096, 4 rows of 256 tokens, float32, AdamW),
one of the five is changed at a time; every point is a process of its own, so that its peak memory is its own. Devices
are simulated on the processor's cores (fsdp = all of them, 8 rows): their curve shows what splitting costs, not what it
gains. Expect tokens a second to fall with layers and width as the FLOPs a token rise, and memory to grow with rows and
positions together. With --results, one plot for each of the five: `scaling-batch.png` and so on. `ratio` is the share
of the measured matrix product rate that the largest width reaches, `floor` that rate's seconds for its step.
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

BASE = {"batch": 4, "length": 256, "layers": 4, "width": 256, "devices": 1}
GROWTH = {
    "batch": (1, 2, 4, 8, 16),
    "length": (64, 128, 256, 512, 1024),
    "layers": (1, 2, 4, 8, 16),
    "width": (128, 256, 384, 512, 768),
    "devices": (1, 2, 4, 8),
}
UNITS = {"batch": "rows a step", "length": "tokens a row", "layers": "layers", "width": "width", "devices": "devices"}


def benchmark(options: Namespace) -> dict[str, Any]:
    rate = turns.product_rate()
    rows = []
    for axis, values in GROWTH.items():
        if options.quick and axis not in ("layers", "width"):
            continue
        for value in values[:1] if options.quick else values:
            row = point(BASE | ({"batch": 8} if axis == "devices" else {}) | {axis: value}, options.quick)
            row |= {"case": f"{axis} {value}", "axis": axis, "value": value}
            row["share"] = row["flops"] / row["seconds"] / rate
            turns.say(
                f"{axis:<8}{value:>5}: {row['tokens_per_second']:8.0f} tokens/s, peak memory "
                f"{row['peak_bytes'] / 1e6:6.0f} MB, {row['share']:.2f} of the product rate"
            )
            rows.append(row)
        if options.results:
            draw(axis, [row for row in rows if row["axis"] == axis], options.results / f"scaling-{axis}.png")
    widest = [row for row in rows if row["axis"] == "width"][-1]
    return {
        "name": "scaling",
        "ratio": widest["share"],
        "medians": {row["case"]: row["seconds"] for row in rows},
        "floor": widest["flops"] / rate,
        "versions": turns.versions("jax", "optax"),
        "cases": rows,
    }


def point(shape: dict[str, int], quick: bool) -> dict[str, Any]:
    """{"seconds" a step (median), "tokens_per_second", "flops" a step, "peak_bytes"}, measured in a new process."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={shape['devices']}"
    environment = os.environ | turns.process_of_lmx() | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, os.path.abspath(__file__), "--point", json.dumps(shape | {"rounds": 3 if quick else 7})]
    done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: dict[str, int]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    import lmx
    from lmx.core import sharding
    from lmx.models.cost import cost
    from lmx.train import adamw, make_train_step, start

    config = lmx.preset(
        "llama-2m", num_layers=shape["layers"], hidden_size=shape["width"], num_heads=4,
        intermediate_size=shape["width"] * 8 // 3, vocab_size=4096,
    )  # fmt: skip
    with sharding.use_mesh(f"fsdp={shape['devices']}" if shape["devices"] > 1 else None):
        optimizer = adamw(1e-3)
        state = start(lmx.init(config, jax.random.key(0)), optimizer)
        step = make_train_step(lmx.losses.cross_entropy, optimizer)
        tokens = jax.random.randint(jax.random.key(1), (shape["batch"], shape["length"]), 0, 4096)
        batch = {"tokens": jnp.asarray(sharding.place(tokens, "batch", None))}
        flops = cost(state.model, shape["length"]).train_flops * tokens.size

        def work() -> None:
            nonlocal state
            state, metrics = step(state, batch)
            float(metrics["loss"])

        turns.timed(work)
        seconds = statistics.median(turns.timed(work) for _ in range(shape["rounds"]))
    per_second = tokens.size / seconds
    return {"seconds": seconds, "tokens_per_second": per_second, "flops": flops, "peak_bytes": turns.peak_bytes()}


def draw(axis: str, rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    values = [row["value"] for row in rows]
    speed.plot(values, [row["tokens_per_second"] for row in rows], marker="o")
    memory.plot(values, [row["peak_bytes"] / 1e6 for row in rows], marker="o", color="tab:orange")
    for side, label in ((speed, "tokens a second"), (memory, "peak memory of the process, MB")):
        side.set(xlabel=UNITS[axis], ylabel=label, ylim=(0, None), xscale="log")
        side.set_xticks(values, [str(value) for value in values], minor=False)
        side.minorticks_off()
        side.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--point"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        turns.main(__doc__, None, benchmark)
