"""Checkpoints that cannot be right: what is said about them, and that nothing is loaded."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import lmx
from lmx import hf
from lmx.core.arrays import open_arrays, write_arrays
from lmx.core.errors import ConfigError, DataError, FolderError, LmxError
from lmx.hf import reading
from lmx.hf.families import FAMILIES
from lmx.models import folders

WEIGHTS = "model.safetensors"


def rewrite(folder, change) -> None:
    """The same checkpoint with its dict of tensors changed."""
    arrays = {name: np.array(array) for name, array in open_arrays(folder / WEIGHTS).items()}
    change(arrays)
    write_arrays(folder / WEIGHTS, arrays, arrays.__getitem__)


def refused(folder, *said: str, error: type[LmxError] = FolderError) -> None:
    with pytest.raises(error) as caught:
        hf.load(folder)
    for words in said:
        assert re.search(words, str(caught.value)), str(caught.value)


def test_an_unknown_architecture_names_the_nearest(edit):
    edit(model_type="lama", architectures=["LamaForCausalLM"])
    refused(edit(), "'lama'.*did you mean 'llama'", error=ConfigError)
    refused(edit(model_type=None), "'LamaForCausalLM'.*did you mean 'LlamaForCausalLM'", error=ConfigError)


def test_an_unknown_class_of_a_known_family(edit):
    said = "LlamaForImages.*LlamaForCausalLM, LlamaModel"
    refused(edit(architectures=["LlamaForImages"]), said, error=ConfigError)


def test_missing_tensors_are_named(folder):
    rewrite(folder, lambda a: [a.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 2)])
    refused(folder, "lack 2 tensors", r"model\.layers\.0\.mlp\.up_proj\.weight, model\.layers\.2\.", "LlamaForCausalLM")


def test_extra_tensors_are_named(folder):
    rewrite(folder, lambda a: a.update({"model.layers.0.self_attn.sinks": np.zeros(4, np.float32)}))
    refused(folder, r"also hold 1 tensor \(model\.layers\.0\.self_attn\.sinks\)")


def test_what_means_nothing_is_ignored(made, tmp_path):
    model = made(lmx.preset("gpt2-tiny", compute_dtype="auto"))
    hf.save(model, tmp_path / "m", format="hf")
    rewrite(tmp_path / "m", lambda a: a.update({"transformer.h.1.attn.bias": np.ones((1, 1, 4, 4), np.float32)}))
    rewrite(tmp_path / "m", lambda a: a.update({"h.0.attn.masked_bias": np.ones((), np.float32)}))
    assert hf.load(tmp_path / "m").config == model.config


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "vocab_size", "num_key_value_heads"])
def test_a_config_that_contradicts_its_weights(folder, edit, field):
    value = json.loads((folder / "config.json").read_text())[field]
    refused(edit(**{field: 2 * value}), r"weight has the shape \(\d+, \d+\), by config.json it must be")


@pytest.mark.parametrize(("layers", "said"), [(4, "lack 9 tensors"), (2, "also hold 9 tensors")])
def test_a_config_with_another_number_of_layers(edit, layers, said):
    refused(edit(num_hidden_layers=layers), said)


def test_a_config_that_ties_what_is_two(edit):
    refused(edit(tie_word_embeddings=True), "ties lm_head.weight to model.embed_tokens.weight.*different numbers")


def test_a_config_that_makes_no_sense(edit):
    refused(edit(hidden_act="sigmoid"), "'sigmoid' is none of silu", error=ConfigError)
    refused(edit(hidden_act="silu", num_hidden_layers=None), "num_layers must be a positive", error=ConfigError)
    refused(edit(num_hidden_layers=3, hidden_size="many"), "hidden_size must be a positive", error=ConfigError)
    refused(edit(hidden_size=16, head_dim=None, num_attention_heads=0), "makes no sense", error=ConfigError)


def test_quantized_weights(folder, edit):
    rewrite(folder, lambda a: a.update({n: a[n].astype(np.int8) for n in ["model.layers.0.mlp.up_proj.weight"]}))
    refused(folder, "up_proj.weight is stored as int8")
    refused(edit(quantization_config={"bits": 4}), "quantization_config", error=ConfigError)


def sharded(folder):
    model = hf.load(folder)
    hf.save(model, folder, format="hf", like=folder, overwrite=True, max_file_bytes=10_000)
    return sorted(folder.glob("model-*.safetensors"))


def test_half_a_sharded_checkpoint(folder):
    files = sharded(folder)
    assert len(files) > 2
    files[1].unlink()
    refused(folder, "half a checkpoint: 1 of the", files[1].name)


def test_a_sharded_checkpoint_without_index(folder):
    sharded(folder)
    (folder / folders.INDEX).unlink()
    refused(folder, "lacks their index")


def test_an_index_that_promises_more(folder):
    sharded(folder)
    index = json.loads((folder / folders.INDEX).read_text())
    index["weight_map"]["model.norm.more"] = next(iter(index["weight_map"].values()))
    (folder / folders.INDEX).write_text(json.dumps(index))
    refused(folder, r"its index names 1 tensors that its files lack \(model.norm.more\)")


@pytest.mark.parametrize("how", ["header", "length", "truncated", "offsets"])
def test_a_damaged_safetensors_file(folder, how):
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    if how == "header":
        data[8:20] = b"\xff" * 12
    elif how == "length":
        data[:8] = (1 << 40).to_bytes(8, "little")
    elif how == "truncated":
        del data[-100:]
    else:
        data = data.replace(b'"F32"', b'"F64"', 1)
    path.write_bytes(data)
    refused(folder, "model.safetensors is damaged or truncated")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json is damaged")


def test_only_pickles(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, "only as pytorch_model.bin", "opens no pickles", "save_pretrained")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


def test_a_tokenizer_that_is_missing(folder):
    with pytest.raises(FolderError, match="no tokenizer.json"):
        lmx.load_tokenizer(folder)


def test_a_tokenizer_in_a_form_that_is_not_read(folder):
    (folder / "spiece.model").write_bytes(b"")
    with pytest.raises((FolderError, DataError), match="no tokenizer.json.*spiece.model"):
        lmx.load_tokenizer(folder)


def test_nothing_is_placed_before_all_is_checked(folder, monkeypatch):
    rewrite(folder, lambda a: a.pop("model.norm.weight"))
    monkeypatch.setattr(reading, "_fill", lambda *_: pytest.fail("an array was read"))
    refused(folder, "model.norm.weight")


def test_a_field_for_another_number_of_layers():
    values = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 2}
    with pytest.raises(ConfigError, match="config.json has layer_types for 2 layers, and num_hidden_layers 3"):
        FAMILIES["qwen2"].config(values, "Qwen2ForCausalLM")
