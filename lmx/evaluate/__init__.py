"""Floor 3, evaluation: how good a language model is, beside references on the same text."""

from lmx.evaluate.bits import bits_per_byte, lzma_bits_per_byte, mean_nll
from lmx.evaluate.divergence import mean_kl
from lmx.evaluate.harness import harness_model
from lmx.evaluate.latency import speeds

__all__ = ["bits_per_byte", "harness_model", "lzma_bits_per_byte", "mean_kl", "mean_nll", "speeds"]
