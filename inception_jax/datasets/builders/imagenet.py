"""Builds the TFDS data set imagenet2012 (1,000 classes) from the two official archives.

    ILSVRC2012_img_train.tar   a tar archive of 1,000 tar archives, <wnid>.tar, of a class each
    ILSVRC2012_img_val.tar     50,000 images, whose names do not indicate their classes

Source: Russakovsky et al. 2015, "ImageNet Large Scale Visual Recognition Challenge". Name, version,
features and keys, and therefore the order of the records, match TFDS's own builder: the output of
`tfds build imagenet2012 --file_format=array_record` can be read in place of this builder's. TFDS's
builder reads archives through TensorFlow; this one does not. It stores each file unchanged; TFDS's
converts the 22 CMYK images and the one PNG to RGB JPEGs.

Class names are WordNet ids, as in TFDS. The installed TFDS contains the lists of ids, of all
classes and of the validation images in the order of their names.
"""

import contextlib
import os
import pathlib
import tarfile
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import tensorflow_datasets as tfds

from inception_jax.datasets import decode
from inception_jax.datasets.builders import base
from inception_jax.datasets.sources.files import MAX_BYTES
from inception_jax.datasets.sources.tar_source import decompressor
from inception_jax.errors import DataError
from inception_jax.registry import DATASETS

TRAIN, VALIDATION = DATASETS.get("imagenet2012").source_files
TRAIN_IMAGES = 1_281_167

_CITATION = """@article{ILSVRC15,
  author = {Russakovsky, Olga and Deng, Jia and Su, Hao and Krause, Jonathan and Satheesh, Sanjeev
    and Ma, Sean and Huang, Zhiheng and Karpathy, Andrej and Khosla, Aditya and Bernstein, Michael
    and Berg, Alexander C. and Fei-Fei, Li},
  title = {{ImageNet Large Scale Visual Recognition Challenge}},
  journal = {International Journal of Computer Vision (IJCV)},
  volume = {115}, number = {3}, pages = {211--252}, year = {2015},
}"""
# Images read and checked per task of a thread: about 10 ms of work.
_CHUNK_SIZE = 8


class OfficialMetadata(NamedTuple):
    """Expected contents of the official archives.

    Attributes:
      wnids: the class ids, sorted; a label is an index into them.
      validation: the class id of each validation image, in the order of their file names.
      train_images: number of training images.
    """

    wnids: tuple[str, ...]
    validation: tuple[str, ...]
    train_images: int


class ArchivedImage(NamedTuple):
    """One image: file name, class id, index of its archive, and offset and size there, bytes."""

    file: str
    wnid: str
    archive: int
    offset: int
    size: int


def official_metadata() -> OfficialMetadata:
    """Returns the expected contents of the archives, from lists that TFDS includes."""
    folder = pathlib.Path(tfds.core.tfds_path("datasets/imagenet2012"))
    wnids, validation = (
        tuple((folder / file).read_text().split())
        for file in ("labels.txt", "validation_labels.txt")
    )
    return OfficialMetadata(wnids, validation, TRAIN_IMAGES)


# TFDS accepts this class argument, but its type annotations do not declare it.
class Imagenet2012(base.ImageBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds 1,281,167 training and 50,000 validation images of various sizes, 1,000 classes.

    Features: image, label, file_name. Not registered with TFDS, which has a builder of this name.
    """

    VERSION = tfds.core.Version(DATASETS.get("imagenet2012").version)
    DESCRIPTION = "ILSVRC 2012: 1,000 classes of ImageNet."
    HOMEPAGE = "https://image-net.org/"
    CITATION = _CITATION
    IMAGE: ClassVar[dict[str, Any]] = {"encoding_format": "jpeg"}

    _descriptors: list[int]

    def open(self) -> None:
        """Opens the two archives and lists their images."""
        self._metadata = official_metadata()
        paths = [self._locate() / name for name in (TRAIN, VALIDATION)]
        if missing := [path.name for path in paths if not path.exists()]:
            raise DataError(
                f"config.data.source = {self.source!r}: {' and '.join(missing)} not found in "
                f"{paths[0].parent}. Get them from https://image-net.org (registration required) "
                "and set config.data.source to their folder; or set config.data.directory to "
                "where 'tfds build imagenet2012 --file_format=array_record' has prepared them. "
                "For images extracted to one folder per class, set config.data.name=image_folder"
            )
        self._paths = paths
        self._descriptors = []
        for path in paths:
            self._descriptors.append(_open_descriptor(path))
        self._splits = {"train": self._train(), "validation": self._validation()}

    def _locate(self) -> pathlib.Path:
        """Returns the folder of the archives; without a source, TFDS's default folder for them."""
        if not self.source:
            return pathlib.Path(self.data_dir_root, "downloads", "manual")
        path = pathlib.Path(self.source)
        # The source may be one of the two archives.
        return path.parent if path.is_file() else path

    def _train(self) -> list[ArchivedImage]:
        """Lists the training images, and checks their number and classes."""
        path, entries, wnids = self._paths[0], [], set()
        with _open_tar(path) as outer:
            for file in _regular_files(outer):
                wnid = pathlib.PurePosixPath(file.name).stem
                wnids.add(wnid)
                with tarfile.open(fileobj=outer.extractfile(file), mode="r:") as inner:
                    entries += [
                        ArchivedImage(
                            image.name, wnid, 0, file.offset_data + image.offset_data, image.size
                        )
                        for image in _regular_files(inner)
                    ]
        missing = sorted(set(self._metadata.wnids) - wnids)
        extra = sorted(wnids - set(self._metadata.wnids))
        if missing or extra or len(entries) != self._metadata.train_images:
            raise self._incomplete_error(
                path,
                f"{len(entries):,} images (expected {self._metadata.train_images:,}), "
                f"{len(missing)} missing classes{_such_as(missing)} and {len(extra)} unknown ones"
                f"{_such_as(extra)}",
            )
        return entries

    def _validation(self) -> list[ArchivedImage]:
        path, wnids = self._paths[1], self._metadata.validation
        with _open_tar(path) as archive:
            files = sorted(_regular_files(archive), key=lambda file: file.name)
        if len(files) != len(wnids):
            raise self._incomplete_error(path, f"{len(files):,} images (expected {len(wnids):,})")
        return [
            ArchivedImage(
                pathlib.PurePosixPath(file.name).name, wnid, 1, file.offset_data, file.size
            )
            for file, wnid in zip(files, wnids, strict=True)
        ]

    def _incomplete_error(self, path: pathlib.Path, contents: str) -> DataError:
        return DataError(
            f"{path}: not the official archive: it contains {contents}. Download it again"
        )

    def close(self) -> None:
        """Closes the archives if they are open."""
        for file in self.__dict__.pop("_descriptors", []):
            os.close(file)

    def class_names_and_metadata(self) -> tuple[Sequence[str], dict[str, Any]]:
        """Returns the class ids and the source."""
        return self._metadata.wnids, {"source": str(self._paths[0].parent.absolute())}

    def source_bytes(self) -> int:
        """Returns the size of all images, bytes."""
        return sum(entry.size for entries in self._splits.values() for entry in entries)

    def examples(self, items: Sequence[ArchivedImage]) -> Generator[base.KeyedExample, None, None]:
        """Yields the examples, read and verified in threads."""
        contents = decode.threaded_map(self._read, items, _CHUNK_SIZE)
        for entry, data in zip(items, contents, strict=True):
            yield entry.file, {"image": data, "label": entry.wnid, "file_name": entry.file}

    def _read(self, entry: ArchivedImage) -> bytes:
        path = self._paths[entry.archive]
        if entry.size > MAX_BYTES:
            raise DataError(
                f"{path}: {entry.file} has {entry.size:,} bytes; a file can have at most "
                f"{MAX_BYTES:,}. Download the archive again"
            )
        data = os.pread(self._descriptors[entry.archive], entry.size, entry.offset)
        decode.verify(data, f"{path}: {entry.file}")
        return data


def _open_descriptor(path: pathlib.Path) -> int:
    """Opens a file for positional reads."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened ({error.strerror}). Check the file's permissions"
        ) from error


@contextlib.contextmanager
def _open_tar(path: pathlib.Path) -> Iterator[tarfile.TarFile]:
    """Opens an uncompressed tar archive; raises DataError if it is damaged."""
    if opener := decompressor(path):
        raise DataError(
            f"{path}: is compressed ({opener.__module__}), so its images cannot be read in place. "
            "Decompress it and keep the file name"
        )
    try:
        with tarfile.open(path, "r:") as archive:
            yield archive
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{path}: not a complete tar archive ({path.stat().st_size:,} bytes; {error}). It may "
            "be truncated; download or copy it again"
        ) from error


def _regular_files(archive: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Returns the regular files of an archive, reading only headers."""
    return [member for member in archive if member.isfile()]


def _such_as(names: Sequence[str]) -> str:
    return f" (such as {names[0]})" if names else ""
