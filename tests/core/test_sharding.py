"""Mesh strings, rules, and `place` on every kind of mesh."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from lmx.core import sharding, topology
from lmx.core.errors import ConfigError
from lmx.core.sharding import Rules, make_mesh, partition_spec, place, use_mesh


def abstract(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("fsdp=8", (1, 8, 1, 1)),
        ("fsdp=4,tensor=2", (1, 4, 2, 1)),
        (" tensor = 2 , data=2, fsdp=2 ", (2, 2, 2, 1)),
        ("expert=2,fsdp=-1", (1, 4, 1, 2)),
    ],
)
@pytest.mark.parametrize("explicit", [True, False])
def test_mesh_strings(text, sizes, explicit):
    mesh = make_mesh(text, explicit=explicit)
    assert mesh.axis_names == ("data", "fsdp", "tensor", "expert") and tuple(mesh.shape.values()) == sizes
    assert set(mesh.axis_types) == {AxisType.Explicit if explicit else AxisType.Auto}


def test_a_mesh_of_some_devices():
    assert make_mesh("fsdp=2", devices=jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdsp=8", "no axis 'fdsp', the axes are data, fsdp, tensor, expert; did you mean 'fsdp'"),
        ("fsdp=4", "describes 4 devices, but there are 8 .*must multiply to 8, e.g. fsdp=8"),
        ("", "describes 1 devices, but there are 8"),
        ("fsdp=3,tensor=-1", "an unknown number of devices, but there are 8"),
        ("fsdp=-1,tensor=-1", "an unknown number of"),
        ("fsdp=0", "axis fsdp needs a size such as fsdp=4"),
        ("fsdp=two", "axis fsdp needs a size such as fsdp=4"),
        ("fsdp", "axis fsdp needs a size such as fsdp=4"),
        ("fsdp=8,fsdp=8", "gives axis fsdp twice"),
    ],
)
def test_wrong_mesh_strings(text, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(text)


@pytest.mark.skipif(topology.missing("tpu") is not None, reason=f"libtpu: {topology.missing('tpu')}")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v5p:2x2x4", "fsdp=8,tensor=2"),
        ("v5p:2x2x4", "data=2,fsdp=2,tensor=4"),  # 2 x 2 are tensor's: the axis of 4 is split
        ("v5p:4x4x4", "fsdp=32,tensor=2"),
        ("v6e:16x16", "fsdp=64,tensor=4"),
    ],
)
def test_a_torus_is_split_as_the_mesh_wants_on_every_tpu(name, text):
    """Every device stands in the mesh once, and those along tensor, which talk most, are neighbours in the torus."""
    hardware = topology.target(name)
    mesh = hardware.mesh(text)
    assert {d.id for d in mesh.devices.flat} == {d.id for d in hardware.devices} and mesh.size == len(hardware.devices)
    along = np.moveaxis(mesh.devices, mesh.axis_names.index("tensor"), -1).reshape(-1, mesh.shape["tensor"])
    where = np.array([[d.coords for d in group] for group in along])  # (groups, members, 3)
    extent = (where.max(1) - where.min(1) + 1).prod(-1)
    assert (extent == mesh.shape["tensor"]).all()  # a group fills a box


@pytest.mark.skipif(topology.missing("tpu") is not None, reason=f"libtpu: {topology.missing('tpu')}")
def test_devices_of_a_torus_with_a_hole():
    devices = topology.target("v5p:2x2x4").devices
    with pytest.raises(ConfigError, match="mesh 'fsdp=15' cannot be laid out on these 15 devices"):
        make_mesh("fsdp=15", devices=devices[1:])


def test_partition_spec():
    mesh = abstract(data=2, fsdp=4, tensor=2, expert=1)
    assert partition_spec(("batch", "sequence", None), (16, 5, 7), mesh) == P(("data", "fsdp"), None, None)
    assert partition_spec(("layers", "embed", "heads", "head_dim"), (3, 8, 2, 4), mesh) == P(
        None, "fsdp", "tensor", None
    )
    assert partition_spec(("embed",), (8,), mesh, Rules(embed=("tensor",))) == P("tensor")
    assert partition_spec(("embed",), (8,), abstract(fsdp=4)) == P("fsdp")  # a mesh that lacks the other axes


def test_two_axes_of_an_array_cannot_use_one_mesh_axis():
    with pytest.raises(ConfigError, match="mesh axis 'tensor' to both 'vocab' and 'embed'"):
        partition_spec(("vocab", "embed"), (8, 8), abstract(tensor=2), Rules(embed=("tensor",)))


def test_an_axis_without_a_rule():
    with pytest.raises(ConfigError, match="no rule for the logical axis 'head'; did you mean 'heads'"):
        partition_spec(("head",), (8,), abstract(tensor=2))


def test_what_does_not_divide_is_kept_whole_and_reported_once(caplog):
    mesh = abstract(data=2, fsdp=4)
    with caplog.at_level(logging.WARNING, logger="lmx"):
        assert partition_spec(("batch",), (6,), mesh) == P("data")  # the leading axes that divide
        assert partition_spec(("embed",), (1021,), mesh) == P(None)
        assert partition_spec(("embed",), (1021,), mesh) == P(None)
    messages = [record.getMessage() for record in caplog.records if "1021" in record.getMessage()]
    assert messages == ["axis 'embed' of size 1021 does not divide by fsdp=4: kept whole on every device"]


def test_place_without_a_mesh_is_the_identity():
    x = jnp.ones((8, 4))
    assert place(x, "batch", None) is x and sharding.mesh_kind() is None
    assert sharding.out_sharding(x.shape, "batch", None) is None


def test_place_on_a_mesh(mesh):
    x = jax.device_put(np.arange(32.0).reshape(8, 4), jax.NamedSharding(mesh, P(None, None)))
    y = jax.jit(lambda x: place(x, "batch", None) * 2)(x)
    wanted = sharding.named_sharding(("batch", None), (8, 4), mesh)
    assert y.sharding.is_equivalent_to(wanted, 2) and y.addressable_shards[0].data.shape != y.shape
    np.testing.assert_array_equal(np.asarray(y), np.arange(32.0).reshape(8, 4) * 2)
    explicit = sharding.mesh_kind() is AxisType.Explicit
    assert sharding.out_sharding((8, 4), "batch", None) == (wanted.spec if explicit else None)


def test_place_inside_shard_map_is_the_identity(mesh):
    kinds = []

    def each(x):
        kinds.append(sharding.mesh_kind())
        return place(x, "batch", "embed")

    spec = P(("data", "fsdp", "tensor"), None)
    x = jax.device_put(np.arange(32.0).reshape(8, 4), jax.NamedSharding(mesh, spec))
    y = jax.jit(jax.shard_map(each, in_specs=spec, out_specs=spec))(x)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(x))
    assert set(kinds) == {AxisType.Manual}


def test_rules_are_part_of_the_jit_key():
    traces = []

    @jax.jit
    def f(x):
        traces.append(1)
        return place(x, "embed")

    with use_mesh("fsdp=8"):
        x = jnp.zeros(8)
        assert f(x).sharding.spec == P("fsdp")
        with use_mesh("fsdp=8", Rules(embed=())):
            assert f(x).sharding.spec == P(None)
            assert sharding.current_rules() == Rules(embed=())
        assert f(x).sharding.spec == P("fsdp")
    assert len(traces) == 2 and sharding.current_rules() == Rules()


def test_use_mesh_none_means_no_mesh():
    with use_mesh("fsdp=8"):
        assert sharding.mesh_kind() is AxisType.Explicit and sharding.concrete_mesh().size == 8
        with use_mesh(None):
            assert sharding.mesh_kind() is None and sharding.concrete_mesh() is None
    with use_mesh(make_mesh("fsdp=1", devices=jax.devices()[:1])):
        assert sharding.mesh_kind() is None  # one device: nothing to split
