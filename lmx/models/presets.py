"""Named configs, shaped as GPT-2 (learned positions, LayerNorm, GELU, biases) or as Llama (rotary, RMSNorm, SwiGLU)."""

from __future__ import annotations

from typing import Any

from lmx.core.errors import ConfigError, nearest
from lmx.models.config import Config


def _gpt2(layers: int, width: int, heads: int, **changes: Any) -> Config:
    """Radford et al. 2019, table 2."""
    shape = dict(vocab_size=50257, num_layers=layers, hidden_size=width, num_heads=heads, intermediate_size=4 * width)
    kind = dict(activation="gelu_tanh", norm="layernorm", norm_bias=True, position="learned", max_length=1024)
    biases = dict(attention_bias=True, attention_out_bias=True, mlp_bias=True)
    return Config(**(shape | kind | biases | changes))


def _llama(layers: int, width: int, heads: int, hidden: int, **changes: Any) -> Config:
    """Touvron et al. 2023; grouped heads and rope_theta from Grattafiori et al. 2024, "The Llama 3 Herd of Models"."""
    shape = dict(vocab_size=32000, num_layers=layers, hidden_size=width, num_heads=heads, intermediate_size=hidden)
    return Config(**(shape | changes))


_BF16 = dict(tie_embeddings=False, dtype="bfloat16", compute_dtype="bfloat16")
_BIG = dict(vocab_size=128256, num_kv_heads=8, rope_theta=5e5, **_BF16)
PRESETS = {
    "gpt2-tiny": lambda: _gpt2(2, 64, 4, vocab_size=512, max_length=256),
    "gpt2-2m": lambda: _gpt2(4, 160, 5, vocab_size=4096, max_length=1024),
    "gpt2-124m": lambda: _gpt2(12, 768, 12),
    "gpt2-355m": lambda: _gpt2(24, 1024, 16),
    "gpt2-774m": lambda: _gpt2(36, 1280, 20),
    "gpt2-1.5b": lambda: _gpt2(48, 1600, 25),
    "llama-tiny": lambda: _llama(2, 64, 4, 176, vocab_size=512, num_kv_heads=2),
    "llama-2m": lambda: _llama(4, 160, 5, 432, vocab_size=4096),
    "llama-4m": lambda: _llama(6, 192, 6, 512, vocab_size=4096),
    "llama-10m": lambda: _llama(6, 320, 5, 864, vocab_size=8192),
    "llama-17m": lambda: _llama(6, 384, 6, 1024, vocab_size=8192, tie_embeddings=False),
    "llama-110m": lambda: _llama(12, 768, 12, 2048),
    "llama-1b": lambda: _llama(16, 2048, 32, 8192, **(_BIG | dict(tie_embeddings=True))),
    "llama-7b": lambda: _llama(32, 4096, 32, 11008, **_BF16),
    "llama-8b": lambda: _llama(32, 4096, 32, 14336, **_BIG),
    "llama-70b": lambda: _llama(80, 8192, 64, 28672, **_BIG),
}


def preset(name: str, **changes: Any) -> Config:
    """The config of that name, with some fields changed. Raises ConfigError, naming the nearest, if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}, there are {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    return PRESETS[name]().replace(**changes)
