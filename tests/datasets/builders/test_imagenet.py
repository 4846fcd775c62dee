"""ImageNet from small archives in the official layout, and as written by TFDS's builder."""

import errno
import gzip
import io
import json
import os
import pathlib
import re
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
from inception_jax.storage import buckets, paths
from tests import archives
from tests.gcs import Proxy

WNIDS = tuple(archives.wnid(label) for label in range(3))
VALIDATION = tuple(WNIDS[label] for label in (2, 0, 0, 1))
SIZE = 16


def quiet(line: str) -> None:
    pass


def image_file(label: int, number: int, kind: str = "") -> bytes:
    """Returns an image in the class's color, with a distinct size."""
    rng = np.random.default_rng(number)
    pixels = archives.pixels(label, 48, rng)[: 40 - 3 * number]
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if kind == "cmyk":
        image = image.convert("CMYK")
    image.save(buffer, format="PNG" if kind == "png" else "JPEG", quality=95)
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
    # As in the original, the images are not in the order of their names.
    (folder / imagenet.VALIDATION).write_bytes(tar(dict(reversed(validation.items()))))
    return folder


def settings(directory: pathlib.Path, source: object = "", **changes: Any) -> config.Data:
    values = {"image_size": SIZE, "storage": "records", "workers": 2} | changes
    return config.Data(name="imagenet2012", source=str(source), directory=str(directory), **values)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduces the official files to three classes, nine training and four validation images."""
    monkeypatch.setattr(
        imagenet, "official_metadata", lambda: imagenet.OfficialMetadata(WNIDS, VALIDATION, 9)
    )


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_source(tmp_path / "source", train_files(), validation_files())


def labels_by_name(dataset: Dataset, split: str) -> dict[str, int]:
    actual = dataset.splits[split]
    return dict(zip(actual.names, actual.labels.tolist(), strict=True))


def check(dataset: Dataset) -> None:
    """Compares the prepared data with the content of the archives."""
    assert dataset.class_names == WNIDS
    assert (dataset.train_split, dataset.eval_split) == ("train", "validation")
    train = {name: WNIDS.index(wnid) for wnid, files in train_files().items() for name in files}
    assert labels_by_name(dataset, "train") == train
    expected = [WNIDS.index(wnid) for wnid in VALIDATION]
    actual = labels_by_name(dataset, "validation")
    assert [actual[name] for name in sorted(actual)] == expected
    for split in (dataset.train, dataset.evaluation):
        pixels = split.read(np.arange(len(split)))
        for image, label in zip(pixels, split.labels, strict=True):
            np.testing.assert_allclose(image.mean(axis=(0, 1)), archives.color(label), atol=12)


def test_prepared_data_match_archives(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    check(prepare(settings(tmp_path, source), log=quiet))
    shutil.rmtree(source)
    lines: list[str] = []
    check(prepare(settings(tmp_path), log=lines.append))
    assert not lines, "the second time there is nothing to do"


@pytest.mark.parametrize("given", ["", f"/{imagenet.TRAIN}", f"/{imagenet.VALIDATION}"])
def test_source_in_a_bucket_is_both_archives(
    given: str, source: pathlib.Path, bucket: str, gcs: Proxy, tmp_path: pathlib.Path
) -> None:
    remote = paths.user_path(f"{bucket}/imagenet", "")
    for name in (imagenet.TRAIN, imagenet.VALIDATION):
        buckets.write_bytes(remote / name, (source / name).read_bytes())
    buckets.write_bytes(remote / "ILSVRC2012_img_test.tar", bytes(100))
    lines: list[str] = []
    data = settings(tmp_path / "data", f"{remote}{given}", cache=str(tmp_path / "cache"))
    check(prepare(data, log=lines.append))
    copy = tmp_path / "cache/sources" / str(remote).removeprefix("gs://")
    assert {path.name for path in copy.iterdir()} == {imagenet.TRAIN, imagenet.VALIDATION}
    assert f"{remote}{given}: using the copy {copy}, which may be removed afterwards" in lines
    # Nothing is downloaded if one of them is missing.
    buckets.delete(remote / imagenet.VALIDATION)
    gcs.clear()
    data = settings(tmp_path / "other", f"{remote}{given}", cache=str(tmp_path / "other_cache"))
    missing = f"'{remote}{given}': {imagenet.VALIDATION} not found in {remote}. Upload all files"
    with pytest.raises(DataError, match=re.escape(missing)):
        prepare(data, log=quiet)
    assert not gcs.find("read")


def test_damaged_archive_in_a_bucket_is_named(
    source: pathlib.Path, bucket: str, tmp_path: pathlib.Path
) -> None:
    remote = paths.user_path(f"{bucket}/imagenet", "")
    for name in (imagenet.TRAIN, imagenet.VALIDATION):
        buckets.write_bytes(remote / name, (source / imagenet.VALIDATION).read_bytes())
    data = settings(tmp_path / "data", remote / imagenet.TRAIN, cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"^{remote}/{imagenet.TRAIN}: "):
        prepare(data, log=quiet)


def test_published_statistics_are_used_without_decoding(
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
            raise NotImplementedError  # Abstract in TFDS, unused by _split_generators.

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


def test_data_prepared_by_tfds_are_identical(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
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


def test_official_lists_are_from_tfds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    facts = imagenet.official_metadata()
    assert len(set(facts.wnids)) == 1000 and list(facts.wnids) == sorted(facts.wnids)
    counts = np.unique(facts.validation, return_counts=True)
    assert tuple(counts[0]) == facts.wnids and set(counts[1]) == {50}
    # The class of ILSVRC2012_val_00000001.JPEG is number 65, a sea snake.
    assert facts.wnids.index(facts.validation[0]) == 65
    assert facts.train_images == 1_281_167


# Invalid sources.


@pytest.mark.parametrize("given", ["", "elsewhere"])
def test_missing_archives_are_named_with_remedies(tmp_path: pathlib.Path, given: str) -> None:
    folder = tmp_path / given if given else tmp_path / "downloads/manual"
    data = settings(tmp_path, folder if given else "")
    with pytest.raises(DataError) as error:
        prepare(data, log=quiet)
    message = str(error.value)
    assert f"{imagenet.TRAIN} and {imagenet.VALIDATION} not found in {folder}" in message
    assert "tfds build imagenet2012 --file_format=array_record" in message
    write_source(folder, train_files(), validation_files())
    check(prepare(data, log=quiet))


def test_either_archive_can_be_the_source(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    check(prepare(settings(tmp_path, source / imagenet.TRAIN), log=quiet))


def test_compressed_archive_is_reported(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = source / imagenet.VALIDATION
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=r"img_val\.tar: is compressed \(gzip\), so .* in place"):
        prepare(settings(tmp_path, source), log=quiet)


def test_unreadable_archive_leaves_no_open_files(
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
        ("image", r"img_train\.tar: not the official archive: it contains 8 images \(expected 9\)"),
        ("class", r"1 missing classes \(such as n00001007\) and 1 unknown .* n00000001\)"),
        ("validation", r"img_val\.tar: .* contains 3 images \(expected 4\)"),
        ("cut image", r"img_train\.tar: n00001007_0\.JPEG: not a readable image"),
        ("cut archive", r"img_train\.tar: not (a complete tar|the official) archive"),
        ("no archive", r"img_val\.tar: not a complete tar archive \(2,000 bytes"),
    ],
)
def test_problem_is_named_and_no_files_remain(
    tmp_path: pathlib.Path, case: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(settings(tmp_path / "data", broken(tmp_path, case)), log=quiet)
    left = [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert left == ["imagenet2012-5.1.0.lock"]


def test_other_record_format_is_refused_with_remedy(tmp_path: pathlib.Path) -> None:
    write_as_tfds_does(tmp_path)
    path = tmp_path / "imagenet2012/5.1.0/dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(
        DataError, match=r"stored as tfrecord; must be array_record.*convert_format"
    ):
        prepare(settings(tmp_path), log=quiet)


def test_records_are_kept_if_they_cannot_be_rebuilt(
    tmp_path: pathlib.Path,
) -> None:
    write_as_tfds_does(tmp_path)
    folder = tmp_path / "imagenet2012/5.1.0"
    next(folder.glob("*train*")).unlink()
    left = sorted(folder.iterdir())
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar and .* not found in"):
        prepare(settings(tmp_path), log=quiet)
    assert sorted(folder.iterdir()) == left
