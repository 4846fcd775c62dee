"""Objects in Google Cloud Storage; the only module that uses its client library.

Requests that fail temporarily (429, 5xx, timeouts, cut connections) are repeated with exponential
backoff for `config.bucket.retry_seconds`, and the first of them is logged. Other failures become
one `BucketError` with a remedy.
Uploads and downloads are checked against the checksums that the service stores with each object.

Orbax reaches buckets through etils with gcsfs, and through TensorStore; `translate_errors` also
recognizes their errors. The environment variables STORAGE_EMULATOR_HOST (client library, gcsfs) and
TENSORSTORE_GCS_HTTP_URL select another server.
"""

import base64
import contextlib
import contextvars
import errno
import functools
import http
import logging
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from inception_jax.errors import WriteError

if TYPE_CHECKING:
    from etils import epath
    from google.cloud import storage

_Result = TypeVar("_Result")

_ATTEMPT_SECONDS = 60.0  # Of one attempt, without a byte from the server.
# To connect and to answer, each: together less than half of a lease's duration. Files of more than
# 8 MiB take two requests.
_CHECKED_ATTEMPT_SECONDS = 12.0
_INITIAL_BACKOFF_SECONDS = 1.0
# An outage has ended if no request fails for longer than an attempt and the longest pause take.
_OUTAGE_SECONDS = 120.0
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_REMEDIES = {
    401: "credentials are missing or have expired; run gcloud auth application-default login, or "
    "on a Google Cloud machine, attach a service account with the scope cloud-platform",
    403: "permission denied; grant roles/storage.objectUser on the bucket (for reading only: "
    "roles/storage.objectViewer) to the account of this command",
    404: "bucket not found; correct its name, or create it with gcloud storage buckets create",
}
# Libraries whose exceptions concern the connection, unless they have an HTTP status.
_NETWORK_LIBRARIES = ("aiohttp", "requests", "urllib3", "http")
# TensorStore's messages, which arrive as text in exceptions of various types. Details follow them
# in brackets; not always the status.
_TENSORSTORE_STATUS = re.compile(r"\[http_response_code='(\d{3})'\]")
_TENSORSTORE_NETWORK = re.compile(r"retry attempts failed: |\bcurl_code=|\bDEADLINE_EXCEEDED: ")
_TENSORSTORE_DENIED = re.compile(r"^(PERMISSION_DENIED|UNAUTHENTICATED): .*gs://", re.S)
_TENSORSTORE_DETAILS = re.compile(r" \[\w+='.*", re.S)

Log = Callable[[str], None]

_retry_seconds = 300.0
_has_setting = False
_log: Log | None = None
_last_failure = -math.inf
_failure_lock = threading.Lock()
_time_limit: contextvars.ContextVar[float] = contextvars.ContextVar("_time_limit", default=math.inf)


class BucketError(WriteError):
    """A bucket cannot be read or written, after the retries that may help."""


class ChangedError(Exception):
    """An object does not have the generation that a conditional write expects."""


class Stat(NamedTuple):
    """Facts about an object.

    Attributes:
      size: bytes.
      md5: hexadecimal; '' if unknown, as of composed objects.
      generation: number of this version of it; in Google's service, µs since 1970.
      crc32c: hexadecimal.
    """

    size: int
    md5: str
    generation: int
    crc32c: str


def set_retry_seconds(seconds: float, *, is_recorded: bool = False) -> None:
    """Sets for how long this process repeats a request that fails temporarily.

    Args:
      seconds: how long.
      is_recorded: whether a run that this process only reads recorded it, and not its own settings,
        which take precedence.
    """
    global _retry_seconds, _has_setting
    if not is_recorded or not _has_setting:
        _retry_seconds, _has_setting = seconds, not is_recorded


def log_outages(log: Log) -> None:
    """Sets what is called with a line when requests begin to fail temporarily."""
    global _log
    _log = log


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Limits the retries and attempts of each request in the block, if that is less than usual.

    Args:
      seconds: for how long a request is repeated, and for how long an attempt may get no answer.
    """
    before = _time_limit.set(seconds)
    try:
        yield
    finally:
        _time_limit.reset(before)


def retry_seconds() -> float:
    """Returns for how long this process repeats a request that fails temporarily."""
    return _retry_seconds


def is_failure(error: BaseException) -> bool:
    """Whether an exception reports a failed request to a bucket, or follows from one."""
    return isinstance(error, BucketError) or bool(_status(error))


def list_files(folder: "epath.Path") -> dict[str, Stat]:
    """Returns the objects below a folder, by their relative paths; {} if there are none.

    Raises:
      BucketError: if the bucket cannot be read.
    """
    bucket, name = _split(folder)
    prefix = f"{name}/" if name else ""

    def attempt() -> dict[str, Stat]:
        blobs = _client().list_blobs(bucket, prefix=prefix, timeout=_attempt_seconds(), retry=None)
        return {blob.name.removeprefix(prefix): _stat(blob) for blob in blobs}

    return {name: stat for name, stat in _request(folder, attempt).items() if name}


def check_names(folder: "epath.Path", names: Collection[str]) -> None:
    """Checks that the names of objects below a folder can be names of local files.

    Raises:
      BucketError: naming the object that has to be renamed.
    """
    folders = {str(above) for name in names for above in pathlib.PurePosixPath(name).parents}
    for name in names:
        if {"", ".", ".."} & set(name.split("/")):
            raise BucketError(f"{folder}/{name}: is not a usable file name; rename it")
        if name in folders:
            raise BucketError(f"{folder}/{name}: is both a file and a folder; rename one of them")


def check_bucket(path: "epath.Path") -> None:
    """Checks that the bucket of a path exists and can be read.

    Raises:
      BucketError: if not.
    """
    bucket, timeout = _split(path)[0], _attempt_seconds()
    _request(
        path,
        lambda: list(_client().list_blobs(bucket, max_results=1, timeout=timeout, retry=None)),
    )


def stat(path: "epath.Path") -> Stat | None:
    """Returns the facts about an object; None if it does not exist.

    Raises:
      BucketError: if the bucket cannot be read.
    """
    bucket, name = _split(path)
    if not name:
        return None  # A whole bucket.

    def attempt() -> Stat | None:
        blob = _client().bucket(bucket).get_blob(name, timeout=_attempt_seconds(), retry=None)
        return _stat(blob) if blob else None

    return _request(path, attempt)


def read_bytes(
    path: "epath.Path", start: int = 0, end: int | None = None, *, generation: int | None = None
) -> bytes:
    """Returns the contents of an object, or of the range [start, end) of its bytes.

    Args:
      path: the object.
      start, end: the range; if the object ends before, there are fewer bytes or none.
      generation: the generation to read; None: the newest.

    Raises:
      FileNotFoundError: if it does not exist, or no longer has this generation.
      BucketError: if it cannot be read.
    """
    last = None if end is None else end - 1

    def attempt() -> bytes:
        blob = _blob(path, generation)
        contents: bytes = blob.download_as_bytes(
            start=start or None, end=last, raw_download=True, timeout=_attempt_seconds(), retry=None
        )
        return contents

    if not _split(path)[1]:
        raise _missing(path)  # A whole bucket.
    try:
        with _missing_as_file_not_found(path):
            return _request(path, attempt)
    except BucketError as error:
        if _status(error.__cause__ or error) != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return b""


def write_bytes(
    path: "epath.Path",
    data: bytes,
    *,
    if_generation: int | None = None,
    check: Callable[[], None] | None = None,
) -> int:
    """Creates or replaces an object; returns its new generation.

    Args:
      path: the object.
      data: its new contents.
      if_generation: the generation to replace; 0: the object must not exist; None: any.
      check: called before each attempt, such as that of a lease, without which a late attempt could
        replace what its new holder wrote.

    Raises:
      ChangedError: if it has another generation. An earlier attempt whose answer was lost may have
        written it.
      BucketError: if it cannot be written.
      Exception: those of `check`.
    """

    def attempt() -> int:
        timeout = _attempt_seconds()
        if check:
            check()
            timeout = min(timeout, _CHECKED_ATTEMPT_SECONDS)
        blob = _blob(path)
        blob.upload_from_string(
            data,
            content_type="application/octet-stream",
            if_generation_match=if_generation,
            timeout=timeout,
            retry=None,
        )
        return int(blob.generation)

    return _request(path, attempt)


def check_writable(path: "epath.Path") -> None:
    """Checks that an object can be written, or any in a folder, without writing one.

    Raises:
      BucketError: if it cannot.
    """
    bucket, name = _split(path)

    def attempt() -> None:
        # Permissions are checked before the generation, which no object has.
        _client().bucket(bucket).blob(name or ".probe").upload_from_string(
            b"", if_generation_match=1, timeout=_attempt_seconds(), retry=None
        )

    with contextlib.suppress(ChangedError):
        _request(path, attempt)


def compose(path: "epath.Path", parts: Sequence["epath.Path"]) -> Stat:
    """Creates or replaces an object, joining 1 to 32 objects of the same bucket.

    Raises:
      BucketError: if it cannot be written, or a part is missing.
    """

    def attempt() -> Stat:
        blob = _blob(path)
        blob.content_type = "application/octet-stream"
        blob.compose([_blob(part) for part in parts], timeout=_attempt_seconds(), retry=None)
        return _stat(blob)

    return _request(path, attempt)


def delete(path: "epath.Path") -> None:
    """Deletes an object, if it exists.

    Raises:
      BucketError: if it cannot be deleted.
    """
    with contextlib.suppress(FileNotFoundError), _missing_as_file_not_found(path):
        _request(path, lambda: _blob(path).delete(timeout=_attempt_seconds(), retry=None))


def copy(source: "epath.Path", destination: "epath.Path") -> None:
    """Copies an object within its bucket, replacing an earlier destination; without downloading it.

    Raises:
      FileNotFoundError: if the source does not exist.
      BucketError: if it cannot be copied.
    """
    old, new = _blob(source), _blob(destination)

    def attempt(token: str | None) -> str | None:
        token, _, _ = new.rewrite(old, token=token, timeout=_attempt_seconds(), retry=None)
        return token

    with _missing_as_file_not_found(source):
        # A large object takes several requests.
        token = _request(source, lambda: attempt(None))
        while token:
            token = _request(source, functools.partial(attempt, token))


def _request(path: "epath.Path", attempt: Callable[[], _Result]) -> _Result:
    """Returns the result of a request, repeated while it fails temporarily.

    Raises:
      ChangedError, BucketError: as the functions above.
    """
    from google.api_core import retry

    with translate_errors(path):
        return retry.Retry(**_retry_options(str(path)))(attempt)()


def _retry_asynchronously(
    attempt: Callable[..., Awaitable[_Result]],
) -> Callable[..., Awaitable[_Result]]:
    from google.api_core import retry

    return retry.AsyncRetry(**_retry_options("Google Cloud Storage"))(attempt)


def _retry_options(what: str) -> dict[str, Any]:
    """Returns arguments of the client library's retries; `what` is requested, for messages."""
    return {
        "predicate": lambda error: _status(error) in _TRANSIENT,
        "initial": _INITIAL_BACKOFF_SECONDS,
        "maximum": 32.0,
        "timeout": _retry_limit(),
        "on_error": functools.partial(_log_first_failure, what),
    }


def _log_first_failure(what: str, error: BaseException) -> None:
    """Logs the first failure of an outage, since the user would otherwise wait without a sign."""
    global _last_failure
    if _retry_limit() < _retry_seconds:
        return  # Whoever limits the retries soon reports the failure.
    with _failure_lock:
        before, _last_failure = _last_failure, time.monotonic()
        is_first = _last_failure - before > _OUTAGE_SECONDS
    if is_first and _log:
        _log(
            f"{what}: {_first_line(error)}; retrying for up to {_retry_seconds:g} s "
            "(config.bucket.retry_seconds)"
        )


def _retry_limit() -> float:
    return min(_retry_seconds, _time_limit.get())


def _attempt_seconds() -> float:
    return min(_ATTEMPT_SECONDS, _time_limit.get())


@contextlib.contextmanager
def translate_errors(path: "epath.Path | pathlib.Path") -> Iterator[None]:
    """Turns errors of requests to buckets into a `BucketError` or `ChangedError`.

    Args:
      path: what the block reads or writes, for the message.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        status = _status(error)
        if status == http.HTTPStatus.PRECONDITION_FAILED:
            raise ChangedError(str(path)) from error
        if not status:
            raise
        raise BucketError(f"{path}: {_describe(status, error)}") from error


def _describe(status: int, error: BaseException) -> str:
    if status in _TRANSIENT:
        is_limited = _retry_limit() < _retry_seconds
        setting = "" if is_limited else " (config.bucket.retry_seconds)"
        return (
            f"Google Cloud Storage did not answer within {_retry_limit():g} s{setting}: "
            f"{_first_line(error)}. Check the network and rerun the command"
        )
    return _REMEDIES.get(status, f"request failed: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = _TENSORSTORE_DETAILS.sub("", str(cause)).rpartition("retry attempts failed: ")[2]
    return f"{type(cause).__name__}: {text}".splitlines()[0][:200].rstrip(".")


def _status(error: BaseException) -> int:
    """Returns the HTTP status of a failed request, or one of the same meaning; 0 if it is none."""
    library = type(error).__module__.partition(".")[0]
    name = type(error).__name__
    code = getattr(error, "code", None)
    if library in ("google", "gcsfs") and str(code).isdecimal():
        return int(str(code))
    if library == "google":
        if name == "RetryError":
            return _status(error.__cause__) if error.__cause__ else 503
        if name in ("DataCorruption", "TransportError"):
            return 503
        response = getattr(error, "response", None)  # InvalidResponse, of downloads.
        if response is not None:
            return int(response.status_code)
        if ".auth." not in f"{type(error).__module__}.":
            return 0
        # A transport error with an answer has it as its second argument.
        cause = error.__cause__
        unreachable = (
            cause is not None and type(cause).__name__ == "TransportError" and len(cause.args) == 1
        )
        return 503 if unreachable or getattr(error, "retryable", False) else 401
    if library in _NETWORK_LIBRARIES or isinstance(error, ConnectionError | TimeoutError):
        return 503
    text = str(error)
    if match := _TENSORSTORE_STATUS.search(text):
        return int(match[1])
    if _TENSORSTORE_NETWORK.search(text):
        return 503
    if _TENSORSTORE_DENIED.search(text):
        return 403
    return 403 if isinstance(error, OSError) and text.startswith("Forbidden: ") else 0


@contextlib.contextmanager
def _missing_as_file_not_found(path: "epath.Path") -> Iterator[None]:
    """Turns the 404 of an object, as opposed to one of its bucket, into a FileNotFoundError."""
    try:
        yield
    except BucketError as error:
        if error.__cause__ is None or _status(error.__cause__) != http.HTTPStatus.NOT_FOUND:
            raise
        check_bucket(path)
        raise _missing(path) from error


def _missing(path: "epath.Path") -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _split(path: "epath.Path") -> tuple[str, str]:
    bucket, _, name = str(path).removeprefix("gs://").partition("/")
    return bucket, name


def _blob(path: "epath.Path", generation: int | None = None) -> "storage.Blob":
    bucket, name = _split(path)
    return _client().bucket(bucket).blob(name, generation=generation)


def _stat(blob: "storage.Blob") -> Stat:
    md5, crc32c = (
        base64.b64decode(digest).hex() if digest else "" for digest in (blob.md5_hash, blob.crc32c)
    )
    return Stat(int(blob.size), md5, int(blob.generation), crc32c)


@functools.cache
def configure_epath() -> None:
    """Configures gcsfs, through which `epath.Path` reads and writes buckets.

    It retries like the functions above. Other processes write to the same folders, so listings must
    not be cached. Errors are raised, so they need not be logged, too. Folders of hierarchical
    buckets need no special treatment, which takes further permissions and requests.
    """
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from fsspec import config

    from inception_jax.storage import _gcsfs_private

    config.conf.setdefault("gcs", {}).update(
        use_listings_cache=False, requests_timeout=_ATTEMPT_SECONDS
    )
    for logger in ("gcsfs", "fsspec.prefetcher"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    _gcsfs_private.set_retry(_retry_asynchronously)


@functools.cache
def _client() -> "storage.Client":
    from google.auth import exceptions
    from google.cloud import storage

    # The library would look up each bucket in a thread of its own, for traces that nobody collects.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    try:
        # A project is only needed for creating buckets.
        return storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "unused"))
    except exceptions.DefaultCredentialsError:
        # Enough for public buckets.
        return storage.Client.create_anonymous_client()
