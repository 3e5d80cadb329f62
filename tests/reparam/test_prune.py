"""Fewer layers, heads and units: what does not matter goes without a trace, and what is left is an ordinary model."""

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
from lmx.losses import cross_entropy
from lmx.models import stacks
from lmx.reparam.grams import moments

CLOSE = dict(rtol=2e-5, atol=2e-5)
GROUPS = {"mha": 4, "gqa": 2, "mqa": 1}  # key-value heads of four


def batches(seed=0, **more):
    rng = np.random.default_rng(seed)
    segments = np.ones((2, 9), np.int32)
    segments[1, 5:] = 0
    return [{"tokens": rng.integers(1, 29, (2, 9)), "segment_ids": segments} | more for _ in range(2)]


def zeroed(model, pattern, index):
    """The model with these rows of the weights that the pattern selects, of every layer, zero."""
    at = (slice(None), np.asarray(index))
    return tree.map(lambda w: w.at[at].set(0), model, pattern)


def silenced(model, layer):
    """The model with a layer that adds nothing."""
    return tree.map(jnp.zeros_like, model, rf"layers[{layer}]/(attention/out|mlp/down)(_bias)?$")


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma", "modernbert"])
def test_a_layer_that_adds_nothing_goes_without_a_trace(name, tiny, answer, sound):
    model = silenced(tiny(name), 1)
    made = reparam.drop_layers(model, [1])
    assert made.config.num_layers == 2
    np.testing.assert_allclose(answer(made), answer(model), **CLOSE)
    sound(made)


def test_the_kinds_of_the_layers_that_stay(tiny, answer, sound):
    model = tiny("gemma", num_layers=5)  # local, global, local, global, local
    made = reparam.drop_layers(model, [1])
    assert made.config.kinds == ["local", "local", "global", "local"] and made.config.window == 4
    assert reparam.drop_layers(model, [0, 2, 4]).config.layer_pattern == ("global",)
    assert reparam.drop_layers(model, [0, 2, 4]).config.window is None
    assert reparam.drop_layers(model, [1, 3]).config.layer_pattern == ("local",)
    sound(made)
    first = reparam.drop_layers(tiny("modernbert"), [0])
    assert first.config.first_attention_norm and not tiny("modernbert").config.first_attention_norm
    sound(first)


@pytest.mark.slow
def test_how_much_layers_change_what_they_read(tiny):
    """Block influence by hand, from the features of models that end earlier."""
    model = tiny("gpt2")
    bare = model.replace(params=model.params.replace(decoder=model.params.decoder.replace(norm=None)))
    empty = bare.params.decoder.replace(layers=tree.Layers((), ()))
    shorter = [bare.replace(params=bare.params.replace(decoder=empty))]
    shorter += [reparam.drop_layers(bare, range(n, 3)) for n in (1, 2)] + [bare]
    total, tokens = np.zeros(3), 0
    for batch in batches():
        xs = [np.asarray(m.features(batch["tokens"], segment_ids=batch["segment_ids"]), np.float64) for m in shorter]
        real = batch["segment_ids"] != 0
        for i, (x, y) in enumerate(zip(xs, xs[1:], strict=False)):
            cosine = (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
            total[i] += ((1 - cosine) * real).sum()
        tokens += real.sum()
    seen = reparam.layer_importance(model, batches())
    np.testing.assert_allclose(seen, total / tokens, rtol=1e-4)
    assert seen.dtype == np.float64 and len(set(seen)) == 3


def mean_loss(model):
    found = [cross_entropy(model, batch)[:2] for batch in batches()]
    return sum(float(total) for total, _ in found) / sum(float(weight) for _, weight in found)


@pytest.mark.slow
def test_how_much_the_loss_rises_without_a_layer(tiny):
    model = silenced(tiny(), 2)
    wanted = [mean_loss(reparam.drop_layers(model, [i])) - mean_loss(model) for i in range(3)]
    seen = reparam.layer_importance(model, batches(), measure="loss")
    np.testing.assert_allclose(seen, wanted, atol=1e-5)
    assert abs(seen[2]) < 1e-6 < min(abs(seen[:2]))


def test_the_least_important_layers_go(tiny):
    model = tiny()
    kept = reparam.prune_layers(model, 2, [0.3, 0.1, 0.2])
    wanted = reparam.drop_layers(model, [1])
    jax.tree.map(np.testing.assert_array_equal, kept, wanted)
    assert reparam.prune_layers(model, 3, [0.3, 0.1, 0.2]) is model
    assert reparam.least_important([0.3, 0.1, 0.1, 0.2], 1) == [1, 2, 3]


@pytest.mark.slow
def test_towers_of_an_encoder_decoder(tiny, answer, sound):
    model = tiny("t5")
    quiet = tree.map(jnp.zeros_like, model, r"^encoder/layers[1]/(attention/out|mlp/down)$")
    made = reparam.drop_layers(quiet, [1], tower="encoder")
    assert (made.config.num_encoder_layers, made.config.num_layers) == (2, 3)
    np.testing.assert_allclose(answer(made), answer(quiet), **CLOSE)
    sound(made)
    given = batches(encoder_tokens=np.random.default_rng(1).integers(1, 29, (2, 6)))
    for tower in ("encoder", "decoder"):
        assert reparam.layer_importance(quiet, given, tower=tower).shape == (3,)
    assert reparam.layer_importance(quiet, given, tower="encoder")[1] < 1e-6
    with pytest.raises(ConfigError, match="encoder and decoder: say which"):
        reparam.drop_layers(model, [1])


def test_merged_layers_are_the_weighted_sum(tiny, answer, sound):
    model = tiny()
    layers = stacks.layer_list(model.params.decoder.layers)
    made = stacks.layer_list(reparam.merge_layers(model, 1, 3, coefficients=[0.25, 0.75]).params.decoder.layers)
    assert len(made) == 2
    for one, a, b in zip(*map(jax.tree.leaves, (made[1], layers[1], layers[2])), strict=True):
        np.testing.assert_allclose(one, 0.25 * np.asarray(a, np.float64) + 0.75 * np.asarray(b, np.float64), atol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, made[0], layers[0])
    same = model.replace(params=model.params.replace(decoder=model.params.decoder.replace(layers=tree.Layers.of([
        jax.tree.map(lambda x: x[np.array([0, 1, 1])], model.params.decoder.layers.stacks[0])
    ]))))  # fmt: skip
    merged = reparam.merge_layers(same, 1, 3)
    np.testing.assert_allclose(answer(merged), answer(reparam.drop_layers(same, [2])), **CLOSE)
    sound(merged)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GROUPS)
def test_heads_that_add_nothing_go_without_a_trace(kind, tiny, answer, sound):
    kv = GROUPS[kind]
    model = zeroed(tiny("llama", num_kv_heads=kv, head_dim=6), "attention/out", [0, 1])
    made = reparam.prune_heads(model, 2)
    assert (made.config.num_heads, made.config.num_kv_heads, made.config.head_dim) == (2, max(1, kv // 2), 6)
    assert made.params.decoder.layers.stacks[0][0].attention.key.shape == (3, 16, max(1, kv // 2), 6)
    np.testing.assert_allclose(answer(made), answer(model), **CLOSE)
    state = made.start(2, 9)  # the cache is as small as the config says
    logits, _ = made.step(state, jnp.asarray(batches()[0]["tokens"], jnp.int32))
    full = jax.nn.log_softmax(made.logits(jnp.asarray(batches()[0]["tokens"], jnp.int32)))
    np.testing.assert_allclose(logits, full, **CLOSE)
    sound(made)


def test_smaller_groups_where_asked(tiny, answer):
    model = zeroed(tiny("llama", num_kv_heads=2), "attention/out", [1, 2])
    made = reparam.prune_heads(model, 2, 2)
    assert (made.config.num_heads, made.config.num_kv_heads) == (2, 2)
    np.testing.assert_allclose(answer(made), answer(model), **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "gemma"])
def test_heads_and_units_of_other_families(name, tiny, answer, sound):
    model = zeroed(zeroed(tiny(name), "/(attention|cross)/out$", [2, 3]), "mlp/down$", range(5, 20))
    made = reparam.prune_units(reparam.prune_heads(model, 2), 9)
    assert (made.config.num_heads, made.config.intermediate_size) == (2, 9)
    np.testing.assert_allclose(answer(made), answer(model), **CLOSE)
    sound(made)


def test_units_of_weights_of_other_kinds(tiny, answer, sound):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    low = lambda w: LowRank(draw(*w.shape[:2], 5), draw(w.shape[0], 5, *w.shape[2:]))  # noqa: E731
    lora = lambda w: LoRA(w, draw(*w.shape[:2], 2), draw(w.shape[0], 2, *w.shape[2:]))  # noqa: E731
    model = tree.map(
        lora,
        tree.map(low, tiny(), "mlp/up|attention/query", weights.is_weight),
        "mlp/gate|attention/key",
        weights.is_weight,
    )
    out = lambda w: LowRank(draw(*w.shape[:3], 5), draw(w.shape[0], 5, w.shape[3]), inputs=2)  # noqa: E731
    model = tree.map(low, tree.map(out, model, "attention/out", weights.is_weight), "mlp/down", weights.is_weight)
    model = zeroed(zeroed(model, "mlp/down/a", range(4)), "attention/out/a", [0, 1])
    made = reparam.keep_units(model, {f"decoder/layers[{i}]/mlp": range(4, 24) for i in range(3)})
    made = reparam.keep_heads(made, {f"decoder/layers[{i}]/attention": [2, 3] for i in range(3)})
    np.testing.assert_allclose(answer(made), answer(model), **CLOSE)
    layer = made.params.decoder.layers.stacks[0][0]
    assert (
        isinstance(layer.mlp.up, LowRank) and isinstance(layer.attention.key, LoRA) and layer.attention.out.inputs == 2
    )
    sound(made)


def test_layers_of_unlike_width(tiny, answer, sound):
    """The tree holds them; its config has the largest, and no other format can."""
    model = tiny()
    kept = {f"decoder/layers[{i}]/mlp": range(n) for i, n in enumerate((24, 10, 10))}
    made = reparam.keep_units(zeroed(model, "layers[1:]/mlp/down", range(10, 24)), kept)
    assert made.config.intermediate_size == 24 and made.params.decoder.layers.sizes == (1, 2)
    np.testing.assert_allclose(answer(made), answer(zeroed(model, "layers[1:]/mlp/down", range(10, 24))), **CLOSE)
    sound(made)
    with pytest.raises(ConfigError, match="have one shape for all"):
        lmx.save(made, "nowhere", format="hf")


@pytest.mark.slow
def test_importance_is_what_a_part_adds(tiny):
    """From moments: the root mean square of a head's or unit's own share of what is added, by hand."""
    model, given = tiny(), batches()
    grams = {
        p: m.input
        for seen in moments(model, given, "/(attention/out|mlp/down)$", want=["input"])
        for p, m in seen.items()
    }
    rng = np.random.default_rng(0)
    heads, units = reparam.head_importance(model, grams), reparam.unit_importance(model, grams)
    for i in range(3):
        layer = jax.tree.map(lambda x, i=i: np.asarray(x[i], np.float64), model.params.decoder.layers.stacks[0][0])
        for score, path, weight in (
            (heads, "attention/out", layer.attention.out), (units, "mlp/down", layer.mlp.down[:, None]),
        ):  # fmt: skip
            gram = grams[f"decoder/layers[{i}]/{path}"]
            x = rng.normal(size=(200_000, len(gram))) @ np.linalg.cholesky(gram + 1e-12 * np.eye(len(gram))).T
            added = np.einsum("nhc,hcd->nhd", x.reshape(len(x), *weight.shape[:2]), weight)
            wanted = np.sqrt(np.square(added).sum(-1).mean(0))
            np.testing.assert_allclose(score[f"decoder/layers[{i}]/{path.partition('/')[0]}"], wanted, rtol=0.03)
    assert reparam.unit_importance(model, {k: np.diag(v) for k, v in grams.items()}).keys() == units.keys()
    quiet = zeroed(model, "mlp/down", [3])
    assert all(score[3] == 0 for score in reparam.unit_importance(quiet, grams).values())
    assert all(score[3] == 0 and score[2] > 0 for score in reparam.unit_importance(quiet).values())
    alone = reparam.head_importance(zeroed(model, "attention/out", [1]))
    assert all(score[1] == 0 and score[0] > 0 for score in alone.values())


SMALL = dict(num_attention_heads=4, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
THEIRS = {
    "LlamaForCausalLM": SMALL | dict(num_key_value_heads=2),
    "GPT2LMHeadModel": dict(n_embd=16, n_layer=3, n_head=4, n_positions=20),
    "BertForTokenClassification": SMALL | dict(max_position_embeddings=20),
}


@pytest.mark.parametrize("class_name, fields", THEIRS.items())
def test_a_smaller_model_of_its_family(class_name, fields, tmp_path):
    """transformers loads it, and computes what lmx does."""
    torch = pytest.importorskip("torch", reason="transformers is the oracle; install the extra 'oracle'")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cls = getattr(transformers, class_name)
    theirs = cls(cls.config_class(vocab_size=29, **fields)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    model = lmx.load(tmp_path / "theirs")
    made = reparam.prune_units(reparam.prune_layers(model, 2, reparam.layer_importance(model, batches())), 10)
    if class_name.startswith("Llama"):  # the others' configs have no width of a head
        made = reparam.prune_heads(made, 2)
    lmx.save(made, tmp_path / "smaller", format="hf", like=tmp_path / "theirs")
    again, info = cls.from_pretrained(tmp_path / "smaller", output_loading_info=True)
    assert not any(info.values()), info
    assert again.num_parameters() < theirs.num_parameters()
    tokens = np.random.default_rng(2).integers(1, 29, (2, 9))
    with torch.no_grad():
        wanted = again.eval().double()(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(made.logits(jnp.asarray(tokens, jnp.int32)), wanted, **CLOSE)
    if not class_name.startswith("Llama"):
        with pytest.raises(ConfigError, match="head_dim"):
            lmx.save(reparam.prune_heads(made, 2), tmp_path / "heads", format="hf", like=tmp_path / "theirs")


PADDING = [{"tokens": np.ones((1, 4), int), "segment_ids": np.zeros((1, 4), int)}]
PATHS = [f"decoder/layers[{i}]/" for i in range(3)]


@pytest.mark.parametrize("call, said", [
    (lambda m: reparam.drop_layers(m, [3]), "no layer 3; they are numbered 0 to 2"),
    (lambda m: reparam.drop_layers(m, [0, 1, 2]), "keep at least one"),
    (lambda m: reparam.drop_layers(m, [0], tower="encoder"), "has decoder: say which"),
    (lambda m: reparam.prune_layers(m, 0, [1, 2, 3]), "1 to 3 can stay, not 0"),
    (lambda m: reparam.prune_layers(m, 2, [1, 2]), "must be 3 finite numbers"),
    (lambda m: reparam.prune_layers(m, 2, [1, 2, np.nan]), "must be 3 finite numbers"),
    (lambda m: reparam.layer_importance(m, []), "no token that counts"),
    (lambda m: reparam.layer_importance(m, PADDING), "no token"),
    (lambda m: reparam.layer_importance(m, batches(), measure="cosin"), "did you mean 'cosine'"),
    (lambda m: reparam.layer_importance(reparam.drop_layers(m, [0, 1]), batches(), measure="loss"), "has one layer"),
    (lambda m: reparam.merge_layers(m, 1, 2), "no two or more neighbours"),
    (lambda m: reparam.merge_layers(m, 1, 4), "no two or more neighbours"),
    (lambda m: reparam.merge_layers(m, 0, 2, coefficients=[1.0, 1.0]), "sum to 1"),
    (lambda m: reparam.prune_heads(m, 3), "cannot become 3 in 2"),
    (lambda m: reparam.prune_heads(m, 8), "cannot become 8 in 4"),
    (lambda m: reparam.prune_heads(m, 4, 1), "cannot have 4; ask for more key-value heads"),
    (lambda m: reparam.prune_heads(m, 2, importance={}), "4 finite numbers for decoder/layers.0./attention"),
    (lambda m: reparam.prune_units(m, 25), "1 to 24 can stay, not 25"),
    (lambda m: reparam.prune_units(m, 5, importance={p + "mlp": [np.nan] * 24 for p in PATHS}), "24 finite numbers"),
    (lambda m: reparam.keep_heads(m, {}), "every attention is to be named once"),
    (lambda m: reparam.keep_heads(m, {p + "attention": [0, 2, 3] for p in PATHS}), "groups of heads .* unlike size"),
    (lambda m: reparam.keep_heads(m, {p + "attention": [0, 4] for p in PATHS}), "name some of 0 to 3"),
    (lambda m: reparam.keep_heads(m, {p + "attention": [0, 1][: i + 1] for i, p in enumerate(PATHS)}), "keep as many"),
    (lambda m: reparam.keep_units(m, {p + "mlp": [] for p in PATHS}), "at least one"),
    (lambda m: reparam.keep_units(m, {p + "mlp": [3, 2] for p in PATHS}), "in order"),
    (lambda m: reparam.head_importance(m, {}), "finite second moments .16, 16."),
])  # fmt: skip
def test_bad_input(call, said, tiny):
    with pytest.raises(ConfigError, match=said):
        call(tiny())


def test_what_cannot_be_cut(tiny):
    with pytest.raises(ConfigError, match="normalised over all heads"):
        reparam.prune_heads(tiny(qk_norm="full"), 2)
    low = tree.map(lambda w: LowRank(w[..., :2], w[:, :2]), tiny(), "mlp/up", weights.is_weight)
    with pytest.raises(ConfigError, match="of the kind LowRank, whose factors have no mean"):
        reparam.merge_layers(low, 0, 2)
    with pytest.raises(ConfigError, match="unlike kind or shape .local, global."):
        reparam.merge_layers(tiny("gemma"), 0, 2)
    with pytest.raises(ConfigError, match="share a bias by distance"):
        model = tiny("t5")
        kept = {path: [0, 1] for path in reparam.head_importance(model)}
        reparam.keep_heads(model, kept | {"decoder/layers[1]/attention": [0, 2]})


def test_sharded_equals_unsharded(tiny, tmp_path):
    def make(model):
        model = reparam.prune_layers(
            model, 2, reparam.layer_importance(model, batches(tokens=np.arange(18).reshape(2, 9)))
        )
        return reparam.prune_units(reparam.prune_heads(model, 2), 8)

    lmx.save(tiny(), tmp_path / "m")
    wanted = make(tiny())
    with sharding.use_mesh("fsdp=2,tensor=2,data=2"):
        made = make(lmx.load(tmp_path / "m"))
        places = specs.shardings(made.specs())
    for (path, x), (_, y), (_, place) in zip(*map(tree.paths, (made, wanted, places)), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim), path
        np.testing.assert_array_equal(x, y, err_msg=str(path))
