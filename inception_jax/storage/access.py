"""Access to whole files, local or in a bucket; checks of outputs before long work."""

import contextlib
import pathlib
import secrets
import tempfile
from collections.abc import Iterator

from inception_jax.errors import UserError, WriteError
from inception_jax.storage import atomic, buckets, paths


def is_file(path: paths.Path) -> bool:
    """Whether a file exists.

    Raises:
      BucketError: if its bucket cannot be read.
    """
    if paths.is_local(path):
        return path.is_file()
    if buckets.stat(path) is not None:
        return True
    buckets.check_bucket(path)
    return False


def size(path: paths.Path) -> int:
    """Returns the size of an existing file in bytes.

    Raises:
      FileNotFoundError: if it does not exist.
      BucketError: if its bucket cannot be read.
    """
    if paths.is_local(path):
        return path.stat().st_size
    if (facts := buckets.stat(path)) is None:
        raise FileNotFoundError(path)
    return facts.size


def read_bytes(path: paths.Path, limit: int = -1) -> bytes:
    """Returns the contents of a file.

    Args:
      path: the file.
      limit: number of bytes to read at most; -1: all.

    Raises:
      OSError: if it does not exist, or cannot be read.
      BucketError: if its bucket cannot be read.
    """
    if paths.is_local(path):
        with path.open("rb") as file:
            return file.read(limit)
    if limit >= 0 and (facts := buckets.stat(path)) and facts.size > limit:
        return buckets.read_bytes(path, 0, limit)
    # Only complete objects are checked against their checksums.
    return buckets.read_bytes(path)


@contextlib.contextmanager
def local_copy(path: paths.Path) -> Iterator[pathlib.Path]:
    """Yields a local file with the contents and name of a file: itself, or a temporary copy.

    Raises:
      OSError, BucketError: as `read_bytes`, for a file in a bucket.
    """
    if paths.is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="inception_jax-") as folder:
        local = pathlib.Path(folder, path.name)
        local.write_bytes(buckets.read_bytes(path))
        yield local


def check_output_folder(folder: paths.Path, flag: str) -> None:
    """Checks that files can be written in a folder, which is created and marked.

    Args:
      folder: for this program's output alone. A bucket has no folders to create.
      flag: the flag that named it, for the message.

    Raises:
      UserError: if it cannot be created or written to.
    """
    with _as_flag_error(folder, flag):
        if paths.is_local(folder):
            atomic.make_output_folder(folder)
        _probe(folder)


def check_output_file(path: paths.Path, flag: str) -> None:
    """Checks that a file can be written, and creates its folder; leaves the file as it is.

    Args:
      path: the file.
      flag: the flag that named it, for the message.

    Raises:
      UserError: if it cannot be written.
    """
    if paths.is_local(path) and path.is_dir():
        raise UserError(f"--{flag}={path}: is a folder; must be a file, such as {path / 'FILE'}")
    if path.parent == path or str(path.parent) == "gs://":
        raise UserError(f"--{flag}={path}: must be a file, not a whole bucket; use {path}/FILE")
    with _as_flag_error(path, flag):
        if not paths.is_local(path):
            _probe(path)
        elif not atomic.is_stream(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _probe(path.parent)


def _probe(path: paths.Path) -> None:
    """Checks that a local folder, or an object or folder in a bucket, can be written to."""
    if not paths.is_local(path):
        buckets.check_writable(path)
        return
    probe = path / f".probe.{secrets.token_hex(8)}"
    probe.write_bytes(bytes(4096))
    probe.unlink()


@contextlib.contextmanager
def naming_flag(flag: str, path: paths.Path) -> Iterator[None]:
    """Names a flag in errors of requests to the bucket of its path."""
    try:
        yield
    except buckets.BucketError as error:
        # It starts with the path of an object.
        text = str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}"
        raise WriteError(f"--{flag}={text}") from error


@contextlib.contextmanager
def _as_flag_error(path: paths.Path, flag: str) -> Iterator[None]:
    """Names a flag in errors about writing to its path."""
    try:
        with naming_flag(flag, path):
            yield
    except OSError as error:
        raise UserError(
            f"--{flag}={path}: cannot be written to: {error.strerror}. "
            "Use a writable directory on a disk with free space"
        ) from error
