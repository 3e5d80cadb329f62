"""BART (Lewis et al. 2020): encoder and decoder share their tokens, learn their positions and normalise after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families.gpt2 import ACTIVATIONS
from lmx.hf.families.llama import activation, activation_name
from lmx.hf.family import Class, Family
from lmx.hf.tables import Table, copy, embedding, ignored, linear, norm, tensor, within
from lmx.models.config import Config

LAYERS = {
    "vocab_size": 50265,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "activation_function": "gelu",
    "d_model": 1024,
    "init_std": 0.02,
    "scale_embedding": False,
}
DEFAULTS = LAYERS | {"max_position_embeddings": 1024, "num_labels": 3}
OFFSET = 2  # rows before the first position, as fairseq had padding there
EPS = 1e-5


def _layers(tower: str) -> Table:
    def attention(theirs: str, ours: str) -> Table:
        names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
        return within(f"{theirs}.", f"{ours}/", *(linear(name, leaf) for name, leaf in names.items()))

    return within(
        f"model.{tower}.layers.{{i}}.", f"{tower}/layers/",
        attention("self_attn", "attention"),
        norm("self_attn_layer_norm", "attention_norm"),
        attention("encoder_attn", "cross"),
        norm("encoder_attn_layer_norm", "cross_norm"),
        linear("fc1", "mlp/up"),
        linear("fc2", "mlp/down"),
        norm("final_layer_norm", "mlp_norm"),
    )  # fmt: skip


TOWERS: Table = (
    embedding("model.shared", "embed/tokens"),
    copy("model.encoder.embed_tokens.weight", "model.shared.weight"),
    copy("model.decoder.embed_tokens.weight", "model.shared.weight"),
    _layers("encoder"),
    _layers("decoder"),
)
TABLE: Table = (
    TOWERS,
    embedding("model.encoder.embed_positions", "encoder_embed/positions"),
    embedding("model.decoder.embed_positions", "embed/positions"),
    norm("model.encoder.layernorm_embedding", "encoder_embed/norm"),
    norm("model.decoder.layernorm_embedding", "embed/norm"),
    ignored(r"model\.(encoder|decoder)\.version"),
)
LM_HEAD = Class(
    "lm",
    (tensor("final_logits_bias", "head/out_bias", "row"), copy("lm_head.weight", "model.shared.weight")),
    {"head_bias": True},
)
DENSE = (linear("classification_head.dense", "head/hidden"), linear("classification_head.out_proj", "head/out"))


def read(v: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Config, without those of positions and of the embedding's norm."""
    return {
        "architecture": "encoder_decoder",
        "vocab_size": v["vocab_size"],
        "num_layers": v["decoder_layers"],
        "num_encoder_layers": v["encoder_layers"],
        "hidden_size": v["d_model"],
        "num_heads": v["decoder_attention_heads"],
        "intermediate_size": v["decoder_ffn_dim"],
        "num_encoder_heads": v["encoder_attention_heads"],
        "encoder_intermediate_size": v["encoder_ffn_dim"],
        "activation": activation(v["activation_function"], ACTIVATIONS),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": EPS,
        "norm_placement": "post",
        "embedding_scale": v["d_model"] ** 0.5 if v["scale_embedding"] else 1.0,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "initializer_range": v["init_std"],
    }


def write(c: Config) -> dict[str, Any]:
    """The inverse of `read`."""
    towers = {name: c.tower(name) for name in ("encoder", "decoder")}
    return {
        "encoder_layers": c.num_encoder_layers,
        "decoder_layers": c.num_layers,
        **{f"{name}_ffn_dim": tower.intermediate_size for name, tower in towers.items()},
        **{f"{name}_attention_heads": tower.num_heads for name, tower in towers.items()},
        "vocab_size": c.vocab_size,
        "d_model": c.hidden_size,
        "activation_function": activation_name(c.activation, ACTIVATIONS),
        "scale_embedding": c.embedding_scale != 1.0,
        "init_std": c.initializer_range,
    }


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    positions = {"position": "learned", "position_offset": OFFSET, "max_length": v["max_position_embeddings"]}
    return {**read(v), **positions, "embedding_norm": True}


def _write(c: Config) -> dict[str, Any]:
    return {**write(c), "max_position_embeddings": c.max_length}


FAMILY = Family(
    model_type="bart",
    classes={
        "BartForConditionalGeneration": LM_HEAD,
        "BartModel": Class("none"),
        "BartForQuestionAnswering": Class("spans", linear("qa_outputs", "head/out"), {"head_bias": True}),
        "BartForSequenceClassification": Class(  # of the last token's vector, which is </s> as transformers has it
            "sequence", DENSE, {"head_activation": "tanh", "head_bias": True, "pool": "last"}
        ),
    },
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=TABLE,
    fixed={"tie_word_embeddings": True, "is_encoder_decoder": True},
    prefix="model.",
)
