"""`lmx train` as several real processes over loopback: the numbers of one, stopping, and being started again.

Programs are compiled for compile time and shared through a cache, for most of this would be compiling.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SHAPE = "--tokenizer byte --model llama-tiny --batch-size 8 --length 16 --optimizer adamw --learning-rate 1e-3"
RUN = f"train {SHAPE} --steps 15 --evaluate-every 3 --save-every 3 --keep 9"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a text; the runs go beside it."""
    folder = tmp_path_factory.mktemp("processes")
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(300)]
    (folder / "words.txt").write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(300)))
    return folder


@pytest.fixture(scope="module")
def begin(begun, hurts, quickly, place):
    """begin(words, devices, *points): `lmx words` in a process with so many simulated devices, hurt at these points."""

    def start(words: str, devices: int = 2, *points: dict):
        environment = os.environ | quickly(devices) | hurts(*points) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        return begun([sys.executable, "-m", "lmx", *words.split()], cwd=place, env=environment)

    return start


@pytest.fixture(scope="module")
def one(begin, place) -> dict[int, dict]:
    """The metrics of one process with four devices."""
    begin(f"{RUN} --data words.txt --output one --json", 4).end()
    return metrics(place / "one")


@pytest.fixture(scope="module")
def two(begin, place) -> Path:
    """The folder of an undisturbed run of two processes with two devices each."""
    out, err = begin(f"{RUN} --data words.txt --output two --json --supervise --local-processes 2").end()
    assert json.loads(out.splitlines()[-1]) == json.loads((place / "two" / "result.json").read_text())
    assert sum(line.startswith("{") for line in out.splitlines()) == 1  # process 0 alone prints
    assert "exit codes" not in err  # nobody was started again
    return place / "two"


def metrics(folder: Path) -> dict[int, dict]:
    """The losses of a run by step."""
    found: dict[int, dict] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        numbers = {name: line[name] for name in ("loss", "grad_norm", "valid_loss") if name in line}
        found.setdefault(line["step"], {}).update(numbers)
    return found


def bits(folder: Path) -> float:
    return json.loads((folder / "result.json").read_text())["bits_per_byte"]["all"]


def assert_close(got: Path, wanted: dict[int, dict], tolerance: float) -> None:
    ours = metrics(got)
    assert ours.keys() >= wanted.keys()
    for step, values in wanted.items():
        assert ours[step] == pytest.approx(values, rel=tolerance)


def assert_same(wanted: Path, got: Path) -> None:
    """Every loss and every parameter of two runs, to the bit."""
    losses, found = metrics(wanted), metrics(got)
    assert {step: found[step] for step in losses} == losses
    same = [(folder / "model" / "model.safetensors").read_bytes() for folder in (wanted, got)]
    assert same[0] == same[1]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(one, two, place):
    assert_close(two, one, 1e-5)
    assert bits(two) == pytest.approx(bits(place / "one"), rel=1e-5)


@pytest.mark.slow
def test_four_processes_give_what_one_gives(one, begin, place):
    _, err = begin(f"{RUN} --data words.txt --output four --supervise --local-processes 4", 1).end()
    assert "exit codes" not in err
    assert_close(place / "four", one, 1e-5)
    assert bits(place / "four") == pytest.approx(bits(place / "one"), rel=1e-5)


@pytest.mark.slow
def test_stopped_killed_and_started_again_it_ends_as_if_nothing_had_happened(two, begin, place):
    words = "--output hurt --supervise --local-processes 2 --json"
    stop = {"at": "step", "number": 4, "signal": signal.SIGTERM, "parent": True, "mark": "stopped"}
    _, err = begin(f"{RUN} --data words.txt {words}", 2, stop).end()
    assert err.count("stopped and saved at step 5.") == 1 and "Go on with: lmx train --resume --output hurt" in err

    # Checksums are taken when a checkpoint is restored and of steps 6 and 9: process 0 fails in the save of step 9.
    kill = {"at": "checksums", "number": 3, "process": 1, "signal": signal.SIGKILL, "mark": "killed"}
    _, err = begin(f"train --resume {words}", 2, kill).end()
    assert "lmx: process 1 of 2 ended, or its machine did. Start all processes again" in err
    assert "[75, -9]; 2 processes go on from checkpoint 6" in err
    assert_same(two, place / "hurt")


@pytest.mark.slow
def test_a_killed_coordinator_and_a_stopped_worker_leave_no_trace(two, begin, place):
    words = "--output lost --supervise --local-processes 2 --heartbeat 15 --json"
    kill = {"at": "step", "number": 5, "signal": signal.SIGKILL, "mark": "coordinator"}
    hang = {"at": "step", "number": 7, "process": 1, "signal": signal.SIGSTOP, "mark": "worker"}
    process = begin(f"{RUN} --data words.txt {words}", 2, kill, hang)
    for says, codes in (
        ("process 0 of 2 ended, or its machine did. Start all processes again", "[-9, 75]"),
        ("process 1 of 2 gave no sign of life for 15 seconds. Start all processes again", "[75, -9]"),
    ):
        process.wait_for(f"lmx: {says}")
        told = process.wait_for("lmx: exit codes").strip()
        newest = told.removeprefix(f"lmx: exit codes {codes}; 2 processes go on from checkpoint ")
        going_on = "tokens" if newest == "none" else f"going on at step {newest}"
        assert process.wait_for("llama-tiny").endswith(f"{going_on}\n")
    out, _ = process.end()
    assert json.loads(out.splitlines()[-1])["steps"] == 15
    assert_same(two, place / "lost")


@pytest.mark.slow
def test_fewer_processes_go_on_with_a_run(two, begin, place):
    subprocess.run(["cp", "-r", two, place / "fewer"], check=True)
    for step in (9, 12, 15):
        subprocess.run(["rm", "-r", place / "fewer" / "checkpoints" / str(step)], check=True)
    begin("train --resume --output fewer --supervise").end()
    assert_close(place / "fewer", metrics(two), 1e-4)


@pytest.mark.slow
def test_a_folder_that_is_taken_ends_all_with_the_same_message(two, begin, free_address):
    before, address = sorted(two.rglob("*")), free_address()
    both = [
        begin(f"{RUN} --data words.txt --output two --coordinator {address} --num-processes 2 --process-id {i}")
        for i in range(2)
    ]
    for process in both:
        _, err = process.end(2)
        assert "lmx: two holds another run; go on with it by --resume" in err and "Traceback" not in err
    assert sorted(two.rglob("*")) == before
