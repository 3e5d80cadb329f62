"""BERT (Devlin et al. 2019), and what the encoders that follow it share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmx.core.errors import ConfigError
from lmx.hf.families.gpt2 import ACTIVATIONS
from lmx.hf.families.llama import activation, activation_name
from lmx.hf.family import Class, Family
from lmx.hf.tables import Table, copy, embedding, ignored, linear, norm, tensor, within
from lmx.models.config import Config

DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
}
# Encoders alone; and where config.json unties the embedding, the two biases that a masked head has come apart too.
FIXED = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
TIED = {"tie_word_embeddings": True}
RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
EMBEDDINGS = (
    embedding("word_embeddings", "tokens"),
    embedding("position_embeddings", "positions"),
    embedding("token_type_embeddings", "types"),
    norm("LayerNorm", "norm"),
    ignored("position_ids"),  # 0, 1, 2, ..., which old files hold
)
LAYER = (
    linear("attention.self.query", "attention/query"),
    linear("attention.self.key", "attention/key"),
    linear("attention.self.value", "attention/value"),
    linear("attention.output.dense", "attention/out"),
    norm("attention.output.LayerNorm", "attention_norm"),
    linear("intermediate.dense", "mlp/up"),
    linear("output.dense", "mlp/down"),
    norm("output.LayerNorm", "mlp_norm"),
)
# What heads set in Config. The hidden layer of a masked head has the activation of the layers unless its class says it.
MASKED = {"head_norm": True, "head_bias": True}
POOLED = {"head_activation": "tanh"}
HIDDEN = {"head_activation": "tanh", "head_bias": True}
PLAIN = {"head_activation": None, "head_bias": True}


def body(prefix: str) -> Table:
    """The table of an encoder whose names begin with `prefix`."""
    return (
        within(f"{prefix}embeddings.", "embed/", *EMBEDDINGS),
        within(f"{prefix}encoder.layer.{{i}}.", "encoder/layers/", *LAYER),
    )


def masked(transform: str, layer_norm: str, out: str, embeddings: str) -> Table:
    """The table of a head over the vocabulary: a hidden layer, its norm, and the token table with a bias, which files
    may hold twice. `embeddings`: the prefix of the token table's module."""
    bias = f"{out.rpartition('.')[0]}.bias"
    return (
        linear(transform, "head/hidden"),
        norm(layer_norm, "head/norm"),
        tensor(bias, "head/out_bias"),
        copy(f"{out}.weight", f"{embeddings}word_embeddings.weight"),
        copy(f"{out}.bias", bias),
    )


def read(v: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Config for an encoder with learned positions and norms after the residuals."""
    function = activation(v["hidden_act"], ACTIVATIONS)
    return {
        "architecture": "encoder",
        "vocab_size": v["vocab_size"],
        "num_layers": v["num_hidden_layers"],
        "hidden_size": v["hidden_size"],
        "num_heads": v["num_attention_heads"],
        "intermediate_size": v["intermediate_size"],
        "activation": function,
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": v["layer_norm_eps"],
        "norm_placement": "post",
        "embedding_norm": True,
        "type_vocab_size": v["type_vocab_size"],
        "position": "learned",
        "max_length": v["max_position_embeddings"],
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "head_activation": function,
        "initializer_range": v["initializer_range"],
    }


def write(c: Config) -> dict[str, Any]:
    """The inverse of `read`. Raises ConfigError where there are no token types: these families always add one."""
    if not c.type_vocab_size:
        raise ConfigError("type_vocab_size 0: every token has a type there")
    return fields(c)


def fields(c: Config) -> dict[str, Any]:
    """What `write` gives, of any config."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.intermediate_size,
        "hidden_act": activation_name(c.activation, ACTIVATIONS),
        "max_position_embeddings": c.max_length,
        "type_vocab_size": c.type_vocab_size,
        "initializer_range": c.initializer_range,
        "layer_norm_eps": c.norm_eps,
    }


POOLER = linear("bert.pooler.dense", "head/hidden")
NO_POOLER = ignored(r"bert\.pooler\..*")  # files of pretraining hold it beside other heads
CLASSIFIER = linear("classifier", "head/out")
MASKED_HEAD = (
    masked(
        "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder",
        "bert.embeddings.",
    ),
    ignored(r"cls\.seq_relationship\..*"),
    NO_POOLER,
)  # fmt: skip

FAMILY = Family(
    model_type="bert",
    classes={
        "BertForMaskedLM": Class("lm", MASKED_HEAD, MASKED),
        "BertModel": Class("pooled", POOLER, POOLED, optional=True),
        "BertForSequenceClassification": Class("sequence", (POOLER, CLASSIFIER), HIDDEN),
        "BertForTokenClassification": Class("tokens", (CLASSIFIER, NO_POOLER), PLAIN),
        "BertForQuestionAnswering": Class("spans", (linear("qa_outputs", "head/out"), NO_POOLER), PLAIN),
    },
    defaults=DEFAULTS,
    read=read,
    write=write,
    table=body("bert."),
    fixed=FIXED | TIED,
    prefix="bert.",
    renames=RENAMES,
)
