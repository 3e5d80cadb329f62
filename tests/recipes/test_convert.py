"""`lmx convert`, and that the other commands take Hugging Face's folders."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx import hf
from lmx.cli.main import main
from lmx.core.arrays import open_arrays
from lmx.core.errors import ConfigError, FolderError
from lmx.models import transformer
from lmx.recipes import convert
from lmx.recipes.convert import ConvertOptions

CONFIG = lmx.Config(
    vocab_size=257, num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, intermediate_size=24, rope_theta=500.0
)
CARRIED = {
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}\n",
    "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
    "generation_config.json": '{"temperature": 0.6}',
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint in Hugging Face's format with a tokenizer, a chat template, and a field that lmx does not know."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    rng = np.random.default_rng(0)
    draw = lambda spec: jnp.asarray(0.3 * rng.normal(size=spec.shape), spec.dtype)  # noqa: E731
    model = transformer.Model(CONFIG, jax.tree.map(draw, transformer.abstract(CONFIG)))
    hf.save(model, folder, format="hf", like="mistral", tokenizer=lmx.data.tokenizers.byte_tokenizer())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"made_by": "somebody", "bos_token_id": 3}))
    for name, text in CARRIED.items():
        (folder / name).write_text(text)
    return folder


def result(capsys, *arguments) -> dict:
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_there_and_back(source, tmp_path, capsys):
    told = result(capsys, "convert", source, tmp_path / "ours")
    assert told["format"] == "lmx" and told["architecture"] == "mistral"
    assert {"structure.json", "tokenizer.json", *CARRIED} <= set(told["files"])
    told = result(capsys, "convert", tmp_path / "ours", tmp_path / "back")
    assert told["format"] == "hf" and told["architecture"] == "mistral"
    names = {file.name for file in source.iterdir()}
    assert set(told["files"]) == names == {file.name for file in (tmp_path / "back").iterdir()}
    for name in names - {"config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    read = lambda folder: json.loads((folder / "config.json").read_text())  # noqa: E731
    assert read(tmp_path / "back") == read(source) and read(source)["made_by"] == "somebody"


def test_dtype_and_family(source, tmp_path):
    told = convert.run(ConvertOptions(str(source), str(tmp_path / "m"), to="hf", dtype="float16", like="llama"))
    assert told["bytes"] == 2 * told["parameters"]
    assert {str(a.dtype) for a in open_arrays(tmp_path / "m" / "model.safetensors").values()} == {"float16"}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "llama"


def test_other_commands_take_the_folder(source, tmp_path, capsys):
    convert.run(ConvertOptions(str(source), str(tmp_path / "ours")))
    ours, theirs = (result(capsys, "describe", folder) for folder in (tmp_path / "ours", source))
    assert ours["parts"] == theirs["parts"] and ours["config"] == theirs["config"]
    options = ["--prompt", "ab", "--max-new-tokens", "3", "--temperature", "0"]
    ours, theirs = (result(capsys, "generate", folder, *options) for folder in (tmp_path / "ours", source))
    assert ours["texts"] == theirs["texts"]


@pytest.mark.slow
def test_a_tuned_model_goes_back_as_it_came(source, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} is a number, and so is {i * i}. " * 8)
    run = tmp_path / "run"
    options = {"--data": tmp_path / "text", "--steps": 2, "--batch-size": 2, "--length": 16, "--output": run}
    result(capsys, "train", "--init", source, *(word for pair in options.items() for word in pair))
    told = result(capsys, "convert", run, tmp_path / "back")
    assert told["architecture"] == "mistral"
    names = {file.name for file in source.iterdir()}
    assert set(told["files"]) == names and set(CARRIED) < names
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    read = lambda folder: json.loads((folder / "config.json").read_text())  # noqa: E731
    assert read(tmp_path / "back") == read(source)
    before, after = (open_arrays(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    told = result(capsys, "convert", run / "checkpoints", tmp_path / "again")
    assert told["architecture"] == "mistral" and set(told["files"]) == names
    assert read(tmp_path / "again") == read(source)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"to": "hff"}, ConfigError, "to 'hff' is none of lmx, hf"),
        ({"dtype": "float8"}, ConfigError, "dtype 'float8' is none of"),
        ({"like": "llama"}, ConfigError, "give to=hf"),
        ({"source": "nothing"}, FolderError, "there is no folder 'nothing'"),
    ],
)
def test_bad_options(source, tmp_path, monkeypatch, options, error, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        convert.run(ConvertOptions(**({"source": str(source), "target": "m"} | options)))
    assert not (tmp_path / "m").exists()


def test_what_is_there_stays(source, tmp_path):
    convert.run(ConvertOptions(str(source), str(tmp_path / "m")))
    with pytest.raises(FolderError, match="exists"):
        convert.run(ConvertOptions(str(source), str(tmp_path / "m")))
    convert.run(ConvertOptions(str(source), str(tmp_path / "m"), to="hf", overwrite=True))
    assert hf.load(tmp_path / "m").config == hf.load(source).config
