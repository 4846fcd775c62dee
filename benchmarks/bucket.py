r"""Measures saving and restoring checkpoints in a bucket, against a local folder.

The state is that of an experiment's network and optimizer before the first step. Rounds alternate
between the two places. Measured are the seconds for which a save blocks training, those until the
checkpoint counts, and those of opening the checkpoints and restoring the newest one; with
--emulator also requests and bytes, counted by the proxy of the tests, and those of a whole run of
experiments/digits.py, for each of its training steps.

    python -m benchmarks.bucket --folder gs://BUCKET/benchmark
    python -m benchmarks.bucket --emulator --latency 0.05

--emulator starts the storage server of the tests on this machine, whose proxy delays each request
by --latency seconds. The folder must not exist; it is deleted at the end. About a minute on two CPU
cores, three with --emulator.
"""

import argparse
import contextlib
import pathlib
import statistics
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax

import inception_jax as ij
from benchmarks import measure
from benchmarks.contenders import ours_step
from inception_jax import config as configs
from inception_jax import experiment
from inception_jax.console import markdown_table
from inception_jax.storage import buckets, paths
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.initialization import create_state
from inception_jax.training.state import TrainState

_TIMES = ("blocked", "saved", "restored")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--folder", help="a new folder in a bucket")
    place.add_argument(
        "--emulator", action="store_true", help="use the storage server of the tests"
    )
    parser.add_argument("--latency", type=float, default=0.0, help="only with --emulator")
    parser.add_argument("--experiment", default="experiments/tiny.py")
    parser.add_argument("--classes", type=int, default=200, help="classes of the dataset")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    if arguments.latency and not arguments.emulator:
        parser.error("--latency needs --emulator")
    return arguments


@contextlib.contextmanager
def bucket(arguments: argparse.Namespace) -> Iterator[tuple[paths.Path, list[Any]]]:
    """Yields the folder in the bucket and the list of requests, empty without the proxy."""
    if not arguments.emulator:
        folder = paths.user_path(arguments.folder, f"--folder={arguments.folder}")
        if paths.is_local(folder):
            raise measure.BenchmarkError(f"--folder={folder}: must start with gs://")
        if buckets.list_files(folder):
            raise measure.BenchmarkError(f"--folder={folder}: exists; use a new folder")
        yield folder, []
        return
    from tests import gcs

    with gcs.serving() as (server, proxy):
        server.create_bucket("benchmark")
        proxy.inject(gcs.Delay(arguments.latency))
        yield paths.user_path("gs://benchmark/run", "--emulator"), proxy.requests


def measure_round(folder: paths.Path, state: TrainState, step: int) -> dict[str, float]:
    """Returns the seconds of a save and a restore, by name."""
    state = state.replace(step=state.step + step)
    with Checkpoints(folder, keep_last=1, keep_best=0) as checkpoints:
        start = time.perf_counter()
        checkpoints.save(state, progress={}, metrics={"top1": 1.0})
        blocked = time.perf_counter()
        checkpoints.wait()
        saved = time.perf_counter()
    opened = time.perf_counter()
    with Checkpoints(folder) as checkpoints:
        jax.block_until_ready(checkpoints.restore(step, state))
        restored = time.perf_counter()
    return {"blocked": blocked - start, "saved": saved - start, "restored": restored - opened}


def count(requests: Sequence[Any]) -> dict[str, int]:
    """Returns the numbers of requests and bytes, by name."""
    return {
        "requests": len(requests),
        "bytes_up": sum(request.received for request in requests),
        "bytes_down": sum(request.sent for request in requests),
    }


def count_run(folder: paths.Path, requests: list[Any]) -> dict[str, float]:
    """Trains digits with its workdir in a bucket; returns its traffic in total and by step."""
    with tempfile.TemporaryDirectory() as data:
        config = ij.load_config("experiments/digits.py", {"data.directory": data})
        requests.clear()
        steps = ij.train(config, str(folder))["step"]
    total = count(requests)
    return {"steps": steps, **total, **{f"{key}_per_step": total[key] / steps for key in total}}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds in each place, and the requests and bytes of a round in the bucket."""
    config = experiment.load_config(arguments.experiment)
    network = ours_step.make_run(
        {
            "config": configs.to_dict(config),
            "image_size": config.data.image_size,
            "batch_size": config.train.batch_size,
            "classes": arguments.classes,
        }
    )
    state = create_state(network)
    seconds: dict[str, dict[str, list[float]]] = {
        place: {name: [] for name in _TIMES} for place in ("local", "bucket")
    }
    traffic: list[dict[str, int]] = []
    with tempfile.TemporaryDirectory() as temporary, bucket(arguments) as (folder, requests):
        places = types.MappingProxyType({"local": pathlib.Path(temporary), "bucket": folder})
        try:
            # The first round imports libraries and is not counted.
            for step in range(1, arguments.rounds + 2):
                for place, path in places.items():
                    requests.clear()
                    times = measure_round(path / "checkpoints", state, step)
                    if step > 1:
                        for name, value in times.items():
                            seconds[place][name].append(value)
                if step > 1 and requests:
                    traffic.append(count(requests))
            training = count_run(folder / "digits", requests) if arguments.emulator else {}
        finally:
            if not paths.is_local(folder):
                for name in buckets.list_files(folder):
                    buckets.delete(folder / name)
    return {
        "benchmark": "bucket",
        "environment": measure.environment(),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "seconds": {
            place: {name: measure.summarize(values).to_dict() for name, values in each.items()}
            for place, each in seconds.items()
        },
        "traffic": {
            name: statistics.median(each[name] for each in traffic)
            for name in (traffic[0] if traffic else ())
        },
        "training": training,
    }


def report(result: dict[str, Any]) -> str:
    """Returns the result as a Markdown table."""
    rows = [
        [place, *(f"{each[name]['median']:.2f} s" for name in _TIMES)]
        for place, each in result["seconds"].items()
    ]
    lines = [markdown_table(["place", "save blocks", "until it counts", "restore"], rows)]
    if traffic := result["traffic"]:
        lines.append(
            f"A save and a restore of {result['state_bytes'] / 1e6:.1f} MB: "
            f"{traffic['requests']:,} requests, {traffic['bytes_up'] / 1e6:.1f} MB up, "
            f"{traffic['bytes_down'] / 1e6:.1f} MB down"
        )
    if training := result["training"]:
        lines.append(
            f"experiments/digits.py, {training['steps']:,} steps with all reports and checkpoints: "
            f"{training['requests_per_step']:.1f} requests a step, "
            f"{training['bytes_up_per_step'] / 1e3:.1f} kB up, "
            f"{training['bytes_down_per_step'] / 1e3:.1f} kB down"
        )
    return "\n\n".join(lines)


def main() -> None:
    """Measures, and prints the result."""
    arguments = parse()
    result = run(arguments)
    print(report(result))
    measure.write_json(arguments.json, result)


if __name__ == "__main__":
    measure.run(main)
