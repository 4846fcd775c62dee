"""Copies of files between a local folder and a bucket."""

import pathlib

import pytest

from inception_jax.storage import buckets, paths, transfers
from tests.gcs import Proxy, Status

CHUNK = 1000


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "CHUNK_BYTES", CHUNK)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Files of 0, 1, 33 and 34.5 chunks; more than 32 parts are joined in two steps."""
    for name, size in {"empty": 0, "one": CHUNK, "sub/exact": 33 * CHUNK, "large": 34500}.items():
        path = tmp_path / "from" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(n * n // 255 % 256 for n in range(size)))
    return tmp_path / "from"


def names(folder: pathlib.Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in files]


def test_files_are_equal_after_upload_and_download(
    bucket: str, gcs: Proxy, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    remote = paths.user_path(f"{bucket}/x", "")
    assert not paths.is_local(remote)
    counts: list[int] = []
    facts = transfers.upload(folder, remote, names(folder), on_bytes=counts.append)
    # No parts are left behind.
    assert sorted(buckets.list_files(remote)) == names(folder)
    assert sum(counts) == sum(each.size for each in facts.values()) == 68500
    counts.clear()
    transfers.download(remote, tmp_path / "to", facts, on_bytes=counts.append)
    assert sum(counts) == 68500
    assert names(tmp_path / "to") == names(folder)
    for name in names(folder):
        assert (tmp_path / "to" / name).read_bytes() == (folder / name).read_bytes(), name
        assert transfers.is_copy(tmp_path / "to" / name, facts[name])
    # Equal objects and chunks are not copied again.
    gcs.clear()
    transfers.upload(folder, remote, names(folder))
    transfers.download(remote, tmp_path / "to", facts)
    assert [request.operation for request in gcs.requests] == ["list"]


def test_interrupted_upload_keeps_the_parts_that_arrived(
    bucket: str, gcs: Proxy, folder: pathlib.Path
) -> None:
    remote = paths.user_path(f"{bucket}/x", "")
    assert not paths.is_local(remote)
    gcs.inject(Status(403), operation="write", skip=20)
    with pytest.raises(buckets.BucketError):
        transfers.upload(folder, remote, ["large"])
    assert "large" not in buckets.list_files(remote)
    gcs.clear()
    transfers.upload(folder, remote, ["large"])
    written = [r for r in gcs.find("write") if not r.target.endswith("compose")]
    # Each upload is one request; joining takes three.
    assert len(written) <= 35 - 20 + 3
    assert buckets.read_bytes(remote / "large") == (folder / "large").read_bytes()


def test_other_objects_are_deleted(bucket: str, folder: pathlib.Path) -> None:
    remote = paths.user_path(f"{bucket}/x", "")
    assert not paths.is_local(remote)
    buckets.write_bytes(remote / "old", b"old")
    transfers.upload(folder, remote, ["one"])
    assert list(buckets.list_files(remote)) == ["one"]


def test_file_of_the_same_size_is_not_taken_for_a_copy(folder: pathlib.Path) -> None:
    facts = transfers.describe(folder / "large")
    whole = facts._replace(chunks=(), chunk_bytes=0)
    data = bytearray((folder / "large").read_bytes())
    data[34_000] ^= 1
    (folder / "large").write_bytes(data)
    assert not transfers.is_copy(folder / "large", facts)
    assert not transfers.is_copy(folder / "large", whole)
