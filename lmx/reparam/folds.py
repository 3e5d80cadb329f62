"""Folds: the same function in fewer parts.

    fold(model)                 every weight of a kind of its own (LoRA, low rank, sums) into a plain array
    fold_value_bias(model)      the values' bias into that of attention's output
    fold_embedding(model)       a factorized embedding and its projection into one table
    untie(model)                the output head as a matrix of its own, into which a norm can then be folded
    compose(first, second)      two linear layers, one after the other, as one

Each computes what the model did, up to rounding: arithmetic is in float64 on the host, results have the dtype of what
they replace. What is not exact is refused, with the reason, and the config stays true. Norms: `norms.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lmx.core import tree, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LowRank
from lmx.models.blocks import Block
from lmx.models.transformer import Model
from lmx.reparam import channels
from lmx.reparam.layers import added, each_block, finished, on_host, restacked


def fold(model: Model, pattern: str = ".", *, max_stacks: int = 8) -> Model:
    """The weights that the pattern selects written out as plain arrays: LoRA, low rank, sums and other kinds.

    Raises ConfigError if it selects nothing, or if what is left needs more than `max_stacks` stacks.
    """
    return restacked(tree.map(weights.dense, model, pattern, weights.is_weight), max_stacks)


def untie(model: Model) -> Model:
    """The model with the token table as a head of its own: the same function, one table more.

    Raises ConfigError if the head is not the token table.
    """
    if model.config.head != "lm" or model.params.head.out is not None:
        raise ConfigError("the head of this model is no token table, so there is nothing to untie")
    table = model.params.embed.tokens
    channels.check_fits(table, "embed/tokens")
    head = model.params.head.replace(out=channels.transpose(table))
    return finished(Model(model.config.replace(tie_embeddings=False), model.params.replace(head=head)))


def fold_value_bias(model: Model, pattern: str = "value_bias$", *, max_stacks: int = 8) -> Model:
    """The values' bias, which attention's weights, as they sum to 1, pass on whole, in the bias of its output.

    pattern: value biases by path. Raises ConfigError where there is none, or no output bias to take it.
    """
    for path, _ in tree.select(model, pattern):
        if path.parts[-1] != "value_bias":
            raise ConfigError(f"path pattern {pattern!r} selects {path}, which is no value_bias")
    if not model.config.attention_out_bias:
        raise ConfigError("attention's output has no bias to take that of the values (attention_out_bias is false)")
    model = tree.split(model, pattern)
    chosen = tree.mask(model, pattern).params

    def one(layer: Any, wanted: Any) -> Any:
        if layer is None or not wanted.value_bias:
            return layer
        bias, out = on_host(layer.value_bias), on_host(layer.out)  # (n, k, c), (n, h, c, d)
        bias = np.repeat(bias, out.shape[1] // bias.shape[1], axis=1)
        given = np.einsum("nhc,nhcd->nd", bias, out)
        return layer.replace(
            value_bias=np.zeros(layer.value_bias.shape, layer.value_bias.dtype), out_bias=added(layer.out_bias, given)
        )

    def block(block: Block, wanted: Block) -> Block:
        own, cross = (one(getattr(block, name), getattr(wanted, name)) for name in ("attention", "cross"))
        return block.replace(attention=own, cross=cross)

    return finished(model.replace(params=each_block(block, model.params, chosen)), max_stacks)


def fold_embedding(model: Model) -> Model:
    """A table (v, e) and its projection (e, d) as one table (v, d), positions and types likewise: ALBERT's form back.

    Raises ConfigError where something stands between the two (a norm, sinusoids), where the head reads the table too,
    or where there is no projection.
    """
    c, p = model.config, model.params
    if p.embed.projection is None or p.encoder_embed is not None:
        raise ConfigError("this model's embedding has no projection to fold (embedding_size), or two of them")
    if p.embed.norm is not None:
        raise ConfigError("between token table and projection is a norm (embedding_norm): they are no single matrix")
    if c.position == "sinusoidal":
        raise ConfigError("between token table and projection sinusoids are added, which no table holds afterwards")
    if c.head == "lm":
        raise ConfigError("the head gives its logits at the width of the token table (embedding_size), which must stay")
    embed, bias = p.embed, p.embed.projection_bias
    carried = next(name for name in ("types", "positions", "tokens") if getattr(embed, name) is not None)
    if carried == "tokens" and bias is not None and c.embedding_scale != 1.0:
        raise ConfigError("the projection has a bias, and the only table to take it is scaled (embedding_scale)")
    made = {}
    for name in ("tokens", "positions", "types"):
        if getattr(embed, name) is not None:
            made[name], _ = compose(getattr(embed, name), embed.projection, form="dense")
    if bias is not None:
        made[carried] = added(made[carried], on_host(bias))
    embed = embed.replace(**made, projection=None, projection_bias=None)
    return finished(Model(c.replace(embedding_size=None), p.replace(embed=embed)))


def compose(
    first: Any, second: Any, first_bias: Any = None, second_bias: Any = None, *, form: str | None = None
) -> tuple[Any, Any]:
    """(weight, bias) of the linear layer that does what two do, one after the other with nothing between them.

    first: a weight (inputs..., m) of any kind; second: (m, outputs...); biases (m,) and (outputs...) or None. The
    weight is dense or, where that holds fewer numbers, `LowRank` of rank m; form: "dense" or "two-factor", to have it
    so. Raises ConfigError for weights that do not follow each other.
    """
    if len(first.shape) < 2 or len(second.shape) < 2 or first.shape[-1] != second.shape[0]:
        raise ConfigError(
            f"weights of shapes {tuple(first.shape)} and {tuple(second.shape)} do not follow each other: the second "
            "begins with the axis that the first ends with"
        )
    if form not in (None, "dense", "two-factor"):
        raise ConfigError(f"form {form!r} is none of dense, two-factor")
    m, ins, outs = first.shape[-1], first.shape[:-1], second.shape[1:]
    bias = None if second_bias is None else on_host(second_bias)
    if first_bias is not None:
        carried = np.tensordot(on_host(first_bias), on_host(second), 1)
        bias = carried if bias is None else bias + carried
    dtype = first.dtype
    bias = None if bias is None else bias.astype(dtype)
    smaller = m * (math.prod(ins) + math.prod(outs)) < math.prod(ins) * math.prod(outs)
    if form == "two-factor" or form is None and smaller:
        return LowRank(first, second, len(ins)), bias
    return np.tensordot(on_host(first), on_host(second), 1).astype(dtype), bias
