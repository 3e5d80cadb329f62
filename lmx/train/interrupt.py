"""Ctrl-C and SIGTERM: obeyed at once while nothing has begun, and as a request once a step has to be saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def interrupts_call(end: Callable[[], object]) -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM call `end` in another thread, even while the main thread waits in C++.

    Python's own handlers would run only once that returns. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while number := os.read(reading, 1):  # nothing once the other end is closed
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                end()

    watching = threading.Thread(target=watch, name="lmx-interrupts", daemon=True)
    watching.start()
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # first and last: no signal falls in between
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _put_back(before)
        signal.set_wakeup_fd(wakeup)
        os.close(writing)
        watching.join()
        os.close(reading)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[Callable[[], None]]:
    """Within it SIGTERM raises KeyboardInterrupt as Ctrl-C does, in the main thread, so that what is open is closed.

    Yields `settled`: once it was called SIGTERM does nothing, for what has been stopped already is about to end.
    """
    settled = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        if not settled.is_set():
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield settled.set
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield settled.set
    finally:
        _put_back({signal.SIGTERM: before})


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields `asked()`: whether the process was asked to stop. A second Ctrl-C raises KeyboardInterrupt at once.

    Outside the main thread signals cannot be caught, and `asked` stays False.
    """
    asked = threading.Event()

    def note(number: int, frame: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        _put_back(before)


def ignore_sigterm() -> None:
    """From now on, in a process that has saved what it had and is about to end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _put_back(before: dict[int, object]) -> None:
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
