"""Names of models of the hub, where there is no network and where all is in the cache."""

from __future__ import annotations

import fnmatch
import importlib
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from lmx.core import hub
from lmx.core.errors import FolderError
from lmx.data import load_tokenizer

ROOT = Path(__file__).parents[2]


def test_what_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("hf:gpt2", "openai-community/gpt2", "meta-llama/Llama-3.2-1B"):
        assert hub.is_name(name)
    for path in ("gpt2", "runs/mine", "./owner/name", "/owner/name", "owner/name/more", "~/name", "runs"):
        assert not hub.is_name(path)
    assert hub.folder("runs/mine") == Path("runs/mine")


def fetched(name: str, home: Path, wanted: str = "hub.MODEL", **environment: str) -> subprocess.CompletedProcess:
    """`hub.fetch(name, wanted)` in a process whose cache is `home`."""
    code = f"from lmx.core import hub; print(hub.fetch({name!r}, {wanted}))"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables = kept | {"HF_HOME": str(home), "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def cached(tmp_path):
    """The cache of huggingface_hub with one model in it."""
    pytest.importorskip("huggingface_hub")
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--owner--name"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        (repo / "snapshots" / commit / name).write_text("{}")
    return tmp_path


UNREACHABLE = {"HF_ENDPOINT": "https://localhost:9"}  # nobody listens there


@pytest.mark.parametrize("environment", [UNREACHABLE, {"HF_HUB_OFFLINE": "1"}], ids=["unreachable", "offline"])
def test_without_a_network(cached, environment):
    done = fetched("owner/other", cached, **environment)
    assert done.returncode == 1 and "lmx.core.errors.FolderError: 'owner/other' is no folder here" in done.stderr
    assert "Hugging Face hub" in done.stderr and "not in the cache" in done.stderr
    found = fetched("owner/name", cached, **environment)
    assert found.stdout.strip().endswith("snapshots/" + "0" * 40), found.stderr


def hub_with(monkeypatch, *names: str) -> list[list[str]]:
    """A hub that answers, whose models have these files: what is fetched of them is noted."""
    package, fetched = pytest.importorskip("huggingface_hub"), []

    def snapshot_download(name, allow_patterns, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError(name)
        fetched.append([file for file in names if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)])
        return "there"

    class Api:
        def model_info(self, name, timeout):
            return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=file) for file in names])

    importlib.import_module("huggingface_hub.constants")  # not loaded with the package
    monkeypatch.setattr(package.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(package, "snapshot_download", snapshot_download)
    monkeypatch.setattr(package, "HfApi", Api)
    return fetched


def test_of_a_tokenizer_no_weights_are_fetched(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    texts = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "vocab.txt", "merges.txt", "tokenizer.model",
    ]  # fmt: skip
    weights = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    fetched = hub_with(monkeypatch, *texts, *weights, "pytorch_model.bin", "onnx/model.onnx")
    with pytest.raises(FolderError, match="no tokenizer 'there'"):  # this hub does not really fetch
        load_tokenizer("owner/name")
    assert fetched.pop() == texts
    hub.folder("owner/name")
    assert fetched.pop() == texts + weights
    fetched = hub_with(monkeypatch, "tokenizer.json", "pytorch_model.bin")
    assert hub.folder("owner/name", hub.TOKENIZER) == Path("there") and fetched == [["tokenizer.json"]]


def test_a_tokenizer_in_the_cache_is_no_model(cached):
    place = cached / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    (place / "model.safetensors").rename(place / "tokenizer.json")
    done = fetched("owner/name", cached, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "not in the cache" in done.stderr
    done = fetched("owner/name", cached, HF_HUB_OFFLINE="1", wanted="hub.TOKENIZER")
    assert done.stdout.strip().endswith("snapshots/" + "0" * 40), done.stderr


def test_an_answer_that_never_comes():
    never = threading.Event()
    assert hub._within(0.2, lambda: never.wait(300)) is None  # not False, which comes after all of it
    never.set()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FolderError, match=r"no folder 'owner/name'.*pip install 'lmx\[hf\]'"):
        hub.folder("owner/name")


def test_only_pickles_says_how_to_convert():
    assert "only as pytorch_model.bin" in hub.only_pickles(["pytorch_model.bin", "config.json"])
    assert "no weights in safetensors files (it holds a.txt)" in hub.only_pickles(["a.txt"])
