"""The command line that main and every tool share.

Flags are absl's, because ml_collections' `config_flags` (the `--config.a.b=value` overrides) are.
absl itself exits with 1 for --help and for a wrong flag, and an unknown setting raises a bare
KeyError; here --help exits with 0 and a user's mistake with 2 and one message.
"""

import gc
import importlib
import importlib.util
import itertools
import logging as python_logging
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import config_flags

from inception_jax import config as configs
from inception_jax import console, hosts, paths
from inception_jax.config import Config
from inception_jax.errors import EXIT_PREEMPTED, ConfigError, Preempted, RunError, UserError

_AGAIN = "start the same command again (training goes on from its last checkpoint)"
_HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull", "-?"}


def define_config() -> flags.FlagHolder[Config]:
    """Defines --config=FILE with its overrides --config.a.b=value."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "experiment file with a get_config() that returns a Config. It is a Python program, which "
        "is run: give none that you would not run",
    )


class _PathParser(flags.ArgumentParser[pathlib.Path | None]):
    """Reads the path of a local file or folder; an empty one stands for none.

    Args:
      name: of the flag, for messages.
    """

    syntactic_help = "a local path"

    def __init__(self, name: str) -> None:
        self._name = name

    def parse(self, argument: str) -> pathlib.Path | None:
        return paths.local(argument, f"--{self._name}={argument}") if argument else None


def define_path(
    name: str, meaning: str, *, required: bool = False
) -> flags.FlagHolder[pathlib.Path | None]:
    """Defines a flag that names a local file or folder; its value is None if it is not given."""
    return flags.DEFINE(_PathParser(name), name, None, meaning, required=required)


def given(flag: flags.FlagHolder[pathlib.Path | None]) -> pathlib.Path:
    """Returns the path of a flag that other checks make sure is given."""
    assert flag.value is not None, f"--{flag.name} is required here"
    return flag.value


def define_processes() -> Callable[[], dict[str, Any]]:
    """Defines the flags that say on which devices, and with which other processes, to compute.

    Returns:
      A function that gives their values, as `runtime.initialize` takes them.
    """
    holders = (
        flags.DEFINE_string("platform", "", "cpu, gpu or tpu; empty: the best there is"),
        flags.DEFINE_bool("distributed", False, "join the hosts of a TPU pod, SLURM or Open MPI"),
        flags.DEFINE_string(
            "cluster", "", "with distributed: how JAX finds them, such as mpi4py; empty: by itself"
        ),
        flags.DEFINE_string("coordinator_address", "", "host:port of process 0"),
        flags.DEFINE_integer("process_count", 0, "with coordinator_address: how many processes"),
        flags.DEFINE_integer("process_index", -1, "with coordinator_address: which one this is"),
    )
    return lambda: {holder.name: holder.value for holder in holders}


def command() -> dict[str, Any]:
    """Returns the flags of the command itself, without its settings, by their names with dashes."""
    defined = flags.FLAGS.flags_by_module_dict().get(sys.argv[0], [])
    return {
        f"--{flag.name}": str(flag.value) if isinstance(flag.value, pathlib.Path) else flag.value
        for flag in defined
        if flag.name != "config"
    }


def require(*names: str) -> None:
    """Makes flags obligatory."""
    flags.mark_flags_as_required(names)


def require_one(*names: str, message: str) -> None:
    """Makes one of some flags obligatory, and refuses more than one of them.

    Args:
      message: for the user who gave none, or several.
    """
    flags.register_multi_flags_validator(
        names, lambda given: sum(bool(given[name]) for name in names) == 1, message
    )


def experiment() -> dict[str, Any]:
    """Returns which experiment the command line took, and its own values of what was overridden.

    Returns:
      Values for JSON: file, as it was given; and own, the experiment's value of each setting that
      the command line gave another one, by its dotted path.
    """
    flag = flags.FLAGS["config"]
    own = {}
    for path, value in config_flags.get_override_values(flag).items():
        # config_flags makes a flag of each override, by default what the experiment says.
        before: Any = flags.FLAGS[f"config.{path}"].default
        before = tuple(before) if isinstance(value, tuple) else before
        if before != value:
            own[path] = before
    return {"file": config_flags.get_config_filename(flag), "own": own}


def refuse_positional(positional: Sequence[str]) -> None:
    """Checks that nothing is left of the command line besides flags.

    Raises:
      UserError: naming what was left.
    """
    if positional:
        raise UserError(f"{' '.join(positional)!r}: not a flag; flags begin with --. See --help")


def local_paths(positional: Sequence[str]) -> list[pathlib.Path]:
    """Returns the local files or folders that positional arguments name.

    Raises:
      UserError: if one of them is a URL, or has no meaning for this user.
    """
    return [paths.local(argument, argument) for argument in positional]


def say(line: str) -> None:
    """Prints a line for the user on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def run(main: Callable[[Sequence[str]], None], usage: str) -> NoReturn:
    """Parses the command line, calls `main` with what is left of it, and exits.

    Args:
      main: gets the positional arguments.
      usage: what the command is for and how it is called, for --help.
    """
    # Imports and tracing make millions of objects that stay. Looking for garbage among them as
    # often as Python does by default takes a sixth of a start.
    gc.set_threshold(100_000)
    console.prepare()
    # The libraries log much that is of no use to a user, and errors that they also raise.
    logging.set_verbosity(logging.FATAL)
    # Such as that it found no folder for its cache.
    python_logging.getLogger("matplotlib").setLevel(python_logging.ERROR)
    # A notebook names its own backend to the commands it starts, which need none: without it there,
    # matplotlib could not even be imported.
    os.environ["MPLBACKEND"] = "agg"
    if _HELP & set(sys.argv[1:]):
        print(_help(usage))
        sys.exit(0)
    try:
        main(_parse(sys.argv))
    except UserError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except Preempted as end:
        say(str(end))
        hosts.done()
        sys.exit(EXIT_PREEMPTED)
    except OSError as error:
        # A failed read or write that no module could say more about: its text says enough.
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}. Mend that, and {_AGAIN}", 2)
    except KeyboardInterrupt:
        _fail(f"interrupted; {_AGAIN}", 130)
    except Exception as error:
        # A bug, or what another process's death looks like from here, which is then said instead.
        hosts.await_verdict(error)
        traceback.print_exc()
        _fail(_unexpected(error), 1)
    hosts.done()
    sys.exit(0)


def _unexpected(error: Exception) -> str:
    """Returns what to do about an error that no module explains."""
    what = traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in what:
        return (
            f"the memory does not suffice: {what}. Give a smaller config.train.batch_size, or "
            "compute it in parts by config.train.accumulate (2, 4, ...)"
        )
    return (
        f"{what}. That was not to be expected; the lines above say where. {_AGAIN.capitalize()}; "
        "if it fails once more, it is a fault of the program: report these lines"
    )


def _fail(message: str, code: int) -> NoReturn:
    say(f"error: {message}")
    hosts.fail(message, code)
    sys.exit(code)


def _parse(argv: Sequence[str]) -> Sequence[str]:
    """Parses flags and returns the positional arguments; every mistake is a UserError."""
    for argument in argv[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            _check_path(match[1])
    _make_experiments_importable(argv)
    try:
        positional = flags.FLAGS(argv)[1:]
        # A file that is not there shows only when the configuration is looked at.
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            _check_type(flags.FLAGS.config)
        return positional
    except flags.Error as error:
        message = str(error).strip()
        # config_flags puts a whole traceback into this message; its last line says what is wrong.
        if "Error whilst parsing config file" in message:
            message = f"--config: the experiment file failed: {message.splitlines()[-1]}"
        raise UserError(f"{message.rstrip('.')}. See --help") from error
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--config: {str(error).strip().splitlines()[-1].strip()}") from error
    except Exception as error:
        # The experiment file is the user's own code, and may fail in any way.
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"--config: the experiment file failed: {type(error).__name__}: {error} "
            f"({where.filename}, line {where.lineno})"
        ) from error


def _make_experiments_importable(argv: Sequence[str]) -> None:
    """Lets an experiment file import those beside it, by the name of their folder.

    `from experiments import tiny_base` works without this only where the command is run from the
    folder above.
    """
    for argument, following in itertools.pairwise([*argv[1:], ""]):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
            file = following if match[1] is None else match[1]
            # config_flags hands what follows a colon to get_config().
            make_importable(pathlib.Path(file.partition(":")[0]))


# The name by which this project's experiments import each other.
_EXPERIMENTS = "experiments"


class _Beside(types.ModuleType):
    """A package of the modules in some folders, the first of which comes first."""

    def __init__(self, name: str, folders: Sequence[str]) -> None:
        super().__init__(name)
        self.__path__ = list(folders)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return importlib.import_module(f"{self.__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{self.__name__}.{name}":
                raise
            raise ImportError(
                f"{self.__name__} has no {name}: put a copy of {name}.py into {self.__path__[0]}"
            ) from error


def make_importable(experiment: pathlib.Path) -> None:
    """Lets an experiment import those beside it, by the name of their folder.

    The folder above is put last, so that nothing in it hides a module found elsewhere. Only a
    package of the folder's name in the current folder, from which Python would take it, comes
    second, and one named `experiments` anywhere: those of this project import each other by that
    name, whatever folder they were copied to.
    """
    folder = experiment.resolve().parent
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))
    for name in {folder.name, _EXPERIMENTS}:
        before = sys.modules.get(name)
        if isinstance(before, _Beside):
            before.__path__ = list(dict.fromkeys([str(folder), *before.__path__]))
        elif before is None:
            others = _folders_of(name)
            here = any(pathlib.Path(other).parent == pathlib.Path.cwd() for other in others)
            if others[:1] != [str(folder)] and (name == _EXPERIMENTS or here):
                sys.modules[name] = _Beside(name, [str(folder), *others])


def _folders_of(name: str) -> list[str]:
    """Returns the folders that Python looks for a package's modules in; none: there is none."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    places = (found and found.submodule_search_locations) or []
    return [str(pathlib.Path(place).resolve()) for place in places]


def _check_path(path: str) -> None:
    """Checks that a setting named on the command line is one."""
    paths = {known for known, _, _ in configs.leaves()}
    if path in paths:
        return
    if inner := [known for known in paths if known.startswith(f"{path}.")]:
        raise ConfigError(f"config.{path}: is a group of settings; give one of {', '.join(inner)}")
    raise ConfigError(configs.unknown_field(path))


def _check_type(config: Any) -> None:
    """Checks that an experiment file returned a Config; a missing file's error is raised too."""
    # config_flags puts off the error of a missing file until a field is looked at.
    getattr(config, "name", None)
    if not isinstance(config, Config):
        raise ConfigError(
            f"--config: get_config() returned {type(config).__name__}; it must return "
            "inception_jax.config.Config"
        )


def _help(usage: str) -> str:
    by_module = flags.FLAGS.flags_by_module_dict()
    defined = [*by_module.get(sys.argv[0], []), *by_module.get(__name__, [])]
    lines = [usage.strip(), "", "Flags:"]
    for flag in sorted(defined, key=lambda flag: flag.name):
        if flag.name != "config":
            lines.append(f"  --{flag.name}={flag.default_as_str or ''}\n      {flag.help}")
    if "config" in flags.FLAGS:
        lines += [
            "  --config=FILE",
            f"      {flags.FLAGS['config'].help}; see experiments/",
            "",
            "Settings, with their defaults; an experiment file gives others:",
            configs.describe(Config()),
        ]
    return "\n".join(lines)
