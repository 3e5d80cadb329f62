"""Keys and values through one latent of few numbers, which is then all that the cache holds (`lmx.nn.latent`).

    [W_k | W_v] = W [U_k | U_v]        (d, 2 k c) = (d, r) (r, 2 k c)

The best such W and U are those of the joint matrix's decomposition, under the second moments of what the layer reads
where they are given (Meng et al. 2025, "TransMLA", section 4, which cuts the rotated part of a key apart first; here
keys are rotated as before, after U_k). At r = min(d, 2 k c) it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lmx.core import specs, tree, weights
from lmx.core.errors import ConfigError, nearest
from lmx.models.blocks import Block
from lmx.models.transformer import Model
from lmx.nn import latent as latents
from lmx.nn.attention import Attention
from lmx.reparam.decompose import decompose

KEYS = "/attention/key$"


def share_latent(
    model: Model,
    rank: int | None = None,
    *,
    share: float | None = None,
    grams: Mapping[str, Any] | None = None,
    pattern: str = KEYS,
    report: Callable[[str], None] | None = None,
) -> Model:
    """The model with keys and values of the selected layers made from a shared latent, laid out on the mesh in force.

    rank:    numbers of a latent, which take the place of the 2 k c of keys and values in the cache; or share: of these
             2 k c, such as 0.25. Biases, norms and rotations stay; a latent that there is already is cut further.
    grams:   second moments E[x' x] (d, d) of what a layer reads (or what has them as `.input`), by the path of its key
             weight, such as decoder/layers[3]/attention/key; None for the plain decomposition.
    pattern: selects layers by their key weights; stacks that it cuts are split. Attention to an encoder is left alone.
    report:  told of moments that are nearly singular.
    Raises ConfigError for a rank below 1 or beyond min(d, 2 k c), a pattern that selects no keys, or grams that lack a
    selected layer; and as `decompose`.
    """
    if (rank is None) == (share is None):
        raise ConfigError("give rank= or share=, one of them")
    model = tree.split(model, pattern, weights.is_weight)
    found = [(path, hit.all()) for path, _, hit in tree.matches(model, pattern, weights.is_weight)]
    keys = [(path, hit) for path, hit in found if path.parts[-2:] == ("attention", "key")]
    if not any(hit for _, hit in keys):
        raise ConfigError(f"path pattern {pattern!r} selects no key of self-attention; {KEYS!r} selects all")
    remaining = iter(keys)

    def one(block: Any) -> Any:
        if not isinstance(block, Block):
            return block
        path, hit = next(remaining)
        if not hit:
            return block
        own = [path.plain.replace("/layers/", f"/layers[{i}]/", 1) for i in path.layers]
        moments = [None if grams is None else _moments(grams, name) for name in own]
        return block.replace(attention=_shared(block.attention, own[0], rank, share, moments, report))

    return specs.lay_out(jax.tree.map(one, model, is_leaf=lambda x: isinstance(x, Block)))


def _moments(grams: Mapping[str, Any], name: str) -> Any:
    if name not in grams:
        raise ConfigError(f"grams lack {name}, whose layer is to share a latent{nearest(name, grams)}")
    return getattr(grams[name], "input", grams[name])


def _shared(
    params: Attention, name: str, rank: int | None, share: float | None, moments: list[Any], report: Any
) -> Attention:
    """A stack of layers (copies, ...) with latents, layer by layer; moments: of each."""
    plain = latents.unshare(params)
    key, value = (np.asarray(weights.dense(w)).astype(np.float64) for w in (plain.key, plain.value))
    n, d, k, c = key.shape
    both = np.stack([key, value], 2).reshape(n, d, 2 * k * c)
    r = _rank(rank, share, d, 2 * k * c, name)
    parts = [decompose(w, gram, report=report).truncate(r) for w, gram in zip(both, moments, strict=True)]
    down, up = (np.stack(side) for side in zip(*parts, strict=True))  # (n, d, r), (n, r, 2 k c)
    up = up.reshape(n, r, 2, k, c)
    array = lambda x, like: x.astype(like.dtype)  # noqa: E731
    return plain.replace(
        latent=array(down, params.key), key=array(up[:, :, 0], params.key), value=array(up[:, :, 1], params.value)
    )


def _rank(rank: int | None, share: float | None, width: int, numbers: int, name: str) -> int:
    most = min(width, numbers)
    if share is not None:
        if not 0 < share <= 1:
            raise ConfigError(f"share is of the numbers that a position caches, above 0 and up to 1, not {share!r}")
        return min(max(1, round(share * numbers)), most)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise ConfigError(
            f"{name} can share a latent of rank 1 to {most} (it has {width} inputs and caches {numbers} numbers a "
            f"position), not {rank!r}"
        )
    return rank
