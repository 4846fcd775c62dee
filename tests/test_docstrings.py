"""Runs the examples in docstrings, of the modules that have any."""

import doctest
import importlib
import pathlib

import pytest

from tests import command

PACKAGE = command.ROOT / "inception_jax"
# Selected by their text, so that collecting the tests imports nothing.
MODULES = [
    ".".join(path.relative_to(command.ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_give_what_they_show(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # As a user has it; the package's own rules are those of its other tests.
    import jax

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.attempted and not result.failed
