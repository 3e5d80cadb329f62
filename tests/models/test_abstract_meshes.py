"""The big presets on meshes nobody here has: their train step is lowered and read; a small one's collectives counted.

Lowering for 64 and 256 devices needs none of them. What the compiler makes of it is counted on 8 simulated devices, for
a tiny config, so that an accidental gather fails here.
"""

from __future__ import annotations

import collections
import re

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
