"""Data sets and sources in a bucket, with a folder of copies for each host."""

import functools
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from inception_jax.config import Data
from inception_jax.datasets.dataset import Dataset, class_ids, prepare
from inception_jax.errors import DataError, UserError
from inception_jax.storage import buckets, paths, transfers
from tests import archives
from tests.gcs import Call, Delay, FlipBit, Proxy, Rule, Status

ROOT = pathlib.Path(__file__).parents[2]
CACHE = "data/inception_jax/digits-1.0.0-8px"
RECORDS = "data/digits/1.0.0"


def quiet(line: str) -> None:
    pass


def digits(bucket: str, host: pathlib.Path, **settings: Any) -> Data:
    return Data(
        name="digits", image_size=8, directory=f"{bucket}/data", cache=str(host), **settings
    )


def remote(path: str) -> Any:
    return paths.user_path(path, "")


def pixels(dataset: Dataset) -> np.ndarray:
    return np.concatenate([split.read(np.arange(len(split))) for split in dataset.splits.values()])


@functools.cache
def plain(folder: pathlib.Path) -> np.ndarray:
    """The images of the data set prepared locally."""
    return pixels(prepare(Data(name="digits", image_size=8, directory=str(folder)), log=quiet))


@pytest.fixture
def expected(data_directory: pathlib.Path) -> np.ndarray:
    return plain(data_directory)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "CHUNK_BYTES", 16 << 10)


@pytest.fixture
def stored(bucket: str, gcs: Proxy, tmp_path: pathlib.Path, data_directory: pathlib.Path) -> str:
    """A bucket that contains the digits in data/, uploaded by a host 'first'."""
    shutil.copytree(
        data_directory, tmp_path / "first/prepared" / bucket.removeprefix("gs://") / "data"
    )
    prepare(digits(bucket, tmp_path / "first"), log=quiet)
    gcs.clear()
    return bucket


@pytest.fixture(autouse=True)
def few_retries() -> Iterator[None]:
    buckets.set_retry_seconds(5)
    yield
    buckets.set_retry_seconds(300)


@pytest.fixture(autouse=True)
def prepared_locally(data_directory: pathlib.Path) -> None:
    plain(data_directory)


START = """
import sys
from inception_jax import config
from inception_jax.datasets.dataset import prepare
from inception_jax.storage import transfers

transfers.CHUNK_BYTES = 16 << 10
settings = config.Data(name="digits", image_size=8, directory=sys.argv[1], cache=sys.argv[2])
print(len(prepare(settings, log=lambda line: print(line, flush=True)).train), flush=True)
"""


def start(bucket: str, host: pathlib.Path) -> subprocess.Popen[str]:
    """Starts a process that prepares the digits in a bucket."""
    command = [sys.executable, "-c", START, f"{bucket}/data", str(host)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


# Downloads.


@pytest.mark.parametrize("storage", ["decoded", "records"])
def test_prepared_data_are_downloaded_by_another_host(
    stored: str, gcs: Proxy, tmp_path: pathlib.Path, expected: np.ndarray, storage: str
) -> None:
    prepare(digits(stored, tmp_path / "first", storage=storage), log=quiet)
    gcs.clear()
    lines: list[str] = []
    dataset = prepare(digits(stored, tmp_path / "second", storage=storage), log=lines.append)
    np.testing.assert_array_equal(pixels(dataset), expected)
    assert all(line.startswith(f"downloading {stored}/") for line in lines), lines
    has_records = bool(gcs.find("read", f"{RECORDS}/*.array_record*"))
    assert has_records == (storage == "records")
    assert not gcs.find("write")


def test_unchanged_copy_costs_one_request(stored: str, gcs: Proxy, tmp_path: pathlib.Path) -> None:
    for host in ("first", "second", "second"):
        gcs.clear()
        prepare(digits(stored, tmp_path / host), log=quiet)
        if host == "first":
            assert len(gcs.requests) == 1
    assert [request.operation for request in gcs.requests] == ["stat"]


def test_class_ids_need_no_images(bucket: str, gcs: Proxy, tmp_path: pathlib.Path) -> None:
    archive = archives.write_tiny_imagenet(tmp_path / "tiny.zip", 2, 4, 2, 2, 8)
    settings = Data(
        name="tiny_imagenet_subset",
        image_size=8,
        source=str(archive),
        directory=f"{bucket}/data",
        cache=str(tmp_path / "first"),
    )
    prepare(settings, log=quiet)
    gcs.clear()
    settings.source, settings.cache = "", str(tmp_path / "second")
    assert class_ids(settings) == (archives.wnid(0), archives.wnid(1))
    assert gcs.find("read", "*.json") and not gcs.find("read", "*.array_record*")
    # The records are added to the files that are there.
    settings.storage = "records"
    assert len(prepare(settings, log=quiet).train) == 8


@pytest.mark.usefixtures("small_chunks")
def test_killed_download_is_resumed(
    stored: str, gcs: Proxy, tmp_path: pathlib.Path, expected: np.ndarray
) -> None:
    prepare(digits(stored, tmp_path / "whole"), log=quiet)
    whole = sum(request.sent for request in gcs.find("read"))
    gcs.clear()
    host = tmp_path / "second"
    processes: list[subprocess.Popen[str]] = []
    ready = threading.Event()

    def kill() -> None:
        ready.wait()
        processes[0].kill()

    gcs.inject(Call(kill), operation="read", name="*train_images.npy", skip=12, times=1)
    with start(stored, host) as process:
        processes.append(process)
        ready.set()
        assert process.wait(100) < 0
    gcs.clear()
    assert not list(host.rglob(f"{CACHE}/info.json"))
    dataset = prepare(digits(stored, host), log=quiet)
    np.testing.assert_array_equal(pixels(dataset), expected)
    rest = sum(request.sent for request in gcs.find("read"))
    assert rest <= whole - 4 * transfers.CHUNK_BYTES
    assert not list(host.rglob("*.download"))


@pytest.mark.usefixtures("small_chunks")
def test_chunk_that_arrives_damaged_is_requested_again(
    stored: str, gcs: Proxy, tmp_path: pathlib.Path, expected: np.ndarray
) -> None:
    damage = flip(gcs, "*train_images.npy", times=2)
    dataset = prepare(digits(stored, tmp_path / "second"), log=quiet)
    np.testing.assert_array_equal(pixels(dataset), expected)
    assert damage.applied == 2


def flip(proxy: Proxy, name: str, times: float = float("inf")) -> Rule:
    return proxy.inject(FlipBit(100), operation="read", name=name, times=times)


def test_damaged_object_is_an_error(
    stored: str, gcs: Proxy, tmp_path: pathlib.Path, expected: np.ndarray
) -> None:
    name = f"{stored}/{CACHE}/train_labels.npy"
    data = buckets.read_bytes(remote(name))
    buckets.write_bytes(remote(name), data[:-1] + b"\x07")
    with pytest.raises(buckets.BucketError, match=rf"^{name}: .*checksum.*Restore {stored}/"):
        prepare(digits(stored, tmp_path / "second"), log=quiet)
    buckets.delete(remote(name))
    with pytest.raises(buckets.BucketError, match=rf"^{name}: is missing. Restore"):
        prepare(digits(stored, tmp_path / "second"), log=quiet)
    # Removed as the message says, and prepared again.
    for object in buckets.list_files(remote(f"{stored}/data")):
        buckets.delete(remote(f"{stored}/data/{object}"))
    lines: list[str] = []
    dataset = prepare(digits(stored, tmp_path / "second"), log=lines.append)
    assert any("decoding" in line for line in lines)
    np.testing.assert_array_equal(pixels(dataset), expected)


@pytest.mark.usefixtures("small_chunks")
def test_damaged_copy_is_repaired(
    stored: str, gcs: Proxy, tmp_path: pathlib.Path, expected: np.ndarray
) -> None:
    host = tmp_path / "second"
    prepare(digits(stored, host), log=quiet)
    file = next(host.rglob("train_labels.npy"))
    status = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    # Sizes and times do not show the damage; the checksum that the cache keeps does.
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    gcs.clear()
    np.testing.assert_array_equal(pixels(prepare(digits(stored, host), log=quiet)), expected)
    read = [request.names[0] for request in gcs.find("read")]
    assert read == [f"{CACHE}.manifest.json", f"{CACHE}/train_labels.npy"]
    next(host.rglob("test_names.txt")).unlink()
    gcs.clear()
    prepare(digits(stored, host), log=quiet)
    read = [request.names[0] for request in gcs.find("read")]
    assert read == [f"{CACHE}.manifest.json", f"{CACHE}/test_names.txt"]


def test_copies_need_free_disk_space(
    stored: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=rf"copy of {stored}.*config\.data\.cache.*Free disk"):
        prepare(digits(stored, tmp_path / "second"), log=quiet)


# Several processes.


def test_processes_of_a_host_share_a_copy(stored: str, gcs: Proxy, tmp_path: pathlib.Path) -> None:
    gcs.inject(Delay(2), operation="read", name="*_images.npy")
    processes = [start(stored, tmp_path / "second") for _ in range(2)]
    for process in processes:
        assert process.communicate(timeout=100)[0].splitlines()[-1] == "1437"
    assert len(gcs.find("read", "*/info.json")) == 1


def test_hosts_that_start_at_once_prepare_once(
    bucket: str, gcs: Proxy, tmp_path: pathlib.Path
) -> None:
    processes = [start(bucket, tmp_path / host) for host in ("first", "second")]
    lines = [process.communicate(timeout=200)[0].splitlines() for process in processes]
    assert [each[-1] for each in lines] == ["1437", "1437"]
    assert sum("digits: decoding train: 1,437 images" in each for each in lines) == 1
    assert len(gcs.find("write", f"{CACHE}.manifest.json")) == 1


# Preparing and uploading.


def test_interrupted_upload_is_resumed(
    stored: str, gcs: Proxy, tmp_path: pathlib.Path, expected: np.ndarray
) -> None:
    settings = digits(stored, tmp_path / "first", bit_depth=16)
    gcs.inject(Status(403), operation="write", name="*16bit/train_names.txt")
    with pytest.raises(buckets.BucketError, match=r"train_names\.txt: permission denied"):
        prepare(settings, log=quiet)
    # Other hosts see an unfinished folder as none.
    assert not buckets.stat(remote(f"{stored}/{CACHE}-16bit.manifest.json"))
    gcs.clear()
    lines: list[str] = []
    prepare(settings, log=lines.append)
    assert all(line.startswith("uploading") for line in lines), lines
    assert not gcs.find("write", "*16bit/train_images.npy")
    assert gcs.find("write", "*16bit/train_names.txt")


def test_emptied_bucket_is_prepared_again(
    stored: str, tmp_path: pathlib.Path, expected: np.ndarray
) -> None:
    for object in buckets.list_files(remote(f"{stored}/data")):
        buckets.delete(remote(f"{stored}/data/{object}"))
    lines: list[str] = []
    dataset = prepare(digits(stored, tmp_path / "first"), log=lines.append)
    np.testing.assert_array_equal(pixels(dataset), expected)
    assert any("no longer exists; removing its copy" in line for line in lines)
    assert any("writing train records" in line for line in lines)


def test_read_only_bucket_with_data_is_enough(
    stored: str, gcs: Proxy, tmp_path: pathlib.Path, expected: np.ndarray
) -> None:
    gcs.make_read_only()
    dataset = prepare(digits(stored, tmp_path / "second"), log=quiet)
    np.testing.assert_array_equal(pixels(dataset), expected)
    assert not gcs.find("write|delete")


def test_read_only_bucket_without_data_is_an_error_before_preparing(
    bucket: str, gcs: Proxy, tmp_path: pathlib.Path
) -> None:
    gcs.make_read_only()
    lines: list[str] = []
    with pytest.raises(buckets.BucketError, match=r"^gs://.*: permission denied; grant"):
        prepare(digits(bucket, tmp_path), log=lines.append)
    assert not lines


def test_missing_bucket_is_an_error(gcs: Proxy, tmp_path: pathlib.Path) -> None:
    with pytest.raises(buckets.BucketError, match=r"^gs://none-such/.*: bucket not found"):
        prepare(digits("gs://none-such", tmp_path), log=quiet)


def test_network_error_is_one_message(stored: str, gcs: Proxy, tmp_path: pathlib.Path) -> None:
    buckets.set_retry_seconds(0.5)
    gcs.inject(Status(503), operation="read", name="*_labels.npy")
    with pytest.raises(buckets.BucketError, match=r"did not answer within 0\.5 s"):
        prepare(digits(stored, tmp_path / "second"), log=quiet)


def test_folder_of_copies_must_be_local(bucket: str) -> None:
    settings = Data(name="digits", directory=f"{bucket}/data", cache=f"{bucket}/copies")
    with pytest.raises(UserError, match=r"^config\.data\.cache = 'gs://.*must be a local path"):
        prepare(settings, log=quiet)


def test_default_folder_of_copies_is_in_the_users_cache(
    stored: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", f"{stored}/data")
    for folder, name, value in (
        (tmp_path / "home/.cache", "HOME", tmp_path / "home"),
        (tmp_path / "xdg", "XDG_CACHE_HOME", tmp_path / "xdg"),
    ):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv(name, str(value))
        prepare(Data(name="digits", image_size=8), log=quiet)
        below = stored.removeprefix("gs://")
        assert (folder / "inception_jax/data/prepared" / below / CACHE / "info.json").exists()


# Sources.


def put(folder: pathlib.Path, target: str) -> None:
    for path in filter(pathlib.Path.is_file, folder.rglob("*")):
        buckets.write_bytes(
            remote(f"{target}/{path.relative_to(folder).as_posix()}"), path.read_bytes()
        )


def images(bucket: str, host: pathlib.Path, source: str, **settings: Any) -> Data:
    settings = {"image_size": 8, "val_fraction": 0.5} | settings
    return Data(
        name="image_folder",
        source=source,
        directory=f"{bucket}/data",
        cache=str(host),
        **settings,
    )


@pytest.mark.parametrize("form", ["archive", "folder", "inside"])
@pytest.mark.usefixtures("small_chunks")
def test_source_may_be_in_a_bucket(
    bucket: str, gcs: Proxy, tmp_path: pathlib.Path, form: str
) -> None:
    files = archives.class_folders({"cat": 4, "dog": 4}, size=64)
    if form == "folder":
        source = f"{bucket}/images"
        put(archives.write_files(tmp_path / "images", files, ""), source)
    else:
        root = "sub" if form == "inside" else ""
        archive = archives.write_files(tmp_path / "images.zip", files, root)
        source = f"{bucket}/images.zip{'/sub' if form == 'inside' else ''}"
        buckets.write_bytes(remote(f"{bucket}/images.zip"), archive.read_bytes())
    local = archives.write_files(tmp_path / "local", files, "")
    alone = Data(
        name="image_folder",
        source=str(local),
        directory=str(tmp_path / "alone"),
        image_size=8,
        val_fraction=0.5,
    )
    lines: list[str] = []
    first = prepare(images(bucket, tmp_path / "first", source), log=lines.append)
    np.testing.assert_array_equal(pixels(first), pixels(prepare(alone, log=quiet)))
    assert any(line.startswith(f"{source}: using the copy {tmp_path}") for line in lines)
    # Other hosts compare the source, and do not download it.
    gcs.clear()
    prepare(images(bucket, tmp_path / "second", source), log=quiet)
    assert not gcs.find("read", "images*")
    # It is not needed any more.
    for name in buckets.list_files(remote(bucket)):
        if name.startswith("images"):
            buckets.delete(remote(f"{bucket}/{name}"))
    for host in ("second", "third"):
        assert len(prepare(images(bucket, tmp_path / host, source), log=quiet).train) == 4


def test_changed_source_in_a_bucket_is_noticed(
    bucket: str, gcs: Proxy, tmp_path: pathlib.Path
) -> None:
    source = f"{bucket}/images"
    files = archives.class_folders({"cat": 4, "dog": 4})
    put(archives.write_files(tmp_path / "one", files), source)
    prepare(images(bucket, tmp_path / "first", source), log=quiet)
    # A second cache of the same records.
    prepare(images(bucket, tmp_path / "first", source, image_size=16), log=quiet)
    put(archives.write_files(tmp_path / "two", archives.class_folders({"cow": 6})), source)
    with pytest.raises(DataError, match=rf"'{source}': {bucket}/data/.* from other content"):
        prepare(images(bucket, tmp_path / "second", source), log=quiet)
    again = images(bucket, tmp_path / "second", source, on_change="prepare")
    assert prepare(again, log=quiet).class_names == ("cat", "cow", "dog")
    # The host with the earlier copy gets the new data, also of the other size.
    for size in (8, 16):
        dataset = prepare(images(bucket, tmp_path / "first", "", image_size=size), log=quiet)
        assert dataset.class_names == ("cat", "cow", "dog") and dataset.image_size == size


def test_data_prepared_from_another_place_are_not_compared(
    bucket: str, tmp_path: pathlib.Path
) -> None:
    local = archives.write_files(tmp_path / "local", archives.class_folders({"cat": 4, "dog": 4}))
    prepare(images(bucket, tmp_path / "first", str(local)), log=quiet)
    put(local, f"{bucket}/images")
    with pytest.raises(DataError, match=r"which may have other content\. Leave config"):
        prepare(images(bucket, tmp_path / "second", f"{bucket}/images"), log=quiet)


def test_errors_about_a_source_show_where_it_is(bucket: str, tmp_path: pathlib.Path) -> None:
    source = f"{bucket}/images.zip"
    with pytest.raises(DataError, match=f"'{source}': no such file or folder in the bucket"):
        prepare(images(bucket, tmp_path, source), log=quiet)
    buckets.write_bytes(remote(source), b"PK\3\4" + bytes(100))
    with pytest.raises(DataError, match=f"^{source}: "):
        prepare(images(bucket, tmp_path, source), log=quiet)


def test_damaged_image_of_a_source_in_a_bucket_is_named(
    bucket: str, tmp_path: pathlib.Path
) -> None:
    files = archives.tiny_imagenet_files(2, 4, 2, 2, 16)
    damaged = next(file for file in files if file.endswith("_0.JPEG"))
    archive = archives.write_files(tmp_path / "x.zip", files | {damaged: files[damaged][:200]})
    source = f"{bucket}/tiny.zip"
    buckets.write_bytes(remote(source), archive.read_bytes())
    settings = images(bucket, tmp_path / "host", source)
    settings.name = "tiny_imagenet_subset"
    with pytest.raises(DataError, match=rf"^{source}: .*{damaged}: not a readable image"):
        prepare(settings, log=quiet)


@pytest.mark.usefixtures("small_chunks")
def test_interrupted_download_of_a_source_is_resumed(
    bucket: str, gcs: Proxy, tmp_path: pathlib.Path
) -> None:
    files = archives.class_folders({"cat": 40, "dog": 40}, size=64)
    archive = archives.write_files(tmp_path / "images.zip", files)
    source, size = f"{bucket}/images.zip", archive.stat().st_size
    buckets.write_bytes(remote(source), archive.read_bytes())
    gcs.clear()
    gcs.inject(Status(403), operation="read", name="images.zip", skip=6)
    with pytest.raises(buckets.BucketError, match="permission denied"):
        prepare(images(bucket, tmp_path / "first", source), log=quiet)
    gcs.clear()
    flip(gcs, "images.zip", times=1)
    assert len(prepare(images(bucket, tmp_path / "first", source), log=quiet).train) == 40
    # The byte that changed was found by the checksum of the whole file, which was repeated.
    sent = sum(request.sent for request in gcs.find("read", "images.zip"))
    assert sent == size + (size - 6 * transfers.CHUNK_BYTES)


# Data sets that other programs put into the bucket.


def test_data_copied_to_a_bucket_are_used(
    bucket: str, gcs: Proxy, tmp_path: pathlib.Path, data_directory: pathlib.Path
) -> None:
    put(data_directory, f"{bucket}/data")
    gcs.make_read_only()
    lines: list[str] = []
    prepare(digits(bucket, tmp_path), log=lines.append)
    assert all(line.startswith("downloading") for line in lines), lines
    gcs.clear()
    prepare(digits(bucket, tmp_path), log=quiet)
    assert {request.operation for request in gcs.requests} == {"stat", "list"}


@pytest.mark.parametrize("storage", ["decoded", "records"])
def test_data_prepared_by_tfds_may_be_in_a_bucket(
    bucket: str, gcs: Proxy, tmp_path: pathlib.Path, data_directory: pathlib.Path, storage: str
) -> None:
    # As if TFDS's own commands had written two versions.
    put(data_directory / "digits/1.0.0", f"{bucket}/data/digits/1.0.0")
    put(data_directory / "digits/1.0.0", f"{bucket}/data/digits/0.9.0")
    settings = Data(
        name="tfds",
        tfds="digits",
        eval_split="test",
        image_size=8,
        storage=storage,
        directory=f"{bucket}/data",
        cache=str(tmp_path / "first"),
    )
    gcs.clear()
    assert len(prepare(settings, log=quiet).train) == 1437
    assert not gcs.find("read", "*0.9.0/*array_record*")
    assert not gcs.find("write", "data/digits/*")
    settings.cache = str(tmp_path / "second")
    gcs.clear()
    assert len(prepare(settings, log=quiet).train) == 1437
    assert bool(gcs.find("read", "*array_record*")) == (storage == "records")
    settings.tfds = "digit"
    with pytest.raises(DataError, match=rf"{bucket}/data/digit\..*--data_dir={bucket}/data"):
        prepare(settings, log=quiet)
