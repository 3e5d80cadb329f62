"""Paths, patterns with layer ranges, and what is built on them: split, partition, rates, map, average."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core import tree, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA, LowRank
from lmx.core.nodes import node, static
from lmx.core.tree import Layers

LAYERS = 10  # of `model()`: four in one stack, then three periods of two kinds


def block(n: int, first: int, width: int = 3) -> dict:
    """n layers whose numbers tell leaf and layer: query is 100 and up 200, plus the layer's number."""
    number = first + jnp.arange(n, dtype=jnp.float32)[:, None]
    ticks = jnp.arange(n, dtype=jnp.int32)
    return {
        "attention": {"query": 100 + number + jnp.zeros(width)},
        "mlp": {"up": 200 + number},
        "ticks": ticks,
    }


def model() -> dict:
    stacks = [(block(4, 0),), (block(3, 40), block(3, 50, width=2))]
    return {"decoder": {"layers": Layers.of(stacks), "norm": jnp.ones(3)}, "head": jnp.zeros((3, 5))}


def rows(model: dict) -> dict[tuple[str, int], list]:
    """What every layer of every leaf holds, however the layers are stacked."""
    found = {}
    for path, leaf in tree.paths(model):
        for i, layer in enumerate([-1] if path.layers is None else path.layers):
            found[path.plain, layer] = np.asarray(leaf if path.layers is None else leaf[i]).tolist()
    return found


def chosen(model: dict, pattern: str) -> set[tuple[str, int]]:
    return {
        (path.plain, layer)
        for path, _, hit in tree.matches(model, pattern)
        for layer, h in zip([-1] if path.layers is None else path.layers, hit, strict=True)
        if h
    }


def test_paths_name_layers_in_the_order_of_the_leaves():
    whole = model()
    names = [str(path) for path, _ in tree.paths(whole)]
    assert names[:2] == ["decoder/layers[0:4]/attention/query", "decoder/layers[0:4]/mlp/up"]
    assert [n for n in names if n.endswith("up")][1:] == [
        "decoder/layers[4:9:2]/mlp/up",
        "decoder/layers[5:10:2]/mlp/up",
    ]
    assert names[-2:] == ["decoder/norm", "head"]
    assert all(a is b for (_, a), b in zip(tree.paths(whole), jax.tree.leaves(whole), strict=True))


def test_paths_of_one_layer_and_of_none_fields():
    alone = {
        "layers": Layers.of([({"up": jnp.zeros((1, 2)), "bias": None},), ({"up": jnp.zeros((1, 2)), "bias": None},)])
    }
    assert [str(path) for path, _ in tree.paths(alone)] == ["layers[0]/up", "layers[1]/up"]


def test_transparent_fields_do_not_appear_in_paths():
    assert [str(path) for path, _ in tree.paths({"student": Wrapped(1, {"w": jnp.zeros(2)})})] == ["student/w"]


@node
class Wrapped:
    number: int = static()
    params: dict
    transparent = ("params",)


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("layers[3]/mlp", [3]),
        ("layers[-1]/mlp", [9]),
        ("layers[-3:]/mlp", [7, 8, 9]),
        ("layers[2:6]/mlp", [2, 3, 4, 5]),
        ("layers[:-8]/mlp", [0, 1]),
        ("layers[1:8:3]/mlp", [1, 4, 7]),
        ("layers[::4]/mlp", [0, 4, 8]),
        ("layers[0]/mlp|layers[9]/mlp", [0, 9]),
        ("layers/mlp", list(range(10))),
        ("up$", list(range(10))),
        ("decoder/layers[8:100]/(mlp|nothing)", [8, 9]),
    ],
)
def test_ranges(pattern, layers):
    assert chosen(model(), pattern) == {("decoder/layers/mlp/up", i) for i in layers}


def test_alternatives_may_lie_outside_the_stacks():
    assert chosen(model(), "head|layers[0]/mlp") == {("head", -1), ("decoder/layers/mlp/up", 0)}
    assert chosen(model(), "^(head|decoder/norm)$") == {("head", -1), ("decoder/norm", -1)}


BOUND = st.none() | st.integers(-12, 12)


@given(BOUND, BOUND, st.none() | st.integers(1, 4))
def test_ranges_are_python_slices(start, stop, step):
    text = lambda x: "" if x is None else str(x)  # noqa: E731
    pattern = f"layers[{text(start)}:{text(stop)}" + (f":{step}]" if step else "]") + "/mlp"
    wanted = set(range(LAYERS)[start:stop:step])
    if wanted:
        assert {layer for _, layer in chosen(model(), pattern)} == wanted
    else:
        with pytest.raises(ConfigError, match="selects nothing"):
            chosen(model(), pattern)


LEAVES = st.sampled_from(["attention", "mlp", ".*(query|up)", ".", "mlp/up$"])
CUTS = st.builds(lambda a, n, leaf: f"layers[{a}:{a + n}]/({leaf})", st.integers(0, 9), st.integers(1, 10), LEAVES)


@settings(max_examples=25, deadline=None)
@given(CUTS)
def test_split_keeps_every_layer_and_decides_every_leaf(pattern):
    before = model()
    after = tree.split(before, pattern)
    assert rows(after) == rows(before)
    assert chosen(after, pattern) == chosen(before, pattern)
    assert all(hit.all() or not hit.any() for _, _, hit in tree.matches(after, pattern))


def test_split_cuts_only_where_the_pattern_does():
    assert tree.split(model(), "layers[0:4]/mlp")["decoder"]["layers"].sizes == (4, 3)
    assert tree.split(model(), "layers[1:3]/mlp")["decoder"]["layers"].sizes == (1, 2, 1, 3)
    assert tree.split(model(), "layers[5]/mlp")["decoder"]["layers"].sizes == (4, 1, 2)


@settings(max_examples=25, deadline=None)
@given(CUTS | st.sampled_from([".", "head", "norm|layers[2]/mlp"]))
def test_partition_then_combine_is_the_identity_on_every_layer(pattern):
    before = model()
    selected, rest = tree.partition(before, pattern)
    assert rows(tree.combine(selected, rest)) == rows(before)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(selected))
    wanted = {key for key in chosen(before, pattern) if not key[0].endswith("ticks")}
    assert set(rows(selected)) == wanted
    assert set(rows(rest)) == set(rows(before)) - wanted


def test_what_is_left_of_a_partition_can_be_split_again():
    """Stacks of holes alone keep their sizes: parts of a model, side by side in one tree, are partitioned once more."""
    selected, rest = tree.partition(model(), "head")
    again, others = tree.partition({"selected": selected, "rest": rest}, "^selected")
    assert rows(again["selected"]) == rows(selected) and not jax.tree.leaves(again["rest"])
    assert again["selected"]["decoder"]["layers"].sizes == model()["decoder"]["layers"].sizes
    assert rows(tree.combine(again["selected"], others["rest"])) == rows(model())


def test_partition_refuses_what_cannot_be_trained():
    with pytest.raises(ConfigError, match="only integer arrays"):
        tree.partition(model(), "ticks")


def test_rates_the_last_pattern_wins_and_ranges_become_arrays():
    rates = tree.rates(model(), {"layers": 0.5, "mlp": 0.25, "layers[1:3]/mlp": 0.0}, 1)
    assert rates["head"] == rates["decoder"]["norm"] == 1
    first, second = (stack[0] for stack in rates["decoder"]["layers"].stacks)
    assert first["attention"]["query"] == 0.5
    assert first["mlp"]["up"].tolist() == [[0.25], [0.0], [0.0], [0.25]]
    assert second["mlp"]["up"] == 0.25


def test_rates_of_whole_numbers_keep_fractions():
    assert tree.rates({"a": jnp.zeros(2), "b": jnp.zeros(2)}, {"a": 0.5}, 1) == {"a": 0.5, "b": 1}


def test_rates_scale_a_leaf_layer_by_layer():
    found = tree.rates(model(), {"layers[0]/attention": 2.0}, 1.0)["decoder"]["layers"].stacks[0][0]["attention"][
        "query"
    ]
    assert found.shape == (4, 1)  # broadcasts against (4, 3)


def test_mask():
    made = tree.mask(model(), "layers[0:4]/mlp|head")
    assert made["head"] is True and made["decoder"]["norm"] is False
    assert made["decoder"]["layers"].stacks[0][0]["mlp"]["up"] is True
    assert tree.mask(model(), "layers[3]")["decoder"]["layers"].stacks[0][0]["ticks"].tolist() == [False] * 3 + [True]


def test_map_changes_the_kind_of_some_layers_and_then_of_others():
    stacked = {"layers": Layers.of([({"query": jnp.ones((4, 3, 5)), "bias": jnp.zeros((4, 5))},)])}
    halve = lambda w: LowRank(w[..., :2], jnp.ones((w.shape[0], 2, 5)))  # noqa: E731
    some = tree.map(halve, stacked, "layers[1:3]/query$", weights.is_weight)
    kinds = lambda t: [type(period[0]["query"]).__name__ for period in t["layers"].stacks]  # noqa: E731
    assert kinds(some) == ["ArrayImpl", "LowRank", "ArrayImpl"]
    assert some["layers"].sizes == (1, 2, 1)

    adapt = lambda w: LoRA(w, jnp.ones((w.shape[0], 3, 1)), jnp.zeros((w.shape[0], 1, 5)))  # noqa: E731
    both = tree.map(adapt, some, "layers[2:4]/query$", weights.is_weight)
    assert kinds(both) == ["ArrayImpl", "LowRank", "LoRA", "LoRA"]
    base = both["layers"].stacks[2][0]["query"].base
    assert isinstance(base, LowRank)
    assert [str(path) for path, _ in tree.select(both, "base")] == [
        "layers[2]/query/base/a",
        "layers[2]/query/base/b",
        "layers[3]/query/base",
    ]


def test_average():
    trees = [{"w": jnp.full(2, x, jnp.bfloat16), "n": jnp.full(2, x)} for x in (1.0, 2.0, 6.0)]
    plain, weighted = tree.average(trees), tree.average(trees, [2, 1, 1])
    assert plain["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(plain["n"], 3.0, rtol=1e-6)
    np.testing.assert_allclose(weighted["n"], 2.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("decoder/layers/mlp/upp", "selects nothing; did you mean 'decoder/layers/mlp/up'"),
        ("decoder/layers[0:2]/atention/query", "did you mean 'decoder/layers/attention/query'"),
        ("layers[10]/mlp", r"selects nothing.*layers are numbered 0 to 9"),
        ("zzzzzz", r"selects nothing; paths are such as decoder/layers\[0:4\]/attention/query"),
        ("", "non-empty string"),
        ("mlp/(", "not a regular expression"),
        ("layers[0:2]/layers[1]/mlp", "two layer ranges"),
        ("(embed|decoder/layers[0:2]/mlp)", "outside parentheses"),
        ("layers[]/mlp", r"takes a number or a slice"),
        ("layers[-]/mlp", r"takes a number or a slice"),
        ("layers[0:4:0]/mlp", r"takes a number or a slice"),
        ("layers[5-3]/mlp", r"takes a number or a slice"),
        ("layers[0,2]/mlp", r"takes a number or a slice"),
    ],
)
def test_a_wrong_pattern_says_how_to_mend_it(pattern, message):
    with pytest.raises(ConfigError, match=message):
        tree.select(model(), pattern)
