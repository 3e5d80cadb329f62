"""A bucket on this machine: the calls of Google Cloud Storage's JSON API that tensorstore and gcsfs make, in memory.

    bucket.objects["run/200/about/data.json"]       # with the fixture `bucket`: the bytes of gs://bucket/run/200/...
    bucket.refuse = lambda call: 403 if call.kind == "insert" else None

It answers as the API's documentation says (https://cloud.google.com/storage/docs/json_api): objects list, get, insert
(media, multipart, resumable), delete and rewriteTo, with pages, ranges and generation preconditions.
"""

from __future__ import annotations

import base64
import dataclasses
import email.parser
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from lmx.train import buckets

BUCKET = "bucket"
PAGE = 20  # names in a page of a listing, so that clients have to ask for the next
LIST = f"/storage/v1/b/{BUCKET}/o"
OBJECT = re.compile(rf"{LIST}/([^/]+)")
REWRITE = re.compile(rf"{LIST}/([^/]+)/rewriteTo/b/{BUCKET}/o/([^/]+)")


@pytest.fixture(scope="module")
def bucket():
    """An ObjectStore that both clients take for Google's, in this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        store = ObjectStore()
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, store.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        patch.setenv("NO_GCE_CHECK", "true")  # gcsfs looks for credentials all the same: for 25 seconds off the cloud
        patch.setattr(buckets, "PATIENCE", 300.0)  # this machine may do much else
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks by gRPC what kind of bucket this is
        yield store
        store.close()


@dataclasses.dataclass(frozen=True)
class Call:
    """What a client asks for: `kind` is list, get, insert, delete, rewrite or bucket; `name` that of the object."""

    kind: str
    name: str


class ObjectStore:
    """An HTTP server of one bucket. refuse(call) gives the status of an error, or None to go on."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.calls: list[Call] = []
        self.refuse: Callable[[Call], int | None] = lambda call: None
        self.lock, self.numbers = threading.RLock(), itertools.count(1)
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def put(self, name: str, content: bytes) -> None:
        with self.lock:
            self.objects[name], self.generations[name] = content, next(self.numbers)

    def empty(self) -> None:
        with self.lock:
            self.objects, self.generations, self.calls, self.refuse = {}, {}, [], lambda call: None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: gcsfs asks in two ways at once, and hangs up on the slower one."""


class _Refused(Exception):
    """An error to answer with: its status."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    store: ObjectStore
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    log_message = lambda *_: None  # noqa: E731

    do_GET = lambda self: self._answer(self._get)  # noqa: E731
    do_POST = do_PUT = lambda self: self._answer(self._post)  # noqa: E731
    do_DELETE = lambda self: self._answer(self._delete)  # noqa: E731

    def _answer(self, work: Callable[[], None]) -> None:
        url = urlsplit(self.path)
        self.route, self.query = url.path, {k: v[0] for k, v in parse_qs(url.query).items()}
        self.content = self._body()
        try:
            with self.store.lock:
                work()
        except _Refused as refused:
            (status,) = refused.args
            self._send(status, {"error": {"code": status, "message": f"status {status}"}})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _begin(self, kind: str, name: str) -> None:
        self.store.calls.append(call := Call(kind, name))
        if status := self.store.refuse(call):
            raise _Refused(status)

    def _get(self) -> None:
        if found := OBJECT.fullmatch(self.route.removeprefix("/download")):
            self._begin("get", name := unquote(found[1]))
            self._condition(name, missing=404, unchanged=304)
            self._media(name) if self.query.get("alt") == "media" else self._send(200, self._about(name))
        elif self.route == LIST:
            self._begin("list", self.query.get("prefix", ""))
            self._list(self.query.get("prefix", ""))
        elif self.route == LIST.removesuffix("/o"):
            self._begin("bucket", "")
            self._send(200, {"kind": "storage#bucket", "name": BUCKET})
        else:
            raise _Refused(404)

    def _list(self, prefix: str) -> None:
        delimiter, last = self.query.get("delimiter"), self.query.get("endOffset")
        first = max(self.query.get("startOffset", ""), self.query.get("pageToken", ""))
        found: dict[str, bool] = {}  # what is shown -> whether it is an object, not a common prefix
        for name in sorted(self.store.objects):
            if name.startswith(prefix) and name >= first and (not last or name < last):
                head, mark, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                found[prefix + head + mark if mark else name] = not mark
        shown = list(found)[: min(PAGE, int(self.query.get("maxResults", PAGE)))]
        page: dict[str, object] = {"kind": "storage#objects"}
        page["items"] = [self._about(name) for name in shown if found[name]]
        page["prefixes"] = [name for name in shown if not found[name]]
        if len(shown) < len(found):
            page["nextPageToken"] = list(found)[len(shown)]
        self._send(200, page)

    def _media(self, name: str) -> None:
        content, size = self.store.objects[name], len(self.store.objects[name])
        headers = {"x-goog-generation": str(self.store.generations[name])}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._send(200, content, headers)
        start = int(wanted[1]) if wanted[1] else size - int(wanted[2])
        part = content[start : int(wanted[2]) + 1 if wanted[1] and wanted[2] else size]
        if not part:
            raise _Refused(416)
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{size}"
        self._send(206, part, headers)

    def _post(self) -> None:
        if found := REWRITE.fullmatch(self.route):
            source, target = unquote(found[1]), unquote(found[2])
            self._begin("rewrite", source)
            self._condition(source, missing=404)
            self.store.put(target, self.store.objects[source])
            self._send(200, {"kind": "storage#rewriteResponse", "done": True, "resource": self._about(target)})
        elif self.route != f"/upload{LIST}":
            raise _Refused(404)
        elif token := self.query.get("upload_id"):
            self._chunk(token)
        else:
            self._insert(self.query["uploadType"])

    def _insert(self, kind: str) -> None:
        about, content = self._parts() if kind == "multipart" else ({}, self.content)
        name = self.query.get("name") or about["name"]
        self._begin("insert", name)
        self._condition(name)
        if kind == "resumable":
            self.store.uploads[token := str(next(self.store.numbers))] = (name, bytearray())
            place = f"{self.store.url}{self.route}?uploadType=resumable&upload_id={token}"
            return self._send(200, {}, {"Location": place})
        self.store.put(name, content)
        self._send(200, self._about(name))

    def _chunk(self, token: str) -> None:
        """A part of a resumable upload: "bytes first-last/size", the size being * until it is known."""
        name, so_far = self.store.uploads[token]
        self._begin("insert", name)
        so_far += self.content
        size = self.headers["Content-Range"].rpartition("/")[2]
        if size == "*" or int(size) > len(so_far):
            return self._send(308, b"", {"Range": f"bytes=0-{len(so_far) - 1}"})
        del self.store.uploads[token]
        self.store.put(name, bytes(so_far))
        self._send(200, self._about(name))

    def _parts(self) -> tuple[dict, bytes]:
        """The two parts of multipart/related: what is said of the object, and its content."""
        mark = email.parser.Parser().parsestr(f"Content-Type: {self.headers['Content-Type']}\n\n").get_boundary()
        parts = self.content.split(b"--" + mark.encode())[1:3]
        about, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
        return json.loads(about), re.sub(rb"\r?\n\Z", b"", content)

    def _delete(self) -> None:
        name = unquote(OBJECT.fullmatch(self.route)[1])
        self._begin("delete", name)
        self._condition(name, missing=404)
        del self.store.objects[name], self.store.generations[name]
        self._send(204, b"")

    def _condition(self, name: str, missing: int | None = None, unchanged: int = 412) -> None:
        """Refuse what the preconditions on generations forbid; generation 0 is that of an object that is not there."""
        now = self.store.generations.get(name, 0)
        if missing and not now:
            raise _Refused(missing)
        if int(self.query.get("ifGenerationMatch", now)) != now:
            raise _Refused(412)
        if int(self.query.get("ifGenerationNotMatch", -1)) == now:
            raise _Refused(unchanged)

    def _about(self, name: str) -> dict[str, object]:
        content, when = self.store.objects[name], "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(len(content)),
            "generation": str(self.store.generations[name]), "timeCreated": when, "updated": when,
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
        }  # fmt: skip

    def _send(self, status: int, body: dict | bytes, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        kind = {"Content-Type": "application/json" if isinstance(body, dict) else "application/octet-stream"}
        self.send_response(status)
        for name, value in (kind | {"Content-Length": str(len(content))} | (headers or {})).items():
            if status not in (204, 304) or name not in ("Content-Type", "Content-Length"):
                self.send_header(name, value)
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(content)
