"""Kills a small training run at random times and compares its final state with an undisturbed run.

The training command trains MiniGoogLeNet on the embedded digits and is killed (SIGKILL) and
restarted until it finishes; then the next run begins, until the number of kills is reached. Kills
target the phases in turn, at a random time within the phase; the phase that was hit is read from
the files left. Kills that target data preparation start with an unprepared directory. The
parameters, their averages, the optimizer's state and metrics.jsonl of each finished run must be
bit-identical to those of an undisturbed run, except for measurements
(telemetry.writers.NONDETERMINISTIC_FIELDS). Exits with 1 if they differ.

Killing a process is not a power failure: data handed to the operating system is kept.

  python -m benchmarks.fault_injection --json benchmarks/results/fault_injection.json
  python -m benchmarks.fault_injection --workdir gs://bucket/faults

With --workdir, the runs are in a bucket of the server that STORAGE_EMULATOR_HOST names, else of one
that this command starts. Each process then has its own empty folder for temporary files.

On two CPU cores: about 8 s per kill, 13 minutes for the default of 100.
"""

import argparse
import contextlib
import dataclasses
import filecmp
import itertools
import os
import pathlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import killable_run, measure
from inception_jax.console import markdown_table
from inception_jax.storage import buckets, paths
from tests import gcs

# Other phases are hit by chance: reports are mostly written during a save, and a run ends once.
TARGET_PHASES = ("start", "preparation", "compile", "steps", "evaluation", "save")


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
      aimed: the target phase.
      phase: the phase that was hit.
      seconds: since the start of the process.
      step: newest step in metrics.jsonl.
      run: index of the run.
    """

    aimed: str
    phase: str
    seconds: float
    step: int
    run: int


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--workdir", default="", help="gs://BUCKET/PATH for the runs")
    parser.add_argument("--steps", type=int, default=60, help="steps per run")
    return parser.parse_args(argv)


class Campaign:
    """A sequence of runs that are killed and restarted.

    Args:
      top: directory for all files.
      steps: steps per run.
      seed: seed of the kill times.
      runs: folder of the runs, which may be in a bucket; None: `top`.
    """

    def __init__(
        self, top: pathlib.Path, *, steps: int, seed: int, runs: paths.Path | None = None
    ) -> None:
        self.kills: list[Kill] = []
        self.runs = 0
        self._top = top
        self._folder = runs or top
        self._steps = steps
        self._random = random.Random(seed)
        self._targets = self._cycle_targets()
        self._prepared = top / "data"
        self._unprepared = top / "data-0"
        paths = self.paths("undisturbed")
        # By phase, its duration when it was last completed, seconds.
        self._spans = killable_run.TrainingProcess(paths).wait()
        self.expected = killable_run.outcome(paths.workdir)

    def paths(self, name: str) -> killable_run.Paths:
        """Returns the paths of a run with prepared data."""
        return killable_run.Paths(
            self._folder / name, self._prepared, self._top / "cache", self._steps
        )

    def disturb(self, kills: int) -> None:
        """Kills a run up to `kills` times, lets it finish, and compares the outcome.

        Raises:
          BenchmarkError: if a process fails without a kill, or the outcome differs.
        """
        paths = self.paths(f"run-{self.runs}")
        for _ in range(kills):
            if not self._kill_once(paths):
                break
        killable_run.TrainingProcess(paths).wait()
        if differences := killable_run.outcome(paths.workdir).differences(self.expected):
            raise measure.BenchmarkError(
                f"run {self.runs}, after {len(self.kills)} kills in total, differs from an "
                f"undisturbed run: {', '.join(differences)}"
            )
        self.runs += 1

    def prepared(self) -> int:
        """Compares the data directories prepared between kills, and returns their number.

        Raises:
          BenchmarkError: if one differs from an uninterrupted preparation.
        """
        directories = [each for each in self._top.glob("data-*") if _is_prepared(each)]
        expected = sorted((self._prepared / "inception_jax").glob("*px/*"))
        for directory, file in itertools.product(directories, expected):
            copy = directory / file.relative_to(self._prepared)
            # info.json contains the location of the records.
            if file.name != "info.json" and not filecmp.cmp(file, copy, shallow=False):
                raise measure.BenchmarkError(f"{copy}: differs from an uninterrupted preparation")
        return len(directories)

    def _kill_once(self, paths: killable_run.Paths) -> bool:
        """Starts a process and kills it; returns False if it finished first."""
        target = next(self._targets)
        if target == "preparation":
            paths = dataclasses.replace(paths, data=self._next_unprepared())
        entries = 1 + self._random.randrange(1 + self._steps // 20) * (target in ("steps", "save"))
        moment = self._random.uniform(0, self._spans.get(target, 1.0))
        process = killable_run.TrainingProcess(paths)
        began = time.perf_counter()
        spans = process.watch(_after_entries(target, entries))
        if process.running:
            time.sleep(moment)
        hit, seconds = process.kill(), time.perf_counter() - began
        self._spans |= spans
        if hit is None:
            return False
        self.kills.append(Kill(target, hit, round(seconds, 3), process.step, self.runs))
        measure.log(f"kill {len(self.kills)}: aimed at {target}, hit {hit} after {seconds:.1f} s")
        return True

    def _next_unprepared(self) -> pathlib.Path:
        """Returns a data directory without a finished preparation; one may have started."""
        if _is_prepared(self._unprepared):
            number = int(self._unprepared.name.removeprefix("data-")) + 1
            self._unprepared = self._top / f"data-{number}"
        return self._unprepared

    def _cycle_targets(self) -> Iterator[str]:
        while True:
            yield from self._random.sample(TARGET_PHASES, len(TARGET_PHASES))


def _is_prepared(directory: pathlib.Path) -> bool:
    return bool(list(directory.glob("inception_jax/*px/info.json")))


def _after_entries(target: str, entries: int) -> Callable[[str], bool]:
    """Returns a function of the phase that is true after `target` was entered `entries` times."""
    before, left = "", entries

    def until(phase: str) -> bool:
        nonlocal before, left
        left -= phase == target and phase != before
        before = phase
        return left <= 0

    return until


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns the contents of the JSON file."""
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-faults-") as top,
        _folder_of_runs(arguments.workdir) as runs,
    ):
        campaign = Campaign(
            pathlib.Path(top), steps=arguments.steps, seed=arguments.seed, runs=runs
        )
        results = kill(campaign, arguments.kills)
    return {
        "benchmark": "fault_injection",
        "environment": measure.environment(),
        "settings": {
            "steps": arguments.steps,
            "seed": arguments.seed,
            "workdir": arguments.workdir,
        },
        "results": results,
    }


@contextlib.contextmanager
def _folder_of_runs(typed: str) -> Iterator[paths.Path | None]:
    """Yields the folder that --workdir names, on a server for tests; None if it is not given.

    Raises:
      BenchmarkError: if it is not in a bucket, or not empty.
    """
    if not typed:
        yield None
        return
    folder = paths.user_path(typed, f"--workdir={typed}")
    if paths.is_local(folder):
        raise measure.BenchmarkError(f"--workdir={typed}: must be gs://BUCKET/PATH")
    with contextlib.ExitStack() as cleanup:
        if "STORAGE_EMULATOR_HOST" not in os.environ:
            server = gcs.Server()
            cleanup.callback(server.stop)
            os.environ.update(gcs.environment(server.url))
            server.create_bucket(typed.removeprefix("gs://").partition("/")[0])
        if buckets.list_files(folder):
            raise measure.BenchmarkError(f"--workdir={typed}: must be empty")
        yield folder


def kill(campaign: Campaign, kills: int) -> dict[str, Any]:
    """Runs a campaign up to a number of kills and returns its results.

    Raises:
      BenchmarkError: if a run or its data differ from the undisturbed ones.
    """
    began = time.perf_counter()
    while len(campaign.kills) < kills:
        campaign.disturb(kills - len(campaign.kills))
        measure.log(f"{len(campaign.kills)} kills, {campaign.runs} runs finished, all identical")
    prepared, expected = campaign.prepared(), campaign.expected
    aimed = Counter(each.aimed for each in campaign.kills)
    met = Counter(each.phase for each in campaign.kills)
    return {
        "kills": len(campaign.kills),
        "phases": {
            phase: {"aimed": aimed[phase], "met": met[phase]} for phase in killable_run.PHASES
        },
        "runs": campaign.runs,
        "prepared": prepared,
        "arrays": len(expected.arrays),
        "bytes": sum(map(len, expected.arrays.values())),
        "lines": len(expected.lines),
        "seconds": round(time.perf_counter() - began, 1),
        "samples": [dataclasses.asdict(each) for each in campaign.kills],
    }


def report(results: dict[str, Any]) -> str:
    """Returns the table and a summary of the comparison."""
    phases = results["phases"]
    rows = [
        [phase, f"{phases[phase]['aimed']}", f"{phases[phase]['met']}", what]
        for phase, what in killable_run.PHASES.items()
    ]
    rows.append(["all", *(f"{results['kills']}",) * 2, ""])
    table = markdown_table(["phase", "aimed at", "killed in", "description"], rows)
    return (
        f"{table}\n\n{results['runs']} runs finished, each bit-identical to an undisturbed run: "
        f"{results['arrays']} arrays ({results['bytes']:,} bytes) and {results['lines']} lines of "
        f"metrics. {results['prepared']} directories of data prepared between kills: identical "
        f"too. {results['seconds']:.0f} s"
    )


def main() -> None:
    """Runs the command."""
    arguments = parse()
    result = run(arguments)
    measure.write_json(arguments.json, result)
    print(report(result["results"]))


if __name__ == "__main__":
    measure.run(main)
