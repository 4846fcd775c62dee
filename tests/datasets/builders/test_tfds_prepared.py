"""Data sets prepared by TFDS's own builders, read without TensorFlow."""

import json
import pathlib
import shutil
import sys
import types
from typing import Any, ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds

from inception_jax.config import Augment, Data, Evaluation, Schedule, Train
from inception_jax.datasets.builders import base, tfds_prepared
from inception_jax.datasets.dataset import Dataset, class_ids, prepare
from inception_jax.errors import ConfigError, DataError
from inception_jax.training import run, state
from inception_jax.training.step import make_train_step
from tests import small

Features = tfds.features


class Cifar100(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """As in TFDS, with fewer images: no feature file_name, and an additional label."""

    VERSION = tfds.core.Version("3.0.2")
    # The default requires the package importlib_resources.
    url_infos = None

    features: ClassVar[Any] = {
        "id": Features.Text(),
        "image": Features.Image(shape=(32, 32, 3)),
        "label": Features.ClassLabel(num_classes=100),
        "coarse_label": Features.ClassLabel(num_classes=20),
    }
    keys: Any = ("image", "label")
    counts: ClassVar[Any] = {"train": 200, "test": 100}
    dtype = np.uint8

    def _info(self) -> tfds.core.DatasetInfo:
        features = Features.FeaturesDict(self.features)
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=self.keys)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self.counts}

    def _generate_examples(self, split: str) -> Any:
        for number in range(self.counts[split]):
            yield number, self.example(split, number)

    def example(self, split: str, number: int) -> dict[str, Any]:
        return {
            "id": f"{split}_{number}",
            "image": base.to_png(image(split, number)),
            "label": number % 100,
            "coarse_label": number % 20,
        }


def image(split: str, number: int) -> np.ndarray:
    seed = number + 1000 * (split == "test")
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


def build(
    folder: pathlib.Path, kind: type = Cifar100, *, version: str = "3.0.2", **facts: Any
) -> pathlib.Path:
    """Prepares a data set and returns its folder."""
    body = {"VERSION": tfds.core.Version(version), "name": "cifar100", **facts}
    made = types.new_class("Made", (kind,), {"skip_registration": True}, lambda b: b.update(body))
    builder = made(data_dir=folder)
    tfds.disable_progress_bar()
    builder.download_and_prepare(file_format="array_record")
    return pathlib.Path(builder.data_dir)


def data(folder: pathlib.Path, **changes: Any) -> Data:
    return Data(
        **({"name": "tfds", "tfds": "cifar100", "directory": str(folder), "image_size": 32})
        | changes
    )


def read(dataset: Dataset, split: str) -> dict[str, np.ndarray]:
    actual = dataset.splits[split]
    return dict(zip(actual.names, actual.read(np.arange(len(actual))), strict=True))


@pytest.mark.parametrize("storage", ["decoded", "records"])
def test_cifar100_is_opened_by_name(storage: str, tmp_path: pathlib.Path) -> None:
    build(tmp_path)
    lines: list[str] = []
    dataset = prepare(data(tmp_path, storage=storage), log=lines.append)
    assert (dataset.name, dataset.version, dataset.num_classes) == ("cifar100", "3.0.2", 100)
    assert (dataset.train_split, dataset.eval_split) == ("train", "test")
    actual = read(dataset, "train")
    assert len(actual) == 200
    for number in range(200):
        np.testing.assert_array_equal(actual[f"train_{number}"], image("train", number))
    numbers = [int(name.rpartition("_")[2]) for name in dataset.evaluation.names]
    assert dataset.evaluation.labels.tolist() == numbers
    whole = np.stack([*actual.values()]) / 255
    np.testing.assert_allclose(dataset.mean, whole.mean((0, 1, 2)), rtol=1e-6)
    assert class_ids(data(tmp_path)) == ()
    # Nothing is prepared the second time.
    again: list[str] = []
    prepare(data(tmp_path, storage=storage), log=again.append)
    assert lines and not again
    assert "tensorflow" not in sys.modules


def test_prepared_tfds_data_train_two_steps(tmp_path: pathlib.Path) -> None:
    build(tmp_path)
    config = small.config(
        tmp_path,
        data=data(tmp_path),
        augment=Augment(crop="none", flip=False),
        schedule=Schedule(name="constant", learning_rate=0.01),
        train=Train(batch_size=40),
        evaluation=Evaluation(batch_size=50),
    )
    this = run.assemble(config, log=lambda line: None)
    assert this.dataset.num_classes == 100
    _, create = state.lower_init(this)
    now, step = create(), make_train_step(this, 32)
    from inception_jax.input import pipeline

    for batch in pipeline.train_batches(
        this.dataset.train, batch_size=40, seed=0, start=0, stop=2, mesh=this.mesh
    ):
        now = step(now, batch)[0]
    assert int(now.step) == 2


def test_slices_of_a_split_are_trained_and_evaluated(tmp_path: pathlib.Path) -> None:
    build(tmp_path)
    whole = prepare(data(tmp_path), log=lambda line: None)
    parts = prepare(
        data(tmp_path, train_split="train[:90%]", eval_split="train[90%:]"), log=lambda line: None
    )
    assert parts.eval_split == "holdout"
    assert parts.train.names + parts.evaluation.names == whole.train.names
    assert (len(parts.train), len(parts.evaluation)) == (180, 20)
    swapped = prepare(
        data(tmp_path, train_split="test", eval_split="train[-30:]"), log=lambda line: None
    )
    assert swapped.evaluation.names == whole.train.names[-30:]
    # The statistics are those of the training split.
    pixels = swapped.train.read(np.arange(100)) / 255
    np.testing.assert_allclose(swapped.mean, pixels.mean((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_split": "trian"}, r"train_split = 'trian': no such split; must be one of train"),
        ({"train_split": "train+test"}, r"train_split = 'train\+test': must be a split name or"),
        ({"eval_split": "test[100:]"}, r"eval_split = 'test\[100:\]': selects none of the 100 ex"),
        (
            {"train_split": "train[:90%]", "eval_split": "train[80%:]"},
            r"eval_split = 'train\[80%:\]': overlaps config\.data\.train_split",
        ),
        ({"eval_split": "train"}, r"eval_split = 'train': overlaps"),
        ({"tfds": "cifar100/a b"}, r"config\.data\.tfds = 'cifar100/a b': must be the name"),
    ],
)
def test_invalid_split_is_refused(
    changes: dict[str, str], message: str, tmp_path: pathlib.Path
) -> None:
    build(tmp_path, counts={"train": 10, "test": 100})
    with pytest.raises(ConfigError, match=message):
        prepare(data(tmp_path, **changes), log=lambda line: None)


def test_ambiguous_evaluation_split_must_be_configured(
    tmp_path: pathlib.Path,
) -> None:
    build(tmp_path, counts={"train": 10, "a": 5, "b": 5})
    with pytest.raises(ConfigError, match=r"cannot choose .*are a, b\); set config\.data\.ev"):
        prepare(data(tmp_path), log=lambda line: None)
    assert prepare(data(tmp_path, eval_split="b"), log=lambda line: None).eval_split == "b"


def test_missing_data_set_is_answered_with_the_command(tmp_path: pathlib.Path) -> None:
    message = (
        rf"tfds = 'cifar100': no prepared data set in {tmp_path}/cifar100\. Prepare it once in an "
        rf"environment with TensorFlow: tfds build cifar100 --file_format=array_record "
        rf"--data_dir={tmp_path}"
    )
    with pytest.raises(DataError, match=message):
        prepare(data(tmp_path), log=lambda line: None)


def test_newest_version_and_only_configuration_are_used(tmp_path: pathlib.Path) -> None:
    counts = {"train": 10, "test": 5}
    for version in ("3.0.2", "3.0.10"):
        build(tmp_path, version=version, counts=counts)
    lines: list[str] = []
    assert prepare(data(tmp_path), log=lines.append).version == "3.0.10"
    assert "contains the versions 3.0.2, 3.0.10; using the newest, 3.0.10" in lines[0]
    older = prepare(data(tmp_path, tfds="cifar100:3.0.2"), log=lambda line: None)
    assert older.version == "3.0.2"
    with pytest.raises(
        DataError, match=r"version 1\.0\.0 not found in .*contains 3\.0\.2, 3\.0\.10"
    ):
        prepare(data(tmp_path, tfds="cifar100:1.0.0"), log=lambda line: None)
    configured = tmp_path / "other/small/3.0.2"
    shutil.copytree(tmp_path / "cifar100/3.0.2", configured)
    info = configured / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"configName": "small"}))
    assert prepare(data(tmp_path, tfds="other"), log=lambda line: None).name == "other/small"
    shutil.copytree(configured, tmp_path / "other/large/3.0.2")
    with pytest.raises(ConfigError, match=r"several configurations: large, small; select one"):
        prepare(data(tmp_path, tfds="other"), log=lambda line: None)


class Unnamed(Cifar100, skip_registration=True):  # type: ignore[call-arg]
    """16-bit grayscale images without a name or supervised_keys, with a class list."""

    features: ClassVar[Any] = {
        "picture": Features.Image(shape=(8, 8, 1), dtype=np.uint16, encoding_format="png"),
        "kind": Features.ClassLabel(names=["cat", "dog"]),
    }
    keys = None
    counts: ClassVar[Any] = {"train": 6, "test": 4}

    def example(self, split: str, number: int) -> dict[str, Any]:
        import io

        from PIL import Image

        buffer = io.BytesIO()
        values = np.full((8, 8), 100 * (number + 1), np.uint16)
        values[0, 0] = 4095 if number == 0 else 0
        Image.fromarray(values).save(buffer, "PNG")
        return {"picture": buffer.getvalue(), "kind": "dog" if number % 2 else "cat"}


def test_16_bit_images_without_names_keep_brightness(tmp_path: pathlib.Path) -> None:
    build(tmp_path, Unnamed)
    dataset = prepare(data(tmp_path, image_size=8), log=lambda line: None)
    assert (dataset.class_names, dataset.bit_depth) == (("cat", "dog"), 12)
    assert dataset.train.names == tuple(f"{number:06d}" for number in range(6))
    # 12 bits, of which the upper 8 are kept.
    gray = {100 * (number + 1) >> 4 for number in range(6)}
    assert set(dataset.train.read(np.arange(6))[:, 4, 4, 0].tolist()) == gray


def test_new_build_of_the_same_version_is_noticed(tmp_path: pathlib.Path) -> None:
    build(tmp_path)
    settings = data(tmp_path)
    assert len(prepare(settings, log=lambda line: None).train) == 200
    (info,) = (tmp_path / "cifar100").rglob("dataset_info.json")
    info.with_name("README.txt").write_text("about it")
    assert len(prepare(settings, log=lambda line: None).train) == 200
    shutil.rmtree(tmp_path / "cifar100")
    build(tmp_path, counts={"train": 300, "test": 100})
    with pytest.raises(
        DataError, match=r"data\.tfds = 'cifar100': .*another build of .*/cifar100"
    ) as raised:
        prepare(settings, log=lambda line: None)
    assert "config.data.directory" not in str(raised.value), "it is where builds are looked for"
    settings.on_change = "prepare"
    assert len(prepare(settings, log=lambda line: None).train) == 300
    settings.on_change = "refuse"
    assert len(prepare(settings, log=lambda line: None).train) == 300


def test_cache_of_an_older_version_has_no_digest_of_the_build(tmp_path: pathlib.Path) -> None:
    build(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds_prepared.PreparedTfds, "facts", {})
        prepare(data(tmp_path), log=lambda line: None)
    assert len(prepare(data(tmp_path), log=lambda line: None).train) == 200


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"features": Cifar100.features | {"label": Features.Scalar(np.int64)}},
            r"'label' is not a ClassLabel; the features are .*coarse_label \(Cl",
        ),
        (
            {"keys": None},
            r"does not define which features are image and label \(supervised_keys = N",
        ),
        ({"keys": ("id", "label")}, r"'id' is not an image; the features are .*image \(Image\)"),
    ],
)
def test_unsupported_features_are_named(
    facts: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    build(tmp_path, counts={"train": 2, "test": 2}, **facts)
    with pytest.raises(DataError, match=message):
        prepare(data(tmp_path), log=lambda line: None)


def test_unlabeled_split_cannot_be_evaluated(tmp_path: pathlib.Path) -> None:
    class Unlabeled(Cifar100, skip_registration=True):  # type: ignore[call-arg]
        def example(self, split: str, number: int) -> dict[str, Any]:
            label = {"label": -1} if split == "test" else {}
            return super().example(split, number) | label

    build(tmp_path, Unlabeled, counts={"train": 4, "test": 2})
    with pytest.raises(DataError, match=r"the split 'test' is empty or contains unlabeled"):
        prepare(data(tmp_path), log=lambda line: None)
    parts = data(tmp_path, train_split="train[:2]", eval_split="train[2:]")
    assert len(prepare(parts, log=lambda line: None).evaluation) == 2


def test_other_format_is_answered_with_conversion_command(tmp_path: pathlib.Path) -> None:
    info = build(tmp_path, counts={"train": 2, "test": 2}) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"stored as tfrecord.*convert_format .*/cifar100/3\.0\.2"):
        prepare(data(tmp_path), log=lambda line: None)


def test_damaged_description_is_refused(tmp_path: pathlib.Path) -> None:
    (build(tmp_path, counts={"train": 2, "test": 2}) / "features.json").write_text("{")
    with pytest.raises(DataError, match=r"3\.0\.2: cannot be opened as a TFDS data set"):
        prepare(data(tmp_path), log=lambda line: None)


def test_missing_feature_is_not_reported_as_damage(tmp_path: pathlib.Path) -> None:
    features = build(tmp_path, counts={"train": 2, "test": 2}) / "features.json"
    content = json.loads(features.read_text())
    inner = content["featuresDict"]["features"]
    inner["file_name"] = inner["id"]
    features.write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"feature 'file_name' not found in example 0 \(it has coarse_l"
    ):
        prepare(data(tmp_path), log=lambda line: None)
    assert features.exists()
