"""Maintainer notes and READMEs of results: files, tests and settings that they name exist."""

import pathlib
import re
import shlex

import pytest

from tests import fault_table
from tests.experiments import load

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "inception_jax"
NOTES = ROOT / "docs" / "notes"
RESULTS = sorted((ROOT / "results").glob("*/README.md"))
PAGES = [ROOT / "BUILD_NOTES.md", *sorted(NOTES.rglob("*.md")), *RESULTS]
# Paths of modules, relative to the repository or to the package; the notes mention a deleted one.
MODULE = re.compile(r"`((?:\w+/)*\w+\.py)`")
DELETED = {"datasets/registry.py"}
# A command, including lines continued with a backslash.
COMMAND = re.compile(r"^    python -m inception_jax\.main ((?:.*\\\n)*.*)$", re.MULTILINE)
DATE = re.compile(r"\n\*2026-\d\d-\d\d(, (revised|extended) 2026-\d\d-\d\d)?\*\n")
RECORD = re.compile(r"`((?:results|benchmarks/results|tests/fixtures)/[\w./-]+)`")


@pytest.mark.parametrize("test", [t for entry in fault_table.faults() for t in entry["tests"]])
def test_tests_in_fault_table_exist(test: str) -> None:
    assert not [line for line in fault_table.problems() if line.startswith(test)]


def test_fault_table_is_up_to_date() -> None:
    text = fault_table.PAGE.read_text(encoding="utf-8")
    assert text == fault_table.page(text), "run: python -m tests.fault_table"


def test_missing_test_is_reported_with_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"tests": ["test_notes.py::test_fault_table_is_outdated"]}
    monkeypatch.setattr(fault_table, "faults", lambda: [entry])
    (line,) = fault_table.problems()
    assert line == (
        "test_notes.py::test_fault_table_is_outdated: no such test; "
        "is it test_fault_table_is_up_to_date?"
    )


def test_files_in_user_situations_exist() -> None:
    text = (NOTES / "user_situations.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.endswith(".py |")]
    assert len(rows) >= 60
    named = {file.strip(" |") for row in rows for file in row[-1].split(", ")}
    assert not [file for file in sorted(named) if not (ROOT / "tests" / file).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_modules_and_records_in_page_exist(page: pathlib.Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in set(MODULE.findall(text)) - DELETED:
        places = [PACKAGE, PACKAGE / "datasets", ROOT, ROOT / "experiments", ROOT / "tests"]
        assert any((place / name).is_file() for place in places), name
    for name in RECORD.findall(text):
        assert (ROOT / name).exists(), name


def test_decisions_are_dated() -> None:
    for page in sorted((NOTES / "decisions").glob("*.md")):
        entries = page.read_text(encoding="utf-8").split("\n## ")[1:]
        assert len(entries) >= 5
        for entry in entries:
            heading, _, rest = entry.partition("\n")
            assert DATE.match(rest), heading


def test_commands_of_recorded_runs_use_current_settings() -> None:
    found = [
        shlex.split(
            command.replace("\\\n", " ").replace("--config ", "--config=").replace("SEED", "0")
        )
        for page in PAGES
        for command in COMMAND.findall(page.read_text(encoding="utf-8"))
    ]
    assert len(found) >= 11
    for arguments in found:
        experiment = ROOT / arguments[0].removeprefix("--config=")
        load([f"--config={experiment}", *arguments[1:]])
