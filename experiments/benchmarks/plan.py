"""How long does it take to plan? An 8 B model on 256 chips, compiled on this machine's CPU, within two minutes of it.

    python experiments/benchmarks/plan.py [--json] [--quick] [--results FOLDER]

The command `lmx plan llama-8b --topology v5e:16x16 --length 4096` runs in a process of its own, and the CPU seconds of
all its threads are counted, the start of Python included; then again with `--effort low`. `ratio` is the promised 120
seconds to those of a case, in all to those of the first: above 1 the promise is kept. `floor` is what of them was spent
on tracing and compiling the step, `wall` the seconds that passed. What the plan says is told beside: whether the step
fits, its peak memory, temporaries and collectives. `--quick` plans llama-1b on v5e:2x4. Needs `lmx[plan]`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from argparse import Namespace
from typing import Any

import turns

PROMISED = 120.0  # seconds of CPU


def benchmark(options: Namespace) -> dict[str, Any]:
    model, topology = ("llama-1b", "v5e:2x4") if options.quick else ("llama-8b", "v5e:16x16")
    rows = [plan(model, topology, 4096, effort) for effort in ("full", "low")]
    for row in rows:
        peak, available = (row[name] / 2**30 for name in ("peak_bytes", "available_bytes"))
        seconds, verdict = row["medians"]["lmx"], "fits" if row["fits"] else "does not fit"
        turns.say(
            f"{row['case']}: {seconds:.0f} s of CPU, {row['wall']:.0f} s passed; {verdict}, "
            f"peak {peak:.2f} of {available:.2f} GiB"
        )
        for kind in row["collectives"] or []:
            turns.say(f"  {kind['kind']:<20} {kind['count']:>6} x, {kind['bytes'] / 1e9:8.2f} GB")
    full, low = (row["temporaries_bytes"] for row in rows)
    turns.say(f"with low effort temporaries are {low / full:.2f} times as large")
    return {
        "name": "plan",
        **{name: rows[0][name] for name in ("ratio", "medians", "floor")},
        "versions": turns.versions("jax", "libtpu"),
        "cases": rows,
    }


def plan(model: str, topology: str, length: int, effort: str) -> dict[str, Any]:
    """One plan: the CPU seconds of its process, and what it found."""
    words = ["plan", model, "--topology", topology, "--length", str(length), "--effort", effort, "--json"]
    before, begun = cpu_seconds(), time.perf_counter()
    made = subprocess.run([sys.executable, "-m", "lmx", *words], stdout=subprocess.PIPE, text=True)
    if made.returncode:
        raise SystemExit(f"lmx {' '.join(words)} ended with {made.returncode}; see what it printed above")
    wall, seconds, found = time.perf_counter() - begun, cpu_seconds() - before, json.loads(made.stdout.splitlines()[-1])
    return {
        "case": f"{model} on {topology}, {length} tokens a row, {effort} effort",
        "medians": {"lmx": seconds},
        "wall": wall,
        "floor": found["compile_cpu_seconds"],
        "ratio": PROMISED / seconds,
        "fits": found["fits"],
        "peak_bytes": found["memory"]["peak"],
        "temporaries_bytes": found["memory"]["temporaries"],
        "available_bytes": found["memory"]["available"],
        "step_seconds_at_least": found["roofline"] and found["roofline"]["step"],
        "collectives": found["collectives"],
    }


def cpu_seconds() -> float:
    """That processes which this one started, and which have ended, took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    turns.main(__doc__, None, benchmark)
