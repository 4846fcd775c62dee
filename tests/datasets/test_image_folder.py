import io
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inception_jax import config
from inception_jax.datasets import folders, images, registry
from inception_jax.datasets.files import FolderSource
from inception_jax.datasets.records import Records
from inception_jax.errors import DataError
from inception_jax.evaluation import plots
from inception_jax.input.dataset import Dataset, prepare
from inception_jax.input.duplicates import Duplicates
from inception_jax.training import workdir as workdirs
from inception_jax.training.workdir import Workdir
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


def test_a_share_of_each_class_is_held_out(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    dataset = prepare(data(source, tmp_path / "data"), log=quiet)
    assert dataset.class_names == ("<i>bee&amp; co", "ant", "été")
    assert counts(dataset) == {
        "train": {"<i>bee&amp; co": 4, "ant": 8, "été": 2},
        "validation": {"<i>bee&amp; co": 1, "ant": 2, "été": 1},
    }
    for split in dataset.splits.values():
        pictures = split.read(np.arange(len(split)))
        for picture, label, name in zip(pictures, split.labels, split.names, strict=True):
            assert name.split("/")[0] == dataset.class_names[label]
            colour = archives.colour(label)
            np.testing.assert_allclose(picture.mean(axis=(0, 1)), colour, atol=8)


def test_records_are_read_without_the_source(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "x", archives.class_folders(COUNTS, SIZE))
    one = prepare(data(source, tmp_path / "data", storage="records"), log=quiet)
    shutil.rmtree(source)
    two = prepare(data(source, tmp_path / "data", image_size=8), log=quiet)
    assert one.class_names == two.class_names and one.train.names == two.train.names


def test_every_format_is_kept_as_it_is(tmp_path: pathlib.Path) -> None:
    picture = Image.fromarray(archives.pixels(0, SIZE, np.random.default_rng(0)))
    files = {}
    for number, kind in enumerate(["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"] * 2):
        buffer = io.BytesIO()
        picture.save(buffer, format=kind)
        # Names say nothing: what a file holds decides.
        files[f"{'ab'[number % 2]}/{number}.jpg"] = buffer.getvalue()
    dataset = prepare(data(write(tmp_path / "x", files), tmp_path), log=quiet)
    assert len(dataset.train) + len(dataset.evaluation) == 12
    for split in dataset.splits.values():
        pixels = split.read(np.arange(len(split))).astype(int)
        assert np.abs(pixels - np.asarray(picture)).mean() < 6


def test_a_test_folder_without_classes_has_no_labels(tmp_path: pathlib.Path) -> None:
    files = archives.class_folders({"train/a": 2, "train/b": 2, "val/b": 1, "test": 3}, SIZE)
    dataset = prepare(data(write(tmp_path / "x", files), tmp_path), log=quiet)
    assert dataset.splits["test"].labels.tolist() == [-1] * 3
    assert (len(dataset.train), dataset.evaluation.labels.tolist()) == (4, [1])


@pytest.mark.parametrize("test", [{"test/": b""}, {"test/.gitkeep": b""}, {"test/a.jpg": b"note"}])
@pytest.mark.parametrize("divided", [True, False])
def test_an_empty_test_folder_is_no_split(
    tmp_path: pathlib.Path, test: dict[str, bytes], divided: bool
) -> None:
    counts = {"train/a": 4, "train/b": 4} | ({"val/a": 1} if divided else {})
    path = write(tmp_path / "x", archives.class_folders(counts, SIZE) | test)
    lines: list[str] = []
    dataset = prepare(data(path, tmp_path, unreadable="skip"), log=lines.append)
    assert set(dataset.splits) == {"train", "validation"}
    assert any("the test folder has no picture" in line for line in lines)


BAD = {"ant/note": b"a note", "ant/in/cut.jpg": b"\xff\xd8\xff\xe0 and no more", "été/0": b""}


def test_unreadable_files_are_named_and_counted(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = source.with_stem("bad")
    write(source, archives.class_folders(COUNTS, SIZE) | BAD)
    with pytest.raises(
        DataError, match=r"3 of 21 files are no whole image: .*unreadable=skip"
    ) as e:
        prepare(data(source, tmp_path / "data"), log=quiet)
    assert all(f"{name} (" in str(e.value) for name in BAD)
    assert not (tmp_path / "data" / "image_folder").exists()
    lines: list[str] = []
    dataset = prepare(data(source, tmp_path / "data", unreadable="skip"), log=lines.append)
    assert len(dataset.train) + len(dataset.evaluation) == 18
    assert any("3 of 21 files" in line and "left out" in line for line in lines)
    stored = tmp_path / "data" / "image_folder" / "1.0.0" / "metadata.json"
    metadata = json.loads(stored.read_text())
    assert metadata["unreadable_count"] == 3
    assert sorted(metadata["unreadable_files"]) == sorted(BAD)
    # What was left out would now be refused.
    with pytest.raises(DataError, match=r"unreadable = 'refuse'.*prepared with 'skip'"):
        prepare(data("", tmp_path / "data"), log=quiet)


def test_no_more_than_ten_files_are_named(tmp_path: pathlib.Path) -> None:
    files = archives.class_folders({"a": 2, "b": 2}, SIZE)
    files |= {f"a/bad{n:02d}": b"" for n in range(13)}
    with pytest.raises(DataError, match=r"13 of 17 .*bad09 .* and 3 more\. Mend") as error:
        prepare(data(write(tmp_path / "x", files), tmp_path), log=quiet)
    assert "bad10" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"empty/": b""}, "no training picture of 1 of 3 classes: 'empty'"),
        ({"none/x.jpg": b"no image"}, "no training picture of 1 of 3 classes: 'none'"),
    ],
)
@pytest.mark.parametrize("name", ["x.zip", "folder"])
def test_a_class_without_pictures_is_refused(
    tmp_path: pathlib.Path, name: str, files: dict[str, bytes], message: str
) -> None:
    path = write(tmp_path / name, archives.class_folders({"a": 2, "b": 2}, SIZE) | files)
    with pytest.raises(DataError, match=message):
        prepare(data(path, tmp_path, unreadable="skip"), log=quiet)


def test_something_must_be_left_to_evaluate_on(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders({"a": 1, "b": 1}, SIZE))
    with pytest.raises(DataError, match="no picture is left to evaluate on"):
        prepare(data(path, tmp_path), log=quiet)


def test_a_dead_link_is_said_to_be_one(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders({"a": 2, "b": 2}, SIZE))
    os.symlink(tmp_path / "nowhere", path / "a" / "link.jpg")
    with pytest.raises(DataError, match=r"image: a/link\.jpg \(a link that leads nowhere\)\. Mend"):
        prepare(data(path, tmp_path), log=quiet)


def test_a_damaged_member_is_named_once(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x.zip", archives.class_folders({"a": 2, "b": 2}, SIZE))
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"image: a/0\.jpg \([^()]*\)\. Mend") as error:
        prepare(data(path, tmp_path), log=quiet)
    assert str(error.value).count(str(path)) == 1


def test_few_files_are_in_memory_at_a_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x", archives.class_folders({"a": 50, "b": 50}, 8))
    builder = registry.get("image_folder").builder_class()(
        source=str(path),
        log=quiet,
        data_dir=tmp_path,
        eval_share=0.2,
        unreadable="refuse",
        layout="auto",
        archive_encoding="",
    )
    builder.open()
    reads: list[str] = []
    read_file, read_records = FolderSource.read, Records.read

    def read(self: FolderSource, file: str) -> bytes:
        reads.append(file)
        return read_file(self, file)

    with monkeypatch.context() as patched:
        patched.setattr(FolderSource, "read", read)
        # One piece of work after another, of which threads hold up to 17.
        patched.setattr(images, "threaded_map", map)
        next(builder.examples(builder.splits()["train"]))
    assert len(reads) <= 2
    batches: list[int] = []

    def read_few(self: Records, indices: Sequence[int]) -> Any:
        batches.append(len(indices))
        return read_records(self, indices)

    monkeypatch.setattr(Records, "read", read_few)
    for storage in ("decoded", "records"):
        prepare(data(path, tmp_path, storage=storage), log=quiet)
    assert sum(batches) == 200 and max(batches) <= 8


def test_a_source_is_needed(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"config\.data\.source = '': image_folder has no download"):
        prepare(data("", tmp_path), log=quiet)


def test_changed_content_or_settings_are_noticed(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    directory = tmp_path / "data"
    prepare(data(source, directory), log=quiet)
    for size in (SIZE, 8):
        with pytest.raises(DataError, match=r"eval_share = 0\.5: .* was prepared with 0\.2"):
            prepare(data("", directory, eval_share=0.5, image_size=size), log=quiet)
    # Nothing was unreadable, so this setting decided nothing.
    prepare(data(source, directory, unreadable="skip"), log=quiet)
    write(source, archives.class_folders(COUNTS | {"ant": 11}, SIZE))
    with pytest.raises(DataError, match=r"prepared from other content, .* as it was then"):
        prepare(data(source, directory), log=quiet)
    assert len(prepare(data("", directory), log=quiet).train) == 14


def test_a_copy_without_its_times_is_told_what_it_may_be(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders(COUNTS, SIZE))
    prepare(data(path, tmp_path / "data"), log=quiet)
    os.utime(path / "ant" / "0.jpg", (1, 1))
    with pytest.raises(DataError, match=r"other content, .*, or copied without its times\. Leave"):
        prepare(data(path, tmp_path / "data"), log=quiet)


def test_the_share_does_not_matter_where_val_is_given(tmp_path: pathlib.Path) -> None:
    files = archives.class_folders({"train/a": 2, "train/b": 2, "val/b": 1}, SIZE)
    path = write(tmp_path / "x", files)
    prepare(data(path, tmp_path), log=quiet)
    prepare(data(path, tmp_path, eval_share=0.5), log=quiet)


def test_a_changed_source_is_prepared_again_where_a_setting_says_so(
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
    assert any("other content" in line and "it is prepared again" in line for line in lines)
    # It is done once, for all sizes, and the setting may stay or go.
    lines.clear()
    for settings in (again, data(source, directory), data("", directory)):
        assert len(prepare(settings, log=lines.append).train) == 18
    assert not lines
    assert len(prepare(data(source, directory, image_size=8), log=quiet).train) == 18


def test_a_touched_picture_or_another_setting_is_prepared_again(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders(COUNTS, SIZE))
    before = prepare(data(path, tmp_path / "data"), log=quiet)
    os.utime(path / "ant" / "0.jpg", (1, 1))
    after = prepare(data(path, tmp_path / "data", on_change="prepare"), log=quiet)
    assert after.train.names == before.train.names
    half = data(path, tmp_path / "data", on_change="prepare", eval_share=0.5)
    assert len(prepare(half, log=quiet).evaluation) == 9


def test_what_is_prepared_stays_where_the_source_cannot_be(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders(COUNTS, SIZE))
    prepare(data(path, tmp_path / "data"), log=quiet)
    (path / "ant" / "new.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 of 19 files"):
        prepare(data(path, tmp_path / "data", on_change="prepare"), log=quiet)
    assert len(prepare(data("", tmp_path / "data"), log=quiet).train) == 14


def test_what_is_no_picture_is_left_out_and_named_once(tmp_path: pathlib.Path) -> None:
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
    assert any("'wasp': without pictures, so not among the classes" in line for line in lines)


@pytest.mark.parametrize("start", ["", "train/"])
def test_data_and_run_may_lie_below_the_source(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    val = {"val/ant": 2} if start else {}
    counts = {f"{start}{name}": count for name, count in COUNTS.items()} | val
    path = write(tmp_path / "x", archives.class_folders(counts, SIZE))
    monkeypatch.chdir(path)
    inside = data(".", pathlib.Path("."))
    first = prepare(inside, log=quiet)
    assert first.num_classes == 3
    # A run makes its folder first; its files, logs and notes come and grow.
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


def test_what_revision_56edb8b_prepared_stays_usable(tmp_path: pathlib.Path) -> None:
    files = archives.class_folders(COUNTS, SIZE) | {"README.md": b"pictures"}
    path = write(tmp_path / "x", files)
    prepare(data(path, tmp_path), log=quiet)
    with folders.open_source(path) as source:
        all_files = source.fingerprint()
    record_source(tmp_path, digest=all_files)
    lines: list[str] = []
    prepare(data(path, tmp_path), log=lines.append)
    assert not lines
    # Unless it took the splits for classes, as revision 56edb8b took these.
    splits = archives.class_folders({f"seg_{s}/{c}": 3 for s in ("train", "test") for c in "ab"})
    path, directory = write(tmp_path / "y", splits), tmp_path / "splits"
    prepare(data(path, directory, layout="classes"), log=quiet)
    record_source(directory, settings={"eval_share": 0.2})
    with pytest.raises(
        DataError, match=r"by an older version, which took .*\(without 'seg_test', 'seg_train'"
    ):
        prepare(data(path, directory), log=quiet)
    prepare(data(path, directory, layout="classes"), log=lines.append)
    assert not lines


def record_source(directory: pathlib.Path, **changes: Any) -> None:
    """Changes what the decoded images say of their source, as if another version wrote them."""
    (file,) = directory.glob("inception_jax/*/info.json")
    info = json.loads(file.read_text())
    del info["sha256 of this"]
    info["source"] |= changes
    file.write_text(json.dumps(info))


def test_how_folders_are_read_is_part_of_what_is_prepared(tmp_path: pathlib.Path) -> None:
    counts = {f"{version}/{name}": 3 for version in ("color", "grey") for name in "ab"}
    path = write(tmp_path / "x.zip", archives.class_folders(counts, SIZE))
    dataset = prepare(data(path, tmp_path, layout="classes"), log=quiet)
    assert dataset.class_names == ("color", "grey")
    with pytest.raises(DataError, match=r"layout = 'auto': .* was prepared with 'classes'\. Give"):
        prepare(data("", tmp_path), log=quiet)
    one = data(path / "color", tmp_path, on_change="prepare")
    assert prepare(one, log=quiet).class_names == ("a", "b")
    # That an archive is there does not mean that the folder in it is the same.
    with pytest.raises(DataError, match="other content"):
        prepare(data(path / "grey", tmp_path), log=quiet)
    path.unlink()
    prepare(one, log=quiet)


@pytest.mark.parametrize("storage", ["decoded", "records"])
def test_equal_pictures_are_counted_and_named(tmp_path: pathlib.Path, storage: str) -> None:
    files = archives.class_folders({"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2}, SIZE)
    files |= {"val/a/copy.jpg": files["train/a/1.jpg"], "train/b/wrong.jpg": files["train/a/2.jpg"]}
    path = write(tmp_path / "x", files)
    lines: list[str] = []
    dataset = prepare(data(path, tmp_path, storage=storage), log=lines.append)
    assert dataset.trained_on == Duplicates(1, [("val/a/copy.jpg", "train/a/1.jpg")])
    assert any(
        "1 of 5 images of the validation split are also among those to train on" in line
        and line.endswith("val/a/copy.jpg = train/a/1.jpg")
        for line in lines
    )
    (line,) = [line for line in lines if "different labels" in line]
    assert "2 of 9 images" in line and "train/b/wrong.jpg" in line and "train/a/2.jpg" in line


def test_without_equal_pictures_nothing_is_said_of_them(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x", archives.class_folders(COUNTS, SIZE))
    lines: list[str] = []
    dataset = prepare(data(path, tmp_path, holdout=3), log=lines.append)
    assert dataset.trained_on == Duplicates(0, [])
    assert not [line for line in lines if "also among" in line or "different labels" in line]
