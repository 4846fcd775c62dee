"""Finds the data sets that TFDS's own commands prepared, by the names of folders, without TFDS.

<directory>/<name>[/<config>]/<version>/dataset_info.json, features.json, records
"""

import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from inception_jax import config
from inception_jax.errors import ConfigError, DataError, nearest

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(r"(?P<name>[A-Za-z]\w*)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_EXPECTED = (
    "must be the name of a TFDS data set, such as cifar100, oxford_flowers102:2.1.1 or "
    "NAME/CONFIG:VERSION"
)


class PreparedLocation(NamedTuple):
    """Where a prepared data set is: its name and configuration ('': none), version and folder."""

    name: str
    config: str
    version: str
    folder: pathlib.Path

    @property
    def title(self) -> str:
        """What TFDS calls it, without the version."""
        return f"{self.name}/{self.config}" if self.config else self.name


def problems(data: config.Data) -> Iterator[str]:
    """Yields what is wrong with the settings."""
    if not _NAME.fullmatch(data.tfds):
        yield f"config.data.tfds = {data.tfds!r}: {_EXPECTED}"


def locate(
    data: config.Data, directory: pathlib.Path, log: Callable[[str], None]
) -> tuple[str, str]:
    """Returns name and version, of folders, of the data set that the settings name.

    Raises:
      DataError: if it is not prepared, with the command that does it.
    """
    place = find(data.tfds, directory, log)
    return f"tfds-{place.title.replace('/', '-')}", place.version


def find(text: str, directory: pathlib.Path, log: Callable[[str], None]) -> PreparedLocation:
    """Returns where the data set is that `config.data.tfds` names.

    Of several versions it is the newest, and of configurations the only one.

    Raises:
      ConfigError: if `text` is not of this form, or more than one configuration is prepared.
      DataError: if nothing is prepared, with the command that does it.
    """
    if not (match := _NAME.fullmatch(text)):
        raise ConfigError(f"config.data.tfds = {text!r}: {_EXPECTED}")
    name, chosen = match["name"], match["config"] or ""
    folder, versions = directory / name / chosen, _versions(directory / name / chosen)
    if not versions and not chosen:
        configs = [path.name for path in _subfolders(folder) if _versions(path)]
        if len(configs) > 1:
            raise ConfigError(
                f"config.data.tfds = {text!r}: {folder} contains several configurations: "
                f"{', '.join(configs)}; select one, such as {name}/{configs[0]}"
            )
        if configs:
            chosen, folder = configs[0], folder / configs[0]
            versions = _versions(folder)
    if not versions:
        command = f"tfds build {text} --file_format=array_record --data_dir={directory}"
        prepared = [path.name for path in _subfolders(directory)]
        raise DataError(
            f"config.data.tfds = {text!r}: no prepared data set in "
            f"{folder}.{nearest(name, prepared)} Prepare it once in an environment with "
            f"TensorFlow: {command}"
        )
    version = match["version"] or versions[-1]
    if version not in versions:
        raise DataError(
            f"config.data.tfds = {text!r}: version {version} not found in {folder}, which "
            f"contains {', '.join(versions)}; use one of these, or prepare {version} too"
        )
    if len(versions) > 1 and not match["version"]:
        log(
            f"{folder}: contains the versions {', '.join(versions)}; using the newest, {version} "
            f"(set config.data.tfds={text}:{versions[0]} for another)"
        )
    return PreparedLocation(name, chosen, version, folder / version)


def _versions(folder: pathlib.Path) -> list[str]:
    """Returns the versions that are prepared in a folder, rising."""
    versions = [
        path.name
        for path in _subfolders(folder)
        if _VERSION.fullmatch(path.name) and (path / "dataset_info.json").exists()
    ]
    return sorted(versions, key=lambda version: tuple(map(int, version.split("."))))


def _subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
