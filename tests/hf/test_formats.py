"""Formats on disk: dtypes, files, meshes, models that surgery has changed, models that were born in lmx."""

from __future__ import annotations

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import lmx
from lmx import hf
from lmx.core import sharding, specs, tree
from lmx.core.arrays import open_arrays, write_arrays
from lmx.core.errors import ConfigError, FolderError
from lmx.core.kinds import LowRank
from lmx.models import stacks

WEIGHTS = "model.safetensors"


def same(one, other) -> bool:
    """Whether two models have the same config and numbers, whatever their stacks."""
    alike = lambda m: stacks.restack(m).params  # noqa: E731
    equal = jax.tree.map(lambda x, y: bool((x == y).all()) and x.dtype == y.dtype, alike(one), alike(other))
    return one.config == other.config and all(jax.tree.leaves(equal))


def test_a_round_trip_is_exact(tiny, folder):
    assert same(hf.load(folder), tiny)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_names_with_and_without_the_prefix_are_read(tiny, folder, tmp_path):
    hf.save(tiny.replace(config=tiny.config.replace(head="none"), params=tiny.params.replace(head=None)),
            tmp_path / "bare", format="hf")  # fmt: skip
    names = open_arrays(tmp_path / "bare" / WEIGHTS)
    assert "layers.0.mlp.up_proj.weight" in names and "embed_tokens.weight" in names
    bare = hf.load(tmp_path / "bare")
    assert bare.params.head is None and (bare.params.embed.tokens == tiny.params.embed.tokens).all()


def respelled(folder, change) -> None:
    """The checkpoint with its dict of tensors changed."""
    arrays = change({name: np.array(array) for name, array in open_arrays(folder / WEIGHTS).items()})
    write_arrays(folder / WEIGHTS, arrays, arrays.__getitem__)


def test_a_head_beside_a_body_without_prefix(tiny, folder):
    respelled(folder, lambda a: {name.removeprefix("model."): array for name, array in a.items()})
    assert same(hf.load(folder), tiny)


@pytest.mark.parametrize("both", [True, False], ids=["both", "only the copy"])
def test_a_tied_head_that_is_stored(made, tiny, tmp_path, both):
    model = made(tiny.config.replace(tie_embeddings=True))
    hf.save(model, tmp_path / "m", format="hf")
    assert "lm_head.weight" not in open_arrays(tmp_path / "m" / WEIGHTS)
    copied = lambda a: a | {"lm_head.weight": a["model.embed_tokens.weight"]}  # noqa: E731
    alone = lambda a: {n: x for n, x in copied(a).items() if n != "model.embed_tokens.weight"}  # noqa: E731
    respelled(tmp_path / "m", copied if both else alone)
    assert same(hf.load(tmp_path / "m"), model)


@pytest.mark.parametrize(
    ("stored", "asked", "got"),
    [
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("float32", None, "float32"),
        ("float16", "float16", "float16"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_dtypes(tiny, tmp_path, stored, asked, got):
    wanted = jax.tree.map(lambda x: x.astype(stored), tiny)
    hf.save(wanted, tmp_path / "m", format="hf")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    assert values["dtype"] == stored
    assert {str(a.dtype) for a in open_arrays(tmp_path / "m" / WEIGHTS).values()} == {stored}
    model = hf.load(tmp_path / "m", dtype=asked)
    leaves = jax.tree.leaves(model)
    assert {str(x.dtype) for x in leaves} == {got}
    assert all((x == y.astype(got)).all() for x, y in zip(leaves, jax.tree.leaves(wanted), strict=True))
    assert model.config.dtype == got and model.config.compute_dtype == "auto"
    assert specs.count(model.specs()) == specs.count(model)
    if asked is None:
        assert {x.dtype for x in jax.tree.leaves(hf.load_shapes(tmp_path / "m"))} == {jnp.dtype(stored)}
        hf.save(model, tmp_path / "again", format="hf")
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "m" / WEIGHTS).read_bytes()


def test_leaves_of_several_dtypes_stay_as_they_are(tiny, tmp_path):
    mixed = tree.map(lambda x: x.astype(jnp.float16), tiny, "mlp/|head")
    hf.save(mixed, tmp_path / "m", format="hf")
    assert {x.dtype.name for x in open_arrays(tmp_path / "m" / WEIGHTS).values()} == {"float16", "float32"}
    model = hf.load(tmp_path / "m")
    assert jax.tree.map(lambda x: x.dtype, model.params) == jax.tree.map(lambda x: x.dtype, mixed.params)
    hf.save(model, tmp_path / "again", format="hf")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "m" / WEIGHTS).read_bytes()


def tpu_mesh() -> AbstractMesh:
    """Devices that are not here, for programs that are only traced."""
    chip = AbstractDevice("TPU v5 lite", 1, "tpu")
    return AbstractMesh((1,), ("fsdp",), axis_types=(AxisType.Explicit,), abstract_device=chip)


def test_where_it_is_used_decides_what_it_computes_in(tiny, tmp_path):
    """A bfloat16 model that was read and saved on a CPU computes in bfloat16 on an accelerator, and here in float32."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny)
    hf.save(half, tmp_path / "theirs", format="hf")
    hf.save(hf.load(tmp_path / "theirs"), tmp_path / "ours")
    tokens = jnp.arange(8)[None]
    for model in (hf.load(tmp_path / "theirs"), hf.load(tmp_path / "ours")):
        assert model.features(tokens).dtype == jnp.float32
        with sharding.use_mesh(tpu_mesh()):
            assert model.config.activation_dtype == "bfloat16"
            assert jax.eval_shape(lambda m: m.features(tokens), model).dtype == jnp.bfloat16
            assert jax.eval_shape(lambda m: m.start(1, 4), model).caches[0].key.dtype == jnp.bfloat16
    wide = hf.load(tmp_path / "ours", dtype="float32")
    with sharding.use_mesh(tpu_mesh()):
        assert wide.config.activation_dtype == "float32"


def test_float16_models_compute(tiny):
    """On a CPU as in float32; asked to, in float16."""
    half = jax.tree.map(lambda x: (0.3 * x).astype(jnp.float16), tiny)
    half = half.replace(config=half.config.replace(dtype="float16", compute_dtype="auto"))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    tokens = jnp.arange(8)[None]
    np.testing.assert_array_equal(half.logits(tokens), wide.logits(tokens))
    narrow = half.replace(config=half.config.replace(compute_dtype="float16"))
    assert narrow.features(tokens).dtype == jnp.float16
    np.testing.assert_allclose(narrow.logits(tokens), wide.logits(tokens), atol=2e-2)


def test_several_files(tiny, tmp_path):
    hf.save(tiny, tmp_path / "m", format="hf", max_file_bytes=10_000)
    files = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 12_000 for file in files)
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert same(hf.load(tmp_path / "m"), tiny)


def test_shapes_come_without_reading(tiny, folder):
    (folder / WEIGHTS).unlink()
    shapes = hf.load_shapes(folder)
    assert jax.tree.map(lambda x: x.shape, shapes.params) == jax.tree.map(lambda x: x.shape, tiny.params)


def test_no_device_holds_a_sharded_leaf_whole(mesh, folder):
    model = hf.load(folder)
    split = 0
    for (path, x), spec in zip(tree.paths(model), jax.tree.leaves(model.specs()), strict=True):
        wanted = lmx.core.sharding.named_sharding(spec.axes, spec.shape, mesh)
        assert x.sharding.is_equivalent_to(wanted, x.ndim), str(path)
        if not wanted.is_fully_replicated:
            split += 1
            assert all(shard.data.size < x.size for shard in x.addressable_shards), str(path)
    assert split == 9
    with lmx.use_mesh(None):
        plain = hf.load(folder)
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(plain), strict=True)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs)


def test_a_sharded_model_saves_as_a_whole(mesh, folder, tmp_path):
    hf.save(hf.load(folder), tmp_path / "again", format="hf", like=folder)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_other_kinds_of_weight_are_written_out_aloud(tiny, tmp_path, caplog):
    key = jax.random.key(1)
    a, b = jax.random.normal(key, (3, 16, 4)), jax.random.normal(key, (3, 4, 32))
    thin = lambda w: LowRank(a, b) if w.shape == (3, 16, 32) else w  # noqa: E731
    model = tree.map(thin, tiny, "mlp/up")
    with caplog.at_level(logging.WARNING, "lmx"):
        hf.save(model, tmp_path / "m", format="hf")
    assert "3 weights of the kind LowRank are written as plain matrices" in caplog.text
    up = hf.load(tmp_path / "m").params.decoder.layers.stacks[0][0].mlp.up
    np.testing.assert_allclose(up, jnp.einsum("lir,lro->lio", a, b), atol=1e-5)


def test_layers_in_several_stacks(tiny, tmp_path):
    hf.save(lmx.unstack(tiny), tmp_path / "m", format="hf")
    assert same(hf.load(tmp_path / "m"), tiny)


BORN = {
    "llama": {},
    "mistral": {"layer_pattern": ("local",), "window": 8},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": "head"},
    "gpt2": {
        "norm": "layernorm", "norm_bias": True, "position": "learned", "max_length": 32, "activation": "gelu_tanh",
        "attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "num_kv_heads": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", BORN)
def test_the_family_of_a_model_born_here(made, tiny, family, tmp_path):
    config = tiny.config.replace(**BORN[family])
    hf.save(made(config), tmp_path / "m", format="hf")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == family
    assert hf.load(tmp_path / "m").config == config


def test_what_no_family_can_express(made, tiny, tmp_path):
    model = made(tiny.config.replace(norm_placement="both", logit_scale=0.5))
    with pytest.raises(ConfigError, match="'llama', which does not have norm_placement='both', logit_scale=0.5"):
        hf.save(model, tmp_path / "m", format="hf")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="of the family 'gpt2' do not have"):
        hf.save(tiny, tmp_path / "m", format="hf", like="gpt2")


def test_a_model_whose_layers_differ_in_width(tiny, tmp_path):
    layers = stacks.layer_list(tiny.params.decoder.layers)
    cut = layers[1].replace(mlp=jax.tree.map(lambda x: x[..., :20] if x.shape[-1] == 32 else x[:20], layers[1].mlp))
    decoder = tiny.params.decoder.replace(layers=stacks.stack_layers([layers[0], cut, layers[2]]))
    model = tiny.replace(params=tiny.params.replace(decoder=decoder))
    with pytest.raises(ConfigError, match=r"decoder/layers\[1\]/mlp/.* has the shape .*one shape for all"):
        hf.save(model, tmp_path / "m", format="hf")


def test_fields_that_lmx_does_not_know_travel_back(folder, edit, tmp_path):
    edit(attention_dropout=0.25, bos_token_id=5, eos_token_id=[6, 7], made_by="somebody", torch_dtype="float32")
    model = hf.load(folder)
    hf.save(model, tmp_path / "same", format="hf", like=folder)
    read = lambda name: json.loads((tmp_path / name / "config.json").read_text())  # noqa: E731
    assert read("same") == json.loads((folder / "config.json").read_text())
    told = json.loads((tmp_path / "same" / "generation_config.json").read_text())
    assert (told["bos_token_id"], told["eos_token_id"]) == (5, [6, 7])
    other = model.replace(config=model.config.replace(rope_theta=77.0))
    hf.save(other, tmp_path / "other", format="hf", like=folder)
    assert read("other")["made_by"] == "somebody" and read("other")["rope_theta"] == 77.0
    assert hf.load(tmp_path / "other").config.rope_theta == 77.0


def test_a_new_model_says_how_its_texts_end(made, tiny, tmp_path):
    tokenizer = lmx.data.tokenizers.train_bpe(["a b"] * 3, 300)
    model = made(tiny.config.replace(vocab_size=300))
    hf.save(model, tmp_path / "m", tokenizer=tokenizer, format="hf")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    assert values["eos_token_id"] == tokenizer.eos_id and values["bos_token_id"] is values["pad_token_id"] is None
    assert lmx.load_tokenizer(tmp_path / "m").encode("a b") == tokenizer.encode("a b")


def test_what_is_there_is_not_overwritten(tiny, folder, tmp_path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FolderError, match="exists"):
        hf.save(tiny, folder, format="hf")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letters.txt").write_text("dear")
    with pytest.raises(FolderError, match="not overwritten"):
        hf.save(tiny, tmp_path / "other", format="hf", overwrite=True)


def test_overwriting_replaces_the_files_of_the_format_and_no_others(made, tiny, folder):
    hf.save(tiny, folder, format="hf", overwrite=True, max_file_bytes=10_000, tokenizer=lmx.data.byte_tokenizer())
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: main")
    strange = {"README.md": "card", "notes.json": "{}", "thesis.tex": "years of work", "weights.safetensors": "mine"}
    for name, text in strange.items():
        (folder / name).write_text(text)
    (folder / "link").symlink_to("nowhere")
    for options in ({"format": "hf"}, {}, {"format": "hf"}):
        other = made(tiny.config.replace(rope_theta=77.0))
        hf.save(other, folder, overwrite=True, **options)
        assert same(hf.load(folder), other)
        owned = {"config.json", WEIGHTS} | ({"generation_config.json"} & {p.name for p in folder.iterdir()})
        owned |= {"structure.json"} if not options else set()
        assert {p.name for p in folder.iterdir()} == {*owned, ".git", "link", *strange}
    assert {name: (folder / name).read_text() for name in strange} == strange
    assert (folder / ".git" / "HEAD").read_text() == "ref: main" and (folder / "link").is_symlink()
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_options_that_contradict_each_other(tiny, folder, tmp_path):
    for options, said in (
        ({"format": "hff"}, "did you mean 'hf'"),
        ({"like": "llama"}, "give format='hf' too"),
        ({"format": "hf", "notes": {}}, "no place for notes"),
        ({"format": "hf", "like": "lama"}, "neither a folder that knows"),
    ):
        with pytest.raises(ConfigError, match=said):
            hf.save(tiny, tmp_path / "m", **options)
    with pytest.raises(ConfigError, match="a Unigram has no form"):
        counts = lmx.models.unigram.Unigram(jnp.zeros(4))
        hf.save(counts, tmp_path / "m", format="hf")
