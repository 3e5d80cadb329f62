"""`lmx factorize` and `lmx compare` on a tiny model in Hugging Face's format and on a text."""

from __future__ import annotations

import csv
import io
import json
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import lmx
from lmx.cli import show_surgery
from lmx.cli.main import main
from lmx.core.kinds import Pivoted
from lmx.data.tokenizers import byte_tokenizer
from lmx.recipes import compare, factorize
from lmx.recipes.recovery import recover

CONFIG = lmx.Config(
    vocab_size=257, num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=48,
    initializer_range=0.3, tie_embeddings=False, remat="none",
)  # fmt: skip
LITTLE = "--tokens 256 --length 32"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, in which every leaf matters, and a text in files."""
    folder = tmp_path_factory.mktemp("factorize")
    model = lmx.init(CONFIG, jax.random.key(0))
    lmx.save(model, folder / "model", format="hf", tokenizer=byte_tokenizer())
    (folder / "text").mkdir()
    for i in range(60):
        sentence = f"{i} is a number, and so is {i * i}; {i} times {i + 1} is {i * i + i}. "
        (folder / "text" / f"{i}.txt").write_text(sentence * 8)
    return folder


@pytest.fixture
def run(place, capsys, monkeypatch):
    """run(words) -> the result, as --json prints it; run(words, code) -> what is said of a mistake."""
    monkeypatch.chdir(place)

    def call(words: str, code: int = 0):
        capsys.readouterr()
        if code:
            with pytest.raises(SystemExit) as ended:
                main(words.split())
            assert ended.value.code == code
            return capsys.readouterr().err
        main([*words.split(), "--json"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.mark.slow
def test_factorized_measured_and_written(run, place):
    got = run(f"factorize model --output small --keep 0.6 --data text {LITTLE}")
    assert 0.5 < got["kept"] <= 0.6 and got["parameters"] < got["parameters_before"]
    assert got["kl"] > 0 and got["perplexity"] > 0 and len(got["ranks"]) == 14
    small = lmx.load(place / "small")
    assert any(isinstance(w, Pivoted) for _, w in lmx.tree.paths(small, lmx.weights.is_weight))
    notes = json.loads((place / "small" / "structure.json").read_text())["notes"]
    assert notes["made by"] == "lmx factorize" and notes["with"]["keep"] == 0.6
    again = run(f"factorize small --output hf --format hf --keep 1 --method svd --data text {LITTLE}")
    assert again["format"] == "hf" and set(again["ranks"].values()) == {None}
    tokens = jnp.arange(20)[None]
    np.testing.assert_allclose(lmx.logits(lmx.load(place / "hf"), tokens), lmx.logits(small, tokens), atol=2e-4)


@pytest.mark.slow
def test_recovery_brings_it_nearer_to_the_original(run):
    words = f"factorize model --keep 0.4 --method svd --data text {LITTLE} --overwrite"
    plain = run(f"{words} --output plain")
    recovered = run(f"{words} --output recovered --recover 12")
    assert recovered["kl"] < plain["kl"] and recovered["recovery_steps"] == 12 and recovered["recovery_flops"] > 0


@pytest.mark.slow
def test_ctrl_c_ends_a_recovery_and_the_model_is_kept(run, place, monkeypatch):
    def interrupted(small, model, rows, *args, **how):
        """The recovery, with a real signal as its third batch is asked for."""

        def until_the_third():
            for i, row in enumerate(rows):
                if i == 2:
                    signal.raise_signal(signal.SIGINT)
                yield row

        return recover(small, model, until_the_third(), *args, **how)

    monkeypatch.setattr(factorize, "recover", interrupted)
    got = run(f"factorize model --keep 0.4 --method svd --data text {LITTLE} --recover 50 --output ended")
    assert got["recovery_steps"] == 3
    assert json.loads((place / "ended" / "structure.json").read_text())["notes"]["with"]["recover"] == 3
    assert lmx.load(place / "ended")


@pytest.mark.slow
def test_compared_in_one_table(run, place, capsys):
    words = f"compare --model model --data text --keep 0.7 --methods svd,lmx,int8,lmx+recovery,depth,width {LITTLE}"
    words += " --test-tokens 256 --recovery-steps 2 --batch 2 --output table"
    got = run(words)
    rows = {row["method"]: row for row in got["rows"]}
    assert list(rows) == ["original", "svd", "lmx", "int8", "lmx+recovery", "depth", "width"]
    assert all(set(row) == set(compare.COLUMNS) for row in got["rows"])
    assert rows["original"]["kl"] == 0 and rows["lmx"]["kl"] < rows["svd"]["kl"]
    assert all(rows[name]["parameters"] < rows["original"]["parameters"] for name in ("lmx", "depth", "width"))
    assert rows["int8"]["bytes"] < rows["original"]["bytes"] and rows["int8"]["keep"] is None
    assert all(row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0 for row in got["rows"])
    assert sorted(path.name for path in (place / "table").iterdir()) == sorted(got["files"])
    written = list(csv.DictReader((place / "table" / "compare.csv").open()))
    assert [row["method"] for row in written] == list(rows)
    assert json.loads((place / "table" / "compare.json").read_text())["rows"] == got["rows"]
    assert (place / "table" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "table holds compare.json" in run(words, code=2)
    said = io.StringIO()
    show_surgery.comparing(got, Console(file=said, width=200))
    for phase, doing in (("prefill", "reading"), ("decode", "decoding")):
        speeds = {row["method"]: row[f"{phase}_tokens_per_second"] for row in got["rows"]}
        told = [line for line in said.getvalue().splitlines() if f"slower than the original at {doing} 2 rows" in line]
        slower = [name for name, speed in speeds.items() if speed < speeds["original"]]
        assert len(told) == bool(slower) and all(name in told[0] for name in slower)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("factorize model --output x --keep 0", "--keep is a share, above 0 and at most 1, not 0.0"),
        ("factorize model --output x --keep 0.01 --data text --tokens 64 --length 32", "budget of .* is impossible"),
        ("factorize model --output x --unit seconds --pattern embed/tokens", "embed/tokens is looked up, not mult"),
        ("factorize model --output x --unit number", "no unit 'number'.*did you mean 'numbers'"),
        ("factorize model --output x --method svdllm --data text --tokens 64 --length 32", "no method 'svdllm'"),
        ("factorize model --output x --pattern nothing --data text --tokens 64 --length 32", "selects nothing"),
        ("factorize model --output x --tokens 8 --length 32", "8 tokens to calibrate on are less than one row of 32"),
        ("compare --model model --keep half", "shares with commas between, such as 0.8,0.5, not 'half'"),
        ("compare --model model --batch 0", "--batch must be at least 1, not 0"),
        ("compare --model model --keep 2", "shares above 0 and at most 1, not 2"),
        ("compare --model model --methods best", "no method 'best', there are svd"),
    ],
)
def test_bad_input(words, message, run, place):
    assert re.search(message, run(words, code=2))
    assert not (place / "x").exists()
