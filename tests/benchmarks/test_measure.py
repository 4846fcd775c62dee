"""Statistics, tables, files and /proc."""

import json
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import measure
from benchmarks.contenders import resources


def test_summary_of_several_measurements() -> None:
    summary = measure.summarize([4.0, 1.0, 2.0])
    assert (summary.median, summary.low, summary.high, summary.count) == (2.0, 1.0, 4.0, 3)
    assert summary.spread == 1.5
    assert summary.to_dict() == {"median": 2.0, "low": 1.0, "high": 4.0, "count": 3, "spread": 1.5}


def test_results_describe_their_environment(tmp_path: pathlib.Path) -> None:
    measure.write_json(tmp_path / "new" / "file.json", {"environment": measure.environment()})
    environment = json.loads((tmp_path / "new" / "file.json").read_text())["environment"]
    assert environment["cores"] >= 1
    assert environment["python"] == sys.version.split()[0]
    assert environment["command"].startswith("python ")
    assert environment["versions"]["jax"] == jax.__version__
    assert {"cpu", "cpu_model", "date", "revision", "memory_gib"} <= set(environment)
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    assert set(environment["cpu_instructions"]) <= set(flags)
    assert ("avx2" in environment["cpu_instructions"]) == ("avx2" in flags)


def test_failed_measurement_prints_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Keeps the signal handlers of the test process.
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def main() -> None:
        raise measure.BenchmarkError("nothing to measure")

    with pytest.raises(SystemExit) as caught:
        measure.run(main)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: nothing to measure\n"


def test_memory_counts_arrays_but_not_mapped_files(tmp_path: pathlib.Path) -> None:
    size = 40_000_000
    file = tmp_path / "pixels"
    np.zeros(size, np.uint8).tofile(file)
    script = f"""
import numpy as np
from benchmarks.contenders import resources
with resources.PeakMemory() as mapped:
    assert np.memmap({str(file)!r}, np.uint8, "r").sum() == 0
with resources.PeakMemory() as allocated:
    array = np.ones({size}, np.uint8)
assert array[-1] == 1
print(mapped.growth, allocated.growth)
"""
    # In a separate process, because memory of other tests may be freed in this one.
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, check=True)
    mapped, allocated = map(int, done.stdout.split())
    assert mapped < size / 2
    assert size * 0.9 < allocated < size * 1.5


def test_cpu_time_counts_children() -> None:
    loop = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); input()"
    before = resources.cpu_seconds()
    with subprocess.Popen(
        [sys.executable, "-c", loop], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        child.stdout.readline()
        used = resources.cpu_seconds() - before
        child.communicate(b"\n")
    assert used > 0.4
