r"""Compares the estimate of the training step by tools.compile with its measured time on a GPU.

The step is that of step_time: GoogLeNet with BatchNorm on a batch of noise on the device. It is
compiled from XLA's description of this machine's GPU, without using the GPU, and timed in another
process, which compiles it on the GPU:

  python -m benchmarks.estimates --platform gpu --stem s32 --batch-size 512 --dtype bfloat16 \
      --target-config runs/target_config.pbtxt

The description is also stored in --target-config, for the flag --target_config of tools.compile on
machines without such a GPU. Without a GPU, the CPU's step is timed, and --target names a GPU for
the estimate, which then says nothing about the measured time.

Takes about 5 minutes, mostly for the two compilations.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import measure, step_time, workers
from inception_jax.errors import RunError, UserError

# Any program: XLA describes the GPU among the files that it dumps for it.
_ANY_PROGRAM = "import jax; jax.jit(lambda x: x + 1)(1.0).block_until_ready()"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    step_time.add_network_flags(parser)
    parser.add_argument("--dtype", choices=step_time.DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="number of measurements")
    parser.add_argument("--seconds", type=float, default=2.0, help="approximate seconds of each")
    parser.add_argument(
        "--target-config",
        type=measure.local_path,
        metavar="FILE",
        help="also store the description of the GPU in this file",
    )
    parser.add_argument("--target", default="h100", help="GPU for the estimate, if there is none")
    return parser.parse_args(argv)


def describe_gpu() -> str:
    """Returns this machine's GPU as XLA describes it: a GpuTargetConfigProto as text.

    Raises:
      BenchmarkError: if XLA writes none.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
        done = subprocess.run(
            [sys.executable, "-c", _ANY_PROGRAM],
            env=os.environ | {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            check=False,
        )
        files = sorted(pathlib.Path(folder).glob("*.gpu_target_config.pbtxt"))
        if done.returncode or not files:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise measure.BenchmarkError(f"XLA did not describe a GPU: {lines[-1]}")
        return files[0].read_text(encoding="utf-8")


def estimate(arguments: argparse.Namespace, description: str) -> dict[str, Any]:
    """Compiles the step for the described GPU, or --target if the text is empty.

    Returns:
      "target", and the record of the program as in tools.compile.

    Raises:
      UserError: if the compiler is not installed, or the step does not fit.
    """
    from benchmarks.contenders import ours_step
    from inception_jax.programs import compile as programs
    from inception_jax.programs import report, targets
    from inception_jax.runtime import devices

    # The GPU is left to the other process.
    devices.initialize(platform="cpu", log=measure.log)
    target = targets.get(arguments.target)
    if description:
        target = targets.from_target_config(description, 1, "the description of this GPU")
    run = programs.assemble(ours_step.make_config(_settings(arguments)), target, log=measure.log)
    program = programs.compile_train_step(run, target, arguments.image_size, measure.log)
    return {"target": target.name, **report.program_record(program, target)}


def measured(arguments: argparse.Namespace) -> tuple[str, measure.Summary]:
    """Times the step in a process of its own.

    Returns:
      The device, and seconds per step.

    Raises:
      BenchmarkError: if the process fails.
    """
    worker = workers.Worker(
        workers.Contender("ours", "benchmarks.contenders.ours_step", _settings(arguments))
    )
    try:
        if worker.missing:
            raise measure.BenchmarkError(f"{worker.missing} is not installed")
        turns = [worker.ask("train", seconds=arguments.seconds) for _ in range(arguments.rounds)]
        return worker.facts["device"], measure.summarize(turn["seconds"] for turn in turns)
    finally:
        worker.close()


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = step_time.network_settings(arguments)
    return {**settings, "dtype": arguments.dtype, "modes": ["train"]}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns the contents of the JSON file."""
    has_gpu = arguments.platform == "gpu"
    description = describe_gpu() if has_gpu else ""
    if arguments.target_config and description:
        arguments.target_config.write_text(description, encoding="utf-8")
    device, seconds = measured(arguments)
    estimated, reason = None, ""
    try:
        estimated = estimate(arguments, description)
    except (RunError, UserError) as error:
        reason = str(error)
    ratios = None
    if estimated and has_gpu:
        # The slow end of the estimate comes first: the smaller ratio.
        ratios = [seconds.median / estimated["seconds"][end] for end in ("slowest", "fastest")]
    return {
        "benchmark": "estimates",
        "environment": measure.environment(),
        "settings": {**_settings(arguments), "rounds": arguments.rounds},
        "device": device,
        "seconds_per_step": seconds.to_dict(),
        "estimate": estimated,
        "not_estimated": reason,
        "measured_by_estimated": ratios,
    }


def report_lines(result: dict[str, Any]) -> list[str]:
    """Returns what to print."""
    seconds, estimated = result["seconds_per_step"], result["estimate"]
    lines = [
        f"measured   {_ms(seconds['median'])} a step ({_ms(seconds['low'])} to "
        f"{_ms(seconds['high'])}) on {result['device']}"
    ]
    if not estimated:
        return [*lines, f"estimated  not: {result['not_estimated']}"]
    found = estimated["seconds"]
    lines.append(
        f"estimated  {_ms(found['fastest'])} to {_ms(found['slowest'])} a step on "
        f"{estimated['target']}; roofline {_ms(found['roofline'])}"
    )
    if ratios := result["measured_by_estimated"]:
        return [*lines, f"ratio      {ratios[0]:.2f} to {ratios[1]:.2f} (measured / estimated)"]
    return [*lines, "ratio      none: the estimate is for a GPU, and this machine has none"]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def main() -> None:
    """Runs the command."""
    arguments = parse()
    result = run(arguments)
    measure.write_json(arguments.json, result)
    print("\n".join(report_lines(result)))
    if arguments.target_config and arguments.platform != "gpu":
        print("Not stored: the description of the GPU, as this machine has none")


if __name__ == "__main__":
    measure.run(main)
