import io
import os
import pathlib
import sys

import pytest

from inception_jax.errors import DataError, UserError
from inception_jax.inference import image_files
from inception_jax.storage import atomic, buckets, paths
from tests import archives


def write(folder: pathlib.Path, *names: str) -> str:
    return str(archives.write_files(folder, dict.fromkeys(names, b""), ""))


def test_folders_are_searched_in_natural_order(tmp_path: pathlib.Path) -> None:
    # In the expected order; the files are created in another.
    expected = ["1.jpg", "2.PNG", "2b.png", "10.jpg", "a/9.webp", "a/10.webp", "b/1.jpg", "B.gif"]
    expected += ["b.gif", "IMG_2.jpeg", "IMG_010.jpeg"]
    folder = write(tmp_path, *sorted(expected))
    images = image_files.find([folder])
    assert images.files == [os.path.join(folder, name) for name in expected]
    assert not images.skipped


def test_outputs_of_commands_are_ignored(tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path, "a.jpg", "more/b.jpg")
    for output in ("maps", "more/run/plots"):
        atomic.make_output_folder(tmp_path / output)
        write(tmp_path / output, "a.png")
    expected = [os.path.join(folder, name) for name in ("a.jpg", "more/b.jpg")]
    assert image_files.find([folder]).files == expected
    maps = str(tmp_path / "maps")
    assert image_files.find([maps]).files == [os.path.join(maps, "a.png")]


def test_natural_order_is_total() -> None:
    names = ["A1", "a1", "a01", "a١", "1", "01", "²", ""]
    orders = {tuple(sorted(each, key=image_files.natural_key)) for each in (names, names[::-1])}
    assert len(orders) == 1


def test_hidden_files_are_ignored_and_others_skipped(tmp_path: pathlib.Path) -> None:
    folder = write(
        tmp_path / ".photos",
        "a.jpg",
        ".b.jpg",
        ".git/c.jpg",
        "Thumbs.db",
        "notes.txt",
        "d",
        "e.pdf",
    )
    images = image_files.find([folder])
    assert [os.path.basename(path) for path in images.files] == ["a.jpg"]
    assert [os.path.basename(path) for path in images.skipped] == ["d", "e.pdf", "notes.txt"]


def test_file_arguments_are_always_included(tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path, "b/x.jpg", "notes.txt", ".hidden")
    arguments = [f"{folder}/notes.txt", image_files.STDIN, f"{folder}/b", f"{folder}/.hidden"]
    assert image_files.find(arguments).files == [
        f"{folder}/notes.txt",
        "-",
        f"{folder}/b/x.jpg",
        f"{folder}/.hidden",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jpg", "no\nsuch", "nor/this"], r"'no\\\\nsuch', 'nor/this': no such file or folder"),
        (["-", "a.jpg", "-"], "given only once"),
        (["a.jpg", ""], "'': an empty path"),
        (["empty"], "no file has an image extension"),
        (["texts"], r"no file has an image extension.*Skipped: texts/a\.txt"),
    ],
)
def test_invalid_arguments_are_reported(
    arguments: list[str], message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.jpg", "empty/", "texts/a.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        image_files.find(arguments)


def test_images_in_buckets_are_found_and_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = paths.user_path(bucket, "")
    names = ["photos/10.jpg", "photos/2.jpg", "photos/a #1 [x].png", "photos/.b/c.jpg", "d"]
    for name in [*names, "photos/notes.txt", "photos/empty"]:
        buckets.write_bytes(root / name, name.encode())
    images = image_files.find([f"{bucket}/d", f"{bucket}/photos/"])
    found = [f"{bucket}/{name}" for name in ("d", "photos/2.jpg", "photos/10.jpg")]
    assert images.files == [*found, f"{bucket}/photos/a #1 [x].png"]
    assert images.skipped == [f"{bucket}/photos/empty", f"{bucket}/photos/notes.txt"]
    assert [image_files.read(file) for file in images.files[1:]] == [
        b"photos/2.jpg",
        b"photos/10.jpg",
        b"photos/a #1 [x].png",
    ]
    monkeypatch.setattr(image_files, "MAX_BYTES", 3)
    with pytest.raises(DataError, match=r"photos/2\.jpg: must not be larger than 3 bytes"):
        image_files.read(images.files[1])


def test_missing_images_in_buckets_are_named(bucket: str) -> None:
    with pytest.raises(DataError, match=f"'{bucket}/a.jpg', '{bucket}/b': no such file or folder"):
        image_files.find([f"{bucket}/a.jpg", f"{bucket}/b"])
    with pytest.raises(UserError, match=r"^gs://no-such-bucket/a\.jpg: bucket not found"):
        image_files.find(["gs://no-such-bucket/a.jpg"])


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xd8")))
    assert image_files.read(image_files.STDIN) == b"\xff\xd8"
    assert image_files.display_name(image_files.STDIN) == "standard input"


def test_closed_standard_input_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input: is closed"):
        image_files.read(image_files.STDIN)


def test_unreadable_file_is_reported(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read: No such file"):
        image_files.read(str(tmp_path / "gone.jpg"))
