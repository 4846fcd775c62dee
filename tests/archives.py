"""Small archives in the layouts of the datasets, with learnable images."""

import io
import pathlib
import tarfile
import zipfile
from typing import Any

import numpy as np
from PIL import Image


def wnid(label: int) -> str:
    """Returns the WordNet ID of a label; IDs sort like labels."""
    return f"n{1000 + 7 * label:08d}"


def color(label: int) -> tuple[int, int, int]:
    """Returns the mean color of a class's images, far from that of adjacent classes."""
    return 60 + 150 * (label % 2), 60 + 75 * (label // 2 % 3), 60 + 75 * (label // 6 % 3)


def pixels(label: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns an image with the class's color, stripes at the class's angle, and noise.

    Args:
      label: the class.
      size: height and width, pixels.
      rng: generator of the noise and of the stripes' phase.

    Returns:
      uint8 [size, size, 3].
    """
    y, x = np.mgrid[:size, :size] / size
    angle = np.pi * label / 8
    stripes = np.sin(2 * np.pi * (4 * (x * np.cos(angle) + y * np.sin(angle)) + rng.random()))
    image = np.array(color(label)) + 30 * stripes[..., None] + rng.normal(0, 5, (size, size, 3))
    return image.clip(0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, *, gray: bool = False) -> bytes:
    """Encodes an RGB image as JPEG, with one channel if `gray`."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert("L") if gray else picture).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def tiny_imagenet_files(
    classes: int, train_per_class: int, val_per_class: int, test_images: int, size: int = 64
) -> dict[str, bytes]:
    """Returns the files of an archive by path; every fifth training image is grayscale."""
    rng = np.random.default_rng(0)
    files = {}
    # As in the official archive, wnids.txt is unsorted, and words.txt has additional classes.
    files["wnids.txt"] = "".join(f"{wnid(c)}\n" for c in reversed(range(classes))).encode()
    words = [f"{wnid(c)}\tclass {c}, kind {c}\n" for c in range(classes + 3)]
    files["words.txt"] = "".join(words).encode()
    box = f"0\t1\t{size - 2}\t{size - 1}"
    annotations = []
    for label in range(classes):
        folder, names = f"train/{wnid(label)}", []
        for number in range(train_per_class):
            names.append(f"{wnid(label)}_{number}.JPEG")
            data = jpeg(pixels(label, size, rng), gray=number % 5 == 4)
            files[f"{folder}/images/{names[-1]}"] = data
        boxes = "".join(f"{name}\t{box}\n" for name in names)
        files[f"{folder}/{wnid(label)}_boxes.txt"] = boxes.encode()
        for number in range(val_per_class):
            name = f"val_{label + number * classes}.JPEG"
            files[f"val/images/{name}"] = jpeg(pixels(label, size, rng))
            annotations.append(f"{name}\t{wnid(label)}\t{box}\n")
    files["val/val_annotations.txt"] = "".join(annotations).encode()
    for number in range(test_images):
        data = jpeg(pixels(number % classes, size, rng))
        files[f"test/images/test_{number}.JPEG"] = data
    return files


def write_files(
    path: pathlib.Path, files: dict[str, bytes], root: str = "tiny-imagenet-200"
) -> pathlib.Path:
    """Writes files below `root` into an archive, if `path` has such a suffix, or a directory.

    Names that end in '/' create directories.
    """
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(f"{root}/{name}" if root else name, data)
        return path
    if ".tar" in path.suffixes or path.suffix == ".tgz":
        return write_tar(path, {f"{root}/{n}" if root else n: data for n, data in files.items()})
    for name, data in files.items():
        file = path / root / name
        (file if name.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            file.write_bytes(data)
    return path


def write_tar(path: pathlib.Path, files: dict[str, bytes], **settings: Any) -> pathlib.Path:
    """Writes a tar archive, compressed according to its name; `settings` are passed to tarfile."""
    packed = path.suffix.removeprefix(".").replace("tgz", "gz").replace("tar", "")
    mode: Any = f"w:{packed}"
    with tarfile.open(path, mode, **settings) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            archive.addfile(member, io.BytesIO(data))
    return path


class _RawName(zipfile.ZipInfo):
    """A member whose name is written as raw bytes."""

    raw = b""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        # 0x800: the name is UTF-8, which newer Pythons (3.14.10) set unless this method removes it.
        return self.raw, self.flag_bits & ~0x800


def write_raw_zip(
    path: pathlib.Path, files: dict[bytes, bytes], *, system: int = 0, extra: Any = None
) -> pathlib.Path:
    """Writes a zip archive with names in any encoding, like old programs.

    Args:
      path: path of the archive.
      files: contents by raw name.
      system: system of the writer; 0: DOS and Windows, 3: Unix.
      extra: returns a member's extra field, given its raw name.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            info = _RawName(name.decode("cp437"))
            info.raw, info.create_system = name, system
            if extra:
                info.extra = extra(name)
            archive.writestr(info, data)
    return path


def class_folders(counts: dict[str, int], size: int = 16) -> dict[str, bytes]:
    """Returns JPEGs by path, with `counts` images in each directory.

    The label that determines an image is the index of the directory's name among the sorted names.
    """
    rng = np.random.default_rng(0)
    labels = {name: label for label, name in enumerate(sorted({f.split("/")[-1] for f in counts}))}
    return {
        f"{folder}/{number}.jpg": jpeg(pixels(labels[folder.split("/")[-1]], size, rng))
        for folder, count in counts.items()
        for number in range(count)
    }


def write_tiny_imagenet(
    path: pathlib.Path,
    classes: int,
    train_per_class: int,
    val_per_class: int,
    test_images: int,
    size: int = 64,
) -> pathlib.Path:
    """Writes an archive in Tiny ImageNet's layout, for the dataset 'tiny_imagenet_subset'.

    Args:
      path: a zip archive, or the directory for the extracted 'tiny-imagenet-200'.
      classes: number of classes.
      train_per_class: training images per class.
      val_per_class: validation images per class.
      test_images: total images without a class.
      size: height and width, pixels.

    Returns:
      `path`.
    """
    files = tiny_imagenet_files(classes, train_per_class, val_per_class, test_images, size)
    return write_files(path, files)
