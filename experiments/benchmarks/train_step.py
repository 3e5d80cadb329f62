"""How long does a training step take? lmx against Hugging Face transformers in torch, on the processor's cores.

    python experiments/benchmarks/train_step.py [--json] [--quick] [--results FOLDER]

The preset llama-17m (6 layers, width 384, 6 heads, untied embeddings), rows of 256 tokens, 8 a step, AdamW and clipping
by the norm; the same shape as a LlamaForCausalLM. Cases: float32, float32 with a vocabulary of 32000, and bfloat16
products (torch.autocast there, compute_dtype here). torch runs eager and sdpa attention, its fused AdamW, and, reported
beside them, torch.compile where a C++ compiler is there. All have the same threads and huge pages, lmx as its command
sets them, and take turns. A case's `ratio` is the time of the better of torch's eager and sdpa to lmx's, above 1 lmx
is ahead; its `memory` is lmx's peak over the least of theirs. `floor` is the step's arithmetic (nothing recomputed, the
visible half of attention) at the matrix product rate measured in the same run. `ratio` above all is that of float32.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from typing import Any

import turns

ROWS, LENGTH = 8, 256
CASES = {  # vocabulary, compute dtype
    "float32": (8192, "float32"),
    "float32 vocabulary 32k": (32000, "float32"),
    "bfloat16": (8192, "bfloat16"),
}
PEERS = ("torch eager", "torch sdpa")
LMX, COMPILED = turns.LMX, "torch.compile"


def benchmark(options: Namespace) -> dict[str, Any]:
    quick = options.quick
    import jax

    import lmx
    from lmx.models.cost import cost

    rows = []
    for case in list(CASES)[: 1 if quick else None]:
        vocabulary, dtype = CASES[case]
        beside = (COMPILED,) if shutil.which("g++") and not quick else ()
        peers = PEERS[1:] if quick else PEERS
        row = turns.compete(case, (LMX, *peers, *beside), rounds=2 if quick else 9, warm=1 if quick else 2)
        best, ours = min(row["medians"][name] for name in peers), row["medians"][LMX]
        config = lmx.preset("llama-17m", vocab_size=vocabulary)
        shapes = jax.eval_shape(lambda config=config: lmx.init(config, jax.random.key(0)))
        row["floor"] = cost(shapes, LENGTH).train_flops * ROWS * LENGTH / turns.product_rate(dtype)
        row["ratio"] = best / ours
        row["ratio_to_compile"] = row["medians"][COMPILED] / ours if beside else None
        row["memory"] = row["peak_bytes"][LMX] / min(row["peak_bytes"][name] for name in peers)
        row["tokens_per_second"] = ROWS * LENGTH / ours
        floor = 1e3 * row["floor"]
        turns.say(f"{case}: ratio {row['ratio']:.2f}, memory {row['memory']:.2f}, floor {floor:.0f} ms")
        rows.append(row)
    first = {name: rows[0][name] for name in ("ratio", "medians", "floor")}
    versions = turns.versions("jax", "torch", "transformers")
    return {"name": "train_step", **first, "versions": versions, "cases": rows}


def contend(case: str, name: str) -> turns.Turn:
    vocabulary, dtype = CASES[case]
    return lmx_turn(vocabulary, dtype) if name == LMX else torch_turn(name, vocabulary, dtype)


def tokens(vocabulary: int) -> Any:
    """The same (b, t) tokens for everybody."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocabulary, (ROWS, LENGTH))


def lmx_turn(vocabulary: int, dtype: str) -> turns.Turn:
    import jax
    import jax.numpy as jnp

    import lmx
    from lmx.train import adamw, make_train_step, start

    config = lmx.preset("llama-17m", vocab_size=vocabulary, compute_dtype=dtype)
    optimizer = adamw(1e-3)
    state = start(lmx.init(config, jax.random.key(0)), optimizer)
    step = make_train_step(lmx.losses.cross_entropy, optimizer)
    batch = {"tokens": jnp.asarray(tokens(vocabulary), jnp.int32)}

    def work() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        float(metrics["loss"])

    return lambda: turns.timed(work)


def torch_turn(name: str, vocabulary: int, dtype: str) -> turns.Turn:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    kind = "eager" if name == "torch eager" else "sdpa"
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6,
        intermediate_size=1024, max_position_embeddings=LENGTH, tie_word_embeddings=False, attn_implementation=kind,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    batch = torch.tensor(tokens(vocabulary))
    forward = torch.compile(model) if name == COMPILED else model
    mixed = dtype == "bfloat16"

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = forward(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return lambda: turns.timed(work)


if __name__ == "__main__":
    turns.main(__doc__, contend, benchmark)
