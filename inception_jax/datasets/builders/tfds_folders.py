"""Finds data sets prepared by TFDS's own commands, by folder names, without importing TFDS.

<directory>/<name>[/<config>]/<version>/dataset_info.json, features.json, records
"""

import hashlib
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
    """A prepared data set: its name, configuration ('': none), version and folder."""

    name: str
    config: str
    version: str
    folder: pathlib.Path

    @property
    def title(self) -> str:
        """The data set's name in TFDS, without the version."""
        return f"{self.name}/{self.config}" if self.config else self.name


def problems(data: config.Data) -> Iterator[str]:
    """Yields a message for each invalid setting."""
    if not _NAME.fullmatch(data.tfds):
        yield f"config.data.tfds = {data.tfds!r}: {_EXPECTED}"


def locate(
    data: config.Data, directory: pathlib.Path, log: Callable[[str], None]
) -> tuple[str, str]:
    """Returns the folder name and version of the data set selected by the settings.

    Raises:
      DataError: if it is not prepared; the message has the command to prepare it.
    """
    place = find(data.tfds, directory, log)
    return f"tfds-{place.title.replace('/', '-')}", place.version


def top_folder(text: str) -> str:
    """Returns the folder of all configurations and versions selected by `config.data.tfds`.

    Raises:
      ConfigError: if `text` is malformed.
    """
    return _parse(text)["name"]


def _parse(text: str) -> re.Match[str]:
    if not (match := _NAME.fullmatch(text)):
        raise ConfigError(f"config.data.tfds = {text!r}: {_EXPECTED}")
    return match


def find(text: str, directory: pathlib.Path, log: Callable[[str], None]) -> PreparedLocation:
    """Returns the location of the data set selected by `config.data.tfds`.

    Chooses the newest of several versions. A configuration can be omitted if there is only one.

    Raises:
      ConfigError: if `text` is malformed, or more than one configuration is prepared.
      DataError: if nothing is prepared; the message has the command to prepare it.
    """
    match = _parse(text)
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


def fingerprint(folder: pathlib.Path) -> str:
    """Returns a digest of a build's description: its features, classes, counts and sizes.

    Args:
      folder: of a version.
    """
    digest = hashlib.sha256()
    names = ("dataset_info.json", "features.json")
    described = [p for p in folder.iterdir() if p.name in names or p.name.endswith(".labels.txt")]
    for path in sorted(described):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _versions(folder: pathlib.Path) -> list[str]:
    """Returns the versions prepared in a folder, in ascending order."""
    versions = [
        path.name
        for path in _subfolders(folder)
        if _VERSION.fullmatch(path.name) and (path / "dataset_info.json").exists()
    ]
    return sorted(versions, key=lambda version: tuple(map(int, version.split("."))))


def _subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
