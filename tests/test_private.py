"""Private interfaces of libraries: each in one module, which lists the tested versions."""

import ast
import importlib.metadata
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted((ROOT / "inception_jax").rglob("_*_private.py"))
# Must not be used anywhere else: private packages, CPython's signal table, and sys.modules, which
# only experiment.py changes while it runs an experiment file.
PRIVATE = re.compile(r"\bjax\._src\b|\borbax\S*\._src\b|atomicity|TMP_DIR_SUFFIX|PyOS_getsig")
CHANGES_MODULES = {"experiment.py"}


def read_tested_versions(path: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Returns the TESTED_WITH of a module without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TESTED_WITH":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path.name}: must define TESTED_WITH, a mapping of packages to versions")


def pins() -> list[dict[str, str]]:
    # Those of whole environments.
    files = [path for path in (ROOT / "requirements").glob("*.txt") if path.stem != "tpu"]
    assert files
    lines = (path.read_text(encoding="utf-8").split() for path in files)
    return [dict(line.lower().split("==") for line in each if "==" in line) for each in lines]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_installed_and_pinned_versions_are_tested_ones(
    path: pathlib.Path,
) -> None:
    for package, versions in read_tested_versions(path).items():
        installed = importlib.metadata.version(package)
        remedy = f"run the tests of {path.name}, then add the version to its TESTED_WITH"
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
            assert not (match := PRIVATE.search(text)), f"{path}: {match}"
            assert path.name in CHANGES_MODULES or not re.search(
                r"sys\.modules\b(?!\.get)", text
            ), path
