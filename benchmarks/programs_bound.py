"""Compares the memory traffic of a compiled training step with what arithmetic needs, by module.

Two lower bounds are counted from the traced network, for the images of one device, in bytes read
from and written to any memory, including the chip's own. Both assume that activations and their
gradients are stored in bfloat16, that BatchNorm uses the statistics of all images, and that nothing
is stored that a later operation can compute from what it reads anyway: concatenations, normalized
values, masks of ReLUs.

`needed`: everything between two sums over the batch is one pass. An output Y of a convolution then
  takes six: it is written while its sums are made, and read by the next layers, all at once. In the
  gradient, Y is read, for BatchNorm's two sums and as the input of the next layers' kernel
  gradients, while its own gradient G is written; and Y and G are read for the gradients to the
  layer's kernel and input.
`by operation`: each convolution, pool, and gradient is an operation of its own, which includes
  BatchNorm and ReLU. A convolution reads X and writes Y; its kernel gradient reads X, Y, and G; its
  input gradient reads Y and G, and X for the sums of its BatchNorm, and writes a gradient of the
  size of X, which later readers of the same X also read, to add to it. Pools are counted likewise.
  Bytes belong to the module of the layer that reads or writes them.

State is read and written once, and so is the gradient of the parameters, in float32; kernels are
read in bfloat16, forward and for the input gradient. Not counted: the classifier, augmentation,
metrics, and sums between devices.

How much must pass the device's memory depends on what fits on the chip (`--on-chip`). At the end of
the forward pass all outputs Y are needed later, so what does not fit is written there and read
back. State and batch come from there, and the state returns. This is a lower bound, too.

  python -m benchmarks.programs_bound --config experiments/tiny.py --program FILE

FILE is a record of `python -m inception_jax.tools.compile --json`. Takes half a minute.
"""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from benchmarks import measure
from inception_jax.console import markdown_table
from inception_jax.programs import audit

_STORED = 2  # Bytes of an activation.
_BOUNDS = ("flops", "needed", "by_operation")
_COMPILED = ("accessed", "padding", "bytes", "cycles", "seconds")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or pool of the network, on one device.

    Attributes:
      path: its module's path in the network.
      operation: "convolution" or "pool".
      flops: of the forward pass and both gradients.
      output: elements of its output.
      kernel: elements of its kernel; 0: it has none.
      needed: bytes of the first bound.
      by_operation: bytes of the second bound.
    """

    path: str
    operation: str
    flops: float
    output: int
    kernel: int
    needed: int
    by_operation: int

    @property
    def module(self) -> str:
        """The part of the network that it belongs to, as in the record of the compiled program."""
        return self.path.partition("/")[0]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("--config", default="experiments/tiny.py", help="the experiment")
    parser.add_argument(
        "--program",
        type=measure.local_path,
        default=measure.ROOT / "benchmarks" / "results" / "programs-tiny-v5e-8-512.json",
        metavar="FILE",
        help="the record of its compiled programs",
    )
    parser.add_argument(
        "--on-chip",
        type=float,
        default=128.0,
        metavar="MIB",
        help="memory of the chip itself (default: 128, as of a TPU v5e)",
    )
    return parser.parse_args(argv)


def layers(config_file: str, batch_size: int, image_size: int) -> list[Layer]:
    """Returns the layers of an experiment's network.

    Args:
      config_file: the experiment.
      batch_size: images of a device.
      image_size: side of the images, pixels.

    Raises:
      BenchmarkError: if the network has no BatchNorm.
    """
    import jax
    import jax.numpy as jnp

    import inception_jax as ij
    from inception_jax.models import protocol
    from inception_jax.programs import compile as programs
    from inception_jax.runtime import sharding
    from inception_jax.training import run as runs
    from inception_jax.training import state as states

    config = ij.load_config(config_file)
    mesh = sharding.make_mesh(jax.devices()[:1])
    dataset = programs.abstract_dataset(config)
    run = runs.assemble(config, dataset, None, None, mesh=mesh, log=lambda line: None)
    network = protocol.unwrap(protocol.with_plain_ops(run.model))
    variables = states.abstract_state(run).eval_variables()
    if "batch_stats" not in variables:
        raise measure.BenchmarkError(f"{config_file}: the bounds are for networks with BatchNorm")

    def forward(variables: Any, images: jax.Array, key: jax.Array) -> Any:
        random = {"dropout": key}
        return network.apply(variables, images, train=True, mutable=["batch_stats"], rngs=random)

    images = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.bfloat16)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return of_jaxpr(jax.make_jaxpr(forward)(variables, images, key).jaxpr)


class _Activation:
    """An array with a gradient, and how many layers have read it."""

    readers = 0


def of_jaxpr(jaxpr: Any) -> list[Layer]:
    """Returns the convolutions and pools of a traced network, with their costs."""
    from jax.extend.core import Literal

    from inception_jax.models import introspect

    found = []

    def walk(
        jaxpr: Any, arguments: Sequence[_Activation | None], outer: str
    ) -> list[_Activation | None]:
        values = dict(zip(jaxpr.invars, arguments, strict=True))

        def activations(variables: Sequence[Any]) -> list[_Activation | None]:
            # Images, parameters, and constants are none.
            return [None if isinstance(v, Literal) else values.get(v) for v in variables]

        for equation in jaxpr.eqns:
            path = f"{outer}/{equation.source_info.name_stack}"
            name, inputs = equation.primitive.name, activations(equation.invars)
            results: Sequence[_Activation | None]
            if (inner := introspect.called_jaxpr(equation)) is not None:
                results = walk(inner, inputs, path)
            elif name == "convert_element_type":
                results = inputs
            elif name in ("conv_general_dilated", "reduce_window_max"):
                source, *rest = (each.aval.shape for each in equation.invars)
                kernel = rest[0] if name == "conv_general_dilated" else ()
                read = inputs[0]
                readers = None if read is None else read.readers
                found.append(layer(path, source, kernel, equation.outvars[0].aval.shape, readers))
                if read is not None:
                    read.readers += 1
                results = [_Activation()]
            else:
                # All that follows a convolution has a gradient.
                follows = any(inputs)
                results = [_Activation() if follows else None for _ in equation.outvars]
            values.update(zip(equation.outvars, results, strict=True))
        return activations(jaxpr.outvars)

    walk(jaxpr, [None] * len(jaxpr.invars), "")
    return found


def layer(
    path: str,
    source: tuple[int, ...],
    kernel: tuple[int, ...],
    result: tuple[int, ...],
    readers: int | None,
) -> Layer:
    """Returns a layer with its costs.

    Args:
      path: of the operation in the network.
      source, kernel, result: shapes; no kernel: a pool.
      readers: how many layers have read the source before; None: it is the images, which need no
        gradient.
    """
    x, y, k = math.prod(source), math.prod(result), math.prod(kernel) if kernel else 0
    # Without functions, methods, the network's name, and that of a unit's convolution.
    names = [each for each in path.split("/") if each and not re.search(r"[.(]", each)][1:]
    where = "/".join(each for each in names if each != "conv") or audit.NO_MODULE
    has_gradient = readers is not None
    # X is read for its BatchNorm, and its gradient written; later readers read that first.
    gradient = (3 * x if readers else 2 * x) if has_gradient else 0
    if not kernel:
        # The gradient looks for the maximum in X once more.
        return Layer(where, "pool", 0.0, y, 0, 0, _STORED * ((x + y) + y + gradient))
    # Augmentation writes the images.
    written = 0 if has_gradient else x
    kernels = 2 * k if has_gradient else k
    to_input = 2 * y + gradient if has_gradient else 0
    return Layer(
        where,
        "convolution",
        2.0 * y * math.prod(kernel[:-1]) * (3 if has_gradient else 2),
        y,
        k,
        needed=_STORED * (6 * y + 3 * written + kernels),
        by_operation=_STORED * ((x + y) + (x + 2 * y) + to_input + written + kernels),
    )


def account(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the bounds of the training step beside what the compiler made of it."""
    record = json.loads(arguments.program.read_text(encoding="utf-8"))
    program, target = record["programs"][0], record["target"]
    compiled = {each["name"]: each for each in program["by_module"]}
    if not all("accessed" in each for each in compiled.values()):
        raise measure.BenchmarkError(
            f"--program={arguments.program}: an older record, without the bytes accessed in all "
            "memories; write it again"
        )
    share, side = program["batch_size"] // target["devices"], program["image_size"]
    found = layers(arguments.config, share, side)
    # The gradient of the parameters has about as many numbers as the kernels.
    state = 2 * program["state_bytes"] + 2 * 4 * sum(each.kernel for each in found)
    rows = []
    for name in dict.fromkeys([*(each.module for each in found), *compiled]):
        row: dict[str, Any] = {"module": name}
        for key in _BOUNDS:
            row[key] = sum(getattr(each, key) for each in found if each.module == name)
        if name == audit.OPTIMIZER:
            row["needed"] += state
            row["by_operation"] += state
        rows.append(row | {key: compiled.get(name, {}).get(key, 0) for key in _COMPILED})
    moves = [each["accessed"] for each in program["by_kind"] if each["name"] == audit.MOVES]
    outputs = _STORED * sum(each.output for each in found if each.operation == "convolution")
    on_chip = int(arguments.on_chip * 2**20)
    spilled = 2 * max(0, outputs - on_chip)
    return {
        "config": arguments.config,
        "target": target["name"],
        "peak": target["chip"]["peak"],
        "bandwidth": target["chip"]["bandwidth"],
        "images": share,
        "versions": record["versions"],
        "revision": record["revision"],
        "modules": rows,
        "layers": [dataclasses.asdict(each) for each in found],
        "outputs": outputs,
        "on_chip": on_chip,
        "moved": sum(moves),
        "device_memory": {
            "needed": spilled + 2 * program["state_bytes"] + share * side**2 * 3,
            "bytes": program["bytes"],
        },
        "bytes_accessed": program["bytes_accessed"],
        "fastest": program["seconds"]["fastest"],
        "slowest": program["seconds"]["slowest"],
    }


def report(result: dict[str, Any]) -> str:
    """Returns the account as text: a Markdown table, and totals."""

    def mb(count: float) -> str:
        return f"{count / 1e6:,.0f}"

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.2f}"

    rows, bandwidth = result["modules"], result["bandwidth"]
    total = {key: sum(row[key] for row in rows) for key in (*_BOUNDS, *_COMPILED)}
    lines = [
        [
            row["module"],
            f"{row['flops'] / 1e9:.1f}",
            *(mb(row[key]) for key in ("needed", "by_operation", "accessed")),
            f"{row['padding'] / row['accessed']:.0%}" if row["accessed"] else "",
            f"{row['accessed'] / row['needed']:.1f}" if row["needed"] else "",
            mb(row["bytes"]),
            ms(row["flops"] / result["peak"]),
            ms(row["needed"] / bandwidth),
            ms(row["seconds"]),
        ]
        for row in [*rows, {"module": "all"} | total]
    ]
    head = ["module", "GFLOP", "needed MB", "by operation", "compiled", "padding", "ratio"]
    head += ["device memory MB", "products ms", "needed ms", "estimate ms"]
    memory, computed = result["device_memory"], total["accessed"] - result["moved"]
    return "\n".join(
        [
            markdown_table(head, lines),
            "",
            f"Compiled without moves between memories ({mb(result['moved'])} MB): "
            f"{computed / total['needed']:.1f} times what is needed, "
            f"{computed / total['by_operation']:.2f} times what is needed by operation.",
            f"All outputs of convolutions: {mb(result['outputs'])} MB; on the chip "
            f"{mb(result['on_chip'])} MB.",
            *(
                f"Device memory, {what}: {mb(memory[key])} MB, {ms(memory[key] / bandwidth)} ms."
                for what, key in (("needed", "needed"), ("compiled", "bytes"))
            ),
            f"The step's estimate: {ms(result['fastest'])} to {ms(result['slowest'])} ms.",
        ]
    )


def main() -> None:
    """Runs the command."""
    arguments = parse()
    result = account(arguments)
    measure.write_json(
        arguments.json,
        {"benchmark": "programs_bound", "environment": measure.environment(), **result},
    )
    print(report(result))


if __name__ == "__main__":
    measure.run(main)
