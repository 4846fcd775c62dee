"""Kills a small training run at random moments, and compares what it ends with.

The real command trains MiniGoogLeNet on the embedded digits, is killed (SIGKILL) and started again,
over and over, until it is finished; then the next run begins, until there were enough kills. Each
kill aims at a phase, in turn, and at a random moment in it; the phase that it met is read from what
it left. Those that aim at the preparation of the data start with a directory that no preparation
has finished yet. When a run is finished, its parameters, their averages, the optimizer's state and
metrics.jsonl must be, to the bit, those of a run that nobody disturbed, but for what is measured in
it (telemetry.writers.NONDETERMINISTIC_FIELDS). Ends with 1 where they are not.

A kill of the process is not a loss of power: what was handed to the operating system is kept.

  python -m benchmarks.fault_injection --json benchmarks/results/fault_injection.json

On two CPU cores: some 8 s a kill, 13 minutes for the 100 of the default.
"""

import argparse
import dataclasses
import filecmp
import itertools
import pathlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import lives, measure

# The rest is left to chance: a report is mostly written while a checkpoint is, and a run ends once.
AIMS = ("start", "preparation", "compile", "steps", "evaluation", "save")


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
      aimed: the phase that it was meant to meet.
      phase: that it met.
      seconds: from the start of the process.
      step: the newest one in metrics.jsonl.
      run: the number of the run.
    """

    aimed: str
    phase: str
    seconds: float
    step: int
    run: int


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--steps", type=int, default=60, help="steps per run")
    return parser.parse_args(argv)


class Campaign:
    """Runs that are disturbed, one after another.

    Args:
      top: folder that all of it lies in.
      steps: of a run.
      seed: of the moments of the kills.
    """

    def __init__(self, top: pathlib.Path, *, steps: int, seed: int) -> None:
        self.kills: list[Kill] = []
        self.runs = 0
        self._top = top
        self._steps = steps
        self._random = random.Random(seed)
        self._aims = self._endless_aims()
        self._prepared = top / "data"
        self._unprepared = top / "data-0"
        place = self.place("undisturbed")
        # By phase, how long it took when it was last passed, seconds.
        self._spans = lives.Life(place).wait()
        self.expected = lives.outcome(place.workdir)

    def place(self, name: str) -> lives.Place:
        """Returns where a run works whose data are prepared."""
        return lives.Place(self._top / name, self._prepared, self._top / "cache", self._steps)

    def disturb(self, kills: int) -> None:
        """Kills a run up to so many times, lets it finish, and compares.

        Raises:
          BenchmarkError: if a process fails by itself, or what is left is not the same.
        """
        place = self.place(f"run-{self.runs}")
        for _ in range(kills):
            if not self._kill_once(place):
                break
        lives.Life(place).wait()
        if differences := lives.outcome(place.workdir).differences(self.expected):
            raise measure.BenchmarkError(
                f"run {self.runs}, after {len(self.kills)} kills in total, differs from an "
                f"undisturbed run: {', '.join(differences)}"
            )
        self.runs += 1

    def prepared(self) -> int:
        """Returns how many directories were prepared between kills; what is in them is compared.

        Raises:
          BenchmarkError: if one is not the same.
        """
        directories = [each for each in self._top.glob("data-*") if _is_prepared(each)]
        expected = sorted((self._prepared / "inception_jax").glob("*px/*"))
        for directory, file in itertools.product(directories, expected):
            found = directory / file.relative_to(self._prepared)
            # info.json names where the records came from.
            if file.name != "info.json" and not filecmp.cmp(file, found, shallow=False):
                raise measure.BenchmarkError(f"{found}: differs from an uninterrupted preparation")
        return len(directories)

    def _kill_once(self, place: lives.Place) -> bool:
        """Starts a process and kills it; returns False where it came to its end."""
        aim = next(self._aims)
        if aim == "preparation":
            place = dataclasses.replace(place, data=self._next_unprepared())
        entries = 1 + self._random.randrange(1 + self._steps // 20) * (aim in ("steps", "save"))
        moment = self._random.uniform(0, self._spans.get(aim, 1.0))
        life = lives.Life(place)
        began = time.perf_counter()
        spans = life.watch(_entered(aim, entries))
        if life.running:
            time.sleep(moment)
        met, seconds = life.kill(), time.perf_counter() - began
        self._spans |= spans
        if met is None:
            return False
        self.kills.append(Kill(aim, met, round(seconds, 3), life.step, self.runs))
        measure.say(f"kill {len(self.kills)}: aimed at {aim}, hit {met} after {seconds:.1f} s")
        return True

    def _next_unprepared(self) -> pathlib.Path:
        """Returns a directory in which no preparation has finished; one may have begun."""
        if _is_prepared(self._unprepared):
            number = int(self._unprepared.name.removeprefix("data-")) + 1
            self._unprepared = self._top / f"data-{number}"
        return self._unprepared

    def _endless_aims(self) -> Iterator[str]:
        while True:
            yield from self._random.sample(AIMS, len(AIMS))


def _is_prepared(directory: pathlib.Path) -> bool:
    return bool(list(directory.glob("inception_jax/*px/info.json")))


def _entered(aim: str, entries: int) -> Callable[[str], bool]:
    """Returns a function of the phase that is true once `aim` was entered so many times."""
    before, left = "", entries

    def until(phase: str) -> bool:
        nonlocal before, left
        left -= phase == aim and phase != before
        before = phase
        return left <= 0

    return until


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kills and compares, and returns what the JSON file holds."""
    with tempfile.TemporaryDirectory(prefix="benchmark-faults-") as top:
        campaign = Campaign(pathlib.Path(top), steps=arguments.steps, seed=arguments.seed)
        found = kill(campaign, arguments.kills)
    return {
        "benchmark": "fault_injection",
        "environment": measure.environment(),
        "settings": {"steps": arguments.steps, "seed": arguments.seed},
        "results": found,
    }


def kill(campaign: Campaign, kills: int) -> dict[str, Any]:
    """Kills processes until there were so many kills, and returns what was found.

    Raises:
      BenchmarkError: if a run or its data are not what they would have been.
    """
    began = time.perf_counter()
    while len(campaign.kills) < kills:
        campaign.disturb(kills - len(campaign.kills))
        measure.say(f"{len(campaign.kills)} kills, {campaign.runs} runs finished, all identical")
    prepared, expected = campaign.prepared(), campaign.expected
    aimed = Counter(each.aimed for each in campaign.kills)
    met = Counter(each.phase for each in campaign.kills)
    return {
        "kills": len(campaign.kills),
        "phases": {phase: {"aimed": aimed[phase], "met": met[phase]} for phase in lives.PHASES},
        "runs": campaign.runs,
        "prepared": prepared,
        "arrays": len(expected.arrays),
        "bytes": sum(map(len, expected.arrays.values())),
        "lines": len(expected.lines),
        "seconds": round(time.perf_counter() - began, 1),
        "samples": [dataclasses.asdict(each) for each in campaign.kills],
    }


def report(results: dict[str, Any]) -> str:
    """Returns the table, and what was compared."""
    phases = results["phases"]
    rows = [
        [phase, f"{phases[phase]['aimed']}", f"{phases[phase]['met']}", what]
        for phase, what in lives.PHASES.items()
    ]
    rows.append(["all", *(f"{results['kills']}",) * 2, ""])
    table = measure.table(["phase", "aimed at", "killed in", "description"], rows)
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
