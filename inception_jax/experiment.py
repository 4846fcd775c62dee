"""Experiment files: Python programs with a get_config(), run to get settings and register parts.

An experiment may import what lies beside it, and those of this project as `experiments.NAME`,
wherever it lies itself and wherever the program runs. Nothing of that is left behind.
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
from inception_jax.config import Config
from inception_jax.errors import CheckpointError, ConfigError, UserError
from inception_jax.storage import paths

# The file that is being run to register the parts of a run, or ''.
_registering = contextvars.ContextVar("registering", default="")
# The name by which experiments import each other.
_NAME = "experiments"
# Beside the package in a checkout, or where a wheel puts them (pyproject.toml, data-files).
_SHIPPED = (
    pathlib.Path(__file__).parents[1] / _NAME,
    *(
        pathlib.Path(sysconfig.get_path("data", scheme), "share", "inception_jax", _NAME)
        for scheme in (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    ),
)
_UNEXPECTED_KEYWORD = re.compile(r"unexpected keyword argument '(\w+)'")
_MISSING = re.compile(rf"'?(\w+)' from '{_NAME}'|No module named '{_NAME}\.(\w+)'")


def load_config(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Config:
    """Returns the settings of an experiment, checked as a whole, or those of a run as they were.

    Args:
      path: of the experiment, a Python file with a get_config(), which is run; or of the
        config.json of a run. One of this project's, such as "experiments/tiny.py", is found
        wherever the program runs.
      overrides: settings to change, by path: {"train.batch_size": 256}.

    Raises:
      UserError: if there is no such file, or it is no experiment.
      ConfigError: if a setting is unknown or wrong, or contradicts another.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path: must be the path of an experiment, got {type(path).__name__}")
    config = load(os.fspath(path), log=console.say_once)
    # Other rules may have let a recorded run start.
    recorded = copy.deepcopy(config) if os.fspath(path).endswith(".json") else None
    for name, value in (overrides or {}).items():
        configs.check_path(name)
        configs.put(config, name, value)
    for problem in configs.validate(config, recorded=recorded):
        console.say_once(f"{path}: {problem}; it was recorded so")
    return config


def load(place: str, prefix: str = "", log: Callable[[str], None] = lambda line: None) -> Config:
    """Returns the settings of an experiment, or those that a run's config.json holds.

    Args:
      place: path of the file. What follows its last colon, where no file has the whole name, is
        handed to an experiment's get_config().
      prefix: what messages put before the path.
      log: takes a line about each file that is run besides.

    Raises:
      UserError: if there is no such file, or it gives no settings.
    """
    path = _find(place, prefix)
    arguments: list[str] = []
    if not path.exists() and ":" in place:
        name, _, argument = place.rpartition(":")
        path, arguments = _find(name, prefix), [argument]
    if not path.exists() or path.is_dir():
        raise UserError(f"{prefix}{place}: {_no_experiment(path)}")
    if path.suffix == ".json":
        record = configs.read_record(path)
        for note in record.notes:
            log(note)
        import_parts(record.parts, str(path), log)
        return record.config
    try:
        with _running(path) as module:
            if not hasattr(module, "get_config"):
                raise UserError(f"{prefix}{place}: has no get_config() that returns a Config")
            config = module.get_config(*arguments)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{prefix}{place}: {error}") from error
    except Exception as error:
        raise UserError(f"{prefix}{place}: {_failure(error, path)}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"{prefix}{place}: get_config() returned {type(config).__name__}; it must return "
            "inception_jax.config.Config"
        )
    return config


def used_parts(config: Config) -> list[dict[str, str]]:
    """Returns which parts that are not the package's own a configuration names, for config.json."""
    return [
        {"kind": known.kind, "name": part.name, "file": str(pathlib.Path(part.file).resolve())}
        for _, known, name in configs.named_parts(config)
        if name in known and not (part := known.get(name)).is_own
    ]


def import_parts(
    parts: Sequence[Mapping[str, str]], record: str, log: Callable[[str], None]
) -> None:
    """Runs the files that registered a run's parts, where that was not done in this process.

    Args:
      parts: as `used_parts` returned them.
      record: the run they are of, for messages.
      log: takes a line about each file.

    Raises:
      CheckpointError: if a file is gone, fails, or no longer registers its part.
    """
    for part in parts:
        kind, name, path = part["kind"], part["name"], pathlib.Path(part["file"])
        if kind not in registry.REGISTRIES:
            log(f"{record}: {kind} {name!r}: no kind of part of this version; it is left out")
            continue
        known = registry.REGISTRIES[kind]
        if name in known:
            continue
        what = f"{record}: its {kind} {name!r} was registered by {path}"
        remedy = "Give the experiment that registers it as --config=FILE, or import its module"
        if not path.is_file():
            raise CheckpointError(f"{what}, which is not there. {remedy}")
        log(f"running {path}, which registers the {kind} {name!r} of this run")
        try:
            register_parts(path)
        except UserError as error:
            raise CheckpointError(f"{what}: {error}. {remedy}") from error
        if name not in known:
            raise CheckpointError(f"{what}, which no longer does. {remedy}")


def _find(place: str, prefix: str) -> pathlib.Path:
    """Returns the path that a user typed; of one below experiments/, this project's if need be."""
    path = paths.local(place, f"{prefix}{place}")
    if path.exists() or path.parts[:1] != (_NAME,):
        return path
    shipped = [folder.joinpath(*path.parts[1:]) for folder in _SHIPPED]
    return next((each for each in shipped if each.is_file()), path)


def register_parts(path: pathlib.Path) -> None:
    """Runs a file for the parts that it registers.

    Raises:
      UserError: if it is not there, or fails.
    """
    if not path.is_file():
        raise UserError(f"{path}: {_no_experiment(path)}")
    token = _registering.set(str(path))
    try:
        with _running(path):
            pass
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {_failure(error, path)}") from error
    finally:
        _registering.reset(token)


def check_not_registering(what: str) -> None:
    """Refuses to do what a program does when it is run only to register its parts.

    Args:
      what: that is, for the message: "trains".

    Raises:
      UserError: if a file is being run for that.
    """
    if file := _registering.get():
        raise UserError(
            f"{file} {what} whenever it is run, and it is run to register the parts of a run. Put "
            "that below if __name__ == '__main__':, or the parts in a file of their own"
        )


@contextlib.contextmanager
def _running(path: pathlib.Path) -> Iterator[types.ModuleType]:
    """Runs a file, and yields its module as long as it can import what lies beside it.

    That is by its own name, by that of its folder, or as `experiments.NAME`; nothing of it hides a
    module found elsewhere, or stays importable.
    """
    folder = path.resolve().parent
    here = {os.path.realpath(each) for each in sys.path}
    beside = [str(each) for each in (folder, folder.parent) if str(each) not in here]
    before = dict(sys.modules)
    package, module = types.ModuleType(_NAME), types.ModuleType(f"_experiment_{path.stem}")
    package.__path__, module.__file__ = list(map(str, (folder, *_SHIPPED))), str(path)
    sys.path += beside
    _forget(_is_experiment)
    sys.modules |= {_NAME: package, module.__name__: module}
    try:
        importlib.machinery.SourceFileLoader(module.__name__, str(path)).exec_module(module)
        yield module
    finally:
        for each in beside:
            sys.path.remove(each)
        new = {name: each for name, each in sys.modules.items() if before.get(name) is not each}
        mine = {name for name, each in new.items() if _place(each) in beside}
        _forget(lambda name: _is_experiment(name) or name.partition(".")[0] in mine)
        sys.modules |= {name: each for name, each in before.items() if _is_experiment(name)}


def _is_experiment(name: str) -> bool:
    return name.partition(".")[0] == _NAME


def _forget(unwanted: Callable[[str], bool]) -> None:
    """Lets the next import of some modules read their files again."""
    for name in [name for name in sys.modules if unwanted(name)]:
        del sys.modules[name]


def _place(module: types.ModuleType) -> str:
    """Returns the folder that a module, or a whole package, was found in; '' of one without."""
    places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None)]
    return os.path.dirname(os.path.realpath(places[0])) if places[0] else ""


def _no_experiment(path: pathlib.Path) -> str:
    """Returns why a path is no file to take settings from, and what may be meant."""
    if (path / "config.json").exists():
        return f"is the folder of a run: give it as --workdir, or --config={path}/config.json"
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.glob("*.py"))
    if path.is_dir():
        some = f", such as {found[0]}" if found else ""
        return f"is a folder; give an experiment file{some}"
    names = {each.stem: f"{_NAME}/{each.name}" for at in _SHIPPED for each in at.glob("*.py")}
    names |= {each.stem: str(each) for each in found}
    meant = difflib.get_close_matches(path.stem, list(names), n=1)
    hint = f" Did you mean {names[meant[0]]}?" if meant else ""
    return f"there is no such file.{hint} Give an experiment, such as experiments/tiny.py"


def _failure(error: Exception, path: pathlib.Path) -> str:
    """Returns what went wrong in an experiment file, which is the user's own code, and where."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    # A get_config() that takes other arguments fails here, and a syntax error says itself where.
    inside = last.filename != __file__ and not isinstance(error, SyntaxError)
    where = f" ({last.filename}, line {last.lineno})" if inside else ""
    hint = ""
    if isinstance(error, TypeError) and (found := _UNEXPECTED_KEYWORD.search(str(error))):
        hint = configs.did_you_mean(found[1])
    elif isinstance(error, ImportError) and (found := _MISSING.search(str(error))):
        name = found[1] or found[2]
        hint = f" Put a copy of {name}.py into {path.resolve().parent}"
    return f"the experiment file failed: {advice.first_line(error)}{where}{hint and f'.{hint}'}"
