"""`lmx train --supervise`: starts the processes of this machine, and all of them again when one is lost.

A process that is lost ends the others with exit code 75 (`lmx.train.processes`); then all go on from the newest sound
checkpoint. With as many processes as before the result is that of a run that nothing happened to.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lmx.core.errors import INTERRUPTED, LOST, MISTAKE, ConfigError, LmxError
from lmx.recipes import options as told
from lmx.recipes.claim import CHECKPOINTS, RECORD, stored_options
from lmx.recipes.meshes import fit_mesh
from lmx.recipes.options import CHANGEABLE, TrainOptions
from lmx.train import steps
from lmx.train.channel import SIGN_OF_LIFE, Clock
from lmx.train.checkpoints import open_path
from lmx.train.interrupt import stop_requests
from lmx.train.processes import ProcessOptions
from lmx.train.progress import PLAIN

SLACK = 15.0  # seconds that the others have to end, beyond the heartbeat's limit
STARTED = "LMX_STARTED_BY"  # tells a process the words that its supervisor was started with


@dataclasses.dataclass(frozen=True)
class SuperviseOptions:
    """Whether and how a run is started again."""

    supervise: bool = False
    """Start all processes of this machine again, from the newest sound checkpoint, whenever one of the run is lost."""
    local_processes: int = 1
    """With --supervise: processes to start, where this machine is the only one of the run."""
    restarts: int = 3
    """With --supervise: how often to start again in a row without a new checkpoint."""


Command = Callable[[int, int, str, bool], list[str]]  # (process, how many, coordinator, going on) -> what to start


def run(
    options: TrainOptions, joining: ProcessOptions, supervising: SuperviseOptions, *, json: bool = False
) -> int:
    """Supervise `lmx train` with these options until it is done; returns the exit code."""
    folder = told.folder(options)

    def command(process: int, count: int, coordinator: str, going_on: bool) -> list[str]:
        here = ProcessOptions(coordinator, count, process, joining.heartbeat, joining.join_timeout)
        given = resuming(options, folder) if going_on else options
        if count != supervising.local_processes:  # another mesh is needed: one like that of the run
            given = dataclasses.replace(given, mesh=None)
        words = [*_words(given, TrainOptions), *_words(here if coordinator else joining, ProcessOptions)]
        return [sys.executable, "-m", "lmx", "train", *words, *(["--json"] if json else [])]

    if _holds(folder, options):  # a machine that came back, and types what it typed at first
        options = dataclasses.replace(options, resume=True)
    os.environ[STARTED] = started_by(joining, supervising)
    return supervise(command, folder, options, joining.heartbeat, supervising)


def started_by(joining: ProcessOptions, supervising: SuperviseOptions) -> str:
    """The words of a command line that start as many processes in the same way, for a user to type again."""
    words = [*_words(joining, ProcessOptions), *_words(supervising, SuperviseOptions)]
    return os.environ.get(STARTED) or shlex.join(part for word in words for part in word.split("=", 1))


def check(joining: ProcessOptions, supervising: SuperviseOptions) -> None:
    """Raise ConfigError for options that cannot be supervised."""
    if not supervising.supervise and (supervising.local_processes, supervising.restarts) != (1, 3):
        raise ConfigError("--local-processes and --restarts need --supervise")
    if supervising.local_processes < 1 or supervising.restarts < 0:
        raise ConfigError("--local-processes must be at least 1 and --restarts at least 0")
    if supervising.local_processes > 1 and joining.coordinator is not None:
        raise ConfigError(
            "--local-processes is for a run on this machine alone, and --coordinator for one on several; there, "
            "start one supervised process on each machine"
        )


def resuming(options: TrainOptions, folder: Path) -> TrainOptions:
    """The options that go on with a run in its folder: only what may differ is told again."""
    again = {name: getattr(options, name) for name in CHANGEABLE}
    return TrainOptions(preset=options.preset, output=str(folder), resume=True, **again)


def supervise(
    command: Command, folder: Path, options: TrainOptions, heartbeat: float, supervising: SuperviseOptions
) -> int:
    """Start `command` for each process, and again until all end well, are stopped, or get no further.

    A process that is killed or hangs twice in a row without a new checkpoint counts as gone for good where there are
    others: the run goes on with fewer, as many as the rows of a batch divide over.
    """
    console = Console(stderr=True)
    count, fruitless, before = supervising.local_processes, 0, _stamp(folder)
    newest, suspects = _newest(folder, options), set()
    with stop_requests() as asked:
        while True:
            going_on = options.resume or _stamp(folder) != before  # else the folder is not this run's yet
            with tempfile.TemporaryDirectory() as place:
                codes, killed = _attempt(command, count, going_on, heartbeat, asked, Path(place))
            if not any(codes) or asked():
                return 0 if not any(codes) else INTERRUPTED
            step = _newest(folder, options)
            for code in (INTERRUPTED,) if step > newest else (MISTAKE, INTERRUPTED):  # after progress: the disk is full
                if code in codes:
                    return code
            guilty = {i for i, code in enumerate(codes) if i in killed or code < 0}  # 1 is an error of its own
            fruitless, suspects, again = (0, guilty, set()) if step > newest else (fruitless + 1, guilty, suspects)
            newest, gone = step, guilty & again
            if fruitless > supervising.restarts:
                console.print(
                    f"lmx: the processes ended {fruitless} times without a new checkpoint (exit codes {codes}; the "
                    f"newest: {_named(step)}). See what they said, and go on with the same command and --resume",
                    **PLAIN,
                )
                return LOST
            if gone and count > 1:
                count, suspects = _fewer(count - len(gone), stored_options(folder)), set()
                console.print(f"lmx: process {', '.join(map(str, sorted(gone)))} does not come back", **PLAIN)
            who = f"{count} process{'es' if count > 1 else ''}"
            console.print(f"lmx: exit codes {codes}; {who} go on from checkpoint {_named(step)}", **PLAIN)
            time.sleep(min(2.0**fruitless, 30.0) if fruitless else 0)


def _attempt(
    command: Command, count: int, going_on: bool, heartbeat: float, asked: Callable[[], bool], place: Path
) -> tuple[list[int], set[int]]:
    """Start all processes and wait until all have ended: (exit codes, which had to be killed).

    Those that are left when others have ended are killed: in a while, or at once where they gave signs of life and give
    none any more. So are those that fall silent alone: the others of the run, on other machines, then have ended too.
    """
    coordinator = f"localhost:{_free_port()}" if count > 1 else ""
    children, killed, told_to_stop, deadline = [], set(), False, None
    clock = Clock()
    signs = [_Sign(place / str(i)) for i in range(count)]
    try:
        for i in range(count):
            environment = {"JAX_LOCAL_DEVICE_IDS": str(i)} if count > 1 else {}  # of GPUs
            environment |= os.environ | {SIGN_OF_LIFE: str(signs[i].path)}
            children.append(_start(command(i, count, coordinator, going_on), environment))
        while None in (codes := [child.poll() for child in children]):
            now = clock.now()
            if asked() and not told_to_stop:
                told_to_stop = True
                for child in children:
                    child.terminate()
            ended = [code for code in codes if code is not None]
            if ended and deadline is None:
                deadline = now + heartbeat + SLACK + (0 if any(ended) else 60)
            if deadline is not None and now > deadline:
                killed |= {i for i, code in enumerate(codes) if code is None}
                break
            silence = heartbeat + (SLACK if deadline is None else 0)
            for i in (i for i, code in enumerate(codes) if code is None and signs[i].age(now) > silence):
                killed.add(i)
                children[i].kill()
            time.sleep(0.1)
    finally:  # a second Ctrl-C too leaves nobody behind
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
    return [child.returncode for child in children], killed


def _free_port() -> int:
    """A port that nobody listens on: not one of those that the kernel gives to whoever asks next for any."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


class _Sign:
    """The file that a process touches as long as it lives (`lmx.train.channel`)."""

    def __init__(self, path: Path) -> None:
        self.path, self._seen, self._since = path, None, 0.0

    def age(self, now: float) -> float:
        """Seconds since it was seen to be touched; 0 before it is made, and after it was removed."""
        try:
            touched = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0.0
        if touched != self._seen:
            self._seen, self._since = touched, now
        return now - self._since


def _start(words: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """A process of its own session, which Ctrl-C does not reach (it is passed on), told to stop if this one dies."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux
    leave = (lambda: prctl(1, signal.SIGTERM)) if prctl is not None else None
    return subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=leave
    )


def _fewer(most: int, options: dict) -> int:
    """The largest number of processes, up to `most`, whose devices the run's batch divides over."""
    each, rows = _devices_each(), options["batch_size"] // options["accumulate"]
    for count in range(most, 1, -1):
        try:
            fit_mesh(options["mesh"], rows, count * each, count)
        except ConfigError:
            continue
        return count
    return 1


def _devices_each() -> int:
    """The devices of a process as `_attempt` starts it. Raises LmxError if jax cannot tell."""
    script = "import jax; print(jax.default_backend(), jax.local_device_count())"  # in here no device may be taken
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise LmxError(f"the devices left for fewer processes cannot be counted: {why}; look after them, then --resume")
    platform, devices = done.stdout.split()[-2:]
    given = os.environ.get("JAX_LOCAL_DEVICE_IDS", "0")
    return int(devices) if platform == "cpu" else len(given.split(","))


def _newest(folder: Path, options: TrainOptions) -> int:
    """The newest step that has a checkpoint, by its name; -1 without one. (The processes look whether it is sound.)"""
    with contextlib.suppress(OSError):  # there is none yet, or the bucket does not answer
        known = stored_options(folder) if options.resume else told.values(options)
        place = open_path(known.get("checkpoint_folder") or folder / CHECKPOINTS)
        names = [path.name for path in place.iterdir()] if steps.is_local(place) else map(str, steps.find(place))
        return max((int(name) for name in names if name.isdigit()), default=-1)
    return -1


def _named(step: int) -> str:
    return str(step) if step >= 0 else "none"


def _holds(folder: Path, options: TrainOptions) -> bool:
    """Whether the folder holds the run that these options would begin."""
    if options.resume or options.overwrite or not (folder / RECORD).exists():
        return False
    own = ("resume", "overwrite", "output")  # of a command, or another name of the same folder
    wanted = {name: value for name, value in told.values(told.resolve(options)).items() if name not in own}
    return {name: value for name, value in stored_options(folder).items() if name not in own} == wanted


def _stamp(folder: Path) -> tuple | None:
    """Changes when a run is begun in the folder."""
    record = folder / RECORD
    return (record.stat().st_ino, record.stat().st_mtime_ns) if record.exists() else None


def _words(options: object, kind: type) -> list[str]:
    """Options of a class as words of a command line, those left as they are by default left out."""
    words = []
    for field in dataclasses.fields(kind):
        value = getattr(options, field.name)
        if value != field.default:
            flag = "--" + field.name.replace("_", "-")
            words.append(flag if value is True else f"{flag}={value}")
    return words
