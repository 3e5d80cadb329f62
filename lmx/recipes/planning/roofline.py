"""Bounds by arithmetic: FLOPs, bytes of memory and of interconnect a step, the time they take, the memory they need.

A roofline (Williams et al. 2009) is a bound, not a prediction: what it assumes is listed in `ASSUMPTIONS` and printed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lmx.core import hlo, sharding
from lmx.core.specs import ParamSpec
from lmx.core.topology import Target
from lmx.models import cost
from lmx.models.transformer import Model
from lmx.recipes.planning.programs import Compiled, Work, local_bytes

ASSUMPTIONS = (
    "compute: every matrix product runs at the peak of dense bfloat16; what remat recomputes is included ('dots': "
    "attention alone; 'full': the layers, each but for its last product), attention is counted over all keys where its "
    "implementation is 'reference', over those before the query otherwise",
    "memory: every product reads its operands and writes its result once (attention's weights only where its "
    "implementation is 'reference'), the optimizer reads and writes its state once; norms, rotations and activations "
    "are fused into products and cost nothing",
    "interconnect: collectives as compiled, by rings, over all links of the torus dimensions they extend over (GPUs: "
    "NVLink within a node, the network beyond), without latency; every dimension is taken to close to a ring, used in "
    "both directions, also in slices that lack these links",
    "step: the largest of the three, as if they overlapped perfectly; 'without overlap' is their sum",
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds a step, on one device (all do the same)."""

    model_flops: float  # of the whole step, over all devices, nothing recomputed
    executed_flops: float  # with what is recomputed
    memory_bytes: float  # a device
    network_bytes: float  # a device
    compute: float
    memory: float
    network: float
    peak: float  # FLOPs a second of all devices

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def serial(self) -> float:
        return self.compute + self.memory + self.network

    @property
    def bound(self) -> str:
        times = {"compute": self.compute, "memory": self.memory, "interconnect": self.network}
        return max(times, key=times.get)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B) at the time of `step`."""
        return self.model_flops / (self.peak * self.step)


def train_flops(model: Model, tokens: int, length: int) -> tuple[int, int]:
    """(of the model, executed) FLOPs to train on `tokens` in rows of `length`."""
    forward, p = cost.cost(model, length).forward_flops, model.specs().params
    seen = cost.attention_flops(model, length)
    attention = cost.attention_flops(model, length, causal=model.config.attention != "reference")
    blocks = cost.flops(p.decoder) - cost.flops(_last_of_blocks(p)) + attention
    again = {"none": 0, "dots": attention, "full": blocks}[model.config.remat]
    return 3 * forward * tokens, (3 * (forward - seen + attention) + again) * tokens


def _last_of_blocks(params: Any) -> list[Any]:
    """The last matrix of every block. No gradient needs its product, so nothing computes that again; the head's is not
    either, whose gradient the loss takes while the logits are there."""
    return [block.mlp.down for period in params.decoder.layers.stacks for block in period]


@dataclasses.dataclass(frozen=True)
class Products:
    """Sizes of products with weights, on one device of a mesh."""

    weights: int = 0  # bytes of the matrices
    inputs: int = 0  # numbers read a token
    outputs: int = 0  # numbers written a token

    def __sub__(self, other: Products) -> Products:
        return Products(self.weights - other.weights, self.inputs - other.inputs, self.outputs - other.outputs)


@dataclasses.dataclass(frozen=True)
class Local:
    """Sizes on one device of a mesh: what tensor axes leave of each matrix, with fsdp gathered."""

    tokens: float  # a microbatch
    layers: int
    products: Products  # of layers and head
    again: Products  # those of them that remat "full" computes again
    width: int  # bytes of a number in products
    residual: int  # numbers a token between layers
    kept: int  # numbers a token that the products of all layers write, but for those added to the residual
    scores: float  # attention weights a token, all layers


def local(model: Model, sizes: dict[str, int], batch_size: float, length: int) -> Local:
    """Sizes for a (micro)batch of rows of `length` on a mesh of these sizes."""
    c, p = model.config, model.specs().params
    head = cost.readout(p)
    of_layers, tensor = _products(p.decoder, sizes), sizes.get("tensor", 1)
    rows = batch_size / math.prod(sizes.get(a, 1) for a in sharding.current_rules().batch)
    layers = p.decoder.layers.num_layers
    return Local(
        tokens=rows * length,
        layers=layers,
        products=_products((p.decoder, head), sizes),
        again=of_layers - _products(_last_of_blocks(p), sizes),
        width=jnp.dtype(c.activation_dtype).itemsize,
        residual=c.hidden_size,
        kept=max(0, of_layers.outputs - 2 * layers * c.hidden_size),
        scores=layers * length * c.num_heads / (tensor if c.num_heads % tensor == 0 else 1),
    )


def _products(tree: Any, sizes: dict[str, int]) -> Products:
    """Of every matrix in a tree of specs, on a mesh of these sizes of which only the tensor axis splits."""
    whole = {name: size for name, size in sizes.items() if name == "tensor"}
    weights = inputs = outputs = 0
    for spec in jax.tree.leaves(tree):
        if spec.inputs is None:
            continue
        shape = _split(spec, whole)
        copies, middle = math.prod(shape[: spec.leading]), spec.leading + spec.inputs
        weights += math.prod(shape) * jnp.dtype(spec.dtype).itemsize
        inputs += copies * math.prod(shape[spec.leading : middle])
        outputs += copies * math.prod(shape[middle:])
    return Products(weights, inputs, outputs)


def _split(spec: ParamSpec, sizes: dict[str, int]) -> list[int]:
    entries = sharding.partition_spec(spec.axes, spec.shape, _Sizes(sizes))
    parts = [math.prod(sizes[a] for a in ((e,) if isinstance(e, str) else e or ())) for e in entries]
    return [n // part for n, part in zip(spec.shape, parts, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """A mesh as far as `partition_spec` looks at it."""

    shape: dict[str, int]


def train_traffic(model: Model, at: Local, state_bytes: int, accumulate: int) -> float:
    """Bytes of a device's memory that a train step reads and writes."""
    every, again = at.products, at.again if model.config.remat == "full" else Products()
    numbers = 3 * (every.inputs + every.outputs) + again.inputs + again.outputs
    scores = 0.0
    if model.config.attention == "reference":  # float32, written and read; twice as often in the backward pass
        scores = at.tokens * at.scores * 4 * 2 * (3 + (model.config.remat != "none"))
    saved = 2 * at.layers * at.tokens * at.residual * at.width
    weights = 3 * every.weights + again.weights
    return accumulate * (at.tokens * at.width * numbers + scores + saved + weights) + 2 * state_bytes


def saved_activations(model: Model, at: Local) -> float:
    """Bytes that wait for the backward pass, at least: the input of every layer, what its products wrote unless remat
    is "full", and without remat attention's weights. What is added to the residual is not counted twice."""
    remat = model.config.remat
    kept = at.layers * at.residual + (at.kept if remat != "full" else 0)
    scores = 4 * at.scores if remat == "none" and model.config.attention == "reference" else 0
    return at.tokens * (kept * at.width + scores)


def of_train(work: Work, compiled: Compiled, target: Target) -> Roofline:
    """The roofline of a compiled train step."""
    case, model = compiled.case, compiled.model
    at = local(model, dict(compiled.mesh.shape), work.batch_size / case.accumulate, work.length)
    state = compiled.memory.parameters + compiled.memory.optimizer
    flops = train_flops(model, work.batch_size * work.length, work.length)
    return _roofline(*flops, train_traffic(model, at, state, case.accumulate), compiled, target)


def of_decode(work: Work, compiled: Compiled, target: Target) -> Roofline:
    """The roofline of one decode step at the end of the rows: every weight and the whole cache are read."""
    model = compiled.model
    at = local(model, dict(compiled.mesh.shape), work.batch_size, 1)
    flops = work.batch_size * cost.cost(model, 2 * work.length - 1).forward_flops  # its mean number of keys is `length`
    return _roofline(flops, flops, at.products.weights + compiled.memory.cache, compiled, target)


def _roofline(flops: float, executed: float, traffic: float, compiled: Compiled, target: Target) -> Roofline:
    found = compiled.collectives or []
    devices, chip = compiled.mesh.size, target.chip
    seconds = lambda one: one.count * one.wire / target.reach(compiled.mesh, one.group)  # noqa: E731
    return Roofline(
        model_flops=flops,
        executed_flops=executed,
        memory_bytes=traffic,
        network_bytes=sum(one.count * one.wire for one in found),
        compute=executed / devices / chip.flops,
        memory=traffic / chip.bandwidth,
        network=sum(map(seconds, found)),
        peak=devices * chip.flops,
    )


def by_kind(found: list[hlo.Collective]) -> list[dict[str, Any]]:
    """Collectives summed up by kind: how many a step, bytes of the arrays, bytes each device sends."""
    rows = {}
    for one in found:
        row = rows.setdefault(one.kind, {"kind": one.kind, "count": 0, "bytes": 0, "sent": 0.0, "counted": True})
        row["count"] += one.count
        row["bytes"] += one.count * one.bytes
        row["sent"] += one.count * one.wire
        row["counted"] = row["counted"] and one.counted
    return sorted(rows.values(), key=lambda row: -row["sent"])


def least_memory(model: Model, state_bytes: int, at: Local) -> float:
    """Bytes that a train step needs on a device at the least: state, gradients, what waits for the backward pass."""
    return state_bytes + local_bytes(model) + saved_activations(model, at)
