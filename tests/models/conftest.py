"""What the tests of models share: tiny random Hugging Face models with their weights in lmx.

The conversion here is for tests only and written from the two layouts, apart from the one that users have.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.tree import Layers
from lmx.models.config import Config
from lmx.models.transformer import Block, Model, Params, Tower
from lmx.nn import attention, embed, heads, mlp, norm


@pytest.fixture(scope="session")
def hugging_face():
    """`hugging_face(name)` -> (a torch model with random weights, `convert`): convert turns a state dict, or
    gradients under its names, into the lmx model."""
    torch = pytest.importorskip("torch", reason="torch is the oracle of whole models; install the extra 'oracle'")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of whole models")
    made = {}

    def make(name: str):
        if name not in made:
            torch.manual_seed(0)
            made[name] = _gpt2(transformers) if name == "gpt2" else _llama(transformers, tied=name == "llama tied")
        return made[name]

    return make


def _randomise(torch_model) -> None:
    """Norm scales near 1, all else of size 0.15, biases too: every parameter matters."""
    import torch

    with torch.no_grad():
        for name, parameter in torch_model.named_parameters():
            parameter.normal_(1.0 if ("norm" in name or "ln_" in name) and "bias" not in name else 0.0, 0.15)


def _gpt2(transformers) -> tuple:
    config = transformers.GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=4)
    torch_model = transformers.GPT2LMHeadModel(config).eval()
    _randomise(torch_model)
    ours = Config(
        vocab_size=61, num_layers=3, hidden_size=32, num_heads=4, intermediate_size=128,
        activation="gelu_tanh", norm="layernorm", norm_bias=True, position="learned", max_length=24,
        attention_bias=True, attention_out_bias=True, mlp_bias=True,
    )  # fmt: skip

    def convert(w: dict[str, np.ndarray]) -> Model:
        def block(i: int) -> Block:
            at = lambda name: w[f"transformer.h.{i}.{name}"]  # noqa: E731
            q, k, v = (x.reshape(32, 4, 8) for x in np.split(at("attn.c_attn.weight"), 3, axis=1))
            q_bias, k_bias, v_bias = (x.reshape(4, 8) for x in np.split(at("attn.c_attn.bias"), 3))
            out = at("attn.c_proj.weight").reshape(4, 8, 32)
            return Block(
                norm.Norm(at("ln_1.weight"), at("ln_1.bias")),
                attention.Attention(q, k, v, out, q_bias, k_bias, v_bias, at("attn.c_proj.bias")),
                norm.Norm(at("ln_2.weight"), at("ln_2.bias")),
                mlp.MLP(
                    None,
                    at("mlp.c_fc.weight"),
                    at("mlp.c_proj.weight"),
                    at("mlp.c_fc.bias"),
                    at("mlp.c_proj.bias"),
                ),
            )

        embedding = embed.Embedding(w["transformer.wte.weight"], w["transformer.wpe.weight"])
        last = norm.Norm(w["transformer.ln_f.weight"], w["transformer.ln_f.bias"])
        return _model(ours, embedding, [block(i) for i in range(3)], last, None)

    return torch_model, convert


def _llama(transformers, tied: bool) -> tuple:
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=tied,
    )  # fmt: skip
    torch_model = transformers.LlamaForCausalLM(config).eval()
    _randomise(torch_model)
    ours = Config(
        vocab_size=61, num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=40,
        tie_embeddings=tied,
    )  # fmt: skip

    def convert(w: dict[str, np.ndarray]) -> Model:
        def block(i: int) -> Block:
            plain = lambda name: w[f"model.layers.{i}.{name}.weight"]  # noqa: E731
            q, k, v = (plain(f"self_attn.{x}_proj").T.reshape(32, -1, 8) for x in "qkv")
            out = plain("self_attn.o_proj").T.reshape(4, 8, 32)
            gate, up, down = (plain(f"mlp.{x}_proj").T for x in ("gate", "up", "down"))
            return Block(
                norm.Norm(plain("input_layernorm"), None),
                attention.Attention(q, k, v, out, None, None, None, None),
                norm.Norm(plain("post_attention_layernorm"), None),
                mlp.MLP(gate, up, down, None, None),
            )

        tokens = embed.Embedding(w["model.embed_tokens.weight"], None)
        head = None if tied else w["lm_head.weight"].T
        return _model(ours, tokens, [block(i) for i in range(3)], norm.Norm(w["model.norm.weight"], None), head)

    return torch_model, convert


def _model(config: Config, embedding, blocks: list[Block], last, head) -> Model:
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    params = Params(embedding, Tower(Layers.of([(stack,)]), last), heads.Head(out=head))
    return Model(config, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))
