import hashlib
import json
import pathlib
from collections.abc import Callable

import pytest

from inception_jax.storage import integrity

CONTENT = {"a": b"some bytes", "d/b": bytes(range(256)) * 300, "d/e/empty": b""}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    integrity.write_manifest(tmp_path)
    return tmp_path


def test_manifest_lists_size_and_sha256_of_each_file(folder: pathlib.Path) -> None:
    listed = json.loads((folder / integrity.MANIFEST).read_text())["files"]
    assert listed == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in CONTENT.items()
    }
    assert integrity.verify(folder) == []
    integrity.write_manifest(folder)
    assert integrity.verify(folder) == [], "the manifest must not list itself"


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x04
    path.write_bytes(content)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def replace_by_folder(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "has changed (SHA-256 mismatch)"),
        (cut, "has 76,799 bytes instead of 76,800"),
        (empty, "has 0 bytes instead of 76,800"),
        (pathlib.Path.unlink, "is missing"),
    ],
)
def test_corruption_is_described(
    folder: pathlib.Path, damage: Callable[[pathlib.Path], None], words: str
) -> None:
    damage(folder / "d" / "b")
    assert integrity.verify(folder) == [f"d/b {words}"]


def test_folder_in_place_of_a_file_is_corruption(folder: pathlib.Path) -> None:
    replace_by_folder(folder / "a")
    (problem,) = integrity.verify(folder) or []
    assert problem.startswith("a ")


def test_additional_files_are_ignored(folder: pathlib.Path) -> None:
    (folder / "note").write_text("x")
    assert integrity.verify(folder) == []


def test_corrupt_and_missing_manifests(folder: pathlib.Path) -> None:
    path = folder / integrity.MANIFEST
    intact = path.read_bytes()
    for content in (b"", intact[:-9], b"[1]", b'{"files": 3}', b'{"files": {"a": 3}}', b"\xff"):
        path.write_bytes(content)
        assert integrity.verify(folder) == ["manifest.json is not a valid manifest"]
    # A flipped bit is detected anywhere, unless it changes no entry.
    listed = json.loads(intact)["files"]
    for index in range(len(intact)):
        path.write_bytes(intact[:index] + bytes([intact[index] ^ 0x01]) + intact[index + 1 :])
        if not integrity.verify(folder):
            assert json.loads(path.read_bytes())["files"] == listed
    path.unlink()
    assert integrity.verify(folder) is None
