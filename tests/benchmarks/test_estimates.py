"""The comparison of an estimated with a measured step, and the script that starts with it."""

import json
import os
import pathlib
import stat
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import estimates, measure
from inception_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
# Stands in for Python: XLA's dump of a program, or a process without a GPU.
DESCRIBES = """#!/bin/sh
folder=${XLA_FLAGS##*--xla_dump_to=}
echo 'platform_name: "CUDA"' > "$folder/module_0001.jit__lambda.gpu_target_config.pbtxt"
"""
FAILS = "#!/bin/sh\necho 'Unable to initialize backend cuda' >&2\nexit 1\n"


def fake_python(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "python"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_gpu_is_described_by_what_xla_dumps(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, monkeypatch, DESCRIBES)
    assert estimates.describe_gpu() == 'platform_name: "CUDA"\n'


def test_a_gpu_that_does_not_work_is_one_message(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, monkeypatch, FAILS)
    with pytest.raises(measure.BenchmarkError, match=r"a GPU: Unable to initialize backend cuda$"):
        estimates.describe_gpu()


def run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, platform: str, estimate: Any
) -> tuple[dict[str, Any], str]:
    """Returns the result and what is printed, with the measurement replaced."""
    summary = measure.summarize([0.019, 0.02, 0.021])
    monkeypatch.setattr(estimates, "describe_gpu", lambda: "described")
    monkeypatch.setattr(estimates, "measured", lambda arguments: ("a GPU", summary))
    monkeypatch.setattr(estimates, "estimate", estimate)
    flags = [f"--platform={platform}", f"--target-config={tmp_path / 'gpu.pbtxt'}"]
    result = estimates.run(estimates.parse(flags))
    return result, "\n".join(estimates.report_lines(result))


def estimated(arguments: Any, description: str) -> dict[str, Any]:
    seconds = {"fastest": 0.01, "slowest": 0.04, "roofline": 0.01}
    return {"target": description or arguments.target, "seconds": seconds}


def test_the_measured_time_is_compared_with_both_ends_of_the_estimate(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, printed = run(tmp_path, monkeypatch, "gpu", estimated)
    assert (tmp_path / "gpu.pbtxt").read_text() == "described"
    assert result["measured_by_estimated"] == [0.5, 2.0]
    assert "measured   20.00 ms a step (19.00 ms to 21.00 ms) on a GPU" in printed
    assert "estimated  10.00 ms to 40.00 ms a step on described" in printed
    assert "ratio      0.50 to 2.00" in printed


def test_without_a_gpu_nothing_is_compared_or_stored(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, printed = run(tmp_path, monkeypatch, "cpu", estimated)
    assert not (tmp_path / "gpu.pbtxt").exists()
    assert result["estimate"]["target"] == "h100"
    assert result["measured_by_estimated"] is None and "ratio      none" in printed


def test_a_missing_compiler_leaves_the_measurement(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(arguments: Any, description: str) -> dict[str, Any]:
        raise UserError("the compiler is not installed")

    result, printed = run(tmp_path, monkeypatch, "gpu", missing)
    assert result["seconds_per_step"]["median"] == 0.02
    assert printed.endswith("estimated  not: the compiler is not installed")


def script(tmp_path: pathlib.Path, *arguments: str) -> list[str]:
    """Returns the modules that the script starts, with an `echo` in place of Python."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/started\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    subprocess.run(
        ["bash", "benchmarks/accelerator.sh", *arguments], cwd=ROOT, env=environment, check=True
    )
    return [line.split()[1] for line in (tmp_path / "started").read_text().splitlines()]


def test_a_call_with_a_gpu_begins_with_the_estimate(tmp_path: pathlib.Path) -> None:
    assert script(tmp_path, "profile") == ["benchmarks.estimates", "benchmarks.profile_step"]


def test_the_estimate_is_made_once(tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compile.json").write_text("{}")
    assert script(tmp_path, "profile") == ["benchmarks.profile_step"]
    assert script(tmp_path, "compile")[1:] == ["benchmarks.estimates"]


def test_a_smoke_test_does_what_it_is_told(tmp_path: pathlib.Path) -> None:
    assert script(tmp_path, "--smoke", "profile") == ["benchmarks.profile_step"]


@pytest.mark.slow
def test_the_script_compares_on_a_cpu_what_it_can(tmp_path: pathlib.Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", "benchmarks/accelerator.sh", "--smoke", "compile"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "measured   " in done.stdout
    assert "Not stored: the description of the GPU, as this machine has none" in done.stdout
    result = json.loads((tmp_path / "compile.json").read_text())
    assert result["seconds_per_step"]["median"] > 0
    assert result["measured_by_estimated"] is None
