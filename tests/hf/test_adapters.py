"""LoRA adapters in PEFT's format: against PEFT, against what the files say, and adapters that cannot be right."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx import hf
from lmx.core.arrays import open_arrays, write_arrays
from lmx.core.errors import ConfigError, FolderError
from lmx.core.kinds import LoRA, LowRank
from lmx.core.sharding import use_mesh
from lmx.hf.adapters import load_adapter, save_adapter

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
LLAMA = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 37, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 20}
CASES = {
    "llama": ("LlamaForCausalLM", LLAMA, {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"^model.layers.2.mlp.down_proj": 3},
    }),
    "gpt2": ("GPT2LMHeadModel", GPT2, {
        "r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "mlp.c_proj"], "use_rslora": True, "fan_in_fan_out": True,
    }),
    "labels": ("LlamaForSequenceClassification", LLAMA | {"num_labels": 3, "pad_token_id": 0, "num_hidden_layers": 1}, {
        "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "task_type": "SEQ_CLS",
    }),
}  # fmt: skip


def rewrite(folder, tensors=lambda arrays: None, **fields) -> None:
    """The same adapter with its dict of tensors, and fields of its config, changed."""
    arrays = {name: np.array(array) for name, array in open_arrays(folder / WEIGHTS).items()}
    tensors(arrays)
    write_arrays(folder / WEIGHTS, arrays, arrays.__getitem__)
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def adapter(folder, modules: dict[str, tuple[int, int, int]], **fields) -> None:
    """An adapter by hand: module -> (rank, inputs, outputs)."""
    rng, arrays = np.random.default_rng(0), {}
    for module, (rank, inputs, outputs) in modules.items():
        arrays[f"{PREFIX}{module}.lora_A.weight"] = rng.normal(size=(rank, inputs)).astype(np.float32)
        arrays[f"{PREFIX}{module}.lora_B.weight"] = rng.normal(size=(outputs, rank)).astype(np.float32)
    folder.mkdir()
    write_arrays(folder / WEIGHTS, arrays, arrays.__getitem__)
    usual = {"peft_type": "LORA", "r": next(iter(modules.values()))[0], "lora_alpha": 5}
    (folder / CONFIG).write_text(json.dumps(usual | fields))


def check_merged(base, folder, tmp_path, like: str, scale: float, flipped: tuple[str, ...] = ()) -> None:
    """What the model with the adapter is when written whole: the stored weights plus scale B A."""
    hf.save(base, tmp_path / "base", format="hf", like=like)
    hf.save(lmx.fold(load_adapter(base, folder)), tmp_path / "merged", format="hf", like=like)
    wanted = {name: np.array(x) for name, x in open_arrays(tmp_path / "base/model.safetensors").items()}
    stored = open_arrays(folder / WEIGHTS)
    for name in stored:
        if name.endswith("lora_A.weight"):
            update = scale * stored[name.replace("lora_A", "lora_B")] @ stored[name]
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            wanted[f"{module}.weight"] += update.T if module.endswith(flipped or "no such") else update
    merged = open_arrays(tmp_path / "merged/model.safetensors")
    for name, array in wanted.items():
        np.testing.assert_allclose(merged[name], array, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def trained(torch_model, tmp_path_factory):
    """`trained(case) -> (folder of the base, folder of the adapter, logits with it, merged weights)`, by PEFT."""
    peft = pytest.importorskip("peft", reason="the oracle is PEFT; install the extra 'oracle'")
    import torch

    def make(case: str):
        name, fields, options = CASES[case]
        folder = tmp_path_factory.mktemp(case)
        base = torch_model(name, fields)
        base.save(folder / "base")
        model = peft.get_peft_model(base.model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", **options}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3)
        model.save_pretrained(folder / "adapter")
        logits = model.eval().double()(input_ids=torch.tensor(TOKENS)).logits.detach().numpy()
        return folder / "base", folder / "adapter", logits, model.merge_and_unload().state_dict()

    return make


TOKENS = np.random.default_rng(0).integers(3, 37, (2, 9))


@pytest.mark.parametrize("case", CASES)
def test_as_peft_computes_and_merges(trained, tmp_path, case):
    import peft
    import torch
    import transformers

    base, folder, logits, merged = trained(case)
    plain = hf.load(base)
    model = load_adapter(plain, folder)
    few = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    compute = jax.jit(lambda m, x: m.logits(x)).lower(model, TOKENS).compile(compiler_options=few)
    ours = compute(model, jnp.asarray(TOKENS))
    np.testing.assert_allclose(ours, logits, atol=2e-5)
    hf.save(lmx.fold(model), tmp_path / "merged", format="hf", like=base)
    for name, array in open_arrays(tmp_path / "merged/model.safetensors").items():
        np.testing.assert_allclose(array, merged[name].numpy(), atol=1e-6, err_msg=name)

    save_adapter(model, tmp_path / "again", base=base)
    one, two = open_arrays(folder / WEIGHTS), open_arrays(tmp_path / "again" / WEIGHTS)
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)
    again = getattr(transformers, CASES[case][0]).from_pretrained(base, attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "again").eval().double()
    theirs = again(input_ids=torch.tensor(TOKENS)).logits.detach().numpy()
    np.testing.assert_allclose(theirs, logits, atol=1e-9)
    said = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert said["base_model_name_or_path"] == str(base) and said["fan_in_fan_out"] == (case == "gpt2")
    assert set(said["target_modules"]) == set(CASES[case][2]["target_modules"])
    assert said["modules_to_save"] == (["score"] if case == "labels" else None)


def test_stacks_are_cut_where_ranks_differ(tiny, tmp_path):
    module = "model.layers.{}.self_attn.q_proj".format
    adapter(tmp_path / "a", {module(0): (4, 16, 16), module(1): (4, 16, 16), module(2): (2, 16, 16)},
            rank_pattern={"layers.2.self_attn.q_proj": 2})  # fmt: skip
    model = load_adapter(tiny, tmp_path / "a")
    assert model.params.decoder.layers.sizes == (2, 1)
    assert [s[0].attention.query.rank for s in model.params.decoder.layers.stacks] == [4, 2]
    assert model.specs().params.decoder.layers.stacks[0][0].attention.query.lora_a.axes == ("layers", "embed", "rank")
    with pytest.raises(ConfigError, match="need 2 stacks, more than max_stacks=1"):
        load_adapter(tiny, tmp_path / "a", max_stacks=1)


def test_layers_without_an_update_stay_as_they_are(tiny, tmp_path):
    adapter(tmp_path / "a", {"model.layers.1.mlp.up_proj": (4, 16, 32), "lm_head": (4, 16, 40)})
    model = load_adapter(tiny, tmp_path / "a")
    assert model.params.decoder.layers.sizes == (1, 1, 1)
    kinds = [type(stack[0].mlp.up).__name__ for stack in model.params.decoder.layers.stacks]
    assert kinds[0] == kinds[2] != "LoRA" and kinds[1] == "LoRA" and isinstance(model.params.head.out, LoRA)
    check_merged(tiny, tmp_path / "a", tmp_path, "llama", 5 / 4)
    save_adapter(model, tmp_path / "b")
    said = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert said["target_modules"] == ["1.mlp.up_proj", "lm_head"]


@pytest.mark.parametrize(("like", "modules"), [
    ("phi3", {"self_attn.qkv_proj": (3, 16, 32), "mlp.gate_up_proj": (3, 16, 64), "self_attn.o_proj": (3, 16, 16)}),
    ("gpt_neox", {"attention.query_key_value": (3, 16, 48), "attention.dense": (3, 16, 16)}),
    ("gpt2", {"attn.c_attn": (3, 16, 48), "mlp.c_fc": (3, 16, 32)}),
])  # fmt: skip
def test_weights_that_hold_several(made, tiny, tmp_path, like, modules):
    config = tiny.config
    if like != "phi3":
        plain = {"activation": "gelu", "norm": "layernorm", "norm_bias": True, "mlp_bias": True, "attention_bias": True}
        learned = {"position": "learned", "max_length": 32} if like == "gpt2" else {"parallel_residual": True}
        config = config.replace(**plain, attention_out_bias=True, num_kv_heads=4, **learned)
    base = made(config)
    layer = {"phi3": "model.layers", "gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}[like]
    names = {f"{layer}.{i}.{name}": shape for i in range(3) for name, shape in modules.items()}
    adapter(tmp_path / "a", names, use_rslora=True)
    flipped = ("c_attn", "c_fc") if like == "gpt2" else ()
    check_merged(base, tmp_path / "a", tmp_path, like, 5 / 3**0.5, flipped)
    save_adapter(load_adapter(base, tmp_path / "a"), tmp_path / "b", base=like)
    one, two = open_arrays(tmp_path / "a" / WEIGHTS), open_arrays(tmp_path / "b" / WEIGHTS)
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


def lora(weight, inputs: int, rank: int = 2, seed: int = 0) -> LoRA:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    copies = weight.shape[:1] if weight.ndim > 2 else ()
    ins, outs = weight.shape[len(copies) : len(copies) + inputs], weight.shape[len(copies) + inputs :]
    return LoRA(weight, draw(*copies, *ins, rank), draw(*copies, rank, *outs), inputs=inputs, alpha=3.0)


def with_attention(model, **changes):
    layers = model.params.decoder.layers
    block = layers.stacks[0][0]
    stacks = ((block.replace(attention=block.attention.replace(**changes)),),)
    tower = model.params.decoder.replace(layers=layers.replace(stacks=stacks))
    return model.replace(params=model.params.replace(decoder=tower))


def test_leaves_of_one_weight_share_a(tiny, tmp_path):
    held = tiny.params.decoder.layers.stacks[0][0].attention
    model = with_attention(tiny, query=lora(held.query, 1), value=lora(held.value, 1, seed=1))
    save_adapter(model, tmp_path / "apart", base="llama")
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.qkv_proj is one weight of 3 leaves.*A here differ"):
        save_adapter(model, tmp_path / "a", base="phi3")
    assert not (tmp_path / "a").exists()
    model = with_attention(tiny, query=lora(held.query, 1), value=lora(held.value, 1, rank=3))
    with pytest.raises(ConfigError, match="unlike ranks or alphas"):
        save_adapter(model, tmp_path / "a", base="phi3")
    save_adapter(with_attention(tiny, query=lora(held.query, 1)), tmp_path / "a", base="phi3")
    stored = open_arrays(tmp_path / "a" / WEIGHTS)[f"{PREFIX}model.layers.1.self_attn.qkv_proj.lora_B.weight"]
    assert stored[:16].all() and not stored[16:].any()


def test_embeddings_and_modules_trained_whole(made, tiny, tmp_path):
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    base = made(tiny.config.replace(head="sequence", num_labels=3, pool="last"))
    adapter(tmp_path / "a", {"model.layers.0.mlp.up_proj": (4, 16, 32)}, modules_to_save=["score"])
    name, score = f"{PREFIX}model.embed_tokens.lora_embedding_", draw(3, 16)
    more = {f"{name}A": draw(4, 40), f"{name}B": draw(16, 4), f"{PREFIX}score.weight": score}
    rewrite(tmp_path / "a", lambda arrays: arrays.update(more))
    model = load_adapter(base, tmp_path / "a")
    np.testing.assert_array_equal(model.params.head.out, score.T)
    rows = np.asarray(lmx.fold(model).params.embed.tokens) - base.params.embed.tokens
    np.testing.assert_allclose(rows, 5 / 4 * (more[f"{name}B"] @ more[f"{name}A"]).T, atol=1e-5)
    save_adapter(model, tmp_path / "b")
    stored = open_arrays(tmp_path / "b" / WEIGHTS)
    assert (stored[f"{name}A"] == more[f"{name}A"]).all() and (stored[f"{name}B"] == more[f"{name}B"]).all()
    tied = made(tiny.config.replace(tie_embeddings=True))
    rewrite(tmp_path / "a", lambda arrays: arrays.pop(f"{PREFIX}score.weight"))
    with pytest.raises(ConfigError, match="adapts model.embed_tokens, whose weight another module"):
        load_adapter(tied, tmp_path / "a")


def test_on_a_mesh(tiny, tmp_path):
    adapter(tmp_path / "a", {f"model.layers.{i}.mlp.up_proj": (4, 16, 32) for i in range(3)})
    wanted = load_adapter(tiny, tmp_path / "a").params.decoder.layers.stacks[0][0].mlp.up
    hf.save(tiny, tmp_path / "base", format="hf", like="llama")
    with use_mesh("fsdp=4,tensor=2"):
        up = load_adapter(hf.load(tmp_path / "base"), tmp_path / "a").params.decoder.layers.stacks[0][0].mlp.up
        assert up.lora_a.addressable_shards[0].data.shape == (3, 4, 4)
        assert up.lora_b.addressable_shards[0].data.shape == (3, 4, 16)
        save_adapter(load_adapter(hf.load(tmp_path / "base"), tmp_path / "a"), tmp_path / "b")
    assert (np.asarray(up.lora_a) == wanted.lora_a).all() and (np.asarray(up.lora_b) == wanted.lora_b).all()
    one, two = open_arrays(tmp_path / "a" / WEIGHTS), open_arrays(tmp_path / "b" / WEIGHTS)
    assert all((one[name] == two[name]).all() for name in one)


@pytest.fixture
def given(tmp_path):
    adapter(tmp_path / "a", {f"model.layers.{i}.mlp.up_proj": (4, 16, 32) for i in range(3)})
    return tmp_path / "a"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_updates_have_the_dtype_they_are_stored_in(tiny, given, dtype):
    rewrite(given, lambda arrays: arrays.update({name: x.astype(jnp.dtype(dtype)) for name, x in arrays.items()}))
    up = load_adapter(tiny, given).params.decoder.layers.stacks[0][0].mlp.up
    assert up.lora_a.dtype == up.lora_b.dtype == dtype and up.base.dtype == "float32"


@pytest.mark.parametrize(("fields", "said"), [
    ({"use_dora": True}, "use_dora True: DoRA scales each output.*merge_and_unload"),
    ({"peft_type": "IA3"}, "peft_type 'IA3'; lmx reads LORA"),
    ({"bias": "all"}, "bias 'all': it also trained biases"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4', which changes the base's own"),
    ({"layer_replication": [[0, 2]]}, "it repeats layers of its base"),
    ({"some_new_kind": {"x": 1}}, "some_new_kind.*lmx does not know what it changes"),
    ({"alpha_pattern": {"(": 2}}, "make no sense"),
    ({"lora_alpha": "big"}, "make no sense"),
])  # fmt: skip
def test_adapters_that_lmx_does_not_compute(tiny, given, fields, said):
    rewrite(given, **fields)
    with pytest.raises(ConfigError, match=said):
        load_adapter(tiny, given)


FIRST, NEXT, LAST = (f"model.layers.{i}.mlp.up_proj." for i in (0, 1, 7))
A, B = "lora_A.weight", "lora_B.weight"


@pytest.mark.parametrize(("added", "error", "said"), [
    ({f"{FIRST}lora_magnitude_vector.weight": (32,)}, ConfigError, "lora_magnitude_vector.*no part of a plain LoRA"),
    ({"lm_head.lora_A.weight": (4, 16)}, FolderError, "of lm_head it has lora_A alone"),
    ({f"{NEXT}{B}": (48, 4)}, FolderError,
     r"lora_B of model\.layers\.1\.mlp\.up_proj has the shape \(48, 4\).*must be \(32, 4\).*another base"),
    ({f"{LAST}{A}": (4, 16), f"{LAST}{B}": (32, 4)}, FolderError,
     r"another base: it has model\.layers\.7\.mlp\.up_proj, and the modules of this LlamaForCausalLM"),
    ({f"model.norm.{A}": (4, 16), f"model.norm.{B}": (16, 4)}, FolderError, "model.norm, which is no matrix"),
    ({"classifier.weight": (4, 16)}, FolderError, "another base: it has classifier.weight"),
    ({"model.norm.weight": (8,)}, FolderError, r"model.norm.weight has the shape \(8,\), in this model.*\(16,\)"),
    ({"model.layers.0.input_layernorm.weight": (16,)}, ConfigError, "only outside of layers"),
])  # fmt: skip
def test_adapters_for_another_base_and_damaged_ones(tiny, given, added, error, said):
    rewrite(given, lambda a: a.update({f"{PREFIX}{name}": np.ones(x, np.float32) for name, x in added.items()}))
    with pytest.raises(error, match=said):
        load_adapter(tiny, given)


def test_a_rank_that_its_config_contradicts(tiny, given):
    rewrite(given, r=8)
    with pytest.raises(FolderError, match=r"shape \(4, 16\).*the rank 8 that adapter_config.json says.*\(8, 16\)"):
        load_adapter(tiny, given)


def test_folders_that_hold_no_adapter(tiny, given, tmp_path):
    (given / WEIGHTS).rename(given / "adapter_model.bin")
    with pytest.raises(FolderError, match="only as adapter_model.bin. lmx opens no pickles"):
        load_adapter(tiny, given)
    (given / CONFIG).write_text("{")
    with pytest.raises(FolderError, match="adapter_config.json is damaged"):
        load_adapter(tiny, given)
    with pytest.raises(FolderError, match="holds no adapter in PEFT's format"):
        load_adapter(tiny, tmp_path)


def test_models_that_have_no_adapter(tiny, given, tmp_path):
    with pytest.raises(ConfigError, match="has no LoRA"):
        save_adapter(tiny, tmp_path / "b")
    twice = load_adapter(load_adapter(tiny, given), given)
    with pytest.raises(ConfigError, match=re.escape("decoder/layers[0:3]/mlp/up has an update within another weight")):
        save_adapter(twice, tmp_path / "b")
    held = tiny.params.decoder.layers.stacks[0][0].attention
    inside = lora(held.query, 1)
    model = with_attention(tiny, query=LowRank(inside.lora_a, LoRA(inside.lora_b, inside.lora_a, inside.lora_b)))
    with pytest.raises(ConfigError, match="within another weight"):
        save_adapter(model, tmp_path / "b")


def test_a_folder_is_only_replaced_when_asked(tiny, given, tmp_path):
    model = load_adapter(tiny, given)
    with pytest.raises(FolderError, match="exists; choose another folder"):
        save_adapter(model, given)
    save_adapter(model, given, overwrite=True)
    hf.save(tiny, tmp_path / "model", format="hf")
    with pytest.raises(FolderError, match="holds no model"):
        save_adapter(model, tmp_path / "model", overwrite=True)
