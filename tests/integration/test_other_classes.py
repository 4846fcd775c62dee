"""A run whose classes are renamed, so that all labels would refer to other classes."""

import pathlib

import pytest

from inception_jax import config as configs
from inception_jax.config import Config, Data
from inception_jax.datasets.dataset import prepare
from tests import archives, command, small

SIZE = 16


def settings(folder: pathlib.Path, name: str) -> Config:
    """Returns settings for the images in `source`, prepared in directory `name`."""
    source, directory = str(folder / "source"), str(folder / name)
    data = Data(name="image_folder", source=source, directory=directory, image_size=SIZE)
    return small.config(folder / name, data=data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of a run on apple, pear and plum, and of its source with apple renamed."""
    path = tmp_path_factory.mktemp("classes")
    files = archives.class_folders(dict.fromkeys(("apple", "pear", "plum"), 6), SIZE)
    archives.write_files(path / "source", files, "")
    small.finished(settings(path, "data"), path / "run")
    (path / "source" / "apple").rename(path / "source" / "zapple")
    prepare(settings(path, "new").data, log=lambda _: None)
    return path


@pytest.mark.parametrize("mode", ["train", "eval", "predict"])
def test_run_is_rejected_on_other_classes(folder: pathlib.Path, mode: str) -> None:
    record = (folder / "run" / "config.json").read_bytes()
    flags = [f"--workdir={folder / 'run'}"]
    if mode != "train":
        flags.append("--checkpoint=last")
    if mode == "predict":
        directory = f"--config.data.directory={folder / 'new'}"
        done = command.run("tools.predict", *flags, directory, "--split=validation")
    else:
        file = folder / f"{mode}.py"
        file.write_text(
            "from inception_jax import config\n"
            "def get_config():\n"
            f"    return config.from_dict({configs.to_dict(settings(folder, 'new'))!r})\n"
        )
        done = command.run("main", *flags, f"--config={file}", f"--mode={mode}")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "without 'apple', with 'zapple'" in done.stderr
    assert "class 0: 'apple' → 'pear'" in done.stderr
    assert (folder / "run" / "config.json").read_bytes() == record
