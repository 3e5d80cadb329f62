"""A save in the background: a thread that waits for orbax, learns what failed in any process, and settles the rest."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  (what it does at the end must come after `_end_saves`)
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax

from lmx.core.errors import FolderError
from lmx.train import agreement, storage


class Save(threading.Thread):
    """A save in the background, from the arrays on the host to the end; `error` is what went wrong in any process.

    Where the interpreter ends meanwhile because nobody called `close`, see `_end_saves`.
    """

    _begun: weakref.WeakSet[Save] | None = None
    _abandoned = False  # orbax still waits, for minutes, for a process whose part failed

    def __init__(self, step: int, response: Any, settle: Callable[[], None]) -> None:
        super().__init__(name=f"lmx-save-{step}", daemon=True)
        if Save._begun is None:
            Save._begun = weakref.WeakSet()  # atexit comes too late, after the pools of threads were closed:
            threading._register_atexit(_end_saves)
        Save._begun.add(self)
        self.step, self.error = step, None
        self._response, self._settle = response, settle
        self._signal = agreement.Signal()
        self.start()

    def run(self) -> None:
        try:
            self._wait()
            self._settle()
        except Exception as error:
            self.error = error

    def _wait(self) -> None:
        """Until the checkpoint is whole. Raises what failed here or, as a FolderError, in another process."""
        ended, failed = threading.Event(), []

        def wait() -> None:
            try:
                self._response.result()
            except Exception as error:
                failed.append(error)
            finally:
                ended.set()

        threading.Thread(target=wait, name=f"{self.name}-wait", daemon=True).start()
        while not ended.wait(1.0 if jax.process_count() > 1 else None):  # orbax waits minutes for one that failed
            word = self._signal.read()
            if word is not None:
                Save._abandoned = True
                raise FolderError(word)
        if failed:
            Save._abandoned = jax.process_count() > 1  # its other threads may wait for the others
            self._signal.leave(f"process {jax.process_index()}: {storage.cause_of(failed[0])}")
            raise failed[0]

    def has_failed(self) -> bool:
        return not self.is_alive() and self.error is not None


def _end_saves(patience: float = 30.0) -> None:
    """At the interpreter's end: let saves finish, or end the process.

    From Python 3.12 on no thread can be started any more by then, and orbax's threads wait for ever for others that
    could not be; the same for minutes where a save failed in another process. The checkpoints before are sound, and
    what is left of this one is removed by the next start, unless all of it was there and only its seal was not.
    """
    begun = [save for save in list(Save._begun or ()) if save.is_alive()]
    for save in begun:
        save.join(patience)
    lost = any(save.is_alive() or save.error is not None for save in begun)
    if lost:
        print("lmx: the process ended while its last checkpoint was written; call Checkpoints.close", file=sys.stderr)
    if lost or Save._abandoned:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
