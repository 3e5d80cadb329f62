"""Models opened from checkpoints: the same model and tokenizer, on any mesh, without the optimizer."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import lmx
from lmx import data
from lmx.core import sharding
from lmx.core.errors import FolderError
from lmx.hf import TokenizerFiles
from lmx.models import generation, transformer
from lmx.models.presets import preset
from lmx.recipes import checkpointed, convert, corpus, evaluate, generate, models, train
from lmx.recipes.convert import ConvertOptions
from lmx.recipes.evaluate import EvalOptions
from lmx.recipes.generate import GenerateOptions
from lmx.recipes.options import TrainOptions
from lmx.train import start
from lmx.train.checkpoints import Checkpoints

TOKENIZER, QUIET = data.byte_tokenizer(), Console(quiet=True)


def tiny() -> transformer.Model:
    sizes = dict(num_layers=3, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32)
    config, rng = preset("llama-10m", vocab_size=257, **sizes), np.random.default_rng(0)
    draw = lambda spec: jnp.asarray(rng.normal(size=spec.shape), spec.dtype)  # noqa: E731  (nothing to compile)
    return transformer.Model(config, jax.tree.map(draw, transformer.abstract(config)))


def saved(folder, model, steps=(5,), **how):
    """Checkpoints of a state that has moved on since its start; the last state."""
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            state = start(model, optax.adam(1e-3), **how)
            moved = lambda tree, by: jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + by, x.dtype), tree)  # noqa: E731
            state = state.replace(trained=moved(state.trained, step), ema=moved(state.ema, step / 2))
            notes = {"options": {"length": 64}}
            checkpoints.save(step, state, {"model": checkpointed.travelling(state.model, TOKENIZER, notes)})
    return state


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and (np.asarray(x) == np.asarray(y)).all()


@pytest.mark.parametrize("how", [{}, {"train": r"layers[1:3]/mlp", "ema_decay": 0.9}])
def test_the_model_of_a_checkpoint(tmp_path, how):
    state = saved(tmp_path / "run" / "checkpoints", tiny(), (5, 7), **how)
    for name in (tmp_path / "run" / "checkpoints", tmp_path / "run" / "checkpoints" / "7"):
        model, tokenizer = models.open_model(str(name))
        assert_same(model, state.ema_model)
        assert tokenizer.fingerprint == TOKENIZER.fingerprint and tokenizer.eos_token == TOKENIZER.eos_token
        assert models.trained_length(str(name)) == 64
    tokens = jnp.arange(12).reshape(2, 6)
    assert (lmx.logits(model, tokens) == lmx.logits(state.ema_model, tokens)).all()
    older = models.load_model(str(tmp_path / "run" / "checkpoints" / "5"))
    assert not (jax.tree.leaves(older)[0] == jax.tree.leaves(model)[0]).all() or "train" in how


def test_into_the_mesh_in_force_and_another_dtype(tmp_path, mesh):
    with sharding.use_mesh(None):
        state = saved(tmp_path, tiny())
    model = models.load_model(str(tmp_path), dtype=jnp.bfloat16)
    shapes = models.load_shapes(str(tmp_path))
    for leaf, shape, right in zip(*map(jax.tree.leaves, (model, shapes, state.model)), strict=True):
        assert leaf.sharding == shape.sharding and leaf.sharding.mesh == mesh
        assert leaf.dtype == jnp.bfloat16 and shape.shape == right.shape
        assert (np.asarray(leaf) == np.asarray(right.astype(jnp.bfloat16))).all()
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(model))


def test_only_the_model_is_read(tmp_path):
    """Damage in the optimizer's arrays is damage of the checkpoint, but not of the model in it."""
    state = start(tiny(), optax.adam(1e-3))
    rng = np.random.default_rng(1)
    noise = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state.opt_state[0].mu)
    state = state.replace(opt_state=(state.opt_state[0]._replace(mu=noise), *state.opt_state[1:]))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"model": checkpointed.travelling(state.model, TOKENIZER)})
    lost = np.asarray(max(jax.tree.leaves(noise), key=lambda x: x.size)).tobytes()
    blob = next(path for path in tmp_path.rglob("*") if path.is_file() and lost in path.read_bytes())
    blob.write_bytes(blob.read_bytes().replace(lost, bytes(len(lost))))
    assert_same(models.load_model(str(tmp_path)), state.model)
    with pytest.raises(FolderError, match=r"has changed.*the array opt_state\.0\.mu\."):
        Checkpoints(tmp_path).restore(state, step=1)


@pytest.mark.parametrize("to", ["lmx", "hf"])
def test_the_chat_template_travels(tmp_path, to):
    home, template = tmp_path / "talker", "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    home.mkdir()
    TOKENIZER.save(home)
    (home / "chat_template.jinja").write_text(template)
    (home / "vocab.json").write_text("{}")  # which tokenizer.json makes needless
    state, run = start(tiny(), optax.adam(1e-3)), tmp_path / "run"
    with Checkpoints(run) as checkpoints:
        checkpoints.save(1, state, {"model": checkpointed.travelling(state.model, TokenizerFiles(home))})
    assert models.load_template(str(run)) == data.load_template(home)
    assert generate.run(GenerateOptions(model=str(run), prompt="a", chat=True, max_new_tokens=1))["texts"]
    made = convert.run(ConvertOptions(source=str(run), target=str(tmp_path / to), to=to))
    assert data.load_template(tmp_path / to).source == template and "vocab.json" not in made["files"]
    assert data.load_tokenizer(tmp_path / to).fingerprint == TOKENIZER.fingerprint
    if to == "hf":
        assert json.loads((tmp_path / to / "config.json").read_text())["eos_token_id"] == TOKENIZER.eos_id


def test_what_a_tokenizer_came_with_goes_into_a_run(tmp_path):
    """The tokens that begin and end a text stand in a config that does not come along."""
    home, kept = tmp_path / "home", tmp_path / "kept"
    notes = {generation.NOTES: {"eos_token_id": [1, 2], "decoder_start_token_id": 7, "pad_token_id": None}}
    lmx.save(tiny(), home, tokenizer=TOKENIZER, notes=notes)
    (home / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    made = models.load_tokenizer(str(home))
    assert made.eos_ids == (1, 2)
    for objective in ("causal", "chat"):
        corpus._save_tokenizer(TrainOptions(init=str(home), objective=objective), made, kept / objective)
        assert data.load_tokenizer(kept / objective).eos_ids == (1, 2)
        assert data.load_template(kept / objective) == data.load_template(home)
        unchanged = TokenizerFiles(kept / objective).names
        assert unchanged and all((kept / objective / name).read_bytes() == before[name] for name in unchanged)
    corpus._save_tokenizer(TrainOptions(tokenizer=str(home)), made, kept / "new")
    assert data.load_tokenizer(kept / "new").eos_ids == (1, 2)
    options = TrainOptions(init=str(home), length=24)
    state, run = start(tiny(), optax.adam(1e-3)), tmp_path / "run"
    with Checkpoints(run) as checkpoints:
        extra = checkpointed.travelling(state.model, TokenizerFiles(kept / "chat"), train._notes(options))
        checkpoints.save(1, state, {"model": extra})
    assert models.decoder_start(str(run), made) == 7 and models.load_tokenizer(str(run)).eos_ids == (1, 2)
    assert models.came_from(str(run)) == notes[generation.NOTES] and models.trained_length(str(run)) == 24


def test_no_chat_template_is_said(tmp_path):
    saved(tmp_path, tiny())
    with pytest.raises(FolderError, match="checkpoint .* has no chat template with it.*plain text"):
        generate.run(GenerateOptions(model=str(tmp_path), prompt="a", chat=True))


def test_a_damaged_newest_one_is_passed_over_and_left_alone(tmp_path):
    state = saved(tmp_path, tiny(), (5, 7))
    lost = np.asarray(max(jax.tree.leaves(state.trained), key=lambda x: x.size)).tobytes()
    blob = next(path for path in (tmp_path / "7").rglob("*") if path.is_file() and lost in path.read_bytes())
    blob.write_bytes(blob.read_bytes().replace(lost, bytes(len(lost))))
    with pytest.warns(UserWarning, match=f"7 is damaged: .*{blob.name} has changed.*The checkpoint before it is used"):
        model = models.load_model(str(tmp_path))
    assert_same(model, models.load_model(str(tmp_path / "5")))
    with pytest.raises(FolderError, match="is damaged"):
        models.load_model(str(tmp_path / "7"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "7"]


def test_bad_input(tmp_path):
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(3)})
    with pytest.raises(FolderError, match="has no model with it that can be opened alone"):
        models.open_model(str(tmp_path / "other"))
    with pytest.raises(FolderError, match="there is no folder"):
        models.open_model(str(tmp_path / "nothing"))
    run = tmp_path / "run"
    saved(run / "checkpoints", tiny())
    (run / "run.json").write_text("{}")
    with pytest.raises(FolderError, match=f"not finished a model.*open its newest checkpoint: {run}/checkpoints"):
        models.open_model(str(run))
    with Checkpoints(tmp_path / "mute") as checkpoints:
        state = start(tiny(), optax.sgd(1.0))
        checkpoints.save(1, state, {"model": checkpointed.travelling(state.model, None)})
    assert models.load_model(str(tmp_path / "mute")).vocab_size == 257
    with pytest.raises(FolderError, match="has no tokenizer with it"):
        models.open_model(str(tmp_path / "mute"))


@pytest.mark.slow
def test_commands_take_checkpoints(tmp_path):
    text, last = tmp_path / "words.txt", str(tmp_path / "checkpoints")
    text.write_text("\n".join(f"line {i} of {i * i} words" for i in range(1000)))
    saved(last, tiny())
    shape = dict(data=str(text), batch_size=8, length=16)
    scores = [evaluate.run(EvalOptions(model=m, split="test", **shape), QUIET) for m in (last, f"{last}/5")]
    assert scores[0]["bits_per_byte"] == scores[1]["bits_per_byte"]
    assert isinstance(generate.run(GenerateOptions(model=last, prompt="line", max_new_tokens=4))["texts"][0], str)
    run = dict(steps=1, save_every=1, evaluate_every=1, learning_rate=1e-12, output=str(tmp_path / "b"))
    again = train.run(TrainOptions(**shape, **run, init=last), QUIET)
    assert again["bits_per_byte"]["all"] == pytest.approx(scores[0]["bits_per_byte"]["all"], rel=1e-3)
    made = [models.load_model(f"{again['output']}/{place}") for place in ("model", "checkpoints")]
    assert_same(*made)
