import pathlib
import struct
import zipfile
from collections.abc import Callable
from concurrent import futures

import numpy as np
import pytest

from inception_jax.datasets.builders import tiny_imagenet_layout as layout
from inception_jax.errors import DataError
from tests import archives

A, B, C = (archives.wnid(label) for label in range(3))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return archives.tiny_imagenet_files(3, 2, 2, 1, size=8)


def read(path: pathlib.Path) -> layout.Index:
    with layout.open_source(path) as source:
        return layout.index(source)


def entry(file: str, wnid: str, box: layout.BoundingBox) -> layout.IndexedImage:
    """Returns an image at its path in the official layout."""
    return layout.IndexedImage(file, wnid, box, file)


@pytest.mark.parametrize("name", ["x.zip", "x.tgz", "folder", "folder/tiny-imagenet-200"])
def test_index_lists_each_image_with_class_and_box(
    tmp_path: pathlib.Path, files: dict[str, bytes], name: str
) -> None:
    archives.write_files(tmp_path / name.split("/")[0], files)
    index = read(tmp_path / name)
    assert index.wnids == (A, B, C)
    assert index.class_names == ("class 0", "class 1", "class 2")
    assert index.splits["train"] == [
        entry(f"train/{w}/images/{w}_{number}.JPEG", w, (0, 1, 6, 7))
        for w in (A, B, C)
        for number in range(2)
    ]
    # Validation image number i has class i modulo 3.
    assert index.splits["validation"] == [
        entry(f"val/images/val_{number}.JPEG", (A, B, C)[number % 3], (0, 1, 6, 7))
        for number in range(6)
    ]
    assert index.splits["test"] == [entry("test/images/test_0.JPEG", "", (-1, -1, -1, -1))]
    assert not index.remarks


def test_archive_without_outer_folder_is_read(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    assert len(read(tmp_path / "x.zip").splits["train"]) == 6


def test_duplicate_class_names_get_their_id(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    words = f"{A}\tcrane, bird\n{B}\tcrane\n{C}\tdog\n".encode()
    archives.write_files(tmp_path / "x.zip", files | {"words.txt": words})
    assert read(tmp_path / "x.zip").class_names == (f"crane ({A})", f"crane ({B})", "dog")


def test_no_test_split_without_test_images(tmp_path: pathlib.Path) -> None:
    archives.write_tiny_imagenet(tmp_path / "x.zip", 1, 1, 1, 0, size=8)
    assert set(read(tmp_path / "x.zip").splits) == {"train", "validation"}


BROKEN = {
    "missing image": ([f"train/{B}/images/{B}_1.JPEG"], {}, rf"1 of the 2 .*{B}_1\.JPEG.*again"),
    "missing annotations": (
        ["val/val_annotations.txt"],
        {},
        r"val_annotations\.txt is missing, and 6 images in val/ are not in class folders",
    ),
    "missing validation": (
        ["val/val_annotations.txt", *(f"val/images/val_{number}.JPEG" for number in range(6))],
        {},
        r"val/ contains no images of the classes in train/",
    ),
    "extra image": (
        [],
        {"val/images/stray.JPEG": b""},
        r"1 images are not listed in .*stray\.JPEG",
    ),
    "extra class": (
        [],
        {"train/n9/images/n9_0.JPEG": b""},
        r"train/n9 contains images, but wnids\.txt does not list",
    ),
    "unknown class": (
        [],
        {"val/val_annotations.txt": b"val_0.JPEG\tn9\t0\t0\t1\t1\n"},
        r"lists val_0\.JPEG as class 'n9'",
    ),
    "no box": (
        [],
        {"val/val_annotations.txt": f"val_0.JPEG\t{A}\t1\n".encode()},
        r"ends in \['1'\]",
    ),
    "nameless class": ([], {"words.txt": f"{A}\tx\n{B}\ty\n".encode()}, rf"no name .*{C}"),
    "class twice": ([], {"wnids.txt": f"{A}\n{A}\n".encode()}, "each only once"),
    "misplaced image": ([], {"train/stray.JPEG": b"x"}, r"unexpected image train/stray\.JPEG"),
    "deep image": (
        [],
        {f"train/{A}/images/in/stray.JPEG": b"x"},
        r"unexpected image .*stray\.JPEG",
    ),
    "no class": (
        [],
        {"val/misc/images/stray.JPEG": b"x"},
        r"a folder whose name is not a class id",
    ),
    "other class": (
        ["val/images/val_0.JPEG"],
        {f"val/{B}/images/val_0.JPEG": b"x"},
        rf"val/{B}/images/val_0\.JPEG is listed in .* as class {A}",
    ),
    "two of a name": (
        [],
        {f"val/{A}/val_0.JPEG": b"x"},
        r"are different images with the same name",
    ),
    "not a text": ([], {"wnids.txt": b"\xff\xfe"}, r"wnids\.txt is not a UTF-8 text file"),
}


@pytest.mark.parametrize("name", ["x.zip", "folder"])
@pytest.mark.parametrize("case", BROKEN)
def test_incomplete_source_is_refused(
    tmp_path: pathlib.Path, files: dict[str, bytes], case: str, name: str
) -> None:
    without, instead, message = BROKEN[case]
    changed = {file: data for file, data in files.items() if file not in without} | instead
    archives.write_files(tmp_path / name, changed)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_truncated_archive_is_refused(tmp_path: pathlib.Path, files: dict[str, bytes]) -> None:
    complete = archives.write_files(tmp_path / "x.zip", files).read_bytes()
    (tmp_path / "cut.zip").write_bytes(complete[: len(complete) * 2 // 3])
    with pytest.raises(DataError, match=r"cut\.zip: not a complete zip archive.*truncated"):
        read(tmp_path / "cut.zip")


def test_changed_byte_in_archive_is_detected(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    path = archives.write_files(tmp_path / "x.zip", files)
    name = f"train/{A}/images/{A}_0.JPEG"
    content = path.read_bytes()
    at = content.index(files[name]) + 40
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with layout.open_source(path) as source, pytest.raises(DataError, match=rf"{name} is damaged"):
        source.read(name)


def test_missing_path_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        DataError, match=r"config\.data\.source = .*nowhere'.*tiny-imagenet-200\.zip"
    ):
        layout.open_source(tmp_path / "nowhere")


def fingerprint(path: pathlib.Path) -> str:
    with layout.open_source(path) as source:
        return layout.fingerprint(source)


# Rearranged copies.


def sorted_files(
    files: dict[str, bytes],
    change: Callable[[str], str] = lambda file: file,
    *,
    copied: bool = False,
) -> dict[str, bytes]:
    """Returns files with the validation images in class folders, with changed paths."""
    lines = files["val/val_annotations.txt"].decode().splitlines()
    folders = {line.split("\t")[0]: f"val/{line.split()[1]}" for line in lines}
    result = {}
    for file, data in files.items():
        name = file.split("/")[-1]
        if file.startswith("val/images/"):
            result[change(f"{folders[name]}/images/{name}")] = data
        if copied or not file.startswith("val/images/"):
            result[change(file)] = data
    del result["val/val_annotations.txt"]
    return result


def without(files: dict[str, bytes], *ends: str) -> dict[str, bytes]:
    return {file: data for file, data in files.items() if not file.endswith(ends)}


FORMS = {
    "sorted": sorted_files,
    "sorted with annotations": lambda files: files | sorted_files(files),
    "sorted by copying": lambda files: (
        sorted_files(files, copied=True)
        | {"val/val_annotations.txt": files["val/val_annotations.txt"]}
    ),
    "sorted, no images/": lambda files: sorted_files(
        files, lambda file: file.replace("/images", "")
    ),
    "no images/": lambda files: {file.replace("/images", ""): d for file, d in files.items()},
    "no text files": lambda files: without(sorted_files(files), ".txt"),
    "no boxes": lambda files: without(files, "_boxes.txt"),
    "no words": lambda files: without(files, "words.txt"),
    "no ids": lambda files: without(files, "wnids.txt"),
    "endings": lambda files: sorted_files(files, lambda file: file.replace(".JPEG", ".jpg")),
    "in folders": lambda files: {f"archive/tiny/{file}": data for file, data in files.items()},
    # The copy lacks the validation images.
    "with a copy": lambda files: (
        files | {f"tiny-imagenet-200/{f}": d for f, d in files.items() if not f.startswith("val/")}
    ),
    "from a Mac": lambda files: (
        files
        | {f"__MACOSX/{file}": b"x" for file in files}
        | {
            f"{file.rpartition('/')[0]}/._{file.split('/')[-1]}": b"x"
            for file in files
            if "/" in file
        }
        | {"train/.DS_Store": b"x"}
    ),
    "more next to it": lambda files: files | {"samples/1.jpg": b"x", "code/train.py": b"x"},
}


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "folder"])
@pytest.mark.parametrize("form", FORMS)
def test_other_layouts_give_same_images_and_names(
    tmp_path: pathlib.Path, files: dict[str, bytes], form: str, name: str
) -> None:
    changed = FORMS[form](files)
    if form == "sorted with annotations":
        changed = {file: d for file, d in changed.items() if not file.startswith("val/images/")}
    path = archives.write_files(tmp_path / name, changed)
    with layout.open_source(path) as source:
        index = layout.index(source)
        actual = {
            (split, each.file, each.wnid, source.read(each.path))
            for split, entries in index.splits.items()
            for each in entries
        }
    official = read(archives.write_files(tmp_path / "official", files))
    assert actual == {
        (split, each.file, each.wnid, files[each.file])
        for split, entries in official.splits.items()
        for each in entries
    }
    assert index.wnids == official.wnids
    for split, entries in index.splits.items():
        assert [each.file for each in entries] == [each.file for each in official.splits[split]]


def test_missing_files_are_noted_in_remarks(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    changed = without(sorted_files(files), ".txt", "test_0.JPEG")
    index = read(archives.write_files(tmp_path / "x.zip", changed))
    assert index.class_names == index.wnids
    assert set(index.splits) == {"train", "validation"}
    for what in ("words.txt is missing", "wnids.txt is missing", "val/val_annotations.txt is"):
        assert any(remark.startswith(what) for remark in index.remarks)
    assert any(remark.startswith("test/ contains no images") for remark in index.remarks)


@pytest.mark.parametrize("kept", ["all", "no validation images", "no ids"])
def test_untrained_classes_are_skipped_and_noted(
    tmp_path: pathlib.Path, files: dict[str, bytes], kept: str
) -> None:
    changed = {file: data for file, data in files.items() if not file.startswith(f"train/{B}/")}
    if kept == "no validation images":
        changed = without(changed, "val_1.JPEG", "val_4.JPEG")
    if kept == "no ids":
        changed = without(changed, "wnids.txt")
    index = read(archives.write_files(tmp_path / "x.zip", changed))
    assert index.wnids == (A, C)
    assert {each.wnid for each in index.splits["validation"]} == {A, C}
    assert any(f"1 classes have no training images, such as {B}" in r for r in index.remarks)


def test_equal_file_names_in_several_classes_are_distinct(tmp_path: pathlib.Path) -> None:
    image = archives.class_folders({"a": 1}, 8)["a/0.jpg"]
    files = {f"{split}/{wnid}/0.jpg": image for split in ("train", "val") for wnid in (A, B)}
    index = read(archives.write_files(tmp_path / "x.zip", files))
    assert [each.file for each in index.splits["validation"]] == [
        f"val/{wnid}/images/0.JPEG" for wnid in (A, B)
    ]


def test_other_images_are_refused(tmp_path: pathlib.Path) -> None:
    path = archives.write_files(tmp_path / "x.zip", {"cat/1.jpg": b"", "inner.zip": b""}, "")
    with pytest.raises(
        DataError, match=r"neither wnids\.txt nor .*contents: cat, inner\.zip\).*image_folder"
    ):
        layout.open_source(path)


# Digests.


def test_fingerprint_depends_on_content_not_path(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    first = archives.write_files(tmp_path / "a.zip", files)
    same = archives.write_files(tmp_path / "b.zip", files)
    changed = files | {"test/images/test_0.JPEG": files["test/images/test_0.JPEG"][::-1]}
    other = archives.write_files(tmp_path / "c.zip", changed)
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)


def test_folder_fingerprint_detects_changed_file(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    folder = archives.write_files(tmp_path / "folder", files)
    before = fingerprint(folder)
    assert fingerprint(folder / "tiny-imagenet-200") == before
    (folder / "tiny-imagenet-200" / "words.txt").write_bytes(b"other" + files["words.txt"])
    assert fingerprint(folder) != before


def test_archive_is_read_by_several_threads(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    contents = {f"{number}.JPEG": rng.bytes(2000) for number in range(4000)}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name, data in {"wnids.txt": b"", **contents}.items():
            info = zipfile.ZipInfo(name)
            # A timestamp, as added by most programs, which exposes the bug of Python 3.12.1.
            info.extra = struct.pack("<HHBL", 0x5455, 5, 1, 0)
            file.writestr(info, data)
    with (
        layout.open_source(tmp_path / "x.zip") as source,
        futures.ThreadPoolExecutor(4) as pool,
    ):
        assert list(pool.map(source.read, contents)) == list(contents.values())
