"""Paths as users type them, and unusual names."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from inception_jax import config
from inception_jax.config import Config, Data, Init
from inception_jax.datasets.dataset import data_location, prepare
from inception_jax.errors import ConfigError, DataError, UserError
from inception_jax.storage import paths
from tests import names

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("typed", ["s3://b/x", "https://host/x.zip", "hdfs://b", "GCS://b"])
def test_urls_are_rejected(typed: str) -> None:
    with pytest.raises(UserError) as refused:
        paths.user_path(typed, f"--workdir={typed}")
    message = str(refused.value)
    assert message.startswith(f"--workdir={typed}: is a URL")
    assert f"write ./{typed}" in message and "gs://BUCKET/PATH" in message


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("gs:/bucket/run", "must be written as gs://bucket/run"),
        ("GS://bucket/run", "must be written as gs://bucket/run"),
        ("gs://", "must be gs://BUCKET/PATH"),
        ("gs://My_Bucket/x", "lowercase letters"),
        ("gs://bucket/a/../b", "must not contain '/../'"),
        ("gs://bucket/run[1]", r"must not contain '\['"),
    ],
)
def test_malformed_bucket_paths_are_rejected(typed: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        paths.user_path(typed, f"--workdir={typed}")


def test_paths_in_buckets_are_not_local() -> None:
    path = paths.user_path("gs://bucket/runs//a/", "--workdir")
    assert str(path / "config.json") == "gs://bucket/runs/a/config.json"
    assert not paths.is_local(path)
    with pytest.raises(UserError, match=r"is a URL \(gs:\); must be a local path"):
        paths.local_path("gs://bucket/x", "config.data.cache = 'gs://bucket/x'")


def test_missing_libraries_for_buckets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'inception-jax\[gcs\]'"):
        paths.user_path("gs://bucket/run", "--workdir=gs://bucket/run")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("file:///data", "without file:"),
        (r"C:\runs\x", "a Windows path"),
        ("C:/runs/x", "a Windows path"),
        ("\\\\server\\share", "a Windows path"),
        ("a\0b", "NUL"),
    ],
)
def test_invalid_paths_are_rejected(typed: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        paths.local_path(typed, "--output")


@pytest.mark.parametrize(
    "name", ["./gs:/x", "a:b", "12:30", "lr=1e-3", "a b", "x~", "~nobody-here/x"]
)
def test_unusual_names_are_accepted(name: str) -> None:
    assert paths.local_path(name, "--workdir") == pathlib.Path(name)


def test_tilde_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    assert paths.local_path("~/runs/x", "--workdir") == pathlib.Path("/homes/me/runs/x")
    assert paths.local_path(pathlib.Path("~"), "--workdir") == pathlib.Path("/homes/me")
    # Only once: here it is part of a name.
    assert paths.local_path("./~/x", "--workdir") == pathlib.Path("~/x")


def test_unknown_home_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    for call in (
        lambda: paths.local_path("~/x", "--workdir=~/x"),
        lambda: data_location(""),
        lambda: prepare(Data(name="digits"), log=print),
    ):
        with pytest.raises(UserError, match="home folder is unknown; set HOME"):
            call()
    # Only its default needs one.
    assert data_location("/data").local == pathlib.Path("/data")
    with pytest.raises(UserError, match="home folder is unknown; set it to a local folder"):
        data_location("gs://bucket/data")


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        (Config(data=Data(source="s3://b/pictures.zip")), "data.source"),
        (Config(data=Data(directory="hdfs:/b/data")), "data.directory"),
        (Config(init=Init(pretrained="https://host/w.safetensors")), "init.pretrained"),
    ],
)
def test_url_settings_are_reported_with_other_errors(settings: Config, setting: str) -> None:
    settings.seed = -1
    with pytest.raises(ConfigError) as refused:
        config.validate(settings)
    assert f"config.{setting} = " in str(refused.value) and "is a URL" in str(refused.value)
    assert "config.seed = -1" in str(refused.value)


def test_default_directory_must_not_be_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", "s3://tfds-data/datasets")
    with pytest.raises(UserError, match=r"TFDS_DATA_DIR=s3://tfds-data/datasets\): is a URL"):
        data_location("")


@pytest.mark.parametrize(
    "arguments",
    [
        ["main", "--config=experiments/digits.py", "--workdir=s3://b/run"],
        ["main", "--config=experiments/digits.py", "--mode=eval", "--weights=s3://b/w.safetensors"],
        ["tools.prepare", "--config=experiments/digits.py", "--config.data.directory=s3://b/data"],
        ["tools.find_lr", "--config=experiments/digits.py", "--output=gs:/b/lr"],
        ["tools.export", "--to=onnx", "--weights=x", "--output=http://b/x.onnx"],
        ["tools.import_weights", "--input=x", "--output=gs:/b/x"],
        ["tools.predict", "--workdir=s3://b/run", "cat.jpg"],
        ["tools.predict", "--workdir=x", "http://b/cat.jpg"],
        ["tools.summarize", "--config=experiments/digits.py", "--output=s3://b/view"],
        ["tools.serve", "--weights=s3://b/w"],
        ["tools.report", "s3://b/run"],
        ["tools.plot", "gs:/b/run"],
        ["tools.diagnose", "s3://b/run"],
    ],
)
def test_every_command_rejects_urls_before_writing(
    arguments: list[str], tmp_path: pathlib.Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"inception_jax.{arguments[0]}"]
        + [each.replace("experiments/", f"{ROOT}/experiments/") for each in arguments[1:]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert re.search(r"is a URL \((s3|http):\)|must be written as", done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", names.ODD, ids=ascii)
def test_plain_path_is_the_same_folder(name: str, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    plain = paths.PlainPath(folder)
    (plain.path / "file").write_bytes(b"content")
    (plain.path / "file").rename(plain.path / "renamed")
    assert (folder / "renamed").read_bytes() == b"content"
    # No character that patterns, URLs or encodings treat specially is left.
    assert str(plain.path).isascii() and not set(str(plain.path)) & set("[]*?{}~:@%$#\\\n\t")
    plain.close()
    assert paths.PlainPath(tmp_path).path == tmp_path


@pytest.mark.parametrize("storage", ["decoded", "records"])
def test_data_location_can_have_any_name(storage: str, tmp_path: pathlib.Path) -> None:
    # All characters in one name, because TFDS alone takes a second.
    folder = tmp_path / "".join(name for name in names.ODD if name.isprintable()).replace("/", "")
    data = Data(name="digits", directory=str(folder), image_size=4, storage=storage)
    prepare(data, log=lambda _: None)
    again: list[str] = []
    assert len(prepare(data, log=again.append).train) == 1437
    assert not again


def test_non_utf8_data_location_is_rejected(tmp_path: pathlib.Path) -> None:
    folder = os.path.join(tmp_path, os.fsdecode(b"\xff"))
    with pytest.raises(DataError, match="not valid UTF-8"):
        prepare(Data(name="digits", directory=folder), log=print)
    assert not list(tmp_path.iterdir())
