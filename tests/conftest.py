"""Every test sees 8 simulated CPU devices (set before jax is imported), and may ask for a mesh or several processes."""

import atexit
import contextlib
import itertools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "XDG_CACHE_HOME" not in os.environ:  # commands keep what they compile: for each other, not for the user
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lmx-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

MESHES = ("fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2")


@pytest.fixture(params=itertools.product(MESHES, ("explicit", "auto")), ids="-".join)
def mesh(request):
    """A mesh in force, Explicit and Auto."""
    from lmx.core import sharding  # after the variables

    text, kind = request.param
    with sharding.use_mesh(text, explicit=kind == "explicit") as made:
        yield made


JOIN = """
import sys, jax
coordinator, count, index, *arguments = sys.argv[1:]
jax.distributed.initialize(coordinator, int(count), int(index), heartbeat_timeout_seconds=60)
"""


@pytest.fixture
def loopback(tmp_path):
    """`loopback(source, count, *arguments, devices=2) -> the stdout of each process`.

    The source runs in `count` processes which jax.distributed has joined, each with its own simulated devices and
    `arguments`. It fails with their stderr if one of them fails or takes longer than `timeout` seconds.
    """

    def run(source: str, count: int, *arguments: object, devices: int = 2, timeout: float = 180) -> list[str]:
        script = tmp_path / "process.py"
        script.write_text(JOIN + source)
        words = [_free_address(), count]
        flags = f"--xla_force_host_platform_device_count={devices}"
        return join([
            start_process([sys.executable, script, *words, index, *arguments], XLA_FLAGS=flags)
            for index in range(count)
        ], timeout)  # fmt: skip

    return run


@pytest.fixture(scope="session")
def free_address():
    """`free_address() -> "localhost:PORT"` that nobody listens at."""
    return _free_address


def _free_address() -> str:
    """The port is not one of those that the kernel gives, before long, to whoever asks for any."""
    while True:
        port = secrets.choice(range(10_000, 20_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return f"localhost:{port}"


def start_process(words: list, **environment: str) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, words)), env=environment, stdout=pipe, stderr=pipe, text=True)


def join(processes: list[subprocess.Popen], timeout: float) -> list[str]:
    """What each printed. Fails with the stderr of those that failed or took too long, and leaves none behind."""
    said, deadline = [], time.monotonic() + timeout
    for process in processes:
        try:
            said.append(process.communicate(timeout=max(1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            said.append(process.communicate())
    ended = zip(processes, said, strict=True)
    failed = [f"{process.returncode}: {err[-3000:]}" for process, (_, err) in ended if process.returncode]
    assert not failed, "\n".join(failed)
    return [out for out, _ in said]
