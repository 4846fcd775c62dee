"""Experiment files: Python files with get_config(), run to get settings and register parts.

An experiment can import files from its own folder, and the experiments of this project as
`experiments.NAME`, regardless of its location and the current directory. Afterwards, sys.path and
sys.modules are as before.
"""

import contextlib
import contextvars
import copy
import difflib
import importlib.machinery
import os
import pathlib
import re
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from inception_jax import advice, console, registry
from inception_jax import config as configs
from inception_jax.config import Config, durations
from inception_jax.errors import CheckpointError, ConfigError, UserError
from inception_jax.storage import paths

# The file being run to register the parts of a run; '' if none.
_registering_file = contextvars.ContextVar("registering", default="")
# The package name under which experiments import each other.
_EXPERIMENTS = "experiments"
# Next to the package in a checkout, or where a wheel installs them (pyproject.toml, data-files).
_SHIPPED_FOLDERS = (
    pathlib.Path(__file__).parents[1] / _EXPERIMENTS,
    *(
        pathlib.Path(sysconfig.get_path("data", scheme), "share", "inception_jax", _EXPERIMENTS)
        for scheme in (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    ),
)
_UNEXPECTED_KEYWORD = re.compile(r"unexpected keyword argument '(\w+)'")
_MISSING_MODULE = re.compile(
    rf"'?(\w+)' from '{_EXPERIMENTS}'|No module named '{_EXPERIMENTS}\.(\w+)'"
)


def load_config(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Config:
    """Returns the validated settings of an experiment or of a run.

    Args:
      path: the experiment, a Python file with get_config(), which is executed; or the config.json
        of a run. The experiments of this project, such as "experiments/tiny.py", are found from
        any directory.
      overrides: settings to change, by path: {"train.batch_size": 256}.

    Raises:
      UserError: if the file does not exist or is not an experiment.
      ConfigError: if a setting is unknown, invalid, or contradicts another.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path: must be the path of an experiment, got {type(path).__name__}")
    config = load(os.fspath(path), log=console.log_once)
    # The run may have started under the rules of another version.
    recorded = copy.deepcopy(config) if os.fspath(path).endswith(".json") else None
    for name, value in (overrides or {}).items():
        configs.check_path(name)
        configs.put(config, name, value)
    for problem in configs.validate(config, recorded=recorded):
        console.log_once(f"{path}: {problem}; accepted because the run recorded it")
    return config


def load(source: str, prefix: str = "", log: Callable[[str], None] = lambda line: None) -> Config:
    """Returns the settings of an experiment, or those in a run's config.json.

    Args:
      source: path of the file. If it does not exist and has a colon, the text after the last colon
        is passed to the experiment's get_config().
      prefix: text before the path in messages.
      log: called with a line for each other file that is run.

    Raises:
      UserError: if the file does not exist, fails, or returns no settings.
    """
    place = paths.user_path(source, f"{prefix}{source}")
    if not paths.is_local(place) and place.suffix == ".json":
        return _load_record(place, f"{prefix}{source}", log)
    path = _resolve(source, prefix)
    arguments: list[str] = []
    if not path.exists() and ":" in source:
        name, _, argument = source.rpartition(":")
        path, arguments = _resolve(name, prefix), [argument]
    if not path.exists() or path.is_dir():
        raise UserError(f"{prefix}{source}: {_describe_missing(path)}")
    if path.suffix == ".json":
        return _load_record(path, f"{prefix}{source}", log)
    try:
        with _imported(path) as module:
            if not hasattr(module, "get_config"):
                raise UserError(f"{prefix}{source}: must define get_config() returning a Config")
            config = module.get_config(*arguments)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{prefix}{source}: {error}") from error
    except Exception as error:
        raise UserError(f"{prefix}{source}: {_describe_failure(error, path)}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"{prefix}{source}: get_config() must return an inception_jax.config.Config, got "
            f"{type(config).__name__}"
        )
    return config


def _load_record(path: paths.Path, what: str, log: Callable[[str], None]) -> Config:
    try:
        record = configs.read_record(path)
    except FileNotFoundError as error:
        raise UserError(f"{what}: file not found") from error
    for note in record.notes:
        log(note)
    if record.own:
        objects = ", ".join(f"{kind} ({name})" for kind, name in record.own.items())
        log(f"{path}: its run used objects passed by its program, not these settings: {objects}")
    import_parts(record.parts, str(path), log)
    return record.config


def custom_parts(config: Config) -> list[dict[str, str]]:
    """Returns the custom parts that a configuration names, for config.json."""
    return [
        {"kind": known.kind, "name": part.name, "file": str(pathlib.Path(part.file).resolve())}
        for _, known, name in configs.named_parts(config)
        if name in known and not (part := known.get(name)).is_builtin
    ]


def import_parts(
    parts: Sequence[Mapping[str, str]], record: str, log: Callable[[str], None]
) -> None:
    """Runs the files that register a run's custom parts, unless they are registered already.

    Args:
      parts: the parts, as returned by `custom_parts`.
      record: path of the run's record, for messages.
      log: called with a line for each file that is run, and for each part that another file has
        registered.

    Raises:
      CheckpointError: if a file is missing, fails, or no longer registers its part.
    """
    for part in parts:
        kind, name, path = part["kind"], part["name"], pathlib.Path(part["file"])
        if kind not in registry.REGISTRIES:
            log(f"{record}: {kind} {name!r}: unknown kind of part; ignored")
            continue
        registered = registry.REGISTRIES[kind]
        what = f"{record}: its {kind} {name!r} was registered by {path}"
        if name in registered:
            if _differ(path, here := pathlib.Path(registered.get(name).file)):
                log(f"{what}; that of {here} is used, which registered it in this process")
            continue
        remedy = (
            "Give the file that registers it, with --config=FILE, or with --parts=FILE where a "
            "command has that flag, or import its module"
        )
        if not path.is_file():
            raise CheckpointError(f"{what}, which does not exist. {remedy}")
        log(f"running {path}, which registers the {kind} {name!r} of this run")
        try:
            register_parts(path)
        except UserError as error:
            raise CheckpointError(f"{what}: {error}. {remedy}") from error
        if name not in registered:
            raise CheckpointError(f"{what}, which no longer registers it. {remedy}")


def _differ(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Whether two files exist and have different contents."""
    try:
        return first.read_bytes() != second.read_bytes()
    except OSError:
        return False


def _resolve(source: str, prefix: str) -> pathlib.Path:
    """Returns the path that a user typed; experiments/… falls back to this project's files."""
    path = _require_local(paths.user_path(source, f"{prefix}{source}"), f"{prefix}{source}")
    if path.exists() or path.parts[:1] != (_EXPERIMENTS,):
        return path
    shipped = [folder.joinpath(*path.parts[1:]) for folder in _SHIPPED_FOLDERS]
    return next((each for each in shipped if each.is_file()), path)


def _require_local(path: paths.Path, what: str) -> pathlib.Path:
    """Returns the path of a file to execute, which may import others from its folder.

    Raises:
      UserError: if it is in a bucket.
    """
    if not paths.is_local(path):
        raise UserError(
            f"{what}: is executed, so it must be a local file; copy it, and the files that it "
            f"imports, with gcloud storage cp {path} ."
        )
    return path


def register_parts(path: paths.Path, prefix: str = "") -> None:
    """Runs a file that registers parts.

    Args:
      path: of the file.
      prefix: text before the path in messages.

    Raises:
      UserError: if it is in a bucket, does not exist or fails.
    """
    path = _require_local(path, f"{prefix}{path}")
    if not path.is_file():
        raise UserError(f"{prefix}{path}: {_describe_missing(path)}")
    token = _registering_file.set(str(path))
    try:
        with _imported(path):
            pass
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{prefix}{path}: {_describe_failure(error, path)}") from error
    finally:
        _registering_file.reset(token)


def check_not_registering(what: str) -> None:
    """Checks that the calling file is not being run only to register its parts.

    Args:
      what: what the file does, for the message: "trains".

    Raises:
      UserError: if a file is being run by `register_parts`.
    """
    if file := _registering_file.get():
        raise UserError(
            f"{file}: {what} when it is run, but here it is run only to register parts. Move that "
            "code below if __name__ == '__main__':, or the parts to another file"
        )


@contextlib.contextmanager
def _imported(path: pathlib.Path) -> Iterator[types.ModuleType]:
    """Runs a file and yields its module; during the block it can import files from its folder.

    They can be imported by their own name, as FOLDER.NAME or as `experiments.NAME`. They never
    shadow other modules, and they do not stay importable.
    """
    folder = path.resolve().parent
    known = {os.path.realpath(each) for each in sys.path}
    added = [str(each) for each in (folder, folder.parent) if str(each) not in known]
    before = dict(sys.modules)
    package, module = types.ModuleType(_EXPERIMENTS), types.ModuleType(f"_experiment_{path.stem}")
    package.__path__, module.__file__ = list(map(str, (folder, *_SHIPPED_FOLDERS))), str(path)
    sys.path += added
    _drop_modules(_is_experiment)
    sys.modules |= {_EXPERIMENTS: package, module.__name__: module}
    try:
        importlib.machinery.SourceFileLoader(module.__name__, str(path)).exec_module(module)
        yield module
    finally:
        for each in added:
            sys.path.remove(each)
        new = {name: each for name, each in sys.modules.items() if before.get(name) is not each}
        mine = {name for name, each in new.items() if _module_folder(each) in added}
        _drop_modules(lambda name: _is_experiment(name) or name.partition(".")[0] in mine)
        sys.modules |= {name: each for name, each in before.items() if _is_experiment(name)}


def _is_experiment(name: str) -> bool:
    return name.partition(".")[0] == _EXPERIMENTS


def _drop_modules(unwanted: Callable[[str], bool]) -> None:
    """Removes modules from sys.modules, so that the next import reads their files again."""
    for name in [name for name in sys.modules if unwanted(name)]:
        del sys.modules[name]


def _module_folder(module: types.ModuleType) -> str:
    """Returns the folder of a module or package; '' for one without a file."""
    paths = [*getattr(module, "__path__", ()), getattr(module, "__file__", None)]
    return os.path.dirname(os.path.realpath(paths[0])) if paths[0] else ""


def _describe_missing(path: pathlib.Path) -> str:
    """Returns why settings cannot be read from a path, with a suggestion."""
    if (path / "config.json").exists():
        return f"is the folder of a run; use --workdir={path} or --config={path}/config.json"
    folder = path if path.is_dir() else path.parent
    files = sorted(folder.glob("*.py"))
    if path.is_dir():
        example = f", such as {files[0]}" if files else ""
        return f"is a folder; use an experiment file{example}"
    names = {
        each.stem: f"{_EXPERIMENTS}/{each.name}"
        for shipped in _SHIPPED_FOLDERS
        for each in shipped.glob("*.py")
    }
    names |= {each.stem: str(each) for each in files}
    matches = difflib.get_close_matches(path.stem, list(names), n=1)
    hint = f" Did you mean {names[matches[0]]}?" if matches else ""
    return f"file not found.{hint} Use an experiment file, such as experiments/tiny.py"


def _describe_failure(error: Exception, path: pathlib.Path) -> str:
    """Returns what failed in an experiment file, and where."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    # A get_config() with other arguments fails in this file; a syntax error contains its location.
    inside = last.filename != __file__ and not isinstance(error, SyntaxError)
    where = f" ({last.filename}, line {last.lineno})" if inside else ""
    hint, text = "", str(error)
    missing = re.search(r"has no attribute '(\w+)'", text)
    if text.startswith("Duration.__init__") or (missing and missing[1] in durations.UNITS):
        hint = f" A duration is one string, such as {durations.EXAMPLE}"
    elif isinstance(error, AttributeError) and type(error.obj).__module__ == Config.__module__:
        hint = configs.did_you_mean(str(error.name))
    elif isinstance(error, TypeError) and (match := _UNEXPECTED_KEYWORD.search(text)):
        hint = configs.did_you_mean(match[1])
    elif isinstance(error, ImportError) and (match := _MISSING_MODULE.search(text)):
        name = match[1] or match[2]
        hint = f" Copy {name}.py to {path.resolve().parent}"
    hint = hint and f".{hint}".rstrip(".")
    return f"the experiment file failed: {advice.first_line(error)}{where}{hint}"
