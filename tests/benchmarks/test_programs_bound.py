"""The bounds of a training step, and the account of what a compiler made of it."""

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks import measure, programs_bound
from benchmarks.contenders import network

# Elements of the image, of a convolution's output, and of the kernels below.
X, Y, K1, K2 = 2 * 8 * 8 * 3, 2 * 8 * 8 * 4, 9 * 3 * 4, 4 * 4


def traced(function: Any, *shapes: tuple[int, ...]) -> list[programs_bound.Layer]:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return programs_bound.of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.jit
def relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def test_an_output_takes_six_passes_and_images_have_no_gradient() -> None:
    def two(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        return relu(conv(relu(conv(relu(x), first)), second))

    first, second = traced(two, (2, 8, 8, 3), (3, 3, 3, 4), (1, 1, 4, 4))
    assert first.flops == 2 * 2 * Y * 27 and second.flops == 2 * 3 * Y * 4
    assert first.needed == 2 * (6 * Y + 3 * X + K1)
    assert second.needed == 2 * (6 * Y + 2 * K2)
    assert first.by_operation == 2 * (X + (X + Y) + (X + 2 * Y) + K1)
    # Its source is as large as its output.
    assert second.by_operation == 2 * ((Y + Y) + (Y + 2 * Y) + (2 * Y + 2 * Y) + 2 * K2)


def test_later_readers_of_an_array_add_to_its_gradient() -> None:
    def shared(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        x = relu(conv(x, first))
        pooled = lax.reduce_window(
            x.astype(jnp.float32), -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"
        )
        pooled = relu(pooled.astype(jnp.bfloat16))
        return jnp.concatenate([conv(x, second), conv(pooled, second)], axis=-1)

    _, pool, left, right = traced(shared, (2, 8, 8, 3), (3, 3, 3, 4), (1, 1, 4, 4))
    assert (pool.operation, pool.needed) == ("pool", 0)
    assert pool.by_operation == 2 * ((Y + Y) + Y + 2 * Y)
    assert left.by_operation == right.by_operation + 2 * Y


def test_the_counts_are_those_of_the_network() -> None:
    found = programs_bound.layers("experiments/tiny.py", 1, 64)
    expected = list(network.convolutions("s32", 64))
    convolutions = [each for each in found if each.operation == "convolution"]
    assert [each.kernel for each in convolutions] == [each.weights for each in expected]
    assert [each.output for each in convolutions] == [e.outputs * e.grid**2 for e in expected]
    assert sum(each.operation == "pool" for each in found) == 9 + 3


RECORD = {
    "target": {"name": "v5e-8", "devices": 8, "chip": {"peak": 2e14, "bandwidth": 8e11}},
    "versions": {"libtpu": "0.0.50.1"},
    "revision": "abc",
    "programs": [
        {
            "batch_size": 8,
            "image_size": 32,
            "state_bytes": 1000,
            "bytes": 4e6,
            "bytes_accessed": 5e6,
            "seconds": {"fastest": 1e-3, "slowest": 2e-3},
            "by_kind": [{"name": "moves between memories", "accessed": 3e6}],
            "by_module": [
                {
                    "name": name,
                    "bytes": 1e6,
                    "accessed": 2e6,
                    "padding": 5e5,
                    "cycles": 10,
                    "seconds": 1e-3,
                }
                for name in ("conv1", "augmentation", "optimizer and averages")
            ],
        }
    ],
}


def arguments(path: pathlib.Path, *more: str) -> argparse.Namespace:
    return programs_bound.parse(
        ["--config=experiments/digits.py", f"--program={path}", "--on-chip=0.5", *more]
    )


def test_the_account_sets_bounds_beside_what_the_compiler_made(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "programs.json"
    path.write_text(json.dumps(RECORD))
    result = programs_bound.account(arguments(path))
    rows = {row["module"]: row for row in result["modules"]}
    assert rows["conv1"]["accessed"] == rows["augmentation"]["accessed"] == 2e6
    assert rows["inception_3a"]["needed"] > 0 == rows["inception_3a"]["accessed"]
    kernels = sum(each["kernel"] for each in result["layers"])
    assert rows["optimizer and averages"]["needed"] == 2 * 1000 + 8 * kernels
    outputs = sum(e["output"] for e in result["layers"] if e["operation"] == "convolution")
    spilled = 2 * max(0, 2 * outputs - 2**19)
    assert result["device_memory"]["needed"] == spilled + 2 * 1000 + 32 * 32 * 3
    lines = programs_bound.report(result).splitlines()
    assert "25%" in next(line for line in lines if line.startswith("| conv1"))
    assert lines[-1] == "The step's estimate: 1.00 to 2.00 ms."
    needed = sum(row["needed"] for row in rows.values())
    assert f"(3 MB): {3e6 / needed:.1f} times what is needed" in lines[-5]


def test_an_old_record_is_rejected(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "programs.json"
    old = json.loads(json.dumps(RECORD))
    del old["programs"][0]["by_module"][0]["accessed"]
    path.write_text(json.dumps(old))
    with pytest.raises(measure.BenchmarkError, match="write it again"):
        programs_bound.account(arguments(path))
