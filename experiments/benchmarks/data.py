"""How many tokens a second does one process feed? lmx's Batches.at against a plain grain pipeline.

    python experiments/benchmarks/data.py [--json] [--quick]

Both shuffle the rows of one memory-mapped token cache (the standard library's source, a token a byte) and
give the same five arrays a batch: tokens, targets, weights, segment_ids, positions. The peer is what one
writes with grain alone: `MapDataset.range(rows).shuffle().map(row).batch(b)`, read by index and by its
prefetching iterator, whichever is faster. The floor is a numpy copy of a finished batch, the same bytes.

Each round runs every contender in turn; medians over rounds. `ratio` is the least of the cases' ratios of lmx
to the peer, in tokens a second. Expect more than 1 M tokens/s, which is what a training loop may ask for, and
a ratio above 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import grain
import numpy as np

from lmx.data import Batches, Document, TokenCache, build_cache, byte_tokenizer, local, num_rows

CASES = [(32, 256), (8, 1024)]  # batch, length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="few rounds on little text")
    options = parser.parse_args()
    rounds, steps = (3, 20) if options.quick else (15, 200)
    with tempfile.TemporaryDirectory() as folder:
        cache = build_cache(source_code(1_000_000 if options.quick else 8_000_000), byte_tokenizer(), folder)
        cases = [measure(cache, batch, length, rounds, steps) for batch, length in CASES]
    for case in cases:
        medians = "  ".join(f"{name} {rate / 1e6:.2f}" for name, rate in case["medians"].items())
        print(f"{case['case']}: M tokens/s: {medians}  ratio {case['ratio']:.2f}", file=sys.stderr)
    slowest = min(cases, key=lambda case: case["ratio"])
    result = {
        "name": "data",
        "ratio": slowest["ratio"],
        "medians": slowest["medians"],
        "floor": slowest["floor"],
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__, "grain": grain.__version__},
        "cases": cases,
    }
    if options.json:
        print(json.dumps(result))


def source_code(limit: int) -> list[Document]:
    """The built-in corpus's code, up to `limit` bytes."""
    documents, total = [], 0
    for document in local.collect().documents:
        if document.domain == "code" and total < limit:
            documents.append(document)
            total += document.num_bytes
    return documents


def measure(cache: TokenCache, batch: int, length: int, rounds: int, steps: int) -> dict:
    """Median tokens a second of each contender, run in turn."""
    batches = Batches(cache, batch, length, seed=0)
    peer = grain_pipeline(cache, batch, length)
    finished = batches.at(0)
    contenders: dict[str, Callable[[range], Iterable]] = {
        "lmx": lambda span: map(batches.at, span),
        "grain by index": lambda span: (peer[step] for step in span),
        # sliced, so that its threads have nothing left to fetch while the next contender runs
        "grain iterator": lambda span: peer.slice(slice(span.start, span.stop)).to_iter_dataset(),
        "floor": lambda span: ({name: array.copy() for name, array in finished.items()} for _ in span),
    }
    check_same_rows(cache, batch, length, peer)
    rates = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, make in contenders.items():
            begin = time.perf_counter()
            for _ in make(range(turn * steps, (turn + 1) * steps)):
                pass
            rates[name].append(batch * length * steps / (time.perf_counter() - begin))
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}  # the first warms up
    return {
        "case": f"batch {batch} length {length}",
        "ratio": medians["lmx"] / max(medians["grain by index"], medians["grain iterator"]),
        "medians": medians,
        "floor": medians["floor"],
    }


def grain_pipeline(cache: TokenCache, batch: int, length: int) -> grain.MapDataset:
    """The peer: a row is cut from the stream, then grain stacks rows."""

    def row(index: int) -> dict[str, np.ndarray]:
        stream = cache.tokens[index * length : index * length + length + 1].astype(np.int32)
        places = np.arange(index * length, (index + 1) * length)
        document = np.searchsorted(cache.documents, places, side="right") - 1
        begins = np.maximum(cache.documents[document], places[0])
        return {
            "tokens": stream[:-1],
            "targets": stream[1:],
            "weights": np.ones(length, np.float32),
            "segment_ids": (document - document[0] + 1).astype(np.int32),
            "positions": (places - begins).astype(np.int32),
        }

    whole_rows = (cache.num_tokens - 1) // length  # leaves out the padded last row
    rows = grain.MapDataset.range(whole_rows).seed(0).shuffle().map(row)
    return rows.batch(batch, drop_remainder=True).repeat()


def check_same_rows(cache: TokenCache, batch: int, length: int, peer: grain.MapDataset) -> None:
    """Both give the same arrays for the same row (the orders differ)."""
    first = peer[0]
    ours = Batches(cache, batch, length, seed=0)
    found = 0
    for step in range(-(-num_rows(cache, length) // batch)):
        candidate = ours.at(step)
        for i in np.flatnonzero((candidate["targets"] == first["targets"][0]).all(axis=1)):
            found += all(np.array_equal(candidate[name][i], first[name][0]) for name in first)
    assert found, "the peer's first row is not among lmx's"


if __name__ == "__main__":
    main()
