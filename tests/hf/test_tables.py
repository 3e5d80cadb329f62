"""The table language: every layout takes a tensor apart and puts it together."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lmx.core.errors import ConfigError
from lmx.core.nodes import node
from lmx.core.specs import ParamSpec
from lmx.core.tree import Layers
from lmx.hf import tables
from lmx.hf.tables import bind, conv1d, copy, embedding, ignored, linear, norm, tensor, within

WIDTH, HEADS, HEAD = 6, 2, 3


@node
class Part:
    query: object = None
    key: object = None
    value: object = None
    query_bias: object = None
    key_bias: object = None
    value_bias: object = None
    scale: object = None


@node
class Whole:
    layers: Layers
    table: object = None


def spec(*shape: int, inputs: int | None = None) -> ParamSpec:
    return ParamSpec(shape, (None,) * len(shape), inputs=inputs)


def layer(**leaves: ParamSpec) -> tuple:
    return (Part(**{name: s.stacked(2) for name, s in leaves.items()}),)


QKV = {
    "query": spec(WIDTH, HEADS, HEAD, inputs=1), "key": spec(WIDTH, HEADS, HEAD, inputs=1),
    "value": spec(WIDTH, HEADS, HEAD, inputs=1), "query_bias": spec(HEADS, HEAD), "key_bias": spec(HEADS, HEAD),
    "value_bias": spec(HEADS, HEAD),
}  # fmt: skip
NAMES = ("layers/query", "layers/key", "layers/value")
TREE = Whole(Layers.of([layer(**QKV), layer(**QKV)]), spec(5, WIDTH, inputs=1))
X = np.random.default_rng(0).normal(size=WIDTH)


def views(bound: tables.Bound, name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """A tensor of random numbers and its leaves, which share its memory."""
    array = np.random.default_rng(1).normal(size=bound.tensors[name].shape)
    parts = [part.view(array) for part in bound.tensors[name].parts]
    assert all(np.shares_memory(array, part) for part in parts), "writing into a copy would be lost"
    return array, parts


@pytest.mark.parametrize("kind", ["linear", "conv1d", "per head"])
def test_fused_projections(kind):
    table = linear("h.{i}.qkv", *NAMES, per_head=kind == "per head")
    if kind == "conv1d":
        table = conv1d("h.{i}.qkv", *NAMES)
    bound = bind((table, embedding("wte", "table")), TREE)
    assert set(bound.tensors) == {f"h.{i}.qkv.{part}" for i in range(4) for part in ("weight", "bias")} | {"wte.weight"}
    weight, (q, k, v) = views(bound, "h.2.qkv.weight")
    bias, (b, *_) = views(bound, "h.2.qkv.bias")
    product = (X @ weight if kind == "conv1d" else weight @ X) + bias  # as torch computes it
    split = product.reshape(HEADS, 3, HEAD)[:, 0] if kind == "per head" else product.reshape(3, HEADS, HEAD)[0]
    np.testing.assert_allclose(np.einsum("d,dhc->hc", X, q) + b, split)
    assert q.shape == k.shape == v.shape == (WIDTH, HEADS, HEAD)


def test_parts_of_unequal_sizes_fill_the_tensor_once():
    sizes = QKV | {"key": spec(WIDTH, 1, HEAD, inputs=1), "value": spec(WIDTH, 1, HEAD, inputs=1)}
    sizes = {name: s for name, s in sizes.items() if "bias" not in name}
    bound = bind(linear("qkv.{i}", *NAMES), Whole(Layers.of([layer(**sizes)])))
    assert bound.tensors["qkv.0.weight"].shape == (HEADS * HEAD + 2 * HEAD, WIDTH) and len(bound.tensors) == 2
    array, parts = views(bound, "qkv.0.weight")
    array[...] = 0
    for part in parts:
        part[...] += 1
    assert (array == 1).all()


def test_many_inputs_are_flattened_too():
    out = spec(HEADS, HEAD, WIDTH, inputs=2)
    bound = bind(linear("o", "table"), Whole(Layers.of([]), out))
    array, (part,) = views(bound, "o.weight")
    y = np.random.default_rng(2).normal(size=(HEADS, HEAD))
    np.testing.assert_allclose(np.einsum("hc,hcd->d", y, part), array @ y.reshape(-1))


def test_vectors_rows_and_single_layers():
    tower = Whole(Layers.of([layer(scale=spec(4))]))
    table = (
        within("x.", "query/layers", norm("n.0", "[0]"), tensor("first", "[1]/scale")),
        tensor("x.bias", "value", "row"),
        tensor("t", "key"),
    )
    bound = bind(table, Part(query=tower, key=spec(3), value=spec(3)))
    assert {name: t.shape for name, t in bound.tensors.items()} == {
        "x.n.0.weight": (4,), "x.first": (4,), "x.bias": (1, 3), "t": (3,),
    }  # fmt: skip


def test_copies_count_only_where_nothing_else_has_the_name():
    bare = Whole(Layers.of([]), spec(5, WIDTH, inputs=1))
    table = (embedding("wte", "table"), copy("head.weight", "wte.weight"), linear("head", "layers/query"))
    assert bind(table, bare).copies == {"head.weight": "wte.weight"}
    assert bind((embedding("wte", "table"), copy("wte.weight", "wte.weight")), bare).copies == {}


def test_prefixes_reach_copies_and_patterns():
    entries = list(tables.flatten(within("h.{i}.", "", copy("a", "b"), ignored(r"mask\d"))))
    assert entries[0] == tables.Copy("h.{i}.a", "h.{i}.b")
    assert re.fullmatch(entries[1].pattern, "h.12.mask3")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ((embedding("wte", "table"),), "no tensor for layers"),
        ((embedding("wte", "table"), embedding("wte", "table")), "names the tensor wte.weight twice"),
        ((embedding("wte", "table"), embedding("emb", "table")), "two tensors hold table: wte.weight and emb.weight"),
        ((tensor("wte", "table", "sideways"),), "no layout 'sideways'"),
        ((linear("qkv.{i}", "layers/query", "layers/gate"),), "holds 2 leaves together, and this config lacks"),
    ],
)
def test_tables_that_cannot_be_right(table, said):
    with pytest.raises(ConfigError, match=said):
        bind(table, TREE)
