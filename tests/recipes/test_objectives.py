"""`lmx train --objective`: each learns, is measured by what it predicts, and goes on as if it had never stopped."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random

import jax
import numpy as np
import pytest
from rich.console import Console

import lmx
from lmx.core.errors import ConfigError, DataError, FolderError
from lmx.data import byte_tokenizer, load_tokenizer
from lmx.recipes import generate, models, rows, train
from lmx.recipes.generate import GenerateOptions
from lmx.recipes.objectives import KINDS
from lmx.recipes.options import TrainOptions, resolve

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}a: {% endif %}"
)
pytestmark = pytest.mark.slow  # ten short runs
RNG = random.Random(2)
WORDS = ["".join(RNG.choices("abcdef", k=RNG.randint(2, 4))) for _ in range(30)]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """How the devices are split is tested elsewhere; a program for one compiles in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "_mesh", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """What each objective learns from: sentences of few words; to read them backwards; to repeat the last word."""
    place = tmp_path_factory.mktemp("sources")
    sentences = [RNG.choices(WORDS, k=5) for _ in range(600)]
    (place / "words.txt").write_text("\n".join(map(" ".join, sentences)))
    with open(place / "pairs.jsonl", "w") as pairs, open(place / "chat.jsonl", "w") as chat:
        for words in sentences:
            pairs.write(json.dumps({"source": " ".join(words[:2]), "target": " ".join(words[1::-1])}) + "\n")
            said = [("user", words[0]), ("assistant", words[0] * 2)]
            chat.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in said]}) + "\n")
    return {
        **dict.fromkeys(("causal", "masked", "spans"), str(place / "words.txt")),
        "pairs": str(place / "pairs.jsonl"), "chat": str(place / "chat.jsonl"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> str:
    """A folder with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    byte_tokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def options(objective, sources, talker, output, **more) -> TrainOptions:
    tokenizer = talker if objective == "chat" else "byte"
    shape = dict(tokenizer=tokenizer, model="llama-tiny", batch_size=8, length=48, steps=16, learning_rate=1e-2)
    often = dict(evaluate_every=8, save_every=8, optimizer="adamw")
    chosen = shape | often | dict(objective=objective, data=sources.get(objective, "local")) | more
    return TrainOptions(output=str(output), **chosen)


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["valid_loss"] for line in lines if "valid_loss" in line]


@pytest.fixture(scope="module")
def trained(sources, talker, tmp_path_factory):
    """Runs by their objective, each trained when it is asked for: (folder, result, what was printed)."""
    place, made = tmp_path_factory.mktemp("runs"), {}

    def run(objective: str):
        if objective not in made:
            said = io.StringIO()
            result = train.run(options(objective, sources, talker, place / objective), Console(file=said, width=200))
            made[objective] = place / objective, result, said.getvalue()
        return made[objective]

    return run


@pytest.mark.parametrize("objective", [name for name in KINDS if name != "causal"])
def test_each_learns_and_says_what_it_measures(trained, objective):
    folder, result, _ = trained(objective)
    found = losses(folder)
    assert len(found) == 2 and found[-1] < math.log(257) - 1  # which is what a new model has, or more
    assert result["objective"] == objective and "bits_per_byte" not in result
    assert result["targets"] == KINDS[objective].targets
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    model = lmx.load(folder / "model")
    assert model.config.architecture == KINDS[objective].architecture and not (folder / "unigram").exists()
    assert (folder / "loss.png").exists()


@pytest.mark.parametrize("objective", [name for name in KINDS if name != "causal"])
def test_the_loss_is_that_of_every_held_out_target_once(trained, sources, talker, objective):
    """Against log-softmax in float64 of the model's own logits, over the batches that the run holds out."""
    folder, result, _ = trained(objective)
    model = lmx.load(folder / "model")
    corpus = train.texts.reopen(folder / "data")
    total = weight = 0.0
    for batch in rows.held_out(resolve(options(objective, sources, talker, folder)), corpus, "test"):
        given = {name: batch[name] for name in ("encoder_tokens", "encoder_segment_ids") if name in batch}
        logits = lmx.logits(
            model, batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"], **given
        )
        logits = np.asarray(logits, np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= (np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0] * batch["weights"]).sum()
        weight += batch["weights"].sum()
    assert result["loss"] == pytest.approx(total / weight, rel=1e-4)
    if KINDS[objective].examples:
        assert weight == corpus.examples["test"].learnt.sum()


@pytest.mark.parametrize("objective", ["masked", "pairs"])
def test_a_stopped_run_resumes_to_the_very_same_numbers(trained, sources, talker, objective, tmp_path, monkeypatch):
    folder, result, _ = trained(objective)
    quiet = Console(file=io.StringIO())
    asked = iter([False] * 3 + [True])
    monkeypatch.setattr(train, "stop_requests", lambda: contextlib.nullcontext(lambda: next(asked, False)))
    assert train.run(options(objective, sources, talker, tmp_path / "halves"), quiet)["stopped"]
    monkeypatch.undo()
    halves = train.run(TrainOptions(output=str(tmp_path / "halves"), resume=True), quiet)
    assert halves["loss"] == result["loss"]
    whole, stopped = (lmx.load(place / "model") for place in (folder, tmp_path / "halves"))
    jax.tree.map(np.testing.assert_array_equal, whole, stopped)


def test_a_chat_run_and_a_run_of_pairs_are_used_as_they_were_trained(trained):
    folder, _, said = trained("chat")
    assert "conversations" in said and (folder / "model" / "chat_template.jinja").read_text() == TEMPLATE
    for place in (folder, folder / "checkpoints"):
        answer = generate.run(GenerateOptions(model=str(place), prompt="abc", chat=True, max_new_tokens=4))
        assert len(answer["texts"]) == 1
    folder, _, said = trained("pairs")
    assert "pairs" in said
    assert len(generate.run(GenerateOptions(model=str(folder), prompt="abc", max_new_tokens=4))["texts"]) == 1


def test_a_new_tokenizer_gets_the_special_tokens_that_are_needed(trained):
    for objective, count in (("masked", 1), ("spans", 100)):
        tokenizer = load_tokenizer(trained(objective)[0] / "model")
        assert tokenizer.vocab_size == 257 + count
        assert tokenizer.encode(KINDS[objective].special[0], special=True) == [257]
        assert tokenizer.encode(KINDS[objective].special[0]) == list(KINDS[objective].special[0].encode())


def test_fine_tuning_goes_on_with_the_same_objective(trained, sources, talker, tmp_path):
    folder, before, _ = trained("spans")
    more = dict(init=str(folder), model=None, tokenizer=None, steps=4)
    result = train.run(options("spans", sources, talker, tmp_path / "more", **more), Console(file=io.StringIO()))
    assert abs(result["loss"] - before["loss"]) < 0.3


def test_a_chat_goes_on_from_a_checkpoint(trained, sources, talker, tmp_path):
    folder, _, _ = trained("chat")
    more = dict(init=str(folder / "checkpoints"), model=None, tokenizer=None, steps=4)
    result = train.run(options("chat", sources, talker, tmp_path / "more", **more), Console(file=io.StringIO()))
    assert result["loss"] < math.log(257) - 1
    assert models.load_template(str(tmp_path / "more" / "checkpoints")).source == TEMPLATE


def test_two_files_of_lines_are_pairs(sources, talker, tmp_path):
    pairs = [json.loads(line) for line in open(sources["pairs"])]
    for side in ("source", "target"):
        (tmp_path / f"{side}.txt").write_text("".join(f"{pair[side]}\n" for pair in pairs))
    files = {"pairs": f"{tmp_path}/source.txt, {tmp_path}/target.txt"}
    assert train.texts.read_pairs(files["pairs"]) == train.texts.read_pairs(sources["pairs"])


def test_wrong_combinations(trained, sources, talker, tmp_path):
    def refused(kind, wanted, objective, **more):
        with pytest.raises(kind, match=wanted):
            train.run(options(objective, sources, talker, tmp_path / "no", **more), Console(file=io.StringIO()))
        assert not (tmp_path / "no").exists()

    chat, masked = str(trained("chat")[0]), str(trained("masked")[0])
    new = dict(model=None, tokenizer=None)
    refused(ConfigError, "no objective 'mask', .*did you mean 'masked'", "mask")
    refused(ConfigError, "trains models of architecture 'encoder', .*give --objective causal or chat", "masked",
            init=chat, **new)  # fmt: skip
    refused(ConfigError, "'decoder', .* one of 'encoder': give --objective masked", "chat", init=masked, **new)
    refused(ConfigError, "'chat' needs a chat template, and the tokenizer 'byte' has none", "chat", tokenizer="byte")
    bare = tmp_path / "bare"
    byte_tokenizer().save(bare)
    refused(FolderError, "has no chat template", "chat", tokenizer=str(bare))
    refused(DataError, "'chat' learns from --data FILE.jsonl .*not from 'local'", "chat", data="local")
    refused(DataError, "there is no list of messages under 'messages'", "chat", data=sources["pairs"])
    refused(DataError, "'pairs' learns from --data FILE.jsonl .*not from 'local'", "pairs", data="local")
    refused(DataError, "no text under the key 'source'", "pairs", data=sources["chat"])
    few = tmp_path / "few.jsonl"
    few.write_text('{"source": "a", "target": "b"}\n')
    refused(DataError, "1 examples are too few: none is left for the", "pairs", data=str(few))
    lmx.save(lmx.init(lmx.preset("llama-tiny", architecture="encoder"), jax.random.key(0)), tmp_path / "encoder",
             tokenizer=byte_tokenizer())  # fmt: skip
    refused(DataError, "has no mask token", "masked", init=str(tmp_path / "encoder"), **new)
