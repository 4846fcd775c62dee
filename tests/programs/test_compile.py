"""Compiling a run for devices that are not there; here, the CPU's compiler stands in for theirs.

tests/programs/test_tpu.py uses the compiler for TPUs where it is installed.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import pytest

import inception_jax as ij
from inception_jax.config import Config, Data, Evaluation, View
from inception_jax.datasets.dataset import prepare
from inception_jax.errors import ConfigError, RunError, UserError
from inception_jax.programs import compile as programs
from inception_jax.programs import targets
from inception_jax.registry import DATASETS
from inception_jax.runtime import sharding
from tests import command, small
from tests.markdown import python_blocks
from tests.programs import narrow


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the eight devices of a target by eight simulated ones."""
    monkeypatch.setattr(targets, "make_mesh", lambda target: sharding.make_mesh())


def test_the_known_sizes_are_those_of_the_prepared_data(data_directory: pathlib.Path) -> None:
    dataset = prepare(small.config(data_directory).data, log=lambda line: None)
    part = DATASETS.get("digits")
    assert part.examples == {name: len(split) for name, split in dataset.splits.items()}
    assert part.num_classes == dataset.num_classes


def test_shapes_follow_from_the_settings() -> None:
    config = Config(data=Data(name="tiny_imagenet", image_size=64, holdout=2000))
    config.evaluations = {"other": View(split="test", examples=500)}
    dataset = programs.abstract_dataset(config)
    assert (len(dataset.train), len(dataset.evaluation)) == (98_000, 2000)
    assert dataset.train.image_shape == (64, 64, 3) and dataset.num_classes == 200
    assert len(dataset.view("test", crop=0.9, examples=400)) == 400


def test_sizes_that_depend_on_the_source_must_be_given() -> None:
    config = Config(data=Data(name="image_folder"), evaluation=Evaluation(batch_size=100))
    with pytest.raises(UserError, match=r"number of classes of image_folder .* set --classes=N"):
        programs.abstract_dataset(config)
    with pytest.raises(UserError, match=r"number of training images .* set --examples=N"):
        programs.abstract_dataset(config, classes=5)
    dataset = programs.abstract_dataset(config, classes=5, examples=4000)
    assert (len(dataset.train), len(dataset.evaluation)) == (4000, 100)
    assert dataset.num_classes == 5


def test_a_size_that_contradicts_the_data_set_is_refused() -> None:
    with pytest.raises(UserError, match="classes = 10: tiny_imagenet has 200; leave it out"):
        programs.abstract_dataset(Config(data=Data(name="tiny_imagenet")), classes=10)
    with pytest.raises(UserError, match=r"holdout = 5000: must be less than .* images, 1,437"):
        programs.abstract_dataset(Config(data=Data(name="digits", holdout=5000)))


@pytest.mark.usefixtures("on_cpu")
def test_a_run_is_compiled_and_described_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    config = narrow.config()
    config.train.image_sizes, config.train.image_size_boundaries = (8, 16), ("5 steps",)
    config.evaluation.flip_tta = True
    report = ij.compile_for(config, "v5e-8", model=small.Network())
    record = json.loads(json.dumps(report.record))
    assert [each["name"] for each in record["programs"]] == [
        "training step, 16 px, batch 64",
        "training step, 8 px, batch 64",
        "evaluation, 16 px, batch 96",
    ]
    train, evaluate = record["programs"][0], record["programs"][-1]
    assert train["donated_bytes"] == train["state_bytes"] > 0
    parts = dict(train["memory"])
    peak, reused = parts.pop("peak"), parts.pop("reused")
    assert 0 < peak == sum(parts.values()) - reused
    # While evaluating, the optimizer's state, averages and metrics stay where they are.
    assert train["memory"]["resident"] == 0 < evaluate["memory"]["resident"]
    assert record["versions"]["jax"] == jax.__version__
    assert record["recipe"]["images_per_second"][0] <= record["recipe"]["images_per_second"][1]
    assert record["recipe"]["minutes"][0] <= record["recipe"]["minutes"][1]
    text = str(report)
    assert "small (Network, bfloat16) on v5e-8: 8 × TPU v5e" in text
    assert "Nothing was run: times are estimates." in text
    assert "training step, 8 px, batch 64" in text and "kind" in text and "convolution" in text
    assert "compiling for v5e-8" in capsys.readouterr().err


@pytest.mark.usefixtures("on_cpu")
def test_the_program_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = python_blocks("docs/compile.md")
    # A network that compiles in seconds.
    compile_for = functools.partial(ij.compile_for, model=small.Network(classes=200))
    monkeypatch.setattr(ij, "compile_for", compile_for, raising=False)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["report"].record["batch_size"] == 1024


@pytest.mark.usefixtures("on_cpu")
def test_a_batch_that_the_devices_cannot_share_is_refused() -> None:
    config = narrow.config()
    config.train.batch_size = 60
    with pytest.raises(ConfigError, match=r"batch_size = 60: must be a multiple of 8: 8 devices"):
        ij.compile_for(config, "v5e-8")


def failing(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Makes the compiler fail with a message."""

    def fail(self: Any) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "message",
    [
        # Of libtpu 0.0.50.1, and of older ones.
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (19.53G) exceeds available HBM (15.75G). HLO module: jit_f.",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 19.53G of 15.75G hbm. Exceeded hbm capacity by 3.78G.",
    ],
)
def test_a_step_that_needs_too_much_memory_names_the_settings_to_change(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, message)
    with pytest.raises(programs.OutOfMemory) as caught:
        ij.compile_for(narrow.config(), "v5e-8", model=small.Network())
    assert str(caught.value) == (
        "training step, 16 px, batch 64, v5e-8: out of memory: it needs 19.53G of 15.75G on each "
        "device; reduce config.train.batch_size (currently 64), or split each batch with "
        "config.train.grad_accum_steps (currently 1) = 2, 4, …"
    )


@pytest.mark.usefixtures("on_cpu")
def test_a_gpu_program_larger_than_jax_reserves_does_not_fit() -> None:
    text = "device_memory_size: 100000\nmemory_bandwidth: 1000"
    target = targets.from_target_config(text, 8, "small.pbtxt")
    with pytest.raises(programs.OutOfMemory, match=r"it needs \d\.\d\dM of 0\.07M on each device"):
        ij.compile_for(narrow.config(), target, model=small.Network())


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("INTERNAL: LLO_CHECK failure (llo_instruction.h) opcode=vector-store", "libtpu 0.0.50.1"),
        ("INTERNAL: Check failed: index < size", "Try another version of libtpu"),
    ],
)
def test_a_fault_of_the_compiler_is_called_one(
    message: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, f"{message}\nmore")
    with pytest.raises(RunError, match=rf"a fault of the compiler: .*INTERNAL: .*\. {remedy}"):
        ij.compile_for(narrow.config(), "v6e-8", model=small.Network())


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("norm_group_size", "unit"), [(0, 8), (16, 16), (4, 8)])
def test_the_largest_batch_is_found_by_compiling_several(
    norm_group_size: int, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def compile_step(run: Any, *rest: Any) -> None:
        batch_size = run.config.train.batch_size
        tried.append(batch_size)
        if batch_size > 900:
            raise programs.OutOfMemory("too large")

    monkeypatch.setattr(programs, "compile_train_step", compile_step)

    def assemble(batch_size: int) -> Any:
        config = narrow.config()
        config.train.batch_size = batch_size
        config.model.norm_group_size = norm_group_size
        return programs.assemble(config, targets.get("v5e-8"), model=small.Network())

    found = programs.largest_batch(assemble, targets.get("v5e-8"), 64)
    assert 900 * 7 / 8 - unit <= found <= 900
    assert all(size % unit == 0 for size in tried) and len(tried) == len(set(tried)) <= 9


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 63, 64, 65, 1000, 5000])
@pytest.mark.parametrize("start", [1, 3, 64])
def test_bisection_ends_within_an_eighth_of_the_limit(limit: int, start: int) -> None:
    tried: list[int] = []

    def fits(number: int) -> bool:
        assert 0 < number <= 2000 and number not in tried
        tried.append(number)
        return number <= limit

    found = programs.bisect_largest(fits, start, 2000)
    true = min(limit, 2000)
    assert 7 / 8 * true - 1 <= found <= true and (found > 0) == (true > 0)
    assert len(tried) <= 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target=v5e-3"], "no such target. Did you mean v5e-"),
        ([], "give one of --target=NAME or --target_config=FILE"),
        (["--target=h100", "--target_config=x"], "give one of --target=NAME"),
        (["--target=h100", "--devices=2"], "--devices=2: requires --target_config"),
        (["--target_config=/nonexistent"], "--target_config=/nonexistent: file not found"),
        (["--target=v5e-8", "--json=/proc/x/y"], "--json=/proc/x/y: cannot be written to"),
    ],
)
def test_wrong_flags_are_one_message(arguments: list[str], message: str) -> None:
    done = command.run("tools.compile", "--config=experiments/digits.py", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
