"""The record of which programs compile for which devices."""

import json
import pathlib
import subprocess
from typing import Any

import pytest

from benchmarks import programs

RECORD = {
    "programs": [
        {
            "name": "training step, 64 px, batch 512",
            "compile_seconds": 300.0,
            "memory": {"peak": 2**30},
            "flops": 6e11,
            "bytes": 9e9,
            "cycles": 25e6,
            "collectives": {"all-reduce": {"count": 44, "bytes": 1}},
            "seconds": {"fastest": 0.0166, "slowest": 0.0265},
        }
    ],
    "recipe": {"images_per_second": [19000.0, 30000.0], "minutes": [3.2, 5.1]},
}


def test_each_combination_is_compiled_once_and_failures_are_rows(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []

    def compile_(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        called.append(command)
        (output,) = (flag.partition("=")[2] for flag in command if flag.startswith("--json="))
        if "--target=v6e-1" in command:
            return subprocess.CompletedProcess(command, 1, "", "log\nthe compiler failed\n")
        pathlib.Path(output).write_text(json.dumps(RECORD))
        return subprocess.CompletedProcess(command, 0, "", "")

    # Only the compilation is replaced; the description of the machine runs other commands.
    original = subprocess.run
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **more: (
            compile_ if "inception_jax.tools.compile" in command else original
        )(command, **more),
    )
    result = tmp_path / "programs.json"
    flags = ["--experiments", "tiny", "--targets", "v5e-8", "v6e-1", "--per-device", "64"]
    flags += ["--json", str(result), "--details", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["programs", *flags])
    programs.main()
    first = capsys.readouterr().out
    programs.main()
    assert capsys.readouterr().out == first
    # 64 images on each of 8 chips are the recipe's batch.
    assert [command[-2:-1] for command in called] == [
        ["--config.train.batch_size=512"],
        ["--config.train.batch_size=512"],
        ["--config.train.batch_size=64"],
    ]
    rows = json.loads(result.read_text())["programs"]
    assert [row.get("error") for row in rows] == [None, *2 * ["the compiler failed"]]
    assert rows[0]["all_reduces"] == 44
    assert "| training step, 64 px | 1.00 |     25.0 | 16.6 to 26.5 | 19,000 to 30,000 |" in first
    assert [path.name for path in sorted(tmp_path.glob("*-*.json"))] == [
        "programs-tiny-v5e-8-512.json"
    ]
