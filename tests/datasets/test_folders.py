import os
import pathlib
import unicodedata

import pytest

from inception_jax.datasets import folders
from inception_jax.errors import DataError
from tests import archives


def read(path: pathlib.Path) -> folders.Layout:
    with folders.open_source(path) as source:
        return folders.layout(source)


def write(path: pathlib.Path, *names: str, root: str = "") -> pathlib.Path:
    return archives.write_files(path, dict.fromkeys(names, b""), root)


def found(layout: folders.Layout) -> dict[str, list[tuple[str, str]]]:
    return {split: [(e.file, e.label) for e in entries] for split, entries in layout.splits.items()}


@pytest.fixture(params=["x.zip", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / request.param


def test_a_folder_for_each_class_is_one_split(path: pathlib.Path) -> None:
    layout = read(write(path, "dog/1.jpg", "cat/old/deep/2", "cat/1.png", "README.md"))
    assert layout.classes == ("cat", "dog") and not layout.divided
    assert found(layout) == {
        "train": [("cat/1.png", "cat"), ("cat/old/deep/2", "cat"), ("dog/1.jpg", "dog")]
    }


@pytest.mark.parametrize("val", ["val", "validation", "Valid", "test", "Testing"])
@pytest.mark.parametrize("train", ["train", "Training"])
def test_a_folder_for_each_split(path: pathlib.Path, train: str, val: str) -> None:
    layout = read(write(path, f"{train}/a/1", f"{train}/b/1", f"{val}/b/2", "classes.txt"))
    assert layout.classes == ("a", "b") and layout.divided
    assert found(layout) == {
        "train": [(f"{train}/a/1", "a"), (f"{train}/b/1", "b")],
        "validation": [(f"{val}/b/2", "b")],
    }


def test_test_is_a_third_split_beside_val(path: pathlib.Path) -> None:
    layout = read(write(path, "train/a/1", "train/b/1", "val/a/2", "test/b/3"))
    assert found(layout)["test"] == [("test/b/3", "b")]


@pytest.mark.parametrize("divided", [True, False])
def test_a_test_folder_may_have_no_classes(path: pathlib.Path, divided: bool) -> None:
    names = ["train/a/1", "train/b/1", "test/1.jpg", *["val/a/1"] * divided]
    layout = read(write(path, *names))
    assert found(layout)["test"] == [("test/1.jpg", "")]
    assert layout.divided == divided == ("validation" in layout.splits)


def test_outer_folders_are_entered(path: pathlib.Path) -> None:
    layout = read(write(path, "a/1", "b/1", "notes.txt", root="pets/train"))
    assert found(layout) == {"train": [("pets/train/a/1", "a"), ("pets/train/b/1", "b")]}


def test_below_train_there_are_classes(path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="train: has the class 'cat' alone"):
        read(write(path, "train/cat/old/1", "train/cat/new/1"))
    with pytest.raises(DataError, match="Training: has the class 'cat' alone"):
        read(write(path.with_stem("more"), "pets/Training/cat/old/1", "pets/Training/cat/new/1"))


@pytest.mark.parametrize(
    "files", [["train/a/1", "train/b/1"], ["train/a/1", "train/b/1", "val/a/1"]]
)
def test_an_empty_test_folder_does_not_stand_for_val(path: pathlib.Path, files: list[str]) -> None:
    layout = read(write(path, *files, "test/"))
    assert found(layout)["test"] == []
    assert layout.divided == (len(files) == 3)


def test_what_systems_leave_behind_is_ignored(path: pathlib.Path) -> None:
    junk = [".DS_Store", "a/.DS_Store", "a/Thumbs.db", "b/desktop.ini", ".git/x/1.jpg"]
    layout = read(write(path, "a/1", "b/1", *junk, "__MACOSX/a/._1.jpg", ".empty/"))
    assert found(layout) == {"train": [("a/1", "a"), ("b/1", "b")]}


def test_a_class_may_be_called_train(path: pathlib.Path) -> None:
    assert read(write(path, "train/1.jpg", "car/1.jpg")).classes == ("car", "train")
    names = ["test/1.jpg", "val/old/1.jpg", "val/val/1.jpg", "car/1.jpg"]
    assert read(write(path.with_stem("more"), *names)).classes == ("car", "test", "val")


def test_odd_names_are_names(path: pathlib.Path) -> None:
    odd = ["<b>&amp;", "Crème brûlée", "two words ", "猫", "a,b;'\"", "#%?"]
    layout = read(write(path, *(f"{name}/1.jpg" for name in odd)))
    assert layout.classes == tuple(sorted(name.strip() for name in odd))


def test_names_that_look_the_same_are_one_class(path: pathlib.Path) -> None:
    composed, parted = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    layout = read(write(path, f"train/{composed}/1", "train/tea/1", f"val/{parted}/2"))
    assert layout.classes == (composed, "tea")
    assert layout.splits["validation"][0].label == composed


def test_a_shown_name_is_one_line_of_text() -> None:
    assert folders.shown("a\nb\r\x85é/\udcff.jpg") == "a\\nb\\r\\x85é/\\udcff.jpg"


WRONG = {
    "loose pictures": (["1.jpg", "2.JPG"], r"2 pictures lie in no class folder, such as 1\.jpg"),
    "loose beside classes": (["a/1", "b/1", "3.png"], r"1 pictures lie in no class folder"),
    "loose in a split": (["train/a/1", "train/b/1", "val/a/1", "val/1.gif"], r"val: 1 pictures"),
    "no folder": (["notes.txt"], "has no class folders"),
    "one class": (["cat/1.jpg"], "the class 'cat' alone"),
    "one class in train": (["train/cat/1.jpg", "val/cat/2.jpg"], r"train: has the class 'cat'"),
    "foreign class": (
        ["train/a/1", "train/b/1", "val/a/1", "val/c/1", "val/d/1"],
        r"val: 'c', 'd': no such class in train/",
    ),
    "two validation splits": (
        ["train/a/1", "train/b/1", "val/a/1", "valid/a/1"],
        "'val', 'valid': which of them",
    ),
    "split and class": (["train/a/1", "train/b/1", "val/a/1", "c/1"], "'c' beside 'train'"),
    "train and class": (["train/a/1", "train/b/1", "c/1"], "'c' beside 'train'"),
    "val beside classes": (
        ["cat/1", "dog/1", "val/cat/1", "val/dog/1"],
        r"'val' has folders of the same names as those beside it: is it a split\? Put the classes "
        "to train on into train/",
    ),
    "no train": (["val/a/1", "test/a/1"], "has 'test', 'val', but no train folder"),
    "nothing": ([".DS_Store"], "holds no file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_layouts_are_refused(path: pathlib.Path, case: str) -> None:
    names, message = WRONG[case]
    with pytest.raises(DataError, match=message) as error:
        read(write(path, *names))
    assert str(path) in str(error.value)


def test_a_path_that_leads_nowhere_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"config\.data\.source = .*nowhere.*no such folder"):
        folders.open_source(tmp_path / "nowhere")


def test_a_file_that_is_no_archive_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"x\.jpg: not a whole zip archive"):
        folders.open_source(tmp_path / "x.jpg")


def test_links_are_followed_but_not_in_circles(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "elsewhere", "1.jpg")
    write(tmp_path / "x", "a/1.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "x" / "b")
    os.symlink(tmp_path / "x", tmp_path / "x" / "a" / "back")
    assert found(read(tmp_path / "x")) == {"train": [("a/1.jpg", "a"), ("b/1.jpg", "b")]}


def fingerprint(path: pathlib.Path) -> str:
    with folders.open_source(path) as source:
        return source.fingerprint()


def test_the_fingerprint_sees_pictures_and_no_junk(tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path / "x", "a/1.jpg", "b/1.jpg")
    before = fingerprint(folder)
    (folder / "a" / ".DS_Store").write_bytes(b"x")
    assert fingerprint(folder) == before
    (folder / "b" / "1.jpg").write_bytes(b"x")
    changed = fingerprint(folder)
    (folder / "b" / "1.jpg").rename(folder / "a" / "2.jpg")
    assert len({before, changed, fingerprint(folder)}) == 3


COUNTS = {"a": 1, "b": 2, "c": 3, "d": 40, "e": 100}


@pytest.mark.parametrize(
    ("share", "held"),
    [
        (0.2, {"b": 1, "c": 1, "d": 8, "e": 20}),
        (0.01, {"b": 1, "c": 1, "d": 1, "e": 1}),
        (0.99, {"b": 1, "c": 2, "d": 39, "e": 99}),
    ],
)
def test_each_class_gives_its_share(share: float, held: dict[str, int]) -> None:
    entries = [
        folders.Entry(f"{c}/{n}.jpg", c) for c, count in COUNTS.items() for n in range(count)
    ]
    train, evaluation = folders.hold_out(entries, share)
    assert sorted(train + evaluation) == sorted(entries)
    labels = [entry.label for entry in evaluation]
    assert {label: labels.count(label) for label in sorted(set(labels))} == held
    # The order of listing, which systems differ in, decides nothing.
    assert set(folders.hold_out(entries[::-1], share)[1]) == set(evaluation)
    # A larger share holds out the same images and more.
    assert set(evaluation) <= set(folders.hold_out(entries, 0.99)[1])


def held_out(path: pathlib.Path) -> set[str]:
    """Returns which files are held out, by their class and name."""
    layout = read(path)
    _, held = folders.hold_out(layout.splits["train"], 0.2, root=layout.root)
    return {"/".join(entry.file.split("/")[-2:]) for entry in held}


@pytest.mark.parametrize("root", ["pets", "my/pets", "train", "pets/Training"])
def test_what_is_held_out_does_not_depend_on_the_outer_folders(
    tmp_path: pathlib.Path, root: str
) -> None:
    names = [f"{label}/{number}.jpg" for label in ("cat", "dog") for number in range(40)]
    expected = held_out(write(tmp_path / "x", *names))
    assert len(expected) == 16
    assert held_out(write(tmp_path / "x.zip", *names, root=root)) == expected


def test_what_is_held_out_does_not_depend_on_how_accents_are_written(
    tmp_path: pathlib.Path,
) -> None:
    names = [f"{label}/é{number}.jpg" for label in ("café", "dog") for number in range(40)]
    composed, parted = (
        held_out(write(tmp_path / form, *(unicodedata.normalize(form, name) for name in names)))
        for form in ("NFC", "NFD")
    )
    assert composed == {unicodedata.normalize("NFC", name) for name in parted}


def test_names_that_look_the_same_are_ranked_in_any_order() -> None:
    names = [unicodedata.normalize(form, "a/é.jpg") for form in ("NFC", "NFD")]
    entries = [folders.Entry(name, "a") for name in names]
    assert folders.hold_out(entries, 0.5)[1] == folders.hold_out(entries[::-1], 0.5)[1]
