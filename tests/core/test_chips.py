"""The chip table: every figure has a source, names of topologies are read or refused; real compilers know the chips."""

from __future__ import annotations

import math
import os

import pytest

from lmx.core import chips, sharding, topology
from lmx.core.errors import ConfigError

TPU = pytest.mark.skipif(topology.missing("tpu") is not None, reason=f"libtpu: {topology.missing('tpu')}")
CUDA = pytest.mark.skipif(topology.missing("cuda") is not None, reason=f"CUDA plugin: {topology.missing('cuda')}")


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_every_figure_has_a_source(chip):
    named = {figure for figure, document in chip.sources if len(document) > 10}
    figures = {"flops", "memory", "bandwidth", "links"}
    figures |= {"dimensions"} if chip.platform == "tpu" else {"network", "node", "gpu"}
    assert figures <= named
    assert 1e14 < chip.flops < 1e16 and 8 << 30 < chip.memory < 1 << 38 and chip.links < chip.bandwidth


def test_topologies_are_read():
    assert chips.parse_topology("v5e:16x16") == (chips.CHIPS["v5e"], (16, 16))
    assert chips.parse_topology(" H100:8") == (chips.CHIPS["h100"], (1, 8))
    assert chips.parse_topology("h200:4x8")[1] == (4, 8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5:2x2", "did you mean"), ("v5e", "such as 4x4"), ("v5e:2x2x2", "2-dimensional"), ("v5p:2x2", "4x4x4"),
        ("h100:16", "nodes of up to 8"), ("v5e:0x2", "needs sizes"), ("a100:two", "needs sizes"),
    ],
)  # fmt: skip
def test_what_no_machine_has_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        chips.parse_topology(text)


def test_a_missing_compiler_is_told_with_the_command(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)  # it may be installed here
    with pytest.raises(ConfigError, match=r"pip install 'lmx\[plan\]' 'jax=="):
        topology.target("v5e:2x2")
    with pytest.raises(ConfigError, match=r"pip install 'lmx\[plan-cuda\]' 'jax=="):
        topology.target("h100:8")


@TPU
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5e:4x4", "v5p:2x2x4", "v6e:2x4"])
def test_libtpu_knows_the_chips(name):
    """As many devices as chips, and nothing of what loading needs is left in the environment."""
    before = dict(os.environ)
    hardware = topology.target(name)
    assert len(hardware.devices) == math.prod(chips.parse_topology(name)[1])
    assert dict(os.environ) == before


@TPU
def test_a_torus_gives_the_links_of_the_dimensions_a_group_extends_over():
    hardware = topology.target("v5e:4x4")
    mesh = hardware.mesh("fsdp=4,tensor=4")
    links = hardware.chip.links
    assert hardware.reach(mesh, (0,)) == float("inf")
    assert hardware.reach(mesh, (0, 1, 2, 3)) == links / 2  # tensor: one dimension
    assert hardware.reach(mesh, (0, 4, 8, 12)) == links / 2
    assert hardware.reach(mesh, tuple(range(16))) == links


@TPU
def test_a_shape_that_libtpu_does_not_know():
    with pytest.raises(ConfigError, match="libtpu has no topology 'v5e:3x3'"):
        topology.target("v5e:3x3")


@CUDA
def test_nodes_of_gpus_talk_over_their_network():
    hardware = topology.target("h100:2x4")
    mesh = hardware.mesh("data=2,fsdp=4")
    assert len(hardware.devices) == 8
    assert hardware.reach(mesh, (0, 1, 2, 3)) == hardware.chip.links
    assert hardware.reach(mesh, (0, 4)) == hardware.chip.network
    with pytest.raises(ConfigError, match="describes 2 devices"), sharding.use_mesh(hardware.mesh("fsdp=2")):
        pass


def test_what_a_gpu_is_to_its_compiler_names_the_makers_papers():
    """And the memory of an H200 is what nvidia-smi shows, of which a program has 0.95."""
    for name, paper in [("a100", "NVIDIA A100"), ("h100", "NVIDIA H100"), ("h200", "NVIDIA H100")]:
        assert f"{paper} Tensor Core GPU Architecture" in dict(chips.CHIPS[name].sources)["gpu"]
    h200 = chips.CHIPS["h200"]
    assert h200.memory == int(143771 * 2**20 * 0.95) and "nvidia-smi" in dict(h200.sources)["memory"]
