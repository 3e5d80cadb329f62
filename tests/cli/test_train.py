"""`lmx train` as a user meets it: what it prints and leaves, stopping and going on, fine-tuning a part."""

from __future__ import annotations

import json
import math
import re
import signal

import jax
import numpy as np
import pytest

import lmx as library
from lmx.core import tree

# Nobody who types `lmx train` can do anything about these.
NOISE = re.compile(r"warn|absl|orbax|grain|traceback|deprecat|^[IWEF]\d{4} |INFO|\bxla|\bcuda|\btpu", re.I | re.M)


def lines(folder) -> dict[int, list[dict]]:
    """The metrics of a run by step, without the speed."""
    found: dict[int, list[dict]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        values.pop("tokens_per_second", None)
        found.setdefault(values["step"], []).append(values)
    return found


def test_the_result_is_one_json_object_on_stdout(trained):
    folder, done = trained
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1
    result = done.result
    for bits in (result["bits_per_byte"], result["references"]["unigram"], result["references"]["lzma"]):
        assert set(bits) == {"all", "prose", "lists"}
        assert all(0 < value < 20 and math.isfinite(value) for value in bits.values())
    assert result["tokens_per_second"] > 0 and result["output"] == "run" and result["steps"] == 60
    arrays = jax.tree.leaves(library.load(folder / "model"))
    assert result["parameters"] == sum(array.size for array in arrays)
    assert result == json.loads((folder / "result.json").read_text())


def test_a_model_learns_even_in_sixty_steps(trained):
    logged = [values for found in lines(trained[0]).values() for values in found]
    losses = [values["valid_loss"] for values in logged if "valid_loss" in values]
    assert losses[-1] < losses[0] - 0.5


def test_everything_else_is_on_stderr_and_nothing_there_is_noise(trained):
    _, done = trained
    for wanted in ("prose", "257 kinds of token", "llama-tiny:", "step 60/60", "valid loss", "lzma", "Try next"):
        assert wanted in done.err
    assert not NOISE.search(done.err), done.err


def test_the_folder_holds_what_was_said(trained):
    folder, done = trained
    said = re.search(r"In run: (.*)\.\n", done.err).group(1).replace("/", "").split(", ")
    assert set(said) | {"run.json"} == {path.name for path in folder.iterdir()}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.pkl"))


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_with_the_same_numbers(trained, hurts, shell, tiny, tmp_path):
    hurt = hurts({"at": "step", "number": 7, "signal": signal.SIGINT, "mark": "interrupted"})
    done = shell(*tiny, "--output", "stopped", "--json", cwd=tmp_path, **hurt)
    assert done.code == 0, done.err
    result, command = done.result, "lmx train --resume --output stopped"
    assert result["stopped"] and result["step"] == 7
    assert result["resume"] == command and f"Go on with: {command}" in done.err

    done = shell(*command.split()[1:], "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert f"going on at step {result['step']}" in done.err
    assert not NOISE.search(done.err), done.err
    whole, resumed = lines(trained[0]), lines(tmp_path / "stopped")
    assert set(resumed) - set(whole) <= {result["step"], result["step"] + 1}  # which are logged for themselves
    for step, values in whole.items():
        assert resumed[step] == values if step not in (result["step"], result["step"] + 1) else True
    same = ("bits_per_byte", "references", "parameters", "sample", "steps")
    assert {name: done.result[name] for name in same} == {name: trained[1].result[name] for name in same}


@pytest.mark.slow
def test_another_objective_says_what_it_measures(shell, text, tmp_path):
    words = "train --objective masked --tokenizer byte --model llama-tiny --batch-size 4 --length 32 --steps 3 --json"
    done = shell(*words.split(), "--data", text, "--output", "encoder", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.result["objective"] == "masked" and done.result["targets"] == "masked tokens"
    said = f"{done.result['loss']:.3f} nats, perplexity {done.result['perplexity']:.2f}, over the masked tokens"
    assert said in done.err and "bits per byte" not in done.err + done.out
    assert library.load(tmp_path / "encoder" / "model").config.architecture == "encoder"


@pytest.mark.slow
def test_init_and_train_change_only_what_the_pattern_names(run, text, shell, tmp_path):
    words = f"--init {run} --train mlp/ --data {text} --steps 3 --batch-size 4 --length 32 --output tuned --json"
    done = shell("train", *words.split(), cwd=tmp_path)
    assert done.code == 0, done.err
    before, after = library.load(run / "model"), library.load(tmp_path / "tuned" / "model")
    changed = {
        path.plain
        for (path, old), (_, new) in zip(tree.paths(before), tree.paths(after), strict=True)
        if not np.array_equal(old, new)
    }
    assert changed == {f"decoder/layers/mlp/{name}" for name in ("gate", "up", "down")}


def test_an_output_that_holds_something_is_refused(run, lmx, text, tmp_path):
    before = sorted(run.rglob("*"))
    done = lmx("train", "--data", text, "--output", run)
    assert done.code == 2
    assert f"{run} holds another run; go on with it by --resume, replace it by --overwrite" in done.err
    assert sorted(run.rglob("*")) == before

    (tmp_path / "thesis.tex").write_text("do not delete")
    done = lmx("train", "--data", text, "--output", tmp_path, "--overwrite")
    assert done.code == 2
    assert "is not empty and holds no run of lmx; choose another --output" in done.err
    assert (tmp_path / "thesis.tex").exists()


def test_an_overwrite_that_cannot_begin_keeps_the_old_run(run, lmx, tmp_path):
    before = {path: path.stat().st_size for path in run.rglob("*")}
    done = lmx("train", "--data", tmp_path / "missing", "--output", run, "--overwrite")
    assert done.code == 2 and "missing" in done.err
    assert {path: path.stat().st_size for path in run.rglob("*")} == before


def test_a_resumed_run_keeps_its_options(run, lmx, tmp_path):
    # 600 and 0.004 are what the preset would fill in: given, they are refused all the same.
    done = lmx("train", "--resume", "--output", run, "--steps", 600, "--learning-rate", 0.004)
    assert done.code == 2
    for wanted in ("steps (was 60, is 600)", "learning_rate (was 0.003, is 0.004)", "leave them out"):
        assert wanted in done.err

    done = lmx("train", "--resume", "--output", tmp_path)
    assert done.code == 2 and f"there is no run in {tmp_path} to resume; leave out --resume" in done.err
    done = lmx("train", "--resume", "--overwrite", "--output", run)
    assert done.code == 2 and "give one of them" in done.err


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_an_output_that_cannot_be_written(place, lmx, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    done = lmx("train", "--data", text, "--output", place)
    assert done.code == 2
    assert done.err.startswith(f"lmx: {place} ") and "choose another --output" in done.err
    assert (tmp_path / "file").read_text() == "not a folder"
