"""Requests to buckets, with and without faults."""

import re
from collections.abc import Callable, Iterator

import pytest
from etils import epath
from google.auth import exceptions

from inception_jax.storage import buckets, paths
from tests.gcs import Action, CutRequest, CutResponse, FlipBit, Proxy, Status

CONTENTS = bytes(range(256)) * 8


@pytest.fixture
def folder(bucket: str) -> paths.Path:
    return paths.user_path(f"{bucket}/a/b", "--output")


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(buckets, "_INITIAL_BACKOFF_SECONDS", 0.01)
    yield
    buckets.set_retry_seconds(300.0)


def test_objects_are_written_read_listed_and_deleted(folder: paths.Path) -> None:
    assert buckets.list_files(folder) == {} and buckets.stat(folder / "x") is None
    first = buckets.write_bytes(folder / "x", CONTENTS)
    buckets.write_bytes(folder / "c/y", b"")
    buckets.write_bytes(folder.parent / "b2", b"not below a/b/")
    assert buckets.read_bytes(folder / "x") == CONTENTS
    assert buckets.read_bytes(folder / "x", 3, 7) == CONTENTS[3:7]
    assert {name: each.size for name, each in buckets.list_files(folder).items()} == {
        "x": len(CONTENTS),
        "c/y": 0,
    }
    found = buckets.stat(folder / "x")
    assert found is not None and found.generation == first
    buckets.delete(folder / "x")
    buckets.delete(folder / "x")
    assert list(buckets.list_files(folder)) == ["c/y"]
    with pytest.raises(FileNotFoundError, match=r"gs://.*/a/b/x"):
        buckets.read_bytes(folder / "x")


def test_range_beyond_the_end_is_empty(folder: paths.Path) -> None:
    buckets.write_bytes(folder / "x", CONTENTS)
    end = len(CONTENTS)
    assert buckets.read_bytes(folder / "x", end - 1, end + 5) == CONTENTS[-1:]
    assert buckets.read_bytes(folder / "x", end, end + 5) == b""


@pytest.mark.parametrize(
    ("cause", "retryable", "words"),
    [
        (exceptions.TransportError("Compute Engine Metadata server unavailable"), False, "answer"),
        (None, True, "answer"),
        (exceptions.TransportError("no service account", "404"), False, "credentials are missing"),
        (None, False, "credentials are missing"),
    ],
)
def test_credentials_may_fail_temporarily(
    cause: Exception | None, retryable: bool, words: str, folder: paths.Path
) -> None:
    with pytest.raises(buckets.BucketError, match=words), buckets.translate_errors(folder):
        raise exceptions.RefreshError("cannot refresh", retryable=retryable) from cause


def test_conditional_write_replaces_only_the_expected_generation(folder: paths.Path) -> None:
    first = buckets.write_bytes(folder / "x", b"1", if_generation=0)
    with pytest.raises(buckets.ChangedError):
        buckets.write_bytes(folder / "x", b"2", if_generation=0)
    second = buckets.write_bytes(folder / "x", b"3", if_generation=first)
    with pytest.raises(buckets.ChangedError):
        buckets.write_bytes(folder / "x", b"4", if_generation=first)
    assert buckets.read_bytes(folder / "x") == b"3" and second != first


@pytest.mark.parametrize(
    "fault",
    [Status(429), Status(503), Status(500), Status(408), CutResponse(), CutResponse(9)],
    ids=str,
)
def test_temporary_failures_are_repeated(fault: Action, folder: paths.Path, gcs: Proxy) -> None:
    buckets.write_bytes(folder / "x", CONTENTS)
    requests: dict[str, Callable[[], object]] = {
        "read": lambda: buckets.read_bytes(folder / "x"),
        "list": lambda: buckets.list_files(folder),
        "stat": lambda: buckets.stat(folder / "x"),
        "write": lambda: buckets.write_bytes(folder / "y", CONTENTS),
    }
    for operation, request in requests.items():
        expected = request()
        rule = gcs.inject(fault, operation=operation, times=2)
        result = request()
        assert rule.applied == 2, operation
        assert operation == "write" or result == expected
    assert buckets.read_bytes(folder / "y") == CONTENTS


def test_upload_that_is_cut_is_repeated(folder: paths.Path, gcs: Proxy) -> None:
    rule = gcs.inject(CutRequest(after=100), operation="write", times=2)
    buckets.write_bytes(folder / "x", CONTENTS)
    assert rule.applied == 2 and buckets.read_bytes(folder / "x") == CONTENTS


def test_corrupt_download_is_repeated(folder: paths.Path, gcs: Proxy) -> None:
    buckets.write_bytes(folder / "x", CONTENTS)
    rule = gcs.inject(FlipBit(at=1000), operation="read", times=2)
    assert buckets.read_bytes(folder / "x") == CONTENTS and rule.applied == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Status(503),
            r"Google Cloud Storage did not answer within 0.3 s \(config.bucket.retry_s.*503",
        ),
        (Status(401), "credentials are missing or have expired; run gcloud auth"),
        (Status(403), "permission denied; grant roles/storage.objectUser"),
        (Status(404), "bucket not found; correct its name"),
    ],
    ids=str,
)
def test_persistent_failures_have_one_message(
    fault: Action, message: str, folder: paths.Path, gcs: Proxy
) -> None:
    buckets.set_retry_seconds(0.3)
    gcs.inject(fault)
    for request in (
        lambda: buckets.read_bytes(folder / "x"),
        lambda: buckets.list_files(folder),
        lambda: buckets.write_bytes(folder / "x", b""),
    ):
        with pytest.raises(buckets.BucketError, match=f"^{folder.parent}.*: {message}") as failed:
            request()
        assert "\n" not in str(failed.value)


def test_each_outage_is_logged_once(
    folder: paths.Path, gcs: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_last_failure", float("-inf"))
    monkeypatch.setattr(buckets, "_log", None)
    lines: list[str] = []
    buckets.log_outages(lines.append)
    buckets.write_bytes(folder / "x", CONTENTS)
    assert lines == []
    gcs.inject(Status(503), times=3)
    buckets.read_bytes(folder / "x")
    gcs.inject(Status(429), times=3)
    buckets.list_files(folder)
    end = r"; retrying for up to 300 s \(config\.bucket\.retry_seconds\)"
    assert len(lines) == 1 and re.fullmatch(
        f"{folder}/x: ServiceUnavailable: 503 .*{end}", lines[0]
    )
    # The next ones.
    monkeypatch.setattr(buckets, "_OUTAGE_SECONDS", 0.0)
    rule = gcs.inject(Status(503), times=1)
    with buckets.time_limit(5):
        buckets.read_bytes(folder / "x")
    assert rule.applied == 1 and len(lines) == 1
    buckets.configure_epath()
    gcs.inject(Status(503), times=1)
    assert epath.Path(str(folder / "x")).read_bytes() == CONTENTS
    assert len(lines) == 2 and re.fullmatch(f"Google Cloud Storage: HttpError: .*{end}", lines[1])


def test_missing_bucket_is_not_a_missing_object() -> None:
    path = paths.user_path("gs://no-such-bucket/x", "--weights")
    with pytest.raises(buckets.BucketError, match=r"^gs://no-such-bucket/x: bucket not found"):
        buckets.read_bytes(path)
