"""Whole files, local and in buckets, and checks of outputs."""

import pathlib
from collections.abc import Callable
from concurrent import futures

import pytest

from inception_jax.errors import UserError, WriteError
from inception_jax.storage import access, atomic, buckets, paths
from tests.gcs import Proxy, Status


@pytest.fixture(params=["local", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> paths.Path:
    """A folder, local or in a bucket."""
    if request.param == "local":
        return tmp_path
    return paths.user_path(request.getfixturevalue("bucket"), "--output")


def test_files_are_read_where_they_are(place: paths.Path) -> None:
    file = place / "a b.bin"
    assert not access.is_file(file)
    with pytest.raises(FileNotFoundError, match=r"a b\.bin"):
        access.size(file)
    with atomic.replacing(file) as temporary:
        temporary.write_bytes(b"0123456789")
    assert access.is_file(file) and access.size(file) == 10
    assert access.read_bytes(file) == access.read_bytes(file, 10) == b"0123456789"
    assert access.read_bytes(file, 4) == b"0123"
    with access.local_copy(file) as local:
        assert local.name == file.name and local.read_bytes() == b"0123456789"
    assert access.is_file(file)
    assert local == file or not local.parent.exists()


def test_whole_bucket_is_not_a_file(bucket: str) -> None:
    path = paths.user_path(bucket, "--weights")
    assert not access.is_file(path)
    with pytest.raises(FileNotFoundError, match=bucket):
        access.read_bytes(path)


def test_processes_of_equal_number_may_check_at_once(tmp_path: pathlib.Path) -> None:
    """As in containers on a shared disk, here threads."""
    with futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: access.check_output_folder(tmp_path, "output"), range(1000)))
    assert [path.name for path in tmp_path.iterdir()] == [atomic.MARKER]


def test_checks_of_outputs_change_no_file(place: paths.Path) -> None:
    file = place / "x.csv"
    with atomic.replacing(file) as temporary:
        temporary.write_bytes(b"before")
    access.check_output_file(file, "output")
    access.check_output_file(place / "new" / "x", "output")
    access.check_output_folder(place, "output")
    assert access.read_bytes(file) == b"before"
    if paths.is_local(place):
        assert {path.name for path in place.iterdir()} == {"new", "x.csv"}
        assert not list((place / "new").iterdir())
    else:
        assert list(buckets.list_files(place)) == ["x.csv"]


@pytest.mark.parametrize("check", [access.check_output_file, access.check_output_folder])
@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "credentials are missing or have expired; run gcloud auth"),
        (403, "permission denied; grant roles/storage.objectUser"),
        (404, "bucket not found; correct its name, or create it"),
    ],
)
def test_unwritable_bucket_is_named_with_its_flag(
    check: Callable[[paths.Path, str], None], status: int, remedy: str, bucket: str, gcs: Proxy
) -> None:
    gcs.inject(Status(status), operation="write")
    path = paths.user_path(f"{bucket}/a/b", "--output")
    with pytest.raises(UserError) as refused:
        check(path, "output")
    assert str(refused.value).startswith(f"--output={path}: {remedy}")


def test_flag_is_shown_with_its_own_path(bucket: str) -> None:
    path = paths.user_path(f"{bucket}/run", "--workdir")
    with (
        pytest.raises(WriteError, match=f"^--workdir={path}: {path}/run.lock: permission denied$"),
        access.naming_flag("workdir", path),
    ):
        raise buckets.BucketError(f"{path}/run.lock: permission denied")


def test_output_file_must_be_a_file(bucket: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=f"--output={bucket}: must be a file"):
        access.check_output_file(paths.user_path(bucket, "--output"), "output")
    with pytest.raises(UserError, match="is a folder; must be a file"):
        access.check_output_file(tmp_path, "output")
    for folder in (".", "/"):
        with pytest.raises(UserError, match=r"is a folder; must be a file, such as /?FILE"):
            access.check_output_file(pathlib.Path(folder), "output")


def test_missing_bucket_is_not_a_missing_file() -> None:
    with pytest.raises(buckets.BucketError, match=r"^gs://no-such-bucket/x: bucket not found"):
        access.is_file(paths.user_path("gs://no-such-bucket/x", "--weights"))
