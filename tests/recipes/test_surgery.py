"""`lmx fold`, `lmx lora` and `lmx prune`, on a model in Hugging Face's format and on what they made of it."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx import hf
from lmx.cli.main import main
from lmx.core import tree, weights
from lmx.hf import updates
from lmx.models import transformer

CONFIG = lmx.Config(
    vocab_size=257, num_layers=3, hidden_size=16, num_heads=4, num_kv_heads=2, intermediate_size=24,
    tie_embeddings=False, remat="none",
)  # fmt: skip
TOKENS = jnp.arange(24).reshape(2, 12)


def random(config, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape) + (s.init == "ones"), s.dtype)  # noqa: E731
    return transformer.Model(config, jax.tree.map(draw, transformer.abstract(config)))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of transformers' format with a tokenizer and a field that lmx does not know."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    hf.save(random(CONFIG), folder, format="hf", like="mistral", tokenizer=lmx.data.tokenizers.byte_tokenizer())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"made_by": "somebody"}))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} is a number, and so is {i * i}; {i} times {i + 1} is {i * i + i}. " * 8)
    return folder


@pytest.fixture
def run(capsys):
    """run(words) -> the result, as --json prints it."""

    def call(*words) -> dict:
        capsys.readouterr()
        main([*map(str, words), "--json"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(words) -> the message; nothing is written."""

    def call(*words) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, words), "--output", str(tmp_path / "made")])
        assert stop.value.code == 2 and not (tmp_path / "made").exists()
        return capsys.readouterr().err

    return call


def logits(folder) -> np.ndarray:
    return np.asarray(lmx.load(folder).logits(TOKENS))


def notes(folder) -> dict:
    return json.loads((folder / "structure.json").read_text())["notes"]


@pytest.mark.slow
def test_adapters_come_and_go(source, tmp_path, run):
    words = ("--pattern", "attention/(query|out)|layers[1]/mlp/", "--rank", 3, "--init", "pissa")
    told = run("lora", "attach", source, "--output", tmp_path / "a", *words)
    assert (told["adapters"], told["ranks"]) == (9, [3]) and "tokenizer.json" in told["files"]
    assert told["trainable"] == 3 * (3 * 2 * 32 + 3 * 40)
    np.testing.assert_allclose(logits(tmp_path / "a"), logits(source), atol=2e-5)
    about = notes(tmp_path / "a")
    assert about["made by"] == "lmx lora attach" and about["with"]["init"] == "pissa"
    told = run("lora", "merge", tmp_path / "a", "--output", tmp_path / "m", "--format", "hf")
    assert told["adapters"] == 9
    np.testing.assert_allclose(logits(tmp_path / "m"), logits(source), atol=2e-5)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["made_by"] == "somebody"
    run("lora", "merge", tmp_path / "a", "--output", tmp_path / "n")
    assert notes(tmp_path / "n")["before"]["made by"] == "lmx lora attach"


def test_an_adapter_is_extracted_for_peft_and_merged_from_there(source, tmp_path, run):
    base = lmx.load(source)
    rng = np.random.default_rng(0)
    move = lambda w: w + jnp.asarray(0.05 * rng.normal(size=w.shape), w.dtype)  # noqa: E731
    tuned = tree.map(move, base, "mlp/down|attention/value", weights.is_weight)
    lmx.save(tuned, tmp_path / "tuned", format="hf", like=source)
    told = run(
        "lora", "extract", tmp_path / "tuned", "--base", source, "--energy", "1", "--output", tmp_path / "adapter"
    )
    assert told["adapters"] == 6 and sorted(told["files"]) == ["adapter_config.json", "adapter_model.safetensors"]
    assert lmx.load_adapter(base, tmp_path / "adapter").config == base.config
    told = run("lora", "merge", source, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    np.testing.assert_allclose(logits(tmp_path / "merged"), logits(tmp_path / "tuned"), atol=2e-5)
    told = run("lora", "rerank", source, "--adapter", tmp_path / "adapter", "--rank", 2, "--output", tmp_path / "low")
    assert told["ranks"] == [2] and {n.rank for n, _ in updates.held(lmx.load(tmp_path / "low")).values()} == {2}
    told = run(
        "lora", "extract", tmp_path / "tuned", "--base", source, "--output", tmp_path / "whole", "--format", "lmx"
    )
    assert told["ranks"] == [8, 16] and notes(tmp_path / "whole")["with"]["tuned"] == str(tmp_path / "tuned")
    np.testing.assert_allclose(logits(tmp_path / "whole"), logits(tmp_path / "tuned"), atol=2e-5)


@pytest.mark.slow
def test_adapters_that_begin_with_what_a_text_shows(source, text, tmp_path, run):
    words = ("--data", text, "--tokens", 512, "--pattern", "mlp/up")
    for init in ("eva", "corda"):
        run("lora", "attach", source, "--output", tmp_path / init, "--init", init, *words)
        np.testing.assert_allclose(logits(tmp_path / init), logits(source), atol=2e-5)
    told = run("lora", "rerank", tmp_path / "corda", "--rank", 2, "--output", tmp_path / "low", *words)
    assert told["ranks"] == [2]


def test_everything_folds(source, tmp_path, run):
    run("lora", "attach", source, "--output", tmp_path / "a", "--pattern", "mlp/up", "--init", "pissa")
    told = run("fold", tmp_path / "a", "--norms", "--output", tmp_path / "f", "--format", "hf")
    layers = [f"decoder/layers[0:3]/{name}" for name in ("mlp/up", "attention_norm", "mlp_norm")]
    assert told["folded"] == [*layers, "decoder/norm"] and told["kept"] == {}
    np.testing.assert_allclose(logits(tmp_path / "f"), logits(source), atol=2e-5)
    assert json.loads((tmp_path / "f" / "config.json").read_text())["model_type"] == "mistral"
    tied = random(CONFIG.replace(tie_embeddings=True))
    lmx.save(tied, tmp_path / "tied")
    told = run("fold", tmp_path / "tied", "--norms", "--output", tmp_path / "g")
    assert "tie_embeddings" in told["kept"]["decoder/norm"]
    told = run("fold", tmp_path / "tied", "--norms", "--untie", "--output", tmp_path / "h")
    assert told["kept"] == {} and notes(tmp_path / "h")["with"]["untie"]
    np.testing.assert_allclose(logits(tmp_path / "h"), logits(tmp_path / "tied"), atol=2e-5)


@pytest.mark.slow
def test_a_pruned_model_is_an_ordinary_smaller_one(source, text, tmp_path, run):
    words = ("--data", text, "--tokens", 512, "--layers", 2, "--heads", 2, "--units", 10)
    told = run("prune", source, *words, "--output", tmp_path / "p", "--format", "hf")
    assert told["changed"] == {
        "num_layers": [3, 2], "num_heads": [4, 2], "num_kv_heads": [2, 1], "intermediate_size": [24, 10],
    }  # fmt: skip
    (dropped,) = told["dropped_layers"]["decoder"]
    assert np.argmin(told["importance"]["decoder"]) == dropped
    assert told["parameters"] < told["parameters_before"] == lmx.core.specs.count(lmx.load(source))
    config = lmx.load(tmp_path / "p").config
    assert (config.num_layers, config.num_heads, config.head_dim, config.intermediate_size) == (2, 2, 4, 10)
    told = run("prune", source, "--units", 12, "--data", "weights", "--output", tmp_path / "q")
    assert told["changed"] == {"intermediate_size": [24, 12]} and notes(tmp_path / "q")["made by"] == "lmx prune"


@pytest.mark.slow
def test_what_cannot_be(source, text, tmp_path, refused):
    for words, said in [
        (("fold", source), "there is nothing to fold"),
        (("fold", source, "--embedding"), "no projection to fold"),
        (("fold", source, "--norms", "--format", "hg"), "did you mean 'hf'"),
        (("fold", tmp_path / "nothing"), "there is no folder"),
        (("lora", "attach", source, "--pattern", "mlp/upp"), "did you mean"),
        (("lora", "attach", source, "--rank", 99), "a rank from 1 to 16, not 99"),
        (("lora", "merge", source), "selects no adapter"),
        (("lora", "extract", source, "--base", source), "do not differ"),
        (("lora", "extract", source, "--base", source, "--format", "hf"), "none of lmx, peft"),
        (("prune", source), "say what to keep"),
        (("prune", source, "--layers", 2, "--data", "weights"), "layers are measured on text"),
        (("prune", source, "--data", text, "--heads", 3), "cannot become 3"),
        (("prune", source, "--data", text, "--layers", 9), "1 to 3 can stay"),
        (("prune", source, "--data", text, "--layers", 2, "--tokens", 9), "less than one row"),
    ]:
        assert said in " ".join(refused(*words).split()), words
