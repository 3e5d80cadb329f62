"""A run whose checkpoints are on gs://, in a bucket that a server on this machine holds."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from lmx.core.errors import ConfigError, FolderError
from lmx.recipes import models, supervise, train
from lmx.recipes.options import TrainOptions, resolve

if importlib.util.find_spec("gcsfs") is None:  # not imported yet: it reads a variable then
    pytest.skip("needs gcsfs", allow_module_level=True)
PLACE = Path(__file__).parents[1] / "train" / "object_store.py"
STORE = importlib.util.spec_from_file_location("lmx_tests_object_store", PLACE)
object_store = importlib.util.module_from_spec(STORE)
sys.modules[STORE.name] = object_store
STORE.loader.exec_module(object_store)
bucket = object_store.bucket


@pytest.fixture(autouse=True)
def quick():
    """Compile for compile time: these programs run a few times on tiny arrays."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
def test_a_run_keeps_its_checkpoints_in_a_bucket(bucket, tmp_path, monkeypatch):
    """Stopped and resumed: they are found again from run.json, and each is a model to open and start from."""
    words, text = random.Random(1), tmp_path / "words.txt"
    text.write_text("\n".join(" ".join(words.choices(["ab", "bcd", "cde", "dab"], k=8)) for _ in range(900)))
    options = TrainOptions(
        data=str(text), output=str(tmp_path / "run"), checkpoint_folder="gs://bucket/runs/a", tokenizer="byte",
        model="llama-tiny", batch_size=8, length=16, steps=4, evaluate_every=2, save_every=2, optimizer="adamw",
    )  # fmt: skip
    quiet, asked = Console(file=io.StringIO()), iter([False, False, True])
    with monkeypatch.context() as patched:
        patched.setattr(train, "stop_requests", lambda: contextlib.nullcontext(lambda: next(asked, False)))
        assert train.run(options, quiet)["stopped"]
    assert {name.split("/")[2] for name in bucket.objects} == {"2", "3"}
    assert not (tmp_path / "run" / "checkpoints").exists()
    again = TrainOptions(output=str(tmp_path / "run"), resume=True)
    assert supervise._newest(tmp_path / "run", again) == supervise._newest(tmp_path / "run", options) == 3
    with pytest.raises(FolderError, match="or open its newest checkpoint: gs://bucket/runs/a"):
        models.model_folder(str(tmp_path / "run"))
    result = train.run(again, quiet)
    assert result["steps"] == 4 and "going on at step 3" in quiet.file.getvalue()
    assert {name.split("/")[2] for name in bucket.objects} == {"3", "4"}
    last, _ = models.open_model("gs://bucket/runs/a/4")
    whole = models.load_model(str(tmp_path / "run"))
    np.testing.assert_array_equal(last.params.embed.tokens, whole.params.embed.tokens)
    assert resolve(TrainOptions(init="gs://bucket/runs/a/4")).init == "gs://bucket/runs/a/4"

    with pytest.raises(FolderError, match="gs://bucket/runs/a holds checkpoints of another run .steps 3, 4.; choose"):
        train.run(TrainOptions(output=str(tmp_path / "other"), checkpoint_folder="gs://bucket/runs/a"), quiet)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match="checkpoint_folder .was 'gs://bucket/runs/a', is 'gs://bucket/b'"):
        train.run(TrainOptions(output=options.output, resume=True, checkpoint_folder="gs://bucket/b"), quiet)


def test_another_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(TrainOptions(checkpoint_folder="disk/run")).checkpoint_folder == str(tmp_path / "disk" / "run")


def test_the_run_itself_is_local(bucket):
    with pytest.raises(ConfigError, match="into a local folder, with --checkpoint-folder gs://bucket/run for its"):
        resolve(TrainOptions(output="gs://bucket/run"))
    with pytest.raises(ConfigError, match="a local folder or in gs://BUCKET/FOLDER, not in s3://bucket/run"):
        resolve(TrainOptions(checkpoint_folder="s3://bucket/run"))


def test_a_bucket_that_may_not_be_used_ends_the_start(bucket, tmp_path):
    bucket.refuse = lambda call: 403
    try:
        with pytest.raises(FolderError, match="gs://bucket/b cannot be reached: Forbidden"):
            train.run(TrainOptions(output=str(tmp_path / "run"), checkpoint_folder="gs://bucket/b"))
    finally:
        bucket.refuse = lambda call: None
    assert list(tmp_path.iterdir()) == []
    assert json.dumps(sorted(bucket.objects)).count("bucket/b") == 0
