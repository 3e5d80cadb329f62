"""The big presets on meshes nobody here has: their train step is lowered and read, compiled, and what it moves counted.

Lowering for 64 and 256 devices needs none of them. What the compiler makes of it is counted for a tiny config on 8
simulated devices, so that an accidental gather fails here, and for the 7B and 70B presets on 64 and 256 of them, which
hold nothing, with the loss in chunks as on accelerators. That compiler is the CPU's: it moves bfloat16 as float32, and
does not turn the sums of which a device needs a part into reduce-scatters as those of TPUs and GPUs do.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from lmx import losses
from lmx.core import hlo, sharding, specs
from lmx.models import transformer
from lmx.models.config import Config
from lmx.models.presets import preset
from lmx.train import abstract_start, adamw, make_train_step

ROWS, LENGTH = 256, 1024
BIG = [
    ("llama-7b", dict(fsdp=64)),
    ("llama-7b", dict(fsdp=32, tensor=8)),
    ("llama-8b", dict(fsdp=256)),
    ("llama-70b", dict(fsdp=8, tensor=8)),
    ("llama-70b", dict(data=2, fsdp=16, tensor=8)),
]


def lower(config: Config, mesh, rows: int, length: int):
    """(the lowered train step, its state); the mesh is in force."""
    model = transformer.Model(config, specs.shapes(transformer.abstract(config)))
    optimizer = adamw(1e-3)
    key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=sharding.named_sharding((), (), mesh))
    state = abstract_start(model, optimizer, key=key)
    shape = (rows, length)
    place = sharding.named_sharding(("batch", "sequence"), shape, mesh)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, "int32", sharding=place)}
    step = make_train_step(losses.cross_entropy, optimizer)
    return jax.jit(step, donate_argnums=0).trace(state, batch), state


def spelled(spec, shape) -> str:
    """A PartitionSpec as the lowered program writes it: `[{}, {"data", "fsdp"}]`."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    names = [(e,) if isinstance(e, str) else e or () for e in entries]
    return "[" + ", ".join("{" + ", ".join(f'"{a}"' for a in entry) + "}" for entry in names) + "]"


def tensor(shape, dtype) -> str:
    kinds = {"bfloat16": "bf16", "float32": "f32", "int32": "i32"}
    return "x".join([*map(str, shape), kinds[jax.numpy.dtype(dtype).name]])


@pytest.fixture(scope="module", params=BIG, ids=lambda p: f"{p[0]}-{'-'.join(f'{k}{v}' for k, v in p[1].items())}")
def big(request):
    """(config, sizes of the mesh, lowered text, state)."""
    name, sizes = request.param
    shape = tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES)
    mesh = AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Explicit,) * len(shape))
    config = preset(name, attention="reference")
    with sharding.use_mesh(mesh):
        traced, state = lower(config, mesh, ROWS, LENGTH)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    return config, sizes, text, state


def test_parameters_optimizer_and_batch_enter_as_the_rules_say(big):
    """Every argument of the program has the sharding that `Rules` gives its logical axes; both moments as their
    parameter."""
    config, sizes, text, state = big
    arguments = re.search(r"func\.func public @main\((.*?)\) -> \(", text, re.S).group(1)
    found = collections.Counter(re.findall(r"tensor<(\S+?)> \{[^%]*?#sdy\.sharding<@mesh, (\[.*?\])>", arguments))
    rules, wanted = sharding.Rules(), collections.Counter()
    for spec in jax.tree.leaves(transformer.abstract(config)):
        wish = [getattr(rules, axis) if axis else () for axis in spec.axes]
        entries = [tuple(a for a in wanted_axes if sizes.get(a, 1) > 1) for wanted_axes in wish]
        wanted[tensor(spec.shape, spec.dtype), spelled(entries, spec.shape)] += 3  # the parameter and two moments
    rows = [tuple(a for a in rules.batch if sizes.get(a, 1) > 1), ()]
    wanted[tensor((ROWS, LENGTH), "int32"), spelled(rows, (ROWS, LENGTH))] += 1
    wanted["2xui32", "[{}]"] += 1  # the random key
    assert {key: count for key, count in found.items() if "x" in key[0]} == dict(wanted)  # but for counters


def test_activations_are_split_by_rows_heads_and_width(big):
    """Nothing with all rows of the batch is whole on a device, whatever else it is; heads and the feed-forward width
    are split where there is a tensor axis."""
    config, sizes, text, _ = big
    c = config
    rows = "{" + ", ".join(f'"{a}"' for a in ("data", "fsdp") if sizes.get(a, 1) > 1) + "}"
    split = '{"tensor"}' if "tensor" in sizes else "{}"
    laid = collections.defaultdict(set)
    for where, kind in re.findall(r"sdy\.sharding_constraint %\S+ <@mesh, (\[.*?\])> : tensor<(\S+?)>", text):
        laid[kind].add(where)
    assert laid[f"{ROWS}x{LENGTH}x{c.hidden_size}xbf16"] == {f"[{rows}, {{}}, {{}}]"}
    assert laid[f"{ROWS}x{LENGTH}x{c.intermediate_size}xbf16"] == {f"[{rows}, {{}}, {split}]"}
    assert laid[f"{ROWS}x{LENGTH}x{c.num_heads}x{c.head_dim}xbf16"] == {f"[{rows}, {{}}, {split}, {{}}]"}
    saved = f"{c.num_layers}x{ROWS}x{LENGTH}x{c.hidden_size}xbf16"  # what the scan keeps for the backward pass
    assert laid[saved] == {f"[{{}}, {rows}, {{}}, {{}}]"}
    whole = [k for k, places in laid.items() if k.startswith(f"{ROWS}x") and any(w.startswith("[{},") for w in places)]
    assert whole == []


TINY = Config(
    vocab_size=512, num_layers=3, hidden_size=64, num_heads=8, intermediate_size=192, tie_embeddings=False,
    attention="reference",
)  # fmt: skip
D, F, V, B, T, FLOAT = 64, 192, 512, 8, 16, 4
ATTENTION, MLP, NORMS = D * D * FLOAT, D * F * FLOAT, 2 * D * FLOAT  # bytes of a layer's matrices, and both norms
TABLE, STREAM = V * D * FLOAT, B * T * D * FLOAT  # embedding or head; activations between layers


@pytest.fixture(scope="module")
def collectives_of():
    """`collectives_of("fsdp=8")`: the collectives of the compiled step; those of layers run three times a step."""
    made = {}

    def count(text: str) -> list[hlo.Collective]:
        if text not in made:
            mesh = sharding.make_mesh(text)
            with sharding.use_mesh(mesh):
                traced, _ = lower(TINY, mesh, B, T)
                made[text] = hlo.collectives(traced.lower().compile().as_text())
        assert all(one.counted for one in made[text])
        return made[text]

    return count


def total(found, kind: str, times: int) -> int:
    """Bytes of a kind of collective that runs so many times a step, a time."""
    return sum(one.bytes for one in found if one.kind == kind and one.count == times)


def test_fsdp_gathers_each_weight_twice_and_reduces_each_gradient_once(collectives_of):
    """Once forward and once for the backward pass, which recomputes; gradients of a layer are reduced together. The
    embedding's table and the head are gathered once, and reduced once each."""
    found = collectives_of("fsdp=8")
    gathered = collections.Counter(one.bytes for one in found if one.kind == "all-gather" and one.count == 3)
    assert gathered == {ATTENTION: 2 * 4, MLP: 2 * 3}
    assert [one.bytes for one in found if one.kind == "all-gather" and one.count == 1] == [TABLE, TABLE]
    assert total(found, "all-reduce", 3) == 4 * ATTENTION + 3 * MLP + NORMS
    assert 0 <= total(found, "all-reduce", 1) - 2 * TABLE - NORMS // 2 < 200  # and a few scalars: loss, norms
    assert {one.kind for one in found} == {"all-gather", "all-reduce"}


def test_tensor_parallelism_reduces_activations_and_moves_no_weight(collectives_of):
    """A layer: two sums forward (after attention and after the feed-forward layer), the first again when recomputing,
    and in the backward pass one for each matrix that read the stream (query, key, value; gate, up)."""
    found = collectives_of("tensor=8")
    assert {one.kind for one in found} == {"all-reduce"}
    assert total(found, "all-reduce", 3) == (2 + 1 + 5) * STREAM
    assert max(one.bytes for one in found if one.count == 1) < 2 * STREAM  # embedding, head: no table moves


def test_data_parallelism_reduces_gradients_and_nothing_else(collectives_of):
    found = collectives_of("data=8")
    assert {one.kind for one in found} == {"all-reduce"}
    assert total(found, "all-reduce", 3) == 4 * ATTENTION + 3 * MLP + NORMS
    assert 0 <= total(found, "all-reduce", 1) - 2 * TABLE - NORMS // 2 < 200


def test_fsdp_with_tensor_gathers_a_part_of_each_weight(collectives_of):
    found = collectives_of("fsdp=2,tensor=4")
    gathered = collections.Counter(one.bytes for one in found if one.kind == "all-gather" and one.count == 3)
    assert gathered == {ATTENTION // 4: 2 * 4, MLP // 4: 2 * 3}
    by_axis = collections.Counter()
    for one in found:
        if one.kind == "all-reduce" and one.count == 3:
            by_axis[len(one.group)] += one.bytes
    assert by_axis == {4: (2 + 1 + 5) * STREAM // 2, 2: (4 * ATTENTION + 3 * MLP) // 4 + NORMS}


COMPILE = """
import dataclasses, importlib.util, json, sys
import jax
jax.config.update("jax_disable_most_optimizations", True)
spec = importlib.util.spec_from_file_location("meshes", sys.argv[1])
meshes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(meshes)
from lmx.core import hlo, sharding
from lmx.losses import chunks
chunks.ON_CPU = chunks.CHUNK_LOGITS
name, text, devices = sys.argv[2], sys.argv[3], int(sys.argv[4])
mesh = sharding.make_mesh(text, devices=jax.devices()[:devices])
with sharding.use_mesh(mesh):
    traced, _ = meshes.lower(meshes.preset(name, attention="reference"), mesh, meshes.ROWS, meshes.LENGTH)
    found = hlo.collectives(traced.lower().compile().as_text())
print(json.dumps([dataclasses.asdict(one) for one in found]))
"""


@pytest.fixture(scope="module")
def big_collectives():
    """`big_collectives(preset, mesh, devices)`: as `collectives_of`, from a process of so many simulated devices."""

    def count(name: str, text: str, devices: int) -> list[hlo.Collective]:
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, __file__, name, text, str(devices)], capture_output=True, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return [hlo.Collective(**one | {"group": tuple(one["group"])}) for one in json.loads(done.stdout)]

    return count


def sums(found, times: int, group: int) -> int:
    """Bytes that are summed over groups of that many devices, so many times a step."""
    return sum(o.bytes for o in found if o.kind == "all-reduce" and o.count == times and len(o.group) == group)


@pytest.mark.slow
def test_7b_on_64_devices_moves_each_weight_twice_and_each_gradient_once(big_collectives):
    """4096 wide, 32 layers of four square and three 11008-wide matrices, 32000 words, in closed form."""
    found = big_collectives("llama-7b", "fsdp=64", 64)
    d, f, v, layers = 4096, 11008, 32000, 32
    gathered = collections.Counter((one.count, one.bytes) for one in found if one.kind == "all-gather")
    assert gathered == {(layers, 4 * d * d): 2 * 4, (layers, 4 * d * f): 2 * 3, (1, 4 * v * d): 2}
    assert sums(found, layers, 64) == 4 * (4 * d * d + 3 * d * f + 2 * d)  # a layer's gradients, norms among them
    # the embedding, the head (which the loss goes through in chunks), the last norm and a few scalars
    assert 0 <= sums(found, 1, 64) - 4 * (2 * v * d + d) < 200
    assert {one.kind for one in found} == {"all-gather", "all-reduce"} and all(one.counted for one in found)


@pytest.mark.slow
def test_70b_on_256_devices_gathers_eighths_and_sums_activations_over_tensor(big_collectives):
    """8192 wide, 80 layers of 64 query and 8 key-value heads, 28672 wide within, 128256 words: fsdp=32 x tensor=8."""
    found = big_collectives("llama-70b", "fsdp=32,tensor=8", 256)
    d, f, v, kv, layers, tensor = 8192, 28672, 128256, 8 * 128, 80, 8
    gathered = collections.Counter((one.count, one.bytes) for one in found if one.kind == "all-gather")
    assert gathered == {
        (layers, 4 * d * d // tensor): 2 * 2, (layers, 4 * d * kv // tensor): 2 * 2,
        (layers, 4 * d * f // tensor): 2 * 3, (1, 4 * v * d // tensor): 2,
    }  # fmt: skip
    assert sums(found, layers, 32) == 4 * ((2 * d * d + 2 * d * kv + 3 * d * f) // tensor + 2 * d)
    stream = 4 * ROWS // 32 * LENGTH * d
    assert sums(found, layers, tensor) == (2 + 1 + 5) * stream  # as of the tiny one: two forward, one again, five back
    assert 0 <= sums(found, 1, 32) - 4 * (2 * v * d // tensor + d) < 200
    assert {one.kind for one in found} == {"all-gather", "all-reduce"} and all(one.counted for one in found)
