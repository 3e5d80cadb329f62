"""BERT, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx import hf
from lmx.core.arrays import open_arrays, write_arrays
from lmx.core.errors import ConfigError, FolderError

FEW = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
BASE = {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 20, "type_vocab_size": 2,
}  # fmt: skip
FIELDS = st.fixed_dictionaries({
    "vocab_size": st.sampled_from([37, 64]),
    "num_hidden_layers": st.integers(1, 3),
    "num_attention_heads": st.sampled_from([1, 2, 4]),
    "max_position_embeddings": st.sampled_from([12, 20]),
    "type_vocab_size": st.sampled_from([1, 3]),
    "hidden_act": st.sampled_from(["gelu", "gelu_new", "relu", "silu"]),
    "layer_norm_eps": st.sampled_from([1e-12, 1e-3]),
})  # fmt: skip
HEADS = {
    "Model": {}, "ForSequenceClassification": {"num_labels": 3}, "ForTokenClassification": {"num_labels": 5},
    "ForQuestionAnswering": {},
}  # fmt: skip
WRONG = {
    "vocab_size": 38, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "hidden_act": "relu", "max_position_embeddings": 21, "type_vocab_size": 3, "layer_norm_eps": 0.1,
    "tie_word_embeddings": False, "is_decoder": True,
}  # fmt: skip
WEIGHTS = "model.safetensors"


@FEW
@given(fields=FIELDS)
def test_parity(parity, fields):
    parity("BertForMaskedLM", BASE | fields)


@pytest.mark.parametrize("head", HEADS)
def test_heads(parity, head):
    parity(f"Bert{head}", BASE | HEADS[head])


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_noticed(wrong, field):
    wrong("BertForMaskedLM", BASE, field, WRONG[field])


def test_every_field_is_tested_and_defaults_are_theirs(complete, defaults):
    complete("bert", WRONG)
    defaults("bert")


@pytest.fixture(scope="module")
def masked(torch_model, tmp_path_factory):
    """A folder that transformers wrote, and its tensors."""
    folder = torch_model("BertForMaskedLM", BASE).save(tmp_path_factory.mktemp("masked"))
    return folder, {name: np.array(values) for name, values in open_arrays(folder / WEIGHTS).items()}


def test_files_of_pretraining_and_of_old_versions_are_read(masked, tmp_path):
    """gamma and beta, position ids, the pooler, the next-sentence head, and tied tensors stored twice."""
    folder, tensors = masked
    renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): values for name, values in tensors.items()}
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): values for name, values in renamed.items()} | {
        "bert.embeddings.position_ids": np.arange(20)[None],
        "bert.pooler.dense.weight": np.ones((16, 16), np.float32),
        "cls.seq_relationship.bias": np.ones(2, np.float32),
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    }
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    write_arrays(tmp_path / WEIGHTS, old, old.get)
    one, two = hf.load(folder), hf.load(tmp_path)
    np.testing.assert_array_equal(one.params.head.out_bias, two.params.head.out_bias)
    np.testing.assert_array_equal(one.params.embed.norm.scale, two.params.embed.norm.scale)
    old["cls.predictions.decoder.bias"] = old["cls.predictions.decoder.bias"] + 1
    write_arrays(tmp_path / WEIGHTS, old, old.get)
    with pytest.raises(FolderError, match="cls.predictions.decoder.bias to cls.predictions.bias"):
        hf.load(tmp_path)


def test_a_body_without_pooler(torch_model, tmp_path):
    """Files that lack the pooler of BertModel hold a model without a head, both ways."""
    pooled = hf.load(torch_model("BertModel", BASE).save(tmp_path / "pooled"))
    assert (pooled.config.head, pooled.config.head_activation) == ("pooled", "tanh")
    bare = pooled.replace(config=hf.FAMILIES["bert"].config({**BASE}, "BertModel", headless=True))
    bare = bare.replace(params=bare.params.replace(head=None))
    hf.save(bare, tmp_path / "bare", format="hf", like=tmp_path / "pooled")
    names = set(open_arrays(tmp_path / "pooled" / WEIGHTS)) - set(open_arrays(tmp_path / "bare" / WEIGHTS))
    assert names == {"pooler.dense.weight", "pooler.dense.bias"}
    again = hf.load(tmp_path / "bare")
    assert again.config.head == "none" and hf.load_shapes(tmp_path / "bare").params.head is None
    tokens = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(again.features(tokens), pooled.features(tokens))


def test_a_body_without_token_types_has_no_form(made, tmp_path):
    config = hf.FAMILIES["bert"].config({**BASE}, "BertModel").replace(type_vocab_size=0)
    with pytest.raises(ConfigError, match="type_vocab_size 0"):
        hf.save(made(config), tmp_path / "model", format="hf", like="bert")
