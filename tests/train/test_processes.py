"""Several processes as one: what one fails at ends all, and a lost one ends the others with exit code 75."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from lmx.core.errors import ConfigError
from lmx.train import agreement, channel, processes
from lmx.train.channel import Channel
from lmx.train.processes import ProcessOptions

LIMIT = 10  # seconds of the heartbeat, where a process hangs
PATIENCE = 300  # seconds, for a machine that does much else
SOURCE = """
import os, sys, time, jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from lmx.core import sharding
from lmx.core.errors import DataError, FolderError, Stopped
from lmx.train import agreement, processes
coordinator, count, index, what = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def say(*words):
    print(*words, flush=True)

def fail():
    raise DataError("no text in here")

class Damaged(FolderError):
    pass

told = (None, None, None) if "SLURM_PROCID" in os.environ else (coordinator, count, index)
with processes.joined(processes.ProcessOptions(*told, heartbeat=float(sys.argv[5]))):
    processes.advise("Type this.")
    if what == "agree":
        say(agreement.first(lambda: {"from": index, "pi": 3.14}))
        try:
            agreement.first(fail)
        except DataError as error:
            say(error)
        try:
            with agreement.agreed():
                if index == 1:
                    fail()
        except DataError as error:
            say(error)
        try:
            with agreement.agreed():
                if index == 1:
                    raise Damaged("a changed bit")
        except FolderError as error:
            say(error)
        step = 0
        asked = agreement.agree_to_stop(lambda: index == 1 and step == 5)
        while not asked():
            step += 1
            time.sleep(0.02 * index)
        say("stopped at", step)
        sys.stderr.write("done")
    elif what == "one":  # meets an error that the others, who wait in a collective, cannot know of
        with processes.shared_fate():
            if index == 1:
                fail()
            multihost_utils.process_allgather(jnp.ones(4))
    elif what == "stop":  # one is interrupted where that loses nothing
        if index == 1:
            raise Stopped("all is saved")
        multihost_utils.process_allgather(jnp.ones(4))
    elif what == "save":  # fails in the background, in one process
        import resource
        from lmx.train.checkpoints import Checkpoints
        with sharding.use_mesh(f"fsdp={jax.device_count()}") as mesh, Checkpoints(sys.argv[6]) as checkpoints:
            split = jax.NamedSharding(mesh, jax.P("fsdp"))
            state = jax.jit(lambda: jnp.arange(4096.0), out_shardings=split)()
            if index == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            checkpoints.save(1, {"w": state})
            while True:
                checkpoints.check()
                multihost_utils.process_allgather(np.ones(4))
    else:
        for step in range(10_000):
            if step == 20:
                say("ready")
            if what == "idle":
                time.sleep(0.05)
            else:
                multihost_utils.process_allgather(jnp.ones(4))
"""


@pytest.fixture
def team(tmp_path, free_address):
    """team(what, count): the source's processes; nobody is left behind."""
    started = []

    def start(what: str, count: int = 2, slurm: bool = False, limit: float = 60) -> list[subprocess.Popen]:
        script = tmp_path / "process.py"
        script.write_text(SOURCE)
        pipe, coordinator = subprocess.PIPE, free_address()
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
        for index in range(count):
            words = [sys.executable, str(script), coordinator, str(count), str(index), what, str(limit)]
            words.append(str(tmp_path / "checkpoints"))
            task = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
            task |= {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
            known = environment | (task if slurm else {})
            started.append(subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=known))
        return started[-count:]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "slurm"), [(3, False), (2, True)])
def test_processes_agree_on_values_errors_and_the_step_to_stop_at(team, count, slurm):
    said = [process.communicate(timeout=PATIENCE) for process in team("agree", count, slurm)]
    wanted = ["{'from': 0, 'pi': 3.14}", "no text in here", "no text in here", "a changed bit", "stopped at 6"]
    assert [out.splitlines() for out, _ in said] == [wanted] * count, said


@pytest.mark.slow
@pytest.mark.parametrize(("what", "code", "words"), [("one", 2, "lmx: no text in here"), ("stop", 0, "all is saved")])
def test_an_error_that_one_process_meets_ends_all_with_its_message_and_code(team, what, code, words):
    for process in team(what):
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == code and err.count(words) == 1 and "Traceback" not in err, err


@pytest.mark.slow
def test_a_save_that_fails_in_the_background_of_one_process_ends_all(team):
    for process in team("save"):
        _, err = process.communicate(timeout=PATIENCE)  # orbax waits 20 minutes for the missing part
        assert process.returncode == 2, err
        assert "lmx: the checkpoint of step 1 could not be written" in err and "File too large" in err


def test_an_error_that_all_have_heard_ends_nobody():
    ours, theirs = socket.socketpair()
    first, second = Channel(0, 2, {1: ours}, 60.0), Channel(1, 2, {0: theirs}, 60.0)
    number = second.post(None, ("DataError", 2, "lmx: no text"))
    until(lambda: first.refused is not None)  # process 0 may be on its way to a collective
    assert first.refused[1:] == (2, "lmx: no text")
    first.post(None)
    assert first.result(number) == second.result(number) and first.refused is second.refused is None
    second.close()
    first.close()



@pytest.fixture
def endings(monkeypatch) -> list:
    """What a channel would end this process with: (its refusal by then, exit code, last words)."""
    ended = []

    def end(code: int, text: str) -> None:
        line = channel.current
        ended.append((line.refused, code, text))
        line._open = False

    monkeypatch.setattr(channel, "end", end)
    return ended


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_fails_because_another_is_lost_knows_it(endings, monkeypatch, index):
    """The main thread may be the first to end it, and asks its channel why."""
    ours, theirs = socket.socketpair()
    line = Channel(index, 2, {1 - index: ours}, 60.0)
    monkeypatch.setattr(channel, "current", line)
    theirs.close()
    until(lambda: endings)
    text = f"lmx: process {1 - index} of 2 ended, or its machine did. Start all processes again."
    assert endings[0][1:] == (75, text) and endings[0][0][1:] == (75, text)
    line._thread.join()
    ours.close()


def test_the_others_are_told_of_a_lost_process_before_this_one_may_end(endings, monkeypatch):
    """Once process 0 knows of the loss its main thread may end it: all has been said by then."""
    links = [socket.socketpair() for _ in range(2)]
    line = Channel(0, 3, {1: links[0][0], 2: links[1][0]}, 60.0)
    monkeypatch.setattr(channel, "current", line)
    said, refuse = [], line._refuse

    def noting(*why) -> None:
        said.append(b"ended, or its machine did" in links[0][1].recv(1 << 16, socket.MSG_DONTWAIT))
        refuse(*why)

    monkeypatch.setattr(line, "_refuse", noting)
    links[1][1].close()
    until(lambda: endings)
    assert said == [True] and endings[0][1] == 75
    line._thread.join()
    for link in (links[0][0], links[0][1], links[1][0]):
        link.close()


def test_where_all_stood_still_nobody_is_lost(monkeypatch, endings):
    """A machine that slept: its own silence is none of the other process, which has yet to say something."""
    asleep = [0.0]
    real = time.monotonic
    monkeypatch.setattr(channel.time, "monotonic", lambda: real() + asleep[0])
    ours, theirs = socket.socketpair()
    line = Channel(0, 2, {1: ours}, 30.0)
    monkeypatch.setattr(channel, "current", line)
    asleep[0] = 1000.0
    until(lambda: line._clock._lost > 900)
    time.sleep(0.5)
    assert not endings and line.refused is None
    theirs.sendall(b'{"bye": true}\n')
    line.close()
    theirs.close()


def test_a_clock_counts_what_it_could_see(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(channel.time, "monotonic", lambda: now[0])
    clock, seen = channel.Clock(), []
    for now[0] in (0.5, 1.0, 50.0, 50.25):
        seen.append(clock.now())
    assert seen == [0.5, 1.0, 2.0, 2.25]


def test_whoever_connects_and_says_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr(channel, "GREETING", 0.05)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert channel._greeting(ours) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("'auto'", 2, "there is no Cloud TPU pod, .* here: .* give --coordinator HOST:PORT --num-processes N"),
        ("'{address}', 2, 0, join_timeout=2", 75, "did not find each other at localhost:.* within 2 s"),
    ],
)
def test_processes_that_do_not_find_each_other(free_address, options, code, message):
    source = (
        "import sys; from lmx.core.errors import ConfigError; from lmx.train.processes import *\n"
        f"try:\n    with joined(ProcessOptions({options.format(address=free_address())})): pass\n"
        "except ConfigError as error:\n    print(error, file=sys.stderr); sys.exit(2)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code and re.search(message, done.stderr), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_while_the_others_are_awaited_ends_at_once_and_says_so(free_address, how):
    source = (
        "from lmx.train.processes import *; print('ready', flush=True)\n"
        f"with joined(ProcessOptions('{free_address()}', 2, 0)): pass"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", source], stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        until(lambda: caught(process.pid, signal.SIGTERM))
        time.sleep(2)  # most often it waits in C++ by then
        process.send_signal(how)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "lmx: interrupted while looking for the other processes" and "Traceback" not in err


def caught(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = open(f"/proc/{pid}/status").read()
    return bool(int(re.search(r"^SigCgt:\s*(\w+)", status, re.M).group(1), 16) >> (number - 1) & 1)


def until(true, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "victim", "how"),
    [
        ("idle", 1, signal.SIGKILL), ("idle", 0, signal.SIGKILL), ("collective", 1, signal.SIGKILL),
        ("collective", 0, signal.SIGKILL), ("collective", 1, signal.SIGSTOP), ("collective", 0, signal.SIGSTOP),
    ],
)  # fmt: skip
def test_a_lost_process_ends_the_others_in_time(team, what, victim, how):
    members = team(what, 2, limit=LIMIT if how == signal.SIGSTOP else 10 * PATIENCE)
    for process in members:
        assert any(line == "ready\n" for line in process.stdout), process.stderr.read()
    members[victim].send_signal(how)
    survivor = members[1 - victim]
    _, err = survivor.communicate(timeout=PATIENCE)
    assert survivor.returncode == 75, err
    lost = "ended, or its machine did" if how == signal.SIGKILL else f"gave no sign of life for {LIMIT} seconds"
    assert f"lmx: process {victim} of 2 {lost}. Type this." in err.splitlines()  # jax may log just before the end


def test_half_given_flags_are_refused():
    for options, message in (
        (ProcessOptions("host:1"), "--coordinator host:1 needs --num-processes and --process-id too, or give auto"),
        (ProcessOptions(num_processes=2), "--num-processes need --coordinator HOST:PORT"),
        (ProcessOptions("auto", process_id=0), "--process-id need --coordinator HOST:PORT"),
        (ProcessOptions("host", 2, 0), "--coordinator host is not HOST:PORT, such as 10.0.0.1:8476"),
        (ProcessOptions("host:1", 2, 2), r"--process-id 2 must be from 0 to 1"),
        (ProcessOptions(heartbeat=0), "--heartbeat must be at least 1 second, not 0"),
        (ProcessOptions(join_timeout=0), "--join-timeout must be at least 1 second, not 0"),
    ):
        with pytest.raises(ConfigError, match=message), processes.joined(options):
            pass


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None),  # a shell in an allocation, not a task of srun
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"}, "Slurm"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU on GKE"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # some pod, such as that of a notebook
    ],
)
def test_clusters_are_told_by_their_variables(monkeypatch, variables, name):
    for variable in [v for v in os.environ if v.startswith(("SLURM", "OMPI", "TPU", "KUBERNETES", "JOB_", "MEGA"))]:
        monkeypatch.delenv(variable)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert processes.cluster() == name


def test_an_indexed_job_without_its_package_is_told_so(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ConfigError, match=r"pip install 'jax\[k8s\]', or give --coordinator"):
        processes.cluster()


def test_one_process_agrees_with_itself():
    with processes.joined(ProcessOptions()):
        assert agreement.first(lambda: 5) == 5 and agreement.everyone(5) == [5] and processes.leads()
        assert agreement.agree_to_stop(lambda: True)()
        with pytest.raises(ZeroDivisionError), agreement.agreed(), processes.shared_fate():
            1 / 0  # noqa: B018
