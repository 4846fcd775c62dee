import json
import pathlib
import platform
import re
import subprocess
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import pytest

from inception_jax.runtime import environment


def test_parameter_table_lists_parameters_and_total() -> None:
    params = {
        "stem": {"kernel": jnp.zeros([7, 7, 3, 64]), "bias": jnp.zeros([64])},
        "head": {"kernel": jnp.zeros([1024, 10])},
    }
    table = environment.parameter_table(params)
    assert re.search(r"stem/kernel +\| \(7, 7, 3, 64\) +\| float32 +\| 9,408 ", table)
    assert re.search(r"head/kernel +\| \(1024, 10\) +\| float32 +\| 10,240 ", table)
    assert f"Total: {9408 + 64 + 10240:,} " in table


def test_parameter_table_of_abstract_arrays() -> None:
    shapes = jax.eval_shape(lambda: {"a": {"kernel": jnp.zeros([3, 5])}})
    assert "Total: 15 " in environment.parameter_table(shapes)


def test_environment_has_versions_and_devices() -> None:
    values = environment.environment()
    assert json.loads(json.dumps(values)) == values
    assert values["python"] == platform.python_version()
    assert values["packages"]["jax"] == jax.__version__
    assert None not in values["packages"].values()
    assert values["device_count"] == jax.device_count() and values["backend"] == "cpu"
    # It is written to files that users may publish.
    assert str(pathlib.Path(environment.__file__).parents[2]) not in json.dumps(values)


@pytest.fixture
def forget_revision() -> Iterator[Callable[[], None]]:
    """A function that makes the next call of `revision` look at the checkout again."""
    environment.revision.cache_clear()
    yield environment.revision.cache_clear
    environment.revision.cache_clear()


def test_revision_is_the_commit_of_the_checkout(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    forget_revision: Callable[[], None],
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    module = tmp_path / "inception_jax" / "telemetry" / "summary.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(environment, "__file__", str(module))
    assert environment.environment()["revision"] is None
    git("init")
    forget_revision()
    assert environment.environment()["revision"] is None
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    forget_revision()
    assert environment.environment()["revision"] == commit
    module.write_text("changed")
    assert environment.environment()["revision"] == commit, "this process imported it before"
    forget_revision()
    assert environment.environment()["revision"] == f"{commit}+changes"


def test_software_detects_differences(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--one")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    before = environment.software()
    assert before["$XLA_FLAGS"] == "--one"
    assert "$JAX_PROCESS_ID" not in before
    assert before["python"] and before["jax version"] and before["source files"]
    monkeypatch.setenv("XLA_FLAGS", "--other")
    after = environment.software()
    assert {name for name, value in after.items() if before[name] != value} == {"$XLA_FLAGS"}
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text("x = 1\n")
    digests = {environment.source_digest(tmp_path)}
    (tmp_path / "inner" / "a.py").write_text("x = 2\n")
    digests.add(environment.source_digest(tmp_path))
    (tmp_path / "inner" / "a.py").rename(tmp_path / "a.py")
    digests.add(environment.source_digest(tmp_path))
    assert len(digests) == 3
