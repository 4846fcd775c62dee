r"""Measures how fast batches of Tiny ImageNet reach host memory and the device, alongside peers.

Contenders, each in a separate process, skipped if not installed:

  ours            input.pipeline on the decoded cache; "host": batches in memory, "device": also
                  transferred to the device
  records         the same batches, decoded from JPEG records at each step
                  (config.data.storage=records), with one thread per core
  torch-loader    PyTorch's DataLoader: files decoded by PIL, in two worker processes
  tf-data         tf.data: files decoded by tf.io.decode_jpeg, parallel map, AUTOTUNE

The peers decode each JPEG again in each epoch, as they do without a cache of decoded images. All
files are in the page cache. All contenders yield shuffled batches of uint8 pixels and labels, not
augmented (ours augments on the device). They take turns, round after round, while the others
wait. Reported are images per second, images per CPU second (of all threads and processes, that is,
the throughput of one core), and the growth of resident memory while reading, without pages of
mapped files.

  python -m benchmarks.input_pipeline --data-directory DATA --source tiny-imagenet-200.zip \
      --python-torch ~/torch/bin/python --python-tensorflow ~/tf/bin/python

On two CPU cores: a minute to unpack files, then (rounds x 6 x 5) seconds; 4 minutes with the
defaults.
"""

import argparse
import contextlib
import pathlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import measure, workers
from inception_jax.console import markdown_table

CONTENDERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ours": ("benchmarks.contenders.ours_input", {"storage": "decoded"}),
    "records": ("benchmarks.contenders.ours_input", {"storage": "records"}),
    "torch-loader": ("benchmarks.contenders.torch_input", {}),
    "tf-data": ("benchmarks.contenders.tf_input", {}),
}
PEERS = ("torch-loader", "tf-data")
MODES = ("host", "device")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--dataset", choices=("tiny_imagenet", "digits"), default="tiny_imagenet")
    parser.add_argument("--data-directory", default="", help="config.data.directory")
    parser.add_argument(
        "--source",
        default="",
        help="tiny-imagenet-200.zip or its extracted directory; required by the peers",
    )
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--files", type=int, default=20_000, help="JPEG files that the peers read")
    parser.add_argument("--workers", type=int, default=2, help="DataLoader processes")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds; each contender takes one turn per round"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per measurement")
    parser.add_argument("--python-torch", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--python-tensorflow", default=sys.executable, metavar="PYTHON")
    arguments = parser.parse_args(argv)
    if set(PEERS) & set(arguments.contenders) and not arguments.source:
        parser.error(
            "--source: not set, but the peers read JPEG files; set it to the archive, or use "
            "--contenders ours"
        )
    return arguments


@contextlib.contextmanager
def jpeg_files(source: str, count: int) -> Iterator[str]:
    """Yields a temporary directory with about `count` training images, evenly from all classes."""
    with tempfile.TemporaryDirectory(prefix="benchmark-jpeg-") as folder:
        if zipfile.is_zipfile(source):
            _unpack(source, count, pathlib.Path(folder))
        else:
            _copy(pathlib.Path(source), count, pathlib.Path(folder))
        yield folder


def _unpack(source: str, count: int, folder: pathlib.Path) -> None:
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if _is_training_image(name)]
        for name in _every_nth(names, count):
            archive.extract(name, folder)


def _copy(source: pathlib.Path, count: int, folder: pathlib.Path) -> None:
    names = [path.relative_to(source).as_posix() for path in source.rglob("*.JPEG")]
    for name in _every_nth([name for name in names if _is_training_image(name)], count):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _is_training_image(name: str) -> bool:
    return name.endswith(".JPEG") and "train" in name.split("/")[:-1]


def _every_nth(names: Sequence[str], count: int) -> Sequence[str]:
    return sorted(names)[:: max(1, len(names) // count)]


def contenders(arguments: argparse.Namespace, files: str) -> list[workers.Contender]:
    """Returns the selected contenders."""
    pythons = {"torch-loader": arguments.python_torch, "tf-data": arguments.python_tensorflow}
    # Workers run in the root of the repository.
    directory, source = (
        str(pathlib.Path(path).expanduser().absolute()) if path else ""
        for path in (arguments.data_directory, arguments.source)
    )
    shared = {
        "dataset": arguments.dataset,
        "data_directory": directory,
        "source": source,
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
        "platform": arguments.platform,
        "workers": arguments.workers,
        "files": files,
    }
    return [
        workers.Contender(
            name=name,
            module=CONTENDERS[name][0],
            settings={**shared, **CONTENDERS[name][1]},
            python=pythons.get(name, sys.executable),
        )
        for name in arguments.contenders
    ]


def results(
    numbers: Mapping[tuple[str, str], Sequence[Mapping[str, float]]],
) -> list[dict[str, Any]]:
    """Returns an entry per contender and mode."""
    entries = []
    for (name, mode), rounds in numbers.items():
        entry: dict[str, Any] = {"contender": name, "mode": mode}
        for figure in ("images_per_second", "images_per_cpu_second", "memory_growth"):
            samples = [each[figure] for each in rounds]
            entry[figure] = {**measure.summarize(samples).to_dict(), "samples": samples}
        entries.append(entry)
    return entries


def report(entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table; the ratio is our images/s to host memory divided by the contender's."""
    ours = next((e["images_per_second"]["median"] for e in entries if e["contender"] == "ours"), 0)
    rows = []
    for entry in entries:
        rate = entry["images_per_second"]
        rows.append(
            [
                entry["contender"],
                entry["mode"],
                f"{rate['median']:,.0f}",
                f"{rate['low']:,.0f}–{rate['high']:,.0f}",
                f"{100 * rate['spread']:.0f}%",
                f"{entry['images_per_cpu_second']['median']:,.0f}",
                f"{ours / rate['median']:.1f}" if ours else "",
                f"{entry['memory_growth']['high'] / 1e6:.0f}",
            ]
        )
    head = ["batches", "to", "images/s", "low–high", "spread", "images/CPU-s", "ours/this"]
    return markdown_table([*head, "memory growth, MB"], rows)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns the contents of the JSON file."""
    with contextlib.ExitStack() as stack:
        files = ""
        if set(PEERS) & set(arguments.contenders):
            files = stack.enter_context(jpeg_files(arguments.source, arguments.files))
        ready, absent = stack.enter_context(workers.running(contenders(arguments, files)))
        commands = [{"mode": mode, "seconds": arguments.seconds} for mode in MODES]
        numbers = workers.take_turns(ready, commands, rounds=arguments.rounds)
        return {
            "benchmark": "input_pipeline",
            "environment": measure.environment(),
            "settings": {
                name: getattr(arguments, name)
                for name in ("dataset", "image_size", "batch_size", "files", "workers", "rounds")
            },
            "contenders": {worker.name: worker.facts for worker in ready},
            "absent": absent,
            "results": results(numbers),
        }


def main() -> None:
    """Runs the command."""
    arguments = parse()
    result = run(arguments)
    measure.write_json(arguments.json, result)
    print(f"Batches of {arguments.batch_size}, {arguments.image_size} px\n")
    print(report(result["results"]))
    for name, why in result["absent"].items():
        print(f"Skipped: {name} ({why})")


if __name__ == "__main__":
    measure.run(main)
