"""Which share of a device does lmx use? Training against the matrix product rate, decoding against the bandwidth.

    python experiments/benchmarks/utilisation.py [--json] [--quick] [--results FOLDER]

For accelerators: a decoder of 0.3 G parameters (llama-1b at 8 layers and a vocabulary of 32000) in bfloat16 takes
training steps of 8 rows of 2048 tokens (AdamW, everything recomputed in the backward pass), and decodes 128 tokens
greedily at 1 and 16 rows. On a CPU the same is done with llama-17m, and shows that it works.
`ratio` is the model FLOPs utilisation of training: the model's own arithmetic (nothing recomputed) a second, over the
rate of a large bfloat16 product measured in the same run on the same device. A decoding case's `ratio` is the bytes of
weights and cache a second over the measured rate of reading memory. `floor` is the seconds that those rates would take.
Goals on a GPU: 0.55 and 0.6.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from typing import Any

import turns


def benchmark(options: Namespace) -> dict[str, Any]:
    import jax

    import lmx

    device = jax.devices()[0]
    accelerated = device.platform != "cpu"
    rounds = 3 if options.quick else 10
    if accelerated:
        shape = dict(num_layers=8, vocab_size=32000, dtype="float32")
        config, batch, length, batches = lmx.preset("llama-1b", **shape), 8, 2048, (1, 16)
    else:
        config, batch, length, batches = lmx.preset("llama-17m"), 4, 256, (1,)
    rows = [train(config, batch, length, rounds)]
    rows += [decode(config, b, length // 2, 16 if options.quick else 128, rounds) for b in batches]
    for row in rows:
        turns.say(f"{row['case']}: {1e3 * row['medians']['lmx']:.1f} ms, {row['ratio']:.2f} of {row['limit']}")
    first = {name: rows[0][name] for name in ("ratio", "medians", "floor")}
    versions = turns.versions("jax", "optax") | {"device": device.device_kind}
    return {"name": "utilisation", **first, "versions": versions, "cases": rows}


def train(config: Any, batch: int, length: int, rounds: int) -> dict[str, Any]:
    import jax

    import lmx
    from lmx.models.cost import cost
    from lmx.train import adamw, make_train_step, start

    optimizer = adamw(1e-4)
    state = start(lmx.init(config, jax.random.key(0)), optimizer)
    step = make_train_step(lmx.losses.cross_entropy, optimizer)
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    flops = cost(state.model, length).train_flops * tokens.size
    rate = turns.product_rate(config.activation_dtype, 8192 if jax.default_backend() != "cpu" else 2048)

    def work() -> None:
        nonlocal state
        state, metrics = step(state, {"tokens": tokens})
        float(metrics["loss"])

    turns.timed(work)
    seconds = statistics.median(turns.timed(work) for _ in range(rounds))
    return {
        "case": f"train {batch} x {length}",
        "medians": {"lmx": seconds},
        "floor": flops / rate,
        "ratio": flops / rate / seconds,
        "limit": f"the {config.activation_dtype} product rate, {rate / 1e12:.2f} TFLOP/s",
        "tokens_per_second": tokens.size / seconds,
    }


def decode(config: Any, batch: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """A decoded token's time: that of `new` tokens less that of one, over their number, so that the prompt is out."""
    import jax

    import lmx
    from lmx.models.cost import cost

    model = lmx.init(config.replace(dtype=config.activation_dtype), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (batch, prompt), 0, config.vocab_size)
    price = cost(model, prompt + new // 2)
    read = price.decode_bytes - price.cache_bytes + batch * price.cache_bytes
    rate = turns.read_rate(512 if jax.default_backend() == "cpu" else 4096)

    def seconds(count: int) -> float:
        work = lambda: jax.block_until_ready(lmx.generate(model, tokens, max_new_tokens=count).tokens)  # noqa: E731
        work()
        return statistics.median(turns.timed(work) for _ in range(rounds))

    each = (seconds(new) - seconds(1)) / (new - 1)
    return {
        "case": f"decode {batch} rows after {prompt} tokens",
        "medians": {"lmx": each},
        "floor": read / rate,
        "ratio": read / rate / each,
        "limit": f"the read bandwidth, {rate / 1e9:.0f} GB/s",
        "tokens_per_second": batch / each,
    }


if __name__ == "__main__":
    turns.main(__doc__, None, benchmark)
