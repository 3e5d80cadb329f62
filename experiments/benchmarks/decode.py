"""How fast is greedy decoding? lmx against Hugging Face transformers in torch, and llama.cpp where it is installed.

    python experiments/benchmarks/decode.py [--json] [--quick] [--results FOLDER]

A Llama of 42 M parameters that are read for every token (8 layers, width 512, 8 heads, vocabulary 32000), 128 tokens of
prompt and 128 new ones, at 1 and 8 rows; random weights, which cost what trained ones cost. lmx runs
`lmx.generate` in float32; Hugging Face `generate` in float32 and bfloat16, with the better of its eager and sdpa
attention; llama.cpp float32 (one row) if llama_cpp and gguf can be imported, reported beside them. All take turns and
have the same threads and huge pages, lmx as its command sets them. `ratio` of a case is Hugging Face's float32 time to
lmx's, `ratio_to_bfloat16` its bfloat16 time to lmx's: above 1 lmx is ahead. `floor` is the time to read weights and
cache once a new token at the read bandwidth measured in the same run; the prompt's products are left out of it.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from argparse import Namespace
from typing import Any

import turns

PROMPT, NEW = 128, 128
LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY = 8, 512, 8, 1408, 32000
ROWS, QUICK = {"batch 1": 1, "batch 8": 8, "quick": 3}, "quick"  # the last with 2 layers and 4000 kinds of token
LMX, LLAMA_CPP = turns.LMX, "llama.cpp float32"
FLOAT32, BFLOAT16 = ("torch float32 eager", "torch float32 sdpa"), ("torch bfloat16 eager", "torch bfloat16 sdpa")


def benchmark(options: Namespace) -> dict[str, Any]:
    quick = options.quick
    import jax

    import lmx
    from lmx.models.cost import cost

    rate = turns.read_rate()
    rows = []
    for case, batch in ROWS.items():
        if (case == QUICK) != quick:
            continue
        model = jax.eval_shape(lambda case=case: lmx.init(config(case), jax.random.key(0)))
        beside = (LLAMA_CPP,) if batch == 1 and _has_llama_cpp() and not quick else ()
        names = (LMX, FLOAT32[1], BFLOAT16[0]) if quick else (LMX, *FLOAT32, *BFLOAT16, *beside)
        row = turns.compete(case, names, rounds=2 if quick else 7, warm=1)
        times = row["medians"]
        best = {kind: min(times[name] for name in kind if name in times) for kind in (FLOAT32, BFLOAT16)}
        price = cost(model, PROMPT + NEW // 2)
        weights = price.decode_bytes - price.cache_bytes
        row["floor"] = NEW * (weights + batch * price.cache_bytes) / rate
        row["ratio"], row["ratio_to_bfloat16"] = best[FLOAT32] / times[LMX], best[BFLOAT16] / times[LMX]
        row["ratio_to_llama_cpp"] = times[LLAMA_CPP] / times[LMX] if beside else None
        row["share_of_bandwidth"] = row["floor"] / times[LMX]
        row["tokens_per_second"] = batch * NEW / times[LMX]
        turns.say(
            f"{case}: ratio {row['ratio']:.2f} to float32, {row['ratio_to_bfloat16']:.2f} to bfloat16, "
            f"floor {1e3 * row['floor']:.0f} ms: {row['share_of_bandwidth']:.2f} of the bandwidth"
        )
        rows.append(row)
    least = min(rows, key=lambda row: row["ratio"])
    picked = {name: least[name] for name in ("ratio", "medians", "floor")}
    packages = ("jax", "torch", "transformers", *(("llama_cpp_python",) if _has_llama_cpp() else ()))
    return {"name": "decode", **picked, "versions": turns.versions(*packages), "cases": rows}


def sizes(case: str) -> tuple[int, int]:
    """(layers, vocabulary)."""
    return (2, 4000) if case == QUICK else (LAYERS, VOCABULARY)


def config(case: str) -> Any:
    import lmx

    layers, vocabulary = sizes(case)
    return lmx.preset(
        "llama-17m", num_layers=layers, hidden_size=WIDTH, num_heads=HEADS, intermediate_size=HIDDEN,
        vocab_size=vocabulary,
    )  # fmt: skip


def contend(case: str, name: str) -> turns.Turn:
    if name == LMX:
        return lmx_turn(case)
    return llama_cpp_turn() if name == LLAMA_CPP else torch_turn(name, case)


def prompt(case: str) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(5, sizes(case)[1], (ROWS[case], PROMPT))


def lmx_turn(case: str) -> turns.Turn:
    import jax
    import numpy as np

    import lmx

    model = lmx.init(config(case), jax.random.key(0))
    tokens = prompt(case)
    return lambda: turns.timed(lambda: np.asarray(lmx.generate(model, tokens, max_new_tokens=NEW).tokens))


def torch_turn(name: str, case: str) -> turns.Turn:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _, dtype, kind = name.split()
    layers, vocabulary = sizes(case)
    shape = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
        intermediate_size=HIDDEN, attn_implementation=kind, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).to(getattr(torch, dtype)).eval()
    tokens = torch.tensor(prompt(case))
    seen = torch.ones_like(tokens)

    def work() -> None:
        with torch.inference_mode():
            made = model.generate(
                tokens, attention_mask=seen, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
            )  # fmt: skip
        assert made.shape[1] == PROMPT + NEW

    return lambda: turns.timed(work)


def _has_llama_cpp() -> bool:
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def llama_cpp_turn() -> turns.Turn:
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.gguf")
        write_gguf(path)
        threads = dict(n_threads=os.cpu_count(), n_threads_batch=os.cpu_count())
        model = Llama(path, n_ctx=PROMPT + NEW, use_mmap=False, verbose=False, **threads)
    tokens = prompt("batch 1")[0].tolist()

    def work() -> None:
        model.reset()
        model.eval(tokens)
        for _ in range(NEW):
            model.eval([model.sample(temp=0.0)])

    return lambda: turns.timed(work)


def write_gguf(path: str) -> None:
    """The same shape with random float32 weights, as llama.cpp reads it."""
    import gguf
    import numpy as np

    draw = lambda *shape: 0.02 * np.random.default_rng(0).standard_normal(shape, np.float32)  # noqa: E731
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(PROMPT + NEW)
    file.add_embedding_length(WIDTH)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(HIDDEN)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_dimension_count(WIDTH // HEADS)
    file.add_vocab_size(VOCABULARY)
    file.add_tokenizer_model("no_vocab")
    file.add_tensor("token_embd.weight", draw(VOCABULARY, WIDTH))
    file.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    file.add_tensor("output.weight", draw(VOCABULARY, WIDTH))
    for i in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            file.add_tensor(f"blk.{i}.{name}.weight", draw(WIDTH, WIDTH))
        for name, shape in {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}.items():
            file.add_tensor(f"blk.{i}.ffn_{name}.weight", draw(*shape))
        for name in ("attn_norm", "ffn_norm"):
            file.add_tensor(f"blk.{i}.{name}.weight", np.ones(WIDTH, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


if __name__ == "__main__":
    turns.main(__doc__, contend, benchmark)
