"""A user's own pictures as a TFDS dataset: a folder for each class (folders.py has the layout)."""

import collections
import itertools
import pathlib
from collections.abc import Generator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from inception_jax.console import Progress
from inception_jax.datasets import decode
from inception_jax.datasets.builders import base, folders
from inception_jax.errors import DataError
from inception_jax.registry import DATASETS

# Images that one thread checks at a time, one by one.
_CHECKED = 16
# Images that one thread reads at a time, and then holds: of a user's photos, some 10 MB each.
_READ = 2
# How many unreadable files the metadata name.
_NAMED = 100


# TFDS has a builder of this name, which is no base for this one: it needs TensorFlow.
class ImageFolder(base.ImageBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Pictures of any format that PIL knows, kept as the files that they are.

    Features: image, label (the index of the class among the sorted class names; −1 in a test split
    without classes), file_name (path below the source, unprintable characters escaped).

    Args:
      val_fraction: share of each class to evaluate on where the source has no folder for it.
      on_unreadable: 'refuse' or 'skip' corrupt files and files that are not images.
      archive_encoding: of an archive's names where it does not say it; '': not known.
      layout: 'auto', or 'classes' where no folder is a split.
      kwargs: as of `builder.ImageBuilder`.
    """

    VERSION = tfds.core.Version(DATASETS.get("image_folder").version)
    DESCRIPTION = "Pictures of a user's own, a folder for each class."

    def __init__(
        self,
        *,
        val_fraction: float,
        on_unreadable: str,
        layout: str,
        archive_encoding: str,
        **kwargs: Any,
    ) -> None:
        self._val_fraction, self._on_unreadable, self._reading = val_fraction, on_unreadable, layout
        self._encoding = archive_encoding
        super().__init__(**kwargs)

    def open(self) -> None:
        """Finds the pictures, reads each once, and divides them.

        What cannot be read has to be known before images are held out, so that each class has its
        share of those that can.
        """
        if not self.source:
            raise DataError(
                "config.data.source = '': image_folder has no download. Give the folder that holds "
                "one folder of pictures for each class, or a zip or tar archive of it."
            )
        self._files = folders.open_source(
            self.source, encoding=self._encoding, scratch=pathlib.Path(self.data_dir_root)
        )
        layout = folders.layout(self._files, self._reading)
        self._log_layout(layout)
        self._divide(layout)

    def _log_layout(self, layout: folders.Layout) -> None:
        if layout.folders:
            named = [f"{split} = {folder!r}" for split, folder in layout.folders.items()]
            self.log(f"{self._files.path}: splits: {', '.join(named)}")
        if layout.left_out:
            named = [folders.shown(path) for path in layout.left_out]
            paths = f"{len(named):,} path{'s' * (len(named) > 1)}"
            self.log(
                f"{self._files.path}: ignored {paths}, left by systems, editors or this program, "
                f"or notes and the like: {folders.listed(named)}"
            )
        if layout.without_pictures:
            self.log(
                f"{self._files.path}: {folders.quoted(layout.without_pictures)}: without pictures, "
                "so not among the classes"
            )

    def _divide(self, layout: folders.Layout) -> None:
        entries = list(itertools.chain.from_iterable(layout.splits.values()))
        problems, self._bit_depth = self._inspect(entries)
        if problems and self._on_unreadable == "refuse":
            raise DataError(
                f"{self._listed(problems, len(entries))}\nFix or remove them, or set "
                "config.data.on_unreadable=skip to leave them out"
            )
        splits = {
            split: [entry for entry in members if entry.file not in problems]
            for split, members in layout.splits.items()
        }
        # What the content depends on besides the files: only this is compared with later settings.
        self._settings: dict[str, Any] = {"layout": self._reading}
        if self._files.names_depend_on_encoding:
            self._settings["archive_encoding"] = self._encoding
        if problems:
            self.log(f"{self._listed(problems, len(entries))}\nThey are left out")
            self._settings["on_unreadable"] = self._on_unreadable
        if not layout.divided:
            self._settings["val_fraction"] = self._val_fraction
            train, held = folders.hold_out(
                splits[folders.TRAIN], self._val_fraction, root=layout.root
            )
            splits |= {folders.TRAIN: train, folders.VALIDATION: held}
        for split in (folders.TEST, folders.UNLABELED):
            if split in splits and not splits[split]:
                self.log(
                    f"{self._files.path}: the {split} folder has no picture; there is no such split"
                )
                del splits[split]
        self._classes, self._splits, self._skipped = layout.classes, splits, problems
        self._digest = self._files.fingerprint(layout.files)
        self._bytes = sum(self._files.sizes[entry.file] for entry in entries)
        self._check_counts()

    def _inspect(self, entries: Sequence[folders.Entry]) -> tuple[dict[str, decode.Problem], int]:
        """Decodes all files once.

        Returns:
          What is wrong with those that cannot be decoded, and the bit depth of the others, as of
          `images.Inspection`.
        """
        problems: dict[str, decode.Problem] = {}
        depths: dict[str, int] = {}
        with Progress(f"{self.name}: checking images", len(entries), log=self.log) as progress:
            found = decode.threaded_map(self._inspect_file, entries, _CHECKED)
            for entry, (problem, bits) in zip(entries, found, strict=True):
                if problem is not None:
                    problems[entry.file] = problem
                if bits:
                    depths[entry.file] = bits
                progress.update(1)
        bit_depth = max(depths.values(), default=0)
        if bit_depth:
            self.log(
                f"{self._files.path}: the values of files with 16 bits a channel use {bit_depth} "
                "bits, of which the upper 8 are kept (config.data.bit_depth sets another number)"
            )
        # Of these no pixel is brighter than 15 of 255.
        if dark := [file for file, bits in depths.items() if bits <= bit_depth - 4]:
            most = max(depths[file] for file in dark)
            brightest = next(file for file, bits in depths.items() if bits == bit_depth)
            self.log(
                f"{self._files.path}: {len(dark):,} of the {len(depths):,} files with 16 bits a "
                f"channel use {most} bits or fewer, and are almost black beside the others: "
                f"{folders.listed([folders.shown(file) for file in dark])}. If the others, such as "
                f"{folders.shown(brightest)}, merely have hot pixels, set "
                f"config.data.bit_depth={most}; if they are from another camera, scale all to 8 "
                "bits first"
            )
        return problems, bit_depth

    def _inspect_file(self, entry: folders.Entry) -> decode.Inspection:
        try:
            data = self._files.read(entry.file)
        except DataError as error:
            return decode.Inspection(decode.Problem(_reason(error), "replace or remove it"))
        return decode.inspect(data, entry.file)

    def _listed(self, problems: dict[str, decode.Problem], count: int) -> str:
        """Returns which files have problems, a line for each kind, the most frequent first."""
        kinds: dict[tuple[str, str], list[str]] = {}
        for file, problem in problems.items():
            detail = f" ({problem.detail})" if problem.detail else ""
            named = kinds.setdefault((problem.kind, problem.advice), [])
            named.append(f"{folders.shown(file)}{detail}")
        lines = [
            f"\n  {kind} ({len(named):,}): {folders.listed(named)}. {advice}"
            for (kind, advice), named in sorted(kinds.items(), key=lambda each: -len(each[1]))
        ]
        return (
            f"{self._files.path}: {len(problems):,} of {count:,} files are corrupt or not images:"
            + "".join(lines)
        )

    def _check_counts(self) -> None:
        counts = collections.Counter(entry.label for entry in self._splits[folders.TRAIN])
        if empty := [name for name in self._classes if not counts[name]]:
            raise DataError(
                f"{self._files.path}: no training picture of {len(empty):,} of "
                f"{len(self._classes):,} classes: {folders.quoted(empty)}. Add some, or remove the "
                "class folders."
            )
        if not self._splits[folders.VALIDATION]:
            raise DataError(
                f"{self._files.path}: no picture is left to evaluate on. Give at least one class "
                "two pictures, or add val/ with a folder for each class."
            )

    def label_facts(self) -> tuple[Sequence[str], dict[str, Any]]:
        """Returns the class names; the source, the settings that counted, and what was left out."""
        metadata = {
            "source": str(self._files.path.absolute()),
            "source_digest": self._digest,
            "settings": self._settings,
            "bit_depth": self._bit_depth,
            "unreadable_count": len(self._skipped),
            "unreadable_files": [folders.shown(file) for file in self._skipped][:_NAMED],
        }
        return self._classes, metadata

    def source_bytes(self) -> int:
        """Returns the size of all images, bytes."""
        return self._bytes

    def examples(self, items: Sequence[folders.Entry]) -> Generator[base.KeyedExample, None, None]:
        """Yields the images, read in threads."""
        label = {name: number for number, name in enumerate(self._classes)} | {"": -1}
        contents = decode.threaded_map(lambda entry: self._files.read(entry.file), items, _READ)
        for entry, data in zip(items, contents, strict=True):
            name = folders.shown(entry.file)
            yield name, {"image": data, "label": label[entry.label], "file_name": name}


def _reason(error: DataError) -> str:
    """Returns why a file cannot be read, without its path and a remedy, which the list has."""
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        return "a link that leads nowhere"
    return getattr(cause, "strerror", None) or str(cause or error)
