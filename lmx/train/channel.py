"""The line between the processes of a run: signs of life, small values to agree on, and a common end.

Every process is joined by TCP with process 0 (a star), beside jax's own connections. jax waits for a lost process
inside a collective, or aborts from C++ without saying what to do; a thread here ends this process with a message
instead, also while the main thread is inside a collective. A message is a line of JSON:

    {}                                     a sign of life
    {"round": 3, "value": 1, "error": []}  what a process says in a round (`lmx.train.agreement`)
    {"round": 3, "all": [...]}             what all said
    {"end": 75, "text": "..."}             everybody ends with this code and message
    {"bye": true}                          the connection will close, and nothing is wrong
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its key-value store and the address of process 0 have no public name

from lmx.core.errors import LOST

ADDRESS = "lmx/channel"  # the key under which process 0 says where it listens
GRACE = 5.0  # seconds for a process to end by itself once another has told that it fails
GREETING = 30.0  # seconds for whoever connects to say who it is
SIGN_OF_LIFE = "LMX_SIGN_OF_LIFE"  # names the file that is touched while the process lives, for who started it

current: Channel | None = None  # where `lmx.train.processes` has joined the processes

_ending = threading.Lock()  # held by whoever ends this process, for good


class Clock:
    """Seconds in which this process could run; `now` is to be asked all the time.

    Where it, or its whole machine, stood still in between, hardly any time has passed: what others said meanwhile has
    yet to be read, and others may have stood still too.
    """

    def __init__(self, longest: float = 1.0) -> None:
        self._longest, self._last, self._lost = longest, time.monotonic(), 0.0

    def now(self) -> float:
        last, self._last = self._last, time.monotonic()
        self._lost += max(0.0, self._last - last - self._longest)
        return self._last - self._lost


@dataclasses.dataclass
class Peer:
    """The process at the other end of a connection."""

    index: int
    link: socket.socket
    heard: float  # by the channel's clock
    unread: bytes = b""
    leaving: bool = False


class Channel:
    """This process's connections: to all others in process 0, to process 0 in the others.

    Args:
      index, count: of this process; of all.
      links: a connected socket by the index of its process.
      limit: seconds without a sign of life after which a process is lost.
    """

    def __init__(self, index: int, count: int, links: dict[int, socket.socket], limit: float) -> None:
        self.index, self.count, self.limit = index, count, limit
        self.advice = "Start all processes again."  # what to do when one is lost
        self._clock = Clock()
        self._peers = {i: Peer(i, link, self._clock.now()) for i, link in links.items()}
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._next, self._said, self._results = 0, {}, {}  # rounds: of process 0, and finished
        self.told: tuple[float, int, str] | None = None  # when, how and why to end though nobody is lost
        self._unanswered: dict[int, tuple[float, int, str]] = {}  # the same, of rounds whose error not all have heard
        self._sign = Path(os.environ[SIGN_OF_LIFE]) if SIGN_OF_LIFE in os.environ else None
        self._open = True
        self._selector = selectors.DefaultSelector()
        for peer in self._peers.values():
            peer.link.settimeout(limit)
            self._selector.register(peer.link, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._watch, name="lmx-watch", daemon=True)
        self._thread.start()

    @property
    def refused(self) -> tuple[float, int, str] | None:
        """When (`time.monotonic`), with which code and why this process will end unless it does so by itself."""
        return self.told or next(iter(list(self._unanswered.values())), None)

    def post(self, value: Any, error: Sequence = ()) -> int:
        """Say something (JSON) in the next round, without waiting; returns the round. All post the same rounds.

        error: (..., exit code, last words) of one that this process raises, unless the round tells it to all.
        """
        number, self._next = self._next, self._next + 1
        line = {"round": number, "value": value, "error": list(error)}
        self._hear(self.index, line) if self.index == 0 else self._send(line)
        return number

    def result(self, number: int) -> list[dict]:
        """What every process said in a round, in their order; waits for all of them."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._results)
            return self._results.pop(number)

    def end_all(self, code: int, text: str) -> None:
        """Tell the others to end with this code and message; this process has GRACE seconds to end by itself."""
        self._send({"end": code, "text": text})
        self._refuse(code, text, GRACE)

    def close(self) -> None:
        """Let go of the others; called by all, when none waits any more."""
        self._open = False
        self._send({"bye": True})
        self._thread.join()
        if self._sign is not None:
            self._sign.unlink(missing_ok=True)
        for peer in self._peers.values():
            peer.link.close()

    def _send(self, line: dict, besides: int | None = None) -> None:
        """To everybody this process is connected with; one who is gone is noticed by reading."""
        data = json.dumps(line).encode() + b"\n"
        with self._sending:
            for peer in self._peers.values():
                if peer.index != besides and not peer.leaving:
                    try:
                        peer.link.sendall(data)
                    except OSError:
                        continue

    def _watch(self) -> None:
        pulse, beat = min(1.0, self.limit / 5), 0.0
        while self._open:
            for key, _ in self._selector.select(0.2):
                self._read(key.data)
            now = self._clock.now()
            if now >= beat:
                self._send({})
                if self._sign is not None:
                    with contextlib.suppress(OSError):
                        self._sign.touch()
                beat = now + pulse
            for peer in self._peers.values():
                if now - peer.heard > self.limit and not peer.leaving:
                    self._lose(peer, f"gave no sign of life for {self.limit:g} seconds")
            refused = self.refused
            if refused is not None and time.monotonic() > refused[0]:
                end(*refused[1:])

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.link.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(peer.link)
            peer.leaving |= self.told is not None  # to end, as this process will
            if self._open and not peer.leaving:
                self._lose(peer, "ended, or its machine did")
            return
        peer.heard = self._clock.now()
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        for line in lines:
            self._hear(peer.index, json.loads(line))

    def _hear(self, index: int, line: dict) -> None:
        if "value" in line:
            self._collect(index, line)
        elif "all" in line:
            self._finish(line["round"], line["all"])
        elif "end" in line:
            if self.index == 0:
                self._send(line, besides=index)
            lost = line["end"] == LOST
            self._peers[index].leaving = not lost
            self._refuse(line["end"], line["text"] + (f" {self.advice}" if lost else ""), 0.0 if lost else GRACE)
        elif "bye" in line:
            self._peers[index].leaving = True

    def _collect(self, index: int, line: dict) -> None:
        """Process 0: one more has spoken in a round."""
        with self._changed:
            said = self._said.setdefault(line["round"], {})
            said[index] = {"value": line["value"], "error": line["error"]}
            full = len(said) == self.count
            if full:
                self._said.pop(line["round"])
                self._unanswered.pop(line["round"], None)  # all hear of it, this process too
            elif line["error"]:  # the others may wait in a collective for this one, and never come
                *_, code, text = line["error"]
                self._unanswered.setdefault(line["round"], (time.monotonic() + self.limit, code, text))
        if full:
            everything = [said[i] for i in range(self.count)]
            self._send({"round": line["round"], "all": everything})
            self._finish(line["round"], everything)

    def _finish(self, number: int, everything: list[dict]) -> None:
        with self._changed:
            self._results[number] = everything
            self._changed.notify_all()

    def _refuse(self, code: int, text: str, grace: float) -> None:
        """End this process after a while, unless it has ended by itself."""
        if self.told is None or self.told[1] != LOST:
            self.told = (time.monotonic() + grace, code, text)

    def _lose(self, peer: Peer, how: str) -> NoReturn:
        text = f"lmx: process {peer.index} of {self.count} {how}."
        if self.index == 0:
            self._send({"end": LOST, "text": text}, besides=peer.index)
        self._refuse(LOST, f"{text} {self.advice}", 0.0)  # should the main thread fail because of it, and be faster
        if self.index == 0:
            time.sleep(min(1.0, self.limit / 5))  # jax aborts the others once process 0 is gone: let them end before
        end(LOST, f"{text} {self.advice}")


def connect(limit: float, patience: float) -> Channel:
    """The channel of this process, which jax.distributed has joined with the others; all of them call it.

    Raises OSError or JaxRuntimeError if not all are there within `patience` seconds.
    """
    state, index, count = distributed.global_state, jax.process_index(), jax.process_count()
    if index == 0:
        token = secrets.token_hex(16)
        with _listen(count) as server:
            until = time.monotonic() + patience
            state.client.key_value_set(ADDRESS, f"{server.getsockname()[1]} {token}")
            links: dict[int, socket.socket] = {}
            while len(links) < count - 1:
                server.settimeout(max(until - time.monotonic(), 0.001))
                link, _ = server.accept()
                said = _greeting(link)
                if len(said) == 2 and secrets.compare_digest(said[1], token.encode()):
                    links[int(said[0])] = link
                else:  # somebody else's connection
                    link.close()
        return Channel(index, count, links, limit)
    port, token = state.client.blocking_key_value_get(ADDRESS, int(patience * 1000)).split()
    link = socket.create_connection((state.coordinator_address.rpartition(":")[0].strip("[]"), int(port)), patience)
    link.sendall(f"{index:<8} {token}".encode())
    return Channel(index, count, {0: link}, limit)


def _greeting(link: socket.socket) -> list[bytes]:
    link.settimeout(GREETING)
    try:
        return link.recv(41, socket.MSG_WAITALL).split()
    except OSError:
        return []


def _listen(count: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # switched off in the kernel
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count)
    return socket.create_server(("", 0), backlog=count)


def end(code: int, text: str) -> NoReturn:
    """End this process at once, whatever its other threads wait for: no exit handler of jax, which would wait too.

    The first thread to call it has the last word.
    """
    _ending.acquire(timeout=5.0)  # in vain in a signal handler on top of the first
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(1.0)
    show = b"\x1b[?25h" if os.isatty(2) else b""  # the cursor, which a progress bar hides
    os.write(2, show + text.encode() + b"\n")
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
