"""Writes the table of docs/notes/reliability.md from docs/notes/faults.toml.

Command: python -m tests.fault_table
"""

import ast
import difflib
import functools
import itertools
import pathlib
import sys
import tomllib
from typing import Any

TESTS = pathlib.Path(__file__).parent
NOTES = TESTS.parent / "docs" / "notes"
PAGE, FAULTS = NOTES / "reliability.md", NOTES / "faults.toml"
BEGIN, END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"


def faults() -> list[dict[str, Any]]:
    """Returns the entries of the file: group, fault, outcome, and tests as "FILE::TEST"."""
    return tomllib.loads(FAULTS.read_text(encoding="utf-8"))["fault"]


@functools.cache
def tests_in(file: str) -> frozenset[str]:
    """Returns the names of the tests in a file below tests/; none if there is no such file."""
    path = TESTS / file
    if not path.is_file():
        return frozenset()
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(node.name for node in tree if isinstance(node, ast.FunctionDef))


def problems() -> list[str]:
    """Returns a line for each test that does not exist, with the most similar name."""
    lines = []
    for test in itertools.chain.from_iterable(entry["tests"] for entry in faults()):
        file, _, name = test.partition("::")
        if name not in tests_in(file):
            near = difflib.get_close_matches(name, tests_in(file), n=1, cutoff=0)
            lines.append(f"{test}: no such test" + "".join(f"; is it {each}?" for each in near))
    return lines


def table() -> str:
    """Returns the table, one section for each group, in the order of the file."""
    sections = []
    for group, entries in itertools.groupby(faults(), lambda entry: entry["group"]):
        rows = [
            f"| {entry['fault']} | {entry['outcome']} | "
            + "<br>".join(f"`{test}`" for test in entry["tests"])
            + " |"
            for entry in entries
        ]
        head = [f"### {group}", "", "| fault | outcome | tests |", "| --- | --- | --- |"]
        sections.append("\n".join([*head, *rows]))
    return "\n\n".join(sections)


def page(text: str) -> str:
    """Returns the page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    if lines := problems():
        sys.exit("\n".join(lines))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
