"""Narrower layers: fewer attention heads, with their key-value heads, and fewer feed-forward units.

    seen = moments(model, batches, "/(attention/out|mlp/down)$", want=["input"])            # a layer at a time
    grams = {path: found.input for layer in seen for path, found in layer.items()}
    model = prune_heads(model, 6, importance=head_importance(model, grams))
    model = prune_units(model, 512, importance=unit_importance(model, grams))

A layer's part is named by its path, such as "decoder/layers[3]/attention". All layers keep as many heads, so that the
config says how many; of the units too, or the model has no form but lmx's own. Weights stay of their kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lmx.core.errors import ConfigError
from lmx.models import stacks
from lmx.models.blocks import Block
from lmx.models.folders import whole
from lmx.models.transformer import Model
from lmx.nn.attention import Attention
from lmx.nn.mlp import MLP
from lmx.reparam import channels
from lmx.reparam.layers import finished, on_host, stacked, towers

Importance = Mapping[str, np.ndarray]  # path of a layer's part -> a number a head, or a unit
Kept = Mapping[str, Sequence[int]]  # path of a layer's part -> which of its heads, or units
WRITES = {"query": 1, "key": 1, "value": 1, "out": 0, "up": 1, "gate": 1, "down": 0}  # the axis of heads or units


def head_importance(model: Model, grams: Importance | None = None) -> dict[str, np.ndarray]:
    """For each attention, (h,): the root of the mean square of what a head adds to the residual.

    grams: second moments of what the output projections read, (h c, h c) by the path of "out". Without them a head
    counts by its weights alone: the product of the norms of its values and outputs.
    """
    found = {}
    for path, layer in _parts(model, Attention):
        out = on_host(layer.out)  # (h, c, d)
        heads, width = out.shape[:2]
        if grams is None:
            value = np.linalg.norm(on_host(layer.value), axis=(0, 2))  # (k,)
            found[path] = np.repeat(value, heads // len(value)) * np.linalg.norm(out, axis=(1, 2))
            continue
        seen = _gram(grams, f"{path}/out", heads * width)
        if seen.ndim == 1:
            raise ConfigError(
                f"the importance of heads needs whole second moments, and those of {path}/out are a diagonal"
            )
        seen = seen.reshape(heads, width, heads, width)[range(heads), :, range(heads)]  # (h, c, c), of each with itself
        power = np.einsum("hcd,hce,hed->h", out, seen, out)
        found[path] = np.sqrt(np.maximum(power, 0))
    return found


def unit_importance(model: Model, grams: Importance | None = None) -> dict[str, np.ndarray]:
    """For each feed-forward layer, (f,): the root of the mean square of what a unit adds to the residual, its
    activation times the norm of its output weights (Sun et al. 2024, "Wanda", equation 1, summed over a unit).

    grams: second moments of what the down projections read, (f, f) or their diagonals (f,), by the path of "down".
    Without them a unit counts by the product of the norms of its weights.
    """
    found = {}
    for path, layer in _parts(model, MLP):
        down = np.linalg.norm(on_host(layer.down), axis=1)
        if grams is None:
            parts = [w for w in (layer.up, layer.gate) if w is not None]
            size = np.prod([np.linalg.norm(on_host(w), axis=0) for w in parts], axis=0)
        else:
            gram = _gram(grams, f"{path}/down", len(down))
            size = np.sqrt(np.maximum(gram if gram.ndim == 1 else np.diag(gram), 0))
        found[path] = size * down
    return found


def prune_heads(
    model: Model, num_heads: int, num_kv_heads: int | None = None, *, importance: Importance | None = None
) -> Model:
    """The model with the heads of every attention that matter most.

    Whole groups go: a key-value head with the query heads that read it. num_kv_heads: by default as many as leave the
    size of a group what it is; where it does not divide num_heads so, the groups are kept and become smaller. Of a
    group that becomes smaller the heads that matter most stay. importance: as `head_importance` gives it; by default
    its own. Where all layers of a tower share a bias by distance, they keep the same heads.

    Raises ConfigError for numbers that do not group, or what `keep_heads` raises.
    """
    c = model.config
    num_kv_heads = _kv_heads(c.num_heads, c.num_kv_heads, num_heads) if num_kv_heads is None else num_kv_heads
    if not (1 <= num_kv_heads <= c.num_kv_heads and num_kv_heads <= num_heads and num_heads % num_kv_heads == 0):
        raise ConfigError(
            f"{c.num_heads} heads in {c.num_kv_heads} groups cannot become {num_heads} in {num_kv_heads}: each "
            "key-value head serves as many query heads, and none is added"
        )
    size, new_size = c.num_heads // c.num_kv_heads, num_heads // num_kv_heads
    if new_size > size:
        raise ConfigError(f"a group has {size} heads and cannot have {new_size}; ask for more key-value heads")
    importance = head_importance(model) if importance is None else importance
    scores = _of_bias(model, _checked(model, Attention, importance, c.num_heads))
    kept = {}
    for path, score in scores.items():
        groups = score.reshape(c.num_kv_heads, size)
        inside = np.sort(_most(groups, new_size), axis=1)  # (k, new size)
        group = np.sort(_most(np.take_along_axis(groups, inside, 1).sum(1), num_kv_heads))
        kept[path] = (group[:, None] * size + inside[group]).ravel().tolist()
    return keep_heads(model, kept)


def prune_units(model: Model, num_units: int, *, importance: Importance | None = None) -> Model:
    """The model with the `num_units` units of every feed-forward layer that matter most.

    importance: as `unit_importance` gives it; by default its own. Raises ConfigError for a number that a layer has not.
    """
    scores = _checked(model, MLP, unit_importance(model) if importance is None else importance, None)
    fewest = min(map(len, scores.values()))
    if not 1 <= num_units <= fewest:
        raise ConfigError(f"of {fewest} feed-forward units 1 to {fewest} can stay, not {num_units}")
    return keep_units(model, {path: np.sort(_most(score, num_units)).tolist() for path, score in scores.items()})


def keep_heads(model: Model, kept: Kept, *, max_stacks: int = 8) -> Model:
    """The model with only these query heads of every attention, and the key-value heads that they read.

    Raises ConfigError for an attention that is not named, heads that there are not, unlike numbers of them in layers or
    groups, queries and keys that are normalised over all heads together, or weights that cannot be cut (fold them
    first).
    """
    c = model.config
    if c.qk_norm == "full":
        raise ConfigError(
            "queries and keys are normalised over all heads together (qk_norm 'full'): fewer heads change it"
        )
    groups = {path: _grouped(path, heads, c.num_heads, c.num_kv_heads) for path, heads in kept.items()}
    numbers = {(len(heads), len(groups[path])) for path, heads in kept.items()}
    if len(numbers) > 1:
        raise ConfigError(f"all layers keep as many heads and key-value heads, not {sorted(numbers)}")

    def cut(path: str, layer: Attention) -> Attention:
        heads, group = np.asarray(kept[path]), groups[path]
        return _cut(path, layer, {"query": heads, "key": group, "value": group, "out": heads})

    model = _with_parts(_cut_bias(model, kept), Attention, "attention", kept, cut)
    num_heads, num_kv_heads = numbers.pop()
    c = c.replace(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=c.head_dim)
    return finished(Model(c, model.params), max_stacks)


def keep_units(model: Model, kept: Kept, *, max_stacks: int = 8) -> Model:
    """The model with only these units of every feed-forward layer.

    Layers may keep unlike numbers (the config then has the largest, and lmx's own format alone can hold the model).
    Raises ConfigError for a layer that is not named, units that there are not, or weights that cannot be cut (fold them
    first).
    """
    if any(not units for units in kept.values()):
        raise ConfigError("a feed-forward layer would keep no unit; keep at least one")

    def cut(path: str, layer: MLP) -> MLP:
        units = _indices(path, kept[path], layer.down.shape[0], "unit")
        return _cut(path, layer, {"up": units, "gate": units, "down": units})

    model = _with_parts(model, MLP, "feed-forward layer", kept, cut)
    c = model.config.replace(intermediate_size=max(map(len, kept.values())))
    return finished(Model(c, model.params), max_stacks)


def _parts(model: Model, kind: type) -> Iterator[tuple[str, Any]]:
    """(path, layer's part) of every attention, or feed-forward layer."""
    for tower, there in towers(model).items():
        for i, block in enumerate(stacks.layer_list(there.layers)):
            for name in ("attention", "cross", "mlp"):
                if isinstance(getattr(block, name), kind):
                    yield f"{tower}/layers[{i}]/{name}", getattr(block, name)


def _with_parts(model: Model, kind: type, what: str, kept: Kept, cut: Callable[[str, Any], Any]) -> Model:
    """The model with `cut(path, part)` of every part of a kind. Raises ConfigError unless `kept` names them all."""
    there = [path for path, _ in _parts(model, kind)]
    if set(there) != set(kept):
        odd = sorted(set(there) ^ set(kept))
        raise ConfigError(f"every {what} is to be named once, {there[0]} and so on; odd are {', '.join(odd[:3])}")
    changed = {}
    for tower, old in towers(model).items():
        layers: list[Block] = []
        for i, block in enumerate(stacks.layer_list(old.layers)):
            for name in ("attention", "cross", "mlp"):
                if isinstance(getattr(block, name), kind):
                    block = block.replace(**{name: cut(f"{tower}/layers[{i}]/{name}", getattr(block, name))})
            layers.append(block)
        changed[tower] = old.replace(layers=stacked(model.config, layers, 1 << 30))
    return model.replace(params=model.params.replace(**changed))


def _cut(path: str, layer: Any, kept: Mapping[str, np.ndarray]) -> Any:
    """The part with these heads or units of its weights, and of their biases."""
    for name, indices in kept.items():
        weight, axis = getattr(layer, name), WRITES[name]
        if weight is None:
            continue
        channels.check_fits(weight, f"{path}/{name}")
        layer = layer.replace(**{name: channels.keep(weight, axis, indices)})
        bias = getattr(layer, f"{name}_bias", None)
        if bias is not None and axis == 1:
            layer = layer.replace(**{f"{name}_bias": whole(bias)[indices]})
    return layer


def _cut_bias(model: Model, kept: Kept) -> Model:
    """The model with the columns that stay of each tower's bias by distance, which all its layers share."""
    params = model.params
    for name, tower in towers(model).items():
        if tower.position_bias is None:
            continue
        own = {tuple(heads) for path, heads in kept.items() if path.startswith(name) and path.endswith("/attention")}
        if len(own) != 1:
            raise ConfigError(f"the layers of the {name} share a bias by distance, so all must keep the same heads")
        channels.check_fits(tower.position_bias, f"{name}/position_bias")
        bias = channels.keep(tower.position_bias, 1, np.asarray(own.pop()))
        params = params.replace(**{name: tower.replace(position_bias=bias)})
    return model.replace(params=params)


def _of_bias(model: Model, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The scores, the same for all layers of a tower that share a bias by distance."""
    for name, tower in towers(model).items():
        if tower.position_bias is not None:
            own = [path for path in scores if path.startswith(name) and path.endswith("/attention")]
            total = np.sum([scores[path] for path in own], axis=0)
            scores = scores | dict.fromkeys(own, total)
    return scores


def _kv_heads(heads: int, kv_heads: int, wanted: int) -> int:
    size = heads // kv_heads
    return wanted // size if wanted % size == 0 else kv_heads


def _grouped(path: str, heads: Sequence[int], num_heads: int, num_kv_heads: int) -> np.ndarray:
    """The key-value heads of the query heads that stay. Raises ConfigError unless each keeps as many."""
    group, counts = np.unique(
        _indices(path, heads, num_heads, "head") // (num_heads // num_kv_heads), return_counts=True
    )
    if len(set(counts.tolist())) != 1:
        raise ConfigError(f"{path}: the groups of heads {list(heads)} are of unlike size, {counts.tolist()}")
    return group


def _indices(path: str, given: Sequence[int], there: int, what: str) -> np.ndarray:
    """Indices in order. Raises ConfigError for those that are not there, or there twice."""
    found = np.asarray(given)
    if len(found) == 0 or found.min() < 0 or found.max() >= there or (np.diff(found) <= 0).any():
        raise ConfigError(f"{path} has {there} {what}s; name some of 0 to {there - 1} in order, not {list(given)[:8]}")
    return found


def _checked(model: Model, kind: type, importance: Importance, count: int | None) -> dict[str, np.ndarray]:
    """The importance of every part, as numbers a head or unit."""
    found = {}
    for path, layer in _parts(model, kind):
        wanted = count or layer.down.shape[0]
        score = np.asarray(importance.get(path, ()), np.float64)
        if score.shape != (wanted,) or not np.isfinite(score).all():
            raise ConfigError(f"importance must have {wanted} finite numbers for {path}, not {score.shape}")
        found[path] = score
    return found


def _most(scores: np.ndarray, count: int) -> np.ndarray:
    """The indices of the largest along the last axis; of equals the first."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :count]


def _gram(grams: Importance, path: str, size: int) -> np.ndarray:
    gram = np.asarray(grams.get(path, ()), np.float64)
    if gram.shape not in ((size,), (size, size)) or not np.isfinite(gram).all():
        raise ConfigError(f"grams must have finite second moments ({size}, {size}) for {path}, not {gram.shape}")
    return gram
