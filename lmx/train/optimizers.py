"""AdamW, Adafactor and Muon, learning-rate schedules, and rates by path: optax, told what a stack of layers is.

The optimizers that look at a matrix's shape get it from `ParamSpec`: a stacked leaf (l, d, h, c) is l matrices of d
inputs and h c outputs, so stacked layers train exactly as a list of layers would. All are `optax`
transformations of whatever tree is trained (None in the holes); each reads specs and paths from that tree itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lmx.core import specs, tree
from lmx.core.errors import ConfigError, nearest
from lmx.core.specs import ParamSpec

Schedule = Callable[[jax.Array], jax.Array] | float
ByPath = dict[str, float] | None


def cosine(peak: float, steps: int, warmup: int = 0, final: float = 0.1) -> Schedule:
    """Linear to `peak` over `warmup` steps, then a half cosine to `final * peak` at `steps`. Loshchilov 2017."""
    _check_warmup(steps, warmup)
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps, peak * final)


def wsd(peak: float, steps: int, warmup: int = 0, decay: float = 0.2, final: float = 0.0) -> Schedule:
    """Warm up, stay at `peak`, and fall linearly to `final * peak` over the last `decay` of the steps.

    Hu et al. 2024, "MiniCPM", section 4.
    """
    _check_warmup(steps, warmup)
    fall = max(1, round(steps * decay))
    if warmup + fall > steps:
        raise ConfigError(f"{warmup} warm-up steps and {fall} of decay exceed {steps} steps; lower warmup or decay")
    pieces = [
        optax.linear_schedule(0.0, peak, max(warmup, 1)) if warmup else optax.constant_schedule(peak),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, final * peak, fall),
    ]
    return optax.join_schedules(pieces, [warmup, steps - fall])


def _check_warmup(steps: int, warmup: int) -> None:
    if not 0 <= warmup < max(steps, 1):
        raise ConfigError(f"warmup {warmup} must be at least 0 and less than the {steps} steps")


SCHEDULES: dict[str, Callable[..., Schedule]] = {"cosine": cosine, "wsd": wsd}


def adamw(
    learning_rate: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    learning_rates: ByPath = None,
    weight_decays: ByPath = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2).

    weight_decay is that of matrices; biases and norm scales have none. learning_rates and weight_decays override by
    path pattern: a factor of the learning rate, and a decay.
    """
    return _finish(optax.scale_by_adam(b1, b2, eps), learning_rate, weight_decay, learning_rates, weight_decays)


def adafactor(
    learning_rate: Schedule,
    *,
    decay_rate: float = 0.8,
    clipping_threshold: float = 1.0,
    weight_decay: float = 0.0,
    learning_rates: ByPath = None,
    weight_decays: ByPath = None,
) -> optax.GradientTransformation:
    """Adafactor without momentum (Shazeer and Stern 2018, algorithm 4, relative steps off), each matrix on its own:
    second moments factored over its inputs and outputs, updates clipped by that matrix's root mean square."""
    inner = optax.chain(
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=1),
        optax.clip_by_block_rms(clipping_threshold),
        optax.scale_by_param_block_rms(),
    )
    return _finish(_per_matrix(inner), learning_rate, weight_decay, learning_rates, weight_decays)


def muon(
    learning_rate: Schedule,
    *,
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    learning_rates: ByPath = None,
    weight_decays: ByPath = None,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices inside layers, AdamW for embeddings, heads, biases and norms.

    Orthogonalised updates are scaled by 0.2 sqrt(max(inputs, outputs)), which gives them AdamW's size, so one learning
    rate serves both (Liu et al. 2025, "Muon is Scalable for LLM Training", equation 4).
    """
    numbers = lambda params: jax.tree.map(_dimension_numbers, specs.of(params))  # noqa: E731
    orthogonal = optax.chain(scale_by_muon(beta=momentum, weight_dimension_numbers=numbers), _match_adam())
    groups = {"muon": orthogonal, "adam": optax.scale_by_adam(b1, b2, eps)}
    return _finish(_grouped(_muon_group, groups), learning_rate, weight_decay, learning_rates, weight_decays)


OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "muon": muon}


def optimizer(name: str, learning_rate: Schedule, **options: Any) -> optax.GradientTransformation:
    """The optimizer of that name. Raises ConfigError, naming the nearest, if there is none."""
    if name not in OPTIMIZERS:
        raise ConfigError(f"no optimizer {name!r}, there are {', '.join(OPTIMIZERS)}{nearest(name, OPTIMIZERS)}")
    return OPTIMIZERS[name](learning_rate, **options)


def schedule(name: str, peak: float, steps: int, warmup: int = 0) -> Schedule:
    """The schedule of that name. Raises ConfigError, naming the nearest, if there is none."""
    if name not in SCHEDULES:
        raise ConfigError(f"no schedule {name!r}, there are {', '.join(SCHEDULES)}{nearest(name, SCHEDULES)}")
    return SCHEDULES[name](peak, steps, warmup)


def _matrix(spec: ParamSpec) -> tuple[int, int, int]:
    """(copies, inputs, outputs): how many matrices a leaf holds and their sizes; a vector is one column."""
    sizes = spec.shape[spec.leading :]
    inputs = len(sizes) if spec.inputs is None else spec.inputs
    return math.prod(spec.shape[: spec.leading]), math.prod(sizes[:inputs]), math.prod(sizes[inputs:])


def _dimension_numbers(spec: ParamSpec) -> MuonDimensionNumbers:
    middle = spec.leading + spec.inputs
    return MuonDimensionNumbers(tuple(range(spec.leading, middle)), tuple(range(middle, len(spec.shape))))


def _muon_group(spec: ParamSpec) -> str:
    """Muon takes matrices that map vectors to vectors; those looked up by token or position, or that score tokens,
    go to Adam."""
    vectors = spec.inputs is not None and "vocab" not in spec.axes and spec.axes[spec.leading] is not None
    return "muon" if vectors else "adam"


def _match_adam() -> optax.GradientTransformation:
    def update(updates, state, params):
        scale = jax.tree.map(lambda spec: 0.2 * math.sqrt(max(_matrix(spec)[1:])), specs.of(params))
        return jax.tree.map(lambda u, s: u * s, updates, scale), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _per_matrix(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on every matrix by itself: leaves are seen as (copies, inputs, outputs), and it is mapped over copies."""

    def view(spec, x):
        copies, inputs, outputs = _matrix(spec)
        return x.reshape((copies, inputs) if spec.inputs is None else (copies, inputs, outputs))

    def each(params, function, *trees):
        flat = lambda t: jax.tree.leaves(t)  # noqa: E731
        return [function(spec, *xs) for spec, *xs in zip(flat(specs.of(params)), *map(flat, trees), strict=True)]

    def init(params):
        return each(params, lambda spec, p: jax.vmap(inner.init)(view(spec, p)), params)

    def update(updates, state, params):
        states = iter(state)

        def one(spec, u, p):
            new, new_state = jax.vmap(inner.update)(view(spec, u), next(states), view(spec, p))
            return new.reshape(u.shape), new_state

        pairs = each(params, one, updates, params)
        structure = jax.tree.structure(updates)
        return structure.unflatten([new for new, _ in pairs]), [new_state for _, new_state in pairs]

    return optax.GradientTransformation(init, update)


def _grouped(
    group: Callable[[ParamSpec], str], transformations: dict[str, optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Each leaf to the transformation of its group; the others see None in its place."""

    def part(name, params, values):
        return jax.tree.map(lambda spec, x: x if group(spec) == name else None, specs.of(params), values)

    def init(params):
        return {name: t.init(part(name, params, params)) for name, t in transformations.items()}

    def update(updates, state, params):
        results, states = [], {}
        for name, t in transformations.items():
            pieces = part(name, params, updates), state[name], part(name, params, params)
            result, states[name] = t.update(*pieces)
            results.append(result)
        return tree.combine(*results), states

    return optax.GradientTransformation(init, update)


def _finish(inner, learning_rate, weight_decay, learning_rates, weight_decays) -> optax.GradientTransformation:
    """Decoupled decay, then the learning rate, each overridden by path."""

    def decay(updates, state, params):
        matrices = jax.tree.map(lambda spec: 0.0 if spec.inputs is None else weight_decay, specs.of(params))
        rates = _override(params, matrices, weight_decays)
        return jax.tree.map(lambda u, p, r: u + (r * p).astype(u.dtype), updates, params, rates), state

    def scale(updates, state, params):
        rates = tree.rates(params, learning_rates or {}, 1.0)
        return jax.tree.map(lambda u, r: (u * r).astype(u.dtype), updates, rates), state

    empty = lambda params: optax.EmptyState()  # noqa: E731
    return optax.chain(
        inner,
        optax.GradientTransformation(empty, decay),
        optax.scale_by_learning_rate(learning_rate),
        optax.GradientTransformation(empty, scale),
    )


def _override(params: Any, values: Any, by_path: ByPath) -> Any:
    """`values` (a tree of numbers), but the numbers of `by_path` where its patterns match."""
    if not by_path:
        return values
    found = tree.rates(params, by_path, math.nan)
    return jax.tree.map(lambda value, other: jnp.where(jnp.isnan(other), value, other), values, found)
