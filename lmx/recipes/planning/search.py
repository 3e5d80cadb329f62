"""Which mesh, remat policy and number of microbatches: candidates, pruned and put in order by arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from lmx.core import sharding, specs
from lmx.core.topology import Target
from lmx.models.transformer import Model
from lmx.recipes.planning import roofline
from lmx.recipes.planning.programs import Case, Work, local_bytes, train_arguments

REMATS = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A case with what arithmetic says about it."""

    case: Case
    memory: float  # bytes a device, at least
    seconds: float  # a step, at least


def meshes(devices: int, batch_size: int, model: Model) -> list[str]:
    """Every factorization of the devices over data, fsdp and tensor in which rows, heads and layers' widths divide."""
    c, found = model.config, []
    for tensor in _divisors(devices):
        if any(n % tensor for n in (c.num_heads, c.intermediate_size, c.vocab_size)):
            continue
        rest = devices // tensor
        if batch_size % rest:
            continue
        for fsdp in _divisors(rest):
            if c.hidden_size % fsdp == 0:
                found.append(text({"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}))
    return found


def text(sizes: dict[str, int]) -> str:
    """`fsdp=4,tensor=2`: a mesh without its axes of size 1."""
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "fsdp=1"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def judge(work: Work, case: Case, target: Target) -> Candidate:
    """What arithmetic says about a case; only shapes are traced, nothing is compiled."""
    mesh = target.mesh(case.mesh)
    with sharding.use_mesh(mesh):
        _, state, _ = train_arguments(work, case, mesh)
        model = state.model
        held = local_bytes(model) + local_bytes(state.opt_state)
        sizes = dict(mesh.shape)
        at = roofline.local(model, sizes, work.batch_size / case.accumulate, work.length)
        memory = roofline.least_memory(model, held, at)
        _, executed = roofline.train_flops(model, work.batch_size * work.length, work.length)
        times = (
            executed / mesh.size / target.chip.flops,
            roofline.train_traffic(model, at, held, case.accumulate) / target.chip.bandwidth,
            _sent(model, at, sizes, case.accumulate, local_bytes(model)) / target.chip.links,
        )
    return Candidate(case, memory, max(times) + 0.1 * sum(times))  # the tenth parts cases bound by one and the same


def _sent(model: Model, at: roofline.Local, sizes: dict[str, int], accumulate: int, gradients: int) -> float:
    """Bytes that a device sends in a step, before it is known what the compiler makes of it."""
    part = lambda name: 1 - 1 / sizes.get(name, 1)  # noqa: E731
    gathered = 3 * accumulate * at.products.weights * part("fsdp")  # forward, backward, and gradients scattered
    reduced = 2 * gradients * part("data")
    passes = 5 if model.config.remat == "full" else 4  # two forward, two backward, one of them again
    tensor = accumulate * passes * at.layers * at.tokens * at.residual * at.width * 2 * part("tensor")
    return gathered + reduced + tensor


def candidates(work: Work, target: Target, model: Model) -> tuple[list[Candidate], int]:
    """(what may fit, most promising first, how many were left out because they cannot)."""
    found = [
        judge(work, Case(mesh, remat), target)
        for mesh in meshes(len(target.devices), work.batch_size, model)
        for remat in REMATS
    ]
    able = [one for one in found if one.memory <= target.chip.memory]
    return sorted(able, key=lambda one: one.seconds), len(found) - len(able)


def promising(queue: list[Candidate], taken: dict[str, float], memory: float) -> Candidate:
    """The first that seems to fit, or else the first. `taken`: for each remat policy, by how much compiled programs
    exceeded what arithmetic says, at the least."""
    return next((one for one in queue if one.memory * taken.get(one.case.remat, 1.0) <= memory), queue[0])


def remedies(work: Work, case: Case, target: Target, model: Model) -> Iterator[Candidate]:
    """Cases that arithmetic does not exclude and that need less memory than one that did not fit, mildest first: a
    stronger policy, then another mesh, then microbatches."""
    stronger = REMATS[REMATS.index(case.remat) + 1 :]
    devices = len(target.devices)
    others = [m for m in meshes(devices, work.batch_size, model) if m != case.mesh]
    steps = [Case(case.mesh, remat, case.accumulate) for remat in stronger]
    ranked = [judge(work, Case(mesh, "full", case.accumulate), target) for mesh in others]
    ranked = sorted((one for one in ranked if one.memory <= target.chip.memory), key=lambda one: one.memory)
    sizes = dict(target.mesh(case.mesh).shape)
    rows = work.batch_size // math.prod(sizes[a] for a in sharding.current_rules().batch)
    parts = [n for n in _divisors(max(1, rows)) if n > case.accumulate and n % case.accumulate == 0]
    split = [judge(work, Case(case.mesh, "full", n), target) for n in parts[-1:]]
    first = judge(work, case, target)
    for one in [judge(work, step, target) for step in steps] + ranked[:2] + split:
        if one.memory <= target.chip.memory and (one.case.mesh != case.mesh or one.memory <= first.memory):
            yield one


def least_devices(work: Work, case: Case, target: Target) -> int:
    """How many such devices hold state and gradients alone, if all of it were split evenly."""
    mesh = target.mesh(case.mesh)
    with sharding.use_mesh(mesh):
        _, state, _ = train_arguments(work, case, mesh)
        total = 2 * specs.nbytes(state.model) + specs.nbytes(state.opt_state)
    return math.ceil(total / target.chip.memory)
