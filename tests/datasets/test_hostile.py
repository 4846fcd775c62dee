"""Malicious sources: archives that escape or explode, and files that are not images."""

import io
import os
import pathlib
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inception_jax import config
from inception_jax.datasets import decode
from inception_jax.datasets.builders import cifar10_files, folders, imagenet, tiny_imagenet_layout
from inception_jax.datasets.dataset import prepare
from inception_jax.datasets.sources import files as limits
from inception_jax.datasets.sources.files import FolderSource
from inception_jax.datasets.sources.zip_source import ZipSource
from inception_jax.errors import DataError
from inception_jax.inference import image_files
from inception_jax.registry import DATASETS
from tests import archives

SIZE = 16


def quiet(line: str) -> None:
    pass


def below(folder: pathlib.Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


# Archives.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Hidden, like all names that begin with a dot.
        ("../../evil/0.jpg", {"a", "b"}),
        ("a/../../evil.jpg", {"a", "b"}),
        # A class of this name: nothing is unpacked.
        ("C:\\evil/0.jpg", {"a", "b", "C:\\evil"}),
    ],
)
def test_paths_in_archive_cannot_escape(
    tmp_path: pathlib.Path, name: str, expected: set[str]
) -> None:
    image = archives.jpeg(np.zeros((SIZE, SIZE, 3), np.uint8))
    folder = tmp_path / "deep" / "down"
    folder.mkdir(parents=True)
    files = archives.class_folders({"a": 3, "b": 3}, SIZE) | {name: image}
    path = archives.write_files(folder / "x.zip", files, "")
    before = below(tmp_path)
    data = config.Data(
        name="image_folder",
        source=str(path),
        directory=str(folder / "data"),
        image_size=SIZE,
        on_unreadable="skip",
    )
    dataset = prepare(data, log=quiet)
    assert {dataset.class_names[k] for k in dataset.train.labels} == expected
    assert below(tmp_path) - below(folder / "data") - before == {str(folder / "data")}


def test_an_absolute_path_in_an_archive_is_refused(tmp_path: pathlib.Path) -> None:
    files = archives.class_folders({"a": 2, "b": 2}, SIZE)
    path = archives.write_files(tmp_path / "x.zip", files | {"/etc/0.jpg": b""}, "")
    with pytest.raises(DataError, match=r"1 images are not in a class folder, such as /etc/0\.jpg"):
        folders.layout(folders.open_source(path))


def test_link_in_archive_is_not_an_image(tmp_path: pathlib.Path) -> None:
    path = archives.write_files(tmp_path / "x.zip", archives.class_folders({"a": 2}, SIZE), "")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(link("a/passwd.jpg"), "/etc/passwd")
    refused = pytest.raises(DataError, match="a link, which is not followed")
    with folders.open_source(path) as source, refused:
        source.read("a/passwd.jpg")


def bomb(path: pathlib.Path, name: str, size: int) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open(name, "w") as member:
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))
    return path


def test_member_that_unpacks_to_too_much_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limits.MAX_BYTES == 256 * 2**20
    monkeypatch.setattr(limits, "MAX_BYTES", 4 << 20)
    path = bomb(tmp_path / "x.zip", "a/0.jpg", 8 << 20)
    assert path.stat().st_size < 20_000
    with ZipSource(path) as source:
        tracemalloc.start()
        with pytest.raises(
            DataError, match=r"a/0\.jpg has 8,388,608 bytes; a file can have at most 4,194,304"
        ):
            source.read("a/0.jpg")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_member_larger_than_declared_is_not_unpacked(tmp_path: pathlib.Path) -> None:
    path = bomb(tmp_path / "x.zip", "a/0.jpg", 64 << 20)
    content = bytearray(path.read_bytes())
    # Offset of the member's size in the central directory.
    place = content.rindex(b"PK\x01\x02") + 24
    assert struct.unpack_from("<I", content, place) == (64 << 20,)
    struct.pack_into("<I", content, place, 1000)
    path.write_bytes(content)
    with ZipSource(path) as source:
        assert source.sizes == {"a/0.jpg": 1000}
        tracemalloc.start()
        with pytest.raises(DataError, match=r"a/0\.jpg is damaged \(Bad CRC-32"):
            source.read("a/0.jpg")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_archive_larger_than_the_disk_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ten members that are small enough individually, but not together.
    files = archives.tiny_imagenet_files(2, 2, 1, 0, SIZE)
    wnid = archives.wnid(0)
    names = [f"{wnid}_{number}.JPEG" for number in range(10)]
    files |= {f"train/{wnid}/images/{name}": b"" for name in names}
    files[f"train/{wnid}/{wnid}_boxes.txt"] = "".join(
        f"{name}\t0\t0\t1\t1\n" for name in names
    ).encode()
    path = archives.write_files(tmp_path / "x.zip", files)
    complete = ZipSource.__init__

    def claim(self: ZipSource, *args: Any, **kwargs: Any) -> None:
        complete(self, *args, **kwargs)
        root = f"tiny-imagenet-200/train/{wnid}/images"
        self.sizes |= {f"{root}/{name}": 10**13 for name in names}

    monkeypatch.setattr(ZipSource, "__init__", claim)
    data = config.Data(
        name="tiny_imagenet_subset", source=str(path), directory=str(tmp_path / "data")
    )
    with pytest.raises(DataError, match=r"needs up to 1\d\d,\d{3}\.\d\d GB, but"):
        prepare(data, log=quiet)


def test_cifar_archive_is_read_without_unpacking(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name in ("../../batches.meta", "/tmp/data_batch_1"):
            member = tarfile.TarInfo(name)
            member.size = 1
            file.addfile(member, io.BytesIO(b"x"))
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE), 2):
            member = tarfile.TarInfo(f"data_batch_{number}")
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
    before = below(tmp_path.parent)
    builder = DATASETS.get("cifar10").build(config.Data())(
        source=str(path), data_dir=tmp_path / "data"
    )
    with pytest.raises(
        DataError, match=r"missing batches\.meta, data_batch_1, data_batch_5, test_batch"
    ):
        builder.open()
    assert below(tmp_path.parent) - below(tmp_path / "data") - {str(tmp_path / "data")} == before


def test_oversized_member_of_cifar_archive_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.tar.gz"
    size = cifar10_files._MAX_BYTES + 1
    with tarfile.open(path, "w:gz", compresslevel=1) as file:
        member = tarfile.TarInfo("data_batch_1")
        member.size = size
        file.addfile(member, io.BytesIO(bytes(size)))
    builder = DATASETS.get("cifar10").build(config.Data())(
        source=str(path), data_dir=tmp_path / "data"
    )
    with pytest.raises(DataError, match=r"data_batch_1 has [\d,]+ bytes; CIFAR-10's has 31 MB"):
        builder.open()


def test_oversized_image_in_imagenet_archive_is_refused(
    tmp_path: pathlib.Path,
) -> None:
    builder = DATASETS.get("imagenet2012").build(config.Data())(data_dir=tmp_path)
    builder._paths = [tmp_path / "train.tar"]
    entry = imagenet.ArchivedImage("n1_1.JPEG", "n1", 0, 0, 1 << 40)
    with pytest.raises(DataError, match=r"train\.tar: n1_1\.JPEG has 1,099,511,627,776 bytes"):
        builder._read(entry)


def test_pipe_or_device_among_images_is_not_read(tmp_path: pathlib.Path) -> None:
    path = archives.write_files(tmp_path / "x", archives.class_folders({"a": 2}, SIZE), "")
    # Reading it would block or never end.
    os.mkfifo(path / "a" / "pipe.jpg")
    os.symlink("/dev/zero", path / "a" / "zero.jpg")
    with folders.open_source(path) as source:
        for name in ("a/pipe.jpg", "a/zero.jpg"):
            with pytest.raises(DataError, match="is a device or a pipe, not a file"):
                source.read(name)
    listing = image_files.find([str(path)])
    assert [os.path.basename(file) for file in listing.files] == ["0.jpg", "1.jpg"]
    assert [os.path.basename(file) for file in listing.skipped] == ["pipe.jpg", "zero.jpg"]


def test_oversized_file_is_not_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "large.jpg").open("wb") as file:
        file.truncate(1 << 40)  # A sparse file without content.
    with (
        FolderSource(tmp_path) as source,
        pytest.raises(DataError, match=r"a/large\.jpg has 1,099,511,627,776 bytes; a file can"),
    ):
        source.read("a/large.jpg")
    monkeypatch.setattr(image_files, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match=r"large\.jpg: must not be larger than 1,000 bytes"):
        image_files.read(str(tmp_path / "a" / "large.jpg"))


# Images.


def chunk(kind: bytes, content: bytes) -> bytes:
    length, check = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
    return length + kind + content + check


def enormous_png(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def enormous_jpeg(side: int) -> bytes:
    complete = bytearray(archives.jpeg(np.zeros((8, 8, 3), np.uint8)))
    # After the marker: its length, the precision, height and width.
    struct.pack_into(">HH", complete, complete.index(b"\xff\xc0") + 5, side, side)
    return bytes(complete)


@pytest.mark.parametrize("make", [enormous_png, enormous_jpeg])
def test_image_of_50_000_by_50_000_pixels_is_refused_by_header(
    make: Callable[[int], bytes],
) -> None:
    data = make(50_000)
    with Image.open(io.BytesIO(make(9_000))) as image:
        assert image.size == (9_000, 9_000), "what is changed is the size"
    assert "2500000000 pixels" in str(decode.inspect(data).problem)
    tracemalloc.start()
    for read in (
        lambda: decode.decode(data, SIZE, "x.jpg"),
        lambda: decode.decode_crop(data, SIZE, "x.jpg", lambda height, width: (0, 0, 9, 9)),
        lambda: decode.verify(data, "x.jpg"),
    ):
        with pytest.raises(DataError, match=r"x\.jpg: not a readable image .*2500000000 pixels"):
            read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20


def test_postscript_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(buffer, format="EPS")
    data = buffer.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "EPS", "PIL would take it"
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)
    assert "EPS is a program" in str(decode.inspect(data).problem)
    with pytest.raises(DataError, match="EPS is a program"):
        decode.decode(data, SIZE, "x.jpg")


def test_wrong_extension_does_not_matter(tmp_path: pathlib.Path) -> None:
    red = np.full((SIZE, SIZE, 3), (250, 10, 10), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(red).save(buffer, format="PNG")
    for name in ("x.jpg", "x.txt", "x"):
        np.testing.assert_array_equal(decode.decode(buffer.getvalue(), SIZE, name), red)
    # An image extension does not make a file an image.
    assert str(decode.inspect(b"#!/bin/sh\nexit", "x.jpg").problem) == "text"


def test_only_files_of_the_layout_are_read(tmp_path: pathlib.Path) -> None:
    files = archives.tiny_imagenet_files(2, 2, 1, 0, SIZE)
    outside = tmp_path / "secret.JPEG"
    outside.write_bytes(b"x")
    wnid = archives.wnid(0)
    boxes = f"train/{wnid}/{wnid}_boxes.txt"
    files[boxes] += b"../../../../secret.JPEG\t0\t0\t1\t1\n"
    path = archives.write_files(tmp_path / "x", files)
    with (
        tiny_imagenet_layout.open_source(path) as source,
        pytest.raises(DataError, match=r"listed in .* are missing, such as .*\.\./secret\.JPEG"),
    ):
        tiny_imagenet_layout.index(source)
