"""How fast a language model reads a prompt and writes after it, on the devices at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from lmx import decode
from lmx.core.errors import ConfigError
from lmx.models.protocol import LanguageModel


def speeds(
    model: LanguageModel, *, rows: int = 1, prompt: int = 128, new: int = 32, repeats: int = 3
) -> dict[str, float]:
    """{"prefill", "decode"}: tokens a second of prompts of so many tokens, and of so many new ones after them.

    Both by greedy `lmx.generate`, the median of some repeats after a first, which compiles; decoding is what more new
    tokens take than one. Raises ConfigError for numbers below 1, or new below 2.
    """
    numbers = {"rows": rows, "prompt": prompt, "repeats": repeats, "new": new - 1}
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least {1 if name != 'new' else 2}, not {value + (name == 'new')}")
    tokens = jax.random.randint(jax.random.key(0), (rows, prompt), 0, model.vocab_size)

    def run(count: int) -> Any:
        return jax.block_until_ready(decode.generate(model, tokens, max_new_tokens=count, temperature=0.0).tokens)

    runs: dict[int, list[float]] = {1: [], new: []}
    for _ in range(repeats + 1):
        for count, times in runs.items():
            times.append(_seconds(lambda count=count: run(count)))
    one, all_of_them = (statistics.median(times[1:]) for times in runs.values())
    return {"prefill": rows * prompt / one, "decode": rows * (new - 1) / max(all_of_them - one, 1e-9)}


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
