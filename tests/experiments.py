"""Loads experiments as the command line does."""

import ast
import warnings
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from inception_jax import cli
from inception_jax import config as configs
from inception_jax.config import Config


def load(arguments: Sequence[str]) -> Config:
    """Returns the configuration that a command's arguments make, as the command line does."""
    arguments, entries = cli._without_entries(arguments)
    argv = ["command", *cli.with_tuples(arguments)]
    argv = [each for each in argv if each == "command" or each.startswith("--config")]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    with warnings.catch_warnings():
        # ml_collections loads the file with a deprecated method of importlib.
        warnings.simplefilter("ignore", DeprecationWarning)
        values(argv)
    config: Config = values.config
    for path, text in entries.items():
        value = text if configs.entry_type(path) is str else ast.literal_eval(text)
        configs.put(config, path, value)
    configs.validate(config)
    return config
