"""Times the training and evaluation step, alongside PyTorch's and Keras's on the same network.

GoogLeNet with BatchNorm, 200 classes, no auxiliary heads, SGD with Nesterov momentum; the same
batch and image size. Contenders, each in a separate process, skipped if not installed:

  ours            the step of the training command
  torch           PyTorch, eager, channels_last, autocast for bfloat16
  torch-compile   the same under torch.compile
  keras           Keras on TensorFlow, mixed_bfloat16 for bfloat16
  keras-xla       the same with jit_compile=True; slow on a CPU, so only run if named

All steps are bare: the batch is on the device, nothing is read. Ours does more than the peers': it
augments and normalizes uint8 images, and computes top-1, top-5 and the gradient norm; the peers get
normalized float32. Contenders take turns, round after round, while the others wait.

"of peak" is the network's operations per second (two per multiply-add, three passes in training)
divided by those of the fastest product of square matrices that any contender reached in the same
run and dtype.

The peers may run in other environments, which need not have this package's dependencies:

  python -m benchmarks.step_time --python-torch ~/torch/bin/python --python-keras ~/tf/bin/python

On two CPU cores: up to 40 s per contender to get ready (torch-compile: 150 s), then about 12 s per
contender and round; about 18 minutes with the defaults. On a GPU, set the platform:

  python -m benchmarks.step_time --platform gpu --stem s32 --batch-size 1024 --dtypes bfloat16
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import measure, workers
from benchmarks.contenders import network
from inception_jax.console import markdown_table

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
# The processes share GPU memory, all of which JAX and TensorFlow would otherwise allocate.
SHARED_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
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
    """Adds the flags for the platform and the network."""
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--stem", choices=network.STEMS, default="paper")
    parser.add_argument("--image-size", type=int, default=64, help="pixels; a multiple of 32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--matmul-size", type=int, default=4096, help="side of the matrices that measure the peak"
    )


def network_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of the flags of `add_network_flags` as settings of a contender."""
    names = ("platform", "stem", "image_size", "batch_size", "matmul_size")
    return {name: getattr(arguments, name) for name in names} | {"classes": CLASSES}


def contenders(arguments: argparse.Namespace) -> list[workers.Contender]:
    """Returns the selected contenders, by dtype and then by name."""
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
    """Returns the commands of a contender's turn."""
    matmul = {"mode": "matmul", "seconds": arguments.seconds / 4}
    return [matmul, *({"mode": mode, "seconds": arguments.seconds} for mode in arguments.modes)]


def check_same_network(ready: Sequence[workers.Worker], stem: str) -> int:
    """Checks that all contenders train the same network and returns its parameter count.

    Raises:
      ContenderError: if one does not.
    """
    expected = network.parameters(stem, CLASSES)
    for worker in ready:
        parameters = worker.facts["parameters"]
        if parameters != expected:
            raise workers.ContenderError(
                f"{worker.name}: {parameters:,} parameters, expected {expected:,}; "
                "not the same network"
            )
    return expected


def matmul_peaks(
    numbers: Mapping[tuple[str, str], Sequence[Mapping[str, float]]], size: int
) -> dict[str, dict[str, Any]]:
    """Returns the fastest matrix product of each dtype, operations per second, and its contender.

    Args:
      numbers: from `workers.take_turns`; the name of a worker ends with its dtype.
      size: side of the matrices.
    """
    peaks: dict[str, dict[str, Any]] = {}
    for (name, mode), rounds in numbers.items():
        if mode == "matmul":
            who, dtype = name.rsplit(" ", 1)
            rate = 2 * size**3 / measure.summarize(each["seconds"] for each in rounds).median
            if rate > peaks.get(dtype, {"flops": 0})["flops"]:
                peaks[dtype] = {"flops": rate, "contender": who, "size": size}
    return peaks


def results(
    numbers: Mapping[tuple[str, str], Sequence[Mapping[str, float]]],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Returns an entry per contender, dtype and mode: seconds per step, images/s, ratio to peak."""
    peaks = matmul_peaks(numbers, arguments.matmul_size)
    entries = []
    for (name, mode), rounds in numbers.items():
        if mode == "matmul":
            continue
        who, dtype = name.rsplit(" ", 1)
        samples = [each["seconds"] for each in rounds]
        summary = measure.summarize(samples)
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
    """Returns a table per mode; the ratio is our images/s divided by the contender's."""
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
        head = ["dtype", "ms/step", "low–high", "spread", "images/s", "ours/this", "of peak"]
        parts.append(markdown_table([mode, *head], rows))
    return "\n\n".join(parts)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns the contents of the JSON file."""
    with workers.running(contenders(arguments)) as (ready, absent):
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
