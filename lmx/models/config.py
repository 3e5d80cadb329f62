"""`Config`: everything static about a Transformer, as one frozen, hashable value.

Equal configs are one key of jit's cache, so values are kept canonical: numpy scalars become Python's, dtypes strings,
and what cannot be hashed safely (arrays, lists, NaN) is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lmx.core import sharding
from lmx.core.errors import ConfigError, nearest
from lmx.core.nodes import register
from lmx.models.fields import AUTO, canonical, check_choice, check_positive, scaling_pairs, tuples
from lmx.nn import dot_product, heads, mlp, position
from lmx.nn import norm as norms

VERSION = 1  # of the fields below, written to config.json; raised when their meaning changes
LAYER_KINDS = ("global", "local", "unrotated", "local_unrotated")
CHOICES = {
    "architecture": ("decoder", "encoder", "encoder_decoder"),
    "activation": tuple(mlp.ACTIVATIONS),
    "norm": norms.KINDS,
    "norm_placement": ("pre", "post", "both", "output"),
    "position": ("rotary", "learned", "sinusoidal", "relative", "none"),
    "qk_norm": ("none", "head", "full"),
    "head": ("lm", "sequence", "tokens", "spans", "pooled", "none"),
    "pool": heads.POOLS,
    "remat": ("none", "dots", "full"),
    "attention": dot_product.IMPLEMENTATIONS,
}
GIVEN = ("vocab_size", "num_layers", "hidden_size", "num_heads", "intermediate_size")
POSITIVE = (*GIVEN, "num_kv_heads", "head_dim", "relative_buckets", "relative_max_distance", "layer_repeats")
OF_ENCODERS = {"num_encoder_heads": "num_heads", "encoder_intermediate_size": "intermediate_size"}
OPTIONAL_POSITIVE = (
    "num_encoder_layers", *OF_ENCODERS, "embedding_size", "window", "rotary_dim", "max_length", "num_labels",
)  # fmt: skip


@register
@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a Transformer and how it is computed: a decoder, an encoder, or both.

    num_kv_heads and head_dim default to num_heads and hidden_size / num_heads, num_encoder_layers to num_layers,
    max_length (the number of learned positions) to 1024 where position is "learned"; otherwise there is no limit.
    """

    vocab_size: int
    num_layers: int  # of the decoder, or of an encoder alone
    hidden_size: int
    num_heads: int
    intermediate_size: int
    architecture: str = "decoder"  # decoder, encoder or encoder_decoder
    num_encoder_layers: int | None = None  # of an encoder_decoder
    num_encoder_heads: int | None = None  # of an encoder_decoder, where they are other than the decoder's num_heads
    encoder_intermediate_size: int | None = None  # likewise
    num_kv_heads: int | None = None
    head_dim: int | None = None
    activation: str = "swiglu"  # a name of lmx.nn.mlp.ACTIVATIONS
    norm: str = "rmsnorm"  # rmsnorm or layernorm
    norm_bias: bool = False
    norm_eps: float = 1e-5
    norm_offset: bool = False  # scales are stored less 1 (Gemma)
    norm_placement: str = "pre"  # pre: x + f(N(x)); post: N(x + f(x)); both: x + N(f(N(x))); output: x + N(f(x))
    parallel_residual: bool = False  # attention and feed-forward layer read the same x
    first_attention_norm: bool = True  # whether the first layer has a norm before attention
    embedding_norm: bool = False
    embedding_scale: float = 1.0  # of token vectors
    embedding_size: int | None = None  # of token vectors, which a matrix then brings to hidden_size
    type_vocab_size: int = 0  # token types, such as the two sentences of a pair
    position: str = "rotary"  # rotary, learned, sinusoidal, relative (a bias by distance) or none
    position_offset: int = 0  # the row of the first position in a learned table
    max_length: int | None = None
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None  # of local layers, where it is another
    rope_scaling: tuple | None = None  # pairs (name, value), see lmx.nn.position.frequencies
    rotary_dim: int | None = None  # leading channels of a head that turn; all by default
    relative_buckets: int = 32
    relative_max_distance: int = 128
    layer_pattern: tuple = ("global",)  # kinds that repeat over the layers: global, local, unrotated, local_unrotated
    window: int | None = None  # a local layer sees positions nearer than this
    attention_bias: bool = False  # of query, key and value
    attention_out_bias: bool = False
    attention_scale: float | None = None  # of the products of queries and keys; 1 / sqrt(head_dim) by default
    attention_softcap: float | None = None  # c tanh(x / c) of them
    qk_norm: str = "none"  # of queries and keys: none, head (over each head) or full (over all heads together)
    mlp_bias: bool = False
    layer_repeats: int = 1  # how often each layer runs, one after the other, with the same weights
    tie_embeddings: bool = True
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head: str = "lm"  # lm (over the vocabulary), sequence, tokens, spans (classes), pooled (a vector) or none
    num_labels: int | None = None  # classes of a sequence or token head
    head_activation: str | None = None  # of a hidden layer in the head, or None for no such layer
    head_hidden_bias: bool = True
    head_norm: bool = False  # after the hidden layer
    head_bias: bool = False
    pool: str = "first"  # which vector stands for a sequence: first, last, mean, max
    initializer_range: float = 0.02  # standard deviation; / sqrt(2 num_layers) for what writes to the residual
    dtype: str = "float32"  # of the parameters
    compute_dtype: str = "float32"  # of activations and products (summed in float32); auto: see activation_dtype
    attention: str = "auto"  # implementation, see lmx.nn.dot_product
    remat: str = "full"  # what the backward pass recomputes: none, dots (all but matrix products) or full

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, canonical(field.name, getattr(self, field.name)))
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", scaling_pairs(self.rope_scaling))
        for name, value in self._follows().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in POSITIVE:
            check_positive(name, getattr(self, name))
        for name in OPTIONAL_POSITIVE:
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name, decoders in OF_ENCODERS.items():
            if getattr(self, name) == getattr(self, decoders):
                object.__setattr__(self, name, None)
        for name in ("type_vocab_size", "position_offset"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ConfigError(f"{name} must be a whole number, 0 or above, not {getattr(self, name)!r}")
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        self._check_attention()
        self._check_head()

    def _follows(self) -> dict[str, Any]:
        """The values of fields that follow from others. Raises ConfigError where head_dim cannot."""
        for name in GIVEN:
            check_positive(name, getattr(self, name))
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}; "
                "choose heads that divide it, or give head_dim"
            )
        found = {"num_kv_heads": self.num_heads, "head_dim": self.hidden_size // self.num_heads}
        if self.position == "learned":
            found["max_length"] = 1024
        if self.architecture == "encoder_decoder":
            found["num_encoder_layers"] = self.num_layers
        return found

    def _check_attention(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} does not divide by num_kv_heads {self.num_kv_heads}; "
                "each key-value head serves the same number of query heads"
            )
        turning = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if self.position == "rotary" and (turning % 2 or turning > self.head_dim):
            raise ConfigError(
                f"rotary positions turn pairs of a head's {self.head_dim} channels, so "
                f"{'head_dim' if self.rotary_dim is None else 'rotary_dim'} must be even and no more, not {turning}"
            )
        if self.position != "learned" and self.max_length is not None:
            raise ConfigError(f"max_length {self.max_length} only means something with position='learned'")
        if self.parallel_residual and (self.norm_placement != "pre" or self.architecture == "encoder_decoder"):
            raise ConfigError("parallel_residual is for norm_placement='pre', without an encoder beside the decoder")
        exact = self.relative_buckets // (2 if self.architecture == "decoder" else 4)
        if self.position == "relative" and not 1 <= exact < self.relative_max_distance:
            numbers = f"relative_buckets {self.relative_buckets}, relative_max_distance {self.relative_max_distance}"
            raise ConfigError(f"{numbers}: none are left for near or for far distances; T5 has 32 and 128")
        if not self.layer_pattern:
            raise ConfigError("layer_pattern must name at least one kind of layer, such as ('global',)")
        for kind in self.layer_pattern:
            check_choice("layer_pattern", kind, LAYER_KINDS)
        if any(kind.startswith("local") for kind in self.layer_pattern) != (self.window is not None):
            raise ConfigError(
                f"window {self.window} and layer_pattern {self.layer_pattern} contradict each other: "
                "local layers need a window, and nothing else has one"
            )
        for name, alone in {"num_encoder_layers": "num_layers", **OF_ENCODERS}.items():
            if getattr(self, name) is not None and self.architecture != "encoder_decoder":
                raise ConfigError(
                    f"{name} {getattr(self, name)} only means something with architecture='encoder_decoder'; "
                    f"{alone} is for an encoder or a decoder alone"
                )
        self.tower("encoder")  # or it says what is wrong with its sizes

    def _check_head(self) -> None:
        labelled = self.head in ("sequence", "tokens")
        if labelled != (self.num_labels is not None):
            raise ConfigError(
                f"head {self.head!r} and num_labels {self.num_labels} contradict each other: "
                "the heads 'sequence' and 'tokens' need a number of classes, the others have none"
            )
        if self.head_activation is not None:
            check_choice("head_activation", self.head_activation, mlp.PLAIN)
        elif self.head_norm:
            raise ConfigError("head_norm is of the head's hidden layer, which head_activation gives it: set both")

    def tower(self, name: str) -> Config:
        """The config of the layers of the "encoder" or the "decoder": the encoder's own sizes stand in their places."""
        given = {of: getattr(self, own) for own, of in OF_ENCODERS.items() if getattr(self, own) is not None}
        if name == "decoder" or not given:
            return self
        return self.replace(**given, **dict.fromkeys(OF_ENCODERS))

    @property
    def activation_dtype(self) -> str:
        """The compute dtype in force. "auto" is the dtype of the parameters, and float32 on a CPU, where narrower
        products are slower: it is decided where the model is used, not where it was read or saved."""
        if self.compute_dtype != AUTO:
            return self.compute_dtype
        return "float32" if sharding.platform() == "cpu" else self.dtype

    @property
    def stretch(self) -> tuple[str, int] | None:
        """(kind of scaling, length) where the rotary angles of rows beyond that length depend on the longest row."""
        scaling = dict(self.rope_scaling or ())
        if self.position != "rotary" or scaling.get("rope_type") not in position.BY_LENGTH:
            return None
        return scaling["rope_type"], scaling["original_max_position_embeddings"]

    def kind(self, layer: int) -> str:
        """The kind of a layer, by its number."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    @property
    def kinds(self) -> list[str]:
        """The kind of every layer."""
        return [self.kind(layer) for layer in range(self.num_layers)]

    def replace(self, **changes: Any) -> Config:
        """The same config with some fields changed, checked anew; where num_kv_heads and head_dim followed from
        num_heads and hidden_size they follow again. Raises ConfigError for a field there is not."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"Config has no field {name!r}{nearest(name, names)}")
        if {"hidden_size", "num_heads"} & set(changes):
            follow = {"num_kv_heads": self.num_kv_heads == self.num_heads}
            follow["head_dim"] = self.head_dim * self.num_heads == self.hidden_size
            changes = {name: None for name, follows in follow.items() if follows} | changes
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields and their version, as JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"config_version": VERSION, **fields}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`. Raises ConfigError for a newer version, an unknown field or a missing one."""
        values = dict(values)
        version = values.pop("config_version", VERSION)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = [name for name in values if name not in fields]
        if not isinstance(version, int) or version > VERSION:
            also = f" (it has {', '.join(unknown)}, unknown here)" if unknown else ""
            raise ConfigError(
                f"this config has version {version!r}, this lmx reads up to {VERSION}{also}; install a newer lmx"
            )
        if unknown:
            raise ConfigError(f"Config has no field {unknown[0]!r}{nearest(unknown[0], fields)}")
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if missing:
            raise ConfigError(f"this config lacks {', '.join(missing)}")
        return cls(**{name: tuples(value) for name, value in values.items()})
