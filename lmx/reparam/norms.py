"""Norms folded into what reads them: n s + b, times W, is n times s W, plus b W."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lmx.core import tree
from lmx.core.errors import ConfigError
from lmx.models.blocks import Block
from lmx.models.config import Config
from lmx.models.transformer import Model
from lmx.nn.norm import Norm
from lmx.reparam import channels
from lmx.reparam.layers import TOWERS, added, each_block, finished, on_host

# The norms of a block: the field of it whose weights read what was normalised, and those weights.
READERS = {
    "attention_norm": ("attention", ("query", "key", "value")),
    "mlp_norm": ("mlp", ("gate", "up")),
    "cross_norm": ("cross", ("query",)),
}
BESIDE = "its result is added to the residual, which no linear layer reads alone"
REASONS = {
    "attention_out_norm": BESIDE, "mlp_out_norm": BESIDE, "cross_out_norm": BESIDE,
    "query_norm": "queries and keys are multiplied with each other next, not with a weight",
    "key_norm": "queries and keys are multiplied with each other next, not with a weight",
}  # fmt: skip
TIED = (
    "the head is the token table, which the embedding reads too (tie_embeddings): give it a matrix of its own first "
    "(lmx.reparam.untie)"
)


def norm_folds(model: Model) -> dict[str, str | None]:
    """The path of every norm -> None where it can be folded into what reads it, or the reason why it cannot."""
    return {str(path): _reason(model, path.plain, norm) for path, norm in tree.paths(model, _is_norm) if _is_norm(norm)}


def fold_norms(model: Model, pattern: str | None = None, *, max_stacks: int = 8) -> Model:
    """Norm scales, and biases where there are any, in the linear layers that read what was normalised.

    y = (n s + b) W + c is n (s W) + (c + b W): afterwards the norms have scales of one and no bias. Folding the last
    norm changes the features (not the logits): the head then reads what is not scaled. Ashkboos et al. 2024,
    "SliceGPT", section 3.1.

    pattern: norms by path, such as "attention_norm|mlp_norm"; by default all that can be folded (`norm_folds`).
    Raises ConfigError for a selected norm that cannot be folded exactly, and where there is none that can.
    """
    reasons = {str(path): _reason(model, path.plain, x) for path, x in tree.paths(model, _is_norm) if _is_norm(x)}
    if pattern is None:
        pattern = "|".join(sorted({f"^{_plain(path)}$" for path, reason in reasons.items() if reason is None}))
        if not pattern:
            path, reason = next(iter(reasons.items()), ("this model", "it has no norms"))
            raise ConfigError(f"no norm can be folded exactly; {path}: {reason}")
    hits = [(path, x) for path, x in tree.select(model, pattern, _is_norm) if _is_norm(x)]
    if not hits:
        raise ConfigError(f"path pattern {pattern!r} selects no norm; there are {', '.join(reasons)}")
    for path, x in hits:
        if reason := _reason(model, path.plain, x):
            raise ConfigError(f"{path} cannot be folded exactly: {reason}")
    model = tree.split(model, pattern, _is_norm)
    chosen = tree.mask(model, pattern, _is_norm).params
    c = model.config
    p = each_block(_block_folder(c), model.params, chosen)
    for name in TOWERS:
        if getattr(chosen, name) is not None and getattr(chosen, name).norm:
            p = _fold_last(c, p, name)
    for name in ("embed", "encoder_embed"):
        if getattr(chosen, name) is not None and getattr(chosen, name).norm:
            embed = getattr(p, name)
            p = p.replace(**{name: _into(c, embed, "norm", embed, ("projection",))})
    if chosen.head is not None and chosen.head.norm:
        p = p.replace(head=_into(c, p.head, "norm", p.head, ("out",)))
    return finished(Model(c, p), max_stacks)


def _is_norm(x: Any) -> bool:
    return isinstance(x, Norm)


def _plain(path: str) -> str:
    """A path without its layer range."""
    head, bracket, tail = path.partition("[")
    return head + tail.partition("]")[2] if bracket else path


def _reason(model: Model, path: str, norm: Norm) -> str | None:
    """Why a norm cannot be folded exactly, or None."""
    found = _readers(model, path)
    if isinstance(found, str):
        return found
    for where, layer, field in found:
        weight = getattr(layer, field)
        if weight is None:
            continue
        if not channels.fits(weight):
            return f"{where}/{field} is of the kind {type(weight).__name__}; fold that first (lmx.reparam.fold)"
        if norm.bias is not None and getattr(layer, f"{field}_bias") is None:
            return f"it has a bias, and {where}/{field} has none to take what follows from it"
    return None


def _readers(model: Model, path: str) -> str | list[tuple[str, Any, str]]:
    """What alone reads a norm's result, as (path of the layer, the layer, the field of its weight), or why there is
    nothing that does."""
    c, p = model.config, model.params
    tower, _, name = path.rpartition("/")
    if name in REASONS:
        return REASONS[name]
    if name in READERS:
        if c.norm_placement == "post":
            return "its result is also the residual that goes on (norm_placement 'post')"
        part, names = READERS[name]
        if part == "attention" and any(block.attention.latent is not None for block in _blocks(model, path)):
            return "a shared latent reads it, of which keys and values are made (lmx.nn.latent.unshare it first)"
        return [(f"{tower}/{part}", getattr(block, part), field) for block in _blocks(model, path) for field in names]
    if path == "encoder/norm" and p.decoder is not None:
        crosses = [block.cross for block in _blocks(model, "decoder")]
        return [("decoder/layers/cross", cross, field) for cross in crosses for field in ("key", "value")]
    if path.startswith(TOWERS):
        return _head_readers(model)
    if path == "head/norm":
        return TIED if p.head.out is None else [("head", p.head, "out")]
    layer = getattr(p, tower)
    return BESIDE if layer.projection is None else [(tower, layer, "projection")]


def _head_readers(model: Model) -> str | list[tuple[str, Any, str]]:
    """`_readers` of the norm after the last layer."""
    c, head = model.config, model.params.head
    if head is None:
        return "the model has no head: what it gives is this norm's result"
    if head.hidden is None and head.out is None:
        return TIED if c.head == "lm" else "nothing follows it but the result"
    if c.head in ("sequence", "pooled") and c.pool == "max":
        return "the largest of several vectors is taken before the head, which a scale may change (pool 'max')"
    return [("head", head, "out" if head.hidden is None else "hidden")]


def _blocks(model: Model, path: str) -> Iterator[Block]:
    """The blocks of all stacks of the tower in which a path is."""
    for period in getattr(model.params, path.partition("/")[0]).layers.stacks:
        yield from period


def _block_folder(c: Config) -> Callable[[Block, Block], Block]:
    def one(block: Block, wanted: Block) -> Block:
        for name, (part, names) in READERS.items():
            if getattr(wanted, name):
                block = _into(c, block, name, getattr(block, part), names, part)
        return block

    return one


def _into(c: Config, owner: Any, name: str, layer: Any, names: tuple[str, ...], part: str | None = None) -> Any:
    """The owner with its norm `name` folded into these weights of a layer, which is its field `part` or itself."""
    norm = getattr(owner, name)
    layer = _scaled(c, norm, layer, names)
    owner = layer if part is None else owner.replace(**{part: layer})
    return owner.replace(**{name: _plain_norm(c, norm)})


def _scaled(c: Config, norm: Norm, layer: Any, names: tuple[str, ...], lead: tuple[int, ...] = ()) -> Any:
    """The layer with scales and bias of a norm in these of its weights; lead: copies that share the norm."""
    scale = on_host(norm.scale) + (1.0 if c.norm_offset else 0.0)
    scale = np.broadcast_to(scale, (*lead, *scale.shape))
    for name in names:
        weight = getattr(layer, name)
        if weight is None:
            continue
        if norm.bias is not None:
            bias = np.broadcast_to(on_host(norm.bias), scale.shape)
            matrix = on_host(weight).reshape(*scale.shape, -1)
            given = np.einsum("...m,...mo->...o", bias, matrix)
            own = getattr(layer, f"{name}_bias")
            layer = layer.replace(**{f"{name}_bias": added(own, given.reshape(own.shape))})
        layer = layer.replace(**{name: channels.scale_inputs(weight, scale)})
    return layer


def _fold_last(c: Config, p: Any, name: str) -> Any:
    """The parameters with the norm after a tower's last layer folded into what reads it."""
    tower = getattr(p, name)
    if name == "encoder" and p.decoder is not None:
        layers = p.decoder.layers

        def cross(n: int, block: Block) -> Block:
            return block.replace(cross=_scaled(c, tower.norm, block.cross, ("key", "value"), (n,)))

        pairs = zip(layers.sizes, layers.stacks, strict=True)
        made = tree.Layers.of([tuple(cross(n, block) for block in period) for n, period in pairs])
        p = p.replace(decoder=p.decoder.replace(layers=made))
    else:
        p = p.replace(head=_scaled(c, tower.norm, p.head, ("out" if p.head.hidden is None else "hidden",)))
    return p.replace(**{name: tower.replace(norm=_plain_norm(c, tower.norm))})


def _plain_norm(c: Config, norm: Norm) -> Norm:
    """A norm that neither scales nor adds."""
    fill = lambda x, value: np.full(x.shape, value, x.dtype)  # noqa: E731
    return Norm(fill(norm.scale, 0 if c.norm_offset else 1), None if norm.bias is None else fill(norm.bias, 0))
