"""Accounts for the memory traffic of a compiled training step: what arithmetic needs, by module.

Two bounds are counted from the traced network, for the images of one device, in bytes read from and
written to any memory, the chip's own included. Both store activations and their gradients in
bfloat16, use batch statistics over all images, and store neither concatenations nor anything that
a later operation can compute from what it reads anyway: normalized values, ReLU masks.

`needed`: everything between two global sums is one pass. An output Y of a convolution takes six:
  written (its sums are made on the way) and read by the next layers at once; going back, read for
  BatchNorm's two sums and as the input of the next layers' kernel gradients at once, as its own
  gradient G is written; then G and Y read to make the gradients of the layer's kernel and input.
`by operation`: each convolution, pool and gradient is an operation of its own, with BatchNorm and
  ReLU done in the operations that read and write. A convolution reads X and writes Y; its kernel
  gradient reads X, Y and G; its input gradient reads Y and G, and the X whose BatchNorm needs sums,
  and writes a gradient of X's size, which later readers of the same X also read. Pools likewise.
  Bytes count in the module of the layer that reads or writes them.

The state is read and written once, and the gradient of the parameters, float32, written and read;
kernels are read in bfloat16 forward and for the input gradient. Not counted: the classifier,
augmentation, metrics and sums between devices.

How much must pass the device's memory depends on what fits on the chip (`--on-chip`). At the end
of the forward pass all outputs Y are alive, so what does not fit is written there and read back;
and the state and the batch come from there, and the state returns. Both are lower bounds.

  python -m benchmarks.programs_bound --config experiments/tiny.py --program FILE

FILE is a record of `python -m inception_jax.tools.compile --json`. Takes half a minute.
"""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import measure

_STORED = 2  # Bytes of an activation.
_STATE, _MOVES = "optimizer and averages", "moves between memories"


@dataclasses.dataclass
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
        """The part of the network that it belongs to, as the compiler's figures are grouped."""
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
    parser.add_argument("--layers", action="store_true", help="also print each layer's bounds")
    return parser.parse_args(argv)


def layers(config_file: str, batch_size: int, image_size: int) -> list[Layer]:
    """Returns the layers of an experiment's network.

    Args:
      config_file: the experiment.
      batch_size: images of a device.
      image_size: side of the images, pixels.
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
        raise measure.BenchmarkError(f"{config_file}: the bounds are those of BatchNorm")

    def forward(variables: Any, images: jax.Array, key: jax.Array) -> Any:
        random = {"dropout": key}
        return network.apply(variables, images, train=True, mutable=["batch_stats"], rngs=random)

    images = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.bfloat16)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return list(of_jaxpr(jax.make_jaxpr(forward)(variables, images, key).jaxpr))


def of_jaxpr(jaxpr: Any) -> Iterator[Layer]:
    """Yields the convolutions and pools of a traced network; see the module for what they cost."""
    from inception_jax.models import introspect

    # Variables that are the same array: handed to an inner program, or of another type.
    same: dict[Any, Any] = {}
    # Arrays with a gradient, and how many layers have read them. Images have none.
    readers: dict[Any, int] = {}

    def array(variable: Any) -> Any:
        while variable in same:
            variable = same[variable]
        return variable

    def walk(jaxpr: Any, outer: str) -> Iterator[Layer]:
        for equation in jaxpr.eqns:
            path = f"{outer}/{equation.source_info.name_stack}"
            name, inputs, outputs = equation.primitive.name, equation.invars, equation.outvars
            if (inner := introspect.called_jaxpr(equation)) is not None:
                same.update(zip(inner.invars, _variables(inputs), strict=True))
                yield from walk(inner, path)
                given = set(map(array, _variables(inputs)))
                for output, result in zip(outputs, _variables(inner.outvars), strict=True):
                    # Programs that are called twice have the same variables each time.
                    if array(result) in given:
                        same[output] = array(result)
                    elif array(result) in readers:
                        readers[output] = 0
            elif name == "convert_element_type":
                same[outputs[0]] = inputs[0]
            elif name in ("conv_general_dilated", "reduce_window_max"):
                source = array(inputs[0])
                earlier = readers.get(source)
                if earlier is not None:
                    readers[source] += 1
                readers[outputs[0]] = 0
                shapes = [each.aval.shape for each in (*inputs, *outputs)]
                kernel = shapes[1] if name == "conv_general_dilated" else ()
                yield layer(path, shapes[0], kernel, shapes[-1], earlier)
            # All that follows a convolution has a gradient.
            elif any(array(each) in readers for each in _variables(inputs)):
                readers.update((output, 0) for output in outputs)

    yield from walk(jaxpr, "")


def _variables(values: Sequence[Any]) -> list[Any]:
    # Literals are not hashable, and never an activation.
    return [None if hasattr(each, "val") else each for each in values]


def layer(
    path: str,
    source: tuple[int, ...],
    kernel: tuple[int, ...],
    result: tuple[int, ...],
    earlier: int | None,
) -> Layer:
    """Returns what a layer costs.

    Args:
      path: of the operation in the network.
      source, kernel, result: shapes; no kernel: a pool.
      earlier: how many layers have read the source before; None: it needs no gradient.
    """
    x, k, y = math.prod(source), math.prod(kernel) if kernel else 0, math.prod(result)
    # Without functions, methods, the network's name, and that of a unit's convolution.
    names = [each for each in path.split("/") if each and not re.search(r"[.(]", each)][1:]
    layer_path = "/".join(each for each in names if each != "conv") or "(none)"
    # The gradient of X is written, and read by later readers, which add to it; BatchNorm needs X.
    has_gradient = earlier is not None
    gradient = (3 * x if earlier else 2 * x) if has_gradient else 0
    if not kernel:
        # Going back, the position of the maximum is found once more.
        return Layer(layer_path, "pool", 0.0, y, 0, 0, _STORED * (x + y + y + gradient))
    # Images are written by the augmentation and read twice, and have no gradient.
    images = 0 if has_gradient else x
    kernels = 2 * k if has_gradient else k
    to_input = 2 * y + gradient if has_gradient else 0
    by_operation = (x + y) + (x + 2 * y) + to_input + images + kernels
    return Layer(
        layer_path,
        "convolution",
        2.0 * y * math.prod(kernel[:-1]) * (3 if has_gradient else 2),
        y,
        k,
        _STORED * (6 * y + 3 * images + kernels),
        _STORED * by_operation,
    )


def account(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the bounds of the training step, and what the compiler makes, by module."""
    record = json.loads(arguments.program.read_text(encoding="utf-8"))
    program, target = record["programs"][0], record["target"]
    chip = target["chip"]
    if not all("accessed" in each for each in program["by_module"]):
        raise measure.BenchmarkError(
            f"{arguments.program}: has no bytes in all memories; write it again"
        )
    share = program["batch_size"] // target["devices"]
    found = layers(arguments.config, share, program["image_size"])
    compiled = {each["name"]: each for each in program["by_module"]}
    # The gradient has about as many numbers as the kernels.
    state = 2 * program["state_bytes"] + 2 * 4 * sum(each.kernel for each in found)
    names = dict.fromkeys(each.module for each in found)
    rows = []
    for name in [*names, *(each for each in compiled if each not in names)]:
        own = [each for each in found if each.module == name]
        extra = state if name == _STATE else 0
        made = compiled.get(name, {})
        rows.append(
            {
                "module": name,
                "flops": sum(each.flops for each in own),
                "needed": sum(each.needed for each in own) + extra,
                "by_operation": sum(each.by_operation for each in own) + extra,
                **{key: made.get(key, 0) for key in ("accessed", "padding", "bytes", "cycles")},
                "seconds": made.get("seconds", 0.0),
            }
        )
    outputs = _STORED * sum(each.output for each in found if each.operation == "convolution")
    on_chip = int(arguments.on_chip * 2**20)
    images = share * program["image_size"] ** 2 * 3
    return {
        "config": arguments.config,
        "target": target["name"],
        "peak": chip["peak"],
        "bandwidth": chip["bandwidth"],
        "images": share,
        "versions": record["versions"],
        "revision": record["revision"],
        "modules": rows,
        "layers": [dataclasses.asdict(each) for each in found],
        "outputs": outputs,
        "on_chip": on_chip,
        "moved": next(
            (each["accessed"] for each in program["by_kind"] if each["name"] == _MOVES), 0
        ),
        "device_memory": {
            "needed": 2 * max(0, outputs - on_chip) + 2 * program["state_bytes"] + images,
            "bytes": program["bytes"],
        },
        "bytes_accessed": program["bytes_accessed"],
        "fastest": program["seconds"]["fastest"],
        "slowest": program["seconds"]["slowest"],
    }


def layer_rows(layers: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows of the table of layers."""
    head = ["layer", "operation", "GFLOP", "output MB", "needed MB", "by operation MB"]
    return head, [
        [
            *(each["path"], each["operation"], f"{each['flops'] / 1e9:.2f}"),
            f"{_STORED * each['output'] / 1e6:.2f}",
            *(f"{each[key] / 1e6:.1f}" for key in ("needed", "by_operation")),
        ]
        for each in layers
    ]


def report(result: dict[str, Any]) -> str:
    """Returns the account as text: a Markdown table, and totals."""
    rows = result["modules"]
    keys = ("flops", "needed", "by_operation", "accessed", "padding", "bytes", "seconds")
    total = {"module": "all"} | {key: sum(row[key] for row in rows) for key in keys}
    lines = []
    for row in [*rows, total]:
        ratio = row["accessed"] / row["needed"] if row["needed"] else 0.0
        lines.append(
            [
                row["module"],
                f"{row['flops'] / 1e9:.1f}",
                *(f"{row[key] / 1e6:,.0f}" for key in ("needed", "by_operation", "accessed")),
                f"{row['padding'] / row['accessed']:.0%}" if row["accessed"] else "",
                f"{ratio:.1f}" if ratio else "",
                f"{row['bytes'] / 1e6:,.0f}",
                f"{1e3 * row['flops'] / result['peak']:.2f}",
                f"{1e3 * row['needed'] / result['bandwidth']:.2f}",
                f"{1e3 * row['seconds']:.2f}",
            ]
        )
    head = ["module", "GFLOP", "needed MB", "by operation", "compiled", "padding", "ratio"]
    head += ["device memory MB", "products ms", "needed ms", "estimate ms"]
    memory, computed = result["device_memory"], total["accessed"] - result["moved"]
    return "\n".join(
        [
            measure.markdown_table(head, lines),
            "",
            f"Compiled without moves between memories ({result['moved'] / 1e6:,.0f} MB): "
            f"{computed / total['needed']:.1f} times what is needed, "
            f"{computed / total['by_operation']:.2f} times what is needed by operation.",
            f"All outputs of convolutions: {result['outputs'] / 1e6:,.0f} MB; on the chip "
            f"{result['on_chip'] / 1e6:,.0f} MB.",
            f"Device memory: needed {memory['needed'] / 1e6:,.0f} MB "
            f"({1e3 * memory['needed'] / result['bandwidth']:.2f} ms), compiled "
            f"{memory['bytes'] / 1e6:,.0f} MB ({1e3 * memory['bytes'] / result['bandwidth']:.2f} "
            f"ms). The step's estimate: {1e3 * result['fastest']:.1f} to "
            f"{1e3 * result['slowest']:.1f} ms.",
        ]
    )


def main() -> None:
    """Runs the command."""
    arguments = parse()
    result = account(arguments)
    measure.write_json(arguments.json, {"environment": measure.environment(), **result})
    if arguments.layers:
        print(f"{measure.markdown_table(*layer_rows(result['layers']))}\n")
    print(report(result))


if __name__ == "__main__":
    measure.run(main)
