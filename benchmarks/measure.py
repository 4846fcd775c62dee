"""Utilities of the benchmarks: statistics, description of the machine, tables, JSON files."""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).parents[1]
# Instruction sets, as Linux names them, that decide which kernels run and how fast.
_X86 = ("avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16")
_X86_LATER = ("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16")
_ARM = ("asimd", "bf16", "i8mm", "sve", "sve2")
_INSTRUCTIONS = {*_X86, *_X86_LATER, *_ARM}


class BenchmarkError(Exception):
    """A measurement that failed; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Statistics of repeated measurements: median, minimum, maximum and count."""

    median: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """Range of the measurements relative to the median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def to_dict(self) -> dict[str, float]:
        """Returns the JSON form."""
        return {**dataclasses.asdict(self), "spread": self.spread}


def summarize(values: Iterable[float]) -> Summary:
    """Summarizes one or more measurements."""
    values = sorted(values)
    return Summary(statistics.median(values), values[0], values[-1], len(values))


def environment() -> dict[str, Any]:
    """Returns a description of this run: machine, versions, revision, date and command."""
    return {
        **_processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "command": command_line(),
    }


def command_line() -> str:
    """Returns the running command, as typed in the root of the repository."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    called = ["-m", spec.name] if spec else [pathlib.Path(sys.argv[0]).name]
    return shlex.join(["python", *called, *sys.argv[1:]])


def _versions() -> dict[str, str]:
    """Returns the installed versions of packages that affect speed."""
    installed = {}
    for name in ("jax", "jaxlib", "flax", "optax", "numpy", "grain", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def _processor() -> dict[str, Any]:
    """Returns the processor's name, its model (many virtual machines hide the name), and flags."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    # All processors are taken to be alike; the first one's entries end at an empty line.
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    entries = {name.strip(): value.strip() for name, _, value in lines}
    names = ("vendor_id", "cpu family", "model")
    flags = entries.get("flags", entries.get("Features", "")).split()
    return {
        "cpu": entries.get("model name", platform.processor()),
        "cpu_model": " ".join(entries[name] for name in names if name in entries),
        "cpu_instructions": sorted(_INSTRUCTIONS.intersection(flags)),
    }


def _revision() -> str:
    """Returns the commit, with '+' if files differ from it; '' outside a git repository."""
    describe = ["describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    git = ["git", "-C", str(ROOT), *describe]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def local_path(argument: str) -> pathlib.Path:
    """Returns the path that an argument names, as the type of an argument of a parser."""
    from inception_jax.errors import UserError
    from inception_jax.storage import paths

    try:
        return paths.local_path(argument, argument)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns an argument parser with a description, usually a module's docstring, and --json."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="also write the result to this file"
    )
    return parser


def run(main: Callable[[], None]) -> NoReturn:
    """Calls `main` and exits; a BenchmarkError prints one message."""
    # Exits normally on SIGTERM, so that child processes are ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except BenchmarkError as error:
        log(f"error: {error}")
        sys.exit(1)
    sys.exit(0)


def write_json(path: pathlib.Path | None, result: dict[str, Any]) -> None:
    """Writes a result to a file, if one is given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def stored_programs(path: pathlib.Path | None) -> list[dict[str, Any]]:
    """Returns the rows "programs" of an earlier result; [] if there is no such file."""
    if path is None or not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["programs"]
    return rows


def has_row(rows: Iterable[dict[str, Any]], **values: Any) -> bool:
    """Whether one of some rows has all these values."""
    return any(all(row[name] == value for name, value in values.items()) for row in rows)


def log(line: str) -> None:
    """Prints a progress message to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)
