"""The files under experiments/ run as their docstrings say; here on little text and for few steps."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def call(quickly, tmp_path):
    """`call(file, *arguments) -> what python experiments/file prints`, with one device."""
    environment = os.environ | quickly() | {"PYTHONPATH": str(ROOT)}

    def run(file: str, *arguments: str) -> str:
        command = [sys.executable, str(ROOT / "experiments" / file), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_train_lm(call, tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(500)]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=9)) for _ in range(1500)))
    arguments = "--data text.txt --steps 3 --batch-size 2 --length 16".split()
    said = call("train_lm.py", *arguments)
    assert "step 3: loss" in said and "'valid_loss'" in said
    assert "bits per byte on the test split: {'all': " in said and "'text': " in said
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.slow
def test_distill(call, tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(500)]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=9)) for _ in range(4000)))
    said = call("distill.py", "--quick", "--data", "text.txt").splitlines()
    assert said[0].startswith("teacher: ") and sum(line.startswith("seed") for line in said) == 8
    arms = {line[:17].strip(): line[17:].split() for line in said[-4:]}
    assert list(arms) == ["KD", "KD, T = 2", "CE, equal steps", "CE, equal FLOPs"]
    steps = {name: int(words[0]) for name, words in arms.items()}
    assert steps["KD"] == steps["CE, equal steps"] < steps["CE, equal FLOPs"]
    assert "0 %" in " ".join(arms["CE, equal FLOPs"]) and "+-" in arms["CE, equal steps"]


@pytest.mark.slow
def test_factorize(call, tmp_path):
    """On a random model and a text in which nothing can be learned: every row is there, at equal numbers."""
    import jax

    import lmx
    from lmx.data.tokenizers import byte_tokenizer

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(500)]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=9)) for _ in range(1500)))
    config = lmx.preset("llama-tiny", vocab_size=257, hidden_size=32, intermediate_size=48, initializer_range=0.3)
    lmx.save(lmx.init(config, jax.random.key(0)), tmp_path / "model", tokenizer=byte_tokenizer())
    words = "--model model --data text.txt --keep 0.8 0.1 --batches 1 --steps 2".split()
    lines = call("factorize.py", *words).splitlines()
    rows = [line for line in lines if line.startswith("80%")]
    assert len(rows) == 4
    numbers = [float(row[37:46].split()[0]) for row in rows]
    assert max(numbers) < 1.04 * min(numbers)  # ranks are whole numbers
    assert sum("cannot be: the rest has more numbers" in line for line in lines) == 2
    assert all(float(word) >= 0 for row in rows for word in row[46:].split())


@pytest.mark.slow
def test_translate(call, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{n} and {n + 1}\n" for n in range(40)))
    (tmp_path / "b.txt").write_text("".join(f"{n + 1} und {n}\n" for n in range(40)))
    files = "--train a.txt b.txt --valid a.txt b.txt --test a.txt b.txt --output out.txt"
    said = call("translate.py", *f"{files} --quick --steps 6 --beams 2 --width 16".split())
    assert "step 6: loss" in said and "step 6: valid loss" in said and "\nours:      " in said and "BLEU" in said
    assert (tmp_path / "out.txt").read_text().count("\n") >= 40  # a translation may have line ends of its own


@pytest.mark.slow
def test_classify(call, tmp_path):
    said = call("classify.py", *"--quick --steps 12 --output made".split())
    assert "labels more a, more b" in said and "step 12: test accuracy" in said
    assert (tmp_path / "made" / "structure.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["data", "attention", "train_step", "decode", "startup", "scaling", "utilisation", "load", "grams"]
)
def test_benchmark(call, name):
    if name in ("train_step", "decode"):
        pytest.importorskip("torch", reason=f"torch is the peer of {name}.py; install the extra 'oracle'")
    result = json.loads(call(f"benchmarks/{name}.py", "--quick", "--json").splitlines()[-1])
    assert {"name", "ratio", "medians", "floor", "versions", "cases"} <= set(result)
    assert result["name"] == name and result["ratio"] > 0 and result["floor"] > 0 and result["cases"]
    assert all(seconds > 0 for seconds in result["medians"].values())


@pytest.mark.slow
def test_factorize_ladder(call, tmp_path):
    """On a random model, for which methods differ little; what is checked is that every row is there."""
    import jax

    import lmx
    from lmx.data.tokenizers import byte_tokenizer

    config = lmx.preset("llama-tiny", vocab_size=257, hidden_size=32, intermediate_size=48, initializer_range=0.3)
    lmx.save(lmx.init(config, jax.random.key(0)), tmp_path / "model", tokenizer=byte_tokenizer())
    words = ("--quick", "--json", "--model", "model", "--results", "results")
    result = json.loads(call("benchmarks/factorize_ladder.py", *words).splitlines()[-1])
    assert result == json.loads((tmp_path / "results" / "factorize_ladder.json").read_text())
    (half,) = result["cases"]
    assert half["case"] == "model, 50% removed" and result["ratio"] == half["ratio"] > 1
    assert len(half["medians"]) == 8 and all(kl > 0 for kl in half["medians"].values())
