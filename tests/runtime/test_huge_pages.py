"""The restart with huge pages."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from inception_jax.runtime import huge_pages

PROGRAM = """
import json, os, pathlib, sys
from inception_jax.runtime import huge_pages
huge_pages._MODE = pathlib.Path(sys.argv[1])
huge_pages.use_huge_pages()
print(json.dumps([os.environ.get("GLIBC_TUNABLES"), sys.argv[2:], sys.flags.optimize, os.getpid()]))
"""


@pytest.mark.parametrize(
    ("mode", "tunables", "expected"),
    [
        ("always [madvise] never", None, huge_pages.HUGE_PAGES),
        ("always [madvise] never", "glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2"),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_restarts_the_same_command_if_huge_pages_are_on_demand(
    mode: str | None, tunables: str | None, expected: str | None, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    if mode:
        (tmp_path / "mode").write_text(mode)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = os.getcwd()
    if tunables:
        environment["GLIBC_TUNABLES"] = tunables
    arguments = ["a b", "--c='d'"]
    command = [sys.executable, "-O", str(tmp_path / "program.py"), str(tmp_path / "mode")]
    with subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        output, _ = process.communicate(timeout=60)
    assert json.loads(output) == [expected, arguments, 1, process.pid]


@pytest.mark.parametrize("module", ["main", "tools.predict", "tools.serve", "tools.find_lr"])
def test_commands_restart_before_they_import_anything_else(module: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "importtime", "-m", f"inception_jax.{module}", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    names = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert names.count("inception_jax.cli") == 1
