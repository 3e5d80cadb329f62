"""Every test sees 8 simulated CPU devices (set before jax is imported), and may ask for a mesh or several processes."""

import atexit
import contextlib
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# no test fails because the machine is slow
settings.register_profile("lmx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lmx")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
COMPILED = "LMX_TESTS_COMPILED"  # where this run's processes of pytest keep what they compile, for each other
# commands keep what they compile too: for each other, not for the user
for folder in {"XDG_CACHE_HOME", COMPILED} - os.environ.keys():
    os.environ[folder] = tempfile.mkdtemp(prefix="lmx-tests-")
    atexit.register(shutil.rmtree, os.environ[folder], ignore_errors=True)
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

MESHES = ("fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2")


def pytest_configure():
    import jax  # after the variables

    jax.config.update("jax_compilation_cache_dir", os.environ[COMPILED])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def every_mesh() -> list:
    """Explicit and Auto; the quick tests know the one mesh that has all axes."""
    slow = lambda mesh: () if mesh == MESHES[-1] else pytest.mark.slow  # noqa: E731
    every = itertools.product(MESHES, ("explicit", "auto"))
    return [pytest.param(one, id="-".join(one), marks=slow(one[0])) for one in every]


@pytest.fixture(params=every_mesh())
def mesh(request):
    """A mesh in force, Explicit and Auto."""
    from lmx.core import sharding  # after the variables

    text, kind = request.param
    with sharding.use_mesh(text, explicit=kind == "explicit") as made:
        yield made


MAPPINGS = 20_000  # of memory; Linux lets a process have 65530, and XLA crashes where it gets no more


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Every program that jax has compiled holds mappings of memory: let go of them before there are too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        import jax

        jax.clear_caches()


PATIENCE = 600  # seconds: what only keeps a test from hanging, on a machine that does much else


class Begun:
    """A process whose output is read as it comes: nothing of it is lost, and it never waits for a reader."""

    def __init__(self, words: list, **how) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(list(map(str, words)), stdout=pipe, stderr=pipe, text=True, **how)
        self._lines: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._read = 0  # lines of stderr that `wait_for` has seen
        self._open, self._came = set(self._lines), threading.Condition()
        for name in self._lines:
            threading.Thread(target=self._follow, args=(name,), daemon=True).start()

    def wait_for(self, start: str) -> str:
        """The next line of stderr that begins so, after those that were waited for before."""
        found = None

        def came() -> bool:
            nonlocal found
            lines = self._lines["stderr"]
            while found is None and self._read < len(lines):
                found = lines[self._read] if lines[self._read].startswith(start) else None
                self._read += 1
            return found is not None or "stderr" not in self._open

        with self._came:
            self._came.wait_for(came, PATIENCE)
        assert found is not None, f"no further line begins with {start!r} in {''.join(self._lines['stderr'])[-3000:]}"
        return found

    def end(self, code: int = 0) -> tuple[str, str]:
        """All of stdout and stderr, once it has ended with this exit code."""
        with self._came:
            assert self._came.wait_for(lambda: not self._open, PATIENCE), "".join(self._lines["stderr"])[-3000:]
        self.process.wait(PATIENCE)
        out, err = ("".join(lines) for lines in self._lines.values())
        assert self.process.returncode == code, (self.process.returncode, err[-3000:])
        return out, err

    def _follow(self, name: str) -> None:
        for line in getattr(self.process, name):
            with self._came:
                self._lines[name].append(line)
                self._came.notify_all()
        with self._came:
            self._open.remove(name)
            self._came.notify_all()


def _quickly(devices: int | None = None) -> dict[str, str]:
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "xla_force_host_platform_device_count" not in flag]
    flags = kept + [f"--xla_force_host_platform_device_count={devices}"] * (devices is not None)
    return {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "JAX_COMPILATION_CACHE_DIR": os.environ[COMPILED],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip


@pytest.fixture(scope="session")
def quickly():
    """`quickly(devices=None) -> variables` for a process that compiles with this run's flags and shares what the run
    has compiled. It simulates so many devices; None: it has those of the machine."""
    return _quickly


JOIN = """
import sys, jax
coordinator, count, index, *arguments = sys.argv[1:]
jax.distributed.initialize(coordinator, int(count), int(index), heartbeat_timeout_seconds=60)
"""


@pytest.fixture(scope="module")
def begun():
    """`begun(words, cwd=..., env=...) -> Begun`; nobody is left behind."""
    made = []

    def begin(words: list, **how) -> Begun:
        made.append(Begun(words, **how))
        return made[-1]

    yield begin
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


@pytest.fixture(scope="session")
def hurts():
    """`hurts({"at": "step", ...}, ...) -> variables` with which tests/hurt/sitecustomize.py hurts a process of lmx."""
    tests = Path(__file__).parent

    def variables(*points: dict) -> dict[str, str]:
        return {"PYTHONPATH": os.pathsep.join([str(tests / "hurt"), str(tests.parent)]), "HURT": json.dumps(points)}

    return variables


@pytest.fixture
def loopback(tmp_path):
    """`loopback(source, count, *arguments, devices=2) -> the stdout of each process`.

    The source runs in `count` processes which jax.distributed has joined, each with its own simulated devices and
    `arguments`. It fails with their stderr if one of them fails or takes longer than `timeout` seconds.
    """

    def run(source: str, count: int, *arguments: object, devices: int = 2, timeout: float = PATIENCE) -> list[str]:
        script = tmp_path / "process.py"
        script.write_text(JOIN + source)
        words = [_free_address(), count]
        return join([
            start_process([sys.executable, script, *words, index, *arguments], **_quickly(devices))
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


def start_process(words: list, **variables: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, words)), env=os.environ | variables, stdout=pipe, stderr=pipe, text=True)


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
