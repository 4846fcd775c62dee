"""PyTorch's DataLoader over JPEG files: PIL decodes them in worker processes."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils import data

from benchmarks.contenders import reading, serve


class Files(data.Dataset):
    """The images of a folder of class folders, as torchvision's ImageFolder reads them."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._paths = [str(path) for path in sorted(folder.rglob("*.JPEG"))]
        classes = sorted({path.rsplit("/", 1)[0] for path in self._paths})
        label_of = {name: index for index, name in enumerate(classes)}
        self._labels = [label_of[path.rsplit("/", 1)[0]] for path in self._paths]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self._paths[index]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))), self._labels[index]


def make(settings: dict[str, Any]) -> serve.Contender:
    """Creates the contender with the mode "host"."""
    files = Files(pathlib.Path(settings["files"]))
    loader: Any = data.DataLoader(
        files,
        batch_size=settings["batch_size"],
        shuffle=True,
        num_workers=settings["workers"],
        persistent_workers=True,
        drop_last=True,
    )

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    facts = {"versions": {"torch": torch.__version__}, "images": len(files), "device": "cpu"}
    return serve.Contender(
        facts, {"host": reading.timed_reader(batches(), lambda batch: len(batch[1]))}
    )
