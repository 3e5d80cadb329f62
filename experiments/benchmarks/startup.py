"""How long does it take to begin? A first and a second start of training, with and without a kept compilation.

    python experiments/benchmarks/startup.py [--json] [--quick] [--results FOLDER]

The preset llama-17m is compiled for training (float32, 8 rows of 256 tokens) in a fresh process: with an empty cache,
and again with the cache that the first one left, as `lmx` keeps it (`lmx.cli.start`). Each round starts all of these in
turn. Times in seconds: `import`, until `import lmx` and its parts are there; `compile`, of all programs until the first
step's result, as jax counts them (compiling, or reading the cache); `total`, from the process's start to that result.
The peer is jax as it comes, which keeps nothing: every start of it is a first one. `ratio` is the first start's
`compile` to the second's: 10 or above is what lmx promises. `floor` is a process that imports jax alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from typing import Any

import turns

FIRST, SECOND, PEER = "first start", "second start", "without a cache"
USERS_CACHE = ("JAX_COMPILATION_CACHE_", "JAX_PERSISTENT_CACHE_")  # settings of one that is there already: not used
ONE_START = """
import json, os, sys, time
begin = time.time()
if sys.argv[1] != "off":
    from lmx.cli import start
    os.environ["XDG_CACHE_HOME"] = sys.argv[1]
    start.keep_compiled()
import jax
spent = [0.0]
events = ("/jax/core/compile/backend_compile_duration",)
jax.monitoring.register_event_duration_secs_listener(lambda e, s, **_: spent.append(s if e in events else 0.0))
import jax.numpy as jnp
import lmx
from lmx.train import adamw, make_train_step, start
imported = time.time()
model = lmx.init(lmx.preset(sys.argv[2]), jax.random.key(0))
optimizer = adamw(1e-3)
state = start(model, optimizer)
step = make_train_step(lmx.losses.cross_entropy, optimizer)
state, metrics = step(state, {"tokens": jnp.zeros((8, 256), jnp.int32)})
loss = float(metrics["loss"])
print(json.dumps({"import": imported - begin, "compile": sum(spent), "loss": loss}))
"""


def benchmark(options: Namespace) -> dict[str, Any]:
    quick = options.quick
    preset, rounds = ("llama-tiny", 1) if quick else ("llama-17m", 7)
    times = {name: [] for name in (FIRST, SECOND, PEER)}
    floors = []
    for number in range(rounds):
        turns.say(f"round {number + 1} of {rounds}")
        with tempfile.TemporaryDirectory() as cache:
            started = {name: one_start(place, preset) for name, place in
                       {FIRST: cache, SECOND: cache, PEER: "off"}.items()}  # fmt: skip
        for name, spent in started.items():
            times[name].append(spent)
        floors.append(turns.timed(lambda: subprocess.run([sys.executable, "-c", "import jax"], check=True)))
    rows = [
        {"case": f"{preset} {name}", "medians": {k: statistics.median(t[k] for t in spent) for k in spent[0]}}
        for name, spent in times.items()
    ]
    for row in rows:
        turns.say(f"{row['case']}: " + ", ".join(f"{name} {s:.2f} s" for name, s in row["medians"].items()))
    compiling = {name: row["medians"]["compile"] for name, row in zip(times, rows, strict=True)}
    turns.say(f"the second start compiles in 1/{compiling[FIRST] / compiling[SECOND]:.0f} of the first's time")
    return {
        "name": "startup",
        "ratio": compiling[FIRST] / compiling[SECOND],
        "medians": {name: row["medians"]["total"] for name, row in zip(times, rows, strict=True)},
        "floor": statistics.median(floors),
        "versions": turns.versions("jax", "flax", "optax"),
        "cases": rows,
    }


def one_start(cache: str, preset: str) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(USERS_CACHE)}
    words = [sys.executable, "-c", ONE_START, cache, preset]
    begin = time.perf_counter()
    done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    total = time.perf_counter() - begin
    told = json.loads(done.stdout.splitlines()[-1])
    return {"import": told["import"], "compile": told["compile"], "total": total}


if __name__ == "__main__":
    turns.main(__doc__, None, benchmark)
