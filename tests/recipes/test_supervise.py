"""The supervisor by itself, with small processes in place of training: when it starts again, and with how many."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmx.core.errors import ConfigError, LmxError
from lmx.recipes import supervise as module
from lmx.recipes.options import TrainOptions, resolve, values
from lmx.recipes.supervise import SuperviseOptions, check, resuming, supervise
from lmx.train.processes import ProcessOptions

OPTIONS = TrainOptions(batch_size=8)
LONG = 300.0  # seconds of the heartbeat where nobody is to fall silent, on a machine that does much else
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # this process has used jax


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(module.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


class Script:
    """Each attempt's exit codes, the processes told apart; notes what was started."""

    def __init__(self, *attempts, before=lambda attempt: None):
        self.attempts, self.before, self.started = attempts, before, []

    def __call__(self, process: int, count: int, coordinator: str, going_on: bool) -> list[str]:
        if process == 0:
            self.before(len(self.started))
            self.started.append((count, going_on))
        code = self.attempts[min(len(self.started), len(self.attempts)) - 1][process]
        end = f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"
        return [sys.executable, "-S", "-c", f"import os, sys; {end}"]


def go(script: Script, folder: Path, local: int = 2, restarts: int = 2) -> int:
    return supervise(script, folder, OPTIONS, LONG, SuperviseOptions(True, local, restarts))


def claimed(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps({"options": values(resolve(OPTIONS))}))


def test_a_lost_process_starts_all_again_and_goes_on_once_the_folder_is_claimed(folder):
    script = Script((75, -9), (0, 0), before=lambda attempt: claimed(folder) if attempt == 0 else None)
    assert go(script, folder) == 0 and script.started == [(2, False), (2, True)]


def test_it_gives_up_where_nothing_is_gained(folder, capsys):
    script = Script((75, 75))
    assert go(script, folder) == 75 and script.started == [(2, False)] * 3
    assert "ended 3 times without a new checkpoint (exit codes [75, 75]; the newest: none)" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_a_new_checkpoint_counts_as_progress(folder):
    script = Script(*[(75, -9)] * 6, (0, 0), before=lambda attempt: (folder / "checkpoints" / str(attempt)).mkdir())
    assert go(script, folder) == 0 and len(script.started) == 7


@pytest.mark.parametrize("code", [2, 130])
def test_a_mistake_is_not_repeated(folder, code):
    script = Script((code, 75))
    assert go(script, folder) == code and len(script.started) == 1


def test_a_failed_save_is_no_mistake_as_long_as_there_is_progress(folder):
    script = Script((2, 2), before=lambda attempt: (folder / "checkpoints" / "5").mkdir(exist_ok=True))
    assert go(script, folder) == 2 and len(script.started) == 2  # the second start saved nothing new


def test_a_child_that_gives_no_sign_of_life_any_more_is_killed(folder, monkeypatch):
    """Stopped, while no other process of this machine has ended that would start the clock."""
    monkeypatch.setattr(module, "SLACK", 0.5)
    child = (
        "import os, pathlib, signal, sys, time; sign = pathlib.Path(os.environ['LMX_SIGN_OF_LIFE'])\n"
        "if os.path.exists('again'): sys.exit(0)\n"
        "open('again', 'w').close()\n"
        "time.sleep(1); sign.touch(); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    monkeypatch.chdir(folder)
    words = lambda *_: [sys.executable, "-S", "-c", child]  # noqa: E731
    assert supervise(words, folder, OPTIONS, 1.0, SuperviseOptions(True, 1)) == 0
    assert (folder / "again").exists()


def test_a_child_that_fell_silent_is_killed_as_soon_as_another_says_so(folder, monkeypatch):
    monkeypatch.setattr(module, "SLACK", 10_000.0)
    silent = (
        "import os, pathlib, signal, time; pathlib.Path(os.environ['LMX_SIGN_OF_LIFE']).touch(); "
        "os.kill(os.getpid(), signal.SIGSTOP)"
    )
    codes = ["import sys, time; time.sleep(1); sys.exit(75)", silent]
    words = lambda process, *_: [sys.executable, "-S", "-c", codes[process]]  # noqa: E731
    assert supervise(words, folder, OPTIONS, 1.0, SuperviseOptions(True, 2, 0)) == 75


def test_what_was_typed_at_first_goes_on_with_the_same_run(folder, monkeypatch):
    def going_on(options: TrainOptions, again: bool = False) -> list[str]:
        given = []
        monkeypatch.setattr(module, "supervise", lambda command, place, options, *_: given.append((command, options)))
        monkeypatch.setenv(module.STARTED, "")
        module.run(options, ProcessOptions("auto"), SuperviseOptions(True))
        (command, options), = given
        assert os.environ[module.STARTED] == "--coordinator auto --supervise"
        return command(0, 1, "", options.resume)[4:]

    here = dataclasses.replace(OPTIONS, output=str(folder))
    new = [f"--output={folder}", "--batch-size=8", "--coordinator=auto"]
    assert going_on(here) == new
    claimed(folder)
    assert going_on(here) == [f"--output={folder}", "--resume", "--coordinator=auto"]
    assert going_on(dataclasses.replace(here, overwrite=True))[1] == "--overwrite"
    assert going_on(dataclasses.replace(here, batch_size=16))[1] == "--batch-size=16"  # which will be refused


def test_devices_that_cannot_be_counted_are_told_of(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    with pytest.raises(LmxError, match="cannot be counted: .*abacus"):
        module._devices_each()


def test_a_process_that_does_not_come_back_is_left_out(folder, monkeypatch):
    claimed(folder)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    script = Script(*[(75, 75, 75, -9)] * 2, (0, 0))
    assert go(script, folder, local=4, restarts=3) == 0
    assert [count for count, _ in script.started] == [4, 4, 2]  # 8 rows do not divide over 3 devices


@pytest.mark.slow
def test_sigterm_ends_the_children_and_a_killed_supervisor_leaves_none(tmp_path):
    child = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
    child += "open(f'alive-{os.getpid()}', 'w').close(); time.sleep(600)"
    source = (
        "import sys; from pathlib import Path; from lmx.recipes.supervise import *\n"
        f"words = lambda *_: [sys.executable, '-S', '-c', {child!r}]\n"
        f"sys.exit(supervise(words, Path('.'), TrainOptions(), {LONG}, SuperviseOptions(True, 2)))"
    )
    for how, code in ((signal.SIGTERM, 0), (signal.SIGKILL, -9)):
        place = tmp_path / how.name
        place.mkdir()
        process = subprocess.Popen([sys.executable, "-c", source], cwd=place)
        both = lambda place=place: len(list(place.glob("alive-*"))) == 2  # noqa: E731
        until(lambda both=both, process=process: both() or process.poll() is not None)
        process.send_signal(how)
        assert process.wait(300) == code
        pids = [int(path.name.split("-")[1]) for path in place.glob("alive-*")]
        until(lambda pids=pids: not any(running(pid) for pid in pids))


def until(true, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_options_that_cannot_be_supervised():
    for joining, supervising, message in (
        (ProcessOptions(), SuperviseOptions(local_processes=2), "--local-processes and --restarts need --supervise"),
        (ProcessOptions("host:1", 2, 0), SuperviseOptions(True, 2), "one supervised process on each machine"),
        (ProcessOptions(), SuperviseOptions(True, 0), "--local-processes must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(joining, supervising)


def test_going_on_tells_again_only_what_may_differ():
    again = resuming(TrainOptions(data="x", steps=5, overwrite=True, keep=4, keep_best=True), Path("there"))
    assert again == TrainOptions(output="there", resume=True, keep=4, keep_best=True)
