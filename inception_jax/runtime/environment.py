"""The software and hardware of a run, and a table of a model's parameters.

Results can only be compared and reproduced together with the versions and devices they came from.
"""

import datetime
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
from clu import parameter_overview

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array-record",
    "tensorflow-datasets",
    "clu",
    "ml-collections",
    "numpy",
    "pillow",
    "safetensors",
)

# Prefixes of environment variables that change what is computed, and of those among them that
# differ between processes.
_COMPILER_VARIABLES = ("JAX_", "XLA_", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_PER_PROCESS_VARIABLES = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_COORDINATOR",
    "JAX_LOCAL_DEVICE_IDS",
    "JAX_PARTITION_INDEX",
    "JAX_PROCESS",
    "XLA_PYTHON_CLIENT",
)


def parameter_table(params: Mapping[str, Any]) -> str:
    """Returns a table of each parameter's name, shape, dtype and size, with the total.

    Args:
      params: nested mapping of arrays, or of anything with a shape and a dtype.
    """
    return parameter_overview.get_parameter_overview(dict(params), include_stats=False)


def environment() -> dict[str, Any]:
    """Returns the software and hardware of this process, for config.json and result.json.

    Returns:
      JSON values: date (UTC), python, packages (version by name), platform, cpu, cpu_count,
      backend, device, device_count, process_count, and revision: the commit of the source, with
      "+changes" if files were modified, or None outside a git checkout.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }


def software() -> dict[str, Any]:
    """Returns everything that determines the compiled program, to compare the processes of a run.

    Returns:
      JSON values by name: the versions of Python and of each package; the commit of the source; a
      SHA-256 over its files, which also detects modified files; and the environment variables that
      JAX and its compilers read, except those that differ between processes.
    """
    versions = {f"{name} version": _version(name) for name in _PACKAGES}
    variables = {
        f"${name}": value
        for name, value in sorted(os.environ.items())
        if name.startswith(_COMPILER_VARIABLES) and not name.startswith(_PER_PROCESS_VARIABLES)
    }
    return {
        "python": platform.python_version(),
        **versions,
        "source revision": revision(),
        "source files": source_digest(pathlib.Path(__file__).parents[1]),
        **variables,
    }


def source_digest(package: pathlib.Path) -> str:
    """Returns 16 hex digits of a SHA-256 over the names and contents of a package's .py files."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


@functools.cache
def revision() -> str | None:
    """Returns the commit of the source, as described in `environment`, at the first call.

    The process keeps running the source that it imported, whatever is committed or edited later.
    """
    return _git_revision(pathlib.Path(__file__).parents[2])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """Returns the processor model from /proc/cpuinfo; Python's platform module lacks it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git_revision(folder: pathlib.Path) -> str | None:
    """Returns the commit of a checkout with root `folder`; None if it is not one."""
    # A package in site-packages inside another project's checkout is not part of that commit.
    if not (folder / ".git").exists():
        return None
    # Without optional locks, so that this never interferes with the user's git commands.
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    try:
        commit, status = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+changes" if status else "")
