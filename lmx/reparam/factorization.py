"""A model with its matrices factorized: what they see, how they decompose, which ranks they get, and the new model.

    small = factorize(model, 0.5, batches)                             # half of the numbers in the layers' matrices
    parts = decompose_model(model, batches, method="two-sided")        # the same in steps: what is costly, once,
    small = rebuild(model, parts, choose_ranks(model, parts, 0.5))     # then any number of budgets

A method is a choice of moments (`METHODS`), a form how factors are stored; no model code knows of either.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lmx.core import specs, tree, weights
from lmx.core.errors import ConfigError, nearest
from lmx.core.kinds import LowRank
from lmx.models import stacks
from lmx.models.transformer import Model
from lmx.reparam import allocate as ranks_of
from lmx.reparam import behind, grams, prices
from lmx.reparam.decompose import Decomposition, check_form, check_rank, decompose, largest_rank, stored
from lmx.reparam.forms import pivoted
from lmx.reparam.grams import LINEARS, Moments, Site
from lmx.reparam.layers import finished, towers

Report = Callable[[str], None]
Sides = tuple[np.ndarray | None, np.ndarray | None]  # moments of inputs, of the gradient at outputs

# name -> (the moments it asks for, how they enter a decomposition)
METHODS: dict[str, tuple[tuple[str, ...], Callable[[Moments], Sides]]] = {
    "svd": ((), lambda m: (None, None)),
    "asvd": (("absolute",), lambda m: (m.absolute, None)),  # diag(E|x|^(1/2))^2, alpha = 0.5 (Yuan et al. 2023)
    "fwsvd": (("fisher",), lambda m: (m.fisher, None)),  # rows by their Fisher information (Hsu et al. 2022)
    "svd-llm": (("input",), lambda m: (m.input, None)),  # Wang et al. 2024
    "two-sided": (("input", "output"), lambda m: (m.input, m.output)),
}
ALLOCATIONS = ("global", "uniform")


@dataclasses.dataclass(frozen=True)
class Part:
    """One matrix of a model and its decomposition; output: the moments of its outputs' gradient, where a sequential
    rebuild wants them again."""

    site: Site
    decomposition: Decomposition
    output: np.ndarray | None = None


Parts = dict[str, Part]  # by path
Ranks = dict[str, int | None]  # by path; None keeps a matrix dense


def factorize_weight(
    weight: Any,
    input_gram: Any = None,
    output_gram: Any = None,
    *,
    rank: int | None = None,
    budget: float | None = None,
    form: str = "two-factor",
    inputs: int = 1,
    report: Report | None = None,
) -> Any:
    """The best weight of a rank under second moments of its inputs and of its outputs' gradient (`decompose`).

    weight: an array (inputs..., outputs...); the moments are of its axes flattened to (m, n).
    rank, or budget: numbers that it may take. form: "two-factor" (`LowRank`), "pivoted" (`Pivoted`), or "dense", the
    array of that rank. A pivoted weight of full rank is the array.
    Raises ConfigError for a rank or budget that cannot be, and as `decompose`.
    """
    check_form(form)
    if (rank is None) == (budget is None):
        raise ConfigError("give rank= or budget=, one of them")
    shape = tuple(weight.shape)
    sides = int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:]))
    if rank is None:
        rank = largest_rank(sides, budget, form)
        if rank < 1:
            least = stored(sides, 1, form)
            raise ConfigError(f"{budget:g} numbers are too few for a matrix {sides}: rank 1 takes {least}")
    check_rank(rank, sides)
    found = decompose(np.asarray(weight, np.float64).reshape(sides), input_gram, output_gram, report=report)
    return jax.device_put(_formed(*found.truncate(rank), weight, inputs, form))


def factorize(
    model: Model,
    keep: float,
    batches: Sequence[dict[str, jax.Array]] = (),
    *,
    method: str = "two-sided",
    form: str = "pivoted",
    pattern: str = LINEARS,
    allocation: str = "global",
    price: ranks_of.Price | None = None,
    grid: int | None = None,
    max_stacks: int = 8,
    sequential: bool = False,
    key: jax.Array | None = None,
    report: Report | None = None,
) -> Model:
    """The model with the selected matrices factorized to a share `keep` of what they take.

    batches: calibration text, dicts with "tokens" (b, t) and what else the model reads; the method "svd" needs none.
    method, form: of `METHODS` and `lmx.reparam.decompose.FORMS`. allocation, price, grid, max_stacks: `choose_ranks`.
    sequential: each layer is fitted again to what the factorized layers before it give (`rebuild`).
    report: told what was out of the ordinary. The result computes what the model did, up to what was cut.
    Raises ConfigError for options that cannot be, a pattern that selects nothing, or NaN among the weights.
    """
    parts = decompose_model(
        model, batches, method=method, pattern=pattern, sequential=sequential, key=key, report=report
    )
    ranks = choose_ranks(
        model, parts, keep, form=form, allocation=allocation, price=price, grid=grid, max_stacks=max_stacks
    )
    again = batches if sequential else ()
    return rebuild(model, parts, ranks, form=form, max_stacks=max_stacks, batches=again, method=method)


def decompose_model(
    model: Model,
    batches: Sequence[dict[str, jax.Array]] = (),
    *,
    method: str = "two-sided",
    pattern: str = LINEARS,
    sequential: bool = False,
    key: jax.Array | None = None,
    report: Report | None = None,
) -> Parts:
    """Every selected matrix decomposed under the moments of a method, collected from the batches a layer at a time.

    sequential: keep the output moments for `rebuild`. Arguments and errors are those of `factorize`.
    """
    layers = decompose_layers(
        model, batches, method=method, pattern=pattern, sequential=sequential, key=key, report=report
    )
    return in_order(model, pattern, layers)


def decompose_layers(
    model: Model,
    batches: Sequence[dict[str, jax.Array]] = (),
    *,
    method: str = "two-sided",
    pattern: str = LINEARS,
    sequential: bool = False,
    key: jax.Array | None = None,
    report: Report | None = None,
) -> Iterator[Parts]:
    """`decompose_model`, the matrices of one layer at a time, in the order in which their moments are there."""
    if method not in METHODS:
        raise ConfigError(f"no method {method!r}, there are {', '.join(METHODS)}{nearest(method, METHODS)}")
    want, sides = METHODS[method]
    found = {site.path: site for site in grams.sites(model, pattern)}
    arrays = _Matrices(model)
    for layer in grams.moments(model, batches, pattern, want=want, key=key) if want else _unseen(found.values()):
        parts: Parts = {}
        for path, moment in layer.items():
            site, (inner, outer) = found[path], sides(moment)
            said = None if report is None else functools.partial(_say, report, path)
            try:
                made = decompose(arrays[path].reshape(site.shape), inner, outer, report=said)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from error
            parts[path] = Part(site, made, outer if sequential else None)
        yield parts


def in_order(model: Model, pattern: str, layers: Iterable[Parts]) -> Parts:
    """The parts of all layers in the order of the model's."""
    parts: Parts = {}
    for layer in layers:
        parts |= layer
    return {site.path: parts[site.path] for site in grams.sites(model, pattern)}


def _unseen(sites: Iterable[Site]) -> Iterator[dict[str, Moments]]:
    """Layers of which nothing has to be seen."""
    for _, layer in itertools.groupby(sites, lambda site: (site.tower, site.layer)):
        yield {site.path: Moments(0) for site in layer}


def choose_ranks(
    model: Model,
    parts: Parts,
    keep: float,
    *,
    form: str = "pivoted",
    allocation: str = "global",
    price: ranks_of.Price | None = None,
    grid: int | None = None,
    max_stacks: int = 8,
) -> Ranks:
    """A rank for every matrix, or None where it stays dense, so that all together take a share `keep` of what they do.

    allocation: "global", by the errors of all matrices under one budget, or "uniform", the same share of each.
    price: of a matrix (m, n) at a rank; stored numbers by default (`lmx.reparam.prices` has bytes and seconds).
    grid: ranks are multiples of it; by default about 1/32 of a matrix's largest. max_stacks: unlike neighbours a tower
    may have, as each costs compile time. Raises ConfigError for a share that cannot be reached; it names the least.
    """
    check_form(form)
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is a share of what the matrices take, above 0 and at most 1, not {keep}")
    if allocation not in ALLOCATIONS:
        there = f"{', '.join(ALLOCATIONS)}{nearest(allocation, ALLOCATIONS)}"
        raise ConfigError(f"no allocation {allocation!r}, there are {there}")
    if keep == 1:
        return dict.fromkeys(parts)
    if allocation == "uniform":
        return {path: _uniform(part.site, keep, form) for path, part in parts.items()}
    of = prices.numbers(form) if price is None else price
    towers, names = _runs(model, parts, of, grid)
    budget = keep * sum(of(part.site.shape, None) for part in parts.values())
    chosen = ranks_of.allocate(towers, budget, max_stacks)
    ranks: Ranks = {}
    for tower, tower_names in zip(chosen, names, strict=True):
        for run, run_names in zip(tower, tower_names, strict=True):
            for got, paths in zip(run, run_names, strict=True):
                ranks |= {paths[name]: rank for name, rank in got.items()}
    return {path: ranks[path] for path in parts}


def rebuild(
    model: Model,
    parts: Parts,
    ranks: Mapping[str, int | None],
    *,
    form: str = "pivoted",
    max_stacks: int = 8,
    batches: Sequence[dict[str, jax.Array]] = (),
    method: str = "two-sided",
) -> Model:
    """The model with its matrices at these ranks, their decompositions truncated.

    batches: with them, the layers are rebuilt from the first to the last, each matrix fitted to what it gave by what it
    now reads: under A = E[z' z] and C = E[z' x], where x went into it before and z does behind the factorized layers,
    the matrix decomposed is A^(-1) C W (not those at the ends, `embed/tokens` and `head/out`). `parts` then are those
    of `decompose_model(sequential=True)`.
    """
    check_form(form)
    made = {p: part.decomposition.truncate(ranks[p]) for p, part in parts.items() if ranks[p] is not None}
    if batches:
        at_ends = {path: pair for path, pair in made.items() if parts[path].site.at_end}
        behind_ends = specs.lay_out(_with(stacks.unstack(model), parts, at_ends, form))
        made |= _sequential(model, behind_ends, parts, ranks, batches, method)
    return finished(_with(stacks.unstack(model), parts, made, form), max_stacks)


def _with(apart: Model, parts: Parts, made: Mapping[str, tuple[np.ndarray, np.ndarray]], form: str) -> Model:
    """The unstacked model with pairs of factors, by path, in the places of its matrices."""

    def one(path: str, w: Any) -> Any:
        if path not in made:
            return w
        site = parts[path].site
        if site.at_end:
            return _formed(*made[path], w, site.inputs, form)
        one = jax.ShapeDtypeStruct(w.shape[1:], w.dtype)
        return jax.tree.map(lambda x: x[None], _formed(*made[path], one, site.inputs, form))

    named = tree.paths(apart, weights.is_weight)
    leaves = [one(str(path), w) for path, w in named]
    return jax.tree.unflatten(jax.tree.structure(apart, is_leaf=weights.is_weight), leaves)


def _say(report: Report, path: str, text: str) -> None:
    report(f"{path}: {text}")


def _uniform(site: Site, keep: float, form: str) -> int | None:
    m, n = site.shape
    rank = largest_rank(site.shape, keep * m * n, form)
    if rank < 1:
        least = stored(site.shape, 1, form) / (m * n)
        raise ConfigError(f"{site.path} of {m} x {n} takes {least:.1%} at rank 1, more than the {keep:.1%} to keep")
    return rank if rank < min(m, n) else None


class _Matrices:
    """The weights of an unstacked model by path, written out in float64 on the host when they are asked for."""

    def __init__(self, model: Model) -> None:
        named = tree.paths(stacks.unstack(model), weights.is_weight)
        self.weights = {str(path): (w, path.layers is not None) for path, w in named}

    def __getitem__(self, path: str) -> np.ndarray:
        w, of_layer = self.weights[path]
        one = np.asarray(weights.dense(w), np.float64)
        return one[0] if of_layer else one


def _formed(a: np.ndarray, b: np.ndarray, like: Any, inputs: int, form: str) -> Any:
    """Factors (m, r) and (r, n) as a weight in the place of an array (inputs..., outputs...), in its dtype; of numpy,
    for each operation on a device would be compiled for each shape."""
    shape, rank = like.shape, a.shape[1]
    if form == "dense" or form == "pivoted" and rank >= a.shape[0]:
        return (a @ b).reshape(shape).astype(like.dtype)
    left, right = a.reshape(*shape[:inputs], rank), b.reshape(rank, *shape[inputs:])
    if form == "pivoted":
        made = pivoted(LowRank(left.astype(np.float32), right.astype(np.float32), inputs))
        return jax.tree.map(lambda x: x.astype(like.dtype) if np.issubdtype(x.dtype, np.floating) else x, made)
    return LowRank(left.astype(like.dtype), right.astype(like.dtype), inputs)


def _runs(model: Model, parts: Parts, price: ranks_of.Price, grid: int | None) -> tuple[list, list]:
    """(for each tower its runs of neighbours with their curves by name, the paths of those names)."""
    by_layer: dict[tuple[str, int | None], list[Part]] = {}
    for part in parts.values():
        by_layer.setdefault((part.site.tower, part.site.layer), []).append(part)
    curves, names = [], []
    for tower, layers in towers(model).items():
        first, tower_curves, tower_names = 0, [], []
        for n, period in zip(layers.layers.sizes, layers.layers.stacks, strict=True):
            held = [
                {
                    f"{j}/{p.site.matrix.name}": p
                    for j in range(len(period))
                    for p in by_layer.get((tower, first + i * len(period) + j), ())
                }
                for i in range(n)
            ]
            same = set.intersection(*(set(one) for one in held))
            if any(set(one) != same for one in held):  # the pattern cuts the stack: each neighbour by itself
                groups = [[one] for one in held]
            else:
                groups = [held]
            for group in groups:
                tower_curves.append(
                    [{name: ranks_of.curve(p.decomposition, price, grid) for name, p in one.items()} for one in group]
                )
                tower_names.append([{name: p.site.path for name, p in one.items()} for one in group])
            first += n * len(period)
        curves.append(tower_curves)
        names.append(tower_names)
    for part in (part for part in parts.values() if part.site.at_end):  # each by itself
        curves.append([[{part.site.path: ranks_of.curve(part.decomposition, price, grid)}]])
        names.append([[{part.site.path: part.site.path}]])
    return curves, names


def _sequential(model, changed, parts, ranks, batches, method) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors of every matrix in the layers, fitted behind the factorized layers before it.

    changed: the same model, the matrices at its ends already replaced."""
    arrays, made = _Matrices(model), {}
    by_input = "input" in METHODS[method][0]

    def fit(seen: behind.Pairs) -> dict[str, np.ndarray]:
        for path, (now, across) in seen.items():
            part = parts[path]
            wanted, under = behind.target(arrays[path].reshape(part.site.shape), now, across)
            made[path] = decompose(wanted, under if by_input else None, part.output).truncate(ranks[path])
        return {path: made[path][0] @ made[path][1] for path in seen}

    chosen = [p.site for path, p in parts.items() if ranks[path] is not None and not p.site.at_end]
    behind.walk_behind(model, changed, batches, chosen, fit)
    return made
