import pathlib
import struct
import zipfile
from concurrent import futures

import numpy as np
import pytest

from inception_jax.datasets import archive
from inception_jax.errors import DataError
from tests import archives

A, B, C = (archives.wnid(label) for label in range(3))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return archives.tiny_imagenet_files(3, 2, 2, 1, size=8)


def read(path: pathlib.Path) -> archive.Index:
    with archive.open_source(path) as source:
        return archive.index(source)


@pytest.mark.parametrize("name", ["x.zip", "folder", "folder/tiny-imagenet-200"])
def test_index_lists_every_image_with_its_class_and_box(
    tmp_path: pathlib.Path, files: dict[str, bytes], name: str
) -> None:
    archives.write_files(tmp_path / name.split("/")[0], files)
    index = read(tmp_path / name)
    assert index.wnids == (A, B, C)
    assert index.class_names == ("class 0", "class 1", "class 2")
    assert index.splits["train"] == [
        archive.Entry(f"train/{w}/images/{w}_{number}.JPEG", w, (0, 1, 6, 7))
        for w in (A, B, C)
        for number in range(2)
    ]
    # The maker gives validation image number i the class i modulo 3.
    assert index.splits["validation"] == [
        archive.Entry(f"val/images/val_{number}.JPEG", (A, B, C)[number % 3], (0, 1, 6, 7))
        for number in range(6)
    ]
    assert index.splits["test"] == [archive.Entry("test/images/test_0.JPEG", "", (-1, -1, -1, -1))]


def test_an_archive_without_a_folder_of_its_own_is_read(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    assert len(read(tmp_path / "x.zip").splits["train"]) == 6


def test_classes_of_the_same_name_get_their_id(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    words = f"{A}\tcrane, bird\n{B}\tcrane\n{C}\tdog\n".encode()
    archives.write_files(tmp_path / "x.zip", files | {"words.txt": words})
    assert read(tmp_path / "x.zip").class_names == (f"crane ({A})", f"crane ({B})", "dog")


def test_no_test_images_no_test_split(tmp_path: pathlib.Path) -> None:
    archives.write_tiny_imagenet(tmp_path / "x.zip", 1, 1, 1, 0, size=8)
    assert set(read(tmp_path / "x.zip").splits) == {"train", "validation"}


BROKEN = {
    "missing image": ([f"train/{B}/images/{B}_1.JPEG"], {}, rf"1 of the 2 .*{B}_1\.JPEG.*again"),
    "missing class": (
        [f"train/{B}/images/{B}_{number}.JPEG" for number in range(2)]
        + [f"train/{B}/{B}_boxes.txt"],
        {},
        rf"{B}_boxes\.txt is missing",
    ),
    "missing text": (["wnids.txt"], {}, r"no wnids\.txt \(found: t"),
    "missing names": (["words.txt"], {}, r"words\.txt is missing"),
    "missing annotations": (["val/val_annotations.txt"], {}, r"val_annotations\.txt is missing"),
    "extra image": ([], {"val/images/stray.JPEG": b""}, r"does not list 1 .*stray\.JPEG"),
    "extra class": ([], {"train/n9/images/n9_0.JPEG": b""}, r"train/n9/images/ holds images"),
    "unknown class": (
        [],
        {"val/val_annotations.txt": b"val_0.JPEG\tn9\t0\t0\t1\t1\n"},
        r"val_0\.JPEG the class 'n9'",
    ),
    "no box": ([], {"val/val_annotations.txt": f"val_0.JPEG\t{A}\t1\n".encode()}, r"has \['1'\]"),
    "nameless class": ([], {"words.txt": f"{A}\tx\n{B}\ty\n".encode()}, rf"no name .*{C}"),
    "class twice": ([], {"wnids.txt": f"{A}\n{A}\n".encode()}, "none twice"),
    "not a text": ([], {"wnids.txt": b"\xff\xfe"}, r"wnids\.txt is not a text file"),
}


@pytest.mark.parametrize("name", ["x.zip", "folder"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_source_that_is_not_whole_is_refused(
    tmp_path: pathlib.Path, files: dict[str, bytes], case: str, name: str
) -> None:
    without, instead, message = BROKEN[case]
    changed = {file: data for file, data in files.items() if file not in without} | instead
    archives.write_files(tmp_path / name, changed)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_truncated_archive_is_refused(tmp_path: pathlib.Path, files: dict[str, bytes]) -> None:
    whole = archives.write_files(tmp_path / "x.zip", files).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"cut\.zip: not a whole zip archive.*cut short"):
        read(tmp_path / "cut.zip")


def test_a_changed_byte_in_an_archive_is_found(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    path = archives.write_files(tmp_path / "x.zip", files)
    name = f"train/{A}/images/{A}_0.JPEG"
    content = path.read_bytes()
    at = content.index(files[name]) + 40
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with archive.open_source(path) as source, pytest.raises(DataError, match=rf"{name} is damaged"):
        source.read(name)


def test_a_path_that_leads_nowhere_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"config\.data\.source = .*nowhere.*official download"):
        archive.open_source(tmp_path / "nowhere")


def fingerprint(path: pathlib.Path) -> str:
    with archive.open_source(path) as source:
        return source.fingerprint()


def test_fingerprints_follow_the_content_not_the_path(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    first = archives.write_files(tmp_path / "a.zip", files)
    same = archives.write_files(tmp_path / "b.zip", files)
    changed = files | {"test/images/test_0.JPEG": files["test/images/test_0.JPEG"][::-1]}
    other = archives.write_files(tmp_path / "c.zip", changed)
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)


def test_the_fingerprint_of_a_folder_sees_a_changed_file(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    folder = archives.write_files(tmp_path / "folder", files)
    before = fingerprint(folder)
    assert fingerprint(folder / "tiny-imagenet-200") == before
    (folder / "tiny-imagenet-200" / "words.txt").write_bytes(b"other" + files["words.txt"])
    assert fingerprint(folder) != before


def test_threads_read_an_archive_together(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    contents = {f"{number}.JPEG": rng.bytes(2000) for number in range(4000)}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name, data in {"wnids.txt": b"", **contents}.items():
            info = zipfile.ZipInfo(name)
            # A time stamp, as most programs add; it is what Python 3.12.1 trips over.
            info.extra = struct.pack("<HHBL", 0x5455, 5, 1, 0)
            file.writestr(info, data)
    with (
        archive.open_source(tmp_path / "x.zip") as source,
        futures.ThreadPoolExecutor(4) as pool,
    ):
        assert list(pool.map(source.read, contents)) == list(contents.values())
