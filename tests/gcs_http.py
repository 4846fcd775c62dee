"""The HTTP side of tests/gcs.py: requests, the faults they are given, and connections.

Where the server differs from the real service, the connection makes up for it: it checks generation
preconditions of deletions, and itself collects resumable uploads, whose parts the server would
append without looking at their position. Objects are then written by multipart uploads, in which
the server checks preconditions.
"""

import contextlib
import dataclasses
import functools
import http.client
import http.server
import io
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_BLOCK = 1 << 16
_UNLIMITED = 1 << 62
# Of one connection between client and server, and therefore not repeated by a proxy.
_OF_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "upgrade"}
_OF_CONNECTION |= {"content-length"}

_ERRORS = {
    400: ("invalid", "Bad Request"),
    401: ("authError", "Invalid Credentials"),
    403: ("forbidden", "The caller does not have permission (storage.objects.create)"),
    404: ("notFound", "The specified bucket does not exist."),
    408: ("requestTimeout", "Request Timeout"),
    412: ("conditionNotMet", "At least one of the pre-conditions you specified did not hold."),
    429: ("rateLimitExceeded", "The object exceeded the rate limit for object mutation operations"),
    500: ("backendError", "We encountered an internal error. Please try again."),
    503: ("backendError", "Service temporarily unavailable. Please try again."),
}


@dataclasses.dataclass(frozen=True)
class Status:
    """Answers with an HTTP error in the format of the service; nothing reaches the server."""

    code: int


@dataclasses.dataclass(frozen=True)
class Delay:
    """Waits before the request reaches the server; not at all if the client gives up first."""

    seconds: float


@dataclasses.dataclass(frozen=True)
class CutRequest:
    """Resets the connection after n bytes of the request's body; nothing reaches the server."""

    after: int = 0


@dataclasses.dataclass(frozen=True)
class CutResponse:
    """Closes the connection after n bytes of the response's body; with -1, before its headers.

    The server has done what the request asks for.
    """

    after: int = -1


@dataclasses.dataclass(frozen=True)
class FlipBit:
    """Changes a byte of the response's body."""

    at: int


@dataclasses.dataclass(frozen=True)
class Call:
    """Calls a function: before the request reaches the server, or before the client's answer."""

    function: Callable[[], object]
    answered: bool = False


Action = Status | Delay | CutRequest | CutResponse | FlipBit | Call


@dataclasses.dataclass
class Request:
    """A request that the proxy received.

    Attributes:
      operation: "read" (contents), "stat", "list", "write" (any upload, copy or composition),
        "delete", "bucket" (its properties), or "other".
      method: of HTTP.
      target: path and query.
      bucket: its name.
      names: its object; of a listing, the prefix; of a copy, the destination; [] of a bucket.
      started: seconds of time.monotonic().
      seconds: until the answer was ready to be sent.
      status: of HTTP; 0 if the proxy did not try to send the whole answer.
      received: bytes of the request's body.
      sent: bytes of the response's body.
      action: fault that was injected.
    """

    operation: str
    method: str
    target: str
    bucket: str
    names: list[str]
    started: float = dataclasses.field(default_factory=time.monotonic)
    seconds: float = 0.0
    status: int = 0
    received: int = 0
    sent: int = 0
    action: Action | None = None


@dataclasses.dataclass
class _Upload:
    """A resumable upload.

    Attributes:
      request: the request that began it.
      metadata: the object's, as JSON.
      contents: what was received so far.
      answer: the last one, once the object is complete.
    """

    request: Request
    metadata: bytes
    contents: bytearray = dataclasses.field(default_factory=bytearray)
    answer: tuple[int, bytes] | None = None


@dataclasses.dataclass
class _Answer:
    """Status, headers and body of a response."""

    status: int
    headers: Mapping[str, str]
    body: "io.BytesIO | http.client.HTTPResponse"

    @classmethod
    def json(cls, status: int, body: bytes, **headers: str) -> "_Answer":
        headers |= {"Content-Type": "application/json; charset=UTF-8"}
        return cls(status, headers | {"Content-Length": str(len(body))}, io.BytesIO(body))

    @classmethod
    def of(cls, response: http.client.HTTPResponse) -> "_Answer":
        return cls(response.status, response.headers, response)

    @classmethod
    def error(cls, code: int) -> "_Answer":
        reason, message = _ERRORS[code]
        errors = [{"message": message, "domain": "global", "reason": reason}]
        error = {"error": {"code": code, "message": message, "errors": errors}}
        return cls.json(code, json.dumps(error).encode())


@dataclasses.dataclass
class _Shared:
    """What the proxies of a server share.

    Attributes:
      uploads: resumable uploads by their identifiers.
      conditional: held from the check of a precondition to the end of the write.
    """

    uploads: dict[str, _Upload] = dataclasses.field(default_factory=dict)
    conditional: threading.Lock = dataclasses.field(default_factory=threading.Lock)


@functools.cache
def _share(upstream: str) -> _Shared:
    return _Shared()


class ProxyServer(http.server.ThreadingHTTPServer):
    """Accepts the connections of clients.

    Args:
      upstream: "http://HOST:PORT" of the server.
      start: called with each request, to record it and to set its action.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, start: Callable[[Request], None]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.upstream = upstream.removeprefix("http://")
        self.start = start
        self.shared = _share(self.upstream)
        self.end_of_delays = threading.Event()
        self._open: set[socket.socket] = set()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.discard(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Does nothing: clients close connections whenever they like, and are killed in tests."""

    def end_delays(self) -> None:
        """Cuts the connections of requests that are being delayed."""
        self.end_of_delays.set()
        self.end_of_delays = threading.Event()

    def close(self) -> None:
        """Closes all connections."""
        self.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Cut(Exception):
    """Ends a connection."""


class _Connection(http.server.BaseHTTPRequestHandler):
    """A connection of a client, with one to the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ProxyServer

    def setup(self) -> None:
        super().setup()
        self._upstream = http.client.HTTPConnection(self.server.upstream, timeout=600)

    def finish(self) -> None:
        self._upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _handle(self) -> None:
        try:
            # The names of some objects are in the body.
            blocks = _read_body(self.rfile, self.headers)
            body = bytearray(next(blocks, b""))
            request = self._describe(body)
            end_of_delays = self.server.end_of_delays
            self.server.start(request)
            self._receive(request, blocks, body)
            answer = self._answer(request, body, end_of_delays)
            request.seconds = time.monotonic() - request.started
            self._send(request, answer)
        except (_Cut, OSError, http.client.HTTPException):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _describe(self, body: bytearray) -> Request:
        operation, bucket, names = describe(self.command, self.path, body)
        if upload := self.server.shared.uploads.get(_query(self.path).get("upload_id", "")):
            bucket, names = upload.request.bucket, upload.request.names
        return Request(operation, self.command, self.path, bucket, names)

    def _receive(self, request: Request, blocks: Iterator[bytes], body: bytearray) -> None:
        """Reads the rest of the body, so that the server never waits for a client."""
        if isinstance(request.action, CutRequest):
            while len(body) < request.action.after and (block := next(blocks, b"")):
                body += block
            request.received = len(body)
            linger = struct.pack("ii", 1, 0)  # Closing then resets the connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            raise _Cut
        for block in blocks:
            body += block
        request.received = len(body)

    def _answer(self, request: Request, body: bytearray, end_of_delays: threading.Event) -> _Answer:
        """Executes a request, unless a fault prevents it."""
        match request.action:
            case Status(code):
                return _Answer.error(code)
            case Delay(seconds):
                if end_of_delays.wait(seconds) or self._is_abandoned():
                    raise _Cut
            case Call(function, answered=False):
                function()
        answer = self._execute(request, body)
        if isinstance(request.action, Call) and request.action.answered:
            request.action.function()
        return answer

    def _execute(self, request: Request, body: bytearray) -> _Answer:
        query = _query(request.target)
        if "upload_id" in query:
            return self._continue_upload(query["upload_id"], body)
        if query.get("uploadType") == "resumable":
            return self._begin_upload(request, bytes(body))
        if query.get("uploadType") == "media":
            metadata = {"contentType": self.headers["Content-Type"]}
            return self._insert(request, json.dumps(metadata).encode(), body)
        if not _conditions(query):
            return self._forward(request, body)
        with self.server.shared.conditional:
            if request.operation == "delete" and not self._hold(request):
                return _Answer.error(412)
            return self._forward(request, body)

    def _hold(self, request: Request) -> bool:
        """Whether the preconditions of a request hold."""
        name = urllib.parse.quote(request.names[0], safe="")
        facts = self._get(f"/storage/v1/b/{request.bucket}/o/{name}")
        generation = str(facts.get("generation", 0))
        conditions = _conditions(_query(request.target))
        return (
            conditions.get("ifGenerationMatch", generation) == generation
            and conditions.get("ifGenerationNotMatch") != generation
        )

    def _begin_upload(self, request: Request, metadata: bytes) -> _Answer:
        if "error" in self._get(f"/storage/v1/b/{request.bucket}"):
            return _Answer.error(404)
        upload_id = uuid.uuid4().hex
        self.server.shared.uploads[upload_id] = _Upload(request, metadata)
        path = f"/upload/storage/v1/b/{request.bucket}/o"
        location = f"http://{self.headers['Host']}{path}?uploadType=resumable&upload_id={upload_id}"
        return _Answer.json(200, b"", Location=location)

    def _continue_upload(self, upload_id: str, body: bytearray) -> _Answer:
        """Adds to a resumable upload; completes it if this is its end."""
        upload = self.server.shared.uploads.get(upload_id)
        if upload is None:
            return _Answer.error(404)
        if self.command == "DELETE":
            del self.server.shared.uploads[upload_id]
            return _Answer.json(499, b"")
        if upload.answer:
            return _Answer.json(*upload.answer)
        start, total = _parse_range(self.headers.get("Content-Range"), len(body))
        if start is not None:
            if start > len(upload.contents):
                return _Answer.error(400)
            upload.contents[start:] = body
        received = len(upload.contents)
        if total is None or received < total:
            ranges = {"Range": f"bytes=0-{received - 1}"} if received else {}
            return _Answer.json(308, b"", **ranges)
        answer = self._insert(upload.request, upload.metadata, upload.contents)
        upload.answer = answer.status, answer.body.read()
        upload.contents.clear()
        return _Answer.json(*upload.answer)

    def _insert(self, request: Request, metadata: bytes, contents: bytearray) -> _Answer:
        """Writes an object by the only kind of upload whose preconditions the server checks."""
        boundary = uuid.uuid4().hex
        query = _query(request.target) | {"uploadType": "multipart", "name": request.names[0]}
        target = f"/upload/storage/v1/b/{request.bucket}/o?{urllib.parse.urlencode(query)}"
        kind = json.loads(metadata or b"{}").get("contentType") or "application/octet-stream"
        separator = f"\r\n--{boundary}".encode()
        body = b"".join(
            [
                *(separator, b"\r\nContent-Type: application/json\r\n\r\n", metadata or b"{}"),
                *(separator, f"\r\nContent-Type: {kind}\r\n\r\n".encode(), contents),
                *(separator, b"--\r\n"),
            ]
        )
        kind = f"multipart/related; boundary={boundary}"
        headers = {"Host": self.headers["Host"], "Content-Type": kind}
        with self.server.shared.conditional:
            self._upstream.request("POST", target, body, headers)
            return _Answer.of(self._upstream.getresponse())

    def _forward(self, request: Request, body: bytearray) -> _Answer:
        """Executes a request as it is."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        headers.setdefault("accept-encoding", "identity")  # Otherwise http.client sets its own.
        headers = {name: headers[name] for name in headers.keys() - _OF_CONNECTION}
        self._upstream.request(request.method, request.target, bytes(body) or None, headers)
        return _Answer.of(self._upstream.getresponse())

    def _get(self, path: str) -> dict[str, Any]:
        self._upstream.request("GET", path)
        with self._upstream.getresponse() as response:
            facts: dict[str, Any] = json.loads(response.read())
            return facts

    def _send(self, request: Request, answer: _Answer) -> None:
        """Sends a response, with the faults that concern it."""
        cut = request.action.after if isinstance(request.action, CutResponse) else None
        if cut == -1:
            raise _Cut
        self.send_response_only(answer.status)
        for header, value in answer.headers.items():
            if header.lower() not in _OF_CONNECTION - {"content-length"}:
                self.send_header(header, value)
        is_empty = self.command == "HEAD" or answer.status in (204, 304)
        if chunked := "Content-Length" not in answer.headers and not is_empty:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if cut is None:
            # Before the client can see the end of the answer, and a test look for it here.
            request.status = answer.status
        rest = cut if cut is not None else _UNLIMITED
        while block := answer.body.read1(min(_BLOCK, rest)):
            if isinstance(request.action, FlipBit):
                block = _flip(block, request.action.at - request.sent)
            rest -= len(block)
            request.sent += len(block)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
        answer.body.close()
        if cut is not None:
            raise _Cut
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _is_abandoned(self) -> bool:
        """Whether the client has closed its connection."""
        try:
            self.connection.setblocking(False)
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        finally:
            self.connection.setblocking(True)


def describe(method: str, target: str, body: bytes | bytearray) -> tuple[str, str, list[str]]:
    """Returns operation, bucket and objects of a request, as in `Request`.

    Args:
      method: of HTTP.
      target: path and query.
      body: its first bytes.
    """
    path, query = target.partition("?")[0], _query(target)
    parts = re.fullmatch(r"(/upload|/download|)/storage/v1/b/([^/]+)(/o/?(.*))?", path)
    if not parts:
        return "other", "", []
    kind, bucket, objects, rest = parts.groups()
    if objects is None:
        return "bucket", bucket, []
    if kind == "/upload":
        name = query.get("name") or _find_name(body)
        return ("other" if method == "DELETE" else "write"), bucket, [name]
    if not rest:
        return "list", bucket, [query.get("prefix", query.get("startOffset", ""))]
    source, _, action = rest.partition("/")
    if action.startswith(("rewriteTo/", "copyTo/")):
        source = action.rpartition("/o/")[2]
    names = [urllib.parse.unquote(source)]
    if method in ("GET", "HEAD"):
        is_read = kind == "/download" or query.get("alt") == "media"
        return ("read" if is_read else "stat"), bucket, names
    return ("delete" if method == "DELETE" else "write"), bucket, names


def _find_name(body: bytes | bytearray) -> str:
    """Returns the object's name in the JSON at the beginning of an upload."""
    start = body.find(b"{")
    if start < 0:
        return ""
    text = body[start:].decode(errors="replace")
    with contextlib.suppress(ValueError):
        return str(json.JSONDecoder().raw_decode(text)[0].get("name", ""))
    return ""


def _query(target: str) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(target.partition("?")[2]))


def _conditions(query: dict[str, str]) -> dict[str, str]:
    return {name: query[name] for name in query if name.startswith("ifGeneration")}


def _parse_range(header: str | None, size: int) -> tuple[int | None, int | None]:
    """Returns where a part of an upload begins, and the size of the whole; None: not known.

    Args:
      header: Content-Range.
      size: bytes of the part.
    """
    if header is None:
        return 0, size
    parts = re.fullmatch(r"bytes (\*|(\d+)-\d+)/(\*|\d+)", header)
    assert parts, header
    start, total = parts[2], parts[3]
    return int(start) if start else None, None if total == "*" else int(total)


def _flip(block: bytes, at: int) -> bytes:
    """Returns the block with another byte at an index, if it has one there."""
    if not 0 <= at < len(block):
        return block
    return block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :]


def _read_body(stream: io.BufferedIOBase, headers: http.client.HTTPMessage) -> Iterator[bytes]:
    """Yields the body of a request in blocks.

    Raises:
      ConnectionError: if it ends early.
    """
    if headers.get("Transfer-Encoding", "").lower() == "chunked":
        while size := int(stream.readline().partition(b";")[0], 16):
            yield from _read_exactly(stream, size)
            stream.readline()
        while stream.readline().strip():
            pass
    else:
        yield from _read_exactly(stream, int(headers.get("Content-Length", 0)))


def _read_exactly(stream: io.BufferedIOBase, size: int) -> Iterator[bytes]:
    while size:
        block = stream.read1(min(size, _BLOCK))
        if not block:
            raise ConnectionError("the client closed the connection")
        size -= len(block)
        yield block
