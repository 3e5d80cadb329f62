"""The Transformer: its parameter tree, its forward pass, and `Model`, which is a language model where it decodes.

A decoder, an encoder or both (`Config.architecture`), of the same towers of blocks (`blocks.py`) and one head
(`lmx.nn.heads`). Layers are scanned stacks (`stacks.py`); weights are of any kind (`lmx.core.weights`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import kinds, sharding, specs, weights
from lmx.core.errors import ConfigError
from lmx.core.nodes import node, static
from lmx.models import blocks, cache
from lmx.models.blocks import Block, Tower  # noqa: F401  (a model's parts, for those who build one)
from lmx.models.cache import DecodeState
from lmx.models.conditional import Conditional
from lmx.models.config import Config
from lmx.models.fields import DTYPES
from lmx.models.protocol import score_in_chunks
from lmx.nn import attention as attend
from lmx.nn import embed, heads, norm, position
from lmx.nn.heads import Head, Readout


@node
class Params:
    """What is absent is None: a decoder has no encoder, an encoder no decoder. `embed` is the decoder's, or that of an
    encoder alone; the encoder beside a decoder has its own, whose tokens are None where it shares the decoder's."""

    embed: embed.Embedding
    decoder: Tower | None
    head: Head | None
    encoder: Tower | None = None
    encoder_embed: embed.Embedding | None = None


def abstract(config: Config) -> Params:
    """The parameter tree with a `ParamSpec` in every leaf."""
    c = config
    both, alone = c.architecture == "encoder_decoder", c.architecture == "encoder"
    return Params(
        embed=_abstract_embedding(c),
        decoder=None if alone else blocks.abstract_tower(c, c.num_layers, cross=both),
        head=None if c.head == "none" else _abstract_head(c),
        encoder=_abstract_encoder(c) if both or alone else None,
        encoder_embed=_abstract_embedding(c).replace(tokens=None) if both else None,
    )


def _abstract_encoder(c: Config) -> Tower:
    layers = c.num_encoder_layers if c.architecture == "encoder_decoder" else c.num_layers
    return blocks.abstract_tower(c.tower("encoder"), layers)


def _abstract_embedding(c: Config) -> embed.Embedding:
    width, std = c.embedding_size or c.hidden_size, c.initializer_range
    table = lambda rows, axis=None: embed.table(rows, width, std, c.dtype, axis)  # noqa: E731
    projection = (None, None)
    if c.embedding_size is not None:
        projection = embed.projection(width, c.hidden_size, std, c.dtype)
    return embed.Embedding(
        tokens=table(c.vocab_size, "vocab"),
        positions=table(c.max_length + c.position_offset) if c.position == "learned" else None,
        types=table(c.type_vocab_size) if c.type_vocab_size else None,
        norm=norm.abstract(width, c.norm_bias, c.dtype, offset=c.norm_offset) if c.embedding_norm else None,
        projection=projection[0],
        projection_bias=projection[1],
    )


def _abstract_head(c: Config) -> Head:
    """Logits over the vocabulary leave at the width of the token table, others at the model's."""
    width, std, lm = c.hidden_size, c.initializer_range, c.head == "lm"
    inner = c.embedding_size or width if lm else width
    vector = lambda size, axis=None: specs.ParamSpec((size,), (axis,), dtype=c.dtype)  # noqa: E731
    hidden = c.head_activation is not None
    size = c.vocab_size if lm else 2 if c.head == "spans" else c.num_labels
    own = c.head != "pooled" and not (lm and c.tie_embeddings)
    axis = "vocab" if lm else None
    return Head(
        hidden=specs.ParamSpec((width, inner), ("embed", None), std, inputs=1, dtype=c.dtype) if hidden else None,
        hidden_bias=vector(inner) if hidden and c.head_hidden_bias else None,
        norm=norm.abstract(inner, c.norm_bias, c.dtype, offset=c.norm_offset) if c.head_norm else None,
        out=heads.output(inner, size, std, c.dtype, axis) if own else None,
        out_bias=vector(size, axis) if c.head_bias and c.head != "pooled" else None,
    )


def memory_mask(tokens: jax.Array, segment_ids: Any, memory_segments: Any) -> jax.Array | None:
    """(b, t, s): what of an encoder's memory, of segments (b, s) or None, the positions of tokens (b, t) see."""
    if memory_segments is None:
        return None
    own = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    seen = memory_segments != 0 if segment_ids is None else memory_segments
    return own[:, :, None] == seen[:, None, :]


def init(config: Config, key: jax.Array) -> Model:
    """A new model, its parameters drawn by one jitted function and sharded from birth on the mesh in force."""
    return Model(config, specs.init(abstract(config), key))


def retyped(tree: Any, dtype: Any) -> Any:
    """A tree of models whose parameters were cast to a dtype (None: they were not), with that in their configs."""
    if dtype is None or jnp.dtype(dtype).name not in DTYPES:
        return tree
    one = lambda x: x.replace(config=x.config.replace(dtype=dtype)) if isinstance(x, Model) else x  # noqa: E731
    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Model))


def model_specs(model: Model) -> Params:
    """The specs of a model as it is, after any surgery: kinds and shapes from its tree, axes from its config."""
    template, params = abstract(model.config), model.params
    towers = {
        name: blocks.tower_specs(model.config.tower(name), getattr(template, name), getattr(params, name))
        for name in ("decoder", "encoder")
        if getattr(params, name) is not None
    }
    holes = dict.fromkeys(towers)
    return weights.specs_like(template.replace(**holes), params.replace(**holes)).replace(**towers)


def _with_keys_of(attention: attend.Attention, other: attend.Attention) -> attend.Attention:
    return attention.replace(key=other.key, value=other.value)


@node
class Model:
    """A Transformer: a config and its parameters; a pytree.

    With a decoder it is a member of the protocol of language models; one that also has an encoder is, once it is given
    what the encoder reads (`given`). Where a method takes encoder_tokens, other architectures are not given any.
    """

    config: Config = static()
    params: Params
    transparent = ("params",)  # paths begin below it

    def specs(self) -> Model:
        """The same tree with a `ParamSpec` for every array (None for a hole), whatever surgery has been done."""
        return Model(self.config, model_specs(self))

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int | None:
        """How many positions it can take, or None for any number."""
        return self.config.max_length

    @property
    def stretch(self) -> tuple[str, int] | None:
        """(kind of scaling, length) where the rotary angles of rows beyond that length depend on the longest row."""
        return self.config.stretch

    def features(
        self, tokens, *, segment_ids=None, positions=None, types=None, encoder_tokens=None, encoder_segment_ids=None
    ) -> jax.Array:
        """(b, t) -> (b, t, d): the vectors that the head reads, in the compute dtype.

        segment_ids (b, t): tokens attend within equal ids (0 is padding); positions (b, t) count from each segment's
        start unless given; types (b, t): of tokens, 0 by default. encoder_tokens (b, s), encoder_segment_ids (b, s):
        what the encoder reads; a position sees the segment of its own id there.

        Raises ConfigError if a row exceeds the learned positions, or for arguments that are missing or of no use.
        """
        c = self.config
        if (encoder_tokens is not None) != (c.architecture == "encoder_decoder"):
            given = "an encoder_decoder needs encoder_tokens=" if encoder_tokens is None else "encoder_tokens= are for"
            raise ConfigError(f"this model is of architecture {c.architecture!r}: {given} and others take none")
        if types is not None and (c.architecture != "encoder" or not c.type_vocab_size):
            raise ConfigError("this model has no token types; leave out types=")
        if c.architecture == "encoder":
            return self.run_tower("encoder", tokens, segment_ids, positions, types)
        memory = None
        if encoder_tokens is not None:
            memory = self.encoded(encoder_tokens, encoder_segment_ids)
        return self.decoded(tokens, memory, encoder_segment_ids, segment_ids=segment_ids, positions=positions)

    def encoded(self, encoder_tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """(b, s) -> (b, s, d): what the encoder of an encoder-decoder makes of its tokens."""
        return self.run_tower("encoder", encoder_tokens, segment_ids, None, None)

    def decoded(self, tokens, memory=None, memory_segments=None, *, segment_ids=None, positions=None) -> jax.Array:
        """(b, t) -> (b, t, d): the decoder's features, given the encoder's memory (b, s, d) if it has one.

        memory_segments (b, s): a position sees those of its own segment, or without segment_ids all but 0.
        """
        mask = memory_mask(tokens, segment_ids, memory_segments)
        return self.run_tower("decoder", tokens, segment_ids, positions, None, memory=memory, memory_mask=mask)

    def run_tower(self, name: str, tokens, segment_ids, positions, types, **memory: Any) -> jax.Array:
        """The features of the tower "encoder" or "decoder"; memory: as `blocks.run` takes it."""
        x, about = self.enter_tower(name, tokens, segment_ids, positions, types)
        return blocks.run(self.config.tower(name), getattr(self.params, name), x, **about, **memory)

    def enter_tower(self, name: str, tokens, segment_ids, positions, types) -> tuple[jax.Array, dict[str, Any]]:
        """What the first layer of a tower reads (b, t, d), and what `blocks.run` and `blocks.layer` want to know."""
        if self.max_length is not None and tokens.shape[1] > self.max_length:
            raise ConfigError(
                f"{tokens.shape[1]} tokens a row exceed the {self.max_length} learned positions of this model; "
                "shorten the rows or use a model with rotary positions"
            )
        same = positions is None  # within a segment, places differ as positions do; other segments are not seen
        if positions is None:
            positions = position.segment_positions(jnp.zeros_like(tokens) if segment_ids is None else segment_ids)
        x = self._embed(name, tokens, positions, types)
        about = {"positions": positions, "segment_ids": segment_ids, "same_positions": same}
        return x, about | {"causal": name == "decoder"}

    def _embed(self, name: str, tokens: jax.Array, positions: jax.Array, types: jax.Array | None) -> jax.Array:
        """Tokens (b, t) as the decoder or encoder reads them: (b, t, d) in the compute dtype."""
        c, p = self.config, self.params
        own = p.encoder_embed if name == "encoder" and p.encoder_embed is not None else p.embed
        table = p.embed.tokens if own.tokens is None else own.tokens
        x = weights.take(tokens, table).astype(c.activation_dtype)
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        x = embed.add_types(own, x, types)
        if c.position == "sinusoidal":
            x = x + position.sinusoids(positions, x.shape[-1]).astype(x.dtype)
        x = embed.add_positions(own, x, positions, c.position_offset)
        return embed.project(own, blocks.normalise(c, own.norm, x))

    def readout(self) -> Readout:
        """The part of the model that turns features into logits. Raises ConfigError if it has none."""
        c, p = self.config, self.params
        if p.head is None:
            raise ConfigError("this model has no head to give logits; use lmx.encode, or load it with a head")
        table = p.embed.tokens if c.head == "lm" and p.head.out is None else None
        of_norm = (c.norm, c.norm_eps, c.norm_offset)
        return Readout(p.head, table, c.head_activation, of_norm, c.logit_scale, c.logit_softcap)

    def logits(self, tokens, *, segment_ids=None, **given: Any) -> jax.Array:
        """(b, t) -> float32: (b, t, v) of a language model, of a token head (b, t, n) and a span head (b, t, 2), of a
        sequence head (b, n), of a pooled one (b, d). Arguments and errors are those of `features`."""
        return self.read(self.features(tokens, segment_ids=segment_ids, **given), segment_ids)

    def read(self, features: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """The logits of features (b, t, d); padding (segment 0) does not count where they are pooled."""
        c = self.config
        if c.head not in ("sequence", "pooled"):
            return self.readout().logits(features)
        return self.readout().logits(heads.pool(features, c.pool, segment_ids)[:, None])[:, 0]

    def log_probs(self, features: jax.Array) -> jax.Array:
        """(b, t, d) -> (b, t, v) float32, normalised."""
        return jax.nn.log_softmax(self.readout().logits(features), axis=-1)

    def score(self, tokens, *, segment_ids=None, positions=None) -> jax.Array:
        """(b, t) -> (b, t-1) float32: log p(tokens[:, i+1] | tokens[:, :i+1])."""
        self.require_next_token()
        return score_in_chunks(self, tokens, segment_ids=segment_ids, positions=positions)

    def given(self, encoder_tokens: jax.Array, encoder_segment_ids: jax.Array | None = None) -> Conditional:
        """The language model of what follows encoder_tokens (b, s), which are read once. Segment 0 is padding.

        Raises ConfigError if the model is no encoder-decoder.
        """
        if self.config.architecture != "encoder_decoder":
            raise ConfigError(f"given() is for encoder-decoders, and this model is of {self.config.architecture!r}")
        return Conditional(self, self.encoded(encoder_tokens, encoder_segment_ids), encoder_segment_ids)

    def start(self, batch: int, length: int) -> DecodeState:
        """An empty state with room for `length` positions. Raises ConfigError beyond the learned positions, or if the
        model is no decoder."""
        self.require_next_token()
        return self.start_decoder(batch, length)

    def start_decoder(self, batch: int, length: int) -> DecodeState:
        """`start`, whatever else the decoder reads."""
        if self.max_length is not None and length > self.max_length:
            raise ConfigError(
                f"{length} positions (prompt and new tokens) exceed the {self.max_length} learned positions of this "
                "model; ask for fewer tokens or use a model with rotary positions"
            )
        return cache.start(self.config, self.params.decoder, batch, length)

    def require_next_token(self) -> None:
        """Raise ConfigError, saying why, unless this is a language model by itself."""
        if self.config.architecture == "encoder":
            raise ConfigError("this model is an encoder: it sees whole texts and has no next token to give or score")
        if self.config.architecture == "encoder_decoder":
            raise ConfigError("this model reads encoder_tokens first: use model.given(encoder_tokens)")
        self.require_vocabulary()

    def require_vocabulary(self) -> None:
        """Raise ConfigError unless the head is over the vocabulary."""
        if self.config.head != "lm":
            raise ConfigError(f"this model has a head of kind {self.config.head!r}, which gives no next token")

    def step(self, state: DecodeState, tokens: jax.Array) -> tuple[jax.Array, DecodeState]:
        """Feed tokens (b, q): (log-probabilities (b, q, v) of the token after each, the new state)."""
        positions = state.lengths[:, None] + jnp.arange(tokens.shape[1])  # (b, q)
        x = self._embed("decoder", tokens, positions, None)
        x, state = cache.step(self.config, self.params.decoder, state, x, positions)
        return sharding.place(self.log_probs(x), "batch", None, "vocab"), state

    def for_steps(self, rows: int) -> Model:
        """The same model as many steps of so many rows want it: of few rows on a CPU (`lmx.core.weights.few_rows`),
        query, key and value are one product, and float32 matrices are stored as they are multiplied fastest
        (`weights_first`), in memory of their own. Those that multiply what is remembered, of a source or as latents,
        and what is computed in another dtype are left as they are."""
        p = self.params
        if not weights.few_rows(rows) or p.decoder is None or self.config.activation_dtype != "float32":
            return self
        is_block = lambda x: isinstance(x, Block)  # noqa: E731
        each = lambda function, *layers: jax.tree.map(function, *layers, is_leaf=is_block)  # noqa: E731
        join = lambda block: block.replace(attention=attend.join(block.attention))  # noqa: E731
        p = p.replace(decoder=p.decoder.replace(layers=each(join, p.decoder.layers)))
        if not weights.weights_first(rows):
            return self.replace(params=p)
        own, turn = self.replace(params=p).specs().params, kinds.outputs_first

        def turn_block(own: Block, block: Block) -> Block:
            made = turn(own, block)
            if block.attention.latent is not None:
                made = made.replace(attention=_with_keys_of(made.attention, block.attention))
            return made if block.cross is None else made.replace(cross=_with_keys_of(made.cross, block.cross))

        layers = each(turn_block, own.decoder.layers, p.decoder.layers)
        return self.replace(params=p.replace(decoder=p.decoder.replace(layers=layers), head=turn(own.head, p.head)))

    def rewind(self, state: DecodeState, lengths: jax.Array) -> DecodeState:
        """The state as if only the first lengths (b,) tokens of each row had been fed."""
        return cache.rewind(state, lengths)
