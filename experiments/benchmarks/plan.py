"""How long does it take to plan? An 8 B model on 256 chips, compiled on this machine's CPU, within two minutes of it.

    python experiments/benchmarks/plan.py [--json] [--quick] [--results FOLDER]

The command `lmx plan llama-8b --topology v5e:16x16 --length 4096` runs in a process of its own, and the CPU seconds of
all its threads are counted, the start of Python included. `ratio` is the promised 120 seconds to those: above 1 the
promise is kept. `floor` is what of them was spent on tracing and compiling the step. What the plan says is told beside:
whether the step fits, its peak memory and its collectives. `--quick` plans llama-1b on v5e:2x4. Needs `lmx[plan]`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from argparse import Namespace
from typing import Any

import turns

PROMISED = 120.0  # seconds of CPU


def benchmark(options: Namespace) -> dict[str, Any]:
    model, topology = ("llama-1b", "v5e:2x4") if options.quick else ("llama-8b", "v5e:16x16")
    row = plan(model, topology, 4096)
    peak, available = (row[name] / 2**30 for name in ("peak_bytes", "available_bytes"))
    seconds, verdict = row["medians"]["lmx"], "fits" if row["fits"] else "does not fit"
    turns.say(f"{row['case']}: {seconds:.0f} s of CPU; {verdict}, peak {peak:.2f} of {available:.2f} GiB")
    for kind in row["collectives"] or []:
        turns.say(f"  {kind['kind']:<20} {kind['count']:>6} x, {kind['bytes'] / 1e9:8.2f} GB")
    return {
        "name": "plan",
        **{name: row[name] for name in ("ratio", "medians", "floor")},
        "versions": turns.versions("jax", "libtpu"),
        "cases": [row],
    }


def plan(model: str, topology: str, length: int) -> dict[str, Any]:
    """One plan: the CPU seconds of its process, and what it found."""
    words = ["plan", model, "--topology", topology, "--length", str(length), "--json"]
    before = cpu_seconds()
    made = subprocess.run([sys.executable, "-m", "lmx", *words], stdout=subprocess.PIPE, text=True)
    if made.returncode:
        raise SystemExit(f"lmx {' '.join(words)} ended with {made.returncode}; see what it printed above")
    seconds, found = cpu_seconds() - before, json.loads(made.stdout.splitlines()[-1])
    return {
        "case": f"{model} on {topology}, {length} tokens a row",
        "medians": {"lmx": seconds},
        "floor": found["compile_cpu_seconds"],
        "ratio": PROMISED / seconds,
        "fits": found["fits"],
        "peak_bytes": found["memory"]["peak"],
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
