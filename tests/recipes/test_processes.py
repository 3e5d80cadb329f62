"""`lmx train` as several real processes over loopback: the numbers of one, stopping, and being started again.

Programs are compiled for compile time and shared through a cache, for most of this would be compiling.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
def begin(place):
    """begin(words, devices): `lmx words` in a process with so many simulated devices."""
    started = []

    def start(words: str, devices: int = 2) -> subprocess.Popen:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(place / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "lmx", *words.split()]
        started.append(subprocess.Popen(command, cwd=place, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.fixture(scope="module")
def one(begin, place) -> dict[int, dict]:
    """The metrics of one process with four devices."""
    end(begin(f"{RUN} --data words.txt --output one --json", devices=4))
    return metrics(place / "one")


@pytest.fixture(scope="module")
def two(begin, place) -> Path:
    """The folder of an undisturbed run of two processes with two devices each."""
    out, err = end(begin(f"{RUN} --data words.txt --output two --json --supervise --local-processes 2"))
    assert json.loads(out.splitlines()[-1]) == json.loads((place / "two" / "result.json").read_text())
    assert sum(line.startswith("{") for line in out.splitlines()) == 1  # process 0 alone prints
    assert "exit codes" not in err  # nobody was started again
    return place / "two"


def end(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out, err


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


def hurt(supervisor: subprocess.Popen, index: int, how: signal.Signals) -> None:
    """Send a signal to one of the processes of a run."""
    children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
    os.kill(int(children[index]), how)


def until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_for(line: str, process: subprocess.Popen) -> str:
    """Read the process's stderr until a line begins so."""
    said = []
    for text in process.stderr:
        said.append(text)
        if text.startswith(line):
            return text
    raise AssertionError("".join(said)[-3000:])


@pytest.mark.slow
def test_two_processes_give_what_one_gives(one, two, place):
    assert_close(two, one, 1e-5)
    assert bits(two) == pytest.approx(bits(place / "one"), rel=1e-5)


@pytest.mark.slow
def test_four_processes_give_what_one_gives(one, begin, place):
    _, err = end(begin(f"{RUN} --data words.txt --output four --supervise --local-processes 4", devices=1))
    assert "exit codes" not in err
    assert_close(place / "four", one, 1e-5)
    assert bits(place / "four") == pytest.approx(bits(place / "one"), rel=1e-5)


@pytest.mark.slow
def test_stopped_killed_and_started_again_it_ends_as_if_nothing_had_happened(two, begin, place):
    words = "--output hurt --supervise --local-processes 2 --json"
    process = begin(f"{RUN} --data words.txt {words}")
    wait_for("step 3/15", process)
    process.send_signal(signal.SIGTERM)
    _, err = end(process)
    assert err.count("stopped and saved at step") == 1 and "Go on with: lmx train --resume --output hurt" in err

    process = begin(f"train --resume {words}")
    wait_for("step ", process)
    hurt(process, 1, signal.SIGKILL)
    _, err = end(process)
    assert "lmx: process 1 of 2 ended, or its machine did. Start all processes again" in err
    assert "[75, -9]; 2 processes go on from checkpoint" in err
    assert_same(two, place / "hurt")


@pytest.mark.slow
def test_a_killed_coordinator_and_a_stopped_worker_leave_no_trace(two, begin, place):
    words = "--output lost --supervise --local-processes 2 --heartbeat 5 --json"
    process = begin(f"{RUN} --data words.txt {words}")
    wait_for("step 3/15", process)
    until(lambda: (place / "lost" / "checkpoints" / "3").exists())
    hurt(process, 0, signal.SIGKILL)
    said = wait_for("lmx: exit codes", process)
    newest = re.search(r"\[-9, 75\]; 2 processes go on from checkpoint (\d+)", said).group(1)
    assert wait_for("llama-tiny", process).endswith(f"going on at step {newest}\n")

    wait_for("step ", process)
    hurt(process, 1, signal.SIGSTOP)
    begun = time.monotonic()
    said = wait_for("lmx: process 1 of 2", process)
    assert "gave no sign of life for 5 seconds. Start all processes again" in said and time.monotonic() - begun < 20
    newest = re.search(r"\[75, -9\]; 2 .* checkpoint (\d+)", wait_for("lmx: exit codes", process)).group(1)
    assert wait_for("llama-tiny", process).endswith(f"going on at step {newest}\n")
    out, _ = end(process)
    assert json.loads(out.splitlines()[-1])["steps"] == 15
    assert_same(two, place / "lost")


@pytest.mark.slow
def test_fewer_processes_go_on_with_a_run(two, begin, place):
    subprocess.run(["cp", "-r", two, place / "fewer"], check=True)
    for step in (9, 12, 15):
        subprocess.run(["rm", "-r", place / "fewer" / "checkpoints" / str(step)], check=True)
    end(begin("train --resume --output fewer --supervise"))
    assert_close(place / "fewer", metrics(two), 1e-4)


@pytest.mark.slow
def test_a_folder_that_is_taken_ends_all_with_the_same_message(two, begin, free_address):
    before, address = sorted(two.rglob("*")), free_address()
    both = [
        begin(f"{RUN} --data words.txt --output two --coordinator {address} --num-processes 2 --process-id {i}")
        for i in range(2)
    ]
    for process in both:
        _, err = end(process, code=2)
        assert "lmx: two holds another run; go on with it by --resume" in err and "Traceback" not in err
    assert sorted(two.rglob("*")) == before
