"""JAX's processes, devices and caches, set up before anything is computed."""

import contextlib
import ctypes
import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

# No public interface has the key-value store of the processes.
from jax._src import distributed as jax_distributed
from jax.experimental.compilation_cache import compilation_cache as jax_compilation_cache

from inception_jax import advice
from inception_jax.errors import UserError, nearest
from inception_jax.runtime import compilation_cache, hosts

PLATFORMS = ("cpu", "gpu", "tpu")
# How a launcher numbers its processes: variables that hold their count, and the number of each.
_NUMBERED = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))
# What random bits, and so a resumed run, depend on, and what the programs are written for.
_FIXED = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_disable_jit": False,
    "jax_transfer_guard": "allow",
}
# JAX's own watch over the processes acts later than ours, which can say more.
_LATER = 40


def initialize(
    *,
    platform: str = "",
    distributed: bool = False,
    cluster: str = "",
    coordinator_address: str = "",
    process_count: int = 0,
    process_index: int = -1,
    silence: float = 60.0,
    facts: Callable[[], Mapping[str, Any]] = dict,
    log: Callable[[str], None] = print,
) -> Callable[[], None] | None:
    """Chooses the devices and joins the other processes. Call before any other use of JAX.

    Args:
      platform: "cpu", "gpu" or "tpu": use this one or fail; empty: the best there is.
      distributed: join the other processes of a TPU pod slice, a SLURM or an Open MPI job, which
        JAX finds by itself.
      cluster: the only one of JAX's ways of finding them to use, such as "mpi4py"; empty: the first
        that fits.
      coordinator_address: host:port of process 0, where the processes are not found by themselves.
      process_count: how many processes there are, with `coordinator_address`; 0: an MPI launcher's
        variables say it.
      process_index: which of them this one is, with `coordinator_address`; -1: as the count.
      silence: seconds without a sign of life after which another process is taken for dead.
      facts: returns what must be the same in all processes, by what it is, as values for JSON.
      log: takes a line where compiled programs cannot be kept, or others are waited for.

    Returns:
      What tells JAX's preemption service, and so all processes, that this one must end; None where
      there is no such service, as in a process of its own.

    Raises:
      UserError: if the platform is not there, the processes cannot be joined or do not agree.
    """
    if platform and platform not in PLATFORMS:
        raise UserError(
            f"--platform={platform}: must be one of {', '.join(PLATFORMS)}."
            f"{nearest(platform, PLATFORMS)}"
        )
    _fix_settings(log)
    if platform == "cpu":
        jax.config.update("jax_platforms", platform)
    compilation_cache.use(log)
    handler = _sigterm_handler()
    if coordinator_address:
        count, index = _numbered(process_count, process_index)
        if not (count > 0 and 0 <= index < count):
            raise UserError(
                f"--coordinator_address={coordinator_address}: needs --process_count (found "
                f"{process_count}) and --process_index from 0 to it (found {process_index})"
            )
        _join(silence, log, address=coordinator_address, count=count, index=index)
    elif distributed:
        _join(silence, log, cluster=cluster or None)
    tell_all = _sigterm_handler()
    # Before the devices are looked for, which other versions might do in another way.
    hosts.agree("start", facts)
    _check_platform(platform)
    hosts.agree("devices", _devices)
    return None if tell_all == handler else lambda: _call(tell_all)


def _fix_settings(log: Callable[[str], None]) -> None:
    """Sets what the environment, such as JAX_ENABLE_X64, may have set to something else."""
    for name, value in _FIXED.items():
        # None stands for JAX's own default, which is the same.
        if (found := getattr(jax.config, name)) not in (None, value):
            log(f"{name.upper()}={found}: is ignored; this program always runs with {value}")
            jax.config.update(name, value)


@contextlib.contextmanager
def settings_of_a_run(log: Callable[[str], None]) -> Iterator[None]:
    """Gives JAX the settings that a run depends on, and its cache, in the block alone.

    Args:
      log: takes a line where a setting was another, or compiled programs cannot be kept.
    """
    cache = "jax_compilation_cache_dir"
    before = {name: getattr(jax.config, name) for name in (*_FIXED, cache)}
    # The cache explains what JAX warns of, for which it replaces how warnings are shown.
    with warnings.catch_warnings():
        _fix_settings(log)
        if not before[cache]:
            compilation_cache.use(log)
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            if not before[cache]:
                jax_compilation_cache.reset_cache()


def _numbered(count: int, index: int) -> tuple[int, int]:
    """Returns how many processes there are and which this one is, as given or by the launcher."""
    for count_name, index_name in _NUMBERED:
        if count == 0 and index == -1 and {count_name, index_name} <= os.environ.keys():
            return int(os.environ[count_name]), int(os.environ[index_name])
    return count, index


def _join(
    silence: float,
    log: Callable[[str], None],
    *,
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    cluster: str | None = None,
) -> None:
    """Joins the other processes, and watches them from then on; JAX finds what is None."""
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            cluster_detection_method=cluster,
            heartbeat_timeout_seconds=round(silence) + _LATER,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes could not be joined: {error}. Were all of them started? Under a TPU "
            "pod slice, SLURM or Open MPI give --distributed (with Open MPI 5 and mpi4py also "
            "--cluster=mpi4py); elsewhere --coordinator_address, --process_count and "
            "--process_index; for one process none of them"
        ) from error
    state = jax_distributed.global_state
    if state.num_processes > 1:
        ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
        hosts.join(
            hosts.Hosts(
                _Store(state.client),
                process=state.process_id,
                count=state.num_processes,
                host=socket.gethostname(),
                limit=silence,
                log=log,
            )
        )


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
    """Says which host is gone where JAX aborts the process because of that.

    JAX does so as soon as its coordination service, in process 0, is out of reach, with a text that
    names no host; the callback that it offers for it cannot be written in Python, and neither are
    Python's own signal handlers called. Any other abort goes on as it would.
    """
    address = jax_distributed.global_state.coordinator_address or ""
    host, _separator, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        hosts.service_lost()


class _Store:
    """JAX's key-value store, in process 0, as a `hosts.Store`."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def put(self, key: str, text: str) -> None:
        self._client.key_value_set(key, text, allow_overwrite=True)

    def wait(self, key: str, seconds: float) -> str | None:
        try:
            return self._client.blocking_key_value_get(key, round(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def under(self, prefix: str) -> dict[str, str]:
        found = self._client.key_value_dir_get(prefix)
        return {key.rpartition("/")[2]: text for key, text in found}


def _devices() -> dict[str, Any]:
    """Returns which devices this process has, and in what way it is to use them."""
    return {
        "device": jax.local_devices()[0].device_kind,
        "devices a process": jax.local_device_count(),
    }


def _sigterm_handler() -> int:
    """Returns the address of the C function that SIGTERM calls.

    JAX's preemption service learns of a preemption by SIGTERM alone. It puts a handler in C in the
    place of Python's, so whoever takes the signal after that has to hand it on.
    """
    getsig = ctypes.pythonapi.PyOS_getsig
    getsig.argtypes, getsig.restype = [ctypes.c_int], ctypes.c_void_p
    # None stands for the address 0, which is the default handler.
    return getsig(signal.SIGTERM) or 0


def _call(handler: int) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)(signal.SIGTERM)


def _check_platform(platform: str) -> None:
    """Checks that JAX found the devices that were asked for, here or by JAX_PLATFORMS."""
    try:
        found, reason = jax.default_backend(), ""
    # With JAX_PLATFORMS=cuda and no NVIDIA device, JAX fails by an assertion.
    except (RuntimeError, AssertionError) as error:
        if message := advice.in_use(str(error)):
            raise UserError(message) from error
        found, reason = "none", f" ({str(error).splitlines()[0]})" if str(error) else ""
        platform = platform or os.environ.get("JAX_PLATFORMS", "")
    if found not in ("none", platform) and platform and (message := _in_use(platform)):
        raise UserError(message)
    if found == "none" or platform not in ("", found):
        raise UserError(
            f"no device of the platform {platform!r} can be used; found: {found}{reason}. Check "
            "its driver and that its extra is installed (pip install -e '.[cuda]' or '.[tpu]'), "
            "or use --platform=cpu"
        )


def _in_use(platform: str) -> str | None:
    """Returns what to do where JAX passed a platform over because others use its devices."""
    try:
        jax.devices(platform)
    except (RuntimeError, AssertionError) as error:
        return advice.in_use(str(error))
    return None
