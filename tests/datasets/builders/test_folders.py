import itertools
import os
import pathlib
import unicodedata
from collections.abc import Sequence

import pytest

from inception_jax.datasets.builders import folders
from inception_jax.errors import DataError
from tests import archives


def read(path: pathlib.Path) -> folders.Layout:
    with folders.open_source(path) as source:
        return folders.layout(source)


def write(path: pathlib.Path, *names: str, root: str = "") -> pathlib.Path:
    return archives.write_files(path, dict.fromkeys(names, b""), root)


def labeled_files(layout: folders.Layout) -> dict[str, list[tuple[str, str]]]:
    return {split: [(e.file, e.label) for e in entries] for split, entries in layout.splits.items()}


@pytest.fixture(params=["x.zip", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / request.param


def test_class_folders_are_one_split(path: pathlib.Path) -> None:
    layout = read(write(path, "dog/1.jpg", "cat/old/deep/2", "cat/1.png", "README.md"))
    assert layout.classes == ("cat", "dog") and not layout.has_validation
    assert labeled_files(layout) == {
        "train": [("cat/1.png", "cat"), ("cat/old/deep/2", "cat"), ("dog/1.jpg", "dog")]
    }


@pytest.mark.parametrize(
    ("train", "val"),
    [
        *itertools.product(
            ["train", "Training"], ["val", "validation", "Valid", "test", "Testing"]
        ),
        ("training_set", "test_set"),
        ("seg_train", "seg_test"),
        ("train_images", "val_images"),
        ("TrainData", "DevData"),
        ("training-set", "evaluation set"),
        ("trainset", "evalset"),
        ("1_train", "2_eval"),
        ("train2017", "val2017"),
        ("ILSVRC_img_train", "ILSVRC_img_val"),
    ],
)
def test_split_folders_are_splits(path: pathlib.Path, train: str, val: str) -> None:
    layout = read(write(path, f"{train}/a/1", f"{train}/b/1", f"{val}/b/2", "classes.txt"))
    assert layout.classes == ("a", "b") and layout.has_validation
    assert labeled_files(layout) == {
        "train": [(f"{train}/a/1", "a"), (f"{train}/b/1", "b")],
        "validation": [(f"{val}/b/2", "b")],
    }


# Each with the folder from which each split is read.
NESTED = {
    "doubled": (
        ["seg_train/seg_train/a/1", "seg_train/seg_train/b/1", "seg_test/seg_test/a/1"],
        {"train": "seg_train/seg_train", "validation": "seg_test/seg_test"},
    ),
    "without classes": (
        ["x_train/x_train/a/1", "x_train/x_train/b/1", "x_test/x_test/1.jpg"],
        {"train": "x_train/x_train", "test": "x_test/x_test"},
    ),
    "pred": (
        ["seg_train/a/1", "seg_train/b/1", "seg_test/a/1", "seg_pred/seg_pred/1.jpg"],
        {"train": "seg_train", "validation": "seg_test", "test": "seg_pred/seg_pred"},
    ),
    "pred next to test": (
        ["train/a/1", "train/b/1", "val/a/1", "test/a/1", "single_prediction/1.jpg"],
        {"train": "train", "validation": "val", "test": "test", "unlabeled": "single_prediction"},
    ),
    "evaluation next to validation": (
        ["training/a/1", "training/b/1", "evaluation/a/1", "validation/b/1"],
        {"train": "training", "validation": "validation", "test": "evaluation"},
    ),
    "images": (
        ["train/images/a/1", "train/images/b/1", "val/images/a/1", "val/images/b/1"],
        {"train": "train/images", "validation": "val/images"},
    ),
    "unknown": (
        ["train/a/1", "train/b/1", "test/unknown/1.jpg"],
        {"train": "train", "test": "test/unknown"},
    ),
}


@pytest.mark.parametrize("case", NESTED)
def test_classes_may_be_deeper_in_a_split(path: pathlib.Path, case: str) -> None:
    names, expected = NESTED[case]
    layout = read(write(path, *names))
    assert layout.folders == expected and list(layout.splits) == list(expected)
    assert layout.classes == ("a", "b")
    for split, entries in layout.splits.items():
        assert entries and all(entry.file.startswith(expected[split]) for entry in entries)
    assert sorted(layout.files) == sorted(names)


def test_test_folder_is_third_split_with_val(path: pathlib.Path) -> None:
    layout = read(write(path, "train/a/1", "train/b/1", "val/a/2", "test/b/3"))
    assert labeled_files(layout)["test"] == [("test/b/3", "b")]


@pytest.mark.parametrize("has_validation", [True, False])
def test_test_folder_may_lack_classes(path: pathlib.Path, has_validation: bool) -> None:
    names = ["train/a/1", "train/b/1", "test/1.jpg", *["val/a/1"] * has_validation]
    layout = read(write(path, *names))
    assert labeled_files(layout)["test"] == [("test/1.jpg", "")]
    assert layout.has_validation == has_validation == ("validation" in layout.splits)


def test_outer_folders_are_entered(path: pathlib.Path) -> None:
    layout = read(write(path, "a/1", "b/1", "notes.txt", root="pets/train"))
    assert labeled_files(layout) == {"train": [("pets/train/a/1", "a"), ("pets/train/b/1", "b")]}


def test_folders_in_train_are_classes(path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="train: contains only one class, 'cat'"):
        read(write(path, "train/cat/old/1", "train/cat/new/1"))
    with pytest.raises(DataError, match="Training: contains only one class, 'cat'"):
        read(write(path.with_stem("more"), "pets/Training/cat/old/1", "pets/Training/cat/new/1"))


@pytest.mark.parametrize(
    "files", [["train/a/1", "train/b/1"], ["train/a/1", "train/b/1", "val/a/1"]]
)
def test_empty_test_folder_does_not_replace_val(path: pathlib.Path, files: list[str]) -> None:
    layout = read(write(path, *files, "test/"))
    assert labeled_files(layout)["test"] == []
    assert layout.has_validation == (len(files) == 3)


LITTER = [
    *(".DS_Store", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r", "._1.jpg", "Picasa.ini"),
    *(
        "__MACOSX/a/._1.jpg",
        "lost+found/#1",
        "@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg",
        "#recycle/1.jpg",
    ),
    *("System Volume Information/x", "$RECYCLE.BIN/desktop.ini", ".Trash-1000/files/1.jpg"),
    *("@Recently-Snapshot/1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "__pycache__/x.pyc"),
    *(
        ".git/x/1.jpg",
        "CVS/Entries",
        "CVS/Repository",
        ".picasaoriginals/1.jpg",
        ".thumbnails/1.jpg",
    ),
    *(
        "1.jpg~",
        "~$1.jpg",
        "1.jpg.part",
        "1.jpg.crdownload",
        "1.tmp",
        "#1.jpg#",
        ".stversions/1.jpg",
    ),
]


def test_recycled_may_be_a_class(path: pathlib.Path) -> None:
    layout = read(write(path, "glass/1", "paper/1", "recycled/1", "recycler/1"))
    assert layout.classes == ("glass", "paper", "recycled", "recycler")


def test_system_files_are_ignored_at_every_depth(path: pathlib.Path) -> None:
    litter = [f"{place}{name}" for place in ("", "a/", "a/deep/") for name in LITTER]
    layout = read(write(path, "a/1", "b/1", "a/deep/2", *litter))
    assert labeled_files(layout) == {"train": [("a/1", "a"), ("a/deep/2", "a"), ("b/1", "b")]}
    # Each is listed, or the folder that contains it.
    for name in litter:
        assert any(name.startswith(path) for path in layout.ignored), name


def test_system_folders_are_not_splits_or_classes(path: pathlib.Path) -> None:
    splits = ["train/a/1", "train/b/1", "val/a/2"]
    layout = read(write(path, *splits, *LITTER, "lost+found/", "val/lost+found/"))
    assert layout.classes == ("a", "b") and sorted(layout.files) == sorted(splits)


NOTES = ["README.md", "a/labels.csv", "notes/ideas.txt", "notes/old/train.log", "b/1.json"]
# Output of this program, before and after the first checkpoint.
OWN = [
    "runs/new/.inception_jax",
    *(
        "runs/x/run.lock",
        "runs/x/config.json",
        "runs/x/checkpoints/10/d/0a1b",
        "runs/x/plots/l.png",
    ),
    *("runs/x/report.html", "runs/x/predictions.npz", "runs/x/tensorboard/events.out.tfevents.1"),
    *("heatmaps/.inception_jax", "heatmaps/cat.png", "venv/pyvenv.cfg", "venv/share/logo.png"),
    *("data/inception_jax/image_folder-1.0.0.lock", "data/inception_jax/x-8px.partial/x.npy"),
    *("data/inception_jax/x-8px/info.json", "data/inception_jax/x-8px/train_labels.npy"),
    *("data/inception_jax/x-8px/train_images.npy", "image_folder/incomplete.AB12_1.0.0/x-00000"),
    *("image_folder/1.0.0/dataset_info.json", "image_folder/1.0.0/features.json"),
    "downloads/extracted/",
    "image_folder/1.0.0/image_folder-train.array_record-00000-of-00001",
]


@pytest.mark.parametrize("start", ["", "train/"])
def test_notes_and_program_output_are_ignored(path: pathlib.Path, start: str) -> None:
    images = [f"{start}a/1", f"{start}b/1", *["val/a/1"] * bool(start)]
    layout = read(write(path, *images, *NOTES, *OWN))
    assert layout.classes == ("a", "b") and sorted(layout.files) == sorted(images)
    for name in (*NOTES, *OWN):
        assert any(name.startswith(path) for path in layout.ignored), name
    # Folders that may have been meant as classes.
    assert layout.imageless_folders == ([] if start else ["notes", "runs"])


def test_run_next_to_classes_hides_no_images(path: pathlib.Path) -> None:
    run = ["run.lock", "config.json", "checkpoints/5/d/0", "plots/loss.png", "metrics.jsonl"]
    layout = read(write(path, "a/1", "b/1", *run, "a/run.lock", "a/plots/loss.png"))
    assert labeled_files(layout) == {"train": [("a/1", "a"), ("b/1", "b")]}


def test_empty_folder_is_class_without_images(path: pathlib.Path) -> None:
    assert read(write(path, "a/1", "b/1", "c/", "d/.gitkeep")).classes[:2] == ("a", "b")
    assert {"c", "d"} & set(read(path).classes)


def test_class_may_be_named_train(path: pathlib.Path) -> None:
    assert read(write(path, "train/1.jpg", "car/1.jpg")).classes == ("car", "train")
    names = ["test/1.jpg", "val/old/1.jpg", "val/val/1.jpg", "car/1.jpg"]
    assert read(write(path.with_stem("more"), *names)).classes == ("car", "test", "val")


def test_unusual_class_names_are_kept(path: pathlib.Path) -> None:
    odd = ["<b>&amp;", "Crème brûlée", "two words ", "猫", "a,b;'\"", "#%?"]
    layout = read(write(path, *(f"{name}/1.jpg" for name in odd)))
    assert layout.classes == tuple(sorted(name.strip() for name in odd))


def test_equivalent_unicode_names_are_one_class(path: pathlib.Path) -> None:
    composed, parted = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    layout = read(write(path, f"train/{composed}/1", "train/tea/1", f"val/{parted}/2"))
    assert layout.classes == (composed, "tea")
    assert layout.splits["validation"][0].label == composed


def test_displayed_name_is_one_line() -> None:
    assert folders.escape_for_display("a\nb\r\x85é/\udcff.jpg") == "a\\nb\\r\\x85é/\\udcff.jpg"


WRONG = {
    "loose images": (["1.jpg", "2.JPG"], r"2 images are not in a class folder, such as 1\.jpg"),
    "loose next to classes": (["a/1", "b/1", "3.png"], r"1 images are not in a class folder"),
    "loose in a split": (["train/a/1", "train/b/1", "val/a/1", "val/1.gif"], r"val: 1 images"),
    "no folder": (["notes.txt"], "contains no class folders"),
    "one class": (["cat/1.jpg"], "only one class, 'cat'"),
    "one class in train": (["train/cat/1.jpg", "val/cat/2.jpg"], r"only one class, 'cat'"),
    "foreign class": (
        ["train/a/1", "train/b/1", "val/a/1", "val/c/1", "val/d/1"],
        r"val: 'c', 'd': not found in train/",
    ),
    "two validation splits": (
        ["train/a/1", "train/b/1", "val/a/1", "valid/a/1"],
        "'val', 'valid': several folders for",
    ),
    "split and class": (["train/a/1", "train/b/1", "val/a/1", "c/1"], "'c' next to 'train'"),
    "train and class": (["train/a/1", "train/b/1", "c/1"], "'c' next to 'train'"),
    "val next to classes": (
        ["cat/1", "dog/1", "val/cat/1", "val/dog/1"],
        r"'val' contains folders with the same names .*move the training classes into train/",
    ),
    "no train": (["val/a/1", "test/a/1"], "contains 'test', 'val' but no train folder"),
    "notes alone": (
        ["a/1.txt", "b/2.csv"],
        r"no class folders\. Ignored: a/1\.txt, b/2\.csv\. Expected",
    ),
    "versions": (
        [f"{version}/{name}/1" for version in ("color", "gray") for name in ("a", "b")],
        r"'color' and 'gray' contain folders with the same names\. Either 'color', 'gray' are the "
        r"classes.*layout=classes\. Or they are versions of one data set with the classes 'a', 'b';"
        r".*config\.data\.source=.*/color$",
    ),
    "splits in classes": (
        [f"{name}/{split}/1" for name in ("a", "b") for split in ("train", "test")],
        "Or each class is split inside into 'test', 'train'",
    ),
    "splits in names": (
        [f"{name}_{split}/1" for name in ("a", "b") for split in ("train", "test")],
        "unclear whether these are classes, or splits of the classes 'a', 'b'",
    ),
    "flat splits": (["train/1.jpg", "test1/2.jpg"], "train: contains no class folders"),
    "copy": (
        ["a/1", "b/1", "all/a/1", "all/b/1"],
        r"'all' looks like a copy .*: it also contains 'a', 'b'.*source=.*/all to use only",
    ),
    "copy in a copy": (["a/1", "b/1", "x/y/z/a/1"], r"'x' looks like .*source=.*/x/y/z to use o"),
    "copy of one class": (["a/1", "b/1", "b/a/1"], "'b' looks like a copy .*also contains 'a'"),
    "copy of splits": (
        ["train/a/1", "train/b/1", "val/a/1", "chest/train/a/1", "chest/val/a/1"],
        r"'chest' next to 'train'.* contains its own train folder.*source=.*/chest to use that",
    ),
    "nothing": ([".DS_Store"], "contains no files"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_layouts_are_refused(path: pathlib.Path, case: str) -> None:
    names, message = WRONG[case]
    with pytest.raises(DataError, match=message) as error:
        read(write(path, *names))
    assert str(path) in str(error.value)


DOUBTFUL = ("versions", "splits in classes", "splits in names", "copy", "copy of one class")


@pytest.mark.parametrize("case", DOUBTFUL)
def test_layout_setting_makes_folders_classes(path: pathlib.Path, case: str) -> None:
    names, _ = WRONG[case]
    layout = folders.layout(folders.open_source(write(path, *names)), "classes")
    assert set(layout.classes) == {name.split("/")[0] for name in names}
    assert not layout.has_validation and sorted(layout.files) == sorted(names)


def test_source_path_may_continue_into_archive(path: pathlib.Path) -> None:
    names, _ = WRONG["versions"]
    layout = read(write(path, *names) / "color")
    assert labeled_files(layout) == {"train": [("a/1", "a"), ("b/1", "b")]}
    with pytest.raises(DataError, match=r"blue.*: (no such file or folder|contains no files)"):
        read(path / "blue")


def test_missing_path_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        DataError, match=r"config\.data\.source = .*nowhere.*no such file or folder"
    ):
        folders.open_source(tmp_path / "nowhere")


def test_file_that_is_not_an_archive_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"x\.jpg: neither a zip nor a tar archive"):
        folders.open_source(tmp_path / "x.jpg")


def test_links_are_followed_without_cycles(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "elsewhere", "1.jpg")
    write(tmp_path / "x", "a/1.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "x" / "b")
    os.symlink(tmp_path / "x", tmp_path / "x" / "a" / "back")
    assert labeled_files(read(tmp_path / "x")) == {"train": [("a/1.jpg", "a"), ("b/1.jpg", "b")]}


def digests(path: pathlib.Path) -> Sequence[str]:
    return folders.contents(path, {"layout": "auto", "archive_encoding": ""}).digests


def test_digest_depends_only_on_images(tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path / "x", "a/1.jpg", "b/1.jpg")
    before, _ = digests(folder)
    write(folder, *LITTER, *NOTES, *OWN, *(f"a/{name}" for name in LITTER))
    assert digests(folder)[0] == before
    (folder / "README.md").write_text("more")
    assert digests(folder)[0] == before
    (folder / "b" / "1.jpg").write_bytes(b"x")
    changed, _ = digests(folder)
    (folder / "b" / "1.jpg").rename(folder / "a" / "2.jpg")
    write(folder, "b/2.jpg")
    assert len({before, changed, digests(folder)[0]}) == 3


def test_digest_of_revision_56edb8b_is_accepted(path: pathlib.Path) -> None:
    # It included everything without a hidden name.
    write(path, "a/1.jpg", "b/1.jpg", "README.md")
    with folders.open_source(path) as source:
        assert len(source.sizes) == 3
        older = source.fingerprint()
    new, known = digests(path)
    assert known == older != new


COUNTS = {"a": 1, "b": 2, "c": 3, "d": 40, "e": 100}


@pytest.mark.parametrize(
    ("fraction", "held"),
    [
        (0.2, {"b": 1, "c": 1, "d": 8, "e": 20}),
        (0.01, {"b": 1, "c": 1, "d": 1, "e": 1}),
        (0.99, {"b": 1, "c": 2, "d": 39, "e": 99}),
    ],
)
def test_hold_out_takes_fraction_of_each_class(fraction: float, held: dict[str, int]) -> None:
    entries = [
        folders.LabeledFile(f"{c}/{n}.jpg", c) for c, count in COUNTS.items() for n in range(count)
    ]
    train, evaluation = folders.hold_out(entries, fraction)
    assert sorted(train + evaluation) == sorted(entries)
    labels = [entry.label for entry in evaluation]
    assert {label: labels.count(label) for label in sorted(set(labels))} == held
    # The listing order, which differs between systems, does not matter.
    assert set(folders.hold_out(entries[::-1], fraction)[1]) == set(evaluation)
    # A larger fraction holds out the same images and more.
    assert set(evaluation) <= set(folders.hold_out(entries, 0.99)[1])


def held_out(path: pathlib.Path) -> set[str]:
    """Returns the held-out files, as class and name."""
    layout = read(path)
    _, held = folders.hold_out(layout.splits["train"], 0.2, root=layout.root)
    return {"/".join(entry.file.split("/")[-2:]) for entry in held}


@pytest.mark.parametrize("root", ["pets", "my/pets", "train", "pets/Training"])
def test_hold_out_is_independent_of_outer_folders(tmp_path: pathlib.Path, root: str) -> None:
    names = [f"{label}/{number}.jpg" for label in ("cat", "dog") for number in range(40)]
    expected = held_out(write(tmp_path / "x", *names))
    assert len(expected) == 16
    assert held_out(write(tmp_path / "x.zip", *names, root=root)) == expected


def test_hold_out_is_independent_of_unicode_form(
    tmp_path: pathlib.Path,
) -> None:
    names = [f"{label}/é{number}.jpg" for label in ("café", "dog") for number in range(40)]
    composed, parted = (
        held_out(write(tmp_path / form, *(unicodedata.normalize(form, name) for name in names)))
        for form in ("NFC", "NFD")
    )
    assert composed == {unicodedata.normalize("NFC", name) for name in parted}


def test_equivalent_names_are_ranked_in_any_order() -> None:
    names = [unicodedata.normalize(form, "a/é.jpg") for form in ("NFC", "NFD")]
    entries = [folders.LabeledFile(name, "a") for name in names]
    assert folders.hold_out(entries, 0.5)[1] == folders.hold_out(entries[::-1], 0.5)[1]
