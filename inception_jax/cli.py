"""The command line that main and every tool share.

Flags are absl's, because ml_collections' `config_flags` (the `--config.a.b=value` overrides) are.
absl itself exits with 1 for --help and for a wrong flag, and an unknown setting raises a bare
KeyError; here --help exits with 0 and a user's mistake with 2 and one message.
"""

import ast
import contextlib
import copy
import difflib
import functools
import gc
import itertools
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from absl import flags, logging
from ml_collections import config_flags

from inception_jax import advice, console
from inception_jax import config as configs
from inception_jax import experiment as experiments
from inception_jax.config import Config, reference
from inception_jax.errors import (
    EXIT_PREEMPTED,
    Preempted,
    RunError,
    UserError,
    nearest,
    phase_of,
)
from inception_jax.runtime import compilation_cache, hosts
from inception_jax.storage import paths

_AGAIN = "start the same command again (training goes on from its last checkpoint)"
# As a shell reports a program that SIGPIPE ended.
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
# absl's words for a setting's value that it cannot convert, and a number with its unit.
_ABSL_PREFIX = re.compile(r"flags? .*?: (?=give )|flag (?=--)", re.DOTALL)
_WRONG_SETTING = re.compile(r"flag --config\.([^=]+)=(.*?): .*", re.DOTALL)
_WITH_UNIT = re.compile(r"([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*([a-zA-Z%]+)")
# The command line as config_flags is to see it. It looks for --config there when the flag is
# defined, too, which comes before any command line is parsed.
_config_argv = ["", "--config="]
# Settings that the command line gave an entry of, which config_flags does not know, with their
# values before.
_mappings_before: dict[str, Any] = {}
_HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull", "-?"}


def define_config() -> flags.FlagHolder[Config]:
    """Defines --config=FILE with its overrides --config.a.b=value."""
    holder = config_flags.DEFINE_config_dataclass(
        "config",
        Config(),
        "experiment file with a get_config() that returns a Config. It is a Python program, which "
        "is run: give none that you would not run. Or the config.json of a run",
        parse_fn=functools.partial(experiments.load, prefix="--config=", log=console.say_once),
        sys_argv=_config_argv,
    )
    # It has a value only where --config is given.
    flags.FLAGS.set_default("config", None)
    return holder


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


class TrainedFlags(NamedTuple):
    """The flags that say which trained weights to use."""

    workdir: flags.FlagHolder[pathlib.Path | None]
    weights: flags.FlagHolder[pathlib.Path | None]
    checkpoint: flags.FlagHolder[str]
    parts: flags.FlagHolder[pathlib.Path | None]

    def values(self) -> dict[str, Any]:
        """Returns what loads the weights, once the file that registers their network was run."""
        if self.parts.value is not None:
            experiments.register_parts(self.parts.value)
        return {flag.name: flag.value for flag in (self.workdir, self.weights, self.checkpoint)}


def define_trained(*, or_config: bool = False) -> TrainedFlags:
    """Defines --workdir, --weights, --checkpoint and --parts; one of the first two is needed.

    Args:
      or_config: whether --config will do instead.
    """
    found = TrainedFlags(
        define_path("workdir", "folder of a run whose checkpoint to use"),
        define_path("weights", "file of weights, instead of --workdir"),
        flags.DEFINE_string("checkpoint", "best", "best, last or the number of a step"),
        define_path(
            "parts",
            "with --weights of a network of one's own: the Python file that registers it, which is "
            "run: give none that you would not run",
        ),
    )
    if or_config:
        message = "give one of --config=EXPERIMENT, --workdir=DIR and --weights=FILE"
        require_one("config", "workdir", "weights", message=message)
    else:
        message = "give either --workdir=DIR or --weights=FILE"
        require_one("workdir", "weights", message=message)
    return found


def define_platform() -> flags.FlagHolder[str]:
    """Defines the flag that says what kind of device to compute on."""
    return flags.DEFINE_string("platform", "", "cpu, gpu or tpu; empty: the best there is")


def define_processes() -> Callable[[], dict[str, Any]]:
    """Defines the flags that say on which devices, and with which other processes, to compute.

    Returns:
      A function that gives their values, as `runtime.initialize` takes them.
    """
    holders = (
        define_platform(),
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
    for name in names:
        flags.register_validator(name, bool, f"give --{name}=…")


def require_one(*names: str, message: str, unless: str = "") -> None:
    """Requires exactly one of several flags.

    Args:
      message: for a user who gives none or more than one.
      unless: a boolean flag with which none is needed.
    """

    def is_right(given: dict[str, Any]) -> bool:
        count = sum(bool(given[name]) for name in names)
        return count == 1 or (count == 0 and bool(unless) and given[unless])

    checked = [*names, unless] if unless else names
    flags.register_multi_flags_validator(checked, is_right, message)


def overrides() -> dict[str, Any]:
    """Returns the settings that the command line gives, by path, with their value before."""
    return _mappings_before | {
        # config_flags makes a flag of each override, by default what the experiment says.
        path: flags.FLAGS[f"config.{path}"].default
        for path in config_flags.get_override_values(flags.FLAGS["config"])
    }


def experiment() -> dict[str, Any]:
    """Returns which experiment the command line took, and its own values of what was overridden.

    Where it took a run's config.json, that run's experiment.

    Returns:
      Values for JSON: file, as it was given; and own, the experiment's value of each setting that
      the command line gave another one, by its dotted path.
    """
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    own: dict[str, Any] = {}
    if file.endswith(".json"):
        record = configs.read_record(paths.local(file, f"--config={file}"))
        before = record.experiment or {"file": file, "own": {}}
        file, own = before["file"], dict(before["own"])
    for path, value in overrides().items():
        own.setdefault(path, value)
    own = {path: configs.plain(value) for path, value in own.items()}
    now = {path: configs.plain(configs.get(flags.FLAGS.config, path)) for path in own}
    return {"file": file, "own": {path: own[path] for path in own if own[path] != now[path]}}


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


def run(main: Callable[[Sequence[str]], None], usage: str, *, settings_of: str = "") -> NoReturn:
    """Parses the command line, calls `main` with what is left of it, and exits.

    Args:
      main: gets the positional arguments.
      usage: what the command is for and how it is called, for --help.
      settings_of: the flag that names a run's folder, whose settings are taken where --config is
        not given; '' for none.
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
    try:
        if _HELP & set(sys.argv[1:]):
            print(_help(usage))
        else:
            with compilation_cache.explained_problems(console.say):
                main(_parse(sys.argv, settings_of))
        # What a pipe has not taken shows here, and not while Python shuts down.
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except Preempted as end:
        console.say(str(end))
        sys.exit(EXIT_PREEMPTED)
    except BrokenPipeError:
        _end_with_reader()
    except KeyboardInterrupt:
        _fail(f"interrupted; {_AGAIN}", 130)
    except OSError as error:
        # A failed read or write that no module could say more about: its text says enough.
        if error.filename is None:
            _fail_unexpectedly(error)
        _fail(f"{error.filename}: {error.strerror}. Fix this, and {_AGAIN}", 2)
    except Exception as error:
        _fail_unexpectedly(error)
    sys.exit(0)


def _end_with_reader() -> NoReturn:
    """Ends where who reads the output, such as head, has enough: in silence, as SIGPIPE would."""
    # Python flushes its streams once more when it ends, and would complain.
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    hosts.fail("who read its output has gone", EXIT_BROKEN_PIPE)
    sys.exit(EXIT_BROKEN_PIPE)


def _fail_unexpectedly(error: Exception) -> NoReturn:
    """Ends with a bug, or what another process's failure looks like here, which is then named."""
    if message := hosts.peer_failure(error):
        console.say(f"error: {message}")
        hosts.fail("", 1)
    traceback.print_exception(error)
    _fail(_unexpected(error), 1)


def _unexpected(error: Exception) -> str:
    """Returns what to do about an error that no module explains."""
    given = flags.FLAGS.flag_values_dict() if flags.FLAGS.is_parsed() else {}
    config = given.get("config")
    settings: dict[str, Any] = {}
    if config is not None:
        settings = {path: configs.get(config, path) for path, _, _ in configs.leaves()}
    command = "evaluate" if given.get("mode") == "eval" else pathlib.Path(sys.argv[0]).stem
    if message := advice.explain(error, (phase_of(error), command), settings):
        return message
    return (
        f"{advice.first_line(error)}. Unexpected error; see the traceback above. "
        f"{_AGAIN.capitalize()}; if it fails again, it is a bug in the program: report these lines"
    )


def _fail(message: str, code: int) -> NoReturn:
    console.say(f"error: {message}")
    hosts.fail(message, code)
    sys.exit(code)


def _parse(argv: Sequence[str], settings_of: str) -> Sequence[str]:
    """Parses flags and returns the positional arguments; every mistake is a UserError."""
    argv = _with_config(argv, settings_of)
    _check_values_given(argv)
    for argument in argv[1:]:
        if match := _OVERRIDE.match(argument):
            configs.check_path(match[1])
    argv, entries = _without_entries([_with_tuple(argument) for argument in argv])
    _config_argv[:] = argv
    try:
        rest = flags.FLAGS(argv)[1:]
        _put_entries(entries)
        return rest
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error.flagname)) from error
    except flags.Error as error:
        raise UserError(f"{_wrong_value(str(error).strip()).rstrip('.')}. See --help") from error


def _with_tuple(argument: str) -> str:
    """Returns an argument; a list such as top1,top5 in the form that config_flags reads."""
    path, given, value = argument.partition("=")
    match = _OVERRIDE.match(argument)
    kinds = {known: kind for known, kind, _ in configs.leaves()}
    if not match or not given or kinds.get(match[1]) != tuple[str, ...]:
        return argument
    if value.lstrip()[:1] in ("(", "[", "'", '"'):
        return argument
    return f"{path}={tuple(filter(None, (each.strip() for each in value.split(','))))!r}"


def _without_entries(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the command line without entries of settings that are mappings, and those by path."""
    rest: list[str] = []
    entries: dict[str, str] = {}
    for argument in argv:
        match = _OVERRIDE.match(argument)
        if match and configs.is_mapping(match[1]):
            raise UserError(f"{argument}: takes single entries: --config.{match[1]}.NAME=VALUE")
        mapping, entry = configs.mapping_of(match[1]) if match else ("", "")
        if not match or not entry:
            rest.append(argument)
            continue
        _, given, value = argument.partition("=")
        if not given and configs.entry_type(match[1]) is bool:
            value = str(not argument.lstrip("-").startswith("no"))
        elif not given:
            raise UserError(f"{argument}: needs a value: {argument}=…")
        entries[f"{mapping}.{entry}"] = value
    return rest, entries


def _put_entries(entries: Mapping[str, str]) -> None:
    """Puts entries of settings that are mappings into the configuration, after all else of it."""
    _mappings_before.clear()
    for path, text in entries.items():
        mapping, _ = configs.mapping_of(path)
        _mappings_before.setdefault(
            mapping, copy.deepcopy(configs.get(flags.FLAGS.config, mapping))
        )
        kind, value = configs.entry_type(path), text
        if kind is not str:
            with contextlib.suppress(ValueError, SyntaxError):  # A word needs no quotes.
                value = ast.literal_eval(text.capitalize() if kind is bool else text)
        configs.put(flags.FLAGS.config, path, value)


def _with_config(argv: Sequence[str], settings_of: str) -> list[str]:
    """Returns the command line with --config as its first flag, where config_flags wants it.

    Where it is not given, and the command takes the settings of a run's folder instead, it is that
    folder's config.json.

    Args:
      argv: the command line.
      settings_of: the flag that names the folder; '' for none.
    """
    rest, files = _take(argv, "config")
    if len(files) > 1:
        raise UserError(f"--config: is given {len(files)} times ({', '.join(files)}); give it once")
    overridden = [argument for argument in rest[1:] if _OVERRIDE.match(argument)]
    if not files and settings_of and (folders := _take(argv, settings_of)[1]):
        folder = paths.local(folders[-1], f"--{settings_of}={folders[-1]}")
        record = folder / "config.json"
        if not record.exists():
            raise UserError(
                f"--{settings_of}={folders[-1]}: there is no run here (no config.json). Start one "
                "with --config=FILE, an experiment such as experiments/tiny.py"
            )
        files = [str(record)]
    if not files and overridden and "config" in flags.FLAGS:
        if not settings_of and (_take(argv, "workdir")[1] or _take(argv, "weights")[1]):
            raise UserError(f"{overridden[0]}: trained weights have their settings; leave it out")
        raise UserError(
            f"{overridden[0]}: changes a setting of an experiment; give that too, as --config=FILE"
        )
    return [*rest[:1], *(f"--config={file}" for file in files), *rest[1:]]


def _take(argv: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Returns the command line without a flag, and the values that it gave the flag."""
    rest: list[str] = []
    values: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            rest += [argument, *arguments]
        elif match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL):
            value = next(arguments, None) if match[1] is None else match[1]
            if not value or value.startswith("--"):
                raise UserError(f"--{name}: needs a value: --{name}=…")
            values.append(value)
        else:
            rest.append(argument)
    return rest, values


def _check_values_given(argv: Sequence[str]) -> None:
    """Checks that no flag takes the next flag for its value, as absl would have it."""
    settings = {f"config.{path}": kind is bool for path, kind, _ in configs.leaves()}
    for argument, following in itertools.pairwise([*argv[1:], "--"]):
        if argument == "--":
            return
        name = argument.lstrip("-")
        if not argument.startswith("-") or "=" in argument or not following.startswith("--"):
            continue
        if name in settings:
            takes_value = not settings[name]
        else:
            takes_value = name in flags.FLAGS and not flags.FLAGS[name].boolean
        if takes_value:
            raise UserError(f"{argument}: needs a value: {argument}=…")


def _unknown_flag(name: str) -> str:
    """Returns the message for a flag that does not exist, with what may be meant."""
    own = [flag for flag in flags.FLAGS if not flag.startswith("config.")]
    hint = ""
    # What is no more than misspelled is a flag, what others call a setting is a setting.
    if not difflib.get_close_matches(name, own, n=1, cutoff=0.8) and "config" in flags.FLAGS:
        hint = configs.did_you_mean(name, "--config.")
    hint = hint or nearest(name, own, "--")
    return f"--{name}: no such flag.{hint} See --help"


def _wrong_value(message: str) -> str:
    """Returns what absl says of a value that has the wrong type, in the words of `configs`."""
    if not (found := _WRONG_SETTING.fullmatch(message)):
        return _ABSL_PREFIX.sub("", message)
    path, value = found.groups()
    kinds = {known: kind for known, kind, _ in configs.leaves()}
    said = f"config.{path} = {value!r}: must be of type {configs.type_name(kinds[path])}"
    number = _WITH_UNIT.fullmatch(value)
    return f"{said}, without a unit: --config.{path}={number[1]}" if number else said


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
        ]
        _, files = _take(sys.argv, "config")
        config = experiments.load(files[-1], "--config=") if files else Config()
        lines += [
            f"Settings, as {files[-1]} sets them:" if files else "Settings and their defaults:",
            "",
            reference.help_text(config, is_default=not files),
        ]
    return "\n".join(lines)
