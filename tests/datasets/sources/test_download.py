import contextlib
import hashlib
import http.server
import pathlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from inception_jax.datasets.sources import download
from inception_jax.errors import DataError

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; `drops` are the numbers of bytes sent by the first responses."""

    def __init__(
        self, drops: Sequence[int] = (), *, ranges: bool = True, content: bytes = CONTENT
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.drops, self.ranges, self.content = list(drops), ranges, content
        self.requested: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/tiny.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requested.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        start = start if self.server.ranges else 0
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = self.server.drops.pop(0) if self.server.drops else len(body)
        self.wfile.write(body[:sent])

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(*args: Any, **kwargs: Any) -> Iterator[Server]:
    with Server(*args, **kwargs) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def fetch(server: Server, target: pathlib.Path, **kwargs: Any) -> pathlib.Path:
    settings = {"size": len(CONTENT), "md5": MD5, "log": lambda line: None, "wait": 0.0}
    return download.fetch(server.url, target, **(settings | kwargs))


def test_download_is_verified_and_done_once(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "new" / "tiny.zip"
    with serving() as server:
        assert fetch(server, target) == target
        assert fetch(server, target) == target
    assert target.read_bytes() == CONTENT
    assert server.requested == [None]
    assert [path.name for path in target.parent.iterdir()] == ["tiny.zip"]


def test_broken_connection_is_resumed(tmp_path: pathlib.Path) -> None:
    with serving(drops=[300_000, 0, 100_000]) as server:
        fetch(server, tmp_path / "tiny.zip")
    assert (tmp_path / "tiny.zip").read_bytes() == CONTENT
    assert server.requested == [None, "bytes=300000-", "bytes=300000-", "bytes=400000-"]


def test_server_without_ranges_restarts_download(tmp_path: pathlib.Path) -> None:
    with serving(drops=[300_000], ranges=False) as server:
        fetch(server, tmp_path / "tiny.zip")
    assert (tmp_path / "tiny.zip").read_bytes() == CONTENT


def test_partial_download_is_kept(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "tiny.zip"
    with (
        serving(drops=[500_000] + [0] * 100) as server,
        pytest.raises(DataError, match=r"500,000 of 1,024,000 bytes.*config\.data\.source"),
    ):
        fetch(server, target)
    assert not target.exists()
    with serving() as server:
        fetch(server, target)
    assert server.requested == ["bytes=500000-"]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT + b"more"])
def test_wrong_file_is_refused_and_removed(tmp_path: pathlib.Path, content: bytes) -> None:
    with (
        serving(content=content) as server,
        pytest.raises(
            DataError, match=rf"downloaded file has.*must have 1,024,000 bytes and MD5 {MD5}"
        ),
    ):
        fetch(server, tmp_path / "tiny.zip")
    assert not list(tmp_path.iterdir())


def test_unreachable_server_is_one_error(tmp_path: pathlib.Path) -> None:
    with serving() as server:
        pass
    with pytest.raises(DataError, match=r"download failed.*refused.*config\.data\.source"):
        fetch(server, tmp_path / "tiny.zip")


def test_full_disk_is_detected_before_download(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with (
        serving() as server,
        pytest.raises(
            DataError, match=r"downloading .* needs up to 1\.0 MB, but only 0\.0 MB is free"
        ),
    ):
        fetch(server, pathlib.Path(tmp_path, "tiny.zip"))
    assert not server.requested
