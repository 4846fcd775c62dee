"""Registries: repeated registration, locations, and errors of custom parts."""

import functools
import importlib.util
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from inception_jax import registry
from inception_jax.errors import ConfigError, UserError
from inception_jax.registry import METRICS, OPTIMIZERS, Part, Registry

# Of a type that mypy accepts.
NOT_A_FUNCTION: Any = 3
METRIC = """
from inception_jax.registry import register_metric

@register_metric("mine")
def mine(logits, labels):
    return {value}
"""


@pytest.fixture(autouse=True)
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METRICS, "_parts", {name: METRICS.get(name) for name in METRICS.names()})


def run(path: str, source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(source, path, "exec"), names)
    return names


def test_edited_notebook_cell_replaces_its_part() -> None:
    run("/tmp/ipykernel_1/1.py", METRIC.format(value=1))
    names = run("/tmp/ipykernel_1/2.py", "\n" + METRIC.format(value=2))
    assert METRICS.get("mine").build is names["mine"]


def test_rerun_file_replaces_its_part(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "mine.py"
    for value in (1, 2):
        path.write_text("\n" * value + METRIC.format(value=value))
        names = run(str(path), path.read_text())
        assert METRICS.get("mine").build is names["mine"]


def test_same_file_by_another_path_replaces_its_part(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(METRIC.format(value=1))
    monkeypatch.chdir(tmp_path)
    run("mine.py", path.read_text())
    assert METRICS.get("mine").file == str(path)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir("sub")
    for other in ("../mine.py", str(path)):
        run(other, path.read_text())
    assert METRICS.get("mine").location == f"{path}, line 4"
    with (
        pytest.raises(ConfigError, match=r"failed \(line 2\)"),
        registry.as_config_error(METRICS.get("mine"), "it"),
    ):
        run("../mine.py", "\nraise KeyError")


def test_builtin_parts_are_recognized_by_any_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after sys.path.insert(0, "..") in a notebook."""
    path = pathlib.Path(__file__).parent / ".." / "inception_jax" / "registry.py"
    spec = importlib.util.spec_from_file_location("registry_by_another_path", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # For its dataclasses.
    spec.loader.exec_module(module)
    for file in (registry.__file__, module.__file__):
        assert module.Part(name="x", build=print, file=file).is_builtin


def test_imported_function_is_registered_again_after_an_edit(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    for start in ("", "# More.\n"):
        lines = (
            "import inception_jax as ij, colorsys\nij.register_metric('m')(colorsys.rgb_to_hsv)\n"
        )
        path.write_text(start + lines)
        run(str(path), path.read_text())
    assert METRICS.get("m").line == 3


@pytest.mark.parametrize(
    "definition",
    [
        "import flax.linen as nn\nclass Direct(nn.Module):\n    size: int = 3",
        "import dataclasses\n@dataclasses.dataclass\nclass Direct:\n    size: int = 3",
        "from colorsys import rgb_to_hsv as Direct",
    ],
    ids=["module", "dataclass", "imported"],
)
def test_file_that_registers_is_recorded(definition: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"import inception_jax as ij\n{definition}\nij.register_metric('m')(Direct)\n")
    run(str(path), path.read_text())
    part = METRICS.get("m")
    assert (part.file, part.line) == (str(path), len(path.read_text().splitlines()))


def test_files_may_register_the_same_function(tmp_path: pathlib.Path) -> None:
    """Loading an experiment drops the modules beside it, so they are imported again."""
    (tmp_path / "common.py").write_text("def mine(logits, labels): ...\n")
    for name in ("one.py", "other.py"):
        path = tmp_path / name
        path.write_text(
            "import runpy, inception_jax as ij\n"
            f"mine = runpy.run_path({str(tmp_path / 'common.py')!r})['mine']\n"
            "ij.register_metric('shared')(mine)\n"
        )
        run(str(path), path.read_text())
        assert METRICS.get("shared").file == str(path)


def test_duplicate_names_are_rejected(tmp_path: pathlib.Path) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    for path in (one, other):
        path.write_text(METRIC.format(value=1))
    run(str(one), METRIC.format(value=1))
    words = rf"{other}, line 4: the metric 'mine' is already registered by {one}, line 4"
    with pytest.raises(ConfigError, match=words):
        run(str(other), METRIC.format(value=1))
    one.write_text(METRIC.format(value=1) * 2)
    with pytest.raises(ConfigError, match=rf"{one}, line 10: .* registered by {one}, line 4"):
        run(str(one), METRIC.format(value=1) * 2)


@pytest.mark.parametrize("wrap", [jax.jit, functools.partial, functools.cache])
def test_location_of_wrapped_functions(wrap: Any) -> None:
    def wrapped(logits: Any, labels: Any) -> Any:
        return jnp.zeros(len(labels))

    registry.register_metric("wrapped")(wrap(wrapped))
    part = METRICS.get("wrapped")
    assert (part.file, part.line) == (__file__, wrapped.__code__.co_firstlineno)


@pytest.mark.parametrize(
    ("register", "words"),
    [
        (lambda: registry.register_metric("x")(NOT_A_FUNCTION), "must decorate a function, got 3"),
        (lambda: registry.register_metric("x", options=["a"]), "options must map names"),
        (lambda: registry.register_metric("a.b c"), "of letters, digits and underscores"),
        (lambda: registry.register_optimizer(""), "must be a non-empty string"),
    ],
)
def test_invalid_registrations_are_rejected(register: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        register()


def test_failed_import_of_builtin_parts_is_retried(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Registry("thing", setting="thing.name", part=Part, module="builtin_things")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "builtin_things.py").write_text("raise OSError")
    with pytest.raises(OSError):
        known.names()
    (tmp_path / "builtin_things.py").write_text("")
    assert known.names() == ()


def test_errors_of_custom_parts_name_the_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def build():\n    raise KeyError('learning_rate')\n")
    build = run(str(path), path.read_text())["build"]
    part = Part(name="mine", build=build, file=str(path), line=1)
    words = rf"{path}, line 1: the thing 'mine' failed \(line 2\): KeyError: 'learning_rate'"
    with (
        pytest.raises(ConfigError, match=words),
        registry.as_config_error(part, "the thing 'mine'"),
    ):
        build()
    with (
        pytest.raises(UserError, match=r"^as it is$"),
        registry.as_config_error(part, "the thing"),
    ):
        raise UserError("as it is")
    cell = "<ipython-input-3-abc>"
    build = run(cell, "def build():\n    raise KeyError('x')\n")["build"]
    with (
        pytest.raises(ConfigError, match=r"it failed \(line 2\)"),
        registry.as_config_error(Part(name="mine", build=build, file=cell, line=1), "it"),
    ):
        build()
    # Errors of built-in parts are bugs, not mistakes of the user.
    builtin = OPTIMIZERS.get("sgd")
    with pytest.raises(ZeroDivisionError), registry.as_config_error(builtin, "the optimizer"):
        1 / 0  # noqa: B018
