"""What accelerators can do: a table of published figures, each with its source, and the names of their topologies.

A `Chip` describes one device as jax sees it: a whole TPU chip, or half of a TPU7x, which has two devices. Peaks are
dense bfloat16. Interconnect figures count one direction, all links of the device together.
"""

from __future__ import annotations

import dataclasses
import re

from lmx.core.errors import ConfigError, nearest

GIB = 1 << 30
TPU_DOCS = "Google Cloud documentation, page"
COMPILER = "what libtpu (0.0.42, 0.0.50) reports as available HBM when a program for this chip needs more"
GUIDE = "NVIDIA CUDA C++ Programming Guide, table 'Technical Specifications per Compute Capability'"
DRIVER = "openxla/xla xla/backends/gpu/target_config/specs"
FRACTION = "a program may use 0.95 of it with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (jax's default is 0.75)"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's GPU compiler asks of a chip beyond its speed."""

    name: str  # as the driver says it
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # float32 units a core
    shared_memory: int  # bytes a core
    shared_memory_block: int  # bytes a block may ask for
    l2: int  # bytes
    clock: float  # GHz


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one device; `sources` says where each is published."""

    name: str
    platform: str  # "tpu" or "cuda"
    flops: float  # bfloat16 a second
    memory: int  # bytes that a program may use
    bandwidth: float  # bytes a second of that memory
    links: float  # bytes a second to other devices (of the node, for GPUs), one direction, all links together
    dimensions: int = 0  # of the torus whose links those are; 0 for a switch
    network: float = 0.0  # bytes a second and device between nodes of GPUs, one direction
    node: int = 0  # devices a node, where there are nodes
    gpu: Gpu | None = None
    sources: tuple[tuple[str, str], ...] = ()  # (figure, document)


_REPORTED = f"total memory that the driver reports, {DRIVER}"


def _tpu(name: str, flops: float, memory: float, bandwidth: float, links: float, dimensions: int, **more: str) -> Chip:
    page = f"{TPU_DOCS} '{more.pop('page')}'"
    figures = ("flops", "bandwidth", "links", "dimensions")
    sources = {figure: page for figure in figures} | {"memory": COMPILER} | more
    return Chip(name, "tpu", flops, int(memory * GIB), bandwidth, links, dimensions, sources=tuple(sources.items()))


def _cuda(name: str, sheet: str, system: str, paper: str, *figures: float, gpu: Gpu, total: str = _REPORTED) -> Chip:
    flops, memory, bandwidth, links, network = figures
    sources = {
        "flops": sheet, "bandwidth": sheet, "links": f"{sheet} (NVLink, half of the figure for both directions)",
        "memory": f"{total}; {FRACTION}", "network": system, "node": system,
        "gpu": f"{GUIDE}; SM count and L2: '{paper} Tensor Core GPU Architecture'; clock: as the driver says, {DRIVER}",
    }  # fmt: skip
    usable = int(memory * 0.95)
    return Chip(name, "cuda", flops, usable, bandwidth, links, 0, network, 8, gpu, tuple(sources.items()))


_HALF = "half of the chip's figure: a chip is two devices"
_A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 166912, 40 << 20, 1.41)
_H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 232448, 50 << 20, 1.98)
_H200 = dataclasses.replace(_H100, name="NVIDIA H200")
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275e12, 30.75, 1200e9, 300e9, 3, page="TPU v4"),
        _tpu("v5e", 197e12, 15.75, 819e9, 200e9, 2, page="TPU v5e"),
        _tpu("v5p", 459e12, 95.73, 2765e9, 600e9, 3, page="TPU v5p"),
        _tpu("v6e", 918e12, 31.24, 1638e9, 400e9, 2, page="TPU v6e"),
        _tpu("tpu7x", 2307e12 / 2, 94.74, 7380e9 / 2, 600e9 / 2, 3, page="TPU7x (Ironwood)", note=_HALF),
        _cuda(
            "a100", "NVIDIA A100 Tensor Core GPU Datasheet (80GB SXM)", "NVIDIA DGX A100 User Guide (200 Gb/s a GPU)",
            "NVIDIA A100", 312e12, 85100068864, 2039e9, 300e9, 25e9, gpu=_A100,
        ),
        _cuda(
            "h100", "NVIDIA H100 Tensor Core GPU Datasheet (SXM, without sparsity)",
            "NVIDIA DGX H100/H200 User Guide (400 Gb/s a GPU)", "NVIDIA H100",
            989.4e12, 84942979072, 3350e9, 450e9, 50e9, gpu=_H100,
        ),
        _cuda(
            "h200", "NVIDIA H200 Tensor Core GPU Datasheet (SXM, without sparsity)",
            "NVIDIA DGX H100/H200 User Guide (400 Gb/s a GPU)", "NVIDIA H100",  # whose chip it has
            989.4e12, 143771 << 20, 4800e9, 450e9, 50e9, gpu=_H200,
            total="total memory that nvidia-smi shows for an H200 SXM, 143771 MiB",
        ),
    )
}  # fmt: skip


def parse_topology(text: str) -> tuple[Chip, tuple[int, ...]]:
    """(the chip, the sizes) of a topology such as `v5e:16x16` (a torus), `h100:8` (a node), `h100:4x8` (nodes).

    Raises ConfigError for a chip there is no entry for, or sizes that such a machine cannot have.
    """
    name, _, sizes = text.strip().lower().partition(":")
    if name not in CHIPS:
        raise ConfigError(f"topology {text!r}: no chip {name!r}, there are {', '.join(CHIPS)}{nearest(name, CHIPS)}")
    chip = CHIPS[name]
    wanted = (
        "nodes and GPUs, such as 8 or 4x8"
        if chip.platform == "cuda"
        else "a torus, such as " + "x".join(["4"] * max(chip.dimensions, 2))
    )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise ConfigError(f"topology {text!r} needs sizes after the colon: {wanted}")
    shape = tuple(map(int, sizes.split("x")))
    if chip.platform == "cuda":
        if len(shape) > 2 or shape[-1] > chip.node:
            raise ConfigError(f"topology {text!r}: {chip.name} comes in nodes of up to {chip.node}; give {wanted}")
        return chip, ((1, *shape) if len(shape) == 1 else shape)
    if len(shape) != chip.dimensions:
        raise ConfigError(f"topology {text!r}: {chip.name} is a {chip.dimensions}-dimensional torus; give {wanted}")
    return chip, shape
