"""Rearranged copies of Tiny ImageNet give the same prepared data, or one error."""

import os
import pathlib

import pytest

from inception_jax import config
from inception_jax.datasets.dataset import prepare
from inception_jax.errors import DataError
from tests import archives

SIZE = 16


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return archives.tiny_imagenet_files(2, 4, 2, 2, SIZE)


def validation_sorted(files: dict[str, bytes], *, images: str = "images/") -> dict[str, bytes]:
    """Returns the files with the validation images in class folders, without boxes."""
    lines = files["val/val_annotations.txt"].decode().splitlines()
    classes = {line.split("\t")[0]: line.split("\t")[1] for line in lines}
    return {
        f"val/{classes[file.split('/')[-1]]}/{images}{file.split('/')[-1]}"
        if file.startswith("val/images/")
        else file: data
        for file, data in files.items()
        if not file.endswith(("_boxes.txt", "val_annotations.txt"))
    }


def settings(source: pathlib.Path, directory: pathlib.Path, name: str) -> config.Data:
    return config.Data(name=name, source=str(source), directory=str(directory), image_size=SIZE)


def prepared(
    source: pathlib.Path, directory: pathlib.Path, name: str = "tiny_imagenet_subset"
) -> tuple[dict[str, bytes], list[str]]:
    """Returns the cache files, without the description, and the logged lines."""
    lines: list[str] = []
    prepare(settings(source, directory, name), log=lines.append)
    (cache,) = (directory / "inception_jax").glob("*px")
    return {f.name: f.read_bytes() for f in cache.iterdir() if f.name != "info.json"}, lines


@pytest.mark.parametrize("name", ["x.zip", "x.tgz", "folder"])
def test_sorted_copy_gives_byte_identical_data(
    tmp_path: pathlib.Path, files: dict[str, bytes], name: str
) -> None:
    official, lines = prepared(archives.write_files(tmp_path / "o.zip", files), tmp_path / "one")
    assert not any("missing" in line for line in lines)
    source = archives.write_files(tmp_path / name, validation_sorted(files))
    actual, lines = prepared(source, tmp_path / "two")
    assert actual == official and {"validation_images.npy", "test_names.txt"} <= set(actual)
    assert any(f"{source}: val/val_annotations.txt is missing" in line for line in lines)
    assert not list((tmp_path / "two").glob("tmp*")), "what was unpacked is gone"
    # Again, with the data already prepared.
    assert prepared(source, tmp_path / "two") == (official, [])


@pytest.mark.parametrize("test", [True, False])
@pytest.mark.parametrize("images", ["images/", ""])
def test_sorted_copy_is_a_valid_image_folder(
    tmp_path: pathlib.Path, files: dict[str, bytes], images: str, test: bool
) -> None:
    changed = files | {"val/val_annotations.txt": files["val/val_annotations.txt"]}
    changed = validation_sorted(changed, images=images) | {
        file: data for file, data in files.items() if file.endswith(".txt")
    }
    if not test:
        changed = {file: data for file, data in changed.items() if not file.startswith("test/")}
    source = archives.write_files(tmp_path / "x.zip", changed)
    dataset = prepare(settings(source, tmp_path, "image_folder"), log=lambda line: None)
    assert dataset.class_names == (archives.wnid(0), archives.wnid(1))
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    assert sizes == {"train": 8, "validation": 4} | ({"test": 2} if test else {})
    if test:
        assert dataset.splits["test"].labels.tolist() == [-1, -1]


@pytest.mark.parametrize("name", ["x.zip", "folder"])
def test_official_layout_is_refused_as_image_folder(
    tmp_path: pathlib.Path, files: dict[str, bytes], name: str
) -> None:
    source = archives.write_files(tmp_path / name, files)
    with pytest.raises(DataError, match=r"layout of Tiny ImageNet, .*data\.name=tiny_imagenet, or"):
        prepare(settings(source, tmp_path, "image_folder"), log=lambda line: None)


@pytest.mark.parametrize("place", [f"train/{archives.wnid(0)}/images", "val/images", "test/images"])
def test_other_formats_are_refused(
    tmp_path: pathlib.Path, files: dict[str, bytes], place: str
) -> None:
    source = archives.write_files(tmp_path / "x", files | {f"{place}/more.png": b"?"})
    with pytest.raises(
        DataError, match=rf"{place}/more\.png: names of images .* must end in \.JPEG"
    ):
        prepared(source, tmp_path)


def test_names_are_stored_as_one_line(tmp_path: pathlib.Path, files: dict[str, bytes]) -> None:
    image = next(data for file, data in files.items() if file.endswith(".JPEG"))
    names = [b"a\nb\r.JPEG", b"\xff.JPEG"]
    source = archives.write_files(tmp_path / "x", files)
    folder = next(source.glob("**/test/images"))
    for name in names:
        pathlib.Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(image)
    contents, _ = prepared(source, tmp_path / "data")
    lines = contents["test_names.txt"].decode().splitlines()
    assert len(lines) == 4
    assert {r"test/images/a\nb\r.JPEG", r"test/images/\udcff.JPEG"} < set(lines)


def test_subset_is_refused_as_complete_data_set(
    tmp_path: pathlib.Path, files: dict[str, bytes]
) -> None:
    source = archives.write_files(tmp_path / "x.zip", files)
    with pytest.raises(DataError, match=r": 2 classes \(expected 200\), .*tiny_imagenet_subset"):
        prepare(settings(source, tmp_path, "tiny_imagenet"), log=lambda line: None)
