"""ImageNet from small archives of the official layout, and as TFDS's own builder writes it."""

import errno
import gzip
import io
import json
import os
import pathlib
import shutil
import tarfile
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inception_jax import config
from inception_jax.datasets import decode
from inception_jax.datasets.builders import imagenet
from inception_jax.datasets.dataset import Dataset, prepare
from inception_jax.errors import DataError
from inception_jax.registry import DATASETS
from tests import archives

WNIDS = tuple(archives.wnid(label) for label in range(3))
VALIDATION = tuple(WNIDS[label] for label in (2, 0, 0, 1))
SIZE = 16


def quiet(line: str) -> None:
    pass


def image_file(label: int, number: int, kind: str = "") -> bytes:
    """Returns an image of the class's colour, of a size of its own."""
    rng = np.random.default_rng(number)
    pixels = archives.pixels(label, 48, rng)[: 40 - 3 * number]
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    if kind == "cmyk":
        picture = picture.convert("CMYK")
    picture.save(buffer, format="PNG" if kind == "png" else "JPEG", quality=95)
    return buffer.getvalue()


def train_files() -> dict[str, dict[str, bytes]]:
    """Returns the training images by class; one is CMYK and one a PNG, as in the original."""
    kinds = {(0, 1): "cmyk", (2, 0): "png"}
    return {
        wnid: {
            f"{wnid}_{10 * number}.JPEG": image_file(label, number, kinds.get((label, number), ""))
            for number in range(2 + label)
        }
        for label, wnid in enumerate(WNIDS)
    }


def validation_files() -> dict[str, bytes]:
    """Returns the validation images, in the order of their numbers."""
    return {
        f"ILSVRC2012_val_{number:08d}.JPEG": image_file(WNIDS.index(wnid), number)
        for number, wnid in enumerate(VALIDATION, start=1)
    }


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_source(
    folder: pathlib.Path, train: dict[str, dict[str, bytes]], validation: dict[str, bytes]
) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    outer = tar({f"{wnid}.tar": tar(files) for wnid, files in train.items()})
    (folder / imagenet.TRAIN).write_bytes(outer)
    # As in the original, the images do not lie in the order of their names.
    (folder / imagenet.VALIDATION).write_bytes(tar(dict(reversed(validation.items()))))
    return folder


def settings(directory: pathlib.Path, source: object = "", **changes: Any) -> config.Data:
    values = {"image_size": SIZE, "storage": "records", "workers": 2} | changes
    return config.Data(name="imagenet2012", source=str(source), directory=str(directory), **values)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the official files have three classes, nine training and four validation images."""
    monkeypatch.setattr(imagenet, "official", lambda: imagenet.Official(WNIDS, VALIDATION, 9))


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_source(tmp_path / "source", train_files(), validation_files())


def labels_by_name(dataset: Dataset, split: str) -> dict[str, int]:
    found = dataset.splits[split]
    return dict(zip(found.names, found.labels.tolist(), strict=True))


def check(dataset: Dataset) -> None:
    """Compares what was prepared with what was put into the archives."""
    assert dataset.class_names == WNIDS
    assert (dataset.train_split, dataset.eval_split) == ("train", "validation")
    train = {name: WNIDS.index(wnid) for wnid, files in train_files().items() for name in files}
    assert labels_by_name(dataset, "train") == train
    expected = [WNIDS.index(wnid) for wnid in VALIDATION]
    found = labels_by_name(dataset, "validation")
    assert [found[name] for name in sorted(found)] == expected
    for split in (dataset.train, dataset.evaluation):
        pixels = split.read(np.arange(len(split)))
        for image, label in zip(pixels, split.labels, strict=True):
            np.testing.assert_allclose(image.mean(axis=(0, 1)), archives.color(label), atol=12)


def test_what_is_prepared_is_what_the_archives_hold(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    check(prepare(settings(tmp_path, source), log=quiet))
    shutil.rmtree(source)
    lines: list[str] = []
    check(prepare(settings(tmp_path), log=lines.append))
    assert not lines, "the second time there is nothing to do"


def test_the_published_statistics_serve_and_nothing_is_decoded_for_them(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(decode, "decode", lambda *_: pytest.fail("an image was decoded"))
        streamed = prepare(settings(tmp_path, source), log=quiet)
    decoded = prepare(settings(tmp_path, storage="decoded"), log=quiet)
    for dataset in (streamed, decoded):
        np.testing.assert_allclose(dataset.mean, [0.485, 0.456, 0.406])
        np.testing.assert_allclose(dataset.std, [0.229, 0.224, 0.225])
    indices = np.arange(9)
    np.testing.assert_array_equal(streamed.train.read(indices), decoded.train.read(indices))
    np.testing.assert_array_equal(streamed.train.labels, decoded.train.labels)


def write_as_tfds_does(directory: pathlib.Path) -> None:
    """Writes the same images with the features, keys and version of TFDS's own builder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as original

    class Prepared(original.Builder, skip_registration=True):  # type: ignore[call-arg]
        name = "imagenet2012"
        url_infos = None

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            self.info.features["label"].names = list(WNIDS)
            train = [
                (name, {"file_name": name, "image": data, "label": wnid})
                for wnid, files in train_files().items()
                for name, data in files.items()
            ]
            validation = [
                (name, {"file_name": name, "image": data, "label": wnid})
                for (name, data), wnid in zip(validation_files().items(), VALIDATION, strict=True)
            ]
            test = [("t.JPEG", {"file_name": "t.JPEG", "image": image_file(0, 0), "label": -1})]
            return {"train": train, "validation": validation, "test": test}

        def _generate_examples(self, *args: Any) -> Any:
            raise NotImplementedError  # TFDS demands the method; _split_generators does without it.

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(encoding_format="jpeg"),
                        "label": tfds.features.ClassLabel(num_classes=None),
                        "file_name": tfds.features.Text(),
                    }
                ),
            )

    Prepared(data_dir=directory).download_and_prepare(file_format="array_record")


def test_what_tfds_prepared_is_read_and_is_the_same(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    write_as_tfds_does(tmp_path / "tfds")
    assert (tmp_path / "tfds/imagenet2012" / DATASETS.get("imagenet2012").version).is_dir()
    theirs = prepare(settings(tmp_path / "tfds"), log=quiet)
    check(theirs)
    ours = prepare(settings(tmp_path / "ours", source), log=quiet)
    assert theirs.train.names == ours.train.names
    assert theirs.evaluation.names == ours.evaluation.names
    assert theirs.splits["test"].labels.tolist() == [-1]


def test_the_version_and_features_are_those_of_tfds(tmp_path: pathlib.Path) -> None:
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as original

    theirs = original.Builder(data_dir=tmp_path)
    ours = DATASETS.get("imagenet2012").build(config.Data())(data_dir=tmp_path)
    assert (ours.name, ours.version) == (theirs.name, theirs.version)
    one, two = ours.info.features, theirs.info.features
    assert one.get_serialized_info() == two.get_serialized_info()
    assert {key: type(one[key]) for key in one} == {key: type(two[key]) for key in two}


def test_a_large_split_is_shuffled_to_the_same_order_without_tensorflow(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorflow_datasets.core import shuffle

    small = prepare(settings(tmp_path / "small", source), log=quiet)
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 100)
    large = prepare(settings(tmp_path / "large", source), log=quiet)
    check(large)
    assert large.train.names == small.train.names


def test_the_official_lists_are_those_that_tfds_comes_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    facts = imagenet.official()
    assert len(set(facts.wnids)) == 1000 and list(facts.wnids) == sorted(facts.wnids)
    counts = np.unique(facts.validation, return_counts=True)
    assert tuple(counts[0]) == facts.wnids and set(counts[1]) == {50}
    # The class of ILSVRC2012_val_00000001.JPEG is number 65, a sea snake.
    assert facts.wnids.index(facts.validation[0]) == 65
    assert facts.train_images == 1_281_167


# What is wrong with the source.


@pytest.mark.parametrize("given", ["", "elsewhere"])
def test_missing_archives_are_named_with_both_remedies(tmp_path: pathlib.Path, given: str) -> None:
    folder = tmp_path / given if given else tmp_path / "downloads/manual"
    data = settings(tmp_path, folder if given else "")
    with pytest.raises(DataError) as error:
        prepare(data, log=quiet)
    message = str(error.value)
    assert f"{folder} has no {imagenet.TRAIN} and no {imagenet.VALIDATION}" in message
    assert "tfds build imagenet2012 --file_format=array_record" in message
    write_source(folder, train_files(), validation_files())
    check(prepare(data, log=quiet))


def test_one_of_the_archives_stands_for_both(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    check(prepare(settings(tmp_path, source / imagenet.TRAIN), log=quiet))


def test_a_compressed_archive_is_said_to_be_one(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = source / imagenet.VALIDATION
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=r"img_val\.tar: is compressed \(gzip\), so .* in place"):
        prepare(settings(tmp_path, source), log=quiet)


def test_an_archive_that_may_not_be_read_leaves_none_open(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    original = os.open

    def refuse(path: Any, *arguments: Any, **settings: Any) -> int:
        if pathlib.Path(path).name == imagenet.VALIDATION:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        descriptor = original(path, *arguments, **settings)
        if pathlib.Path(path).name == imagenet.TRAIN:
            opened.append(descriptor)
        return descriptor

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(DataError, match=r"val\.tar: cannot be opened \(Permission denied\)"):
            prepare(settings(tmp_path, source), log=quiet)
    assert len(opened) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def broken(tmp_path: pathlib.Path, case: str) -> pathlib.Path:
    train, validation = train_files(), validation_files()
    if case == "image":
        del train[WNIDS[1]][f"{WNIDS[1]}_0.JPEG"]
    if case == "class":
        train["n00000001"] = train.pop(WNIDS[1])
    if case == "validation":
        validation.popitem()
    if case == "cut image":
        name = f"{WNIDS[1]}_0.JPEG"
        train[WNIDS[1]][name] = train[WNIDS[1]][name][:-30]
    folder = write_source(tmp_path / "source", train, validation)
    if case == "cut archive":
        path = folder / imagenet.TRAIN
        path.write_bytes(path.read_bytes()[:5000])
    if case == "no archive":
        (folder / imagenet.VALIDATION).write_bytes(b"x" * 2000)
    return folder


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("image", r"img_train\.tar: not the official archive, for it has 8 images \(expected 9\)"),
        ("class", r"1 missing classes \(such as n00001007\) and 1 unknown .* n00000001\)"),
        ("validation", r"img_val\.tar: .* it has 3 images \(expected 4\)"),
        ("cut image", r"img_train\.tar: n00001007_0\.JPEG: not a readable image"),
        ("cut archive", r"img_train\.tar: not (a whole tar|the official) archive"),
        ("no archive", r"img_val\.tar: not a whole tar archive \(2,000 bytes"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_remains(
    tmp_path: pathlib.Path, case: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(settings(tmp_path / "data", broken(tmp_path, case)), log=quiet)
    left = [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert left == ["imagenet2012-5.1.0.lock"]


def test_records_of_another_format_are_refused_with_the_remedy(tmp_path: pathlib.Path) -> None:
    write_as_tfds_does(tmp_path)
    path = tmp_path / "imagenet2012/5.1.0/dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match=r"stored as tfrecord, not as array_record.*convert_format"):
        prepare(settings(tmp_path), log=quiet)


def test_records_are_not_removed_where_there_is_nothing_to_make_them_from(
    tmp_path: pathlib.Path,
) -> None:
    write_as_tfds_does(tmp_path)
    folder = tmp_path / "imagenet2012/5.1.0"
    next(folder.glob("*train*")).unlink()
    left = sorted(folder.iterdir())
    with pytest.raises(DataError, match=r"has no ILSVRC2012_img_train\.tar"):
        prepare(settings(tmp_path), log=quiet)
    assert sorted(folder.iterdir()) == left
