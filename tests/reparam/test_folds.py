"""Folds compute what the model did, in fewer parts, and refuse what is not exact."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx import reparam
from lmx.core import sharding, specs, tree, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA, LowRank, Sum
from lmx.core.nodes import node

CLOSE = dict(rtol=2e-5, atol=2e-5)
BLOCK = {"decoder/layers[0:3]/attention_norm", "decoder/layers[0:3]/mlp_norm"}
FOLDED = {  # of each model, the norms that are folded
    "llama": BLOCK | {"decoder/norm"},
    "tied": BLOCK,
    "gpt2": BLOCK | {"decoder/norm"},
    "neox": BLOCK,  # its head has no bias to take the last norm's
    "gemma": {f"decoder/layers[{i}]/{n}_norm" for i in range(3) for n in ("attention", "mlp")} | {"decoder/norm"},
    "t5": {f"{t}/layers[0:3]/{n}_norm" for t in ("encoder", "decoder") for n in ("attention", "mlp")}
    | {"decoder/layers[0:3]/cross_norm", "encoder/norm", "decoder/norm"},
    "modernbert": {"encoder/norm", "encoder/layers[0]/mlp_norm"}
    | {f"encoder/layers[{i}]/{n}_norm" for i in ("1", "2") for n in ("attention", "mlp")},
}


def adapted(w, seed=0):
    rng = np.random.default_rng(seed)
    a = jnp.asarray(rng.normal(size=(*w.shape[:2], 2)), jnp.float32)
    b = jnp.asarray(0.1 * rng.normal(size=(w.shape[0], 2, *w.shape[2:])), jnp.float32)
    return LoRA(w, a, b, alpha=3.0)


def summed(w):
    """The weight as a sum of an array, a product and another array."""
    low = adapted(w, 1).update
    return Sum((0.3 * w, low, 0.7 * w - low.dense()))


@pytest.mark.parametrize("name", FOLDED)
def test_norms_fold_into_what_reads_them(name, tiny, answer, sound):
    model = tiny(name)
    folded = reparam.fold_norms(model)
    np.testing.assert_allclose(answer(folded), answer(model), **CLOSE)
    plain = 0.0 if model.config.norm_offset else 1.0
    done = set()
    for path, norm in tree.paths(folded, lambda x: isinstance(x, lmx.nn.norm.Norm)):
        if isinstance(norm, lmx.nn.norm.Norm) and bool((norm.scale == plain).all()):
            assert norm.bias is None or not norm.bias.any()
            done.add(str(path))
    assert done == FOLDED[name]
    assert done == {path for path, reason in reparam.norm_folds(model).items() if reason is None}
    assert folded.config == model.config and jax.tree.structure(folded) == jax.tree.structure(model)
    sound(folded)


def test_a_folded_norm_in_float64():
    """(n s + b) W + c = n (s W) + (c + b W), by numpy."""
    from lmx.nn import attention, norm
    from lmx.reparam import norms

    rng = np.random.default_rng(0)
    n, s, b = (rng.normal(size=shape) for shape in ((5, 8), (1, 8), (1, 8)))
    w, c = rng.normal(size=(1, 8, 2, 3)), rng.normal(size=(1, 2, 3))
    layer = attention.Attention(w, None, None, None, c, None, None, None)
    made = norms._scaled(lmx.preset("gpt2-tiny"), norm.Norm(s, b), layer, ("query",))
    wanted = np.einsum("td,dhc->thc", n * s + b, w[0]) + c[0]
    np.testing.assert_allclose(np.einsum("td,dhc->thc", n, made.query[0]) + made.query_bias[0], wanted, rtol=1e-12)


def test_norms_fold_into_kinds_that_allow_it(tiny, answer, sound):
    model = tree.map(adapted, tiny("llama"), "layers[0]/attention/(query|key)", weights.is_weight)
    model = tree.map(lambda w: adapted(w).update, model, "layers[1]/attention/", weights.is_weight)
    model = tree.map(summed, model, "layers[2]/mlp/(up|gate)", weights.is_weight)
    folded = reparam.fold_norms(model)
    np.testing.assert_allclose(answer(folded), answer(model), **CLOSE)
    kinds = [type(w).__name__ for _, w in tree.paths(folded, weights.is_weight) if weights.is_weight(w)]
    assert kinds == [type(w).__name__ for _, w in tree.paths(model, weights.is_weight) if weights.is_weight(w)]
    sound(folded)


def test_norms_of_some_layers(tiny, answer):
    model = tiny("llama")
    folded = reparam.fold_norms(model, "layers[1]/attention_norm")
    np.testing.assert_allclose(answer(folded), answer(model), **CLOSE)
    scales = folded.params.decoder.layers.stacks[0][0].attention_norm.scale
    assert scales.shape == (3, 16)  # stacked again
    assert [bool((row == 1).all()) for row in scales] == [False, True, False]


@pytest.mark.parametrize(
    "name, changes, pattern, said",
    [
        ("tied", {}, "decoder/norm", "untie"),
        ("bert", {}, "attention_norm", "norm_placement 'post'"),
        ("bert", {}, None, "no norm can be folded exactly; embed/norm"),
        ("gemma", {}, "mlp_out_norm", "added to the residual"),
        ("llama", {"qk_norm": "head"}, "query_norm", "multiplied with each other"),
        ("llama", {"head": "none"}, "decoder/norm", "no head"),
        ("llama", {"norm_bias": True, "norm": "layernorm"}, "mlp_norm", "mlp/gate has none to take"),
        ("modernbert", {"pool": "max"}, "encoder/norm", "pool 'max'"),
        ("modernbert", {}, "embed/norm", "residual"),
        ("llama", {}, "mlp/up", "selects no norm"),
        ("llama", {}, "attentoin_norm", "did you mean"),
    ],
)
def test_what_is_not_exact_is_refused(name, changes, pattern, said, tiny):
    with pytest.raises(ConfigError, match=said):
        reparam.fold_norms(tiny(name, **changes), pattern)


@node
class Odd(weights.Weight):
    """A kind that surgery knows nothing about."""

    numbers: Any

    @property
    def shape(self):
        return self.numbers.shape


def test_a_kind_that_cannot_be_scaled_is_refused(tiny):
    model = tree.map(Odd, tiny(), "mlp/up|embed/tokens", weights.is_weight)
    with pytest.raises(ConfigError, match="mlp/up is of the kind Odd; fold that first"):
        reparam.fold_norms(model, "mlp_norm")
    with pytest.raises(ConfigError, match="of the kind Odd, which cannot be changed channel by channel"):
        reparam.untie(tree.map(Odd, tiny("tied"), "embed/tokens", weights.is_weight))


def test_a_tied_head_is_untied_and_takes_the_last_norm(tiny, answer, sound):
    model = tiny("tied")
    free = reparam.untie(model)
    np.testing.assert_allclose(answer(free), answer(model), **CLOSE)
    folded = reparam.fold_norms(free, "decoder/norm")
    np.testing.assert_allclose(answer(folded), answer(model), **CLOSE)
    assert not folded.config.tie_embeddings and folded.params.head.out.shape == (16, 29)
    sound(folded)
    low = tree.map(lambda w: LowRank(w[:, :5], jnp.eye(16)[:5]), model, "embed/tokens", weights.is_weight)
    free = reparam.untie(low)
    assert isinstance(free.params.head.out, LowRank)
    np.testing.assert_allclose(answer(free), answer(low), **CLOSE)
    with pytest.raises(ConfigError, match="nothing to untie"):
        reparam.untie(free)


def test_kinds_fold_into_arrays(tiny, answer, sound):
    model = tree.map(adapted, tiny(), "layers[0]/attention/query|layers[1]/mlp/", weights.is_weight)
    model = tree.map(summed, model, "layers[2]/attention/(value|key)|layers[2]/mlp/up", weights.is_weight)
    sound(model)
    assert [s for s in model.params.decoder.layers.sizes] == [1, 1, 1]
    folded = reparam.fold(model)
    assert folded.params.decoder.layers.sizes == (3,)
    assert not any(weights.is_weight(w) for _, w in tree.paths(folded, weights.is_weight))
    np.testing.assert_allclose(answer(folded), answer(model), **CLOSE)
    some = reparam.fold(model, "layers[1]/mlp/")
    np.testing.assert_allclose(answer(some), answer(model), **CLOSE)
    kinds = {type(w).__name__ for _, w in tree.paths(some, weights.is_weight) if weights.is_weight(w)}
    assert kinds == {"LoRA", "Sum"}


@pytest.mark.slow
def test_branches_are_trained_wide_and_served_folded(tiny, answer, sound):
    model = tiny()
    wide = reparam.widen(model, "layers[1:]/mlp/(up|down)", 3, branches=2, key=jax.random.key(0))
    np.testing.assert_allclose(answer(wide), answer(model), **CLOSE)
    up = wide.params.decoder.layers.stacks[1][0].mlp.up
    assert [type(part).__name__ for part in up.parts] == ["ArrayImpl", "LowRank", "LowRank"]
    assert not np.array_equal(up.parts[1].a, up.parts[2].a)
    optimizer = lmx.train.adamw(0.1)
    step = lmx.make_train_step(lmx.losses.cross_entropy, optimizer)
    trained = step(lmx.start(wide, optimizer), {"tokens": jnp.arange(1, 19).reshape(2, 9)})[0].model
    folded = reparam.fold(trained)
    assert folded.params.decoder.layers.sizes == (3,) and np.abs(answer(trained) - answer(wide)).max() > 0.01
    np.testing.assert_allclose(answer(folded), answer(trained), **CLOSE)
    sound(wide)
    with pytest.raises(ConfigError, match="branches must be at least 1"):
        reparam.widen(model, "mlp/up", 3, branches=0, key=jax.random.key(0))


@pytest.mark.parametrize("name", ["gpt2", "bert", "neox"])
def test_value_biases_pass_through_attention(name, tiny, answer, sound):
    model = tiny(name)
    folded = reparam.fold_value_bias(model)
    np.testing.assert_allclose(answer(folded), answer(model), **CLOSE)
    for path, bias in tree.select(folded, "value_bias"):
        assert not bias.any(), path
    sound(folded)
    part = reparam.fold_value_bias(model, "layers[1]/attention/value_bias")
    np.testing.assert_allclose(answer(part), answer(model), **CLOSE)
    (tower,) = (t for t in (part.params.encoder, part.params.decoder) if t is not None)
    assert [bool(row.any()) for row in tower.layers.stacks[0][0].attention.value_bias] == [True, False, True]


def test_value_biases_of_grouped_heads(tiny, answer):
    model = tiny("llama", attention_bias=True, attention_out_bias=True)
    np.testing.assert_allclose(answer(reparam.fold_value_bias(model)), answer(model), **CLOSE)


def test_value_biases_that_cannot_be_carried(tiny):
    with pytest.raises(ConfigError, match="no bias to take that of the values"):
        reparam.fold_value_bias(tiny("llama", attention_bias=True))
    with pytest.raises(ConfigError, match="selects nothing"):
        reparam.fold_value_bias(tiny("llama"))
    with pytest.raises(ConfigError, match="is no value_bias"):
        reparam.fold_value_bias(tiny("gpt2"), "bias")


@pytest.mark.parametrize("shape", [((8, 2), (2, 3, 4)), ((2, 3, 5), (5, 4)), ((4, 9), (9, 3))])
def test_two_linear_layers_are_one(shape):
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=s) for s in shape)
    b, c = rng.normal(size=shape[0][-1]), rng.normal(size=shape[1][1:])
    x = rng.normal(size=(7, *shape[0][:-1]))
    contract = lambda x, w: np.tensordot(x, w, w.ndim - len(shape[1][1:]))  # noqa: E731
    n = len(shape[0]) - 1
    wanted = np.tensordot(np.tensordot(x, first, n) + b, second, 1) + c
    for form in (None, "dense", "two-factor"):
        weight, bias = reparam.compose(first, second, b, c, form=form)
        matrix = np.tensordot(weight.a, weight.b, 1) if isinstance(weight, LowRank) else weight
        np.testing.assert_allclose(contract(x, matrix) + bias, wanted, rtol=1e-12, atol=1e-12)
        m, numbers = shape[0][-1], int(np.prod(shape[0][:-1])) + int(np.prod(shape[1][1:]))
        smaller = m * numbers < matrix.size
        assert isinstance(weight, LowRank) == (form == "two-factor" or form is None and smaller)
    with pytest.raises(ConfigError, match="do not follow each other"):
        reparam.compose(second, first)
    with pytest.raises(ConfigError, match="none of dense"):
        reparam.compose(first, second, form="denes")


def test_a_factorized_embedding_becomes_one_table(tiny, answer, sound):
    model = tiny("bert", embedding_size=6, embedding_norm=False, embedding_scale=2.0)
    folded = reparam.fold_embedding(model)
    assert folded.config.embedding_size is None and folded.params.embed.tokens.shape == (29, 16)
    np.testing.assert_allclose(answer(folded), answer(model), **CLOSE)
    sound(folded)
    given = dict(embedding_size=6, embedding_norm=False, embedding_scale=2.0)
    for changes, said in [
        (dict(embedding_norm=True), "is a norm"),
        (dict(embedding_size=None), "no projection"),
        (dict(position="sinusoidal", max_length=None), "sinusoids"),
        (dict(position="rotary", max_length=None, type_vocab_size=0), "is scaled"),
        (dict(head="lm", num_labels=None, head_activation="gelu"), "logits at the width"),
    ]:
        with pytest.raises(ConfigError, match=said):
            reparam.fold_embedding(tiny("bert", **(given | changes)))


def test_a_norm_folds_into_a_projection(tiny, answer):
    model = tiny("bert", embedding_size=6)
    np.testing.assert_allclose(answer(reparam.fold_norms(model, "embed/norm")), answer(model), **CLOSE)


FOLDS = [("gpt2", reparam.fold_norms), ("gpt2", reparam.fold_value_bias), ("tied", reparam.untie)]


@pytest.mark.parametrize("name, fold", FOLDS)
def test_sharded_folds_equal_unsharded(name, fold, tiny, tmp_path):
    lmx.save(tiny(name), tmp_path / "m")
    wanted = fold(tiny(name))
    with sharding.use_mesh("fsdp=4,tensor=2"):
        sharded = fold(lmx.load(tmp_path / "m"))
        places = specs.shardings(sharded.specs())
    for (path, x), (_, y), (_, place) in zip(*map(tree.paths, (sharded, wanted, places)), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim), path
        np.testing.assert_array_equal(x, y, err_msg=str(path))
