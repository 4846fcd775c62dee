"""Builds a data set from one folder of images per class (folders.py detects the layout)."""

import collections
import itertools
import pathlib
from collections.abc import Generator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from inception_jax.console import Progress
from inception_jax.datasets import decode
from inception_jax.datasets.builders import base, folders
from inception_jax.errors import DataError, join_truncated
from inception_jax.registry import DATASETS

# Images checked per task of a thread, one by one.
_CHECK_CHUNK_SIZE = 16
# Images read per task of a thread and kept in memory: photos have up to about 10 MB each.
_READ_CHUNK_SIZE = 2
# Maximum number of unreadable files named in the metadata.
_MAX_NAMED = 100


# TFDS has a builder of this name too, which cannot be a base class: it needs TensorFlow.
class ImageFolder(base.ImageBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds from images in any format that PIL reads, storing the files unchanged.

    Features: image, label (index into the sorted class names; −1 in a test split without classes),
    file_name (path below the source, unprintable characters escaped).

    Args:
      val_fraction: fraction of each class to hold out if the source has no validation folder.
      on_unreadable: 'refuse' or 'skip' corrupt files and files that are not images.
      archive_encoding: of names whose encoding the archive does not declare; '': unknown.
      layout: 'auto', or 'classes' if no folder is a split.
      kwargs: as for `base.ImageBuilder`.
    """

    VERSION = tfds.core.Version(DATASETS.get("image_folder").version)
    DESCRIPTION = "Custom images, one folder per class."

    def __init__(
        self,
        *,
        val_fraction: float,
        on_unreadable: str,
        layout: str,
        archive_encoding: str,
        **kwargs: Any,
    ) -> None:
        self._val_fraction, self._on_unreadable, self._layout_mode = (
            val_fraction,
            on_unreadable,
            layout,
        )
        self._encoding = archive_encoding
        super().__init__(**kwargs)

    def open(self) -> None:
        """Finds the images, decodes each once, and assigns them to splits.

        Unreadable files must be known before images are held out, so that the held-out fraction of
        each class is computed from readable images.
        """
        if not self.source:
            raise DataError(
                "config.data.source = '': image_folder has no default source; set it to a folder "
                "that contains one folder of images per class, or to a zip or tar archive of it"
            )
        self._files = folders.open_source(
            self.source, encoding=self._encoding, scratch=pathlib.Path(self.data_dir_root)
        )
        layout = folders.layout(self._files, self._layout_mode)
        if links := layout.broken_links:
            raise DataError(
                f"{self._files.path}: {folders.quote_and_join(links)}: found a link that cannot be "
                "followed where the classes are. If it led to a class, restore what it leads to or "
                "store that in the archive (tar --dereference, zip without -y); otherwise remove it"
            )
        self._log_layout(layout)
        self._make_splits(layout)

    def _log_layout(self, layout: folders.Layout) -> None:
        if layout.folders:
            named = [f"{split} = {folder!r}" for split, folder in layout.folders.items()]
            self.log(f"{self._files.path}: splits: {', '.join(named)}")
        if layout.ignored:
            named = [folders.escape_for_display(path) for path in layout.ignored]
            paths = f"{len(named):,} path{'s' * (len(named) > 1)}"
            self.log(
                f"{self._files.path}: ignored {paths} (system and editor files, this program's "
                f"output, notes and the like): {join_truncated(named)}"
            )
        if layout.imageless_folders:
            self.log(
                f"{self._files.path}: {folders.quote_and_join(layout.imageless_folders)}: no "
                "images, so not used as a class"
            )

    def _make_splits(self, layout: folders.Layout) -> None:
        entries = list(itertools.chain.from_iterable(layout.splits.values()))
        problems, self._bit_depth = self._inspect(entries)
        if problems and self._on_unreadable == "refuse":
            raise DataError(
                f"{self._describe_problems(problems, len(entries))}\nFix or remove these files, "
                "or set config.data.on_unreadable=skip to skip them"
            )
        splits = {
            split: [entry for entry in members if entry.file not in problems]
            for split, members in layout.splits.items()
        }
        # Settings that the content depends on; only these are compared with later settings.
        self._settings: dict[str, Any] = {"layout": self._layout_mode}
        if self._files.names_depend_on_encoding:
            self._settings["archive_encoding"] = self._encoding
        if problems:
            self.log(f"{self._describe_problems(problems, len(entries))}\nSkipping these files")
            self._settings["on_unreadable"] = self._on_unreadable
        if not layout.has_validation:
            self._settings["val_fraction"] = self._val_fraction
            train, held = folders.hold_out(
                splits[folders.TRAIN], self._val_fraction, root=layout.root
            )
            splits |= {folders.TRAIN: train, folders.VALIDATION: held}
        for split in (folders.TEST, folders.UNLABELED):
            if split in splits and not splits[split]:
                self.log(
                    f"{self._files.path}: the {split} folder contains no images; the split is "
                    "skipped"
                )
                del splits[split]
        self._classes, self._splits, self._skipped = layout.classes, splits, problems
        self._digest = self._files.fingerprint(layout.files)
        self._bytes = sum(self._files.sizes[entry.file] for entry in entries)
        self._check_counts(layout)

    def _inspect(
        self, entries: Sequence[folders.LabeledFile]
    ) -> tuple[dict[str, decode.Problem], int]:
        """Decodes all files once.

        Returns:
          The problem of each file that cannot be decoded, and the bit depth of the others, as in
          `decode.Inspection`.
        """
        problems: dict[str, decode.Problem] = {}
        depths: dict[str, int] = {}
        with Progress(f"{self.name}: checking images", len(entries), log=self.log) as progress:
            inspections = decode.threaded_map(self._inspect_file, entries, _CHECK_CHUNK_SIZE)
            for entry, (problem, bits) in zip(entries, inspections, strict=True):
                if problem is not None:
                    problems[entry.file] = problem
                if bits:
                    depths[entry.file] = bits
                progress.update(1)
        bit_depth = max(depths.values(), default=0)
        if bit_depth:
            self.log(
                f"{self._files.path}: the values of files with 16 bits per channel use "
                f"{bit_depth} bits, of which the upper 8 are kept (override with "
                "config.data.bit_depth)"
            )
        # In these files no pixel is brighter than 15 of 255.
        if dark := [file for file, bits in depths.items() if bits <= bit_depth - 4]:
            most = max(depths[file] for file in dark)
            brightest = next(file for file, bits in depths.items() if bits == bit_depth)
            self.log(
                f"{self._files.path}: {len(dark):,} of the {len(depths):,} files with 16 bits per "
                f"channel use {most} bits or fewer and are almost black compared to the others: "
                f"{join_truncated([folders.escape_for_display(file) for file in dark])}. "
                f"If the others, such as {folders.escape_for_display(brightest)}, merely have hot "
                f"pixels, set config.data.bit_depth={most}; if they are from another camera, "
                "scale all images to 8 bits first"
            )
        return problems, bit_depth

    def _inspect_file(self, entry: folders.LabeledFile) -> decode.Inspection:
        try:
            data = self._files.read(entry.file)
        except DataError as error:
            return decode.Inspection(decode.Problem(_read_error(error), "replace or remove it"))
        return decode.inspect(data, entry.file)

    def _describe_problems(self, problems: dict[str, decode.Problem], count: int) -> str:
        """Describes the unreadable files, one line per kind, the most frequent first."""
        kinds: dict[tuple[str, str], list[str]] = {}
        for file, problem in problems.items():
            detail = f" ({problem.detail})" if problem.detail else ""
            named = kinds.setdefault((problem.kind, problem.advice), [])
            named.append(f"{folders.escape_for_display(file)}{detail}")
        lines = [
            f"\n  {kind} ({len(named):,}): {join_truncated(named)}. {advice}"
            for (kind, advice), named in sorted(kinds.items(), key=lambda each: -len(each[1]))
        ]
        return (
            f"{self._files.path}: {len(problems):,} of {count:,} files are corrupt or not images:"
            + "".join(lines)
        )

    def _check_counts(self, layout: folders.Layout) -> None:
        counts = collections.Counter(entry.label for entry in self._splits[folders.TRAIN])
        if empty := [name for name in self._classes if not counts[name]]:
            raise DataError(
                f"{self._files.path}: {len(empty):,} of {len(self._classes):,} classes have no "
                f"training images: {folders.quote_and_join(empty)}. Add images, or remove the "
                "class folders"
            )
        if not self._splits[folders.VALIDATION]:
            if layout.has_validation:
                folder = layout.folders[folders.VALIDATION]
                remedy = f"Add images to {folder}/, or remove it to hold out training images"
            else:
                remedy = (
                    "Add images until at least one class has two, or add val/ with one folder per "
                    "class"
                )
            raise DataError(f"{self._files.path}: no images are left for evaluation. {remedy}")

    def class_names_and_metadata(self) -> tuple[Sequence[str], dict[str, Any]]:
        """Returns the class names, and metadata: source, settings used, and files skipped."""
        metadata = {
            "source": str(self._files.path.absolute()),
            "source_digest": self._digest,
            "settings": self._settings,
            "bit_depth": self._bit_depth,
            "unreadable_count": len(self._skipped),
            "unreadable_files": [folders.escape_for_display(file) for file in self._skipped][
                :_MAX_NAMED
            ],
        }
        return self._classes, metadata

    def source_bytes(self) -> int:
        """Returns the total size of all images, bytes."""
        return self._bytes

    def examples(
        self, items: Sequence[folders.LabeledFile]
    ) -> Generator[base.KeyedExample, None, None]:
        """Yields the examples, read in threads."""
        label = {name: number for number, name in enumerate(self._classes)} | {"": -1}
        contents = decode.threaded_map(
            lambda entry: self._files.read(entry.file), items, _READ_CHUNK_SIZE
        )
        for entry, data in zip(items, contents, strict=True):
            name = folders.escape_for_display(entry.file)
            yield name, {"image": data, "label": label[entry.label], "file_name": name}


def _read_error(error: DataError) -> str:
    """Returns why a file cannot be read, without the path and remedy, which the list adds."""
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        return "a broken link"
    return getattr(cause, "strerror", None) or str(cause or error)
