"""Times the training and evaluation step beside PyTorch's and Keras's, on the same network.

GoogLeNet with BatchNorm, 200 classes, no auxiliary heads, SGD with Nesterov momentum; the same
batch and image size. Contenders, each in a process of its own, those that are installed:

  ours            the step of the training command
  torch           PyTorch, eager, channels_last, autocast for bfloat16
  torch-compile   the same under torch.compile
  keras           Keras on TensorFlow, mixed_bfloat16 for bfloat16
  keras-xla       the same with jit_compile=True; slow on a CPU, so only if named

Everyone's step is bare: the batch lies on the device, nothing is read. Ours holds more than the
peers': it augments uint8 images, normalises them, and computes top-1, top-5 and the gradient's
norm; the peers get normalised float32. Contenders take turns, round after round, while the others
wait.
"Share of peak" is the operations of the network's multiplications (two a multiply-add, three passes
in training) a second, over those of the fastest product of square matrices that any contender
reached in the same run and type.

The peers may live in other environments, which need not have this package's dependencies:

  python -m benchmarks.step_time --python-torch ~/torch/bin/python --python-keras ~/tf/bin/python

On two CPU cores: up to 40 s a contender to get ready (torch-compile: 150 s), then some 12 s a
contender and round; with the defaults about 18 minutes. On a GPU name the platform:

  python -m benchmarks.step_time --platform gpu --stem s32 --batch-size 1024 --dtypes bfloat16
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import measure, workers
from benchmarks.contenders import network

MODULES = {
    "ours": ("benchmarks.contenders.ours_step", None),
    "torch": ("benchmarks.contenders.torch_step", False),
    "torch-compile": ("benchmarks.contenders.torch_step", True),
    "keras": ("benchmarks.contenders.keras_step", False),
    "keras-xla": ("benchmarks.contenders.keras_step", True),
}
DEFAULT = ["ours", "torch", "torch-compile", "keras"]
DTYPES = ("float32", "bfloat16")
MODES = ("train", "eval")
CLASSES = 200
# Processes share the GPU's memory here, which JAX and TensorFlow would otherwise take whole.
SHARED_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = measure.parser(__doc__)
    add_network_flags(parser)
    parser.add_argument("--contenders", nargs="+", choices=MODULES, default=DEFAULT)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds; each contender takes one turn per round"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="approximate seconds per measurement"
    )
    parser.add_argument("--python-torch", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--python-keras", default=sys.executable, metavar="PYTHON")
    parser.add_argument(
        "--torch-compile-mode",
        default="default",
        help="mode of torch.compile, such as max-autotune",
    )
    return parser.parse_args(argv)


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say what is computed, and where."""
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--stem", choices=network.STEMS, default="paper")
    parser.add_argument("--image-size", type=int, default=64, help="pixels; a multiple of 32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--matmul-size", type=int, default=4096, help="side of the matrices that measure the peak"
    )


def network_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what `add_network_flags` read, as contenders take it."""
    names = ("platform", "stem", "image_size", "batch_size", "matmul_size")
    return {name: getattr(arguments, name) for name in names} | {"classes": CLASSES}


def contenders(arguments: argparse.Namespace) -> list[workers.Contender]:
    """Returns the contenders that were asked for, by type and then by name."""
    pythons = {"torch": arguments.python_torch, "keras": arguments.python_keras}
    return [
        workers.Contender(
            name=f"{name} {dtype}",
            module=MODULES[name][0],
            settings={
                **network_settings(arguments),
                "dtype": dtype,
                "modes": [*arguments.modes, "matmul"],
                "compile": MODULES[name][1],
                "compile_mode": arguments.torch_compile_mode,
            },
            python=pythons.get(name.split("-")[0], sys.executable),
            environment=SHARED_GPU,
        )
        for dtype in arguments.dtypes
        for name in arguments.contenders
    ]


def commands(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns what a contender measures in its turn."""
    matmul = {"mode": "matmul", "seconds": arguments.seconds / 4}
    return [matmul, *({"mode": mode, "seconds": arguments.seconds} for mode in arguments.modes)]


def check_same_network(ready: Sequence[workers.Worker], stem: str) -> int:
    """Checks that all contenders train the same network, and returns its parameter count.

    Raises:
      ContenderError: naming one that does not.
    """
    expected = network.parameters(stem, CLASSES)
    for worker in ready:
        found = worker.facts["parameters"]
        if found != expected:
            raise workers.ContenderError(
                f"{worker.name}: {found:,} parameters, expected {expected:,}; not the same network"
            )
    return expected


def matmul_peaks(
    numbers: Mapping[tuple[str, str], Sequence[Mapping[str, float]]], size: int
) -> dict[str, dict[str, Any]]:
    """Returns by type the highest rate of matrix products, operations a second, and whose it is.

    Args:
      numbers: as `workers.take_turns` gives them; a worker's name ends with its type.
      size: side of the matrices.
    """
    peaks: dict[str, dict[str, Any]] = {}
    for (name, mode), rounds in numbers.items():
        if mode == "matmul":
            who, dtype = name.rsplit(" ", 1)
            rate = 2 * size**3 / measure.summarise(each["seconds"] for each in rounds).median
            if rate > peaks.get(dtype, {"flops": 0})["flops"]:
                peaks[dtype] = {"flops": rate, "contender": who, "size": size}
    return peaks


def results(
    numbers: Mapping[tuple[str, str], Sequence[Mapping[str, float]]],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Returns one entry a contender, type and mode: seconds a step, images/s, share of the peak."""
    peaks = matmul_peaks(numbers, arguments.matmul_size)
    entries = []
    for (name, mode), rounds in numbers.items():
        if mode == "matmul":
            continue
        who, dtype = name.rsplit(" ", 1)
        samples = [each["seconds"] for each in rounds]
        summary = measure.summarise(samples)
        flops = network.flops(mode, arguments.stem, arguments.image_size, CLASSES)
        rate = arguments.batch_size / summary.median
        entries.append(
            {
                "contender": who,
                "dtype": dtype,
                "mode": mode,
                "seconds_per_step": {**summary.to_dict(), "samples": samples},
                "images_per_second": rate,
                "share_of_peak": flops * rate / peaks[dtype]["flops"],
            }
        )
    return entries


def report(entries: Sequence[Mapping[str, Any]], modes: Sequence[str]) -> str:
    """Returns a table a mode; the ratio is our images/s over the contender's, of the same type."""
    parts = []
    for mode in modes:
        rows = []
        ours = {
            each["dtype"]: each["images_per_second"]
            for each in entries
            if each["mode"] == mode and each["contender"] == "ours"
        }
        for entry in entries:
            if entry["mode"] == mode:
                seconds, rate = entry["seconds_per_step"], entry["images_per_second"]
                base = ours.get(entry["dtype"])
                rows.append(
                    [
                        entry["contender"],
                        entry["dtype"],
                        f"{1e3 * seconds['median']:.1f}",
                        f"{1e3 * seconds['low']:.1f}–{1e3 * seconds['high']:.1f}",
                        f"{100 * seconds['spread']:.0f}%",
                        f"{rate:,.0f}",
                        f"{base / rate:.2f}" if base else "",
                        f"{100 * entry['share_of_peak']:.0f}%",
                    ]
                )
        head = ["type", "ms a step", "low–high", "spread", "images/s", "ours/this", "of peak"]
        parts.append(measure.table([mode, *head], rows))
    return "\n\n".join(parts)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, and returns what the JSON file holds."""
    with workers.started(contenders(arguments)) as (ready, absent):
        parameters = check_same_network(ready, arguments.stem)
        numbers = workers.take_turns(ready, commands(arguments), rounds=arguments.rounds)
        return {
            "benchmark": "step_time",
            "environment": measure.environment(),
            "settings": {**network_settings(arguments), "rounds": arguments.rounds},
            "parameters": parameters,
            "contenders": {worker.name: worker.facts for worker in ready},
            "absent": absent,
            "matmul_peak": matmul_peaks(numbers, arguments.matmul_size),
            "results": results(numbers, arguments),
        }


def main() -> None:
    """Runs the command."""
    arguments = parse()
    result = run(arguments)
    measure.write_json(arguments.json, result)
    print(
        f"GoogLeNet, stem {arguments.stem}, {result['parameters']:,} parameters, "
        f"{arguments.image_size} px, batch {arguments.batch_size}; {arguments.rounds} rounds\n"
    )
    print(report(result["results"], arguments.modes))
    print()
    for dtype, peak in result["matmul_peak"].items():
        print(
            f"Peak, {dtype}: {peak['flops'] / 1e9:,.0f} GF/s, reached by {peak['contender']} on "
            f"{peak['size']} x {peak['size']} matrices"
        )
    for name, why in result["absent"].items():
        print(f"Skipped: {name} ({why})")


if __name__ == "__main__":
    measure.run(main)
