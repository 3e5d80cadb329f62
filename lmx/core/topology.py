"""Devices of hardware that is not there, to compile for: TPUs through libtpu, NVIDIA GPUs through jax's CUDA plugin.

Both compilers come as Python packages and need neither a driver nor an accelerator. libtpu reads the environment once,
when it is loaded; what it must find there is set for that moment only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lmx.core.chips import Chip, parse_topology
from lmx.core.errors import ConfigError
from lmx.core.sharding import make_mesh

# No question to the cloud's metadata server, no exclusive lock (nothing runs), no guessing what host this is.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware to compile for; `devices` can be in a mesh and a compiled program, and hold no array."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]

    def mesh(self, text: str) -> Mesh:
        """An Explicit mesh of these devices from a string such as `fsdp=8,tensor=2`. Raises ConfigError."""
        return make_mesh(text, devices=self.devices)

    def reach(self, mesh: Mesh, group: tuple[int, ...]) -> float:
        """Bytes a second, one direction, that a device of a mesh has for talking within a group of its devices.

        A torus gives the links of the dimensions that the group extends over; a node of GPUs its switch, and several
        nodes their network.
        """
        if len(group) < 2:
            return float("inf")
        chip, members = self.chip, [mesh.devices.flat[i] for i in group]
        if chip.platform == "cuda":
            return chip.links if len({d.process_index for d in members}) == 1 else chip.network
        where = np.array([d.coords for d in members])
        spanned = int((where.max(0) > where.min(0)).sum())
        return chip.links * max(1, spanned) / chip.dimensions


def target(text: str) -> Target:
    """The hardware that a topology such as `v5e:16x16` or `h100:8` names.

    Raises ConfigError for a name there is not, a shape the compiler does not know, or a missing compiler package,
    with the command that installs it.
    """
    chip, shape = parse_topology(text)
    devices = _gpus(chip, shape) if chip.platform == "cuda" else _tpus(chip, shape)
    return Target(text, chip, tuple(devices))


def missing(platform: str) -> str | None:
    """The command that installs the compiler of a platform ("tpu" or "cuda"), or None where it is installed."""
    package, extra = {"tpu": ("libtpu", "plan"), "cuda": ("jax_plugins.xla_cuda12", "plan-cuda")}[platform]
    with contextlib.suppress(ModuleNotFoundError):  # of jax_plugins, where there are none
        if importlib.util.find_spec(package) is not None:
            return None
    return f"pip install 'lmx[{extra}]' 'jax=={jax.__version__}'"


def _require(platform: str, what: str) -> None:
    command = missing(platform)
    if command is not None:
        raise ConfigError(f"planning for {what} needs its compiler, which is not installed; run: {command}")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that are not set already, set for a moment."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _tpus(chip: Chip, shape: tuple[int, ...]) -> list[Any]:
    _require("tpu", f"TPU {chip.name}")
    from jax.experimental import topologies

    name = f"{chip.name}:{'x'.join(map(str, shape))}"
    how: dict[str, Any] = {"chip_config_name": "megacore"} if chip.name == "v4" else {}  # as v4 pods are set up
    if np.prod(shape) == 1:
        how["chips_per_host_bounds"] = [1, 1, 1]
    try:
        with _environment(ENVIRONMENT):
            return topologies.get_topology_desc(name, platform="tpu", **how).devices
    except Exception as error:  # XlaRuntimeError has no public name in every jax
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"libtpu has no topology {name!r}: {said[:300]}; sizes are those of the cloud's slices, such as v5e:2x2, "
            "v5e:16x16 or v5p:4x4x4, and new chips need a new libtpu (a new jax)"
        ) from error


def _gpus(chip: Chip, shape: tuple[int, ...]) -> list[Any]:
    _require("cuda", f"NVIDIA {chip.name.upper()}")
    from jax.experimental import topologies

    nodes, each = shape
    return topologies.get_topology_desc(
        "", platform="cuda", target_config=_target_config(chip), topology=f"{nodes}x1x{each}"
    ).devices


def _target_config(chip: Chip) -> str:
    """XLA's GpuTargetConfigProto as text; what is the same in all of these chips stands here (see GUIDE)."""
    gpu = chip.gpu
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory_block}
  shared_memory_per_core: {gpu.shared_memory}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {int(chip.memory / 0.95)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.name}"
"""
