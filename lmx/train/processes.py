"""Several processes as one run: joined by flags or the cluster, led by process 0, stopping and failing together.

    with processes.joined(options):                      # jax.distributed, and a thread that notices who is lost
        if processes.leads(): ...                        # process 0 writes and prints
        with processes.shared_fate(): ...                # who fails in here ends the others

With one process each of these does nothing. What the processes agree on is in `lmx.train.agreement`. Where one is lost
the others end with exit code 75 within the heartbeat's limit (`lmx.train.channel`).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import time
from collections.abc import Iterator

import jax

from lmx.core.errors import INTERRUPTED, LOST, ConfigError, LmxError, ending
from lmx.train import agreement, channel
from lmx.train.channel import end
from lmx.train.interrupt import interrupts_call

AUTO = "auto"

_joining: str | None = None  # while this process looks for the others: its last words if it does not find them


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """How several processes find each other."""

    coordinator: str | None = None
    """HOST:PORT of process 0, or auto to ask the cluster (a Cloud TPU pod); Slurm, Open MPI and GKE need no flag."""
    num_processes: int | None = None
    """Processes of the run, where --coordinator gives an address."""
    process_id: int | None = None
    """Which of them this is, from 0, where --coordinator gives an address."""
    heartbeat: float = 60.0
    """Seconds without a sign of life after which a process counts as lost, and the others end with exit code 75."""
    join_timeout: int = 300
    """Seconds to wait at the start until all processes are there."""


@contextlib.contextmanager
def joined(options: ProcessOptions) -> Iterator[None]:
    """Join the other processes, if there are any to join, before jax has used a device, and leave together.

    Raises ConfigError for half-given or wrong flags. An error that only this process meets ends the others too.
    """
    _check(options)
    if options.coordinator is None and cluster() is None:
        yield
        return
    _initialize(options)
    with _connected(options):
        yield


def cluster() -> str | None:
    """The cluster whose variables say that this is one of several processes, or None. Asks no network.

    Raises ConfigError on Kubernetes without the package that jax needs there.
    """
    env = os.environ
    if {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= env.keys() and int(env.get("SLURM_NTASKS", 1)) > 1:
        return "Slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        return "TPU on GKE"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= env.keys():
        try:
            import kubernetes  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "this is a pod of an indexed Kubernetes job, and jax needs a package to find the others: "
                "pip install 'jax[k8s]', or give --coordinator HOST:PORT --num-processes N --process-id I"
            ) from error
        return "Kubernetes"
    return None


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def advise(text: str) -> None:
    """What a user is told to type when a process is lost."""
    if channel.current is not None:
        channel.current.advice = text


@contextlib.contextmanager
def shared_fate() -> Iterator[None]:
    """Tell the others at once if this process fails in here, for they would wait for it in a collective."""
    try:
        yield
    except BaseException as error:
        line = channel.current
        if line is not None and not getattr(error, "agreed", False) and line.told is None:
            if not isinstance(error, LmxError | KeyboardInterrupt):
                for _ in range(int(20 * min(5.0, line.limit))):  # collectives fail because another process did, and
                    if line.refused is not None:  # what that one says is better
                        break
                    time.sleep(0.05)  # counted, not timed: where the machine stands still the other one does too
            first = line.refused  # an error of another process, which may be why this one fails
            line.end_all(*(first[1:] if first is not None else ending(error)))
        raise


def _check(options: ProcessOptions) -> None:
    o = options
    given = {"--num-processes": o.num_processes, "--process-id": o.process_id}
    if o.coordinator in (None, AUTO):
        needless = [name for name, value in given.items() if value is not None]
        if needless:
            raise ConfigError(f"{' and '.join(needless)} need --coordinator HOST:PORT, the address of process 0")
    else:
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ConfigError(f"--coordinator {o.coordinator} needs {' and '.join(missing)} too, or give auto")
        host, _, port = o.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"--coordinator {o.coordinator} is not HOST:PORT, such as 10.0.0.1:8476")
        if not 0 <= o.process_id < o.num_processes:
            raise ConfigError(f"--process-id {o.process_id} must be from 0 to {o.num_processes - 1} (--num-processes)")
    for name, seconds in (("--heartbeat", o.heartbeat), ("--join-timeout", o.join_timeout)):
        if not seconds >= 1:
            raise ConfigError(f"{name} must be at least 1 second, not {seconds}")


def _initialize(options: ProcessOptions) -> None:
    o = options
    address = None if o.coordinator in (None, AUTO) else (o.coordinator, o.num_processes, o.process_id)
    # jax's own limit is the longer one, for it aborts; its SIGTERM handler hides the signal from everybody else.
    limits = dict(heartbeat_timeout_seconds=int(o.heartbeat) + 60, initialization_timeout=o.join_timeout)
    where = f" at {o.coordinator}" if address else ""
    with _looking(f"the processes did not find each other{where} within {o.join_timeout} s. Start all of them again."):
        try:
            jax.distributed.initialize(*(address or ()), **limits)
        except ValueError as error:
            name = cluster()
            there = f"this looks like {name}, but" if name else "there is no Cloud TPU pod, Slurm, Open MPI, GKE here:"
            raise ConfigError(
                f"{there} jax cannot tell the processes of the run ({error}); give --coordinator HOST:PORT "
                "--num-processes N --process-id I, or leave out --coordinator to train in this process alone"
            ) from error


@contextlib.contextmanager
def _connected(options: ProcessOptions) -> Iterator[None]:
    """Within it the channel is open. Leaves with the others, or ends this process with the exit code of its error."""
    with _looking("the processes found each other, but one was lost before all had connected. Start all again."):
        alone = jax.process_count() == 1
        line = None if alone else channel.connect(options.heartbeat, options.join_timeout)
    if alone:
        yield
        return
    channel.current = line
    _catch_aborts()  # again, in case a backend has set a handler since
    try:
        with shared_fate():
            yield
            agreement.everyone(None)
    except BaseException as error:
        if not getattr(error, "agreed", False):
            told = line.told  # what came first; once others have ended, all that needs them fails
            end(*(ending(error) if told is None else told[1:]))
        raise
    finally:
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
        line.close()
        channel.current = None


@contextlib.contextmanager
def _looking(unfound: str) -> Iterator[None]:
    """Around the search for the others. Without them this process ends in these words; interrupted it ends at once."""
    global _joining
    _joining = f"lmx: {unfound}"
    _catch_aborts()
    try:
        with interrupts_call(lambda: end(INTERRUPTED, "lmx: interrupted while looking for the other processes")):
            yield
    except ConfigError:
        raise
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        end(LOST, f"{_joining} ({error})")
    finally:
        _joining = None


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborting(number: int) -> None:
    """Runs where C++ aborts: the channel's thread has the time to end this process, if it knows why."""
    if _joining is not None:
        end(LOST, _joining)
    time.sleep(10.0)
    refused = None if channel.current is None else channel.current.refused
    if refused is not None:
        end(*refused[1:])


def _catch_aborts() -> None:
    """jax's C++ aborts as soon as process 0 is gone; a handler that returns lets the abort happen."""
    handle = ctypes.CDLL(None).signal
    handle.argtypes, handle.restype = (ctypes.c_int, type(_aborting)), ctypes.c_void_p
    handle(signal.SIGABRT, _aborting)
