"""Floor 3, evaluation: how good a language model is, beside references on the same text."""

from lmx.evaluate.bits import bits_per_byte, lzma_bits_per_byte, mean_nll

__all__ = ["bits_per_byte", "lzma_bits_per_byte", "mean_nll"]
