"""Private interfaces of libraries: each in one module that names the versions it was tried with."""

import ast
import importlib.metadata
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted((ROOT / "inception_jax").rglob("_*_private.py"))
# What is not to be seen anywhere else: private packages, CPython's signal table, and the table of
# modules, where an experiment file of the user's is entered while it runs.
PRIVATE = re.compile(r"\bjax\._src\b|\borbax\S*\._src\b|atomicity|TMP_DIR_SUFFIX|PyOS_getsig")
TABLE = {"experiment.py"}


def versions_known_to(path: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Returns a module's TESTED_WITH, without importing what it imports."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TESTED_WITH":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path.name}: has no TESTED_WITH, a mapping of package to versions")


def pins() -> list[dict[str, str]]:
    files = sorted((ROOT / "requirements").glob("*.txt"))
    assert files
    lines = (path.read_text(encoding="utf-8").split() for path in files)
    return [dict(line.lower().split("==") for line in each if "==" in line) for each in lines]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_installed_and_pinned_versions_are_tested_ones(
    path: pathlib.Path,
) -> None:
    for package, versions in versions_known_to(path).items():
        installed = importlib.metadata.version(package)
        remedy = f"run the tests of what {path.name} does, and add the version to its TESTED_WITH"
        assert installed in versions, f"{package} {installed} is installed: {remedy}"
        pinned = {each[package.lower()] for each in pins()}
        assert pinned <= set(versions), f"requirements/ pins {package} {pinned}: {remedy}"


def test_private_interfaces_are_confined_to_their_modules() -> None:
    assert {path.stem for path in MODULES} >= {
        "_clu_private",
        "_jax_private",
        "_orbax_private",
        "_tensorboardx_private",
        "_tfds_private",
    }
    for path in sorted((ROOT / "inception_jax").rglob("*.py")):
        if path not in MODULES:
            text = path.read_text(encoding="utf-8")
            assert not (found := PRIVATE.search(text)), f"{path}: {found}"
            assert path.name in TABLE or not re.search(r"sys\.modules\b(?!\.get)", text), path
