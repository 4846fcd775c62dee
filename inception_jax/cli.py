"""The command line shared by main and all tools.

Flags are absl's, as ml_collections' `config_flags` (the `--config.a.b=value` overrides) requires.
absl itself exits with 1 for --help and for a wrong flag, and config_flags raises a bare KeyError
for an unknown setting; here --help exits with 0, and a usage error with 2 and one message.
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
import textwrap
import traceback
import typing
import warnings
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
from inception_jax.storage import access, buckets, paths
from inception_jax.storage.workdir import CONFIG

# The exit code that a shell reports for a program killed by SIGPIPE.
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
# absl's messages for a setting's value that it cannot convert, and a number with a unit.
_ABSL_PREFIX = re.compile(r"flags? .*?: (?=give |--)|flag (?=--)", re.DOTALL)
_WRONG_SETTING = re.compile(r"flag --config\.([^=]+)=(.*?): .*", re.DOTALL)
_WITH_UNIT = re.compile(r"([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*([a-zA-Z%]+)")
# The command line that config_flags sees. It also looks for --config in it when the flag is
# defined, before any command line is parsed.
_config_argv = ["", "--config="]
# The entries of mappings that the command line sets, which config_flags does not know, and the
# mappings' previous values.
_entries_set: set[str] = set()
_mappings_before: dict[str, Any] = {}
_HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull", "-?"}


def define_config() -> flags.FlagHolder[Config]:
    """Defines --config=FILE with its overrides --config.a.b=value."""
    holder = config_flags.DEFINE_config_dataclass(
        "config",
        Config(),
        "experiment file (Python, with a get_config() that returns a Config), or the config.json "
        "of a run. Experiment files are executed: use only ones you trust",
        parse_fn=functools.partial(experiments.load, prefix="--config=", log=console.log_once),
        sys_argv=_config_argv,
    )
    # Without --config, it has no value.
    flags.FLAGS.set_default("config", None)
    return holder


class _PathParser(flags.ArgumentParser[paths.Path | None]):
    """Parses the path of a file or folder, local or in a bucket; '' means none.

    Args:
      name: of the flag, for messages.
    """

    syntactic_help = "a local path or gs://BUCKET/PATH"

    def __init__(self, name: str) -> None:
        self._name = name

    def parse(self, argument: str) -> paths.Path | None:
        return paths.user_path(argument, f"--{self._name}={argument}") if argument else None


def define_path(
    name: str, meaning: str, *, required: bool = False
) -> flags.FlagHolder[paths.Path | None]:
    """Defines a flag for a file or folder, whose value is None if it is not given."""
    return flags.DEFINE(_PathParser(name), name, None, meaning, required=required)


def given(flag: flags.FlagHolder[paths.Path | None]) -> paths.Path:
    """Returns the path of a flag that earlier checks guarantee is given."""
    assert flag.value is not None, f"--{flag.name} is required here"
    return flag.value


@functools.cache
def _register_parts(path: paths.Path) -> None:
    """Runs the file that --parts names, once."""
    experiments.register_parts(path, "--parts=")


class TrainedFlags(NamedTuple):
    """The flags that select trained weights."""

    workdir: flags.FlagHolder[paths.Path | None]
    weights: flags.FlagHolder[paths.Path | None]
    checkpoint: flags.FlagHolder[str]
    parts: flags.FlagHolder[paths.Path | None]

    def values(self) -> dict[str, Any]:
        """Runs the file that registers the network, if any, and returns arguments of `load`."""
        if self.parts.value is not None:
            _register_parts(self.parts.value)
        return {flag.name: flag.value for flag in (self.workdir, self.weights, self.checkpoint)}


def define_trained(*, or_config: bool = False) -> TrainedFlags:
    """Defines --workdir, --weights, --checkpoint and --parts; one of the first two is required.

    Args:
      or_config: whether --config may be given instead.
    """
    defined = TrainedFlags(
        define_path("workdir", "run whose checkpoint to use"),
        define_path("weights", "weights file to use instead of --workdir"),
        flags.DEFINE_string("checkpoint", "best", "with --workdir: best, last or a step number"),
        define_path(
            "parts",
            "the Python file that registers a custom network, for --weights, or if the file that "
            "--workdir recorded is gone. It is executed: use only files you trust",
        ),
    )
    if or_config:
        message = "give one of --config=FILE, --workdir=DIR or --weights=FILE"
        require_one("config", "workdir", "weights", message=message)
    else:
        message = "give either --workdir=DIR or --weights=FILE"
        require_one("workdir", "weights", message=message)
    require_with("checkpoint", "workdir")
    flags.register_multi_flags_validator(
        ["parts", "workdir", "weights"],
        lambda given: bool(not given["parts"] or given["workdir"] or given["weights"]),
        "--parts: requires --workdir or --weights",
    )
    return defined


def define_inference_dtype() -> flags.FlagHolder[str]:
    """Defines the flag for the dtype that a network computes in when it is used."""
    return flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "type that the network computes in; auto = float32 on a CPU, whose programs are cached, "
        "elsewhere that of the training",
    )


def define_platform() -> flags.FlagHolder[str]:
    """Defines the flag for the kind of device to compute on."""
    return flags.DEFINE_string("platform", "", "cpu, gpu or tpu; empty = the best available")


def define_processes() -> Callable[[], dict[str, Any]]:
    """Defines the flags for the devices to use and the other processes of the run.

    Returns:
      A function that returns their values, arguments of `runtime.devices.initialize`.
    """
    holders = (
        define_platform(),
        flags.DEFINE_bool(
            "distributed", False, "run on several hosts of a TPU slice, SLURM or Open MPI job"
        ),
        flags.DEFINE_string(
            "cluster", "", "with --distributed: JAX's cluster detection method; empty = automatic"
        ),
        flags.DEFINE_string(
            "coordinator_address",
            "",
            "on several hosts without a scheduler: host:port of process 0",
        ),
        flags.DEFINE_integer("process_count", 0, "with --coordinator_address: number of processes"),
        flags.DEFINE_integer(
            "process_index", -1, "with --coordinator_address: index of this process"
        ),
    )
    require_with("cluster", "distributed")
    require_with("process_count", "coordinator_address")
    require_with("process_index", "coordinator_address")
    return lambda: {holder.name: holder.value for holder in holders}


def command() -> dict[str, Any]:
    """Returns the values of the command's own flags, without its settings, by '--name'."""
    defined = flags.FLAGS.flags_by_module_dict().get(sys.argv[0], [])
    return {
        f"--{flag.name}": str(flag.value) if isinstance(flag.value, os.PathLike) else flag.value
        for flag in defined
        if flag.name != "config"
    }


def require(*names: str) -> None:
    """Makes flags required."""
    for name in names:
        flags.register_validator(name, bool, f"give --{name}=VALUE")


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


def require_with(name: str, other: str, value: str = "") -> None:
    """Refuses a flag that would be ignored: it needs another one, or a value of another one."""
    needed = f"--{other}={value}" if value else f"--{other}"

    def check(given: dict[str, Any]) -> bool:
        used = given[other] == value if value else given[other]
        if given[name] != flags.FLAGS[name].default and not used:
            flag = f"--{name}" if given[name] is True else f"--{name}={given[name]}"
            raise flags.ValidationError(f"{flag}: requires {needed}")
        return True

    flags.register_multi_flags_validator([name, other], check)


def overrides() -> set[str]:
    """Returns the paths of the settings, and of entries of mappings, that the command line sets."""
    if flags.FLAGS.config is None:
        return set()
    return _entries_set | config_flags.get_override_values(flags.FLAGS["config"]).keys()


def experiment() -> dict[str, Any]:
    """Returns the experiment that --config names, with its own values of overridden settings.

    If --config names a run's config.json, it is that run's experiment.

    Returns:
      Values for JSON: "file", as given; and "own", the experiment's value of each setting that the
      command line changed, by dotted path.
    """
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    own: dict[str, Any] = {}
    if file.endswith(".json"):
        record = configs.read_record(paths.user_path(file, f"--config={file}"))
        recorded = record.experiment or {"file": file, "own": {}}
        file, own = recorded["file"], recorded["own"]
    # config_flags defines a flag for each override; its default is the experiment's value.
    before = _mappings_before | {
        path: flags.FLAGS[f"config.{path}"].default
        for path in config_flags.get_override_values(flags.FLAGS["config"])
    }
    own = {path: configs.plain(value) for path, value in (before | own).items()}
    now = {path: configs.plain(configs.get(flags.FLAGS.config, path)) for path in own}
    return {"file": file, "own": {path: own[path] for path in own if own[path] != now[path]}}


def refuse_positional(positional: Sequence[str]) -> None:
    """Checks that the command line has no positional arguments.

    Raises:
      UserError: naming them.
    """
    if positional:
        raise UserError(f"{' '.join(positional)!r}: not a flag; flags start with --. See --help")


def positional_paths(positional: Sequence[str]) -> list[paths.Path]:
    """Returns the files or folders that positional arguments name.

    Raises:
      UserError: if one of them is another URL, or the home folder of an unknown user.
    """
    return [paths.user_path(argument, argument) for argument in positional]


def run(main: Callable[[Sequence[str]], None], usage: str, *, settings_of: str = "") -> NoReturn:
    """Parses the command line, calls `main`, and exits.

    Args:
      main: takes the positional arguments.
      usage: the purpose and syntax of the command, for --help.
      settings_of: the flag that names a run's folder, whose settings are used if --config is not
        given; '' = none.
    """
    # Imports and tracing create millions of long-lived objects. Scanning them for garbage as often
    # as Python does by default takes a sixth of the start.
    gc.set_threshold(100_000)
    console.prepare_streams()
    buckets.log_outages(console.log)
    # The libraries log much that does not help users, and errors that they also raise.
    logging.set_verbosity(logging.FATAL)
    # runtime/tpu_vm.py reports the same among others.
    warnings.filterwarnings("ignore", "Transparent hugepages are not enabled")
    sys.unraisablehook = _show_unraisable
    python_logging.getLogger("asyncio").addFilter(_is_wanted)
    # For example, that it has no writable cache folder.
    python_logging.getLogger("matplotlib").setLevel(python_logging.ERROR)
    # Commands started from a notebook inherit its backend; if that is not installed, importing
    # matplotlib fails.
    os.environ["MPLBACKEND"] = "agg"
    try:
        if _HELP & set(sys.argv[1:]):
            print(_help(usage))
        elif len(sys.argv) == 1 and settings_of and _starts_runs():
            raise UserError(
                f"no flags given; use --config=FILE --{settings_of}=DIR to start a run, or "
                f"--{settings_of}=DIR to resume it. See --help"
            )
        else:
            with compilation_cache.log_cache_errors(console.log):
                main(_parse(sys.argv, settings_of))
        # A closed pipe raises here rather than while Python shuts down.
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except Preempted as end:
        console.log(str(end))
        sys.exit(EXIT_PREEMPTED)
    except BrokenPipeError:
        _end_with_reader()
    except KeyboardInterrupt:
        _fail(f"interrupted; {_again()}", 130)
    except OSError as error:
        # A failed read or write whose own text explains enough.
        if error.filename is None:
            _fail_unexpectedly(error)
        _fail(f"{error.filename}: {error.strerror}. Fix this, and {_again()}", 2)
    except Exception as error:
        _fail_unexpectedly(error)
    sys.exit(0)


def _show_unraisable(failure: "sys.UnraisableHookArgs") -> None:
    """Reports an error that cannot be raised, unless it only follows another that was.

    After a failed read or write, TensorStore may finish other requests once Orbax has closed its
    event loop, up to the end of the command.
    """
    if "Event loop is closed" not in str(failure.exc_value):
        sys.__unraisablehook__(failure)


def _is_wanted(record: python_logging.LogRecord) -> bool:
    """Drops asyncio's reports about tasks that failed after another one.

    Orbax reads each array in a task and raises the first failure. asyncio reports the others when
    they are deleted, which may be after the error message.
    """
    return "exception was never retrieved" not in record.getMessage()


def _end_with_reader() -> NoReturn:
    """Exits silently, as SIGPIPE would, when the reader of the output (head, …) has closed it."""
    # Python flushes its streams at exit, which would fail and print an error.
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    hosts.fail("the reader of its output has closed it", EXIT_BROKEN_PIPE)
    sys.exit(EXIT_BROKEN_PIPE)


def _fail_unexpectedly(error: Exception) -> NoReturn:
    """Exits after an unexpected error, or after another process's failure, which is named."""
    if message := hosts.peer_failure(error):
        console.log(f"error: {message}")
        hosts.fail("", 1)
    traceback.print_exception(error)
    _fail(_unexpected(error), 1)


def _unexpected(error: Exception) -> str:
    """Returns the message for an exception that no module explains."""
    given = _parsed_flags()
    config = given.get("config")
    settings: dict[str, Any] = {}
    if config is not None:
        settings = {path: configs.get(config, path) for path, _, _ in configs.leaves()}
    command = "evaluate" if given.get("mode") == "eval" else pathlib.Path(sys.argv[0]).stem
    if message := advice.explain(error, (phase_of(error), command), settings):
        return message
    return (
        f"{advice.first_line(error)}. Unexpected error; see the traceback above. "
        f"{_again().capitalize()}; if it fails again, please report this output as a bug"
    )


def _again() -> str:
    """Returns the advice to repeat the command."""
    given = _parsed_flags()
    # Only the command that trains has the first flag.
    trains = given.get("mode", "eval") != "eval" and not given.get("print_config")
    note = " (training resumes from its last checkpoint, if there is one)" if trains else ""
    return f"rerun the same command{note}"


def _parsed_flags() -> dict[str, Any]:
    return flags.FLAGS.flag_values_dict() if flags.FLAGS.is_parsed() else {}


def _fail(message: str, code: int) -> NoReturn:
    console.log(f"error: {message}")
    hosts.fail(message, code)
    sys.exit(code)


def _parse(argv: Sequence[str], settings_of: str) -> Sequence[str]:
    """Parses flags and returns the positional arguments.

    Raises:
      UserError: for every usage error.
    """
    argv = _with_config(argv, settings_of)
    _check_values_given(argv)
    for argument in argv[1:]:
        if match := _OVERRIDE.match(argument):
            value = argument.partition("=")[2]
            configs.check_path(match[1], prefix="--config.", value=value)
    argv, entries = _without_entries(with_tuples(argv))
    _config_argv[:] = argv
    try:
        rest = flags.FLAGS(argv)[1:]
        _put_entries(entries)
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error.flagname, argv)) from error
    except flags.Error as error:
        raise UserError(f"{_wrong_value(str(error).strip()).rstrip('.')}. See --help") from error
    if config := flags.FLAGS["config"].value if "config" in flags.FLAGS else None:
        buckets.set_retry_seconds(config.bucket.retry_seconds)
    return rest


def with_tuples(argv: Sequence[str]) -> list[str]:
    """Returns the command line with lists such as top1,top5 in the form that config_flags reads.

    >>> with_tuples(["--config.evaluation.metrics", "top1,top5", "--config.name=a,b"])
    ["--config.evaluation.metrics=('top1', 'top5')", '--config.name=a,b']
    >>> with_tuples(["--config.train.image_sizes="])
    ['--config.train.image_sizes=()']
    """
    kinds = {path: kind for path, kind, _ in configs.leaves()}
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, given, value = argument.partition("=")
        match = _OVERRIDE.match(argument)
        kind = kinds.get(match[1]) if match else None
        if typing.get_origin(kind) is tuple:
            value = value if given else next(arguments, "")
            if not value.strip():
                value = "()"
            elif kind == tuple[str, ...] and value.lstrip()[:1] not in ("(", "[", "'", '"'):
                value = repr(tuple(filter(None, (each.strip() for each in value.split(",")))))
            argument = f"{flag}={value}"
        rest.append(argument)
    return rest


def _without_entries(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the command line without entries of mappings, and the entries' values by path.

    An empty value of a mapping itself removes its entries.
    """
    rest: list[str] = []
    entries: dict[str, str] = {}
    for argument in argv:
        match = _OVERRIDE.match(argument)
        if match and configs.is_mapping(match[1]):
            if argument.partition("=")[1:] != ("=", ""):
                raise UserError(
                    f"{argument}: is a mapping; set its entries with "
                    f"--config.{match[1]}.NAME=VALUE, or remove all with --config.{match[1]}="
                )
            before = [path for path in entries if path.startswith(f"{match[1]}.")]
            for path in before:
                del entries[path]
            entries[match[1]] = ""
            continue
        mapping, entry = configs.mapping_of(match[1]) if match else ("", "")
        if not match or not entry:
            rest.append(argument)
            continue
        _, given, value = argument.partition("=")
        if not given and configs.entry_type(match[1]) is bool:
            value = str(not argument.lstrip("-").startswith("no"))
        elif not given:
            raise UserError(f"{argument}: needs a value: {argument}=VALUE")
        entries[f"{mapping}.{entry}"] = value
    return rest, entries


def _starts_runs() -> bool:
    """Whether this is the command that trains."""
    return "mode" in flags.FLAGS


def _put_entries(entries: Mapping[str, str]) -> None:
    """Sets entries of mappings in the parsed configuration."""
    if entries and "config" not in flags.FLAGS:
        raise UserError(
            f"--config.{min(entries)}: settings come with the run or the weights; remove this flag"
        )
    _mappings_before.clear()
    _entries_set.clear()
    _entries_set.update(entries)
    for path, text in entries.items():
        mapping = configs.mapping_of(path)[0] or path
        _mappings_before.setdefault(
            mapping, copy.deepcopy(configs.get(flags.FLAGS.config, mapping))
        )
        if mapping == path:
            configs.put(flags.FLAGS.config, path, {})
            continue
        kind, value = configs.entry_type(path), text
        if kind is not str:
            # A word needs no quotes.
            with contextlib.suppress(ValueError, SyntaxError, TypeError):
                value = ast.literal_eval(text.capitalize() if kind is bool else text)
        configs.put(flags.FLAGS.config, path, value)


def _with_config(argv: Sequence[str], settings_of: str) -> list[str]:
    """Returns the command line with --config as its first flag, where config_flags expects it.

    If it is not given and the command uses the settings of a run's folder instead, it is that
    folder's config.json.

    Args:
      argv: the command line.
      settings_of: the flag that names the folder; '' = none.
    """
    rest, files = _take(argv, "config")
    if len(files) > 1:
        raise UserError(f"--config: given {len(files)} times ({', '.join(files)}); give it once")
    overridden = [argument for argument in rest[1:] if _OVERRIDE.match(argument)]
    if not files and settings_of and (folders := _take(argv, settings_of)[1]):
        folder = paths.user_path(folders[-1], f"--{settings_of}={folders[-1]}")
        record = folder / CONFIG
        with access.naming_flag(settings_of, folder):
            is_run = access.is_file(record)
        if not is_run:
            remedy = (
                ". Start one with --config=FILE, for example --config=experiments/tiny.py"
                if _starts_runs()
                else ""
            )
            raise UserError(
                f"--{settings_of}={folders[-1]}: not a run (it has no config.json){remedy}"
            )
        files = [str(record)]
        # Before the record, which names the parts.
        for given_file in _take(argv, "parts")[1] if "parts" in flags.FLAGS else ():
            _register_parts(paths.user_path(given_file, f"--parts={given_file}"))
    if not files and overridden and "config" in flags.FLAGS:
        if not settings_of and (_take(argv, "workdir")[1] or _take(argv, "weights")[1]):
            raise UserError(
                f"{overridden[0]}: settings come with the trained weights; remove this flag"
            )
        raise UserError(f"{overridden[0]}: overrides a setting of an experiment; add --config=FILE")
    return [*rest[:1], *(f"--config={file}" for file in files), *rest[1:]]


def _take(argv: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Returns the command line without a flag, and the flag's values."""
    rest: list[str] = []
    values: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            rest += [argument, *arguments]
        elif match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL):
            value = next(arguments, None) if match[1] is None else match[1]
            if not value or value.startswith("--"):
                raise UserError(f"--{name}: needs a value: --{name}=VALUE")
            values.append(value)
        else:
            rest.append(argument)
    return rest, values


def _check_values_given(argv: Sequence[str]) -> None:
    """Checks that no flag lacks its value; absl would use the next flag as the value."""
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
            raise UserError(f"{argument}: needs a value: {argument}=VALUE")


def _unknown_flag(name: str, argv: Sequence[str]) -> str:
    """Returns the message for a flag that does not exist, with a suggestion."""
    own = [flag for flag in flags.FLAGS if not flag.startswith("config.")]
    hint = ""
    # A misspelled flag takes precedence over another trainer's name for a setting.
    if not difflib.get_close_matches(name, own, n=1, cutoff=0.8) and "config" in flags.FLAGS:
        given = (argument.lstrip("-").partition("=") for argument in argv)
        value = next((value for flag, _, value in given if flag == name), "")
        hint = configs.did_you_mean(name, "--config.", value)
    hint = hint or nearest(name, own, "--")
    return f"--{name}: no such flag.{hint} See --help"


def _wrong_value(message: str) -> str:
    """Returns absl's message about a value of the wrong type in the style of `configs`."""
    if not (found := _WRONG_SETTING.fullmatch(message)):
        return _ABSL_PREFIX.sub("", message)
    path, value = found.groups()
    kinds = {known: kind for known, kind, _ in configs.leaves()}
    problem = f"config.{path} = {value!r}: must be of type {configs.type_name(kinds[path])}"
    number = _WITH_UNIT.fullmatch(value)
    return f"{problem}, without a unit: --config.{path}={number[1]}" if number else problem


def _help(usage: str) -> str:
    """Returns the text of --help; with --config=FILE, it shows that file's settings."""
    by_module = flags.FLAGS.flags_by_module_dict()
    defined = [*by_module.get(sys.argv[0], []), *by_module.get(__name__, [])]
    lines = [usage.strip(), "", "Flags:"]
    for flag in sorted(defined, key=lambda flag: flag.name):
        if flag.name != "config":
            value = ("true" if flag.default else None) if flag.boolean else flag.default
            default = "" if value in (None, "") else f"={value}"
            lines += [f"  --{flag.name}{default}", _paragraph(flag.help)]
    if "config" in flags.FLAGS:
        lines += ["  --config=FILE", _paragraph(flags.FLAGS["config"].help)]
        _, files = _take(sys.argv, "config")
        config = experiments.load(files[-1], "--config=") if files else Config()
        lines += [
            "",
            f"Settings of {files[-1]}:" if files else "Settings and their defaults:",
            "",
            reference.help_text(config, is_default=not files),
        ]
    return "\n".join(lines)


def _paragraph(text: str | None) -> str:
    return textwrap.fill(text or "", 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
