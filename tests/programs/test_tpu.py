"""What the compiler for TPUs makes of the training step, where it is installed (libtpu alone)."""

import functools
import importlib.metadata
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

import inception_jax as ij
from inception_jax.errors import UserError
from inception_jax.models import ops, weights
from inception_jax.programs import compile as programs
from inception_jax.programs import targets
from inception_jax.programs.compile import Program
from inception_jax.runtime import sharding
from inception_jax.training import state as states
from inception_jax.training import step as steps
from inception_jax.training.run import Run
from tests import command
from tests.programs import chains, narrow

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu: requirements/tpu.txt"
    ),
]


@pytest.fixture(scope="module", params=["v5e-1", "v5e-8"])
def compiled(request: pytest.FixtureRequest) -> tuple[Run, Program]:
    """The run of the narrow network on one and on eight chips, and its training step."""
    target = targets.get(request.param)
    run = programs.assemble(narrow.config(), target, model=narrow.Network(rewrite="tpu"))
    return run, programs.compile_train_step(run, target, 16)


def parameters(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    return weights.flatten(states.abstract_state(run).params)


def test_every_convolution_multiplies_bfloat16(compiled: tuple[Run, Program]) -> None:
    kernels = [name for name in parameters(compiled[0]) if name.endswith("conv/kernel")]
    assert compiled[1].audit.convolutions == {"bf16": 3 * len(kernels) - 1}


def test_the_whole_state_is_donated(compiled: tuple[Run, Program]) -> None:
    run, program = compiled
    leaves = jax.tree.leaves(states.abstract_state(run))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert program.audit.donated_bytes == program.audit.state_bytes == size
    assert program.memory.reused >= size


def test_images_arrive_as_uint8_each_device_its_own(compiled: tuple[Run, Program]) -> None:
    run, program = compiled
    images, labels = (program.audit.arguments[f"batch['{name}']"] for name in ("image", "label"))
    share = 64 // run.mesh.size
    assert (images, labels) == (f"u8[{share},16,16,3]", f"s32[{share}]")


def test_nothing_waits_for_the_host_and_all_shapes_are_known(compiled: tuple[Run, Program]) -> None:
    assert not compiled[1].audit.host_transfers
    assert not compiled[1].audit.dynamic_shapes


def test_devices_exchange_sums_alone_and_little_more_than_the_gradient(
    compiled: tuple[Run, Program],
) -> None:
    run, program = compiled
    found = dict(program.audit.collectives)
    if run.mesh.size == 1:
        assert not found
        return
    sizes = {name: leaf.size for name, leaf in parameters(run).items()}
    kernels = sum(size for name, size in sizes.items() if name.endswith("conv/kernel"))
    norms = sum(size for name, size in sizes.items() if "/norm/" in name)
    others = sum(sizes.values()) - kernels - norms
    count, size = found.pop("all-reduce")
    # The convolutions follow each other in three groups, whose BatchNorms need sums forward and
    # back; then come the gradients in bfloat16, those in float32, and the metrics.
    assert count <= 2 * 3 + 3
    # Kernels' gradients are summed as the convolutions return them, in bfloat16. BatchNorm sums two
    # numbers of each channel forward, and back two that are the gradients of its parameters.
    metrics = size - (2 * kernels + 2 * 4 * norms + 4 * others)
    assert 0 <= metrics <= 64
    # Of images that are mixed with those of the next device.
    assert set(found) <= {"collective-permute"}
    assert found.get("collective-permute", (0, 0))[1] <= 4 * 16 * 16 * 3 * 8


@pytest.mark.parametrize(
    ("norm_group_size", "expected"),
    [
        # Three BatchNorms in sequence, each forward and back, then the gradients of kernels.
        (0, (7, 7)),
        # The gradients of kernels in bfloat16, and everything else in float32.
        (8, (2, 1)),
    ],
)
def test_all_sums_of_one_time_travel_together(
    norm_group_size: int, expected: tuple[int, int]
) -> None:
    model = narrow.Network(norm_group_size=norm_group_size, rewrite="tpu")
    run = programs.assemble(narrow.config(), targets.get("v5e-8"), model=model)
    lowered = steps.lower_train_step(run, states.abstract_state(run), 16)
    assert chains.all_reduces(lowered.compile().as_text() or "") == expected


def test_the_compiler_estimates_most_of_the_time(compiled: tuple[Run, Program]) -> None:
    program = compiled[1]
    estimated = [each for each in program.audit.operations if each.cycles is not None]
    assert {each.kind for each in estimated} >= {
        "convolution",
        "convolution, to the input",
        "convolution, to the kernel",
        "normalization",
    }
    # The compiler also counts additions and the like, of which a narrow network has many.
    assert program.compiler_flops is not None
    assert 0.98 < program.compiler_flops / program.audit.flops < 1.5


def test_evaluation_compiles_too_and_leaves_no_cache(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        target = targets.get("v5e-8")
        run = programs.assemble(narrow.config(), target, model=narrow.Network(rewrite="tpu"))
        *_, evaluation = programs.compile_run(run, target)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert (evaluation.purpose, evaluation.batch_size) == ("evaluate", 96)
    assert set(evaluation.audit.convolutions) == {"bf16"} and not evaluation.audit.collectives
    assert not list(folder.glob("*-cache"))


def test_the_command_describes_and_records_a_run(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "programs.json"
    printed = command.check(
        "tools.compile",
        "--config=experiments/digits.py",
        "--config.model.width=0.125",
        "--target=v5litepod-1",
        f"--json={path}",
    )
    assert "on v5e-1: 1 × TPU v5e" in printed and "convolution, to the kernel" in printed
    record = json.loads(path.read_text())
    assert record["versions"]["libtpu"] == importlib.metadata.version("libtpu")
    assert [each["purpose"] for each in record["programs"]] == ["train", "evaluate"]
    assert all(each["cycles"] and each["bytes_accessed"] for each in record["programs"])


@pytest.mark.parametrize(
    ("target", "side"), [("v6e-1", 8), ("v6e-1", 21), ("tpu7x-8", 8), ("tpu7x-8", 16)]
)
def test_padded_pools_compile_where_the_compiler_fails_on_others(target: str, side: int) -> None:
    mesh = targets.make_mesh(targets.get(target))
    device = mesh.devices.flat[0]
    x = jax.ShapeDtypeStruct((64, side, side, 64), jnp.bfloat16, sharding=sharding.replicated(mesh))

    def gradient(x: jax.Array, rewrite: ops.Rewrite) -> jax.Array:
        pool = functools.partial(ops.max_pool, window=3, stride=1, rewrite=rewrite)
        # Between other operations, it fails on more sizes than alone.
        return 2 * jax.vjp(pool, jax.nn.relu(x))[1](3 * x)[0]

    lowered = {
        rewrite: jax.jit(gradient, static_argnums=1).lower(x, rewrite)
        for rewrite in ("tpu", "tpu_padded")
    }
    with programs.without_cache():
        lowered["tpu_padded"].compile()
        if ops.preferred_rewrite(device) == "tpu_padded":
            with pytest.raises(jax.errors.JaxRuntimeError, match="LLO_CHECK failure"):
                lowered["tpu"].compile()
        else:
            lowered["tpu"].compile()


def test_a_step_that_does_not_fit_is_one_message() -> None:
    config = narrow.config()
    config.data.image_size, config.train.batch_size = 4096, 1024
    with pytest.raises(UserError, match=r"v5e-1: out of memory: it needs \S+ of 15.75G"):
        ij.compile_for(config, "v5e-1", model=narrow.Network(jnp.float32))
