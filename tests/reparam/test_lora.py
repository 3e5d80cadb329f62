"""LoRA adapters attached, merged, unmerged, extracted and re-ranked: against PEFT, numpy's SVD and closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx import reparam
from lmx.core import sharding, specs, tree, weights
from lmx.core.errors import ConfigError
from lmx.core.kinds import LoRA, LowRank
from lmx.hf import updates
from lmx.hf.tables import spell
from lmx.losses import cross_entropy

CLOSE = dict(rtol=2e-5, atol=2e-5)
PATTERN = "attention/(query|out)|layers[1:]/mlp/down"
KEY = jax.random.key(0)


def spread(model, seed=0):
    """Second moments for every matrix, none alike."""
    rng, grams = np.random.default_rng(seed), {}
    for path, spec in tree.paths(lmx.models.transformer.abstract(model.config)):
        if spec.inputs:
            m = int(np.prod(spec.shape[(path.layers is not None) :][: spec.inputs]))
            for layer in path.layers or (None,):
                x = rng.normal(size=(3 * m, m)) * np.geomspace(1, 30, m)
                grams[spell(path.plain, layer)] = x.T @ x / len(x)
    return grams


def randomised(model, seed=0):
    """The model with updates that are not zero."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
    return tree.map(draw, model, "lora_")


def update(node, at):
    a, b = (np.asarray(x if at is None else x[at], np.float64) for x in (node.lora_a, node.lora_b))
    return node.scale * a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)


@pytest.mark.parametrize("init", reparam.INITS)
def test_attaching_changes_nothing(init, tiny, answer, sound):
    model = tiny()
    given = {"plain": {"key": KEY}, "eva": {"grams": spread(model)}, "corda": {"grams": spread(model)}}.get(init, {})
    made = reparam.attach(model, PATTERN, 3, 5.0, init=init, **given)
    np.testing.assert_allclose(answer(made), answer(model), **CLOSE)
    held = updates.held(made)
    wanted = {(f"decoder/layers/attention/{n}", i) for n in ("query", "out") for i in range(3)}
    assert set(held) == wanted | {("decoder/layers/mlp/down", 1), ("decoder/layers/mlp/down", 2)}
    assert {(node.rank, node.alpha) for node, _ in held.values()} == {(3, 5.0)}
    assert made.params.decoder.layers.sizes == (1, 2)
    sound(made)
    grown = randomised(made)
    assert np.abs(answer(grown) - answer(model)).max() > 0.1


def test_plain_draws_each_its_own(tiny):
    held = updates.held(reparam.attach(tiny(), "attention/(query|key)|mlp/up", 4, key=KEY))
    drawn = [np.asarray(node.lora_a[at]) for node, at in held.values()]
    assert len({x.tobytes() for x in drawn}) == len(drawn) == 9
    assert abs(np.concatenate(drawn).std() * 16**0.5 - 1) < 0.1
    assert not any(node.lora_b.any() for node, _ in held.values())


def test_rslora_counts_by_the_root(tiny):
    node, _ = updates.held(reparam.attach(tiny(), "layers[0]/mlp/up", 4, 6.0, rslora=True, key=KEY)).popitem()[1]
    assert node.scale == 6.0 / 4**0.5


def test_eva_begins_with_the_inputs_leading_directions(tiny):
    model = tiny()
    grams = spread(model)
    for where, (node, at) in updates.held(reparam.attach(model, PATTERN, 2, init="eva", grams=grams)).items():
        a = np.asarray(node.lora_a[at], np.float64).reshape(-1, 2)
        vectors = np.linalg.svd(grams[spell(*where)])[0][:, :2]
        np.testing.assert_allclose(np.abs(vectors.T @ a), np.eye(2), atol=1e-6)


def test_eva_of_diagonal_moments_takes_what_is_largest(tiny):
    """As of a table, whose inputs' moments are how often each token comes."""
    model, often = tiny(), np.arange(29.0)[::-1] % 7
    model = reparam.attach(model, "embed/tokens", 2, init="eva", grams={"embed/tokens": often})
    a = np.asarray(model.params.embed.tokens.lora_a)
    assert a.shape == (29, 2) and set(a.argmax(0)) == set(np.argsort(-often, kind="stable")[:2])
    np.testing.assert_array_equal(a[a != 0], 1.0)


def test_corda_takes_the_best_under_the_moments(tiny):
    """Its update leaves E|x W'|^2 = the sum of the squares of the singular values of A^(1/2) W beyond the rank."""
    model = tiny()
    grams = spread(model)
    made, plain = (
        reparam.attach(model, PATTERN, 3, 5.0, init=i, **g) for i, g in (("corda", {"grams": grams}), ("pissa", {}))
    )
    bases, others = updates.held(made), updates.held(plain)
    for where, (node, at) in bases.items():
        w, root = update(node, at), np.linalg.cholesky(grams[spell(*where)]).T
        left, worse = (np.asarray(x[0].base[x[1]], np.float64).reshape(w.shape) for x in (bases[where], others[where]))
        values = np.linalg.svd(root @ (w + left), compute_uv=False)
        np.testing.assert_allclose(np.square(root @ left).sum(), np.square(values[3:]).sum(), rtol=1e-3)
        assert np.linalg.norm(root @ left) < np.linalg.norm(root @ worse)


@pytest.fixture(scope="module")
def theirs(torch_llama):
    """(folder of a base, a LoraConfig applied to it by PEFT)."""
    peft = pytest.importorskip("peft", reason="the oracle is PEFT; install the extra 'oracle'")
    return lambda **options: peft.get_peft_model(torch_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options))


@pytest.fixture(scope="module")
def torch_llama():
    torch = pytest.importorskip("torch", reason="the oracle is PEFT in torch; install the extra 'oracle'")
    transformers = pytest.importorskip("transformers")

    def make():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(1.0 if p.ndim == 1 else 0.0, 0.3)
        return model

    return make


@pytest.fixture(scope="module")
def base(torch_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch_llama().save_pretrained(folder)
    return lmx.load(folder)


def test_pissa_as_peft_begins_it(theirs, base):
    """One scale and one base: PEFT divides the singular values by alpha / r, and the base is what is left."""
    model = theirs(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    state = {name: x.detach().double().numpy() for name, x in model.state_dict().items()}
    made = reparam.attach(base, "attention/query|mlp/down", 3, 5.0, init="pissa")
    for (leaf, layer), (node, at) in updates.held(made).items():
        name = {"query": "self_attn.q_proj", "down": "mlp.down_proj"}[leaf.rpartition("/")[2]]
        stem = f"base_model.model.model.layers.{layer}.{name}"
        wanted = 5 / 3 * state[f"{stem}.lora_B.default.weight"] @ state[f"{stem}.lora_A.default.weight"]
        np.testing.assert_allclose(update(node, at), wanted.T, **CLOSE)
        np.testing.assert_allclose(
            np.asarray(node.base[at]).reshape(wanted.T.shape), state[f"{stem}.base_layer.weight"].T, **CLOSE
        )


def test_an_adapter_made_here_is_computed_and_merged_by_peft(torch_llama, base, answer, tmp_path):
    import peft
    import torch

    made = randomised(reparam.attach(base, "attention/(query|value)|layers[1]/mlp/", 3, 4.0, rslora=True, key=KEY))
    lmx.save_adapter(made, tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(torch_llama(), tmp_path / "adapter")
    tokens = np.random.default_rng(1).integers(1, 29, (2, 9))  # those of `answer`
    with torch.no_grad():
        np.testing.assert_allclose(answer(made), other(torch.tensor(tokens)).logits.numpy(), **CLOSE)
    merged = reparam.merge(made)
    lmx.save(merged, tmp_path / "merged", format="hf")
    from lmx.core.arrays import open_arrays

    state = other.merge_and_unload().state_dict()
    for name, array in open_arrays(tmp_path / "merged" / "model.safetensors").items():
        np.testing.assert_allclose(array, state[name].numpy(), **CLOSE, err_msg=name)


def test_merge_unmerge_detach(tiny, answer, sound):
    model = tiny("gpt2")
    made = randomised(reparam.attach(model, PATTERN, 3, 5.0, key=KEY))
    merged = reparam.merge(made)
    assert merged.params.decoder.layers.sizes == (3,)
    np.testing.assert_allclose(answer(merged), answer(made), **CLOSE)
    back = reparam.unmerge(merged, made)
    assert jax.tree.structure(back) == jax.tree.structure(made)
    for (path, x), (_, y) in zip(tree.paths(back), tree.paths(made), strict=True):
        np.testing.assert_allclose(x, y, atol=0 if "lora_" in str(path) else 2e-6, err_msg=str(path))
    for one, other in zip(jax.tree.leaves(reparam.detach(made)), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)
    part = reparam.merge(made, "mlp")
    assert {leaf.rpartition("/")[2] for leaf, _ in updates.held(part)} == {"query", "out"}
    np.testing.assert_allclose(answer(part), answer(made), **CLOSE)
    sound(part)


def test_the_difference_of_two_models_is_extracted_whole(tiny, answer, sound):
    model = tiny()
    made = randomised(reparam.attach(model, "layers[1:]/(attention/(query|out)|mlp/down)", 3, 7.0, key=KEY))
    merged = reparam.merge(made)
    again = reparam.extract(merged, model, 3)
    assert set(updates.held(again)) == set(updates.held(made))
    np.testing.assert_allclose(answer(again), answer(made), **CLOSE)
    for where, (node, at) in updates.held(again).items():
        np.testing.assert_allclose(update(node, at), update(*updates.held(made)[where]), atol=2e-6)
    full = reparam.extract(merged, model, energy=1 - 1e-9)
    assert {node.rank for node, _ in updates.held(full).values()} == {3}
    scaled = reparam.extract(merged, model, 3, alpha=1.5)
    assert {node.alpha for node, _ in updates.held(scaled).values()} == {1.5}
    np.testing.assert_allclose(answer(scaled), answer(made), **CLOSE)
    sound(again)


@pytest.mark.parametrize("with_moments", [False, True])
def test_extraction_is_the_best_of_its_rank(with_moments, tiny):
    """Eckart and Young, by numpy, in the metric of the moments."""
    model, other = tiny(), tiny(seed=1)
    grams = spread(model) if with_moments else None
    made = reparam.extract(other, model, 2, pattern=PATTERN, grams=grams, partial=True)
    weight = {w: np.asarray(x[0][x[1]], np.float64) for w, x in reparam.lora._held(other).items() if w[1] is not None}
    for where, (node, at) in updates.held(made).items():
        got = update(node, at)
        difference = weight[where].reshape(got.shape) - np.asarray(node.base[at], np.float64).reshape(got.shape)
        root = np.eye(len(got)) if grams is None else np.linalg.cholesky(grams[spell(*where)]).T
        values = np.linalg.svd(root @ difference, compute_uv=False)
        np.testing.assert_allclose(np.linalg.norm(root @ (difference - got)), np.linalg.norm(values[2:]), rtol=1e-5)
    share = reparam.extract(other, model, energy=0.6, pattern="mlp/up", partial=True)
    (rank,) = {node.rank for node, _ in updates.held(share).values()}
    for at in range(3):
        d = weight["decoder/layers/mlp/up", at] - np.asarray(
            model.params.decoder.layers.stacks[0][0].mlp.up[at], np.float64
        )
        kept = np.cumsum(np.linalg.svd(d, compute_uv=False) ** 2) / np.square(d).sum()
        assert kept[rank - 1] >= 0.6
    assert 1 < rank < 16


def test_a_lower_rank_is_the_best_and_no_worse_under_the_moments(tiny, sound):
    model = tiny()
    grams = spread(model)
    made = randomised(reparam.attach(model, PATTERN, 5, 4.0, key=KEY))
    plain, under = (reparam.rerank(made, 2, grams=g) for g in (None, grams))
    old = updates.held(made)
    for where, (node, at) in updates.held(plain).items():
        whole, root = update(*old[where]), np.linalg.cholesky(grams[spell(*where)]).T
        better = update(*updates.held(under)[where])
        assert node.rank == 2 and node.scale == old[where][0].scale
        for got, r in ((update(node, at), np.eye(len(whole))), (better, root)):
            values = np.linalg.svd(r @ whole, compute_uv=False)
            np.testing.assert_allclose(np.linalg.norm(r @ (whole - got)), np.linalg.norm(values[2:]), rtol=1e-4)
        assert np.linalg.norm(root @ (whole - better)) < np.linalg.norm(root @ (whole - update(node, at)))
        np.testing.assert_array_equal(node.base[at], old[where][0].base[old[where][1]])
    sound(under)
    same = reparam.rerank(made, 5)
    jax.tree.map(np.testing.assert_array_equal, same, made)
    some = reparam.rerank(made, 2, pattern="layers[1]/mlp")
    assert {where: node.rank for where, (node, _) in updates.held(some).items() if node.rank == 2} == {
        ("decoder/layers/mlp/down", 1): 2
    }


def test_a_lower_rank_of_a_zero_update(tiny):
    made = reparam.rerank(reparam.attach(tiny(), "mlp/up", 4, key=KEY), 2)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(made))


def test_the_adapter_alone_is_trained(tiny):
    made = reparam.attach(tiny(), "mlp/(up|down)", 2, key=KEY)
    optimizer = lmx.train.adamw(0.01)
    state = lmx.start(made, optimizer, train="lora_")
    state, _ = lmx.make_train_step(cross_entropy, optimizer)(state, {"tokens": jnp.arange(1, 25).reshape(2, 12)})
    for (path, new), (_, old) in zip(tree.paths(state.model), tree.paths(made), strict=True):
        assert bool((new != old).any()) == path.parts[-1].startswith("lora_"), path


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m: reparam.attach(m, "mlp/upp", 2, key=KEY), "did you mean"),
        (lambda m: reparam.attach(m, "norm", 2, key=KEY), "selects no weight matrix"),
        (lambda m: reparam.attach(m, "mlp/up", 0, key=KEY), "a rank from 1 to 16, not 0"),
        (lambda m: reparam.attach(m, "mlp/up", 17, key=KEY), "a rank from 1 to 16, not 17"),
        (lambda m: reparam.attach(m, "mlp/up", 2), "give key="),
        (lambda m: reparam.attach(m, "mlp/up", 2, init="pisa"), "did you mean 'pissa'"),
        (lambda m: reparam.attach(m, "mlp/up", 2, init="eva"), "takes grams="),
        (lambda m: reparam.attach(m, "mlp/up", 2, init="pissa", grams={}), "takes no grams="),
        (lambda m: reparam.attach(m, "mlp/up", 2, init="corda", grams={}), "no second moments for"),
        (lambda m: reparam.attach(reparam.attach(m, "mlp/up", 2, key=KEY), "mlp", 2, key=KEY), "merge it first"),
        (lambda m: reparam.merge(m), "selects no adapter"),
        (lambda m: reparam.rerank(reparam.attach(m, "mlp/up", 2, key=KEY), 0), "at least 1, not 0"),
        (lambda m: reparam.extract(m, m, 2), "do not differ"),
        (lambda m: reparam.extract(m, m), "give rank, or energy"),
        (lambda m: reparam.extract(m, m, energy=1.5), "give rank, or energy above 0 and at most 1"),
        (lambda m: reparam.unmerge(m, m), "selects no adapter"),
    ],
)
def test_bad_input(call, said, tiny):
    with pytest.raises(ConfigError, match=said):
        call(tiny())


def test_two_models_that_no_adapter_brings_together(tiny):
    with pytest.raises(ConfigError, match="arrays differ that the adapter would not hold .*norm/scale"):
        reparam.extract(tiny(seed=1), tiny(), 2)
    with pytest.raises(ConfigError, match="unlike shape: num_layers 2 and 3"):
        reparam.extract(tiny(num_layers=2), tiny(), 2)
    low = tree.map(lambda w: LowRank(w[..., :2], w[:, :2]), tiny(), "mlp/up", weights.is_weight)
    with pytest.raises(ConfigError, match="of the kind LowRank; its numbers"):
        reparam.attach(low, "mlp/up", 2, init="pissa")
    assert isinstance(reparam.attach(low, "mlp/up", 2, key=KEY).params.decoder.layers.stacks[0][0].mlp.up, LoRA)


@pytest.mark.parametrize("init", ["plain", "pissa"])
def test_sharded_equals_unsharded(init, tiny, tmp_path):
    lmx.save(tiny(), tmp_path / "m")
    make = lambda m: reparam.rerank(reparam.attach(m, PATTERN, 3, init=init, key=KEY), 2)  # noqa: E731
    wanted = make(tiny())
    with sharding.use_mesh("fsdp=4,tensor=2"):
        made = make(lmx.load(tmp_path / "m"))
        places = specs.shardings(made.specs())
    for (path, x), (_, y), (_, place) in zip(*map(tree.paths, (made, wanted, places)), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim), path
        np.testing.assert_array_equal(x, y, err_msg=str(path))
