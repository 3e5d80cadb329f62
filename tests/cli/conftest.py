"""What the tests of the command share: a little text, one tiny run that nobody changes, and ways to call `lmx`."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmx.cli.main import main

ROOT = Path(__file__).parents[2]
TINY = "--tokenizer byte --model llama-tiny --batch-size 4 --length 32"
STEPS = "--steps 60 --evaluate-every 5 --save-every 20 --learning-rate 0.003"


@dataclasses.dataclass
class Done:
    """How a call of the command ended."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict:
        """The JSON object on the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


def environment() -> dict[str, str]:
    """That of a user with one device."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="session")
def shell():
    """Run `python -m lmx ...` to its end in a process of its own, with these variables besides."""

    def run(*arguments: str | Path, cwd: Path, **variables: str) -> Done:
        command = [sys.executable, "-m", "lmx", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env=environment() | variables, capture_output=True, text=True, timeout=600
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def tiny(text) -> list[str]:
    """`lmx train` with the options of the finished run, but for its output."""
    return f"train --data {text} {TINY} {STEPS}".split()


@pytest.fixture
def lmx(capsys):
    """Call the command in this process, which is quick: `lmx("describe", folder)`."""

    def call(*arguments: str | Path) -> Done:
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return call


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder with two domains of made-up text, some 60 kB."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(800)]
    for domain in ("prose", "lists"):
        (folder / domain).mkdir()
        for number in range(40):
            lines = [" ".join(rng.choices(words, k=10)) for _ in range(12)]
            body = ("- " + "\n- ".join(lines)) if domain == "lists" else ". ".join(lines)
            (folder / domain / f"{number}.txt").write_text(body + "\n")
    return folder


@pytest.fixture(scope="session")
def trained(shell, tiny, tmp_path_factory) -> tuple[Path, Done]:
    """The folder of a finished run, and how the command that made it ended."""
    place = tmp_path_factory.mktemp("runs")
    return place / "run", shell(*tiny, "--output", "run", "--json", cwd=place)


@pytest.fixture(scope="session")
def run(trained) -> Path:
    """The folder of a finished run, to be read only."""
    folder, done = trained
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def model_copy(run, tmp_path) -> Path:
    """A copy of the run's model, to be damaged."""
    return Path(shutil.copytree(run / "model", tmp_path / "model"))


@pytest.fixture
def refused(lmx, text, tmp_path):
    """Start a run that must be refused; returns its message. Nothing may stay behind, and nothing may be missing."""

    def start(*arguments: str | Path, command: str = "train") -> str:
        output = tmp_path / "made" / "output"
        tiny = TINY.split()
        if "--init" in arguments:  # which brings the model and the tokenizer
            pairs = zip(tiny[::2], tiny[1::2], strict=True)
            tiny = [word for pair in pairs if pair[0] not in ("--model", "--tokenizer") for word in pair]
        words = ("--data", text, *tiny, "--steps", "4", "--output", output) if command == "train" else ()
        done = lmx(command, *words, *arguments)
        assert done.code == 2
        last = done.err.strip().splitlines()[-1]
        assert last.startswith("lmx: ") and "Traceback" not in done.out + done.err
        assert not output.parent.exists()
        return last

    return start
