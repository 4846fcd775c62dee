"""Experiment files: search, execution and cleanup; the parts that they register."""

import os
import pathlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

import inception_jax as ij
from inception_jax import experiment, registry
from inception_jax.config import Augment, Config
from inception_jax.errors import CheckpointError, UserError
from tests import command


def write(path: pathlib.Path, *lines: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("from inception_jax.config import Config\n" + "\n".join(lines) + "\n")
    return path


def test_custom_experiment_extends_a_shipped_one_from_any_folder(tmp_path: pathlib.Path) -> None:
    path = write(
        tmp_path / "mine" / "photos.py",
        "import inception_jax as ij",
        "from experiments import tiny_base",
        "def get_config():",
        '    config = ij.load_config("experiments/image_folder.py", {"seed": 7})',
        "    config.name = tiny_base.get_config().name",
        "    return config",
    )
    script = (
        "import sys, inception_jax as ij; config = ij.load_config(sys.argv[1])\n"
        "print(config.seed, config.model.stem, config.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(command.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["7", "s16", "tiny_base"], done.stderr


def test_local_file_takes_precedence_over_the_shipped_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ij.load_config("experiments/tiny.py").name == "tiny"
    write(tmp_path / "experiments" / "tiny.py", "def get_config(): return Config(name='mine')")
    assert ij.load_config("experiments/tiny.py").name == "mine"
    with pytest.raises(UserError, match=r"Did you mean experiments/digits\.py"):
        ij.load_config("experiments/digit.py")


def test_wheel_installs_experiments_where_they_are_searched() -> None:
    text = (command.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ((place, files),) = tomllib.loads(text)["tool"]["setuptools"]["data-files"].items()
    assert files == ["experiments/*.py"]
    assert pathlib.Path(sys.prefix, place) in experiment._SHIPPED_FOLDERS


def test_sys_path_and_modules_are_restored(tmp_path: pathlib.Path) -> None:
    paths, modules = list(sys.path), dict(sys.modules)
    seeds = []
    for number in (1, 2):
        folder = tmp_path / str(number) / "recipes"
        write(folder / "base.py", f"SEED = {number}")
        write(folder / "helpers.py", f"SEED = {10 * number}")
        path = write(
            folder / "one.py",
            "import helpers",
            "from recipes import base",
            "from experiments import base as same",
            "def get_config():",
            "    from recipes import one",
            "    return Config(seed=base.SEED + helpers.SEED + 100 * same.SEED)",
        )
        seeds.append(ij.load_config(path).seed)
    assert seeds == [111, 222]
    assert sys.path == paths
    assert sys.modules == modules


def test_missing_import_says_where_to_copy_the_file(
    tmp_path: pathlib.Path,
) -> None:
    path = write(tmp_path / "one.py", "from experiments import none", "def get_config(): ...")
    with pytest.raises(UserError, match=rf"Copy none\.py to {tmp_path}"):
        ij.load_config(path)


@pytest.mark.parametrize("line", ["", "raise ValueError('no')"], ids=["missing", "failing"])
def test_message_about_parts_names_the_flag(line: str, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "parts.py", line) if line else tmp_path / "parts.py"
    with pytest.raises(UserError, match=f"^--parts={path}: "):
        experiment.register_parts(path, "--parts=")


@pytest.fixture
def blur(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file that registers an augmentation, which is unregistered after the test."""
    registry.AUGMENTATIONS.names()  # Registers the built-in parts.
    before = dict(registry.AUGMENTATIONS._parts)
    yield write(
        tmp_path / "blur.py",
        "from inception_jax import registry",
        "@registry.AUGMENTATIONS.register('test_blur')",
        "def blur(key, images): return images",
        "def get_config(): return Config()",
    )
    registry.AUGMENTATIONS._parts = before


def part(path: pathlib.Path) -> list[dict[str, str]]:
    return [{"kind": "augmentation", "name": "test_blur", "file": str(path)}]


def test_file_of_a_part_is_recorded_and_rerun(
    blur: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(blur.parent)
    logged: list[str] = []
    ij.load_config("blur.py")
    assert experiment.custom_parts(Config(augment=Augment(extra=("test_blur",)))) == part(blur)
    experiment.import_parts(part(blur), "config.json", logged.append)
    assert logged == []
    del registry.AUGMENTATIONS._parts["test_blur"]
    experiment.import_parts(part(blur), "config.json", logged.append)
    assert "test_blur" in registry.AUGMENTATIONS
    assert logged == [f"running {blur}, which registers the augmentation 'test_blur' of this run"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (None, "which does not exist"),
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", "no longer registers it"),
    ],
)
def test_unavailable_part_is_reported(
    lines: str | None, words: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "blur.py"
    if lines:
        write(path, lines)
    with pytest.raises(CheckpointError) as error:
        experiment.import_parts(part(path), "runs/x/config.json", lambda line: None)
    for each in ("runs/x/config.json: its augmentation 'test_blur'", str(path), words, "--config="):
        assert each in str(error.value)
