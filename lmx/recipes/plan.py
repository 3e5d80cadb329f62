"""`lmx plan`: what training or decoding a model takes on hardware that is not there: memory, collectives, time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from rich.console import Console

from lmx.core.errors import ConfigError, nearest
from lmx.core.topology import Target, target
from lmx.models import cost
from lmx.models.fields import AUTO
from lmx.models.transformer import Model
from lmx.nn import dot_product, kernels
from lmx.recipes.planning import programs, roofline, search
from lmx.recipes.planning.programs import Case, Compiled, Memory, Work
from lmx.train.optimizers import OPTIMIZERS

NO_CUDNN = (
    "attention: jax finds no cuDNN on this machine to compile for, so 'reference' was compiled where such GPUs run "
    "'cudnn', which keeps and moves less: the memory is an upper bound, and the times hold for 'reference' alone"
)
LOW = (
    "effort: with low effort the compiler makes another program than a run's, which as a rule takes more memory and "
    "may move up to twice the bytes; plan what is chosen once more with full effort"
)


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Compile a training step for hardware that is not there, and tell its memory, collectives and time.

    The real step is compiled on this machine's CPU for a TPU slice or for GPUs. What the compiler says of memory and
    collectives is exact for that program; the time is a bound by arithmetic and was not measured.
    """

    model: str
    """The folder of a run, a model or checkpoints, or the name of a preset such as llama-8b."""
    topology: str = "v5e:16x16"
    """Chip and sizes: v4, v5e, v5p, v6e, tpu7x with their torus (v5p:4x4x4); a100, h100, h200 (h100:8, h100:2x8)."""
    batch_size: int | None = None
    """Rows a step, over all devices; one a device if not given."""
    length: int = 2048
    """Tokens a row; when decoding, positions of the cache."""
    mesh: str | None = None
    """How the devices are used, such as fsdp=64,tensor=4; all of them by fsdp if not given."""
    optimizer: str = "adamw"
    """adamw, adafactor or muon."""
    remat: str | None = None
    """What the backward pass computes again: none, dots or full; the model's own if not given."""
    accumulate: int = 1
    """Microbatches that a step's rows are computed in."""
    compute_dtype: str | None = None
    """Of activations and matrix products: float32 or bfloat16; the model's own if not given."""
    attention: str | None = None
    """The implementation of attention, such as reference; the model's own, or what suits the chip, if not given."""
    decode: bool = False
    """Plan greedy decoding, the prompt and one more token, instead of training."""
    search: bool = False
    """Try meshes and remat policies, compile the most promising ones and rank them."""
    tries: int = 4
    """How many of them to compile."""
    effort: str = "full"
    """The compiler's: full, as for a run, or low: another and larger program, on TPUs in less than half the time."""


def run(options: PlanOptions, console: Console | None = None) -> dict[str, Any]:
    """Plan, and return what `lmx plan --json` prints; progress goes to the console.

    A program that does not fit is a result ("fits": False) with its numbers and, where one was found and compiled, the
    case that does fit. Raises LmxErrors for a model, mesh or topology that cannot be, and for a missing compiler.
    """
    console = console or Console(stderr=True)
    _check(options)
    hardware = target(options.topology)
    work, model, fell_back = _work(options, hardware)
    case = Case(options.mesh or f"fsdp={len(hardware.devices)}", model.config.remat, options.accumulate)
    about = {
        "model": options.model, "topology": options.topology, "devices": len(hardware.devices),
        "chip": dataclasses.asdict(hardware.chip) | {"sources": dict(hardware.chip.sources)},
        "batch_size": work.batch_size, "length": work.length, "optimizer": work.optimizer,
        "parameters": cost.cost(model, work.length).parameters, "attention": model.config.attention,
        "compute_dtype": model.config.compute_dtype, "memory_is_upper_bound": fell_back,
        "effort": options.effort, "assumptions": _assumptions(options, fell_back),
    }  # fmt: skip
    if options.decode:
        return about | {"mode": "decode"} | _decode(work, case, hardware, console)
    if options.search:
        return about | {"mode": "search"} | _search(work, hardware, model, options.tries, console)
    row = _train(work, case, hardware, console)
    if row["fits"]:
        return about | {"mode": "train"} | row | {"advice": None}
    advice = _advice(work, case, hardware, model, options.tries, console)
    seconds = row["compile_cpu_seconds"] + sum(tried["compile_cpu_seconds"] for tried in advice["tried"])
    return about | {"mode": "train"} | row | {"advice": advice, "compile_cpu_seconds": seconds}


def _check(o: PlanOptions) -> None:
    for name in ("length", "accumulate", "tries") + (("batch_size",) if o.batch_size is not None else ()):
        if getattr(o, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(o, name)}")
    if o.length < 2:
        raise ConfigError(f"rows need a length of at least 2 tokens, not {o.length}")
    if o.optimizer not in OPTIMIZERS:
        there = ", ".join(OPTIMIZERS)
        raise ConfigError(f"no optimizer {o.optimizer!r}, there are {there}{nearest(o.optimizer, OPTIMIZERS)}")
    if o.effort not in programs.EFFORTS:
        hint = nearest(o.effort, programs.EFFORTS)
        raise ConfigError(f"effort must be full or low, not {o.effort!r}{hint}")
    if o.decode and o.search:
        raise ConfigError("the search is over ways to train; leave out --search or --decode")
    if o.search and (o.mesh is not None or o.remat is not None):
        raise ConfigError("the search chooses mesh and remat itself; leave out --mesh and --remat, or --search")


def _assumptions(o: PlanOptions, fell_back: bool) -> list[str]:
    return [*roofline.ASSUMPTIONS, *([NO_CUDNN] if fell_back else []), *([LOW] if o.effort == "low" else [])]


def _work(o: PlanOptions, hardware: Target) -> tuple[Work, Model, bool]:
    """(what to compile, the model's shapes without a mesh, whether attention fell back for want of a cuDNN here)."""
    given = {k: v for k in ("remat", "compute_dtype", "attention") if (v := getattr(o, k)) is not None}
    fell_back = False
    model = programs.source(o.model, given)()
    if model.config.compute_dtype == AUTO:  # all of this hardware computes in the dtype of the parameters then
        given["compute_dtype"] = model.config.dtype
        model = programs.source(o.model, given)()
    if model.config.attention == "auto":
        given["attention"], fell_back = ("reference", False) if o.decode else _attention(model, hardware, o.length)
        model = programs.source(o.model, given)()
    if model.max_length is not None and o.length > model.max_length:
        raise ConfigError(f"{o.length} tokens a row exceed the {model.max_length} learned positions of {o.model}")
    rows = o.batch_size or len(hardware.devices)
    if rows % o.accumulate:
        raise ConfigError(f"a batch_size of {rows} does not divide into {o.accumulate} microbatches (accumulate)")
    work = Work(programs.source(o.model, given), rows, o.length, None if o.decode else o.optimizer, o.effort)
    return work, model, fell_back


def _attention(model: Model, hardware: Target, length: int) -> tuple[str, bool]:
    """What "auto" stands for when training on that hardware, said beforehand: the roofline depends on it. And whether
    the hardware would choose another than can be compiled here."""
    c = model.config
    q = jax.ShapeDtypeStruct((1, length, c.num_heads, c.head_dim), c.compute_dtype)
    platform = {"cuda": "gpu"}.get(hardware.chip.platform, hardware.chip.platform)
    changed = c.attention_softcap is not None or c.position == "relative"
    chosen = dot_product.choose(q, changed=changed, windowed=c.window is not None, platform=platform)
    return chosen, platform == "gpu" and chosen != "cudnn" and kernels.cudnn_takes(q)


def _train(work: Work, case: Case, hardware: Target, console: Console) -> dict[str, Any]:
    with console.status(f"compiling the train step for {hardware.name}: {case}"):
        compiled = programs.compile_train(work, case, hardware)
    return _row(compiled, roofline.of_train(work, compiled, hardware), work.batch_size * work.length)


def _row(compiled: Compiled, line: roofline.Roofline, tokens: int) -> dict[str, Any]:
    """What a compiled case told, as JSON values; no time where the compiler gave up."""
    memory, found = compiled.memory, compiled.collectives
    return {
        "mesh": compiled.case.mesh, "remat": compiled.case.remat, "accumulate": compiled.case.accumulate,
        "fits": memory.fits, "memory": _memory(memory),
        "collectives": None if found is None else roofline.by_kind(found),
        "flops": {"model": line.model_flops, "executed": line.executed_flops},
        "roofline": None if found is None else {
            "compute": line.compute, "memory": line.memory, "interconnect": line.network, "bound": line.bound,
            "step": line.step, "without_overlap": line.serial, "mfu": line.mfu, "memory_bytes": line.memory_bytes,
            "interconnect_bytes": line.network_bytes, "tokens_per_second": tokens / line.step,
        },
        "compile_cpu_seconds": compiled.seconds,
    }  # fmt: skip


def _memory(memory: Memory) -> dict[str, int]:
    return dataclasses.asdict(memory) | {"peak": memory.peak, "spare": memory.available - memory.peak}


def _decode(work: Work, case: Case, hardware: Target, console: Console) -> dict[str, Any]:
    """The step's row, and the prefill's memory and collectives beside it; it fits if both do."""
    with console.status(f"compiling prefill and decode step for {hardware.name}: {case.mesh}"):
        prefill, step = programs.compile_decode(work, case, hardware)
    row = _row(step, roofline.of_decode(work, step, hardware), work.batch_size)
    found = prefill.collectives
    first = {
        "memory": _memory(prefill.memory), "fits": prefill.memory.fits,
        "collectives": None if found is None else roofline.by_kind(found),
        "compile_cpu_seconds": prefill.seconds,
    }  # fmt: skip
    fits = row["fits"] and first["fits"]
    return row | {"prefill": first, "fits": fits, "compile_cpu_seconds": prefill.seconds + step.seconds}


def _advice(work: Work, case: Case, hardware: Target, model: Model, tries: int, console: Console) -> dict[str, Any]:
    """What would fit, compiled; or how many devices it takes at the least."""
    tried = []
    for candidate in search.remedies(work, case, hardware, model):
        if len(tried) == tries:
            break
        tried.append(_train(work, candidate.case, hardware, console))
        if tried[-1]["fits"]:
            break
    least = search.least_devices(work, case, hardware)
    return {"tried": tried, "found": tried[-1] if tried and tried[-1]["fits"] else None, "least_devices": least}


def _search(work: Work, hardware: Target, model: Model, tries: int, console: Console) -> dict[str, Any]:
    """The best cases, compiled and ranked: those that fit by their time, then the others by what they lack."""
    with console.status("looking at meshes and remat policies"):
        able, excluded = search.candidates(work, hardware, model)
    if not able and not excluded:
        raise ConfigError(
            f"no mesh of {len(hardware.devices)} devices divides {work.batch_size} rows and the model's heads and "
            "widths; change batch_size"
        )
    rows, queue, taken = [], list(able), {}
    while queue and (len(rows) < tries or (len(rows) < 2 * tries and not any(row["fits"] for row in rows))):
        one = search.promising(queue, taken, hardware.chip.memory)
        queue.remove(one)
        rows.append(_train(work, one.case, hardware, console))
        exceeded = rows[-1]["memory"]["peak"] / one.memory
        taken[one.case.remat] = min(exceeded, taken.get(one.case.remat, exceeded))
    rows.sort(key=lambda row: (not row["fits"], row["roofline"]["step"] if row["fits"] else -row["memory"]["spare"]))
    seconds = sum(row["compile_cpu_seconds"] for row in rows)
    least = search.least_devices(work, Case(search.text({"fsdp": len(hardware.devices)}), "full"), hardware)
    return {
        "ranked": rows, "considered": len(able) + excluded, "excluded": excluded, "least_devices": least,
        "fits": bool(rows) and rows[0]["fits"], "compile_cpu_seconds": seconds,
    }  # fmt: skip


def need_no_device() -> None:
    """Keep the process of the command from looking for accelerators, and from keeping programs that cannot run here."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
