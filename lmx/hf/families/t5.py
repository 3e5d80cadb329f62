"""T5 (Raffel et al. 2020), 1.0 and 1.1: an encoder and a decoder whose positions are biases by distance, in one table a
tower, and whose attention is not scaled.

Version 1.0 scales the logits by 1 / sqrt(d) and has one matrix for tokens and head, 1.1 neither. transformers 5 keeps
the scale alone in config.json, under two names, and writes tie_word_embeddings as true whatever the files hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.hf.families.llama import activation, activation_name
from lmx.hf.family import Class, Family
from lmx.hf.tables import Table, copy, embedding, ignored, linear, norm, within
from lmx.models.config import Config
from lmx.nn import mlp

ACTIVATIONS = {
    "relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu", "gated-relu": "reglu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "silu": "silu", "gated-gelu_new": "geglu_tanh", "gated-swish": "swiglu", "swish": "silu",
}  # fmt: skip
SHAPE = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "initializer_range": 0.02,  # lmx's own: theirs is a factor of several
}
DEFAULTS = SHAPE | {"tie_word_embeddings": True, "scale_decoder_outputs": None}
HEAD = "ForConditionalGeneration"
ALONE = ("EncoderModel", "ForTokenClassification")  # classes without a decoder


def table(c: Config) -> Table:
    """Encoder and decoder; where the feed-forward layer is gated its matrices have other names."""
    _, gated = mlp.ACTIVATIONS[c.activation]
    return (
        embedding("transformer.shared", "embed/tokens"),
        copy("transformer.encoder.embed_tokens.weight", "transformer.shared.weight"),
        copy("transformer.decoder.embed_tokens.weight", "transformer.shared.weight"),
        _tower("encoder", 1, gated),
        _tower("decoder", 2, gated),
        ignored(r"transformer\.decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
    )


def _tower(name: str, last: int, gated: bool) -> Table:
    up = (linear("wi_0", "mlp/gate"), linear("wi_1", "mlp/up")) if gated else linear("wi", "mlp/up")
    return within(
        f"transformer.{name}.", f"{name}/",
        within(
            "block.{i}.", "layers/",
            norm("layer.0.layer_norm", "attention_norm"),
            _attention("layer.0.SelfAttention.", "attention/"),
            norm("layer.1.layer_norm", "cross_norm") if last == 2 else (),
            _attention("layer.1.EncDecAttention.", "cross/"),
            norm(f"layer.{last}.layer_norm", "mlp_norm"),
            within(f"layer.{last}.DenseReluDense.", "", up, linear("wo", "mlp/down")),
        ),
        embedding("block.0.layer.0.SelfAttention.relative_attention_bias", "position_bias"),
        norm("final_layer_norm", "norm"),
    )  # fmt: skip


def _attention(theirs: str, ours: str) -> Table:
    names = {"q": "query", "k": "key", "v": "value", "o": "out"}
    return within(theirs, ours, *(linear(name, leaf) for name, leaf in names.items()))


def read(v: Mapping[str, Any], scaled: bool) -> dict[str, Any]:
    """The arguments of Config; scaled: whether the logits are."""
    alone = v["architectures"][0].endswith(ALONE)
    layers = {"num_layers": v["num_layers"], "architecture": "encoder"}
    if not alone:
        decoder = v["num_layers"] if v["num_decoder_layers"] is None else v["num_decoder_layers"]
        layers = {"num_layers": decoder, "num_encoder_layers": v["num_layers"], "architecture": "encoder_decoder"}
    return {
        **layers,
        "vocab_size": v["vocab_size"],
        "hidden_size": v["d_model"],
        "num_heads": v["num_heads"],
        "head_dim": v["d_kv"],
        "intermediate_size": v["d_ff"],
        "activation": activation(v["feed_forward_proj"], ACTIVATIONS),
        "norm_eps": v["layer_norm_epsilon"],
        "position": "relative",
        "relative_buckets": v["relative_attention_num_buckets"],
        "relative_max_distance": v["relative_attention_max_distance"],
        "attention_scale": 1.0,
        "initializer_range": v["initializer_range"],
        "logit_scale": v["d_model"] ** -0.5 if scaled and v["architectures"][0].endswith(HEAD) else 1.0,
    }


def write(c: Config) -> dict[str, Any]:
    """The inverse of `read`, but for the scale."""
    proj = activation_name(c.activation, ACTIVATIONS)
    encoder = c.architecture == "encoder"
    return {
        "is_encoder_decoder": not encoder,
        "vocab_size": c.vocab_size,
        "d_model": c.hidden_size,
        "d_kv": c.head_dim,
        "d_ff": c.intermediate_size,
        "num_layers": c.num_layers if encoder else c.num_encoder_layers,
        "num_decoder_layers": c.num_layers,
        "num_heads": c.num_heads,
        "relative_attention_num_buckets": c.relative_buckets,
        "relative_attention_max_distance": c.relative_max_distance,
        "layer_norm_epsilon": c.norm_eps,
        "feed_forward_proj": proj,
        "is_gated_act": proj.startswith("gated-"),
        "dense_act_fn": {"gated-gelu": "gelu_new"}.get(proj, proj.removeprefix("gated-")),
        "initializer_range": c.initializer_range,
    }


def classes(name: str) -> dict[str, Class]:
    """The classes of a family of this kind, by its name in them."""
    both, alone = {"architecture": "encoder_decoder"}, {"architecture": "encoder"}
    head = (linear("lm_head", "head/out"), copy("lm_head.weight", "transformer.shared.weight"))
    hidden = {"head_activation": "tanh", "pool": "last"}  # of the vector of </s>, the last one
    bias = {"head_bias": True}
    dense = (linear("classification_head.dense", "head/hidden"), linear("classification_head.out_proj", "head/out"))
    return {
        f"{name}{HEAD}": Class("lm", head, both, prefix=""),
        f"{name}Model": Class("none", (), both),
        f"{name}EncoderModel": Class("none", (), alone),
        f"{name}ForTokenClassification": Class("tokens", linear("classifier", "head/out"), bias | alone),
        f"{name}ForQuestionAnswering": Class("spans", linear("qa_outputs", "head/out"), bias | both, prefix=""),
        f"{name}ForSequenceClassification": Class("sequence", dense, hidden | bias | both),
    }


def _read(v: Mapping[str, Any]) -> dict[str, Any]:
    given = v["scale_decoder_outputs"]
    scaled = v["tie_word_embeddings"] is not False if given is None else given
    return {**read(v, scaled), "tie_embeddings": scaled}


def _write(c: Config) -> dict[str, Any]:
    if c.head != "lm":
        return write(c)
    scaled = c.logit_scale != 1.0
    return {**write(c), "tie_word_embeddings": scaled, "scale_decoder_outputs": scaled}


FAMILY = Family(
    model_type="t5",
    classes=classes("T5"),
    defaults=DEFAULTS,
    read=_read,
    write=_write,
    table=table,
    prefix="transformer.",
    tied_by_files=("lm_head.weight", "shared.weight"),
)
