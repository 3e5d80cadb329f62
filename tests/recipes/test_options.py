"""The options of a training run: presets, checks, and what a resumed run may change."""

from __future__ import annotations

import dataclasses

import pytest

from lmx.core.errors import ConfigError
from lmx.recipes.options import DEFAULTS, PRESETS, TrainOptions, folder, resolve, resumed, values


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_everything_that_needs_a_value(name):
    full = values(resolve(TrainOptions(preset=name)))
    empty = {option for option, value in full.items() if value is None}
    says_something = {"output", "init", "ema_decay", "mesh", "compute_dtype", "remat", "keep_every"}
    assert empty == says_something | {"checkpoint_folder"}
    assert full["model"] == PRESETS[name]["model"]
    assert full["warmup"] == full["steps"] // 20


def test_what_is_given_wins_over_the_preset():
    full = resolve(TrainOptions(steps=10, warmup=3, model="gpt2-tiny"))
    assert (full.steps, full.warmup, full.model) == (10, 3, "gpt2-tiny")


def test_every_default_is_an_option():
    known = {field.name for field in dataclasses.fields(TrainOptions)}
    assert set(DEFAULTS).union(*PRESETS.values()) <= known


def test_the_folder_is_named_by_the_preset_if_not_given():
    assert str(folder(TrainOptions(preset="small"))) == "runs/small"
    assert str(folder(TrainOptions(output="~/x"))).endswith("/x") and "~" not in str(folder(TrainOptions(output="~/x")))


def test_a_resumed_run_changes_only_what_it_may():
    stored = values(resolve(TrainOptions(preset="small", steps=7)))
    again = resumed(TrainOptions(output="there", resume=True, keep=5, mesh="fsdp=2"), stored)
    assert again.steps == 7 and again.preset == "small" and again.model == PRESETS["small"]["model"]
    assert (again.keep, again.mesh, again.output, again.resume) == (5, "fsdp=2", "there", True)
    assert resumed(TrainOptions(resume=True, steps=7), stored).steps == 7
    with pytest.raises(ConfigError, match=r"differ: steps \(was 7, is 8\); leave them out, or start another run"):
        resumed(TrainOptions(resume=True, steps=8), stored)


def test_an_option_that_is_newer_than_a_run_has_its_default():
    stored = values(resolve(TrainOptions()))
    stored.pop("objective")
    assert resumed(TrainOptions(resume=True), stored).objective == "causal"
    with pytest.raises(ConfigError, match=r"differ: objective \(was 'causal', is 'masked'\)"):
        resumed(TrainOptions(resume=True, objective="masked"), stored)


def test_a_fine_tuning_brings_its_model_and_tokenizer():
    with pytest.raises(ConfigError, match="init brings its own model and tokenizer; leave out model, vocab_size"):
        resolve(TrainOptions(init="somewhere", model="llama-2m", vocab_size=300))


def test_the_best_checkpoint_needs_an_evaluation_of_each():
    assert resolve(TrainOptions(keep_best=True, evaluate_every=50, save_every=100)).keep_best
    with pytest.raises(ConfigError, match=r"save_every \(150\) must be a multiple of evaluate_every \(100\)"):
        resolve(TrainOptions(keep_best=True, evaluate_every=100, save_every=150))


def test_a_run_with_options_of_a_newer_lmx_is_not_resumed():
    with pytest.raises(ConfigError, match="options unknown to this lmx: colour"):
        resumed(TrainOptions(resume=True), values(resolve(TrainOptions())) | {"colour": "red"})
