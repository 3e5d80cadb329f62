"""Weights of every kind against float64 products with the arrays they stand for."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lmx.core import sharding, specs, weights
from lmx.core.kinds import LoRA, LowRank, OutputsFirst, Pivoted, Quantized, Sum
from lmx.core.specs import ParamSpec

# what lmx multiplies: (subscripts, shape of x, spec of the weight, how x is laid out)
PRODUCTS = {
    "query": (
        "btd,dhc->bthc",
        (8, 3, 16),
        ParamSpec((16, 4, 2), ("embed", "heads", "head_dim"), inputs=1),
        (),
    ),
    "out": (
        "bthc,hcd->btd",
        (8, 3, 4, 2),
        ParamSpec((4, 2, 16), ("heads", "head_dim", "embed"), inputs=2),
        ("heads",),
    ),
    "tied": ("btd,vd->btv", (8, 3, 16), ParamSpec((10, 16), ("vocab", "embed"), inputs=1), ()),
    "up": ("btd,df->btf", (8, 3, 16), ParamSpec((16, 6), ("embed", "mlp"), inputs=1), ()),
    "down": ("btf,fd->btd", (8, 3, 6), ParamSpec((6, 16), ("mlp", "embed"), inputs=1), ("mlp",)),
}
LAYOUT = {  # of the products on an Explicit mesh: rows stay where they are, heads and units follow the weight
    "query": ("batch", None, "heads", None),
    "out": ("batch", None, None),
    "tied": ("batch", None, "vocab"),
    "up": ("batch", None, "mlp"),
    "take tied": ("batch", None, None),
}
# Sums of at most 16 products of numbers of size 1, in float32, in up to three products in a row.
CLOSE = dict(rtol=1e-5, atol=2e-5)


def draw(seed: int, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def low_rank(seed, shape, inputs, rank=3, copies=0, dtype=jnp.float32) -> LowRank:
    middle = copies + inputs
    a = draw(seed, (*shape[:middle], rank), dtype)
    return LowRank(a, draw(seed + 1, (*shape[:copies], rank, *shape[middle:]), dtype), inputs)


def pivoted(seed, shape, inputs, rank=3, copies=0, dtype=jnp.float32) -> Pivoted:
    sizes, m = shape[:copies], math.prod(shape[copies : copies + inputs])
    order = jax.random.permutation(jax.random.key(seed), jnp.broadcast_to(jnp.arange(m), (*sizes, m)), -1, True)
    rest = draw(seed, (*sizes, m - rank, rank), dtype)
    b = draw(seed + 1, (*sizes, rank, *shape[copies + inputs :]), dtype)
    return Pivoted(rest, b, order, inputs=shape[copies : copies + inputs])


def quantized(seed, shape, inputs, copies=0, dtype=jnp.float32, group=5) -> Quantized:
    """Of numbers of size 1; the last group is smaller but where 5 divides the inputs."""
    values = jax.random.randint(jax.random.key(seed), shape, -127, 128, jnp.int8)
    groups, outs = -(-math.prod(shape[copies : copies + inputs]) // group), shape[copies + inputs :]
    scale = jax.random.uniform(jax.random.key(seed + 1), (*shape[:copies], groups, *outs), minval=0.005, maxval=0.02)
    return Quantized(values, scale.astype(dtype), group, inputs, len(outs))


def make(kind: str, shape, inputs, copies=0, dtype=jnp.float32, seed=0):
    """A random weight of one kind; `alpha` and the ranks differ, so that one forgotten shows."""
    middle = copies + inputs
    if kind == "array":
        return draw(seed, shape, dtype)
    if kind == "LowRank":
        return low_rank(seed, shape, inputs, copies=copies, dtype=dtype)
    if kind == "LowRank of LowRank":
        a = low_rank(seed, (*shape[:middle], 3), inputs, 2, copies, dtype)
        b = low_rank(seed + 2, (*shape[:copies], 3, *shape[middle:]), 1, 2, copies, dtype)
        return LowRank(a, b, inputs)
    if kind == "Quantized":
        return quantized(seed, shape, inputs, copies, dtype)
    if kind == "OutputsFirst":
        return OutputsFirst.of(draw(seed, shape, dtype), inputs, len(shape) - middle)
    if kind == "LowRank of OutputsFirst":
        w = low_rank(seed, shape, inputs, copies=copies, dtype=dtype)
        return LowRank(OutputsFirst.of(w.a, inputs, 1), OutputsFirst.of(w.b, 1, len(shape) - middle), inputs)
    if kind.startswith("Pivoted"):
        w = pivoted(seed, shape, inputs, copies=copies, dtype=dtype)
        if kind == "Pivoted":
            return w
        quantize = lambda seed, x: quantized(seed, x.shape, 1, copies, dtype)  # noqa: E731
        return w.replace(rest=quantize(seed + 3, w.rest), b=quantize(seed + 4, w.b))
    if kind == "LowRank of Quantized":
        a = quantized(seed, (*shape[:middle], 3), inputs, copies, dtype)
        return LowRank(a, quantized(seed + 2, (*shape[:copies], 3, *shape[middle:]), 1, copies, dtype), inputs)
    if kind.startswith("Sum of "):
        parts = kind.removeprefix("Sum of ").split(" and ")
        return Sum(tuple(make(part, shape, inputs, copies, dtype, seed + 10 * i) for i, part in enumerate(parts)))
    update = low_rank(seed + 5, shape, inputs, 2, copies, dtype)
    base = make(kind.removeprefix("LoRA over "), shape, inputs, copies, dtype, seed)
    return LoRA(base, update.a, update.b, inputs, alpha=3.0)


KINDS = (
    "array",
    "LowRank",
    "LoRA over array",
    "LoRA over LowRank",
    "LowRank of LowRank",
    "LoRA over LowRank of LowRank",
    "Pivoted",
    "Quantized",
    "LowRank of Quantized",
    "Pivoted of Quantized",
    "LoRA over Quantized",
    "Sum of array and LowRank and Quantized",
    "OutputsFirst",
    "LowRank of OutputsFirst",
)


def full(w) -> np.ndarray:
    """The float64 array that an uncopied weight stands for, from the definitions."""
    if isinstance(w, LowRank):
        return np.tensordot(full(w.a), full(w.b), 1)
    if isinstance(w, LoRA):
        rank = full(w.lora_a).shape[-1]
        return full(w.base) + w.alpha / rank * np.tensordot(full(w.lora_a), full(w.lora_b), 1)
    if isinstance(w, Pivoted):
        b = full(w.b)
        rows = np.concatenate([b, np.tensordot(full(w.rest), b, 1)])
        flat = np.empty_like(rows)
        flat[np.asarray(w.order)] = rows
        return flat.reshape(w.shape)
    if isinstance(w, Quantized):
        values = np.asarray(w.values, np.float64).reshape(-1, *w.shape[w.inputs :])
        return np.stack([v * full(w.scale)[i // w.group] for i, v in enumerate(values)]).reshape(w.shape)
    if isinstance(w, Sum):
        return sum(map(full, w.parts))
    if isinstance(w, OutputsFirst):
        return np.moveaxis(full(w.array), range(w.outputs), range(w.inputs, w.inputs + w.outputs))
    return np.asarray(w.astype(jnp.float32), np.float64)


def float64(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


@jax.jit
def products(pairs):
    return {name: weights.einsum(PRODUCTS[name][0], x, w) for name, (x, w) in pairs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_einsum_equals_float64(kind):
    pairs = {name: (draw(99, p[1]), make(kind, p[2].shape, p[2].inputs)) for name, p in PRODUCTS.items()}
    for name, y in products(pairs).items():
        x, w = pairs[name]
        assert tuple(w.shape) == PRODUCTS[name][2].shape and w.dtype == y.dtype == jnp.float32
        np.testing.assert_allclose(y, np.einsum(PRODUCTS[name][0], float64(x), full(w)), **CLOSE, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_fold_and_take_equal_float64(kind):
    w = make(kind, (10, 4, 2), 1)
    np.testing.assert_allclose(weights.dense(w), full(w), **CLOSE)
    folded = weights.fold({"w": [w, None]})
    assert isinstance(folded["w"][0], jax.Array) and folded["w"][1] is None
    np.testing.assert_allclose(folded["w"][0], full(w), **CLOSE)
    ids = jnp.array([[3, 0, 9], [9, 9, 1]])
    rows = weights.take(ids, w)
    assert rows.shape == (2, 3, 4, 2)
    np.testing.assert_allclose(rows, full(w)[np.asarray(ids)], **CLOSE)
    if kind != "array":  # two inputs
        w = make(kind, (4, 2, 6), 2)
        np.testing.assert_allclose(weights.dense(w), full(w), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    """A stack of five weights: `dense` of it, a scan over it, and a product with the copies' letter."""
    stack = make(kind, (5, 16, 4, 2), 1, copies=1)
    each = [full(jax.tree.map(lambda leaf, i=i: leaf[i], stack)) for i in range(5)]
    np.testing.assert_allclose(weights.dense(stack), each, **CLOSE)
    assert stack.shape == (5, 16, 4, 2)
    x = draw(7, (2, 3, 16))
    scanned = jax.lax.scan(lambda x, w: (x, weights.einsum("btd,dhc->bthc", x, w)), x, stack)[1]
    np.testing.assert_allclose(scanned, [np.einsum("btd,dhc->bthc", float64(x), w) for w in each], **CLOSE)
    of_copy = draw(8, (5, 2, 3, 16))
    y = weights.einsum("ebtd,edhc->ebthc", of_copy, stack)
    np.testing.assert_allclose(y, np.einsum("ebtd,edhc->ebthc", float64(of_copy), np.stack(each)), **CLOSE)


@pytest.mark.parametrize("rows, first", [(2, False), (3, True), (32, True), (33, False)])
def test_few_rows_on_a_cpu_come_second_in_the_product(rows, first):
    """XLA's CPU backend would rearrange the matrix before every product; the program must not turn it round again."""
    x, w = draw(0, (rows, 16)), make("OutputsFirst", (16, 64), 1)
    program = jax.jit(lambda x, w: weights.einsum("bd,dv->bv", x, w)).lower(x, w).compile().as_text()
    assert (f"f32[64,{rows}]" in program) == first
    with sharding.use_mesh("fsdp=8"):
        assert not weights.weights_first(rows) and not weights.few_rows(rows)


def test_flops_count_every_copy():
    flops = lambda kind: make(kind, (5, 16, 4, 2), 1, copies=1).flops()  # noqa: E731
    assert flops("LowRank") == flops("LowRank of Quantized") == 2 * 5 * 3 * (16 + 8)
    assert flops("Pivoted") == flops("Pivoted of Quantized") == 2 * 5 * 3 * (16 - 3 + 8)
    assert flops("Quantized") == 2 * 5 * 16 * 8 and flops("LoRA over Quantized") == 2 * 5 * (16 * 8 + 2 * (16 + 8))
    assert flops("Sum of array and LowRank and Quantized") == 2 * 5 * (2 * 16 * 8 + 3 * (16 + 8))


def test_of_a_table_what_is_no_row_is_read_whole():
    numbers = lambda kind: sum(x.size for x in weights.read_whole(make(kind, (16, 8), 1)))  # noqa: E731
    assert numbers("array") == numbers("Quantized") == 0
    assert numbers("LowRank") == numbers("Sum of array and LowRank and Quantized") == 3 * 8
    assert numbers("LoRA over Quantized") == 2 * 8 and numbers("Pivoted") == 3 * 8 + 16


# bfloat16 keeps 8 bits: one rounding moves a number by at most 2^-8 of it. A product of bfloat16 numbers is
# summed in float32 and rounded once, and so are its gradients when the cotangent is bfloat16.
BFLOAT16 = 2.0**-8


@pytest.mark.parametrize("product", PRODUCTS)
def test_bfloat16_product_is_float32s_rounded(product):
    subscripts, x_shape, spec, _ = PRODUCTS[product]
    w, x = (
        draw(0, spec.shape, jnp.bfloat16).astype(jnp.float32),
        draw(1, x_shape, jnp.bfloat16),
    )  # exact in bfloat16
    y, pull = jax.vjp(lambda x, w: weights.einsum(subscripts, x, w), x, w)
    g = draw(2, y.shape, jnp.bfloat16)
    dx, dw = pull(g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    (left, right), out = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    wanted = np.einsum(subscripts, float64(x), full(w))
    wanted_x = np.einsum(f"{out},{right}->{left}", float64(g), full(w))
    wanted_w = np.einsum(f"{left},{out}->{right}", float64(x), float64(g))
    for got, want in ((y, wanted), (dx, wanted_x), (dw, wanted_w)):
        np.testing.assert_allclose(float64(got), want, rtol=BFLOAT16, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_have_the_dtype_of_the_weight(kind):
    w, x = make(kind, (16, 6), 1), draw(1, (8, 3, 16), jnp.bfloat16)
    loss = lambda w: weights.einsum("btd,df->btf", x, w).astype(jnp.float32).sum()  # noqa: E731
    exact = lambda w: jnp.einsum("btd,df->btf", x.astype(jnp.float32), weights.dense(w)).sum()  # noqa: E731
    got, want = jax.grad(loss, allow_int=True)(w), jax.grad(exact, allow_int=True)(w)
    assert jax.tree.structure(got) == jax.tree.structure(w)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if g.dtype == jax.dtypes.float0:  # of an integer leaf
            continue
        assert g.dtype == jnp.float32
        # Up to five factors in a row, each rounded: a few roundings of the largest entry.
        np.testing.assert_allclose(g, e, rtol=0, atol=8 * BFLOAT16 * float(jnp.abs(e).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_can_be_returned_in_float32(kind):
    """What a head of bfloat16 features gives: the last product's sum, not rounded."""
    w, x = make(kind, (10, 16), 1), draw(1, (8, 3, 16), jnp.bfloat16)
    y = weights.einsum("btd,vd->btv", x, w, jnp.float32)
    assert y.dtype == jnp.float32 and (y != y.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


def test_stored_bfloat16_adds_a_float32_update():
    w = make("LoRA over array", (10, 4), 1)
    w = w.replace(base=w.base.astype(jnp.bfloat16))
    assert w.dtype == jnp.bfloat16 and weights.dense(w).dtype == jnp.bfloat16
    assert weights.take(jnp.array([1, 2]), w).dtype == jnp.bfloat16
    assert weights.einsum("bd,df->bf", draw(0, (2, 10)), w).dtype == jnp.float32


def test_specs_like_reads_kinds_and_shapes_from_the_tree():
    spec = ParamSpec((5, 16, 4, 2), ("layers", "embed", "heads", "head_dim"), 0.02, inputs=1)
    w = make("LoRA over LowRank", spec.shape, 1, copies=1, dtype=jnp.bfloat16)
    found = weights.specs_like({"w": spec, "none": None}, {"w": w, "none": None})["w"]
    assert jax.tree.structure(found) == jax.tree.structure(w)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype.name), w)
    assert found.base.a.axes == ("layers", "embed", "rank") and found.base.a.inputs == 1
    assert found.lora_b.axes == ("layers", "rank", "heads", "head_dim") and found.lora_b.inputs == 1


SHARDED = (
    "array", "LowRank", "LoRA over LowRank", "LowRank of LowRank", "Pivoted", "Quantized",
    "Sum of array and LowRank", "OutputsFirst",
)  # fmt: skip


@pytest.fixture(scope="module")
def everything():
    """Products and lookups with most kinds: arguments, their specs, a function to results and gradients."""
    pairs, layout = {}, {}
    for name, (_, x_shape, spec, inner) in PRODUCTS.items():
        for kind in SHARDED:
            w = make(kind, spec.shape, spec.inputs)
            of_x = ParamSpec(x_shape, ("batch", None, *inner, *[None] * (len(x_shape) - 2 - len(inner))))
            pairs[f"{name} {kind}"], layout[f"{name} {kind}"] = (
                (draw(1, x_shape), w),
                (of_x, weights.specs_like(spec, w)),
            )
    ids, of_ids = jnp.arange(24).reshape(8, 3) % 10, ParamSpec((8, 3), ("batch", None), dtype="int32")

    def results(ids, pairs):
        def loss(pairs):
            made = {k: weights.einsum(PRODUCTS[k.split()[0]][0], x, w) for k, (x, w) in pairs.items()}
            made |= {f"take {k}": weights.take(ids, w) for k, (_, w) in pairs.items() if k.startswith("tied")}
            return sum(jnp.sin(y / 10).sum() for y in made.values()), made

        (_, made), grads = jax.value_and_grad(loss, has_aux=True, allow_int=True)(pairs)
        return made, jax.tree.map(lambda g: None if g.dtype == jax.dtypes.float0 else g, grads)

    arguments = (ids, pairs)
    return arguments, (of_ids, layout), results, jax.device_get(jax.jit(results)(*arguments))


def test_sharded_equals_one_device(everything, mesh):
    arguments, layout, results, wanted = everything
    placed = jax.device_put(arguments, specs.shardings(layout))
    got = jax.jit(results)(*placed)
    (_, pairs), (made, _) = placed, wanted
    np.testing.assert_allclose(made["take tied array"], full(arguments[1]["tied array"][1])[arguments[0]], **CLOSE)
    # Products reach 50 and are summed in another order, so 1e-5 of them; gradients sum up to 24 rows of such.
    close = lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-4)  # noqa: E731
    jax.tree.map(close, jax.device_get(got), wanted)
    if sharding.mesh_kind() is AxisType.Explicit:
        for name, axes in LAYOUT.items():
            y = got[0][f"{name} array"]
            at = sharding.named_sharding(axes, y.shape, mesh)
            assert y.sharding.is_equivalent_to(at, y.ndim), f"{name} lies as {y.sharding}, not as {at}"
        # a gradient lies as its weight does: nothing is gathered
        same = jax.tree.map(
            lambda g, p: g is None or g.sharding.is_equivalent_to(p.sharding, g.ndim),
            got[1], pairs, is_leaf=lambda x: x is None,
        )  # fmt: skip
        assert all(jax.tree.leaves(same)), same


def test_bfloat16_products_on_a_mesh(everything, mesh):
    """The hand-written backward pass states the layouts itself."""
    (_, pairs), (_, layout), _, _ = everything
    pairs = {k: (x.astype(jnp.bfloat16), w) for k, (x, w) in pairs.items() if k.endswith(" array")}
    placed = jax.device_put(pairs, specs.shardings({k: layout[k] for k in pairs}))
    loss = lambda pairs: sum((y.astype(jnp.float32) ** 2).sum() for y in products(short(pairs)).values())  # noqa: E731
    short = lambda pairs: {k.split()[0]: pair for k, pair in pairs.items()}  # noqa: E731
    grads = jax.jit(jax.grad(loss))(placed)
    for key, (x, w) in pairs.items():
        (left, right), out = (s := PRODUCTS[key.split()[0]][0]).split("->")[0].split(","), s.split("->")[1]
        g = 2 * np.einsum(s, float64(x), full(w))
        for got, pattern, a, b in (
            (grads[key][0], f"{out},{right}->{left}", g, full(w)),
            (grads[key][1], f"{left},{out}->{right}", float64(x), g),
        ):
            want = np.einsum(pattern, a, b)
            # The weight, the product, the cotangent and the result are each rounded to bfloat16.
            np.testing.assert_allclose(float64(got), want, rtol=0, atol=4 * BFLOAT16 * np.abs(want).max(), err_msg=key)
