"""What the benchmarks share: contenders that take turns in processes of their own, and what the machine can do.

A contender is a child process, so that nobody's threads, caches or memory stand in another's way. It prepares itself
once, and then runs one timed turn whenever it is its turn; the others wait without using the processor. A benchmark is

    if __name__ == "__main__":
        turns.main(__doc__, contend, benchmark)

where `contend(case, name)` prepares a contender and returns its turn, a function that returns the seconds of one unit
of work, and `benchmark(options)` calls `compete` and returns the JSON object that is printed. `--results FOLDER` also
writes it there as NAME.json, with what a benchmark draws.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Turn = Callable[[], float]
# All get huge pages: lmx as the command sets its process, others by glibc and (torch) by asking for them. What else the
# command sets makes torch no faster and makes it hold more memory, so it goes without.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}
LMX = "lmx"  # contenders whose names begin so have processes that are set as the command sets its own
SILENT = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(
    doc: str,
    contend: Callable[[str, str], Turn] | None,
    benchmark: Callable[[argparse.Namespace], dict[str, Any]],
    **more: str,
) -> None:
    """Parse the options, and be the benchmark or (started by `compete`) one of its contenders.

    more: options of this benchmark, which take a word, and their help."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="little work, within a minute")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the JSON object, and plots, there too")
    for name, text in more.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--contend", nargs=2, metavar=("CASE", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        if options.contend[1].startswith(LMX):
            from lmx.cli.start import return_memory

            return_memory()
        _serve(contend(*options.contend))
        return
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
    result = benchmark(options)
    if options.results:
        (options.results / f"{result['name']}.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result))


def _serve(turn: Turn) -> None:
    """One turn for every line on stdin; its seconds, and the most memory so far, on stdout."""
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps([turn(), peak_bytes()]), flush=True)


def peak_bytes() -> int:
    """The most memory this process has held."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Give back what is free, and let `peak_bytes` begin anew. Other threads take a moment to free what they used."""
    time.sleep(1)
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Contender:
    """A child process of this script which prepares at once and then waits for its turns."""

    def __init__(self, case: str, name: str) -> None:
        self.name, self.seconds, self.peak = name, [], 0
        words = [sys.executable, os.path.abspath(sys.argv[0]), "--contend", case, name]
        environment = os.environ | (process_of_lmx() if name.startswith(LMX) else ENVIRONMENT) | SILENT
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.read()  # ready

    def read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            self.process.kill()
            raise SystemExit(f"the contender {self.name} ended with {self.process.wait()}; see what it printed above")
        return line

    def turn(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        seconds, self.peak = json.loads(self.read())
        self.seconds.append(seconds)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def process_of_lmx() -> dict[str, str]:
    """The environment that the `lmx` command gives its process."""
    from lmx.cli.start import TUNABLES

    return {"GLIBC_TUNABLES": TUNABLES}


def compete(case: str, names: Sequence[str], rounds: int, warm: int = 2) -> dict[str, Any]:
    """One case: {"case", "medians" in seconds, "least" seconds, "peak_bytes"}, each by contender, of `rounds` turns.

    Each round runs every contender once; `warm` rounds before are not counted.
    """
    there = []
    try:
        for name in names:
            say(f"{case}: preparing {name}")
            there.append(Contender(case, name))
        for _ in range(warm + rounds):
            for contender in there:
                contender.turn()
    finally:
        for contender in there:
            contender.end()
    counted = {c.name: c.seconds[warm:] for c in there}
    row = {
        "case": case,
        "medians": {name: statistics.median(seconds) for name, seconds in counted.items()},
        "least": {name: min(seconds) for name, seconds in counted.items()},
        "peak_bytes": {c.name: c.peak for c in there},
    }
    for name in counted:
        memory = row["peak_bytes"][name] / 1e6
        say(f"{case}: {name:<22} {1e3 * row['medians'][name]:9.1f} ms, peak memory {memory:6.0f} MB")
    return row


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def versions(*packages: str) -> dict[str, str]:
    """Of Python, the packages, and the processor that all this ran on."""
    there = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **there, "processor": f"{os.cpu_count()} x {processor()}"}


def processor() -> str:
    """Its name and the widest vectors that it has, on which products depend most."""
    with open("/proc/cpuinfo") as info:
        lines = dict(line.split(":", 1) for line in info if ":" in line)  # those of the last core
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    vectors = [flag for flag in ("avx512_bf16", "avx512f", "avx2") if flag in lines.get("flags", "").split()]
    return ", ".join([lines.get("model name", platform.machine()), *vectors[:1]])


def product_rate(dtype: str = "float32", size: int = 2048, rounds: int = 7) -> float:
    """FLOP/s of jax's product of two square matrices with a float32 result, the best of some rounds."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    return 2 * size**3 / min(timed(lambda: product(a, a).block_until_ready()) for _ in range(rounds))


def read_rate(megabytes: int = 512, rounds: int = 7) -> float:
    """Bytes a second at which jax reads memory on all cores, the best of some rounds: a matrix times a vector."""
    import jax
    import jax.numpy as jnp

    width = 4096
    a = jnp.ones((megabytes * 2**20 // (4 * width), width))
    x = jnp.ones((width,))
    product = jax.jit(jnp.matmul)
    product(a, x).block_until_ready()
    return a.nbytes / min(timed(lambda: product(a, x).block_until_ready()) for _ in range(rounds))
