"""`lmx fold`, on a model in Hugging Face's format and on lmx's own."""

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
from lmx.core.kinds import LowRank
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


def test_everything_folds(source, tmp_path, run):
    low = lambda w: LowRank(w, jnp.broadcast_to(jnp.eye(24), (3, 24, 24)))  # noqa: E731
    lmx.save(tree.map(low, lmx.load(source), "mlp/up", weights.is_weight), tmp_path / "a")
    told = run("fold", tmp_path / "a", "--norms", "--output", tmp_path / "f", "--format", "hf")
    layers = [f"decoder/layers[0:3]/{name}" for name in ("mlp/up", "attention_norm", "mlp_norm")]
    assert told["folded"] == [*layers, "decoder/norm"] and told["kept"] == {}
    np.testing.assert_allclose(logits(tmp_path / "f"), logits(source), atol=2e-5)
    tied = random(CONFIG.replace(tie_embeddings=True))
    lmx.save(tied, tmp_path / "tied")
    told = run("fold", tmp_path / "tied", "--norms", "--output", tmp_path / "g")
    assert "tie_embeddings" in told["kept"]["decoder/norm"]
    told = run("fold", tmp_path / "tied", "--norms", "--untie", "--output", tmp_path / "h")
    assert told["kept"] == {} and notes(tmp_path / "h")["with"]["untie"]
    np.testing.assert_allclose(logits(tmp_path / "h"), logits(tmp_path / "tied"), atol=2e-5)


def test_what_cannot_be(source, tmp_path, refused):
    for words, said in [
        (("fold", source), "there is nothing to fold"),
        (("fold", source, "--embedding"), "no projection to fold"),
        (("fold", source, "--norms", "--format", "hg"), "did you mean 'hf'"),
        (("fold", tmp_path / "nothing"), "there is no folder"),
    ]:
        assert said in " ".join(refused(*words).split()), words
