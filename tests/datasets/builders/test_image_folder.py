import io
import json
import os
import pathlib
import shutil
import stat
import zipfile
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inception_jax import config
from inception_jax.datasets import decode
from inception_jax.datasets.builders import folders
from inception_jax.datasets.dataset import Dataset, prepare
from inception_jax.datasets.duplicates import Duplicates
from inception_jax.datasets.records import Records
from inception_jax.datasets.sources.files import FolderSource
from inception_jax.errors import DataError
from inception_jax.registry import DATASETS
from inception_jax.reporting import plots
from inception_jax.storage.workdir import Workdir
from inception_jax.training import workdir as workdirs
from tests import archives

SIZE = 16
COUNTS = {"ant": 10, "<i>bee&amp; co": 5, "été": 3}


def data(source: pathlib.Path | str, directory: pathlib.Path, **changes: Any) -> config.Data:
    settings = {"image_size": SIZE, "source": str(source), "directory": str(directory)}
    return config.Data(name="image_folder", **(settings | changes))


def quiet(line: str) -> None:
    pass


def write(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    return archives.write_files(path, files, "")


def counts(dataset: Dataset) -> dict[str, dict[str, int]]:
    return {
        name: {dataset.class_names[label]: int(n) for label, n in enumerate(np.bincount(s.labels))}
        for name, s in dataset.splits.items()
    }


@pytest.fixture(params=["x.zip", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    return write(tmp_path / request.param, archives.class_folders(COUNTS, SIZE))


def test_fraction_of_each_class_is_held_out(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    dataset = prepare(data(source, tmp_path / "data"), log=quiet)
    assert dataset.class_names == ("<i>bee&amp; co", "ant", "été")
    assert counts(dataset) == {
        "train": {"<i>bee&amp; co": 4, "ant": 8, "été": 2},
        "validation": {"<i>bee&amp; co": 1, "ant": 2, "été": 1},
    }
    for split in dataset.splits.values():
        images = split.read(np.arange(len(split)))
        for image, label, name in zip(images, split.labels, split.names, strict=True):
            assert name.split("/")[0] == dataset.class_names[label]
            color = archives.color(label)
            np.testing.assert_allclose(image.mean(axis=(0, 1)), color, atol=8)


def test_records_are_read_without_the_source(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "x", archives.class_folders(COUNTS, SIZE))
    one = prepare(data(source, tmp_path / "data", storage="records"), log=quiet)
    shutil.rmtree(source)
    two = prepare(data(source, tmp_path / "data", image_size=8), log=quiet)
    assert one.class_names == two.class_names and one.train.names == two.train.names


def test_every_format_is_stored_unchanged(tmp_path: pathlib.Path) -> None:
    image = Image.fromarray(archives.pixels(0, SIZE, np.random.default_rng(0)))
    files = {}
    for number, kind in enumerate(["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"] * 2):
        buffer = io.BytesIO()
        image.save(buffer, format=kind)
        # Content decides, not the file name.
        files[f"{'ab'[number % 2]}/{number}.jpg"] = buffer.getvalue()
    dataset = prepare(data(write(tmp_path / "x", files), tmp_path), log=quiet)
    assert len(dataset.train) + len(dataset.evaluation) == 12
    for split in dataset.splits.values():
        pixels = split.read(np.arange(len(split))).astype(int)
        assert np.abs(pixels - np.asarray(image)).mean() < 6


def test_test_folder_without_classes_is_unlabeled(tmp_path: pathlib.Path) -> None:
    files = archives.class_folders({"train/a": 2, "train/b": 2, "val/b": 1, "test": 3}, SIZE)
    dataset = prepare(data(write(tmp_path / "x", files), tmp_path), log=quiet)
    assert dataset.splits["test"].labels.tolist() == [-1] * 3
    assert (len(dataset.train), dataset.evaluation.labels.tolist()) == (4, [1])


@pytest.mark.parametrize("test", [{"test/": b""}, {"test/.gitkeep": b""}, {"test/a.jpg": b"note"}])
@pytest.mark.parametrize("has_validation", [True, False])
def test_empty_test_folder_is_not_a_split(
    tmp_path: pathlib.Path, test: dict[str, bytes], has_validation: bool
) -> None:
    counts = {"train/a": 4, "train/b": 4} | ({"val/a": 1} if has_validation else {})
    path = write(tmp_path / "x", archives.class_folders(counts, SIZE) | test)
    lines: list[str] = []
    dataset = prepare(data(path, tmp_path, on_unreadable="skip"), log=lines.append)
    assert set(dataset.splits) == {"train", "validation"}
    assert any("the test folder contains no images" in line for line in lines)


BAD = {"ant/note": b"a note", "ant/in/cut.jpg": b"\xff\xd8\xff\xe0 and no more", "été/0": b""}


def test_unreadable_files_are_named_and_counted(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = source.with_stem("bad")
    write(source, archives.class_folders(COUNTS, SIZE) | BAD)
    with pytest.raises(
        DataError, match=r"(?s)3 of 21 files are corrupt or not images:.*on_unreadable=skip"
    ) as e:
        prepare(data(source, tmp_path / "data"), log=quiet)
    assert all(f" {name}" in str(e.value) for name in BAD)
    assert not (tmp_path / "data" / "image_folder").exists()
    lines: list[str] = []
    dataset = prepare(data(source, tmp_path / "data", on_unreadable="skip"), log=lines.append)
    assert len(dataset.train) + len(dataset.evaluation) == 18
    assert any("3 of 21 files" in line and "Skipping" in line for line in lines)
    stored = tmp_path / "data" / "image_folder" / "1.0.0" / "metadata.json"
    metadata = json.loads(stored.read_text())
    assert metadata["unreadable_count"] == 3
    assert sorted(metadata["unreadable_files"]) == sorted(BAD)
    # Skipped files would now be refused.
    with pytest.raises(DataError, match=r"on_unreadable = 'refuse'.*prepared with 'skip'"):
        prepare(data("", tmp_path / "data"), log=quiet)


def test_unreadable_files_are_grouped_by_kind_with_remedy(tmp_path: pathlib.Path) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300)
    files = archives.class_folders({"a": 2, "b": 2}, SIZE)
    files |= {"a/x.jpg": heic, "b/y.HEIC": heic, "b/z.jpg": b"<!DOCTYPE html><html>404</html>"}
    with pytest.raises(DataError) as error:
        prepare(data(write(tmp_path / "x", files), tmp_path), log=quiet)
    first, heics, page, last = str(error.value).splitlines()
    assert first.endswith("3 of 7 files are corrupt or not images:")
    assert heics.startswith("  HEIC photo (2): a/x.jpg, b/y.HEIC. Convert it to JPEG")
    assert page.startswith("  web page instead of an image (1): b/z.jpg. Download")
    assert last.endswith("config.data.on_unreadable=skip to skip them")


def test_sidecar_files_are_ignored_and_logged_once(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = source.with_stem("sidecars")
    files = archives.class_folders(COUNTS, SIZE)
    sidecars = {
        "ant/1.txt": b"0 .5 .5 1 1",
        "ant/2.txt": b"",
        "été/1.xml": b"<a/>",
        "été/README": b"x",
    }
    write(source, files | sidecars)
    lines: list[str] = []
    dataset = prepare(data(source, tmp_path / "data"), log=lines.append)
    names = {*dataset.train.names, *dataset.evaluation.names}
    assert names == set(files)
    (line,) = [line for line in lines if "ignored 4 paths" in line]
    assert "ant/1.txt" in line and "README" in line
    # They are not unreadable images, so that setting does not matter.
    prepare(data(source, tmp_path / "data", on_unreadable="skip"), log=quiet)


def test_folder_of_sidecar_files_is_not_a_class(tmp_path: pathlib.Path) -> None:
    files = archives.class_folders({"a": 2, "b": 2}, SIZE) | {"annotations/0.xml": b"<a/>"}
    lines: list[str] = []
    dataset = prepare(data(write(tmp_path / "x", files), tmp_path / "d"), log=lines.append)
    assert dataset.class_names == ("a", "b")
    assert any("'annotations': no images, so not used as a class" in line for line in lines)
    files = archives.class_folders({"images": 4}, SIZE) | {"labels/0.txt": b"0"}
    with pytest.raises(DataError, match="contains only one class, 'images'"):
        prepare(data(write(tmp_path / "y", files), tmp_path / "y-d"), log=quiet)


def sixteen_bits(most: int, count: int = 4) -> dict[str, bytes]:
    """Returns files with 16 bits per channel in two classes, with values up to `most`."""
    files = {}
    for name in ("a", "b"):
        for number in range(count):
            values = np.full((SIZE, SIZE), most // (number + 1), np.uint16)
            values[: SIZE // 2] = 0
            buffer = io.BytesIO()
            Image.fromarray(values).save(buffer, format="PNG")
            files[f"{name}/{number}.png"] = buffer.getvalue()
    return files


@pytest.mark.parametrize("storage", ["decoded", "records"])
def test_bit_depth_is_common_to_the_data_set(tmp_path: pathlib.Path, storage: str) -> None:
    source = write(tmp_path / "x", sixteen_bits(4095))
    lines: list[str] = []
    dataset = prepare(data(source, tmp_path / "data", storage=storage), log=lines.append)
    assert dataset.bit_depth == 12
    assert any("use 12 bits" in line for line in lines)
    for split in dataset.splits.values():
        for image, name in zip(split.read(np.arange(len(split))), split.names, strict=True):
            # Dark images stay dark relative to bright ones.
            number = int(pathlib.Path(name).stem)
            assert image.max() == (4095 // (number + 1)) >> 4
    again = prepare(data("", tmp_path / "data", storage=storage), log=quiet)
    assert again.bit_depth == 12
    # In a separate cache, using the setting.
    other = prepare(data("", tmp_path / "data", storage=storage, bit_depth=16), log=quiet)
    assert other.bit_depth == 16
    brightest = [split.read(np.arange(len(split))).max() for split in other.splits.values()]
    assert max(brightest) == 15
    assert prepare(data("", tmp_path / "data", storage=storage), log=quiet).bit_depth == 12


def rewrite_info(cache: pathlib.Path, **changes: Any) -> None:
    """Turns a cache into one of an older version, and edits its description."""
    info = json.loads((cache / "info.json").read_text()) | changes
    del info["bit_depth"], info["sha256 of this"]
    (cache / "info.json").write_text(json.dumps(info))


def test_data_of_older_version_are_unchanged(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "x", sixteen_bits(4095))
    prepare(data(source, tmp_path / "data"), log=quiet)
    rewrite_info(tmp_path / "data" / "inception_jax" / f"image_folder-1.0.0-{SIZE}px")
    lines: list[str] = []
    assert prepare(data("", tmp_path / "data"), log=lines.append).bit_depth == 16
    (line,) = lines
    assert "prepared by an older version" in line and "such as" in line
    # Its records, used for other sizes, lack the bit depth too.
    stored = tmp_path / "data" / "image_folder" / "1.0.0" / "metadata.json"
    metadata = json.loads(stored.read_text())
    del metadata["bit_depth"]
    stored.write_text(json.dumps(metadata))
    for _ in range(2):
        smaller: list[str] = []
        assert (
            prepare(data("", tmp_path / "data", image_size=8), log=smaller.append).bit_depth == 16
        )
        assert any("prepared by an older version" in line for line in smaller)
    deep = prepare(data("", tmp_path / "data", image_size=8, bit_depth=12), log=smaller.append)
    assert deep.bit_depth == 12 and deep.train.read(np.arange(6)).max() > 100
    photos = write(tmp_path / "y", archives.class_folders(COUNTS, SIZE))
    prepare(data(photos, tmp_path / "photos"), log=quiet)
    rewrite_info(tmp_path / "photos" / "inception_jax" / f"image_folder-1.0.0-{SIZE}px")
    prepare(data("", tmp_path / "photos"), log=lines.append)
    assert len(lines) == 1, "JPEGs mean what they meant"


def green(count: int) -> dict[str, bytes]:
    """Returns images in two classes with only one nonzero channel."""
    files = {}
    for name in ("a", "b"):
        for number in range(count):
            array = np.zeros((SIZE, SIZE, 3), np.uint8)
            array[number:, :, 1] = 40 * (number + 1)
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, format="PNG")
            files[f"{name}/{number}.png"] = buffer.getvalue()
    return files


def test_std_of_constant_channel_is_1_and_logged(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "x", green(4))
    lines: list[str] = []
    for _ in range(2):
        dataset = prepare(data(source, tmp_path / "data"), log=lines.append)
        np.testing.assert_array_equal(dataset.std[[0, 2]], 1)
        assert 0 < dataset.std[1] < 1
    assert sum("the same red (0) and blue (0); using a standard" in line for line in lines) == 2
    # As in older versions.
    cache = tmp_path / "data" / "inception_jax" / f"image_folder-1.0.0-{SIZE}px"
    rewrite_info(cache, std=[0.0, 0.1, 0.0])
    np.testing.assert_allclose(prepare(data("", tmp_path / "data"), log=quiet).std, [1, 0.1, 1])
    black = json.loads((cache / "info.json").read_text()) | {"std": [0.0, 0.0, 0.0]}
    (cache / "info.json").write_text(json.dumps(black))
    with pytest.raises(
        DataError, match=r"are the same single color.* remove .*to prepare them again"
    ):
        prepare(data("", tmp_path / "data"), log=quiet)


def test_single_color_images_are_logged_and_refused_if_all(
    tmp_path: pathlib.Path,
) -> None:
    black = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(black, format="PNG")
    files = {f"{name}/{n}.png": black.getvalue() for name in ("a", "b") for n in range(3)}
    with pytest.raises(DataError, match=r"all training images are the same single color"):
        prepare(data(write(tmp_path / "x", files), tmp_path / "data"), log=quiet)
    assert not list((tmp_path / "data" / "inception_jax").glob("*px*"))
    lines: list[str] = []
    files |= {f"a/more{n}.png": content for n, content in enumerate(green(4).values())}
    prepare(data(write(tmp_path / "y", files), tmp_path / "y-data"), log=lines.append)
    assert any("train images are a single color" in line and "b/" in line for line in lines)


def test_at_most_ten_files_are_named(tmp_path: pathlib.Path) -> None:
    files = archives.class_folders({"a": 2, "b": 2}, SIZE)
    files |= {f"a/bad{n:02d}": b"" for n in range(13)}
    with pytest.raises(DataError, match=r"(?s)13 of 17 .*bad09 and 3 more\. Download") as error:
        prepare(data(write(tmp_path / "x", files), tmp_path), log=quiet)
    assert "bad10" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"empty/": b""}, "1 of 3 classes have no training images: 'empty'"),
        ({"none/x.jpg": b"no image"}, "1 of 3 classes have no training images: 'none'"),
    ],
)
@pytest.mark.parametrize("name", ["x.zip", "folder"])
def test_class_without_images_is_refused(
    tmp_path: pathlib.Path, name: str, files: dict[str, bytes], message: str
) -> None:
    path = write(tmp_path / name, archives.class_folders({"a": 2, "b": 2}, SIZE) | files)
    with pytest.raises(DataError, match=message):
        prepare(data(path, tmp_path, on_unreadable="skip"), log=quiet)


def test_some_images_must_be_left_for_evaluation(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders({"a": 1, "b": 1}, SIZE))
    with pytest.raises(DataError, match="no images are left for evaluation"):
        prepare(data(path, tmp_path), log=quiet)


def test_empty_validation_folder_is_named(tmp_path: pathlib.Path) -> None:
    files = {f"train/{file}": each for file, each in archives.class_folders(COUNTS, SIZE).items()}
    path = write(tmp_path / "x", files)
    (path / "val").mkdir()
    with pytest.raises(DataError, match=r"\. Add images to val/, or remove it to hold out"):
        prepare(data(path, tmp_path), log=quiet)


@pytest.mark.parametrize("place", ["", "train/"])
@pytest.mark.parametrize("form", ["folder", "zip", "tar"])
def test_link_in_place_of_a_class_is_refused(form: str, place: str, tmp_path: pathlib.Path) -> None:
    images = archives.class_folders({"a": 2, "b": 2}, SIZE)
    path = write(tmp_path / "x", {f"{place}{file}": each for file, each in images.items()})
    os.symlink(tmp_path / "nowhere", path / place / "c")
    if form == "tar":
        shutil.make_archive(str(tmp_path / "x"), "tar", path)
        path = tmp_path / "x.tar"
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in path.rglob("*.*"):
                archive.write(file, file.relative_to(path))
            link = zipfile.ZipInfo(f"{place}c")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, "nowhere")
        path = tmp_path / "x.zip"
    with pytest.raises(DataError, match=rf"'{place}c': found a link that cannot be followed"):
        prepare(data(path, tmp_path / "data"), log=quiet)


def test_links_that_name_no_class_are_ignored(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders({"a": 4, "b": 4}, SIZE))
    (path / "README.md").write_text("notes")
    (path / "README").symlink_to("README.md")
    shutil.make_archive(str(tmp_path / "x"), "tar", path)
    assert prepare(data(tmp_path / "x.tar", tmp_path / "1"), log=quiet).class_names == ("a", "b")
    # A link that works, to a file without a time, as in reproducible images of a disk.
    (path / "list").symlink_to("README.md")
    os.utime(path / "README.md", (0, 0))
    assert prepare(data(path, tmp_path / "2"), log=quiet).class_names == ("a", "b")


def test_broken_link_is_reported(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders({"a": 2, "b": 2}, SIZE))
    os.symlink(tmp_path / "nowhere", path / "a" / "link.jpg")
    with pytest.raises(DataError, match=r"a broken link \(1\): a/link\.jpg\. "):
        prepare(data(path, tmp_path), log=quiet)


def test_a_damaged_member_is_named_once(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x.zip", archives.class_folders({"a": 2, "b": 2}, SIZE))
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"\(1\): a/0\.jpg\. Replace") as error:
        prepare(data(path, tmp_path), log=quiet)
    assert str(error.value).count(str(path)) == 1


def test_only_few_files_are_in_memory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x", archives.class_folders({"a": 50, "b": 50}, 8))
    builder = DATASETS.get("image_folder").build(config.Data())(
        source=str(path),
        log=quiet,
        data_dir=tmp_path,
        val_fraction=0.2,
        on_unreadable="refuse",
        layout="auto",
        archive_encoding="",
    )
    builder.open()
    reads: list[str] = []
    read_file, read_record, decode_image = FolderSource.read, Records.read_one, decode.decode

    def read(self: FolderSource, file: str) -> bytes:
        reads.append(file)
        return read_file(self, file)

    def in_turn(read: Any, files: Any, chunk_size: int = 1) -> Any:
        for part in decode.chunks(files, chunk_size):
            yield from [read(file) for file in part]

    with monkeypatch.context() as patched:
        patched.setattr(FolderSource, "read", read)
        # One chunk at a time; threads would keep up to 17.
        patched.setattr(decode, "threaded_map", in_turn)
        next(builder.examples(builder.splits()["train"]))
    assert len(reads) <= 2
    events: list[str] = []

    def read_one(self: Records, index: int) -> Any:
        events.append("read")
        return read_record(self, index)

    def decode_one(*arguments: Any, **more: Any) -> Any:
        events.append("decode")
        return decode_image(*arguments, **more)

    monkeypatch.setattr(decode, "threaded_map", in_turn)
    monkeypatch.setattr(Records, "read_one", read_one)
    monkeypatch.setattr(decode, "decode", decode_one)
    for storage in ("decoded", "records"):
        prepare(data(path, tmp_path, storage=storage), log=quiet)
    assert events == ["read", "decode"] * 200, "each is decoded before the next one is read"


def test_source_is_required(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"config\.data\.source = '': image_folder has no default"):
        prepare(data("", tmp_path), log=quiet)


def test_changed_content_or_settings_are_detected(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    directory = tmp_path / "data"
    prepare(data(source, directory), log=quiet)
    for size in (SIZE, 8):
        with pytest.raises(DataError, match=r"val_fraction = 0\.5: .* was prepared with 0\.2"):
            prepare(data("", directory, val_fraction=0.5, image_size=size), log=quiet)
    # Nothing was unreadable, so this setting did not matter.
    prepare(data(source, directory, on_unreadable="skip"), log=quiet)
    write(source, archives.class_folders(COUNTS | {"ant": 11}, SIZE))
    with pytest.raises(DataError, match=r"prepared from other content, .* at that time"):
        prepare(data(source, directory), log=quiet)
    assert len(prepare(data("", directory), log=quiet).train) == 14


def test_copy_without_timestamps_is_explained(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders(COUNTS, SIZE))
    prepare(data(path, tmp_path / "data"), log=quiet)
    os.utime(path / "ant" / "0.jpg", (1, 1))
    with pytest.raises(DataError, match=r"other content, .*, or copied without its timestamps\. L"):
        prepare(data(path, tmp_path / "data"), log=quiet)


def test_val_fraction_is_ignored_with_val_folder(tmp_path: pathlib.Path) -> None:
    files = archives.class_folders({"train/a": 2, "train/b": 2, "val/b": 1}, SIZE)
    path = write(tmp_path / "x", files)
    prepare(data(path, tmp_path), log=quiet)
    prepare(data(path, tmp_path, val_fraction=0.5), log=quiet)


def test_changed_source_is_prepared_again_if_configured(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    directory = tmp_path / "data"
    lines: list[str] = []
    for size in (SIZE, 8):
        prepare(data(source, directory, image_size=size), log=quiet)
    write(source, archives.class_folders(COUNTS | {"ant": 15}, SIZE))
    with pytest.raises(DataError, match=r"or set config\.data\.on_change=prepare to prepare it"):
        prepare(data(source, directory), log=quiet)
    again = data(source, directory, on_change="prepare")
    assert len(prepare(again, log=lines.append).train) == 18
    assert any("other content" in line and "preparing it again" in line for line in lines)
    # Done once for all sizes; the setting may be kept or removed.
    lines.clear()
    for settings in (again, data(source, directory), data("", directory)):
        assert len(prepare(settings, log=lines.append).train) == 18
    assert not lines
    assert len(prepare(data(source, directory, image_size=8), log=quiet).train) == 18


def test_touched_image_or_other_setting_is_prepared_again(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders(COUNTS, SIZE))
    before = prepare(data(path, tmp_path / "data"), log=quiet)
    os.utime(path / "ant" / "0.jpg", (1, 1))
    after = prepare(data(path, tmp_path / "data", on_change="prepare"), log=quiet)
    assert after.train.names == before.train.names
    half = data(path, tmp_path / "data", on_change="prepare", val_fraction=0.5)
    assert len(prepare(half, log=quiet).evaluation) == 9


def test_prepared_data_are_kept_if_source_is_invalid(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders(COUNTS, SIZE))
    prepare(data(path, tmp_path / "data"), log=quiet)
    (path / "ant" / "new.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 of 19 files"):
        prepare(data(path, tmp_path / "data", on_change="prepare"), log=quiet)
    assert len(prepare(data("", tmp_path / "data"), log=quiet).train) == 14


def test_non_images_are_skipped_and_logged_once(tmp_path: pathlib.Path) -> None:
    files = archives.class_folders(COUNTS, SIZE)
    thumbnail = files["ant/0.jpg"]
    litter = {"ant/@eaDir/0.jpg/THUMB.jpg": thumbnail, "Icon\r": b"", "wasp/urls.txt": b"x"}
    path = write(tmp_path / "x", files | litter)
    lines: list[str] = []
    dataset = prepare(data(path, tmp_path / "data"), log=lines.append)
    assert len(dataset.train) + len(dataset.evaluation) == 18
    (line,) = [line for line in lines if ": ignored " in line]
    assert "ignored 3 paths" in line
    assert line.endswith(r"Icon\r, ant/@eaDir/, wasp/urls.txt")
    assert any("'wasp': no images, so not used as a class" in line for line in lines)


@pytest.mark.parametrize("start", ["", "train/"])
def test_data_and_workdir_may_be_inside_the_source(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    val = {"val/ant": 2} if start else {}
    counts = {f"{start}{name}": count for name, count in COUNTS.items()} | val
    path = write(tmp_path / "x", archives.class_folders(counts, SIZE))
    monkeypatch.chdir(path)
    inside = data(".", pathlib.Path("."))
    first = prepare(inside, log=quiet)
    assert first.num_classes == 3
    # A run creates its folder first; files, logs and notes are added later.
    workdirs.check_writable(Workdir(path / "runs" / "x"))
    for step in range(2):
        lines: list[str] = []
        assert prepare(inside, log=lines.append).train.names == first.train.names
        assert not lines
        (path / "train.log").write_text(f"step {step}")
        (path / "notes").mkdir(exist_ok=True)
        (path / "notes" / "ideas.md").write_text(f"idea {step}")
        plots.write_figures(path / "runs" / "x" / "plots", [])
        prepare(data(".", pathlib.Path("data"), image_size=8), log=quiet)


def test_data_of_revision_56edb8b_stay_usable(tmp_path: pathlib.Path) -> None:
    files = archives.class_folders(COUNTS, SIZE) | {"README.md": b"pictures"}
    path = write(tmp_path / "x", files)
    prepare(data(path, tmp_path), log=quiet)
    with folders.open_source(path) as source:
        all_files = source.fingerprint()
    record_source(tmp_path, digest=all_files)
    lines: list[str] = []
    prepare(data(path, tmp_path), log=lines.append)
    assert not lines
    # Unless it treated the splits as classes, as revision 56edb8b did here.
    splits = archives.class_folders({f"seg_{s}/{c}": 3 for s in ("train", "test") for c in "ab"})
    path, directory = write(tmp_path / "y", splits), tmp_path / "splits"
    prepare(data(path, directory, layout="classes"), log=quiet)
    record_source(directory, settings={"val_fraction": 0.2})
    with pytest.raises(
        DataError, match=r"an older version chose .*\(.*without 'seg_test', 'seg_train'"
    ):
        prepare(data(path, directory), log=quiet)
    prepare(data(path, directory, layout="classes"), log=lines.append)
    assert not lines


def record_source(directory: pathlib.Path, **changes: Any) -> None:
    """Edits the cache's source description, as if written by another version."""
    (file,) = directory.glob("inception_jax/*/info.json")
    info = json.loads(file.read_text())
    del info["sha256 of this"]
    info["source"] |= changes
    file.write_text(json.dumps(info))


def test_layout_setting_is_recorded_with_prepared_data(tmp_path: pathlib.Path) -> None:
    counts = {f"{version}/{name}": 3 for version in ("color", "gray") for name in "ab"}
    path = write(tmp_path / "x.zip", archives.class_folders(counts, SIZE))
    dataset = prepare(data(path, tmp_path, layout="classes"), log=quiet)
    assert dataset.class_names == ("color", "gray")
    with pytest.raises(DataError, match=r"layout = 'auto': .* was prepared with 'classes'\. Set"):
        prepare(data("", tmp_path), log=quiet)
    one = data(path / "color", tmp_path, on_change="prepare")
    assert prepare(one, log=quiet).class_names == ("a", "b")
    # An existing archive need not contain the same folder.
    with pytest.raises(DataError, match="other content"):
        prepare(data(path / "gray", tmp_path), log=quiet)
    path.unlink()
    prepare(one, log=quiet)


@pytest.mark.parametrize("storage", ["decoded", "records"])
def test_duplicates_are_counted_and_named(tmp_path: pathlib.Path, storage: str) -> None:
    files = archives.class_folders({"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2}, SIZE)
    files |= {"val/a/copy.jpg": files["train/a/1.jpg"], "train/b/wrong.jpg": files["train/a/2.jpg"]}
    path = write(tmp_path / "x", files)
    lines: list[str] = []
    dataset = prepare(data(path, tmp_path, storage=storage), log=lines.append)
    assert dataset.eval_train_overlap == Duplicates(1, [("val/a/copy.jpg", "train/a/1.jpg")])
    assert any(
        "1 of 5 images in the validation split are also training images" in line
        and line.endswith("val/a/copy.jpg = train/a/1.jpg")
        for line in lines
    )
    (line,) = [line for line in lines if "different labels" in line]
    assert (
        "2 of 9 training images" in line and "train/b/wrong.jpg" in line and "train/a/2.jpg" in line
    )


def test_nothing_is_logged_without_duplicates(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders(COUNTS, SIZE))
    lines: list[str] = []
    dataset = prepare(data(path, tmp_path, holdout=3), log=lines.append)
    assert dataset.eval_train_overlap == Duplicates(0, [])
    assert not [
        line for line in lines if "also training images" in line or "different labels" in line
    ]


@pytest.mark.parametrize("storage", ["decoded", "records"])
def test_caches_may_be_on_another_disk(tmp_path: pathlib.Path, storage: str) -> None:
    (tmp_path / "disk" / "caches").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "inception_jax").symlink_to(tmp_path / "disk" / "caches")
    source = write(tmp_path / "x", archives.class_folders(COUNTS, SIZE))
    for _ in range(2):
        dataset = prepare(data(source, tmp_path / "data", storage=storage), log=quiet)
        assert dataset.train.read(np.arange(3)).shape == (3, SIZE, SIZE, 3)


def test_dark_16_bit_files_among_bright_ones_are_named(tmp_path: pathlib.Path) -> None:
    files = {}
    for name, highest in (("a/0", 4095), ("a/1", 4095), ("b/0", 65535), ("b/1", 4095)):
        values = np.linspace(0, highest, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
        content = io.BytesIO()
        Image.fromarray(values).save(content, "PNG")
        files[f"{name}.png"] = content.getvalue()
    lines: list[str] = []
    prepare(data(write(tmp_path / "x", files), tmp_path / "d"), log=lines.append)
    (line,) = [line for line in lines if "almost black" in line]
    assert "3 of the 4 files" in line and "such as b/0.png" in line
    assert "config.data.bit_depth=12" in line


def test_mutual_links_are_followed_once(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders({"a": 3, "b": 3}, SIZE))
    (path / "a" / "l").symlink_to(path / "b")
    (path / "b" / "l").symlink_to(path / "a")
    dataset = prepare(data(path, tmp_path / "d"), log=quiet)
    assert len(dataset.train) + len(dataset.evaluation) == 12


@pytest.mark.parametrize("copy", ["cat - Copy", "cat copy 2", "cat (1)", "Copy of cat"])
def test_copy_of_a_class_folder_is_refused(tmp_path: pathlib.Path, copy: str) -> None:
    path = write(tmp_path / "x", archives.class_folders({"cat": 2, "dog": 2, copy: 2}, SIZE))
    with pytest.raises(DataError, match=r"looks like a copy of 'cat', next to it\. Move it away"):
        prepare(data(path, tmp_path / "d"), log=quiet)
    dataset = prepare(data(path, tmp_path / "d", layout="classes"), log=quiet)
    assert set(dataset.class_names) == {"cat", "dog", copy}


def test_class_named_like_temporary_file_is_kept(
    tmp_path: pathlib.Path,
) -> None:
    files = archives.class_folders({"C~": 2, "bird.tmp": 2}, SIZE)
    litter = {"C~/0.jpg:Zone.Identifier": b"x", "C~/1.jpg~": b"x", "FOUND.001/a.jpg": b"x"}
    dataset = prepare(data(write(tmp_path / "x", files | litter), tmp_path / "d"), log=quiet)
    assert dataset.class_names == ("C~", "bird.tmp")
