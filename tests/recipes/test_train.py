"""The recipes as functions: a run on 8 simulated devices, and what their plain results hold."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import types

import jax
import numpy as np
import pytest
from rich.console import Console

import lmx
from lmx.data import byte_tokenizer
from lmx.recipes import describe, evaluate, generate, train
from lmx.recipes.describe import DescribeOptions
from lmx.recipes.evaluate import EvalOptions
from lmx.recipes.generate import GenerateOptions
from lmx.recipes.options import TrainOptions


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(300)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(900)))
    return path


def tiny(text, output, **more) -> TrainOptions:
    shape = dict(tokenizer="byte", model="llama-tiny", batch_size=8, length=16, steps=4, evaluate_every=2, save_every=2)
    return TrainOptions(data=str(text), output=str(output), **(shape | more))


@pytest.fixture(scope="module")
def results(text, tmp_path_factory) -> dict[str, dict]:
    """One run by name of mesh: all 8 devices by default."""
    place = tmp_path_factory.mktemp("runs")
    made = {}
    for name, mesh in {"default": None, "mixed": "data=2,fsdp=2,tensor=2"}.items():
        said = io.StringIO()
        made[name] = train.run(tiny(text, place / name, mesh=mesh), Console(file=said, width=200))
        made[name]["said"] = said.getvalue()
    return made


@pytest.mark.slow
def test_how_the_devices_are_split_does_not_change_the_result(results):
    default, mixed = results["default"], results["mixed"]
    # Sums in another order, four steps of an optimizer that divides by small numbers: 1e-3 of about 5 bits.
    assert mixed["bits_per_byte"] == pytest.approx(default["bits_per_byte"], rel=1e-3)
    assert mixed["references"]["lzma"] == default["references"]["lzma"]
    assert mixed["references"]["unigram"] == pytest.approx(default["references"]["unigram"], rel=1e-6)
    for name in results:
        a, b = (lmx.load(f"{results[n]['output']}/model") for n in ("default", name))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-2), a, b)


def test_eval_generate_and_describe_take_the_run(results, text):
    output = results["default"]["output"]
    quiet = Console(file=io.StringIO())
    bits = evaluate.run(EvalOptions(model=output, data=str(text), mesh="fsdp=8"), quiet)["bits_per_byte"]
    assert bits == pytest.approx(results["default"]["bits_per_byte"], rel=1e-4)
    pieces: list[str] = []
    made = generate.run(GenerateOptions(model=output, max_new_tokens=5, prompt="ab"), pieces.append)
    assert "".join(pieces) == "ab" + made["texts"][0]
    assert describe.run(DescribeOptions(output))["parameters"] == results["default"]["parameters"]


def test_a_finished_run_resumes_to_its_result(results, text):
    before = results["default"]
    again = train.run(TrainOptions(output=before["output"], resume=True), Console(file=io.StringIO()))
    assert again["bits_per_byte"] == before["bits_per_byte"] and again["sample"] == before["sample"]


@pytest.mark.slow
def test_sigterm_outside_the_loop(text, tmp_path, monkeypatch):
    """Before the first step the folder is put back; after the last one only the evaluation is missing."""
    said = io.StringIO()
    terminated = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train.texts, "prepare", terminated)
        train.run(tiny(text, tmp_path / "run"), Console(file=said))
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patched:
        patched.setattr(train, "split_bits", terminated)
        options = tiny(text, tmp_path / "run", steps=2)
        result = train.run(options, Console(file=said, width=300), "--coordinator auto")
    command = f"lmx train --resume --output {tmp_path / 'run'} --coordinator auto"
    assert result == {"stopped": True, "step": 2, "resume": command, "output": str(tmp_path / "run")}
    assert f"training is done and saved, its evaluation is not. Go on with: {command}" in said.getvalue()
    assert (tmp_path / "run" / "checkpoints" / "2").exists()


@pytest.mark.slow
def test_sigterm_after_a_stop_changes_nothing(text, tmp_path, monkeypatch):
    """All processes stop for one that was asked; the others may be asked when they have left the loop."""
    close = train.Checkpoints.close
    late = lambda checkpoints: (close(checkpoints), os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    monkeypatch.setattr(train, "stop_requests", lambda: contextlib.nullcontext(lambda: True))
    monkeypatch.setattr(train.Checkpoints, "close", late)
    result = train.run(tiny(text, tmp_path / "run", steps=5), Console(file=io.StringIO()))
    assert result["stopped"] and result["step"] == 1


def test_float16_is_trained_in_float32(tmp_path):
    tokenizer = byte_tokenizer()
    config = lmx.preset("llama-tiny", vocab_size=257, num_layers=1, dtype="float16")
    lmx.save(lmx.init(config, jax.random.key(0)), tmp_path / "theirs", format="hf", tokenizer=tokenizer)
    options, corpus = TrainOptions(init=str(tmp_path / "theirs")), types.SimpleNamespace(tokenizer=tokenizer)
    made, shapes = (train._model(options, corpus, abstract=abstract) for abstract in (False, True))
    for model in (made, shapes):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {model.config.dtype} == {"float32"}
    stored = lmx.load(tmp_path / "theirs")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.float32(y)), made.params, stored.params)
    assert stored.config.dtype == "float16" and jax.tree.structure(made) == jax.tree.structure(shapes)


@pytest.mark.slow
def test_a_moving_average_is_what_is_saved(text, tmp_path):
    quiet = Console(file=io.StringIO())
    train.run(tiny(text, tmp_path / "ema", ema_decay=0.999999, steps=2), quiet)
    train.run(tiny(text, tmp_path / "plain", steps=2), quiet)
    ema, plain = (lmx.load(tmp_path / name / "model") for name in ("ema", "plain"))
    first = lmx.init(plain.config, jax.random.key(0))
    np.testing.assert_allclose(ema.params.embed.tokens, first.params.embed.tokens, atol=1e-5)
    assert not np.allclose(plain.params.embed.tokens, first.params.embed.tokens, atol=1e-5)


@pytest.mark.slow
def test_a_stopped_fine_tuning_resumes_sharded_to_the_same_result(results, text, tmp_path, monkeypatch):
    quiet = Console(file=io.StringIO())
    init = results["default"]["output"]
    base = dict(init=init, model=None, tokenizer=None, train="mlp/", optimizer="adamw", learning_rate=1e-3)
    whole = train.run(tiny(text, tmp_path / "whole", **base), quiet)
    asked = iter([False, False, True])
    monkeypatch.setattr(train, "stop_requests", lambda: contextlib.nullcontext(lambda: next(asked, False)))
    assert train.run(tiny(text, tmp_path / "halves", **base), quiet)["stopped"]
    monkeypatch.undo()
    halves = train.run(TrainOptions(output=str(tmp_path / "halves"), resume=True), quiet)
    assert halves["bits_per_byte"] == whole["bits_per_byte"] and halves["sample"] == whole["sample"]
