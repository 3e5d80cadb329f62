"""What the processes of a run tell each other, in rounds: values, one error that all raise, a step to stop at.

    made = agreement.first(prepare)                      # process 0 does it; its value or its error reaches all
    with agreement.agreed(): ...                         # an error in one process is raised in all
    asked = agreement.agree_to_stop(asked)               # every step: the same answer in all

Every process makes the same calls in the same order. Values are JSON. No device is asked, so a step in flight does not
matter; with one process nothing is sent. Where `lmx.train.processes` has joined the processes they speak over its
channel, which also ends those that wait elsewhere for one that has failed; where a program has called
jax.distributed.initialize itself, through jax's key-value store.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # the store has no public name; orbax reaches for it in the same way

from lmx.core import errors
from lmx.core.errors import ConfigError, LmxError
from lmx.train import channel

PREFIX = "lmx/agreement"
PATIENCE = 24 * 3600 * 1000  # ms: whoever is lost ends the run through jax.distributed, or `lmx.train.processes`

_numbers = itertools.count()  # of signals


def everyone(value: Any) -> list[Any]:
    """What each process says, in their order."""
    return _exchange(value)


def first(work: Callable[[], Any]) -> Any:
    """What `work` returns in process 0, in every process; it runs in process 0 only, and the others wait.

    An error there is raised in every process: one of lmx of its kind and with its message, an OSError as a FolderError,
    any other as a RuntimeError.
    """
    value = error = None
    if jax.process_index() == 0:
        try:
            value = work()
        except Exception as caught:
            error = caught
    return _exchange(value, error)[0]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What every process does for itself, up to a point where all have done it or all raise the error of one."""
    error = None
    try:
        yield
    except Exception as caught:
        if getattr(caught, "agreed", False):
            raise
        error = caught
    _exchange(None, error)


def agree_to_stop(asked: Callable[[], bool]) -> Callable[[], bool]:
    """`asked` for several processes that all call it once a step: True in all at one step, if one was asked.

    A step's answer is what was said at the step before, so that nobody waits: it has arrived meanwhile.
    """
    if jax.process_count() == 1:
        return asked
    line, said = _line(), None

    def ask() -> bool:
        nonlocal said
        before, said = said, line.post(bool(asked()))
        return before is not None and any(one["value"] for one in line.result(before))

    return ask


class Signal:
    """A word that one process may leave for all, such as that its part of a save failed. Made by all processes."""

    def __init__(self) -> None:
        self._key = f"{PREFIX}/signal/{next(_numbers)}"
        self._alone = jax.process_count() == 1

    def leave(self, word: str) -> None:
        """The first word stays."""
        if not self._alone:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                distributed.global_state.client.key_value_set(self._key, word)

    def read(self) -> str | None:
        """The word if somebody left one."""
        if self._alone:
            return None
        try:
            return distributed.global_state.client.key_value_try_get(self._key)
        except jax.errors.JaxRuntimeError:  # nobody did
            return None


class Store:
    """Rounds through jax's key-value store, which process 0 holds; `post` and `result` are those of a `Channel`.

    Process 0 may be done with the last round before the others have read it: as jax does where the interpreter ends,
    it must not leave before them (jax.distributed.shutdown waits for all).
    """

    def __init__(self) -> None:
        self._next = itertools.count()

    def post(self, value: Any, error: tuple = ()) -> int:
        number = next(self._next)
        said = json.dumps({"value": value, "error": error})
        distributed.global_state.client.key_value_set(f"{PREFIX}/{number}/{jax.process_index()}", said)
        return number

    def result(self, number: int) -> list[dict]:
        client, key = distributed.global_state.client, f"{PREFIX}/{number}"
        if jax.process_index() == 0:
            keys = [f"{key}/{i}" for i in range(jax.process_count())]
            said = [client.blocking_key_value_get(one, PATIENCE) for one in keys]
            client.key_value_set(f"{key}/all", f"[{','.join(said)}]")
            for one in keys:
                client.key_value_delete(one)
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # all have read the round before the last, or none
                client.key_value_delete(f"{PREFIX}/{number - 2}/all")
        return json.loads(client.blocking_key_value_get(f"{key}/all", PATIENCE))


_store = Store()


def _line() -> channel.Channel | Store:
    """What the processes speak over. Raises ConfigError if there are several which nobody has joined."""
    if channel.current is None and distributed.global_state.client is None:
        raise ConfigError(
            f"jax sees {jax.process_count()} processes, which have not joined; give --coordinator auto (or "
            "HOST:PORT --num-processes N --process-id I) to the command, or call jax.distributed.initialize"
        )
    return channel.current or _store


def _exchange(value: Any, error: Exception | None = None) -> list[Any]:
    """What each process says. Raises this process's error, or that of another."""
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return [value]
    line = _line()
    said = line.result(line.post(value, () if error is None else (_kind(error), str(error), *errors.ending(error))))
    failed = next((one["error"] for one in said if one["error"]), None)
    if failed is None:
        return [one["value"] for one in said]
    if error is None:
        name, message, _, words = failed
        kind = getattr(errors, name, None)
        error = RuntimeError(f"another process met {name}: {message}\n{words}") if kind is None else kind(message)
    error.agreed = True  # nobody has to be told (`lmx.train.processes`)
    raise error


def _kind(error: Exception) -> str:
    """The name of its class, or of the class in `lmx.core.errors` that it derives from."""
    if isinstance(error, OSError) and not isinstance(error, LmxError):
        return "FolderError"
    kinds = [kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__]
    return (kinds or [type(error)])[0].__name__
