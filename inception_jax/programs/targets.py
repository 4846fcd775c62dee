"""The devices that programs can be compiled for without having them, and their data sheets.

TPUs are named as they are rented; GPUs by their model, with the number of them after an x. A GPU
that is not here is described by a file, XLA's GpuTargetConfigProto as text, which a process that
has the GPU can write (docs/compile.md).
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from inception_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from jax.sharding import Mesh

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX counts them: a chip, or one half of a TPU7x.

    Attributes:
      name: its model.
      platform: "tpu" or "cuda".
      memory: bytes of its memory.
      bandwidth: bytes per second between it and its memory.
      peak: dense bfloat16 operations per second, two for each multiply-add; None: unknown.
      link: bytes per second that it can send to other devices; None: unknown.
      cycles: per second, of the compiler's estimates; None: the compiler makes none.
      usable: the fraction of the memory that JAX uses.
      source: where these figures were read, and when.
    """

    name: str
    platform: str
    memory: int
    bandwidth: float
    peak: float | None = None
    link: float | None = None
    cycles: float | None = None
    usable: float = 1.0
    source: str = ""


def _tpu(
    name: str,
    *,
    memory: float,
    bandwidth: float,
    peak: float,
    link: float,
    per_cycle: int,
    page: str,
) -> Chip:
    """Returns a TPU, described in GiB, GB/s, TFLOP/s and GB/s.

    `per_cycle` is the peak in operations a cycle. It is not published, but two products of 8,192²
    and 16,384² elements are estimated by libtpu 0.0.50.1 at 70 to 94% of these powers of two, and
    at more than half of them, so that the clock follows from the published peak.
    """
    return Chip(
        name,
        "tpu",
        memory=int(memory * GIB),
        bandwidth=bandwidth * 1e9,
        peak=peak * 1e12,
        link=link * 1e9,
        cycles=peak * 1e12 / per_cycle,
        source=f"docs.cloud.google.com/tpu/docs/{page}, read November 26, 2026",
    )


# The bandwidth of links is published for both directions together.
V4 = _tpu("TPU v4", memory=32, bandwidth=1200, peak=275, link=300, per_cycle=2**18, page="v4")
V5E = _tpu("TPU v5e", memory=16, bandwidth=819, peak=197, link=200, per_cycle=2**17, page="v5e")
V5P = _tpu("TPU v5p", memory=95, bandwidth=2765, peak=459, link=600, per_cycle=2**18, page="v5p")
V6E = _tpu("TPU v6e", memory=32, bandwidth=1638, peak=918, link=400, per_cycle=2**19, page="v6e")
# JAX has two devices for each chip, which has 2,307 TFLOP/s, 192 GiB, 7,380 GB/s and 1,200 GB/s.
TPU7X = _tpu(
    "TPU7x (half a chip)",
    memory=96,
    bandwidth=3690,
    peak=1153.5,
    link=300,
    per_cycle=2**19,
    page="tpu7x",
)

# Without XLA_PYTHON_CLIENT_MEM_FRACTION, JAX uses this much of a GPU's memory.
_GPU_FRACTION = 0.75
H100 = Chip(
    "NVIDIA H100 SXM",
    "cuda",
    memory=84_929_347_584,
    bandwidth=3.35e12,
    peak=989.4e12,
    link=450e9,
    usable=_GPU_FRACTION,
    source="glennklockwood.com/garden/processors/h100, read November 26, 2026",
)
H200 = Chip(
    "NVIDIA H200 SXM",
    "cuda",
    memory=141_000_000_000,
    bandwidth=4.8e12,
    peak=989e12,
    link=450e9,
    usable=_GPU_FRACTION,
    source="itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html, read November 26, 2026",
)
# By the names that CUDA reports.
_GPUS = {"NVIDIA H100 80GB HBM3": H100, "NVIDIA H200": H200}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: as users give it.
      chip: each of the devices.
      devices: number of devices.
      topology: the name of their arrangement for the compiler's plugin.
      options: further arguments of `jax.experimental.topologies.get_topology_desc`.
    """

    name: str
    chip: Chip
    devices: int
    topology: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _tpus() -> Iterator[Target]:
    # v4, v5p and tpu7x are counted in cores. JAX uses the two cores of a v4 or v5p as one device.
    yield Target("v4-8", V4, 4, "v4:2x2x1", {"chip_config_name": "megacore"})
    yield _flat("v5e-1", V5E, (1, 1), host=(1, 1))
    yield _flat("v5e-4", V5E, (2, 2), host=(2, 2))
    yield _flat("v5e-8", V5E, (2, 4), host=(2, 4))
    yield _flat("v5e-16", V5E, (4, 4), host=(2, 2))
    yield Target("v5p-8", V5P, 4, "v5p:2x2x1")
    yield _flat("v6e-1", V6E, (1, 1), host=(1, 1))
    yield _flat("v6e-4", V6E, (2, 2), host=(2, 2))
    yield _flat("v6e-8", V6E, (2, 4), host=(2, 4))
    yield Target("tpu7x-8", TPU7X, 8, "tpu7x:2x2x1")


def _flat(name: str, chip: Chip, shape: tuple[int, int], *, host: tuple[int, int]) -> Target:
    """Returns the target for chips in a plane, those of each host in a part of it."""
    topology = f"{name.partition('-')[0]}:{shape[0]}x{shape[1]}"
    # Without bounds, the compiler assumes four chips a host.
    options = {"chips_per_host_bounds": (*host, 1)}
    return Target(name, chip, shape[0] * shape[1], topology, options)


def _gpus() -> Iterator[Target]:
    for model, (name, chip), bandwidth in zip(
        ("h100", "h200"), _GPUS.items(), (3_352_320_000_000, 4_800_000_000_000), strict=True
    ):
        config = _HOPPER.format(name=name, memory=chip.memory, bandwidth=bandwidth)
        for count in (1, 8):
            yield _gpu(model if count == 1 else f"{model}x{count}", chip, count, config)


def _gpu(name: str, chip: Chip, count: int, config: str) -> Target:
    """Returns the target for GPUs in one host."""
    return Target(name, chip, count, f"1x1x{count}", {"target_config": config})


# What CUDA reports about a GPU of this generation.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""

TARGETS = {target.name: target for target in (*_tpus(), *_gpus())}
# Other names of the same, from machine types and Google's API.
_OTHER_NAMES = {
    "ct5lp-hightpu-1t": "v5e-1",
    "ct5lp-hightpu-4t": "v5e-4",
    "ct5lp-hightpu-8t": "v5e-8",
    "ct6e-standard-1t": "v6e-1",
    "ct6e-standard-4t": "v6e-4",
    "ct6e-standard-8t": "v6e-8",
    "ct5p-hightpu-4t": "v5p-8",
    "tpu7x-standard-4t": "tpu7x-8",
}


def get(name: str) -> Target:
    """Returns the target of a name.

    >>> get("v5litepod-8").topology
    'v5e:2x4'

    Raises:
      UserError: if there is none, with the nearest one.
    """
    known = name.lower().replace("v5litepod", "v5e")
    known = _OTHER_NAMES.get(known, known)
    if known not in TARGETS:
        raise UserError(
            f"target = {name!r}: no such target.{nearest(known, TARGETS)} The targets are "
            f"{', '.join(TARGETS)}; describe another GPU with a target config file"
        )
    return TARGETS[known]


def from_target_config(text: str, devices: int, source: str) -> Target:
    """Returns the target for GPUs that a GpuTargetConfigProto describes.

    It has no peak and no bandwidth of links; those of models with a name here are added.

    Args:
      text: the description.
      devices: number of GPUs, in one host.
      source: where it comes from, for messages.

    Raises:
      UserError: if it does not describe a GPU.
    """
    values = dict(re.findall(r"(\w+): *\"?([^\"\n}]*[^\"\s}])", text))
    try:
        name = values.get("device_description_str", "GPU")
        memory, bandwidth = int(values["device_memory_size"]), float(values["memory_bandwidth"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{source}: is not the description of a GPU ({error}); it must be a "
            "GpuTargetConfigProto as text, with device_memory_size and memory_bandwidth"
        ) from error
    known = _GPUS.get(name, Chip(name, "cuda", memory, bandwidth, usable=_GPU_FRACTION))
    chip = dataclasses.replace(known, name=name, memory=memory, bandwidth=bandwidth, source=source)
    return _gpu(name, chip, devices, text)


def make_mesh(target: Target) -> "Mesh":
    """Returns the mesh of a target's devices, which can be compiled for, but not computed with.

    Raises:
      UserError: if the compiler is not installed, or does not accept the description of a GPU.
    """
    tpu = target.chip.platform == "tpu"
    plugins = ("libtpu",) if tpu else ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(map(importlib.util.find_spec, plugins)):
        extra, what = ("tpu", "libtpu") if tpu else ("cuda", "JAX's CUDA plugin")
        raise UserError(
            f"target = {target.name!r}: its compiler, {what}, is not installed; install it with "
            f"pip install -e '.[{extra}]' -c .venv/pins.txt. No device is needed"
        )
    import jax
    from jax.experimental import topologies

    from inception_jax.runtime import sharding

    # This process's own devices come first: what follows must not concern them.
    own = jax.default_backend()
    with _offline() if tpu and own != "tpu" else contextlib.nullcontext():
        try:
            topology = topologies.get_topology_desc(
                platform=target.chip.platform, topology_name=target.topology, **_options(target)
            )
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"target = {target.name!r}: the compiler does not accept it ({error}); a target "
                "config file must be a GpuTargetConfigProto as text, as XLA writes it"
            ) from error
    return sharding.make_mesh(topology.devices)


def _options(target: Target) -> dict[str, Any]:
    if target.chip.platform == "tpu":
        return target.options
    # The plugin for GPUs takes the arrangement as an argument, and any name.
    return target.options | {"topology": target.topology}


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keeps libtpu from asking where it runs, which takes minutes outside Google's cloud."""
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # It takes a lock for the TPUs of the machine, which another process may be using.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
