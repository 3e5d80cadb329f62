"""How long does causal attention take? lmx's entry against its own plain reference and against jax.nn's.

    python experiments/benchmarks/attention.py [--json] [--quick]

Forward and backward of softmax(q k') v on one device, float32, all contenders jitted and run in turn; medians over
rounds. On a CPU the entry chooses `blockwise`, which skips the keys after each block of queries. The floor is the
arithmetic of the visible half at the matrix product rate measured in the same run. `ratio` is the least of the cases'
ratios of `jax.nn.dot_product_attention`'s time to lmx's: above 1 lmx is ahead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from lmx.nn.dot_product import attention

CASES = [(8, 256, 6, 64), (4, 512, 6, 64), (1, 1024, 8, 64)]  # batch, length, heads, width of a head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="few rounds of the smallest case")
    options = parser.parse_args()
    rate = product_rate()
    cases = [measure(*case, rate, 3 if options.quick else 15) for case in (CASES[:1] if options.quick else CASES)]
    for case in cases:
        medians = "  ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in case["medians"].items())
        floor, ratio = 1e3 * case["floor"], case["ratio"]
        print(f"{case['case']}: ms: {medians}  floor {floor:.1f}  ratio {ratio:.2f}", file=sys.stderr)
    least = min(cases, key=lambda case: case["ratio"])
    if options.json:
        versions = {"python": sys.version.split()[0], "jax": jax.__version__, "device": jax.devices()[0].device_kind}
        picked = {name: least[name] for name in ("ratio", "medians", "floor")}
        print(json.dumps({"name": "attention", **picked, "versions": versions, "cases": cases}))


def product_rate(size: int = 1024, rounds: int = 9) -> float:
    """FLOP/s of a float32 product of two square matrices, the best of some rounds."""
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / min(seconds(product, a, a) for _ in range(rounds))


def seconds(function, *arguments) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin


def measure(b: int, t: int, h: int, c: int, rate: float, rounds: int) -> dict:
    """Times of one case, the contenders in turn."""
    q, k, v = (jax.random.normal(key, (b, t, h, c)) for key in jax.random.split(jax.random.key(0), 3))
    contenders = {
        "lmx": lambda q, k, v: attention(q, k, v),
        "reference": lambda q, k, v: attention(q, k, v, implementation="reference"),
        "jax.nn": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
    }
    both = {
        name: jax.jit(jax.grad(lambda q, k, v, f=f: jnp.square(f(q, k, v)).sum(), argnums=(0, 1, 2)))
        for name, f in contenders.items()
    }
    for function in both.values():
        seconds(function, q, k, v)
    times = {name: [] for name in both}
    for _ in range(rounds):
        for name, function in both.items():
            times[name].append(seconds(function, q, k, v))
    medians = {name: statistics.median(values) for name, values in times.items()}
    flops = 3 * 2 * 2 * b * h * c * t * (t + 1) / 2  # forward and backward, two products, the visible half
    return {
        "case": f"{b} x {t}, {h} heads of {c}",
        "medians": medians,
        "ratio": medians["jax.nn"] / medians["lmx"],
        "floor": flops / rate,
    }


if __name__ == "__main__":
    main()
