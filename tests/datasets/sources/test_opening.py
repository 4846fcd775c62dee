"""Archives of other systems and programs are read, or refused with a remedy."""

import bz2
import io
import lzma
import os
import pathlib
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable

import pytest

from inception_jax import config
from inception_jax.datasets.builders import folders
from inception_jax.datasets.dataset import prepare
from inception_jax.datasets.sources import files as limits
from inception_jax.datasets.sources import opening, tar_source
from inception_jax.datasets.sources.tar_source import TarSource
from inception_jax.errors import ConfigError, DataError
from tests import archives

FILES = {
    f"{label}/{number}.jpg": f"{label}{number}".encode() for label in "ab" for number in (1, 2)
}


def read(path: pathlib.Path, encoding: str = "") -> dict[str, bytes]:
    """Returns the content of the files in class folders, after detecting the layout."""
    with folders.open_source(path, encoding=encoding) as source:
        layout = folders.layout(source)
        return {file: source.read(file) for file in layout.files}


def classes(path: pathlib.Path, encoding: str = "") -> tuple[str, ...]:
    with folders.open_source(path, encoding=encoding) as source:
        return folders.layout(source).classes


# Tar archives.

TARS = ["x.tar", "x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz"]


@pytest.mark.parametrize("name", TARS)
def test_tar_and_zip_archives_read_alike(tmp_path: pathlib.Path, name: str) -> None:
    path = archives.write_files(tmp_path / name, FILES, "outer")
    assert read(path) == {f"outer/{file}": data for file, data in FILES.items()}


@pytest.mark.parametrize("name", TARS)
def test_content_decides_archive_type(tmp_path: pathlib.Path, name: str) -> None:
    path = archives.write_files(tmp_path / name, FILES, "")
    assert read(path.rename(tmp_path / "x.zip")) == FILES


def test_compression_does_not_change_data_set(tmp_path: pathlib.Path) -> None:
    digests = set()
    for name in TARS:
        with folders.open_source(archives.write_files(tmp_path / name, FILES, "")) as source:
            digests.add(source.fingerprint())
    assert len(digests) == 1
    changed = FILES | {"a/1.jpg": b"longer"}
    with folders.open_source(archives.write_files(tmp_path / "y.tar", changed, "")) as source:
        assert source.fingerprint() not in digests


@pytest.mark.parametrize("start", ["./", "/home/me/pictures/", "data//", "/data//"])
def test_names_with_tar_prefixes_are_read(tmp_path: pathlib.Path, start: str) -> None:
    files = {start + file: data for file, data in FILES.items()}
    assert set(read(archives.write_tar(tmp_path / "x.tar", files)).values()) == set(FILES.values())


def test_old_tar_and_self_extracting_zip_are_recognized(tmp_path: pathlib.Path) -> None:
    tar = archives.write_files(tmp_path / "x.tar", FILES, "")
    content = bytearray(tar.read_bytes())
    place = content.index(b"ustar")
    while place >= 0:
        header = place - 257
        content[place : place + 8] = bytes(8)
        content[header + 148 : header + 156] = b" " * 8
        content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
        place = content.find(b"ustar")
    tar.write_bytes(content)
    assert read(tar) == FILES
    archive = archives.write_files(tmp_path / "x.zip", FILES, "")
    archive.write_bytes(b"MZ a program" + archive.read_bytes())
    assert read(archive.rename(tmp_path / "x.exe")) == FILES


def write_members(path: pathlib.Path, *members: tuple[str, bytes, str]) -> pathlib.Path:
    """Writes a tar archive of two classes and members (name, type, target of a link)."""
    archives.write_tar(path, FILES)
    with tarfile.open(path, "a") as archive:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return path


def test_hard_link_is_resolved(tmp_path: pathlib.Path) -> None:
    path = write_members(tmp_path / "x.tar", ("a/3.jpg", tarfile.LNKTYPE, "b/1.jpg"))
    assert read(path) == FILES | {"a/3.jpg": FILES["b/1.jpg"]}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, r"a/3\.jpg is a link to '/etc/passwd', which is not followed; .*deref"),
        (tarfile.LNKTYPE, r"a/3\.jpg is a link to '/etc/passwd', which is not followed"),
        (tarfile.FIFOTYPE, r"a/3\.jpg is a device or a pipe, not a file; remove it"),
        (tarfile.CHRTYPE, r"a/3\.jpg is a device or a pipe, not a file; remove it"),
    ],
)
def test_non_file_in_tar_archive_is_named(
    tmp_path: pathlib.Path, kind: bytes, message: str
) -> None:
    path = write_members(tmp_path / "x.tar", ("a/3.jpg", kind, "/etc/passwd"))
    with folders.open_source(path) as source, pytest.raises(DataError, match=message):
        source.read("a/3.jpg")


def test_paths_in_tar_archive_cannot_escape(tmp_path: pathlib.Path) -> None:
    path = write_members(tmp_path / "x.tar", ("../../evil/1.jpg", tarfile.REGTYPE, ""))
    before = sorted(tmp_path.parent.rglob("*"))
    assert read(path) == FILES
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_last_tar_member_of_same_name_is_used(tmp_path: pathlib.Path) -> None:
    path = archives.write_tar(tmp_path / "x.tar", FILES)
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("a/1.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"new"))
    assert read(path) == FILES | {"a/1.jpg": b"new"}


# Complete: four members with a header and a block each, then blocks of zeros.
@pytest.mark.parametrize("size", [8 * 512, 5 * 512, 5 * 512 + 100, 6 * 512 + 5])
def test_truncated_tar_archive_is_refused(tmp_path: pathlib.Path, size: int) -> None:
    path = archives.write_tar(tmp_path / "x.tar", FILES)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"x\.tar: not a complete tar archive.*truncated; download"):
        folders.open_source(path)


def test_damaged_tar_header_is_not_the_end(tmp_path: pathlib.Path) -> None:
    path = archives.write_tar(tmp_path / "x.tar", FILES)
    content = bytearray(path.read_bytes())
    content[2 * 1024 + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"not a complete tar archive .*a member's header is damaged"
    ):
        folders.open_source(path)


@pytest.mark.parametrize("name", TARS[1:])
def test_truncated_or_changed_compressed_tar_is_refused(tmp_path: pathlib.Path, name: str) -> None:
    path = archives.write_tar(tmp_path / name, FILES)
    complete = path.read_bytes()
    for content in (complete[:-5], complete[:40] + bytes([complete[40] ^ 16]) + complete[41:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"not a complete tar archive"):
            folders.open_source(path)


def test_oversized_tar_header_is_not_read(tmp_path: pathlib.Path) -> None:
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, 512 << 20
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.write(member.tobuf())
        file.truncate(1 << 30)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a member's header has more than [\d,]+ bytes"):
        folders.open_source(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_negative_member_size_is_refused(tmp_path: pathlib.Path) -> None:
    member = tarfile.TarInfo("a/1.jpg")
    member.size = -1024
    path = tmp_path / "x.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(DataError, match="not a complete tar archive"):
        folders.open_source(path)


def test_oversized_tar_member_is_not_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_BYTES", 1000)
    path = archives.write_tar(tmp_path / "x.tgz", FILES | {"a/3.jpg": bytes(1001)})
    with folders.open_source(path) as source:
        with pytest.raises(
            DataError, match=r"a/3\.jpg has 1,001 bytes; a file can have at most 1,000"
        ):
            source.read("a/3.jpg")
        assert source.read("a/1.jpg") == b"a1"


def test_compressed_tar_is_unpacked_to_scratch_and_removed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = archives.write_tar(tmp_path / "x.tgz", FILES)
    scratch = tmp_path / "scratch"
    with TarSource(path, scratch=scratch) as source:
        assert source.sizes == dict.fromkeys(FILES, 2)
        assert not scratch.exists(), "a list needs no room"
        assert source.read("b/2.jpg") == b"b2"
        assert list(scratch.iterdir()) == [], "not even while it is open"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with (
        TarSource(path, scratch=scratch) as source,
        pytest.raises(
            DataError, match=r"scratch: unpacking .*x\.tgz needs up to 0\.0 MB, but only 0\.0 MB is"
        ),
    ):
        source.read("b/2.jpg")


def test_decompression_bomb_in_tar_uses_little_memory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = tarfile.TarInfo("a/bomb.jpg")
    member.size = 64 << 20
    with bz2.open(tmp_path / "x.tar.bz2", "wb") as file:
        file.write(member.tobuf())
        for _ in range(64):
            file.write(bytes(1 << 20))
        file.write(bytes(1024))
    assert (tmp_path / "x.tar.bz2").stat().st_size < 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: pytest.fail("it is not unpacked"))
    monkeypatch.setattr(limits, "MAX_BYTES", 1 << 20)
    tracemalloc.start()
    with TarSource(tmp_path / "x.tar.bz2") as source, pytest.raises(DataError, match="at most"):
        source.read("a/bomb.jpg")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert tar_source._MAX_HEADER_BYTES == 1 << 20


# Names in zip archives.


@pytest.mark.parametrize("system", [0, 3])
def test_backslashes_are_separators_without_slashes(tmp_path: pathlib.Path, system: int) -> None:
    files = {file.replace("/", "\\").encode(): data for file, data in FILES.items()}
    path = archives.write_raw_zip(tmp_path / "x.zip", files | {b"a\\": b""}, system=system)
    assert read(path) == FILES


def test_windows_backslashes_are_separators_among_others(tmp_path: pathlib.Path) -> None:
    files = {
        (file.replace("/", "\\") if file.startswith("a") else file).encode(): data
        for file, data in FILES.items()
    }
    assert read(archives.write_raw_zip(tmp_path / "x.zip", files)) == FILES
    unix = archives.write_raw_zip(tmp_path / "y.zip", {b"a\\b/1": b"", b"c/1": b""}, system=3)
    assert classes(unix) == ("a\\b", "c"), "a name like any other there"


def national(encoding: str, *labels: str) -> dict[bytes, bytes]:
    return {f"{label}/{label}{n}.jpg".encode(encoding): b"x" for label in labels for n in (1, 2)}


NATIONAL = {
    "gbk": ("狗", "猫"),
    "shift_jis": ("ソファ", "表"),  # Their second bytes are backslashes.
    "cp866": ("кошка", "собака"),
    "cp1251": ("кошка", "собака"),
    "cp850": ("chêne", "érable"),
}


@pytest.mark.parametrize("encoding", NATIONAL)
def test_legacy_encodings_need_the_suggested_setting(tmp_path: pathlib.Path, encoding: str) -> None:
    labels = NATIONAL[encoding]
    path = archives.write_raw_zip(tmp_path / "x.zip", national(encoding, *labels))
    with pytest.raises(DataError, match=r"folders, .*, are not UTF-8.*archive_encoding") as error:
        folders.open_source(path)
    assert any(f"'{label}' (" in str(error.value) for label in labels)
    assert encoding in str(error.value)
    assert classes(path, encoding) == labels
    tar = archives.write_tar(
        tmp_path / "x.tar",
        {f"{label}/1.jpg": b"x" for label in labels},
        format=tarfile.GNU_FORMAT,
        encoding=encoding,
    )
    with pytest.raises(DataError, match=r"folders, .*, are not UTF-8.*archive_encoding"):
        folders.open_source(tar)
    assert classes(tar, encoding) == labels


def test_undeclared_utf_8_is_recognized(tmp_path: pathlib.Path) -> None:
    path = archives.write_raw_zip(tmp_path / "x.zip", national("utf-8", "кошка", "猫"), system=3)
    assert classes(path) == ("кошка", "猫")
    # The setting does not affect names with a declared encoding.
    declared = archives.write_files(tmp_path / "y.zip", {"кошка/1": b"", "猫/1": b""}, "")
    assert classes(declared, "gbk") == ("кошка", "猫")


def test_unicode_extra_field_is_preferred(tmp_path: pathlib.Path) -> None:
    def unicode_path(name: bytes) -> bytes:
        text = name.decode("gbk").encode()
        content = struct.pack("<BL", 1, zlib.crc32(name)) + text
        # After a timestamp, as written by other programs.
        stamp = struct.pack("<HHBL", 0x5455, 5, 1, 0)
        return stamp + struct.pack("<HH", 0x7075, len(content)) + content

    files = national("gbk", "狗", "猫")
    path = archives.write_raw_zip(tmp_path / "x.zip", files, extra=unicode_path)
    assert classes(path) == ("狗", "猫")


def test_wrong_encoding_setting_is_refused(tmp_path: pathlib.Path) -> None:
    path = archives.write_raw_zip(tmp_path / "x.zip", national("cp1251", "кошка", "собака"))
    with pytest.raises(
        DataError, match=r"is not encoded in shift_jis, as .* declares\. It may be .*кошка"
    ):
        folders.open_source(path, encoding="shift_jis")


def test_undecodable_file_names_are_kept_as_bytes(tmp_path: pathlib.Path) -> None:
    files = {f"{label}/фото{n}.jpg".encode("cp866"): b"x" for label in "ab" for n in (1, 2)}
    path = archives.write_raw_zip(tmp_path / "x.zip", files)
    assert {folders.escape_for_display(file) for file in read(path)} == {
        f"{label}/\\udce4\\udcae\\udce2\\udcae{n}.jpg" for label in "ab" for n in (1, 2)
    }
    assert set(read(path, "cp866")) == {f"{label}/фото{n}.jpg" for label in "ab" for n in (1, 2)}


def test_name_invalid_in_declared_encoding_is_refused(tmp_path: pathlib.Path) -> None:
    path = archives.write_files(tmp_path / "x.zip", {"é/1": b"", "b/1": b""}, "")
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xe9\xe9"))
    with pytest.raises(DataError, match=r"x\.zip: not a complete zip archive .*utf-8"):
        folders.open_source(path)


@pytest.mark.parametrize("encoding", ["gbk2", "utf-16", "base64", "cp037"])
def test_encoding_setting_must_be_a_text_encoding(encoding: str) -> None:
    data = config.Data(name="image_folder", archive_encoding=encoding)
    with pytest.raises(ConfigError, match=r"archive_encoding = .*: must be an encoding"):
        config.validate(config.Config(data=data))


def test_encoding_is_recorded_if_it_matters(tmp_path: pathlib.Path) -> None:
    image = archives.class_folders({"a": 1}, 16)["a/0.jpg"]
    files = dict.fromkeys(national("gbk", "狗", "猫"), image)
    path = archives.write_raw_zip(tmp_path / "x.zip", files)
    settings = {"source": str(path), "directory": str(tmp_path), "image_size": 16}
    data = config.Data(name="image_folder", archive_encoding="gbk", **settings)
    assert prepare(data, log=lambda line: None).class_names == ("狗", "猫")
    other = config.Data(name="image_folder", archive_encoding="big5", **settings)
    with pytest.raises(DataError, match=r"archive_encoding = 'big5': .*prepared with 'gbk'"):
        prepare(other, log=lambda line: None)


# Other kinds of zip archives.


def changed_members(path: pathlib.Path, change: Callable[[bytearray, int, int], None]) -> None:
    """Edits both headers of all members, at the offsets of flags and method."""
    content = bytearray(path.read_bytes())
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(magic)
        while place >= 0:
            change(content, place + flags, place + flags + 2)
            place = content.find(magic, place + 4)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("flags", "method", "message"),
    [
        (
            0,
            9,
            r"of its 4 files, 4 are compressed with Deflate64 \(.*Unpack it with 7-Zip .*folder",
        ),
        (0, 93, "4 are compressed with Zstandard"),
        (0, 98, "4 are compressed with PPMd"),
        (0, 42, "4 are compressed with method 42"),
        (1, 0, "of its 4 files, 4 are encrypted with a password, .*Unpack it"),
        (1, 99, "4 are encrypted with a password"),
    ],
)
@pytest.mark.parametrize("unreadable", ["refuse", "skip"])
def test_unsupported_compression_is_reported_once(
    tmp_path: pathlib.Path, flags: int, method: int, message: str, unreadable: str
) -> None:
    def change(content: bytearray, flags_at: int, method_at: int) -> None:
        content[flags_at] |= flags
        struct.pack_into("<H", content, method_at, method)

    path = archives.write_files(tmp_path / "x.zip", FILES, "")
    changed_members(path, change)
    lines: list[str] = []
    data = config.Data(
        name="image_folder", source=str(path), directory=str(tmp_path), on_unreadable=unreadable
    )
    with pytest.raises(DataError, match=message):
        prepare(data, log=lines.append)
    assert not lines, "nothing is checked file by file"


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_are_read_and_damage_is_named(tmp_path: pathlib.Path, method: int) -> None:
    data = os.urandom(20_000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        for name in ("a/1.jpg", "b/1.jpg"):
            archive.writestr(name, data)
    assert read(tmp_path / "x.zip") == {"a/1.jpg": data, "b/1.jpg": data}
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[100:3000] = bytes(2900)
    (tmp_path / "x.zip").write_bytes(content)
    with (
        folders.open_source(tmp_path / "x.zip") as source,
        pytest.raises(DataError, match=r"a/1\.jpg is damaged"),
    ):
        source.read("a/1.jpg")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_oversized_member_is_not_kept_in_memory(tmp_path: pathlib.Path, method: int) -> None:
    with (
        zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive,
        archive.open("a/1.jpg", "w") as member,
    ):
        for _ in range(256):
            member.write(bytes(1 << 20))
    content = bytearray((tmp_path / "x.zip").read_bytes())
    struct.pack_into("<I", content, content.rindex(b"PK\x01\x02") + 24, 100_000)
    (tmp_path / "x.zip").write_bytes(content)
    with folders.open_source(tmp_path / "x.zip") as source:
        tracemalloc.start()
        with pytest.raises(DataError, match=r"a/1\.jpg is damaged"):
            source.read("a/1.jpg")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 128 << 20


@pytest.mark.parametrize("data", [b"a1", b"other"])
def test_different_files_of_same_name_are_refused(tmp_path: pathlib.Path, data: bytes) -> None:
    path = archives.write_raw_zip(tmp_path / "x.zip", {b"a/1.jpg": b"a1", b"b/1.jpg": b"b1"})
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(path, "a") as archive,
    ):
        archive.writestr("a/1.jpg", data)
    if data == b"a1":
        assert read(path) == {"a/1.jpg": b"a1", "b/1.jpg": b"b1"}
    else:
        with pytest.raises(DataError, match=r"two different files named 'a/1\.jpg'"):
            folders.open_source(path)


def test_part_of_split_archive_is_reported(tmp_path: pathlib.Path) -> None:
    path = archives.write_files(tmp_path / "x.zip", FILES, "")
    complete = path.read_bytes()
    last = bytearray(complete)
    struct.pack_into("<H", last, last.rindex(b"PK\x05\x06") + 4, 2)
    path.write_bytes(last)
    with pytest.raises(DataError, match=r"the last of 3 parts of one archive.*zip -s 0 x\.zip"):
        folders.open_source(path)
    for name, content, message in (
        ("x.z01", b"PK\x07\x08" + complete, "the first of several parts of a zip archive"),
        ("y.zip.001", complete[:100], r"one of several parts; join them with 'cat y\.zip\.\*"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            folders.open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive, which is not supported; unpack it and"),
        (b"Rar!\x1a\x07\1\0", "is a RAR archive"),
        (b"\x28\xb5\x2f\xfd\0", "compressed with Zstandard.*unzstd"),
        (b"\n<!DOCTYPE html><html>", "is a web page, saved instead of the archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer.*git lfs pull"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"some text", "neither a zip nor a tar archive .*beginning with b'some tex'"),
        (b"", r"neither a zip nor a tar archive \(0 bytes"),
        (lzma.compress(b"no tar archive"), "not a complete tar archive"),
    ],
)
def test_unsupported_files_are_named(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        folders.open_source(tmp_path / "x.zip")
    assert str(tmp_path / "x.zip") in str(error.value)


def test_pipe_does_not_block(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "x.zip")
    with pytest.raises(DataError, match="is a device or a pipe"):
        folders.open_source(tmp_path / "x.zip")


@pytest.mark.parametrize("name", ["folder", "outer.zip"])
def test_nested_archives_are_named(tmp_path: pathlib.Path, name: str) -> None:
    inside = {"train.zip": b"x", "test.tar.gz": b"x", "labels.csv": b"x"}
    path = archives.write_files(tmp_path / name, inside, "")
    with pytest.raises(
        DataError, match=r"contains archives, .*: train\.zip, test\.tar\.gz\. Use one"
    ):
        classes(path)
    assert opening.mention_archives(["a/1.jpg"]) == ""
    many = opening.mention_archives(f"{number}.zip" for number in range(9))
    assert ": 0.zip, 1.zip, 2.zip, 3.zip, 4.zip and 4 more. Use one" in many
