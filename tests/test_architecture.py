"""What holds between the files of the project, read from their source without importing them."""

import ast
import dataclasses
import functools
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from inception_jax import config
from inception_jax.registry import DATASETS, REGISTRIES

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "inception_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each part of the package may import from the others; `inception_jax` is its root, which
# imports `api` by its name only, when it is asked for.
BASE = {"errors", "version", "console", "advice", "storage", "registry", "config"}
MAY_IMPORT = {
    "inception_jax": {"api", "experiment", "version"},
    "errors": set(),
    "version": set(),
    "console": set(),
    "advice": set(),
    "storage": {"errors"},
    "registry": {"errors"},
    "config": {"errors", "version", "storage", "registry"},
    "runtime": BASE,
    "datasets": BASE | {"runtime"},
    "input": BASE | {"runtime", "datasets"},
    "models": BASE | {"runtime"},
    "telemetry": BASE | {"runtime"},
    "experiment": BASE,
    "training": BASE | {"experiment", "runtime", "datasets", "input", "models", "telemetry"},
    "evaluation": BASE | {"runtime", "datasets", "input", "models", "telemetry", "training"},
}
_TOWERS_USE = MAY_IMPORT["evaluation"] | {"evaluation", "figures"}
MAY_IMPORT |= {
    "figures": {"datasets"},
    "inference": _TOWERS_USE,
    "export": _TOWERS_USE | {"inference"},
    "inspection": _TOWERS_USE | {"inference"},
    "programs": _TOWERS_USE,
    # What a report is made of can be read without JAX.
    "reporting": BASE | {"figures", "datasets", "telemetry", "evaluation"},
    "cli": BASE | {"experiment", "runtime"},
    "session": _TOWERS_USE | {"experiment", "reporting"},
}
COMMANDS = {"tools", "main", "api"}

# The libraries whose interface changes most, and the only places that know them.
OWNERS = {
    "orbax": ("training/checkpoints.py", "training/_orbax_private.py"),
    "grain": ("input/pipeline.py",),
    "clu": ("telemetry/_clu_private.py", "training/metrics.py", "runtime/environment.py"),
    "tensorboardX": ("telemetry/_tensorboardx_private.py",),
    "tensorflow_datasets": ("datasets/",),
    "sklearn": ("datasets/",),
    "matplotlib": ("figures.py", "reporting/", "inspection/", "inference/gradcam.py"),
    "jinja2": ("reporting/html.py",),
    "safetensors": ("models/weights.py",),
    "torch": ("tools/import_weights.py",),
    "starlette": ("inference/server/",),
    "uvicorn": ("inference/server/",),
    "graphviz": ("inspection/drawing.py",),
    "onnx": ("export/",),
    "onnxruntime": ("export/",),
    "google": ("storage/buckets.py",),
    "google_crc32c": ("storage/transfers.py",),
    "gcsfs": ("storage/_gcsfs_private.py",),
    "fsspec": ("storage/",),
}
UNWANTED = {"tensorflow", "keras", "torchvision", "tensorboard"}
PARALLEL = {"sharding", "PartitionSpec", "NamedSharding", "Mesh", "axis_name", "psum", "pmean"}


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: pathlib.Path) -> Iterator[str]:
    """Yields the dotted name of everything that a file imports, wherever in it."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(name: str) -> str:
    """Returns the part that a dotted name is in: 'input' of inception_jax.input.pipeline."""
    inside = name.partition(".")[2].partition(".")[0]
    paths = (PACKAGE / inside, PACKAGE / f"{inside}.py")
    return inside if inside and any(path.exists() for path in paths) else "inception_jax"


def name_of(path: pathlib.Path) -> str:
    """Returns a file's path inside the package, with forward slashes."""
    return path.relative_to(PACKAGE).as_posix()


def part_of_file(path: pathlib.Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "inception_jax" if first == "__init__" else first


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_layers(path: pathlib.Path) -> None:
    part = part_of_file(path)
    allowed = {"tools", *MAY_IMPORT} if part in COMMANDS else {part, *MAY_IMPORT[part]}
    used = {part_of(name) for name in imports(path) if name.split(".")[0] == "inception_jax"}
    assert used <= allowed, f"{part} must not import {sorted(used - allowed)}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_volatile_libraries_have_one_owner(path: pathlib.Path) -> None:
    for name in {name.split(".")[0] for name in imports(path)}:
        assert name not in UNWANTED
        if name in OWNERS:
            assert name_of(path).startswith(OWNERS[name]), f"{name} belongs to {OWNERS[name]}"


def test_owners_use_their_libraries() -> None:
    """A rule about a library that nothing uses would only look like a rule."""
    used = {name.split(".")[0] for path in MODULES for name in imports(path)}
    assert set(OWNERS) <= used


def test_models_do_not_name_mesh_axes() -> None:
    for path in sorted((PACKAGE / "models").glob("*.py")):
        nodes = list(ast.walk(parse(path)))
        words = {node.id for node in nodes if isinstance(node, ast.Name)}
        words |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        words |= {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}
        assert not words & PARALLEL, path
        assert not any(name.startswith("jax.sharding") for name in imports(path)), path


def test_reporting_does_not_import_jax() -> None:
    """So that a report, a plot or a diagnosis of a run takes no second to start."""
    paths = sorted((PACKAGE / "reporting").glob("*.py"))
    for path in paths:
        assert not {name.split(".")[0] for name in imports(path)} & {"jax", "flax", "optax"}, path
    modules = ", ".join(f"inception_jax.reporting.{path.stem}" for path in paths)
    script = f"import sys, {modules}; print(*({{'jax', 'flax', 'matplotlib'}} & set(sys.modules)))"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "\n"


def test_experiments_import_only_the_configuration() -> None:
    paths = sorted((ROOT / "experiments").glob("*.py"))
    assert paths
    for path in paths:
        for name in imports(path):
            known = name.startswith("inception_jax.config") or name.split(".")[0] == "experiments"
            assert known or name.split(".")[0] in sys.stdlib_module_names, f"{path.name}: {name}"


def test_every_experiment_has_a_docstring() -> None:
    for path in sorted((ROOT / "experiments").glob("*.py")):
        assert ast.get_docstring(parse(path)), f"{path.name} has no docstring"


def test_main_is_short() -> None:
    assert len((PACKAGE / "main.py").read_text(encoding="utf-8").splitlines()) <= 80


def test_every_setting_is_read_somewhere() -> None:
    """A setting that nothing reads would be accepted, recorded and without any effect."""
    read = {
        node.attr
        for path in MODULES
        if name_of(path) != "config/schema.py"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # Those of a single data set are read by their names, which its entry lists.
    # And those of a registered part by the part.
    for known in REGISTRIES.values():
        read.update(*(part.settings or () for part in known))
    read.update(*(part.extra_settings for part in DATASETS))
    settings = set()
    for path, _, _ in config.leaves():
        settings.add(path.rpartition(".")[2])
    settings.update(field.name for field in dataclasses.fields(config.View))
    unread = sorted(settings - read)
    assert not unread
