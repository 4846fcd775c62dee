"""Downloads a file: resumes interrupted downloads and verifies the result."""

import hashlib
import http.client
import os
import pathlib
import time
import urllib.request
from collections.abc import Callable

from inception_jax.console import Progress
from inception_jax.errors import DataError
from inception_jax.storage.space import check_space

_CHUNK_SIZE = 1 << 20
_TIMEOUT = 30.0
_ATTEMPTS = 5


def fetch(
    url: str,
    target: pathlib.Path,
    *,
    size: int,
    md5: str,
    log: Callable[[str], None] = print,
    wait: float = 2.0,
) -> pathlib.Path:
    """Downloads `url` to `target`, unless it already exists.

    Received data are kept in `target`.part, which a later call resumes; only a file with the right
    size and digest is renamed to `target`.

    Args:
      url: http or https.
      target: path of the downloaded file.
      size: expected size, bytes.
      md5: expected MD5, hexadecimal.
      log: called with one line of text.
      wait: seconds before a broken connection is retried.

    Returns:
      `target`.

    Raises:
      DataError: if the server cannot be reached, or sends another file.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    received = part.stat().st_size if part.exists() else 0
    check_space(target.parent, size - received, f"downloading {url}", error=DataError)
    with Progress(f"downloading {url}", size, unit="bytes", log=log) as progress:
        progress.update(received)
        failures = 0
        while received < size:
            try:
                _receive(url, part, received, size=size, progress=progress)
                problem = "the connection closed early"
            except (OSError, http.client.HTTPException) as error:
                problem = str(error)
            on_disk = part.stat().st_size if part.exists() else 0
            # Count only attempts without any data: a poor connection may break any number of times.
            failures = failures + 1 if on_disk <= received else 0
            received = on_disk
            if received < size and failures >= _ATTEMPTS:
                raise _unreachable(url, problem, received, size=size)
            if received < size:
                time.sleep(wait)
    _check(url, part, size=size, md5=md5)
    os.replace(part, target)
    return target


def _receive(url: str, part: pathlib.Path, received: int, *, size: int, progress: Progress) -> None:
    """Appends the server's data from byte `received` to `part`."""
    request = urllib.request.Request(
        url, headers={"Range": f"bytes={received}-"} if received else {}
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        # A server that ignores the Range header responds with 200 and sends the complete file.
        restart = received > 0 and response.status != http.client.PARTIAL_CONTENT
        if restart:
            progress.update(-received)
            received = 0
        with part.open("wb" if restart else "ab") as file:
            while received <= size and (chunk := response.read(_CHUNK_SIZE)):
                file.write(chunk)
                received += len(chunk)
                progress.update(len(chunk))


def _unreachable(url: str, problem: str, received: int, *, size: int) -> DataError:
    return DataError(
        f"{url}: download failed ({problem}); {received:,} of {size:,} bytes were received and are "
        "kept. Check the network and rerun, or get the file elsewhere and set config.data.source "
        "to its path"
    )


def md5_of(path: pathlib.Path) -> str:
    """Returns a file's MD5, hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return digest.hexdigest()


def _check(url: str, part: pathlib.Path, *, size: int, md5: str) -> None:
    """Removes the file and raises DataError if its size or digest is wrong."""
    actual_size, digest = part.stat().st_size, md5_of(part)
    if (actual_size, digest) != (size, md5):
        part.unlink()
        raise DataError(
            f"{url}: the downloaded file has {actual_size:,} bytes and MD5 {digest}; must have "
            f"{size:,} bytes and MD5 {md5}; it was removed. Rerun, or get the file elsewhere and "
            "set config.data.source to its path"
        )
