"""Data sets from functions, registered as a user does."""

import ast
import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inception_jax import config, registry
from inception_jax.config import Data
from inception_jax.datasets import recipe
from inception_jax.datasets.builders import base
from inception_jax.datasets.dataset import class_ids, prepare
from inception_jax.errors import ConfigError, DataError

RANDOM = np.random.default_rng(0)
COLOR = RANDOM.integers(0, 256, (30, 8, 8, 3), np.uint8)
GRAY = RANDOM.integers(0, 256, (30, 8, 8), np.uint8)
LABELS = np.arange(30) % 3


@pytest.fixture
def register() -> Iterator[Callable[..., Any]]:
    registry.DATASETS.names()  # Loads the built-in ones.
    before = dict(registry.DATASETS._parts)
    yield registry.register_dataset
    registry.DATASETS._parts.clear()
    registry.DATASETS._parts.update(before)


def quiet(line: str) -> None:
    pass


def data(folder: pathlib.Path, **changes: Any) -> Data:
    return Data(name="mine", directory=str(folder), image_size=8, **changes)


def pixels_by_name(dataset: Any, split: str) -> dict[str, np.ndarray]:
    actual = dataset.splits[split]
    return dict(zip(actual.names, actual.read(np.arange(len(actual))), strict=True))


def stream(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[Any, ...]]:
    yield from zip(images, labels, strict=True)


@pytest.mark.parametrize("storage", ["decoded", "records"])
@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (lambda: {"train": (COLOR, LABELS), "test": (COLOR[:6], LABELS[:6])}, ()),
        (
            lambda: {
                "train": stream(COLOR, LABELS),
                "test": zip(COLOR[:6], LABELS[:6], strict=True),
            },
            [*"abc"],
        ),
        (
            lambda: (
                {
                    "train": ([base.to_png(each) for each in COLOR], [*"abc"] * 10),
                    "test": [(each, "abc"[n % 3]) for n, each in enumerate(COLOR[:6])],
                },
                [*"abc"],
            ),
            (),
        ),
    ],
)
def test_all_return_formats_give_their_pixels_and_labels(
    returned: Any, names: Any, storage: str, tmp_path: pathlib.Path, register: Any
) -> None:
    @register("mine", class_names=names)
    def mine(settings: Data) -> Any:
        return returned()

    dataset = prepare(data(tmp_path, storage=storage), log=quiet)
    assert dataset.class_names == (("a", "b", "c") if dataset.class_names[0] == "a" else (*"012",))
    assert (len(dataset.train), dataset.eval_split, len(dataset.evaluation)) == (30, "test", 6)
    actual = pixels_by_name(dataset, "train")
    for number, image in enumerate(COLOR):
        np.testing.assert_array_equal(actual[f"train_{number:06d}"], image)
    order = [int(name.rpartition("_")[2]) for name in dataset.train.names]
    assert dataset.train.labels.tolist() == [number % 3 for number in order]
    assert order != sorted(order)
    np.testing.assert_allclose(dataset.mean, COLOR.mean((0, 1, 2)) / 255, rtol=1e-6)
    assert dataset.eval_train_overlap is not None and dataset.eval_train_overlap.total == 6


def test_grayscale_images_names_and_options(tmp_path: pathlib.Path, register: Any) -> None:
    @register("mine", options={"count": 30}, eval_split="dev")
    def mine(settings: Data) -> Any:
        count = settings.options["count"]
        names = [f"a\n{number}" for number in range(count)]
        return {
            "train": (GRAY[:count], LABELS[:count], names),
            "dev": (GRAY[:5, ..., None], LABELS[:5]),
            "test": (GRAY[:2], [-1, -1]),
        }

    settings = data(tmp_path, options={"count": 20})
    config.validate(config.Config(data=settings))
    dataset = prepare(settings, log=quiet)
    assert (dataset.eval_split, len(dataset.train)) == ("dev", 20)
    actual = pixels_by_name(dataset, "train")
    np.testing.assert_array_equal(actual["a\\n7"], np.repeat(GRAY[7][..., None], 3, axis=-1))
    assert dataset.splits["test"].labels.tolist() == [-1, -1]
    assert class_ids(settings) == ()


def test_data_are_prepared_once_and_again_after_changes(
    tmp_path: pathlib.Path, register: Any
) -> None:
    source = tmp_path / "original.bin"
    source.write_bytes(b"1")
    calls = []

    def first(settings: Data) -> Any:
        calls.append(settings.source)
        return {"train": (COLOR, LABELS), "test": (COLOR, LABELS)}

    def second(settings: Data) -> Any:
        calls.append(settings.source)
        return {"train": (COLOR[:15], LABELS[:15]), "test": (COLOR, LABELS)}

    register("mine", options={"a": (1, 2)})(first)
    folder = tmp_path / "data"
    for _ in range(2):
        prepare(data(folder, source=str(source)), log=quiet)
    assert calls == [str(source)]
    with pytest.raises(DataError, match=r"config\.data\.options = .*'a': 3.*was prepared with"):
        prepare(data(folder, options={"a": 3}), log=quiet)
    source.write_bytes(b"12")
    with pytest.raises(DataError, match=r"config\.data\.source = .*was prepared from other cont"):
        prepare(data(folder, source=str(source)), log=quiet)
    del registry.DATASETS._parts["mine"]
    register("mine", options={"a": (1, 2)})(second)
    with pytest.raises(
        DataError, match=r"test_from_function\.py, line \d+: the code of 'mine' has ch"
    ):
        prepare(data(folder), log=quiet)
    assert len(calls) == 1
    dataset = prepare(data(folder, on_change="prepare"), log=quiet)
    assert (len(calls), len(dataset.train)) == (2, 15)
    assert len(prepare(data(folder), log=quiet).train) == 15


def test_hold_out_replaces_evaluation_split(tmp_path: pathlib.Path, register: Any) -> None:
    @register("mine")
    def mine(settings: Data) -> Any:
        return {"train": (COLOR, LABELS)}

    dataset = prepare(data(tmp_path, holdout=6), log=quiet)
    assert (len(dataset.train), dataset.eval_split) == (24, "holdout")
    with pytest.raises(ConfigError, match=r"mine: cannot choose an evaluation split.*no others"):
        prepare(data(tmp_path), log=quiet)


def test_other_data_set_of_same_name_is_not_overwritten(
    tmp_path: pathlib.Path, register: Any
) -> None:
    prepare(Data(name="digits", directory=str(tmp_path), image_size=8), log=quiet)
    (tmp_path / "digits").rename(tmp_path / "mine")
    for file in (tmp_path / "mine/1.0.0").glob("digits-*"):
        file.rename(file.with_name(file.name.replace("digits", "mine")))

    @register("mine")
    def mine(settings: Data) -> Any:
        raise AssertionError

    with pytest.raises(DataError, match=r"contains another data set named 'mine'"):
        prepare(data(tmp_path), log=quiet)


PAIR = (COLOR, LABELS)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1, 2], r"returned a list; must be a mapping of splits, such as"),
        (PAIR, r"returned a tuple; must be a mapping"),
        ({"test": PAIR}, r"returned the splits 'test'; 'train' is missing"),
        ({}, r"returned the splits none"),
        ({"train": PAIR}, r"a second one is required for evaluation.*config\.data\.holdout"),
        ({"train": PAIR, "hold out": PAIR}, r"a split named 'hold out'"),
        ({"train": PAIR, "holdout": PAIR}, r"a split named 'holdout'"),
        ({"train": PAIR, "test": COLOR}, r"'test': has type ndarray; must be a tuple \(images"),
        ({"train": PAIR, "test": 3}, r"'test': has type int; must be"),
        ({"train": PAIR, "test": (COLOR,)}, r"'test': is a tuple of length 1; must be \(images, l"),
        ({"train": PAIR, "test": (COLOR, LABELS[:7])}, r"'test': 7 labels for 30 images"),
        ({"train": PAIR, "test": (*PAIR, ["a"])}, r"'test': 1 names for 30 images"),
        ({"train": PAIR, "test": (*PAIR, iter("a"))}, r"'test', names: have type str_.*iterator"),
        ({"train": PAIR, "test": (COLOR, iter([0]))}, r"'test', labels: have type list_iterator"),
        ({"train": PAIR, "test": (COLOR, [[0], [0, 1]])}, r"'test', labels: .*inhomogeneous"),
        ({"train": PAIR, "test": (b"x", LABELS)}, r"images: have type bytes; must be an array"),
        ({"train": (COLOR / 255, LABELS), "test": PAIR}, r"'train', images: has dtype float64"),
        ({"train": (COLOR, LABELS / 1), "test": PAIR}, r"'train', labels: have dtype float64"),
        ({"train": (COLOR, LABELS - 2), "test": PAIR}, r"'train', labels: contain -2"),
        ({"train": (COLOR, LABELS - 1), "test": PAIR}, r"'train', labels: contain -1"),
        (
            ({"train": PAIR, "test": PAIR}, ["a", "b"]),
            r"'train', labels: contain 2; must be 0 to 1 \(there are 2 classes\)",
        ),
        (
            ({"train": PAIR, "test": PAIR}, ["a", "a"]),
            r"class names: are 'a', 'a'; must be at leas",
        ),
        (({"train": PAIR, "test": PAIR}, 3), r"class names: have type int"),
        ({"train": [(COLOR[0], 0)], "test": PAIR}, r"'train': is an iterable of examples, whose"),
        (
            ({"train": [COLOR[0]], "test": PAIR}, [*"abc"]),
            r"'train', example 0: has type ndarray; must be \(image, label\)",
        ),
        (
            ({"train": [(COLOR[0], 0), (COLOR[:2], 1)], "test": PAIR}, [*"abc"]),
            r"'train', example 1: has shape \[2, 8, 8, 3\]; must be \[H, W, 3\]",
        ),
        (
            ({"train": [(COLOR[0], 3)], "test": PAIR}, [*"abc"]),
            r"'train', example 0: label = 3: must be 0 to 2, the name of one",
        ),
        (
            ({"train": [(COLOR[0], "d")], "test": PAIR}, [*"abc"]),
            r"'train', example 0: label = 'd'",
        ),
        (
            ({"train": [(b"no image", 0)], "test": PAIR}, [*"abc"]),
            r"'train', example 0: not a readable image",
        ),
        (
            ({"train": [(COLOR[0], 0, 5)], "test": PAIR}, [*"abc"]),
            r"'train', example 0: its name has type int",
        ),
        (({"train": [], "test": PAIR}, [*"abc"]), r"'train': contains no examples"),
        ({"train": (COLOR[:0], LABELS[:0]), "test": PAIR}, r"'train', images: has shape \[0"),
    ],
)
def test_invalid_return_value_is_refused(
    returned: Any, message: str, tmp_path: pathlib.Path, register: Any
) -> None:
    @register("mine")
    def mine(settings: Data) -> Any:
        return returned

    with pytest.raises(DataError, match=rf"line \d+: the data set 'mine'.*{message}"):
        prepare(data(tmp_path), log=quiet)
    assert not list(tmp_path.glob("mine/*"))
    assert not list(tmp_path.glob("inception_jax/*px*"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 1, "3 distinct values, up to 3; must be 0 to 2"),
        (LABELS * 0, "contain only one class"),
    ],
)
def test_labels_without_names_must_be_contiguous(
    labels: np.ndarray, message: str, tmp_path: pathlib.Path, register: Any
) -> None:
    register("mine")(lambda settings: {"train": (COLOR, labels), "test": (COLOR, labels)})
    with pytest.raises(DataError, match=rf"'train', labels: {message}"):
        prepare(data(tmp_path), log=quiet)


class Scalar:
    """A label as from an array of another library: no int, but usable as an index."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class OtherArray:
    """Labels in an array of another library, whose elements are arrays."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return LABELS

    def __len__(self) -> int:
        return len(LABELS)

    def __iter__(self) -> Iterator[Any]:
        return (np.asarray([label]) for label in LABELS)


def test_labels_may_come_from_another_library(tmp_path: pathlib.Path, register: Any) -> None:
    examples = [(image, Scalar(int(label))) for image, label in zip(COLOR, LABELS, strict=True)]
    register("mine")(lambda settings: {"train": (COLOR, OtherArray()), "test": examples})
    dataset = prepare(data(tmp_path), log=quiet)
    for split in dataset.splits.values():
        order = [int(name.rpartition("_")[2]) for name in split.names]
        assert split.labels.tolist() == [number % 3 for number in order]


def test_labels_may_be_text_of_a_table(tmp_path: pathlib.Path, register: Any) -> None:
    """pandas stores text as objects."""
    labels = np.array([*"abc"], object)[LABELS]
    splits = {"train": (COLOR, labels), "test": (COLOR, labels)}
    register("mine")(lambda settings: (splits, [*"abc"]))
    assert prepare(data(tmp_path), log=quiet).class_names == (*"abc",)


def test_paths_are_not_images(tmp_path: pathlib.Path, register: Any) -> None:
    examples = [("a.png", 0), ("b.png", 1)]
    register("mine", class_names=[*"ab"])(lambda settings: {"train": examples, "test": examples})
    with pytest.raises(
        DataError, match=r"has type str; .* read a file with np\.asarray\(PIL\.Image"
    ):
        prepare(data(tmp_path), log=quiet)


def test_options_that_cannot_be_stored_are_named(tmp_path: pathlib.Path, register: Any) -> None:
    register("mine", options={"root": tmp_path})(lambda settings: {"train": PAIR, "test": PAIR})
    with pytest.raises(ConfigError, match=r"options of the data set 'mine' must .*PosixPath"):
        prepare(data(tmp_path), log=quiet)


@pytest.mark.parametrize("error", [KeyError("camera"), OSError(5, "I/O error", "/mnt/1.jpg")])
def test_error_of_a_generator_is_the_functions(
    error: Exception, tmp_path: pathlib.Path, register: Any
) -> None:
    def examples() -> Iterator[Any]:
        yield COLOR[0], 0
        raise error

    register("mine", class_names=[*"abc"])(lambda settings: {"train": examples(), "test": PAIR})
    message = (
        rf"\.py, line \d+: the data set 'mine', split 'train', failed.*{type(error).__name__}: "
    )
    with pytest.raises(ConfigError, match=message):
        prepare(data(tmp_path), log=quiet)


def test_error_before_the_first_example_is_the_functions(
    tmp_path: pathlib.Path, register: Any
) -> None:
    class Lines:
        def __iter__(self) -> Iterator[Any]:
            raise FileNotFoundError(2, "No such file", "list.csv")

    register("mine", class_names=[*"abc"])(lambda settings: {"train": Lines(), "test": PAIR})
    with pytest.raises(ConfigError, match=r"'train', failed.*: FileNotFoundError: .*list\.csv"):
        prepare(data(tmp_path), log=quiet)


def test_16_bit_files_have_a_common_depth(tmp_path: pathlib.Path, register: Any) -> None:
    def png(most: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8), most, np.uint16)).save(buffer, format="PNG")
        return buffer.getvalue()

    files = [png(4095), png(160)]
    register("mine")(lambda settings: {"train": (files, [0, 1]), "test": (files, [0, 1])})
    dataset = prepare(data(tmp_path), log=quiet)
    assert dataset.bit_depth == 12
    pixels = pixels_by_name(dataset, "train")
    assert (pixels["train_000000"] == 255).all() and (pixels["train_000001"] == 10).all()
    assert prepare(data(tmp_path), log=quiet).bit_depth == 12


def test_quotes_of_f_strings_do_not_change_the_code(
    tmp_path: pathlib.Path, register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(settings: Data) -> Any:
        row = {"id": f"{len(settings.name)!r:>4}"}
        assert f"{row['id']}"
        return {"train": PAIR, "test": PAIR}

    register("mine")(mine)
    prepare(data(tmp_path), log=quiet)
    # Python 3.11 uses the other quotes there.
    real = ast.unparse
    monkeypatch.setattr(ast, "unparse", lambda tree: real(tree).replace("row['id']}", 'row["id"]}'))
    prepare(data(tmp_path), log=quiet)


def test_empty_parts_of_f_strings_do_not_change_the_code() -> None:
    """Python 3.12 adds them around a format that is itself replaced; 3.11 and 3.13 do not."""
    tree = recipe._FStringsAsTuples().visit(ast.parse('f"{x:{w}}" f"{y!r:>{w}}"'))
    assert ast.unparse(tree) == "((x, -1, ((w, -1, ''),)), (y, 114, ('>', (w, -1, ''))))"


def test_data_of_earlier_digests_stay_usable(
    tmp_path: pathlib.Path, register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(settings: Data) -> Any:
        assert f"{settings.name}"
        return {"train": PAIR, "test": PAIR}

    register("mine")(mine)
    with monkeypatch.context() as patch:
        patch.setattr(recipe._FStringsAsTuples, "visit", lambda self, tree: tree)
        prepare(data(tmp_path), log=quiet)
    prepare(data(tmp_path), log=quiet)


def test_holdout_of_unlabeled_examples_is_refused(tmp_path: pathlib.Path, register: Any) -> None:
    @register("mine")
    def mine(settings: Data) -> Any:
        labels = [-1, 0, 1, 2]
        return {"train": zip(COLOR, labels, strict=False), "test": PAIR}, [*"abc"]

    settings = data(tmp_path)
    settings.holdout = 3
    with pytest.raises(DataError, match="'train' is empty or contains unlabeled examples"):
        prepare(settings, log=quiet)


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("my-set", "1.0.0", r"'my-set'\): the name must consist of letters"),
        ("mine", "2", r"version='2'\): the version must be three numbers"),
        ("digits", "1.0.0", r"'digits' is already registered by .*catalog\.py"),
    ],
)
def test_invalid_name_or_version_is_refused(
    name: str, version: str, message: str, register: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        register(name, version=version)(lambda settings: {})
