"""New heads on trained bodies: transformers loads them as the class with that head, every tensor in place."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import lmx
from lmx import hf
from lmx.core import sharding, specs
from lmx.core.errors import ConfigError
from lmx.models import heads

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
T5 = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 10))
# base class, its fields, the head, the class that it becomes, the prefix of what stays
CASES = [
    ("BertModel", SMALL, "sequence", "BertForSequenceClassification", "bert."),
    ("BertModel", SMALL, "tokens", "BertForTokenClassification", "bert."),
    ("BertForMaskedLM", SMALL, "spans", "BertForQuestionAnswering", ""),
    ("BertModel", SMALL, "lm", "BertForMaskedLM", "bert."),
    ("ModernBertModel", SMALL | dict(pad_token_id=0), "sequence", "ModernBertForSequenceClassification", "model."),
    ("RobertaModel", SMALL, "sequence", "RobertaForSequenceClassification", "roberta."),
    ("LlamaForCausalLM", SMALL | dict(pad_token_id=0), "sequence", "LlamaForSequenceClassification", ""),
    ("LlamaModel", SMALL, "lm", "LlamaForCausalLM", "model."),
    ("T5EncoderModel", T5, "tokens", "T5ForTokenClassification", "transformer."),
]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the oracle; install the extra 'oracle'")


def base(torch, class_name, fields, folder):
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, class_name)
    model = cls(cls.config_class(**fields)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("class_name, fields, head, becomes, prefix", CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_transformers_loads_it_as_the_class_with_that_head(torch, class_name, fields, head, becomes, prefix, tmp_path):
    import transformers

    before = base(torch, class_name, fields, tmp_path / "base").state_dict()
    labels = 5 if head in ("sequence", "tokens") else None
    model = lmx.with_head(lmx.load(tmp_path / "base"), head, jax.random.key(0), num_labels=labels)
    lmx.save(model, tmp_path / "new", format="hf", like=tmp_path / "base")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["architectures"] == [becomes]
    theirs, info = getattr(transformers, becomes).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values()), info
    after = theirs.eval().state_dict()
    kept = {prefix + name: tensor for name, tensor in before.items() if prefix + name in after}
    body = [name for name in after if "embed" in name or "layer" in name]
    assert len(body) > 10 and set(body) <= set(kept)
    same = [name for name, tensor in kept.items() if torch.equal(tensor, after[name])]
    assert same == list(kept)  # the pooler among them, where it is used
    with torch.no_grad():
        given = dict(input_ids=torch.tensor(TOKENS))
        out = theirs(**given)
    wanted = torch.stack([out.start_logits, out.end_logits], -1) if head == "spans" else out.logits
    np.testing.assert_allclose(lmx.logits(model, TOKENS), wanted.numpy(), atol=2e-5)


def test_the_head_is_drawn_from_its_specs():
    model = lmx.init(lmx.preset("llama-tiny"), jax.random.key(0))
    new = lmx.with_head(model, "tokens", jax.random.key(1), num_labels=500)
    out = np.asarray(new.params.head.out)
    assert out.shape == (64, 500) and out.std() == pytest.approx(0.02, rel=0.05) and abs(out.mean()) < 1e-3
    again = lmx.with_head(model, "tokens", jax.random.key(1), num_labels=500)
    other = lmx.with_head(model, "tokens", jax.random.key(2), num_labels=500)
    np.testing.assert_array_equal(out, again.params.head.out)
    assert not np.array_equal(out, other.params.head.out)
    assert new.params.decoder is model.params.decoder and new.params.embed is model.params.embed
    wanted, found = specs.shapes(specs.of(new)), jax.tree.map(lambda x: (x.shape, x.dtype), new)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), wanted) == found


@pytest.mark.slow
def test_sharded_is_unsharded(mesh):
    config = lmx.preset("llama-tiny", architecture="encoder")
    with sharding.use_mesh(None):
        alone = heads.with_head(lmx.init(config, jax.random.key(0)), "sequence", jax.random.key(1), num_labels=8)
        wanted = np.asarray(lmx.logits(alone, TOKENS))
    model = heads.with_head(lmx.init(config, jax.random.key(0)), "sequence", jax.random.key(1), num_labels=8)
    np.testing.assert_array_equal(model.params.head.out, alone.params.head.out)
    assert len(model.params.head.out.sharding.device_set) == 8
    np.testing.assert_allclose(jax.jit(lmx.logits)(model, TOKENS), wanted, atol=1e-5)


@pytest.mark.slow
def test_what_cannot_be():
    key, model = jax.random.key(0), lmx.init(lmx.preset("llama-tiny"), jax.random.key(0))
    with pytest.raises(ConfigError, match="head 'sequences' is none of lm, sequence, tokens, spans; did you mean"):
        lmx.with_head(model, "sequences", key)
    with pytest.raises(ConfigError, match="'sequence' needs num_labels=, a number of classes"):
        lmx.with_head(model, "sequence", key)
    with pytest.raises(ConfigError, match="'spans' has no num_labels="):
        lmx.with_head(model, "spans", key, num_labels=2)
    with pytest.raises(ConfigError, match="family 'gemma2' and the architecture 'decoder' have no head of kind"):
        lmx.with_head(lmx.init(_gemma2(), key), "spans", key)
    strange = lmx.init(lmx.preset("llama-tiny", architecture="encoder"), key)
    with pytest.raises(ConfigError, match="no family of Hugging Face's that lmx writes can express this model"):
        lmx.with_head(strange, "spans", key)
    assert heads.with_head(strange, "spans", key).params.head.out.shape == (64, 2)


def _gemma2():
    fields = SMALL | dict(num_key_value_heads=2, head_dim=8)
    family = hf.FAMILIES["gemma2"]
    return family.config(fields, "Gemma2ForCausalLM")
